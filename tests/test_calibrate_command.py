"""`cachequant calibrate` fills a folder that can be used, goes on where it was interrupted, and refuses in one line."""

import json
import os
import shlex
import signal

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cachequant import registry
from cachequant.benchmarks import calibration_cost
from cachequant.benchmarks.cli import app
from cachequant.core import PackedCache, detach
from cachequant.core.calibration import CalibratedStrategy
from cachequant.core.calibration.resume import FILE
from cachequant.core.hf import calibrate as calibrating

VOCABULARY = 64
FINISHED = ["calibration.json", "calibration.safetensors"]


def build_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a tokenizer that knows one word per id, and texts."""
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", unk_token="w1").save_pretrained(folder)
    for name, seed in (("text.txt", 0), ("other.txt", 1)):
        ids = torch.randint(2, VOCABULARY, (3000,), generator=torch.Generator().manual_seed(seed)).tolist()
        (folder / name).write_text(" ".join(f"w{i}" for i in ids))
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def command(folder, out, spec="kvquant:bits=3", **options):
    given = {"model": folder, "text": folder / "text.txt", "samples": 3, "length": 320, "out": out} | options
    return ("calibrate", spec, *(part for name, value in given.items() for part in (f"--{name}", value)))


def content(folder):
    """What was learned, without the seconds it took."""
    record = json.loads((folder / "calibration.json").read_text())
    record["evidence"].pop("seconds")
    return record, (folder / "calibration.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The output of a command, and the folder it filled."""
    out = tmp_path_factory.mktemp("finished") / "kvquant 3"
    result = invoke(*command(folder, out))
    assert result.exit_code == 0, result.output
    return result.output, out


def test_the_folder_holds_a_calibration_that_serves_the_model(folder, finished):
    _, out = finished
    assert sorted(path.name for path in out.iterdir()) == FINISHED
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    for bits in (3, 2):
        strategy = registry.get("kvquant").from_pretrained(out, bits=bits)
        cache = PackedCache(model, strategy, residual_length=0)
        with torch.no_grad():
            model(torch.arange(2, 40)[None].repeat(1, 4), past_key_values=cache)
        assert cache.memory().rows["key codes"] > 0
    detach(model)


def test_the_output_says_what_it_is_worth_and_how_to_use_it(finished):
    output, out = finished
    lines = output.strip().splitlines()
    size = sum(path.stat().st_size for path in out.iterdir())
    assert f"saved to {out}: {size:,} bytes" in lines
    evidence = json.loads((out / "calibration.json").read_text())["evidence"]
    assert f"3 windows of 320 tokens of the text text.txt took {evidence['seconds']:.1f} s" in lines
    (perplexity,) = (line for line in lines if line.startswith("perplexity"))
    assert f"{evidence['perplexity_exact']:.4f} unquantized, {evidence['perplexity']:.4f} through" in perplexity
    assert "319 held-out tokens" in perplexity
    assert "newest 128 exact" in perplexity


def test_the_lines_it_prints_can_be_run(folder, finished, tmp_path):
    output, out = finished
    python, shell = output.strip().splitlines()[-2:]
    code, _, expression = python.partition("; ")
    names = {}
    exec(code.strip(), names)
    strategy = eval(expression, names)
    assert (strategy.bits, strategy.calibration.source) == (3, str(out))
    words = shlex.split(shell)
    assert words[:2] == ["cachequant", "bench"]
    assert registry.parse(words[-1]) == strategy
    common = ("--text", folder / "other.txt", "--tasks", "perplexity:windows=1", "--no-twin", "--no-baselines")
    result = invoke(*words[1:], *common, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "leaderboard.json").read_text())["results"]
    assert (row["cell"]["strategy"], row["error"], row["calibration"]) == (words[-1], None, None)


