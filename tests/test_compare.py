"""Two runs side by side: differences with honest intervals, and everything that has to be known beside them."""

import json
import math
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner

from cachequant.benchmarks.commands.compare import compare as command
from cachequant.benchmarks.environment import Environment
from cachequant.benchmarks.held import Memory
from cachequant.benchmarks.report.compare import Incomparable, compare
from cachequant.benchmarks.report.compare_tables import markdown
from cachequant.benchmarks.report.intervals import _student, _tail, jackknifed, paired, unpaired
from cachequant.benchmarks.report.run import Run
from cachequant.benchmarks.subjects import ModelCard, TextCard
from cachequant.benchmarks.sweep.cells import Cell, Result
from cachequant.benchmarks.sweep.store import Store, Unreadable
from cachequant.benchmarks.tasks.base import Outcome

WINDOWS = 24
TASK = "perplexity:length=416"

ENVIRONMENT = Environment(
    date="2026-01-01T00:00:00+00:00",
    device="CPU (one)",
    threads=1,
    python="3.11.1",
    platform="Linux",
    torch="2.6",
    transformers="5.13",
    cachequant="1",
    commit="a" * 40,
)


def outcome_of(shift: float = 0.0, seed: int = 0, windows: int = WINDOWS, **changes: Any) -> Outcome:
    """Losses that differ much between windows, and by `shift` between runs."""
    windows_, runs = random.Random(0), random.Random(seed)
    samples = []
    for number in range(windows):
        loss = windows_.uniform(1, 5) + shift + runs.gauss(0, 0.01)
        divergence = max(0.0, loss / 100 + shift)
        samples.append({"window": float(number), "loss": loss, "kl_mean": divergence, "kl_p99": 2.0, "top1": 0.5})
    given = {
        "metrics": {
            "kl_mean": fmean(sample["kl_mean"] for sample in samples),
            "kl_p99": 3.0 + shift,
            "top1": 0.5,
            "perplexity": math.exp(fmean(sample["loss"] for sample in samples)),
        },
        "errors": {"kl_mean": 0.002, "top1": 0.01},
        "samples": tuple(samples),
        "memory": Memory(
            tokens=416,
            device_bytes=2000,
            host_bytes=0,
            exact_bytes=8000,
            bits_per_element=5.0 + shift,
            packed_bits_per_element=4.5,
            ratio=4,
        ),
        "latency": {"decode": 2.0 + 2 * shift},
    }
    return Outcome(**{**given, **changes})


def result_of(
    strategy: str = "uniform",
    outcome: Outcome | None = None,
    *,
    error: str | None = None,
    environment: dict[str, Any] | None = None,
    panel: str = "tiny",
    **changes: Any,
) -> Result:
    given = {
        "model": ModelCard(panel=panel, architecture="Llama", parameters=1, layers=2, context=512, dtype="float32"),
        "device": "CPU (one)",
        "strategy": strategy,
        "contents": {"name": strategy, "bits": 4},
        "task": TASK,
        "settings": {"length": 416, "windows": WINDOWS},
        "inputs": {"text": "t", "text_sha256": "0" * 64},
        "residual_length": 32,
        "calibrated_on": None,
        "versions": {"cachequant": "1", "code": "code-a", "plugins": ""},
    }
    return Result(
        cell=Cell(**{**given, **changes}),
        environment=ENVIRONMENT.model_copy(update=environment or {}),
        outcome=None if error else outcome or outcome_of(),
        error=error,
    )


@pytest.fixture
def runs(tmp_path):
    """Writes results into a folder of that name."""

    def write(name: str, *results: Result) -> Path:
        store = Store(tmp_path / name)
        with store.opened():
            for result in results:
                store.put(result)
        return tmp_path / name

    return write


@pytest.fixture
def difference(runs):
    """The differences between two outcomes, by the name of the metric."""

    def find(a: Outcome, b: Outcome, **changes: Any) -> dict[str, Any]:
        (pair,) = compare(runs("a", result_of(outcome=a)), runs("b", result_of(outcome=b, **changes))).pairs
        return {each.metric.name: each for each in pair.differences}

    return find


