"""The benchmarks of widths that change while decoding: they run end to end, and leave nothing behind."""

import json

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cachequant import registry
from cachequant.benchmarks import adaptive_cost, bits_over_time, speed
from cachequant.benchmarks.adaptive_cost import PARTS, Clocks
from cachequant.core import PackedCache, attach
from cachequant.core.hf.adaptive import AdaptiveLayer
from cachequant.core.hf.layer import SIDES
from cachequant.strategies.qaq import QAQ


def build_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def command(main):
    app = typer.Typer()
    app.command()(main)
    return app


def originals():
    return [vars(owner).get(name) for methods in PARTS.values() for owner, name in methods]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(adaptive_cost, "build_model", lambda dtype: build_model().to(dtype))


# --- cost


def test_cost_of_every_contender_is_split_and_written(tiny, tmp_path):
    before = originals()
    options = ["--lengths", "192", "--interval", "4,8", "--steps", "16", "--swept-length", "160", "--strategy"]
    found = CliRunner().invoke(
        command(adaptive_cost.main), [*options, "qaq:interval=8", "--out", str(tmp_path / "new")]
    )
    assert found.exit_code == 0, found.output
    assert originals() == before
    report = json.loads((tmp_path / "new" / "adaptive-cost.json").read_text())
    names = [row["contender"] for row in report["lengths"]]
    assert names[0] == speed.BASELINE and names[1] == "uniform:bits=2" and names[-1] == "qaq:interval=8"
    assert [row["interval"] for row in report["intervals"]] == [None, 4, 8]
    for row in [*report["lengths"], *report["intervals"]]:
        assert sum(row["parts"].values()) == pytest.approx(row["mean_ms"])
        assert row["parts"]["rest"] > 0 and all(spent >= 0 for spent in row["parts"].values())
        assert row["median_ms"] <= row["worst_ms"]
    qaq = report["lengths"][-1]
    assert qaq["decisions"] == 2 and 0 <= qaq["moved"] <= 1
    assert all(qaq["parts"][part] > 0 for part in PARTS)
    assert [row["decisions"] for row in report["intervals"]] == [0, 4, 2]
    assert "| 192 | `qaq:interval=8` |" in (tmp_path / "new" / "adaptive-cost.md").read_text()
    # whoever is called by a part of another name is not counted twice, and stock caches are in no part
    assert report["lengths"][0]["parts"]["rest"] == pytest.approx(report["lengths"][0]["mean_ms"])


def test_methods_are_themselves_again_after_an_error():
    before = originals()
    clocks = Clocks({**PARTS, "decision": ((QAQ, "widths"), (QAQ, "host_copy_that_is_not"))})
    with pytest.raises(AttributeError), clocks.installed():
        pass
    assert originals() == before
    clocks = Clocks(PARTS)
    with pytest.raises(RuntimeError, match="in the middle"), clocks.installed():
        assert originals() != before
        raise RuntimeError("in the middle")
    assert originals() == before


def test_an_inherited_method_is_not_left_on_the_subclass():
    class Child(QAQ):
        pass

    with Clocks({"decision": ((Child, "widths"),)}).installed():
        assert "widths" in vars(Child)
    assert "widths" not in vars(Child) and Child.widths is QAQ.widths


def test_a_part_does_not_contain_the_parts_it_calls():
    def spin(count):
        torch.ones(200, 200).matrix_power(count)

    class Outer:
        def call(self):
            spin(2)
            self.inner()

        def inner(self):
            for _ in range(20):
                spin(64)

    clocks = Clocks({"outer": ((Outer, "call"),), "inner": ((Outer, "inner"),)})
    with clocks.installed():
        Outer().call()
        assert clocks.page.parts["inner"] > clocks.page.parts["outer"] > 0
        clocks.turn()
    assert set(clocks.page.parts.values()) == {0.0}