def test_no_held_out_windows_no_perplexity(folder, tmp_path):
    result = invoke(*command(folder, tmp_path, "qnorm:base=uniform,bits=2", heldout=0))
    assert result.exit_code == 0, result.output
    assert "perplexity" not in result.output
    strategy = registry.get("qnorm").from_pretrained(tmp_path)
    assert strategy.base == registry.parse("uniform:bits=2")


def test_query_norms_are_learned_by_a_strategy_that_works_without(folder, tmp_path):
    result = invoke(*command(folder, tmp_path, "qaq:interval=16", heldout=0))
    assert result.exit_code == 0, result.output
    strategy = registry.get("qaq").from_pretrained(tmp_path, sigma_key=0.01)
    assert (strategy.interval, strategy.sigma_key) == (16, 0.01)
    assert strategy.calibration.of(0, "key").query_norm.min() > 0


def test_windows_too_short_to_read_anything_packed_tell_no_perplexity(folder, tmp_path):
    result = invoke(*command(folder, tmp_path, length=160))
    assert result.exit_code == 0, result.output
    assert "too short to read anything packed: no perplexity was measured" in " ".join(result.output.split())


def test_windows_are_as_long_as_the_model_takes_by_default(folder, tmp_path):
    arguments = command(folder, tmp_path, heldout=0)
    at = arguments.index("--length")
    result = invoke(*arguments[:at], *arguments[at + 2 :])
    assert result.exit_code == 0, result.output
    assert "3 windows of 512 tokens" in result.output


