"""Tuning keeps its budget, measures what it claims, goes on after a kill, and says what it cannot do."""

import dataclasses
import itertools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import typer
from typer.testing import CliRunner

from cachequant import registry
from cachequant.benchmarks.commands.tune import tune
from cachequant.benchmarks.subjects import ModelCard, Panel, TextCard
from cachequant.benchmarks.tasks.perplexity import Perplexity
from cachequant.benchmarks.tune import allocate as allocating
from cachequant.benchmarks.tune import bench as benching
from cachequant.benchmarks.tune.allocate import allocate, preset_of, solve
from cachequant.benchmarks.tune.bench import Bench, Material
from cachequant.benchmarks.tune.budget import Budget
from cachequant.benchmarks.tune.files import Study, write_preset
from cachequant.benchmarks.tune.journal import Journal, Occupied
from cachequant.benchmarks.tune.knapsack import Option, Unreachable, choose
from cachequant.benchmarks.tune.menu import block_of, compose, ladder
from cachequant.benchmarks.tune.report import markdown, sheets, summary
from cachequant.benchmarks.tune.search import search, spaces
from cachequant.core import Format, LayerFormat, LayerSpec, Strategy
from cachequant.core.hf.tiny import tiny_model
from cachequant.registry import presets
from cachequant.registry.hookspecs import hookimpl

pytestmark = pytest.mark.slow

SPECS = ["uniform", "uniform:rotation=hadamard"]
KEYS, VALUES = (0, "key"), (0, "value")


class NoCalibration:
    """A calibrator for strategies that need none."""

    def ready(self, strategy: Any) -> tuple[Any, None]:
        return strategy, None


@pytest.fixture(scope="module")
def material() -> Material:
    """The tiny model with random tokens to verify and others to tune on."""
    model = tiny_model()

    def panel(seed: int) -> Panel:
        ids = torch.randint(2, 97, (1400,), generator=torch.Generator().manual_seed(seed)).tolist()
        return Panel(
            card=ModelCard(panel="tiny", architecture="Llama", parameters=1, layers=2, context=2048, dtype="float32"),
            model=model,
            tokenizer=SimpleNamespace(bos_token_id=1),
            text=TextCard(name=f"tokens {seed}", sha256=f"{seed:064}", tokens=len(ids)),
            ids=ids,
            residual_length=32,
            calibrator=NoCalibration(),  # type: ignore[arg-type]
        )

    return Material(panel(1), panel(2), Perplexity(windows=2, length=416))


@pytest.fixture
def bench(material, tmp_path):
    with Journal(tmp_path / "j.jsonl", material.about).opened() as journal:
        yield Bench(material.verifying, material.tuning, material.task, 128, journal)


@pytest.fixture(scope="module")
def allocated(material, tmp_path_factory):
    """Bench, menu, allocation and preset under 3 bits, made once."""
    with Journal(tmp_path_factory.mktemp("made") / "j.jsonl", material.about).opened() as journal:
        made = Bench(material.verifying, material.tuning, material.task, 128, journal)
        menu, _ = compose(made, SPECS)
        yield made, menu, *allocate(made, menu, Budget.parse("3"), rounds=1)


# --- the knapsack


def test_the_best_choice_under_a_budget_is_found():
    draw = random.Random(0)
    for _ in range(60):
        places = [
            [Option(draw.choice((4, 6, 8, 12)) * 8, draw.uniform(-1, 5)) for _ in range(draw.randint(1, 4))]
            for _ in range(draw.randint(1, 5))
        ]
        budget = draw.randint(16, 400)
        every = [pick for pick in itertools.product(*map(range, map(len, places)))]
        costs = {pick: sum(places[i][j].cost for i, j in enumerate(pick)) for pick in every}
        losses = {pick: sum(places[i][j].loss for i, j in enumerate(pick)) for pick in every}
        fitting = [pick for pick in every if costs[pick] <= budget]
        if not fitting:
            with pytest.raises(Unreachable) as caught:
                choose(places, budget)
            assert caught.value.least == min(costs.values())
            continue
        chosen = tuple(choose(places, budget))
        assert costs[chosen] <= budget
        assert losses[chosen] == pytest.approx(min(losses[pick] for pick in fitting))


def test_of_equal_losses_the_cheaper_is_taken():
    assert choose([[Option(9, 1.0), Option(2, 1.0)]], 100) == [1]