def invoke(*arguments: Any) -> Any:
    app = typer.Typer(pretty_exceptions_show_locals=False)
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def flat(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


# --- intervals


@pytest.mark.parametrize(("freedom", "quantile"), [(5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)])
def test_students_quantiles_are_those_of_tables(freedom, quantile):
    assert _student(0.975, freedom) == pytest.approx(quantile, abs=1e-3)


def test_tails_widen_for_few_samples_and_tend_to_the_plain_ones():
    assert _tail(6) < _tail(12) < _tail(100) < 0.025
    assert _tail(100_000) == pytest.approx(0.025, rel=1e-2)


@pytest.mark.parametrize(
    ("interval", "samples", "least"),
    [(jackknifed, 3, 0.9), (jackknifed, 4, 0.9), (paired, 6, 0.9), (paired, 24, 0.92)],
)
def test_intervals_hold_the_truth_as_often_as_they_say(interval, samples, least):
    generator = np.random.default_rng(0)
    trials, truth, held = 200, 0.3, 0
    for _ in range(trials):
        a = generator.normal(size=samples) * 3
        b = a + truth + generator.normal(size=samples)
        low, high = interval(a, b, lambda mean: mean)
        held += low <= truth <= high
    assert least <= held / trials <= 0.99


def test_few_samples_of_a_perplexity_are_compared_through_its_exponential():
    a = np.array([2.0, 2.5, 3.0, 2.2])
    low, high = jackknifed(a, a + 0.1, np.exp)
    assert low < math.exp(a.mean() + 0.1) - math.exp(a.mean()) < high
    # where the difference is the same everywhere, means alone decide
    assert jackknifed(a, a + 0.1, lambda mean: mean) == (pytest.approx(0.1), pytest.approx(0.1))


def test_pairing_sees_what_unpaired_figures_hide():
    generator = np.random.default_rng(0)
    a = generator.normal(size=50) * 10
    b = a + 0.1 + generator.normal(size=50) * 0.01
    low, high = paired(a, b, lambda mean: mean)
    assert 0.09 < low < 0.1 < high < 0.11
    errors = [each.std(ddof=1) / math.sqrt(50) for each in (a, b)]
    low, high = unpaired(0.1, *errors, samples=50)
    assert low < -3 < 3 < high


def test_intervals_are_the_same_every_time():
    a, b = np.arange(10.0), np.arange(10.0)[::-1]
    assert paired(a, b, np.exp) == paired(a, b, np.exp)


# --- verdicts


def test_a_run_equals_itself_in_every_figure(difference):
    found = difference(outcome_of(), outcome_of())
    assert {each.verdict for each in found.values()} == {"no difference shown"}
    assert {each.difference for each in found.values()} == {0}


def test_a_difference_beyond_chance_is_a_verdict_about_b(difference):
    found = difference(outcome_of(), outcome_of(0.05, seed=1))
    assert found["perplexity"].verdict == found["kl_mean"].verdict == "worse"
    assert found["top1"].verdict == "no difference shown"
    assert found["perplexity"].low > 0
    back = difference(outcome_of(0.05, seed=1), outcome_of())
    assert back["perplexity"].verdict == "better"
    assert back["perplexity"].difference == pytest.approx(-found["perplexity"].difference)
    assert (back["perplexity"].low, back["perplexity"].high) == (
        pytest.approx(-found["perplexity"].high, rel=1e-6),
        pytest.approx(-found["perplexity"].low, rel=1e-6),
    )


def test_more_is_better_where_the_metric_says_so(difference):
    def outcome(share):
        samples = tuple({"top1": share + 0.01 * (number % 3)} for number in range(12))
        return outcome_of(metrics={"top1": fmean(sample["top1"] for sample in samples)}, samples=samples)

    assert difference(outcome(0.5), outcome(0.6))["top1"].verdict == "better"
    assert difference(outcome(0.6), outcome(0.5))["top1"].verdict == "worse"


def test_noise_is_no_difference(difference):
    found = difference(outcome_of(seed=1), outcome_of(seed=2))
    assert found["perplexity"].difference != 0
    assert found["perplexity"].verdict == "no difference shown"
    assert found["perplexity"].low < 0 < found["perplexity"].high


def test_rounding_is_no_difference(difference):
    one = outcome_of()
    other = outcome_of(metrics={name: value + 1e-8 for name, value in one.metrics.items()})
    assert {each.verdict for each in difference(one, other).values()} == {"no difference shown"}


def test_the_interval_of_a_perplexity_is_that_of_its_loss(difference):
    a, b = outcome_of(), outcome_of(0.05, seed=1)
    found = difference(a, b)["perplexity"]
    losses = [np.array([sample["loss"] for sample in each.samples]) for each in (a, b)]
    assert (found.low, found.high) == paired(*losses, np.exp)
    assert found.how == f"paired bootstrap over {WINDOWS} samples"
    assert found.low < found.difference < found.high


def test_a_figure_that_is_no_mean_of_its_samples_is_not_tested(difference):
    found = difference(outcome_of(), outcome_of(0.05))["kl_p99"]
    assert (found.low, found.high, found.verdict) == (None, None, "not tested")
    assert found.how == "no mean over samples"
    assert found.difference == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"inputs": {"text": "u", "text_sha256": "1" * 64}}, "other inputs"),
        ({"settings": {"length": 416, "windows": WINDOWS, "chunk": 1}}, "other settings"),
        ({"residual_length": 64}, "other exact newest tokens"),
    ],
)
def test_other_questions_are_compared_by_standard_errors(difference, changes, reason):
    found = difference(outcome_of(), outcome_of(0.05), **changes)
    kl = found["kl_mean"]
    width = _student(0.975, len(outcome_of().samples) - 1) * math.hypot(0.002, 0.002)
    assert (kl.low, kl.high) == (pytest.approx(kl.difference - width), pytest.approx(kl.difference + width))
    assert kl.how == f"unpaired, from standard errors ({reason})"
    assert kl.verdict == "worse"
    assert (found["perplexity"].verdict, found["perplexity"].how) == ("not tested", reason)