@pytest.mark.parametrize("stop", [("ranges", 2), ("densities", 1), ("evidence", 0)])
def test_an_interrupted_calibration_goes_on_to_the_same_result(folder, finished, tmp_path, monkeypatch, stop):
    run = []
    undisturbed = calibrating._Gathering._run_window

    def count(self, observe, gradients):
        run.append(self._done)
        undisturbed(self, observe, gradients)

    monkeypatch.setattr(calibrating._Gathering, "_run_window", count)
    learn = CalibratedStrategy.calibrate

    def interrupted(self, *arguments, report, **options):
        def ctrl_c(name, done, windows):
            if (name, done) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            report(name, done, windows)

        return learn(self, *arguments, report=ctrl_c, **options)

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedStrategy, "calibrate", interrupted)
        result = invoke(*command(folder, tmp_path))
    assert result.exit_code == 130
    assert f"the same command goes on from {tmp_path / FILE}" in result.output
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert len(run) == {"ranges": 2, "densities": 4, "evidence": 6}[stop[0]]
    result = invoke(*command(folder, tmp_path))
    assert result.exit_code == 0, result.output
    # not a window twice
    assert len(run) == 6
    assert content(tmp_path) == content(finished[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == FINISHED


def test_an_interruption_that_does_not_wait_says_that_nothing_was_kept(folder, tmp_path, monkeypatch):
    def twice(self, observe, gradients):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(calibrating._Gathering, "_run_window", twice)
    before = signal.getsignal(signal.SIGINT)
    result = invoke(*command(folder, tmp_path))
    assert result.exit_code == 130
    assert "nothing was kept" in result.output
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before


def test_what_another_job_left_unfinished_is_not_touched(folder, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "_perplexities", stop)
        assert invoke(*command(folder, tmp_path)).exit_code == 130
    left = (tmp_path / FILE).read_bytes()
    result = invoke(*command(folder, tmp_path, samples=4))
    assert result.exit_code == 2
    assert "Invalid value for --out" in flat(result)
    assert "another model, text or settings" in flat(result)
    assert (tmp_path / FILE).read_bytes() == left


def test_a_finished_calibration_is_replaced_only_on_demand(folder, finished, tmp_path):
    for path in finished[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = content(tmp_path)
    result = invoke(*command(folder, tmp_path, samples=2))
    assert result.exit_code == 2
    assert "Invalid value for --out" in flat(result)
    assert "--overwrite" in flat(result)
    assert content(tmp_path) == before
    result = invoke(*command(folder, tmp_path, samples=2), "--overwrite")
    assert result.exit_code == 0, result.output
    assert content(tmp_path)[0]["evidence"]["windows"] == 2


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("SPEC", "kvqant", "no strategy named 'kvqant'"),
        ("SPEC", "kvquant:bits=5", "bits: Input should be 2, 3 or 4"),
        ("SPEC", "kvquant:calibration=/no/such/folder", "there is no calibration folder"),
        ("SPEC", "kvquant:calibration=prompt", "names a calibration already"),
        ("SPEC", "kvquant:datatype=nf,key_scale=channel", "is fitted to nothing; use it as it is"),
        ("SPEC", "qaq:query_norm=3", "is fitted to nothing; use it as it is"),
        ("SPEC", "uniform", "needs no calibration; use it as it is. These can be calibrated: kvquant, qaq, qnorm"),
        ("--model", "/no/such/model", "there is no folder '/no/such/model'"),
        ("--text", "{folder}/absent.txt", "No such file"),
        ("--text", "{folder}/latin.txt", "as UTF-8"),
        ("--text", "{folder}/config.json", "Give a longer text"),
        ("--samples", "400", "use at most 9 samples"),
        ("--length", "1000", "use 2 to 512, the model's context"),
        ("--length", "1", "use 2 to 512"),
        ("--out", "{folder}/text.txt", "cannot write to"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path, option, value, complaint):
    value = value.format(folder=folder)
    given = {"spec": value} if option == "SPEC" else {option.removeprefix("--"): value}
    arguments = command(folder, **({"out": tmp_path / "new"} | given))
    result = invoke(*arguments)
    assert result.exit_code == 2
    # too many samples are too short a text
    assert f"Invalid value for {'--text' if option == '--samples' else option}:" in flat(result)
    assert complaint in flat(result)
    assert "Traceback" not in result.output


def test_windows_shorter_than_a_block_are_refused_where_blocks_count(folder, tmp_path):
    result = invoke(*command(folder, tmp_path, "kvquant:key_scale=channel", length=100))
    assert result.exit_code == 2
    assert "shorter than a block of 128; use longer ones" in flat(result)


def flat(result):
    return " ".join(result.output.replace("│", " ").split())


# --- what it costs


def test_the_cost_is_measured_and_told(monkeypatch):
    monkeypatch.setattr(calibration_cost, "build_model", lambda layers, random: build_model())
    windows = torch.randint(2, VOCABULARY, (4, 200), generator=torch.Generator().manual_seed(0))
    cells = []
    for gradients in (True, False):
        asked = {"samples": 2, "length": 160, "layers": 2, "gradients": gradients}
        found = calibration_cost.measure(windows.numpy(), **asked, random=False, threads=torch.get_num_threads())
        assert found["seconds"] > 0
        assert found["memory_bytes"] >= 0
        assert found["artifact_bytes"] > 2 * 2 * 3 * 2048 * 4  # the densities alone
        cells.append(calibration_cost.Cell(question="samples", **asked, **found))
    report = calibration_cost.Report(
        environment=calibration_cost.Environment.current(),
        model="tiny",
        specs={"gradients": "a", "no gradients": "b"},
        cells=tuple(cells),
    )
    text = calibration_cost.markdown(report)
    assert f"| 2 | {cells[0].cpu_seconds:.2f} | {cells[0].seconds:.2f} | " in text
    assert calibration_cost.Report.model_validate_json(report.model_dump_json()) == report


def test_the_plan_of_the_cost_has_every_cell_with_and_without_gradients():
    plan = calibration_cost.plan()
    assert len(plan) == len(set(plan)) == 2 * (len(calibration_cost.SAMPLES) + len(calibration_cost.LENGTHS) + 3)
    assert {cell[-1] for cell in plan} == {True, False}
    assert all(registry.parse(spec).recipe().gradients == wanted for wanted, spec in calibration_cost.SPECS.items())