def test_costs_without_a_common_step_still_keep_the_budget():
    draw = random.Random(1)
    places = [[Option(draw.randint(10**8, 10**9), draw.random()) for _ in range(3)] for _ in range(6)]
    least = sum(min(option.cost for option in options) for options in places)
    for budget in (least, least + 1, 3 * 10**9):
        if budget < least:
            continue
        chosen = choose(places, budget)
        assert sum(options[pick].cost for options, pick in zip(places, chosen, strict=True)) <= budget


# --- the budget


@pytest.mark.parametrize(
    ("text", "bits"), [("3.5", 3.5), ("3.5 bits", 3.5), ("x4", 4.0), ("X 5", 3.2), ("64B", 4.0), ("64 b", 4.0)]
)
def test_a_budget_is_read_in_bits_times_or_bytes(text, bits):
    assert Budget.parse(text).bits(128) == pytest.approx(bits)


@pytest.mark.parametrize("text", ["", "four", "0", "-3", "x4B", "3,5", "1e3"])
def test_what_is_no_budget_is_refused_with_the_three_ways(text):
    with pytest.raises(ValueError, match=r"3\.5 .* x4 .* 2048B"):
        Budget.parse(text)


# --- the journal


def test_measurements_outlive_a_kill_within_a_line(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, {"model": "a"}).opened() as journal:
        journal.put("one", {"kl": 1.5})
        journal.put("two", {"kl": 2.5})
    path.write_bytes(path.read_bytes()[:-9])
    with Journal(path, {"model": "a"}).opened() as journal:
        assert journal.resumed == 1
        assert (journal.find("one"), journal.find("two")) == ({"kl": 1.5}, None)
        journal.put("two", {"kl": 2.5})
    with Journal(path, {"model": "a"}).opened() as journal:
        assert journal.find("two") == {"kl": 2.5}


def test_a_journal_of_another_run_is_refused_and_kept(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, {"model": "a", "windows": 6}).opened() as journal:
        journal.put("one", {"kl": 1.5})
    before = path.read_bytes()
    with pytest.raises(Occupied, match="windows was 6, is 4"), Journal(path, {"model": "a", "windows": 4}).opened():
        pass
    assert path.read_bytes() == before


def test_two_runs_at_once_on_one_file_are_refused(tmp_path):
    first = Journal(tmp_path / "j.jsonl", {})
    with first.opened(), pytest.raises(Occupied, match="another run"), Journal(tmp_path / "j.jsonl", {}).opened():
        pass


@pytest.mark.parametrize("change", ["ids", "tuning ids", "code", "device"])
def test_measurements_on_other_tokens_code_or_device_are_others(material, monkeypatch, change):
    panels = {"verifying": material.verifying, "tuning": material.tuning}
    if change == "ids":
        panels["verifying"] = dataclasses.replace(panels["verifying"], ids=[*panels["verifying"].ids[:-1], 0])
    elif change == "tuning ids":
        panels["tuning"] = dataclasses.replace(panels["tuning"], ids=[*panels["tuning"].ids[:-1], 0])
    elif change == "device":
        panels["verifying"] = dataclasses.replace(panels["verifying"], model=SimpleNamespace(device="elsewhere"))
    before = material.about
    if change == "code":
        monkeypatch.setattr(benching, "code_digest", lambda: "another")
    assert dataclasses.replace(material, **panels).about != before


# --- the menu


def test_a_spec_stands_for_all_widths_unless_it_names_one():
    assert ladder("uniform:rotation=hadamard") == [
        "uniform:bits=2,rotation=hadamard",
        "uniform:bits=3,rotation=hadamard",
        "uniform:rotation=hadamard",
        "uniform:bits=8,rotation=hadamard",
    ]
    assert ladder("uniform:bits=3") == ["uniform:bits=3"]
    assert ladder("none") == ["none"]


def test_settings_that_differ_on_the_other_side_alone_are_one_choice(bench):
    menu, _ = compose(bench, ["uniform", "uniform:key_scale=channel,key_rope=pre"])
    assert len(menu.choices[KEYS]) == 8  # type: ignore[index]
    assert len(menu.choices[VALUES]) == 4  # type: ignore[index]


def test_bytes_of_choices_are_those_that_are_held(allocated):
    found = allocated[2]
    assert found.verified.bits == pytest.approx(found.bits, rel=1e-3)
    for setting in found.settings:
        assert setting.verified.bits == pytest.approx(setting.bits, rel=1e-3), setting.strategy