def test_few_samples_are_paired_by_students_t_and_one_not_at_all(difference):
    found = difference(outcome_of(windows=4), outcome_of(0.05, windows=4))
    assert found["perplexity"].how == found["kl_mean"].how == "paired, Student's t over 4 samples"
    assert found["kl_mean"].verdict == "worse"
    alone = difference(outcome_of(windows=1), outcome_of(0.05, windows=1))
    assert (alone["perplexity"].verdict, alone["perplexity"].how) == ("not tested", "one sample")


def test_runs_with_other_numbers_of_samples_are_not_paired(difference):
    found = difference(outcome_of(), outcome_of(windows=12))
    assert found["perplexity"].how == "other numbers of samples"


def test_samples_without_a_number_are_not_paired(difference):
    other = outcome_of(0.05)
    holes = tuple({**each, "loss": None} if number == 3 else each for number, each in enumerate(other.samples))
    found = difference(outcome_of(), other.model_copy(update={"samples": holes}))["perplexity"]
    assert (found.verdict, found.how) == ("not tested", "no mean over samples")


# --- what is paired, and what is told beside it


def test_cells_meet_whatever_version_or_device_they_are_from(runs):
    newer = {"torch": "2.13", "commit": "b" * 40}
    a = runs("a", result_of("none"), result_of("uniform"), result_of("h2o"))
    b = runs(
        "b",
        result_of("none", environment=newer, versions={"code": "code-b"}),
        result_of("uniform", environment=newer, versions={"code": "code-b"}, contents={"name": "uniform", "bits": 8}),
        result_of("kvquant"),
        result_of("uniform", panel="other"),
    )
    found = compare(a, b)
    assert [pair.strategy_a for pair in found.pairs] == ["none", "uniform"]
    assert found.only_a == (f"h2o on tiny, {TASK}",)
    assert found.only_b == (f"uniform on other, {TASK}", f"kvquant on tiny, {TASK}")
    changes = {change.what: (change.a, change.b, change.cells) for change in found.changes}
    assert changes == {
        "torch": ("2.6", "2.13", 2),
        "commit": ("a" * 40, "b" * 40, 2),
        "sources of code": ("code-a", "code-b", 2),
        "uniform bits": ("4", "8", 1),
    }