def test_a_filled_cache_has_decided_with_evidence():
    model = build_model()
    attach(model)
    cache = PackedCache(model, registry.parse("qaq:interval=8"), residual_length=16)
    adaptive_cost.fill(cache, model, 64)
    for layer in cache.layers:
        assert isinstance(layer, AdaptiveLayer)
        assert layer.packed_tokens == 48 and not layer.due
        # measured on queries of the size that they would have
        size = (adaptive_cost.DEVIATION * adaptive_cost.SHARPNESS) ** 2
        assert layer.measured["query_norm"].item() == pytest.approx(size, rel=0.8)
    assert all(2 <= bits <= 8 for bits in adaptive_cost.widths(cache))


@pytest.mark.parametrize(
    ("key", "value", "spec"),
    [(2.1, 2.3, "uniform:bits=2"), (4.2, 2.0, "uniform:key_bits=4,value_bits=2"), (7, 7, "uniform:bits=8")],
)
def test_equal_bits_are_the_nearest_of_either_side(key, value, spec):
    assert adaptive_cost.equal_bits(key, value) == spec
    registry.parse(spec)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--strategy", "uniform"], "decides nothing"),
        (["--lengths", "1k"], "whole numbers"),
        (["--strategy", "qaqq"], "qaq"),
    ],
)
def test_cost_says_what_it_cannot_measure(options, hint):
    found = CliRunner().invoke(command(adaptive_cost.main), options, env={"COLUMNS": "300", "TERM": "dumb"})
    assert found.exit_code == 2 and hint in found.output


# --- picture


def test_widths_are_recorded_after_every_decision():
    model = build_model()
    strategy = registry.parse("qaq:interval=16,sigma_value=0.02")
    ids = torch.randint(64, (1, 128), generator=torch.Generator().manual_seed(0))
    trace = bits_over_time.record(model, strategy, ids, 1, 32, 16)
    assert trace.seen == [*range(32, 129, 16)]
    for side in SIDES:
        assert [len(row) for row in trace.widths[side]] == [seen - 16 for seen in trace.seen]
        assert 0 <= bits_over_time.moved(trace, side) <= 1
    with pytest.raises(ValueError, match="layers 0 to 1, not 2"):
        bits_over_time.record(model, strategy, ids, 2, 32, 16)
    with pytest.raises(ValueError, match="nothing was packed"):
        bits_over_time.record(model, strategy, ids[:, :20], 0, 16, 16)


def test_share_of_moves_counts_tokens_that_were_there_before():
    rows = [torch.tensor(row, dtype=torch.uint8) for row in ([2, 2], [2, 4, 8, 8], [2, 4, 8, 2, 2])]
    trace = bits_over_time.Trace([2, 4, 5], {"key": rows, "value": rows})
    assert bits_over_time.moved(trace, "key") == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_picture_is_drawn_from_the_reference_model(tmp_path):
    path = tmp_path / "bits.png"
    options = ["--length", "128", "--layer", "0", "--out", str(path)]
    found = CliRunner().invoke(command(bits_over_time.main), options)
    assert found.exit_code == 0, found.output
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 150_000
    assert "bits on average" in found.output


def test_dropped_and_single_rows_can_be_drawn(tmp_path):
    rows = [torch.tensor([0, 16, 2], dtype=torch.uint8)]
    trace = bits_over_time.Trace([5], {"key": rows, "value": rows})
    bits_over_time.draw(trace, bits_over_time.Labels("title", "subtitle", "first"), tmp_path / "one.png")
    assert (tmp_path / "one.png").is_file()


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--strategy", "uniform"], "same bits"),
        (["--length", "60"], "more than the prefill"),
        (["--layer", "9", "--length", "100"], "layers 0 to 5"),
    ],
)
def test_picture_says_what_it_cannot_draw(options, hint, tmp_path):
    found = CliRunner().invoke(
        command(bits_over_time.main),
        [*options, "--out", str(tmp_path / "x.png")],
        env={"COLUMNS": "300", "TERM": "dumb"},
    )
    assert found.exit_code == 2 and hint in found.output


def test_speed_says_where_widths_by_attention_are_timed():
    with pytest.raises(ValueError, match=r"'qaq' decides widths by attention.*benchmarks.adaptive_cost"):
        speed.contenders(speed.build_model(), ("qaq",))