def test_angles_for_keys_before_rope_count(bench):
    menu, _ = compose(bench, ["uniform", "uniform:key_scale=channel,key_rope=pre"])
    # cos and sin of half a head in float32, shared by two windows; 384 of 416 tokens are packed
    assert menu.rope_bytes == pytest.approx(64 * 4 / 2 * 416 / 384)
    before = menu.everywhere("uniform:key_scale=channel,key_rope=pre", "uniform")
    measured = bench.measure(registry.parse("uniform:key_scale=channel,key_rope=pre"), "verifying")
    assert 8 * menu.cost(before) / menu.elements == pytest.approx(measured.bits, rel=1e-3)


class Own(Strategy):
    """Bytes of its own."""

    name: ClassVar[str] = "own-bytes"

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(codes="custom"), value=Format())


class Plugin:
    @hookimpl
    def cachequant_strategies(self):
        return [Own]


@pytest.mark.parametrize(
    ("specs", "complaint"),
    [
        (["qaq"], "qaq.*widths of their own.*--method search"),
        (["own-bytes"], "bytes of its own.*--method search"),
        (["uniform:block=32", "uniform:rotation=hadamard"], "blocks of 32 tokens.*of 128.*the same block"),
        (["uniform:group_size=48"], "group_size=48.*does not divide"),
        (["unifrom"], "did you mean 'uniform'"),
    ],
)
def test_what_cannot_be_given_to_places_is_refused(bench, specs, complaint):
    registry.register(Plugin(), "tests")
    try:
        with pytest.raises((ValueError, LookupError), match=complaint):
            compose(bench, specs)
    finally:
        registry.unregister("tests")


def test_defaults_that_a_model_cannot_be_cached_with_are_left_out_with_a_note(bench):
    menu, notes = compose(bench, ["uniform", "uniform:group_size=48"], lenient=True)
    assert {rung.family for rung in menu.rungs} == {"uniform"}
    assert "group_size=48" in notes[0]


def test_passes_are_no_longer_than_the_smallest_block():
    assert block_of(["uniform", "uniform:block=64"]) == 64


# --- allocating


def test_a_preset_keeps_its_budget_and_beats_what_is_alike_on_the_tuning_text(allocated):
    bench, menu, found, _ = allocated
    assert found.bits <= 3 and found.verified.bits <= 3 * 1.001
    alike = [
        menu.everywhere(key.spec, value.spec)
        for key, value in itertools.product(menu.rungs, menu.rungs)
        if 8 * menu.cost(menu.everywhere(key.spec, value.spec)) / menu.elements <= 3
    ]
    assert len(alike) > 4
    assert found.tuning.kl < min(bench.measure(preset_of(each), "tuning").kl for each in alike)


def test_the_preset_is_what_the_allocation_says(allocated, tmp_path):
    bench, _, found, preset = allocated
    study = Study.of(bench, strategies=tuple(SPECS), budget=found.budget, allocation=found)
    write_preset(preset, tmp_path / "p.json", study)
    read = registry.parse(f"preset:{tmp_path / 'p.json'}")
    for index, sides in found.layers.items():
        assert {"key": registry.spec(read.sides(index).key), "value": registry.spec(read.sides(index).value)} == sides
    assert presets.read(tmp_path / "p.json").evidence["verified"] == found.verified.model_dump()
    assert bench.measure(read, "verifying") == found.verified


def test_tables_and_sentences_show_the_preset_among_its_rivals(allocated):
    bench, _, found, _ = allocated
    study = Study.of(bench, strategies=tuple(SPECS), budget=found.budget, allocation=found)
    tables = [markdown(sheet) for sheet in sheets(study)]
    assert "**preset**" in tables[0] and all(each.strategy in tables[0] for each in found.settings)
    assert found.rival is not None and found.rival.strategy in " ".join(summary(study))
    assert Study.model_validate_json(study.model_dump_json()) == study
    assert "2 windows of 416 tokens" in " ".join(summary(study))
    single = study.model_copy(update={"protocol": study.protocol.model_copy(update={"windows": 1})})
    assert "1 window of" in " ".join(summary(single))


def test_a_budget_below_the_narrowest_names_the_nearest_that_works(allocated):
    bench, menu, *_ = allocated
    with pytest.raises(ValueError, match=r"x40 \(0\.400 bits.*give at least 2\.500"):
        allocate(bench, menu, Budget.parse("x40"))
    losses = {place: {c.spec: c.bytes_per_token for c in choices} for place, choices in menu.choices.items()}
    narrowest = solve(menu, losses, Budget.parse("2.5").bytes_per_token(menu.elements))
    assert 8 * menu.cost(narrowest) / menu.elements == 2.5