def test_memory_and_latency_are_ratios(runs):
    (pair,) = compare(runs("a", result_of()), runs("b", result_of(outcome=outcome_of(0.5)))).pairs
    assert {ratio.name: ratio.ratio for ratio in pair.memory} == {
        "bits_per_element": pytest.approx(1.1),
        "packed_bits_per_element": 1,
        "device_bytes": 1,
    }
    assert [(ratio.name, ratio.a, ratio.b, ratio.ratio) for ratio in pair.latency] == [("decode", 2, 3, 1.5)]


def test_failures_are_told_and_not_compared(runs):
    a = runs("a", result_of(error="RuntimeError: no"), result_of("none"))
    b = runs("b", result_of(), result_of("none", error="OSError: gone"))
    found = compare(a, b)
    assert {pair.strategy_a: pair.failed for pair in found.pairs} == {
        "none": ("failed in B: OSError: gone",),
        "uniform": ("failed in A: RuntimeError: no",),
    }
    assert "- uniform on tiny, perplexity:length=416: failed in A: RuntimeError: no" in markdown(found)


def test_of_several_results_of_one_strategy_the_newest_counts_unless_the_report_showed_another(runs):
    old = result_of(environment={"date": "2025-01-01T00:00:00+00:00"})
    new = result_of(outcome=outcome_of(0.05, seed=1), versions={"code": "code-b"})
    a, b = runs("a", old, new), runs("b", result_of(versions={"code": "code-c"}))
    found = compare(a, b)
    assert found.older == 1
    assert {change.what: change.a for change in found.changes}["sources of code"] == "code-b"
    run = Run(
        environment=ENVIRONMENT,
        text=TextCard(name="t", sha256="0" * 64, tokens=9),
        models=(old.cell.model,),
        residual_length=32,
        results=(old,),
    )
    (a / "leaderboard.json").write_text(run.model_dump_json())
    found = compare(a, b)
    assert {change.what: change.a for change in found.changes}["sources of code"] == "code-a"
    assert {each.verdict for each in found.pairs[0].differences} == {"no difference shown"}


def test_two_strategies_of_one_run_are_paired(runs):
    a = runs("a", result_of("uniform"), result_of("uniform:bits=2", outcome_of(0.05, seed=1)), result_of("none"))
    found = compare(a, a, ("uniform", "uniform:bits=2"))
    (pair,) = found.pairs
    assert pair.name == "uniform -> uniform:bits=2"
    assert {each.metric.name: each.verdict for each in pair.differences}["perplexity"] == "worse"
    assert (found.only_a, found.only_b, found.changes, found.older) == ((), (), (), 0)


def test_nothing_in_common_says_what_each_has(runs):
    a, b = runs("a", result_of("none")), runs("b", result_of("uniform", panel="other"))
    with pytest.raises(Incomparable) as caught:
        compare(a, b)
    assert str(caught.value) == (
        f"no task on the same model is in both; A has tasks {TASK} on tiny with none; B has tasks {TASK} on other "
        "with uniform"
    )
    with pytest.raises(Incomparable, match="with 'h2o' in A and 'none' in B is in both"):
        compare(a, a, ("h2o", "none"))


# --- the command


