"""The GPU command without a GPU: what it says of that, its logic in a dry run, and what it makes of figures."""

import os
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: nothing to interpret")

from cachequant.benchmarks.gpu import attention, cases, correctness, encoding, models, report
from cachequant.benchmarks.gpu.attention import with_ratios
from cachequant.benchmarks.gpu.ceilings import FlushedSubnormals, require_subnormals
from cachequant.benchmarks.gpu.correctness import WrongResult, relative, require_right
from cachequant.benchmarks.gpu.machine import Clock, Machine, in_parallel
from cachequant.benchmarks.gpu.results import (
    AttentionTiming,
    Ceilings,
    Check,
    DecodeTiming,
    EncodeTiming,
    Exactness,
    Hardware,
    PrefillTiming,
    Results,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited |= {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "cachequant.benchmarks.gpu", *arguments], env=inherited, capture_output=True, text=True
    )


def results(**parts: object) -> Results:
    hardware = Hardware.current(CPU, "0123456789abcdef")
    return Results.model_validate({"hardware": hardware, "dry": False, "budget_s": 480, "sections": ("x",), **parts})


def timing(contender: str, us: float | None, sixteen_bit: bool = False, tokens: int = 1 << 17) -> AttentionTiming:
    return AttentionTiming(
        batch=1, kv_heads=8, group=4, tokens=tokens, contender=contender, sixteen_bit=sixteen_bit, bytes=10**8, us=us,
        tb_s=None if us is None else 100 / us, share=None, ratio=None,
    )  # fmt: skip


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path):
    done = command("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("no GPU to measure: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_section_is_refused():
    done = command("--dry", "--only", "ceilings,speed")
    assert done.returncode == 2
    assert "ceilings,correctness,attention,encode,models" in done.stderr.replace("\n", "")


def test_a_dry_run_writes_everything_and_claims_no_times(tmp_path):
    done = command("--dry", "--only", "attention,ceilings", "--out", str(tmp_path), "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run: no timings" in done.stdout
    found = Results.model_validate_json((tmp_path / "gpu.json").read_text())
    assert found.dry
    assert found.sections == ("ceilings", "attention")
    assert found.failures == found.skipped == []
    assert all(each.exact for each in found.exactness)
    assert found.ceilings == Ceilings(read_tb_s=None, copy_tb_s=None)
    assert {each.contender for each in found.attention} > {*cases.timed_formats(), attention.QAQ}
    assert all(each.us is each.tb_s is each.ratio is None for each in found.attention)
    assert "dry run: no timings" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_what_no_longer_fits_the_budget_is_left_out_and_said():
    machine = Machine(CPU, Clock(0, {"a": 1}))
    for found in (correctness.run(machine), attention.run(machine, None), encoding.run(machine), models.run(machine)):
        left_out = [line for line in found if not line.startswith("note: ") and "QuantizedCache" not in line]
        assert left_out
        assert all("time was up" in line for line in left_out)


# ---- conditions ------------------------------------------------------------------------------------------------------


def test_flushed_subnormals_stop_everything():
    require_subnormals([Exactness(shape="a", instruction="mma.sync", exact=True)])
    with pytest.raises(FlushedSubnormals, match=r"b, wgmma"):
        require_subnormals([Exactness(shape="b", instruction="wgmma", exact=False)])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"error": 0.5}, "5.0e-01"),
        ({"error": float("inf")}, "inf"),
        ({"error": 0.0, "replay_equal": False}, "graph"),
        ({"error": None, "failure": "AcceleratorError: CUDA error: an illegal memory access"}, "illegal"),
    ],
)
def test_a_wrong_result_stops_everything(fault, said):
    with pytest.raises(WrongResult, match=said):
        require_right([Check(case="uniform", variant="portable", tolerance=2e-3, **fault)])


def test_a_kernel_that_does_not_compile_stops_only_itself():
    failed = Check(case="uniform", variant="assembly", tolerance=2e-3, error=None, failure="CompilationError: no")
    require_right([failed, Check(case="uniform", variant="portable", tolerance=2e-3, error=1e-4, replay_equal=True)])


def test_outputs_with_nan_are_wrong():
    assert relative(torch.tensor([1.0, torch.nan]), torch.ones(2, dtype=torch.float64)) == float("inf")