def test_bytes_of_a_budget_that_allows_everything_are_not_all_spent(allocated):
    bench, menu, *_ = allocated
    found, _ = allocate(bench, menu, Budget.parse("16"), rounds=0)
    assert found.bits <= 8.5


def test_an_allocation_that_was_killed_goes_on_without_measuring_again(material, tmp_path, monkeypatch):
    measured: list[str] = []
    real = Bench._measured

    def counted(self: Bench, strategy: Any, stage: Any) -> Any:
        if killed and len(measured) == 7:
            raise KeyboardInterrupt
        measured.append(registry.spec(strategy))
        return real(self, strategy, stage)

    monkeypatch.setattr(Bench, "_measured", counted)
    path = tmp_path / "j.jsonl"

    def run() -> Any:
        with Journal(path, material.about).opened() as journal:
            bench = Bench(material.verifying, material.tuning, material.task, 128, journal)
            menu, _ = compose(bench, ["uniform:bits=2", "uniform:bits=4"])
            return allocate(bench, menu, Budget.parse("3.6"), rounds=1)[0]

    killed = True
    with pytest.raises(KeyboardInterrupt):
        run()
    killed = False
    resumed = run()
    assert len(measured) > 7 and len(set(zip(measured, itertools.count()))) == len(measured)
    path.unlink()
    total = len(measured)
    assert run() == resumed
    assert len(measured) == 2 * total  # nothing had been measured twice


# --- searching


def test_an_alias_fixes_what_it_stands_for():
    (space,) = spaces(["turboquant_k3v4_nc:boundary_layers=0"])
    assert (space.name, space.fixed) == ("turboquant", {"key_bits": 3, "value_bits": 4, "boundary_layers": 0})
    assert set(space.searched) == {"norm_correction"}


def test_specs_fix_what_they_name_and_leave_the_rest_open():
    (space,) = spaces(["uniform:block=32,rotation=hadamard"])
    assert space.fixed == {"block": 32, "rotation": "hadamard"}
    assert set(space.searched) == set(registry.get("uniform").searchable) - {"block", "rotation"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("specs", "complaint"),
    [
        (["none"], "'none' declares no searchable fields; those that do: .*uniform"),
        (["nothing"], "no strategy named 'nothing'"),
        (["uniform:bist=3"], "no field 'bist'.*did you mean 'bits'"),
        (["h2o:keep=0.2,recent=0.5"], "fixes every searchable field"),
        (["h2o", "h2o"], "given twice"),
    ],
)
def test_what_cannot_be_searched_is_refused(specs, complaint):
    with pytest.raises((ValueError, LookupError), match=complaint):
        spaces(specs)


def test_a_search_finds_a_front_prunes_what_is_refused_and_goes_on_after_a_kill(material, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    measured: list[str] = []
    real = Bench._measured
    killed = True

    def counted(self: Bench, strategy: Any, stage: Any) -> Any:
        if killed and len(measured) == 5:
            raise KeyboardInterrupt
        if getattr(strategy, "symmetric", False):
            raise RuntimeError("cannot measure this")
        measured.append(registry.spec(strategy))
        return real(self, strategy, stage)

    monkeypatch.setattr(Bench, "_measured", counted)

    def run(path: Path) -> Any:
        with Journal(path, material.about).opened() as journal:
            bench = Bench(material.verifying, material.tuning, material.task, 32, journal)
            return search(bench, spaces(["uniform:block=32", "h2o"]), trials=14, seed=3)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "j.jsonl")
    killed = False
    found = run(tmp_path / "j.jsonl")
    total = len(measured)
    assert len(found.trials) == 14
    reasons = [trial.reason or "" for trial in found.trials]
    assert any("choose one of the two" in reason for reason in reasons)  # a combination that uniform refuses
    assert any("cannot measure this" in reason for reason in reasons)
    assert {trial.settings["strategy"] for trial in found.trials} == {"uniform", "h2o"}
    points = [(each.tuning.held_bits, each.tuning.kl) for each in found.front]
    assert points == sorted(points) and [kl for _, kl in points] == sorted((kl for _, kl in points), reverse=True)
    everything = [trial.figures for trial in found.trials if trial.figures]
    assert not any(f.held_bits < bits and f.kl < kl for f in everything for bits, kl in points)
    best = found.within(6.0)
    assert best is not None and best.verified is not None and best.verified.bits <= 6.0
    assert run(tmp_path / "another.jsonl") == found
    assert len(measured) == 2 * total