def test_the_command_prints_tables_and_what_has_to_be_known(runs, tmp_path):
    a = runs("a", result_of(), result_of("none"))
    b = runs("b", result_of(outcome=outcome_of(0.05, seed=1), environment={"threads": 2}))
    result = invoke(a, b, "--out", tmp_path / "compared.md")
    assert result.exit_code == 0, result.output
    text = flat(result)
    assert f"{TASK} on tiny" in text
    assert "perplexity" in text
    assert "worse" in text
    assert "threads: 1 -> 2" in text
    assert f"Only in A none on tiny, {TASK}" in text
    assert f"paired bootstrap over {WINDOWS} samples (KL mean, top-1, perplexity)" in text
    written = (tmp_path / "compared.md").read_text()
    assert f"### `{TASK} on tiny`" in written
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {8}
    assert lines[2].startswith("| `uniform` | KL mean | ")
    assert lines[2].endswith(" | worse |")


def test_json_is_all_that_is_printed_where_it_is_asked_for(runs):
    a, b = runs("a", result_of()), runs("b", result_of(outcome=outcome_of(0.05, seed=1)))
    result = invoke(a, b, "--json")
    assert result.exit_code == 0
    found = json.loads(result.output)
    verdicts = {each["metric"]["name"]: each["verdict"] for each in found["pairs"][0]["differences"]}
    assert verdicts["perplexity"] == "worse"


def test_strategies_are_named_as_users_write_them(runs):
    a = runs("a", result_of("uniform"), result_of("uniform:bits=2", outcome_of(0.05)), result_of("gone:alpha=1"))
    assert invoke(a, a, "--strategy-a", "uniform:bits=4", "--strategy-b", "uniform: bits = 2").exit_code == 0
    assert invoke(a, a, "--strategy-a", "gone:alpha=1", "--strategy-b", "uniform").exit_code == 0


def test_bad_input_is_one_line_and_exit_code_2(runs, tmp_path):
    a, b = runs("a", result_of()), runs("b", result_of("none"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "drained" / "cells").mkdir(parents=True)
    for arguments, complaint in (
        ((a, empty), "empty holds no results of cachequant bench"),
        ((a, tmp_path / "absent"), "absent holds no results"),
        ((a, tmp_path / "drained"), "B has tasks none on none with none"),
        ((a, b), "no task on the same model is in both"),
        ((a, a), "give --strategy-a and --strategy-b to compare two strategies"),
        ((a, b, "--strategy-a", "none"), "Invalid value for --strategy-b"),
        ((a, a, "--strategy-a", "uniform", "--strategy-b", "none"), "'none' in B"),
        ((a, runs("c", result_of()), "--out", tmp_path / "no" / "file.md"), "Invalid value for --out: cannot write"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, arguments
        assert complaint in flat(result)
        assert "Traceback" not in result.output


def test_results_that_cannot_be_read_are_refused_by_name(runs):
    a, b = runs("a", result_of()), runs("b", result_of())
    (cell,) = (b / "cells").iterdir()
    config = yaml.safe_load((cell / "config.yaml").read_text())
    (cell / "config.yaml").write_text(yaml.safe_dump({**config, "cell": {**config["cell"], "results_version": 0}}))
    with pytest.raises(Unreadable, match="version 0 of the results' format"):
        compare(a, b)
    (cell / "config.yaml").write_text("{")
    result = invoke(a, b)
    assert result.exit_code == 2
    assert "is damaged" in flat(result)
    assert "delete it and run the same command again" in flat(result)


@pytest.mark.parametrize("width", [80, 200])
def test_no_table_is_cropped(runs, width):
    a, b = runs("a", result_of()), runs("b", result_of(outcome=outcome_of(-0.05, seed=1)))
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(a), str(b)], env={"COLUMNS": str(width)})
    assert result.exit_code == 0
    assert "…" not in result.output
    table = result.output.partition("uniform")[2].partition("Intervals")[0]
    for word in ("perplexity", "device bytes", "packed bits", "decode", "better", "not tested"):
        assert word in table