@pytest.mark.parametrize("chosen", models.contenders(dry=False), ids=lambda contender: contender.name)
@torch.inference_mode()
def test_a_filled_cache_holds_what_is_claimed_and_decodes(chosen):
    machine, tokens = Machine(CPU, Clock(60, {})), 640
    model = models.build(machine, models.LLAMA_2)
    cache = chosen.cache(model, tokens)
    models.fill(machine, model, cache, tokens)
    assert int(cache.get_seq_length()) == tokens
    logits = model(torch.tensor([[7]]), past_key_values=cache, use_cache=True).logits
    assert logits.isfinite().all()
    assert int(cache.get_seq_length()) == tokens + 1


@torch.inference_mode()
def test_models_and_encoding_run_dry_without_times():
    machine = Machine(CPU, Clock(60, {}))
    found = [*models.run(machine), *encoding.run(machine)]
    decoded = [each for each in found if isinstance(each, DecodeTiming)]
    assert {each.model for each in decoded} == {"LLaMA-2-7B shape", "Llama-3.1-8B shape"}
    assert len(decoded) == 2 * len(models.contenders(dry=True))
    assert all(each.eager_ms is each.graph_ms is each.tokens_per_s is None for each in decoded)
    assert [each.ms for each in found if isinstance(each, PrefillTiming)] == [None] * 4
    assert [each.ms for each in found if isinstance(each, EncodeTiming)] == [None] * len(cases.timed_formats())
    assert not [each for each in found if isinstance(each, str) and each.startswith("failed")]


# ---- time ------------------------------------------------------------------------------------------------------------


def test_sections_share_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock, spent = Clock(100, {"a": 1, "b": 3}), {}
    with clock.section("a", spent):
        assert clock.left() == 25
        now[0] = 5
    with clock.section("b", spent):
        assert clock.left() == 95
        now[0] = 110
        assert clock.left() < 0
    assert spent == {"a": 5, "b": 105}


def test_what_there_is_no_time_for_gives_nothing():
    machine = Machine(CPU, Clock(0, {"a": 1}))
    assert list(in_parallel(abs, [-1, -2], machine)) == [(-1, None), (-2, None)]
    machine = Machine(CPU, Clock(60, {"a": 1}))
    assert list(in_parallel(abs, [-1, -2], machine)) == [(-1, 1), (-2, 2)]


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_ratios_are_to_the_best_that_reads_16_bits():
    compared = with_ratios(
        [timing("slow", 90, True), timing("fast", 60, True), timing("ours", 20), timing("none", None)]
    )
    assert [each.ratio for each in compared] == [60 / 90, 1, 3, None]
    assert with_ratios([timing("ours", 20)])[0].ratio is None


def test_figures_reach_the_markdown_and_the_picture(tmp_path):
    rows = [
        row
        for tokens in (8192, 1 << 20)
        for row in with_ratios([timing("a", 60, True, tokens), timing("b", 20, False, tokens)])
    ]
    decode = DecodeTiming(
        model="m",
        contender="c",
        tokens=16384,
        eager_ms=30,
        graph_ms=8,
        tokens_per_s=125,
        cache_bytes=10**9,
        peak_bytes=None,
    )
    found = results(
        ceilings=Ceilings(read_tb_s=4.5, copy_tb_s=4.25),
        attention=rows,
        decode=[decode],
        notes=["a note"],
        failures=["a failure"],
        spent_s={"attention": 12.0},
    )
    text = report.markdown(found)
    assert "| b | 100.0 | 20.0 | 5.00 | - | 3.00x |" in text
    assert "| c | 30.00 | 8.00 | 125.0 | 1.00 | - |" in text
    assert "- a note" in text
    assert "- a failure" in text
    assert "dry run" not in text
    paths = report.write(found, tmp_path)
    assert [path.name for path in paths] == ["gpu.json", "gpu.md", "gpu.png"]
    assert Results.model_validate_json(paths[0].read_text()) == found


def test_every_sheet_has_as_many_cells_as_headings():
    check = Check(case="x", variant="portable", error=1e-4, tolerance=2e-3)
    found = results(attention=[timing("a", None)], checks=[check], ceilings=Ceilings(read_tb_s=None, copy_tb_s=None))
    for sheet in report.sheets(found):
        assert all(len(row) == len(sheet.headings) for row in sheet.rows)


def test_the_commit_is_named_where_the_sources_are_no_checkout(monkeypatch):
    monkeypatch.setattr("cachequant.benchmarks.environment._commit", lambda: None)
    assert Hardware.current(CPU, "abc").environment.commit == "abc"
    assert Hardware.current(CPU, None).environment.commit is None