def test_a_search_without_optuna_names_the_extra(monkeypatch):
    from cachequant.benchmarks.tune.search import require_optuna

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "cachequant\[tune\]"'):
        require_optuna()


# --- the command

app = typer.Typer()
app.command()(tune)


def command(*arguments: Any) -> Any:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(map(str, arguments)))


SHORT = ("--windows", 1, "--window-length", 416, "--threads", 1)


def test_the_command_writes_a_preset_that_is_used_by_its_file(tmp_path):
    out = tmp_path / "tuned.json"
    asked = ("--strategies", "uniform:bits=2;uniform:bits=4", "--budget", "x5", "--out", out, "--rounds", 0, *SHORT)
    done = command(*asked)
    assert done.exit_code == 0, done.output
    assert "registry.parse" in done.output and "preset:" in done.output
    assert len(registry.parse(f"preset:{out}").children()) == 2
    study = Study.model_validate_json((tmp_path / "tuned.study.json").read_text())
    assert study.allocation is not None and study.allocation.bits <= 3.2
    assert json.loads(out.read_text())["evidence"]["budget"] == "x5"
    again = command(*asked)
    assert again.exit_code == 0 and "measurements of an earlier run" in again.output
    assert presets.read(out).contents == registry.parse(f"preset:{out}").file.contents


def test_the_command_searches_and_writes_the_best_within_a_budget(tmp_path):
    pytest.importorskip("optuna")
    out = tmp_path / "found.json"
    asked = ("--method", "search", "--strategies", "uniform:block=32", "--trials", 4, "--out", out, *SHORT)
    done = command(*asked)
    assert done.exit_code == 0, done.output
    assert "4 trials" in done.output and "--budget chooses one" in done.output and not out.exists()
    done = command(*asked, "--budget", 16)
    assert done.exit_code == 0, done.output
    study = Study.model_validate_json((tmp_path / "found.study.json").read_text())
    assert study.chosen is not None and registry.parse(f"preset:{out}").children() == [registry.parse(study.chosen)]
    done = command(*asked, "--budget", "x100")
    assert done.exit_code == 0 and "no trial keeps the budget" in done.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "under a budget"),
        (("--budget", "some"), "is no budget"),
        (("--budget", "3", "--strategies", "unifrom"), "did you mean 'uniform'"),
        (("--budget", "3", "--strategies", "qaq"), "--method search"),
        (("--method", "search", "--strategies", "none"), "no searchable fields"),
        (("--method", "search", "--strategies", "uniform:bist=3"), "no field 'bist'"),
        (("--budget", "3", "--window-length", "10"), "nothing to score"),
        (("--budget", "3", "--model", "no-such-folder"), "cannot load the model"),
    ],
)
def test_what_the_command_cannot_do_it_says_before_it_measures(arguments, complaint, tmp_path):
    done = command("--out", tmp_path / "p.json", *arguments)
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "p.json").exists()


def test_a_text_that_is_too_short_is_refused(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for option in ("--text", "--calibration-text"):
        done = command("--budget", 3, "--out", tmp_path / "p.json", option, short, *SHORT)
        assert (
            done.exit_code == 2
            and option in done.output
            and "use a longer text" in " ".join(done.output.replace("│", " ").split())
        )


def test_an_out_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "p.json"):
        done = command("--budget", 3, "--out", out)
        assert done.exit_code == 2 and "cannot write" in done.output


# --- what is committed


def test_the_recorded_presets_beat_the_best_settings_of_equal_bytes():
    folder = Path(allocating.__file__).parents[1] / "results"
    if not (folder / "tune-reference.json").exists():
        pytest.skip("an installed wheel has no results")
    studies = [
        Study.model_validate(each) for each in json.loads((folder / "tune-reference.json").read_text())["studies"]
    ]
    assert {study.model.panel for study in studies} == {"reference", "outlier twin"}
    for study in studies:
        found = study.allocation
        assert found is not None and found.rival is not None and found.plain_rival is not None
        assert found.verified.device_bytes <= found.plain_rival.verified.device_bytes * 1.001
        assert found.verified.kl < found.plain_rival.verified.kl
        # with two bits for all there is nothing to take from one layer for another
        assert found.verified.kl < found.rival.verified.kl * (1.05 if found.budget_bits < 3 else 0.7)
    for path in folder.glob("preset-*.json"):
        assert registry.parse(f"preset:{path}")
