"""A sweep measures every cell once, survives whatever breaks, and loses nothing that was finished."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cachequant import registry
from cachequant.benchmarks.cli import app
from cachequant.benchmarks.contenders import Candidate
from cachequant.benchmarks.environment import Environment, Precision
from cachequant.benchmarks.errors import Unusable
from cachequant.benchmarks.held import LayerBits, Memory
from cachequant.benchmarks.report.page_of import page_of
from cachequant.benchmarks.report.run import Run, markdown, write_files
from cachequant.benchmarks.subjects import ModelCard, TextCard
from cachequant.benchmarks.sweep import engines, store
from cachequant.benchmarks.sweep.cells import Cell, Result
from cachequant.benchmarks.sweep.job import Job, parse_tasks, read_grid
from cachequant.benchmarks.sweep.run import Unstored, finite, sweep
from cachequant.benchmarks.sweep.store import Store, Unreadable, read
from cachequant.benchmarks.sweep.workbench import Workbench, _contents
from cachequant.benchmarks.tasks.base import Outcome
from cachequant.core import Format, LayerFormat, LayerSpec, Strategy
from cachequant.core.calibration import CalibratedStrategy
from cachequant.registry.hookspecs import hookimpl

# A module of its own, as other processes have to find it too.
PLUGIN = '''
import os
import time
from typing import ClassVar, Literal

from pydantic import Field

from cachequant.benchmarks.tasks.base import LayerBits, Metric, Outcome, Task
from cachequant.benchmarks.tasks.perplexity import Perplexity
from cachequant.registry.hookspecs import hookimpl

CALLS = []


class Halting(Perplexity):
    """Perplexity that waits for ever at the strategy that HALT_AT names."""

    name: ClassVar[str] = "halting"

    def measure(self, panel, prepared, contender):
        if os.environ.get("HALT_AT") == contender.spec:
            time.sleep(600)
        return super().measure(panel, prepared, contender)


class Probe(Task):
    """Counts, and breaks where it is told to."""

    name: ClassVar[str] = "probe"
    metrics: ClassVar = (
        Metric(name="score", label="score", better="higher"), Metric(name="cost", label="cost", better="lower")
    )
    length: int | None = Field(None, ge=8)
    scale: float = 1.0
    breaks: Literal["", "fitted", "prepare", "measure", "nan", "nothing", "layers", "text", "exit"] = ""
    strategy: str = ""

    def fitted(self, panel):
        if self.breaks == "fitted":
            raise FileNotFoundError("there are no questions")
        return self.model_copy(update={"length": self.length or 16})

    def inputs(self, panel):
        return {"text_sha256": panel.text.sha256}

    def prepare(self, panel):
        if self.breaks == "prepare":
            raise RuntimeError("no prompt")
        return self.length

    def measure(self, panel, prepared, contender):
        CALLS.append(contender.spec)
        breaks = self.breaks if self.strategy in ("", contender.spec) else ""
        if breaks == "exit":
            os._exit(1)
        if breaks == "measure":
            raise ZeroDivisionError("by the [way]")
        if breaks == "nothing":
            return None
        score = float("nan") if breaks == "nan" else self.scale * prepared + len(contender.spec)
        return Outcome(
            metrics={"score": score, "cost": -score},
            samples=({"answer": "\\ud800" if breaks == "text" else "yes", "score": score},),
            layers=(LayerBits(index=0, key=float("inf"), value=4.0),) if breaks == "layers" else (),
            latency={"decode": 1.5},
        )


@hookimpl
def cachequant_tasks():
    return [Halting, Probe]
'''


class Breaking(Strategy):
    """Breaks where it is told to."""

    name: ClassVar[str] = "breaking"
    where: str = ""
    told: ClassVar[str] = "one"

    def formats(self, layer: LayerSpec) -> LayerFormat:
        side = Format(bits=4, group=32)
        return LayerFormat(key=side, value=side, block=32)

    def encode(self, *args, **kwargs):
        if self.where == "encode":
            raise RuntimeError("no kernel\nfor this [device]")
        return super().encode(*args, **kwargs)

    def describe(self):
        if self.where == "describe":
            raise RuntimeError("speechless")
        return {**super().describe(), "weights": self.told} if self.where != "object" else {"weights": object()}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A folder that is a place where the plugin is installed, registered in this process too."""
    folder = tmp_path_factory.mktemp("site")
    path = folder / "sweep_probe.py"
    path.write_text(PLUGIN)
    metadata = folder / "sweep_probe-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sweep-probe\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[cachequant]\nsweep-probe = sweep_probe\n")
    module = imported(path)
    registry.tasks.plugins.register(module, "sweep-probe")
    registry.register(strategies_of(Breaking), "breaking")
    yield SimpleNamespace(folder=folder, calls=module.CALLS)
    registry.unregister("breaking")
    registry.tasks.plugins.unregister("sweep-probe")


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # pydantic and inspect look classes up there
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def strategies_of(*classes: type[Strategy]) -> Any:
    class Plugin:
        @hookimpl
        def cachequant_strategies(self):
            return list(classes)

    return Plugin()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a tokenizer that knows one word per id, and texts."""
    folder = tmp_path_factory.mktemp("model")
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
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", unk_token="w1").save_pretrained(folder)
    for seed, name in enumerate(("text", "other")):
        ids = torch.randint(2, 64, (900,), generator=torch.Generator().manual_seed(seed)).tolist()
        (folder / f"{name}.txt").write_text(" ".join(f"w{i}" for i in ids))
    (folder / "short.txt").write_text("w2 w3")
    return folder


@pytest.fixture
def swept(plugin, folder, tmp_path):
    """Sweeps into one folder; tells what was measured, what kept, and all results by strategy."""

    def run(*, out: Path = tmp_path / "out", retry_failed=False, engine=engines.local, **changes: Any) -> Any:
        heard: dict[bool, list[str]] = {True: [], False: []}
        kept = Store(out)
        with kept.opened():
            bench = Workbench(job(folder, **changes))
            results = sweep(
                bench,
                kept,
                engine,
                retry_failed=retry_failed,
                heard=lambda result, old: heard[old].append(result.cell.strategy),
            )
        return SimpleNamespace(
            measured=heard[False], kept=heard[True], results=results, by={each.cell.strategy: each for each in results}
        )

    run.out = tmp_path / "out"
    return run


def job(folder: Path, **changes: Any) -> Job:
    given = {"strategies": ("none", "uniform"), "tasks": ("probe",), "twin": False}
    return Job(**{**given, "model": str(folder), "text": str(folder / "text.txt"), **changes})


def keys(folder: Path, **changes: Any) -> list[str]:
    return [planned.cell.key for planned in Workbench(job(folder, **changes)).cells]


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def common(folder: Path, out: Path) -> tuple[Any, ...]:
    return ("--model", folder, "--text", folder / "text.txt", "--out", out, "--no-twin", "--no-baselines")


def flat(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


def cells_in(out: Path) -> list[Path]:
    return sorted(path for path in (out / "cells").glob("*") if path.name[0] != ".")


# --- what is measured, and what is kept


def test_a_finished_cell_is_not_measured_again(swept, plugin):
    first = swept()
    assert (first.measured, first.kept) == (["none", "uniform"], [])
    plugin.calls.clear()
    again = swept(strategies=("none", "uniform", "uniform:bits=2"))
    assert (again.measured, again.kept) == (["uniform:bits=2"], ["none", "uniform"])
    assert plugin.calls == ["uniform:bits=2"]
    assert [again.by[name] for name in ("none", "uniform")] == first.results


@pytest.mark.parametrize(
    "change",
    [
        {"text": "{folder}/other.txt"},
        {"dtype": Precision.bfloat16},
        {"residual_length": 64},
        {"tasks": ("probe:scale=2",)},
        {"lengths": (32,)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_a_figure_is_measured_anew_when_it_changes(swept, folder, change):
    swept()
    change = {name: value.format(folder=folder) if name == "text" else value for name, value in change.items()}
    assert swept(**change).measured == ["none", "uniform"]
    assert swept().kept == ["none", "uniform"]


def test_how_a_run_is_started_decides_nothing(swept):
    swept()
    assert swept(threads=torch.get_num_threads(), strategies=("uniform", "none")).measured == []


def test_a_strategy_that_asks_for_another_tail_is_told_of(folder, plugin):
    asking = 'preset:default=uniform,options={"residual_length":64}'
    assert Workbench(job(folder, strategies=("uniform", asking))).notes[-1:] == [
        f"every row keeps the newest 32 tokens exact, but {asking} asks for 64"
    ]
    assert not any("asks for" in note for note in Workbench(job(folder, strategies=("uniform",))).notes)


def test_the_number_of_threads_decides_nothing(folder, plugin):
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(keys(folder))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_calibration_decides_only_for_those_that_learn(folder, plugin, tmp_path):
    texts = [tmp_path / name / "learn.txt" for name in ("one", "other")]
    for number, path in enumerate(texts):
        path.parent.mkdir()
        path.write_text(f"w2 w3 w4 w{number + 5} " * 400)
    given = {"strategies": ("kvquant", "uniform"), "calibration_samples": 1}
    one, plain = keys(folder, calibration_text=str(texts[0]), **given)
    for change in ({"calibration_samples": 2}, {"calibration_text": str(texts[1])}, {"calibration_text": None}):
        other, same = keys(folder, **{"calibration_text": str(texts[0]), **given, **change})
        assert other != one, change
        assert same == plain
    # what the text says counts, not where it lies
    texts[1].write_text(texts[0].read_text())
    assert keys(folder, calibration_text=str(texts[1]), **given) == [one, plain]


def test_what_a_strategy_says_of_itself_decides(swept, monkeypatch):
    given = {"strategies": ("none", "breaking")}
    swept(**given)
    assert swept(**given).measured == []
    monkeypatch.setattr(Breaking, "told", "two")
    assert swept(**given).measured == ["breaking"]


def test_the_source_of_a_plugin_decides(swept, tmp_path):
    path = tmp_path / "sourced.py"
    source = PLUGIN.replace('"probe"', '"sourced"').replace("return [Halting, Probe]", "return [Probe]")
    path.write_text(source)
    registry.tasks.plugins.register(imported(path), "sourced")
    try:
        assert swept(tasks=("sourced",)).measured == ["none", "uniform"]
        assert swept(tasks=("sourced",)).measured == []
        path.write_text(source + "# counts otherwise now\n")
        assert swept(tasks=("sourced",)).measured == ["none", "uniform"]
    finally:
        registry.tasks.plugins.unregister("sourced")


def test_a_strategy_that_says_nothing_of_itself_is_known_again():
    class Duck:
        """Not built on our base class: its repr is an address."""

        name: ClassVar[str] = "duck"

    contents = [_contents(Candidate("duck", Duck))[0] for _ in range(2)]
    assert contents == [{"name": "duck"}] * 2


# --- failures


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        ("measure", "ZeroDivisionError: by the [way]"),
        ("prepare", "RuntimeError: no prompt"),
        ("nan", "figures that are not finite: cost, score"),
        ("layers", "figures that are not finite: layer 0 keys"),
        ("nothing", "TypeError: task 'probe' gave NoneType instead of an Outcome"),
        ("text", "cannot be stored: "),
    ],
)
def test_a_task_that_breaks_fails_its_cells_and_no_others(swept, breaks, reason):
    found = swept(tasks=(f"probe:breaks={breaks}", "probe"), strategies=("none",))
    failed, fine = found.results
    assert failed.outcome is None
    assert (failed.error or "").startswith(reason)
    assert fine.error is None


def test_strategies_that_break_fail_their_cells_and_no_others(swept, monkeypatch):
    def calibrate(self, *args, **options):
        raise torch.OutOfMemoryError("no room to learn")

    monkeypatch.setattr(CalibratedStrategy, "calibrate", calibrate)
    specs = ("breaking:where=encode", "kvquant", "breaking:where=describe", "breaking:where=object", "uniform")
    found = swept(strategies=specs, tasks=("perplexity:windows=1,length=320",), calibration_samples=1)
    errors = {spec: result.error for spec, result in found.by.items()}
    assert errors == {
        "breaking:where=encode": "RuntimeError: no kernel for this [device]",
        "kvquant": "OutOfMemoryError: no room to learn",
        "breaking:where=describe": None,
        "breaking:where=object": None,
        "uniform": None,
    }
    assert swept(strategies=specs, tasks=("perplexity:windows=1,length=320",), calibration_samples=1).measured == []


def test_a_strategy_that_cannot_be_constructed_is_a_row(folder, plugin, tmp_path, monkeypatch):
    monkeypatch.setattr(Breaking, "variants", ({"wher": "typo"}, {}))
    cells = Workbench(job(folder, strategies=("all",), calibration_text=str(folder / "other.txt"))).cells
    planned = next(each for each in cells if each.cell.strategy == "breaking:wher=typo")
    bench = Workbench(job(folder))
    assert "wher: Extra inputs are not permitted" in (bench.measure(planned).error or "")


def test_failures_are_kept_until_they_are_to_be_retried(swept):
    given = {"tasks": ("probe:breaks=measure,strategy=none",)}
    assert swept(**given).by["none"].error
    assert swept(**given).measured == []
    assert swept(**given, retry_failed=True).measured == ["none"]


def test_what_is_not_finite_is_told_by_name(made):
    memory = Memory(
        tokens=1,
        device_bytes=1,
        host_bytes=0,
        exact_bytes=1,
        bits_per_element=float("inf"),
        packed_bits_per_element=0,
        ratio=1,
    )
    broken = made(Outcome(metrics={"score": 1.0}, errors={"score": float("nan")}, memory=memory))
    assert finite(broken).error == "figures that are not finite: bits_per_element, score"
    assert finite(broken).outcome is None
    sound = made(Outcome(metrics={"score": 1.0}))
    assert finite(sound) is sound


# --- interruptions


@pytest.fixture(scope="module")
def killed(plugin, folder, tmp_path_factory):
    """A run that was killed while it measured the second of three strategies, and what was true just before."""
    out = tmp_path_factory.mktemp("killed")
    arguments = [*map(str, common(folder, out)), "--tasks", "halting:windows=1,length=320"]
    arguments += ["--strategies", "none;uniform;uniform:bits=2"]
    environment = {**os.environ, "HALT_AT": "uniform", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(plugin.folder), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "cachequant.benchmarks.cli", "bench", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while not cells_in(out) and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, process.stdout.read().decode()
        second = invoke("bench", *arguments)
        before = len(cells_in(out))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    # as a kill within a write leaves it
    half = out / "cells" / f"{store.UNFINISHED}half"
    half.mkdir()
    (half / "metrics.json").write_text("{")
    return SimpleNamespace(out=out, second=second, before=before, arguments=arguments, half=half)


def test_a_second_run_on_the_same_folder_is_refused(killed):
    assert killed.second.exit_code == 2
    assert f"another run is writing to {killed.out}; wait for it or choose another folder" in flat(killed.second)
    assert "--out" in killed.second.output
    assert killed.before == 1


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been_killed(killed, folder, tmp_path):
    kept = cells_in(killed.out)
    written = {path: path.stat().st_mtime_ns for path in kept[0].iterdir()}
    resumed = invoke("bench", *killed.arguments)
    assert resumed.exit_code == 0, resumed.output
    assert {path: path.stat().st_mtime_ns for path in kept[0].iterdir()} == written
    assert not killed.half.exists()
    whole = [str(tmp_path) if part == str(killed.out) else part for part in killed.arguments]
    assert invoke("bench", *whole).exit_code == 0
    one, other = (
        [(result["cell"], result["outcome"]["metrics"]) for result in board["results"]]
        for board in (json.loads((out / "leaderboard.json").read_text()) for out in (killed.out, tmp_path))
    )
    assert [cell["strategy"] for cell, _ in one] == ["none", "uniform", "uniform:bits=2"]
    for (cell, metrics), (same, expected) in zip(one, other, strict=True):
        assert cell == same
        assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_full_disk_stops_the_run_and_loses_nothing_that_was_finished(plugin, folder, tmp_path, monkeypatch):
    write = store._write

    def full(result, made):
        (made / "config.yaml").write_text("half")
        if result.cell.strategy == "uniform":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(result, made)

    monkeypatch.setattr(store, "_write", full)
    given = (*common(folder, tmp_path), "--tasks", "probe", "--strategies", "none;uniform")
    stopped = invoke("bench", *given)
    assert stopped.exit_code == 1
    assert "No space left on device. The 1 results so far are safe; make room and run the same command" in flat(stopped)
    assert [result.cell.strategy for result in Store(tmp_path).results()] == ["none"]
    assert not list((tmp_path / "cells").glob(f"{store.UNFINISHED}*"))
    monkeypatch.undo()
    plugin.calls.clear()
    assert invoke("bench", *given).exit_code == 0
    assert plugin.calls == ["uniform"]


def test_a_sweep_that_cannot_store_says_how_many_are_safe(swept, monkeypatch):
    def full(self, result):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "put", full)
    with pytest.raises(Unstored, match="The 0 results so far are safe"):
        swept()


def test_reports_that_cannot_be_written_leave_results_and_older_reports(plugin, folder, tmp_path, monkeypatch):
    given = (*common(folder, tmp_path), "--tasks", "probe", "--strategies")
    assert invoke("bench", *given, "none").exit_code == 0
    older = (tmp_path / "leaderboard.json").read_text()

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    # the last step of each report, as of each cell
    monkeypatch.setattr("cachequant.benchmarks.report.files.os", SimpleNamespace(**{**vars(os), "replace": full}))
    failed = invoke("bench", *given, "none;uniform")
    assert failed.exit_code == 1
    assert "cannot write the reports: " in flat(failed)
    assert (tmp_path / "leaderboard.json").read_text() == older
    assert len(Store(tmp_path).results()) == 2
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".leaderboard")]


# --- files


ENVIRONMENT = Environment(
    date="2026-01-01T00:00:00+00:00",
    device="CPU",
    threads=1,
    python="3",
    platform="x",
    torch="2",
    transformers="5",
    cachequant="1",
    commit=None,
)


def result_of(outcome: Outcome | None = None, error: str | None = None, **changes: Any) -> Result:
    card = ModelCard(panel="tiny", architecture="Llama", parameters=1, layers=2, context=256, dtype="float32")
    given = {
        "model": card,
        "device": "CPU",
        "strategy": "uniform",
        "contents": {"name": "uniform", "bits": 4, "share": 0.1, "small": 1e-05, "word": "1e5", "yes": "no"},
        "task": "probe:length=16",
        "settings": {"length": 16},
        "inputs": {"text": "Ein Text: „ä“"},
        "residual_length": 32,
        "calibrated_on": None,
        "versions": {"code": "0123", "plugins": ""},
    }
    return Result(cell=Cell(**{**given, **changes}), environment=ENVIRONMENT, outcome=outcome, error=error, seconds=0.1)


@pytest.fixture(scope="module")
def made():
    return result_of


TEXTS = ("12", "1e3", "nan", "", None, "a,b", 'say "so"', "two\nlines", "\r", "\r\n", " x ", "日本\u2028", "\0", "None")


def test_results_come_back_exactly(tmp_path):
    samples = tuple(
        {"number": number / 3 if number % 2 else None, "text": text, "whole": float(number), "empty": None}
        for number, text in enumerate(TEXTS)
    )
    memory = Memory(
        tokens=3,
        device_bytes=4,
        host_bytes=5,
        exact_bytes=6,
        bits_per_element=0.1,
        packed_bits_per_element=1 / 3,
        ratio=2,
    )
    outcome = Outcome(
        metrics={"score": 0.1 + 0.2, "tiny": 5e-324},
        errors={"score": 1e-17},
        samples=samples,
        memory=memory,
        kinds={"key codes": 7},
        layers=(LayerBits(index=1, key=2.25, value=1 / 7),),
        latency={"decode": 1e-3},
    )
    result = result_of(outcome)
    kept = Store(tmp_path)
    with kept.opened():
        path = kept.put(result)
        assert kept.find(result.cell) == result
    assert read(path) == result
    assert Store(tmp_path).results() == [result]
    assert sorted(each.name for each in path.iterdir()) == [
        "config.yaml",
        "latency.json",
        "memory.json",
        "metrics.json",
        "predictions.csv",
    ]


@pytest.mark.parametrize(
    "result",
    [
        result_of(error="RuntimeError: 1\n: [x] {y}"),
        result_of(Outcome(metrics={})),
        result_of(Outcome(metrics={"score": 1.0}, samples=({"text": "x" * 200_000}, {"text": ""}))),
        result_of(Outcome(metrics={"score": 1.0}), calibrated_on={"text": "a: b", "samples": 8}),
    ],
    ids=["failure", "nothing", "long text", "calibrated"],
)
def test_results_of_all_kinds_come_back_exactly(tmp_path, result):
    kept = Store(tmp_path)
    with kept.opened():
        kept.put(result)
    (found,) = kept.results()
    assert found == result
    assert found.cell.key == result.cell.key


def test_a_result_of_the_same_cell_is_replaced(tmp_path):
    kept = Store(tmp_path)
    with kept.opened():
        kept.put(result_of(error="no"))
        kept.put(result_of(Outcome(metrics={"score": 1.0})))
    (found,) = kept.results()
    assert found.error is None


DAMAGES = {
    "metrics.json": "{",
    "config.yaml": "cell: [",
    "memory.json": "[]",
    "latency.json": "",
    "predictions.csv": '"answer","score"\n"yes",abc\n',
}


@pytest.mark.parametrize("file", DAMAGES)
def test_a_damaged_cell_is_measured_again_and_told_to_readers(swept, file):
    swept(strategies=("none",))
    (path,) = cells_in(swept.out)
    (path / file).write_text(DAMAGES[file])
    with pytest.raises(Unreadable, match=r"is damaged \(.*\); delete it and run the same command again"):
        Store(swept.out).results()
    assert swept(strategies=("none",)).measured == ["none"]
    assert [result.error for result in Store(swept.out).results()] == [None]


def test_lines_and_files_that_are_missing_are_damage(swept):
    swept(strategies=("none",))
    (path,) = cells_in(swept.out)
    (path / "predictions.csv").write_text('"answer","score"\n')
    with pytest.raises(Unreadable, match=r"predictions.csv has 0 lines of 1"):
        read(path)
    (path / "predictions.csv").unlink()
    with pytest.raises(Unreadable, match=r"damaged"):
        read(path)
    assert swept(strategies=("none",)).measured == ["none"]


def test_results_of_another_version_are_measured_again_and_told_to_readers(swept):
    swept(strategies=("none",))
    (path,) = cells_in(swept.out)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["cell"]["results_version"] = 0
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(Unreadable, match="was written in version 0 of the results' format, this is version 1"):
        Store(swept.out).results()
    assert swept(strategies=("none",)).measured == ["none"]


def test_a_folder_without_results_is_told(tmp_path):
    with pytest.raises(Unreadable, match="holds no results of cachequant bench"):
        Store(tmp_path).results()


# --- what was asked for


def test_a_yaml_file_is_a_grid(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "strategies:\n- none\n- {name: uniform, bits: [2, 4], key_scale: channel, rotation: [none, hadamard]}\n"
        "tasks: [perplexity, {name: probe, scale: [1.5, 2]}]\nlengths: [512, 1024]\n"
    )
    strategies, tasks, lengths = read_grid(path)
    assert strategies == (
        "none",
        'uniform:bits=2,key_scale=channel,rotation="none"',
        "uniform:bits=2,key_scale=channel,rotation=hadamard",
        'uniform:bits=4,key_scale=channel,rotation="none"',
        "uniform:bits=4,key_scale=channel,rotation=hadamard",
    )
    assert tasks == ("perplexity", "probe:scale=1.5", "probe:scale=2")
    assert lengths == (512, 1024)


def test_the_command_line_goes_before_the_file(plugin, folder, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("strategies: [none, {name: uniform, bits: [2, 4]}]\ntasks: [perplexity]\nlengths: [9, 10]\n")
    given = (*common(folder, tmp_path), "--strategies", path, "--tasks", "probe")
    assert invoke("bench", *given, "--lengths", "8").exit_code == 0
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert [result["cell"]["strategy"] for result in board["results"]] == ["none", "uniform:bits=2", "uniform"]
    assert {result["cell"]["task"] for result in board["results"]} == {"probe:length=8"}
    assert invoke("bench", *given).exit_code == 0
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert [result["cell"]["task"] for result in board["results"][::3]] == ["probe:length=9", "probe:length=10"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read"),
        ("", "no strategies were given"),
        ("strategies: [", "while parsing"),
        ("[1, 2]", "valid dictionary"),
        ("strategys: [none]", "strategys: Extra inputs are not permitted"),
        ("strategies: [{bits: 2}]", "has no name; write {name: uniform, bits: [2, 4]}"),
        ("strategies: [none]\nlengths: many", "lengths: "),
        ("strategies: [none, unifrom]", "no strategy named 'unifrom'"),
        ("strategies: [{name: uniform, bits: [4, 5]}]", "bits: Input should be 2, 3, 4 or 8"),
        (b"strategies: [\xff]", "codec can't decode"),
    ],
)
def test_a_bad_yaml_file_is_one_line_and_exit_code_2(folder, tmp_path, content, complaint):
    path = tmp_path / "sweep.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = invoke("bench", *common(folder, tmp_path / "out"), "--strategies", path)
    assert result.exit_code == 2
    assert complaint in flat(result)
    assert "--strategies" in result.output


def test_lengths_are_those_of_tasks_that_leave_it_open(plugin):
    tasks = parse_tasks(["probe", "probe:length=9", "halting:windows=1"], [64, 128])
    assert [registry.tasks.spec(task) for task in tasks] == [
        "probe:length=64",
        "probe:length=128",
        "probe:length=9",
        "halting:length=64,windows=1",
        "halting:length=128,windows=1",
    ]
    assert parse_tasks(["probe"], []) == [registry.tasks.parse("probe")]
    with pytest.raises(ValueError, match="greater than or equal to 8"):
        parse_tasks(["probe"], [7])


@pytest.mark.parametrize(
    ("arguments", "option", "complaint"),
    [
        (("--lengths", "512,many"), "--lengths", "cannot read '512,many'; write tokens separated by commas"),
        (("--lengths", "0"), "--lengths", "cannot read '0'"),
        (("--lengths", "512,,1024"), "--lengths", "cannot read '512,,1024'"),
        (("--lengths", "7", "--tasks", "probe"), "--tasks", "length: Input should be greater than or equal to 8"),
        (("--lengths", "600"), "--tasks", "beyond the model's context; use at most 512"),
        (("--tasks", "perplexty"), "--tasks", "no task named 'perplexty'"),
        (("--tasks", "perplexity:window=2"), "--tasks", "has no field 'window'"),
        (("--tasks", "perplexity:windows=0"), "--tasks", "windows: Input should be greater than or equal to 1"),
        (("--tasks", "probe:breaks=fitted"), "--tasks", "there are no questions"),
        (("--strategies", "unifrom"), "--strategies", "no strategy named 'unifrom'"),
        (("--strategies", "uniform:bitz=4"), "--strategies", "has no field 'bitz'"),
        (("--strategies", "DynamicCache:bits=4"), "--strategies", "DynamicCache has no field 'bits'"),
        (("--strategies", " ; "), "--strategies", "no strategies were given"),
        (("--engine", "slurm"), "--engine", "no engine is called 'slurm'; use one of local, ray"),
        (("--text", "{folder}/short.txt"), "--tasks", "the text has 2 tokens"),
        (("--model", "{folder}/absent"), "--model", "cannot load the model"),
        (("--model", "{folder}/.."), "--model", "cannot load the model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(plugin, folder, tmp_path, arguments, option, complaint):
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    given = {"--model": folder, "--text": folder / "text.txt", "--strategies": "none", **given}
    parts = [str(part).format(folder=folder) for pair in given.items() for part in pair]
    result = invoke("bench", *parts, "--out", tmp_path, "--no-twin", "--no-baselines")
    assert result.exit_code == 2
    assert f"Invalid value for {option}" in flat(result)
    assert complaint in flat(result)
    assert "Traceback" not in result.output


def test_two_plugins_of_one_name_are_told_before_anything_is_measured(plugin, folder, tmp_path):
    class Twice(Breaking):
        """Of another plugin."""

    registry.register(strategies_of(Twice), "twice")
    try:
        result = invoke("bench", *common(folder, tmp_path), "--strategies", "uniform;breaking")
    finally:
        registry.unregister("twice")
    assert result.exit_code == 2
    assert "both offer a strategy named 'breaking'" in flat(result)
    assert not cells_in(tmp_path)


# --- reports


def run_of(*results: Result) -> Run:
    card = results[0].cell.model
    return Run(
        environment=ENVIRONMENT,
        text=TextCard(name="t", sha256="0" * 64, tokens=9),
        models=(card,),
        residual_length=32,
        results=results,
    )


def test_reports_of_several_tasks_have_a_table_and_a_picture_each(swept, tmp_path):
    found = swept(tasks=("probe", "perplexity:windows=1,length=320"), strategies=("none", "uniform"))
    run = Run(
        environment=found.results[0].environment,
        text=TextCard(name="t", sha256="0" * 64, tokens=9),
        models=(found.results[0].cell.model,),
        residual_length=32,
        results=found.results,
    )
    paths = write_files(run, tmp_path / "reports")
    assert [path.name for path in paths] == [
        *(f"leaderboard.{kind}" for kind in ("json", "csv", "md")),
        "leaderboard.png",
        "leaderboard-2.png",
        "report.html",
    ]
    assert all(path.stat().st_size for path in paths)
    text = (tmp_path / "reports" / "leaderboard.md").read_text()
    assert "### `probe:length=16`" in text
    assert "### `perplexity:length=320,windows=1`" in text
    board = Run.model_validate_json((tmp_path / "reports" / "leaderboard.json").read_text())
    assert [each.cell for each in board.results] == [each.cell for each in found.results]


def test_reports_of_failures_alone_and_of_tasks_that_are_gone(tmp_path):
    run = run_of(
        result_of(error="RuntimeError: no", task="probe-that-is-gone"),
        result_of(error="RuntimeError: no", strategy="none", task="other-that-is-gone"),
        result_of(Outcome(metrics={"found": 2.0}), strategy="none", task="probe-that-is-gone"),
    )
    assert all(path.stat().st_size for path in write_files(run, tmp_path))
    text = markdown(run)
    assert "- failed: uniform on tiny: RuntimeError: no" in text
    assert "tiny: found" in text


def test_the_page_maps_what_tasks_find_by_length_and_depth():
    def at(length: int, hits: list[float], strategy: str = "uniform") -> Result:
        samples = tuple({"length": float(length), "depth": float(i % 2), "accuracy": hit} for i, hit in enumerate(hits))
        outcome = Outcome(metrics={"accuracy": sum(hits) / len(hits), "digits": 0.0}, samples=samples)
        return result_of(outcome, strategy=strategy, task=f"passkey:length={length}")

    (found,) = page_of(run_of(at(256, [1, 0, 1, 1]), at(512, [0, 0]))).maps
    assert (found.strategy, found.panel) == ("uniform", "tiny")
    assert (found.rows, found.columns, found.values) == ((256, 512), (0, 1), ((1, 0.5), (0, 0)))


def test_results_of_earlier_runs_are_told_and_those_of_other_workers_are_not(made):
    def at(date: str, strategy: str) -> Result:
        result = made(Outcome(metrics={"score": 1.0}), strategy=strategy)
        return result.model_copy(update={"environment": ENVIRONMENT.model_copy(update={"date": date})})

    run = run_of(at("2025-12-31T00:00:00+00:00", "none"), at("2026-01-01T00:00:09+00:00", "uniform"))
    assert "1 of 2 results are from earlier runs (2025-12-31)." in markdown(run)


# --- Ray


def test_without_ray_the_engine_says_what_to_install(plugin, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = invoke("bench", *common(folder, tmp_path), "--tasks", "probe", "--strategies", "none", "--engine", "ray")
    assert result.exit_code == 2
    assert 'Ray is not installed; pip install "cachequant[ray]", or measure here with --engine local' in flat(result)


def test_a_ray_that_does_not_start_is_told(swept, monkeypatch):
    def refuse(**options):
        raise ConnectionError("no cluster at\nthis address")

    stand_in = SimpleNamespace(is_initialized=lambda: False, init=refuse)
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    with pytest.raises(Unusable, match="cannot start Ray: no cluster at this address"):
        swept(engine=engines.ray)


def test_a_worker_measures_its_cell_wherever_it_was_started(plugin, folder, tmp_path, monkeypatch):
    given = job(Path(folder.name), text=f"{folder.name}/text.txt", strategies=("uniform",))
    monkeypatch.chdir(folder.parent)
    (planned,) = Workbench(given).cells
    monkeypatch.chdir(tmp_path)
    engines._bench.cache_clear()
    text = engines.measure_there(given.model_dump_json(), planned.cell.model_dump_json(), str(folder.parent))
    assert Result.model_validate_json(text).cell == planned.cell
    versions = {**planned.cell.versions, "torch": "1.0"}
    other = planned.cell.model_copy(update={"versions": versions, "residual_length": 7})
    with pytest.raises(LookupError, match=r"differs there in: residual_length, versions\.torch; give it the same"):
        engines.measure_there(given.model_dump_json(), other.model_dump_json(), str(folder.parent))
    unknown = planned.cell.model_copy(update={"strategy": "elsewhere"})
    with pytest.raises(LookupError, match="differs there in: its strategy or task"):
        engines.measure_there(given.model_dump_json(), unknown.model_dump_json(), str(folder.parent))
    engines._bench.cache_clear()


@pytest.fixture(scope="module")
def cluster(plugin):
    """Two cores of this machine, whose workers find the plugin where it is installed."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        path = os.pathsep.join(filter(None, [str(plugin.folder), os.environ.get("PYTHONPATH")]))
        patch.setenv("PYTHONPATH", path)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        try:
            yield ray
        finally:
            ray.shutdown()


def test_ray_finds_what_the_local_engine_finds_and_a_dead_worker_takes_its_cell_alone(cluster, swept, tmp_path):
    tasks = ("halting:windows=1,length=320", "probe:breaks=exit,strategy=uniform")
    found = swept(tasks=tasks, engine=engines.ray)
    errors = {(result.cell.family, result.cell.task.partition(":")[0]): result.error for result in found.results}
    died = errors.pop(("uniform", "probe")) or ""
    assert died.startswith("WorkerCrashedError: ")
    assert errors == {("none", "halting"): None, ("uniform", "halting"): None, ("none", "probe"): None}
    here = swept(tasks=tasks[:1], out=tmp_path / "here")
    for local, remote in zip(here.results, found.results[:2], strict=True):
        assert remote.cell == local.cell
        assert remote.outcome.metrics == pytest.approx(local.outcome.metrics, rel=1e-6, abs=1e-9)
        assert remote.outcome.memory == local.outcome.memory
    assert swept(tasks=tasks).measured == []
