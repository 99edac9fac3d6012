"""Search over the fields that strategies declare searchable: memory held against divergence, both as small as can be.

Trials are proposed by optuna from a fixed seed, so a search that was killed proposes the same ones again, finds the
measured ones in its journal, and ends as if nothing had happened.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from ... import registry
from ...registry import specs
from ..errors import message
from ..metrics import pareto_front
from .bench import Bench, Figures

Sampler = Literal["tpe", "nsga2"]
Report = Callable[[str, int, int], None]


class Space(NamedTuple):
    """One strategy: what its spec fixes, and what is searched."""

    name: str
    fixed: dict[str, Any]
    searched: dict[str, tuple[Any, ...]]

    @property
    def size(self) -> int:
        """Combinations."""
        return prod(map(len, self.searched.values()))


class Trial(BaseModel):
    """One combination that was proposed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    settings: dict[str, Any]
    strategy: str | None = None
    """The spec; None where the strategy refused the settings."""
    figures: Figures | None = None
    """On the tuning text."""
    reason: str | None = None
    """Why there are none: refused by the strategy, or failed."""
    repeats: int | None = None
    """The number of an earlier trial that came to the same strategy."""


class Finding(BaseModel):
    """A strategy that no other of the search beats in both, on the tuning text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str
    tuning: Figures
    verified: Figures | None
    reason: str | None = None
    """Why it could not be verified."""


class Search(BaseModel):
    """All trials, and the front."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampler: Sampler
    seed: int
    trials: tuple[Trial, ...]
    front: tuple[Finding, ...]
    """By memory held."""

    def within(self, bits: float) -> Finding | None:
        """The least divergent one of at most so many packed bits, judged on the tuning text."""
        fitting = [each for each in self.front if each.verified and each.verified.bits <= bits]
        return min(fitting, key=lambda each: each.tuning.kl, default=None)


def spaces(chosen: Sequence[str]) -> list[Space]:
    """What specs leave open: `uniform` all searchable fields, `uniform:block=32` those but the block.

    Raises ValueError for strategies that declare none, and what `registry.parse` raises.
    """
    found = []
    for spec in chosen:
        name = specs.named(spec)
        cls: Any = registry.get(name)
        given: dict[str, Any] = {}
        if isinstance(cls, partial):  # an alias, and the settings it stands for
            cls, given = cls.func, cls.keywords
        searchable = getattr(cls, "searchable", {})
        if not searchable:
            able = ", ".join(each for each, one in registry.strategies().items() if getattr(one, "searchable", {}))
            raise ValueError(f"strategy {name!r} declares no searchable fields; those that do: {able}")
        _, values = specs.split(spec, getattr(cls, "positional", None))
        strategy = registry.parse(spec) if values or given else None
        fixed = {field: getattr(strategy, field) for field in {**given, **values}}
        searched = {field: tuple(options) for field, options in searchable.items() if field not in fixed}
        if not searched:
            raise ValueError(f"{spec!r} fixes every searchable field of {name!r}; leave one of {', '.join(fixed)} out")
        if any(space.name == cls.name and space.fixed == fixed for space in found):
            raise ValueError(f"{spec!r} is given twice; keep one")
        found.append(Space(cls.name, fixed, searched))
    return found


def search(
    bench: Bench,
    over: Sequence[Space],
    trials: int,
    seed: int,
    sampler: Sampler = "tpe",
    report: Report | None = None,
) -> Search:
    """Try `trials` combinations, then verify the front on the other text.

    Raises ImportError where optuna is not installed.
    """
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(8, trials // 4)),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=max(6, min(50, trials // 5))),
    }
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=kinds[sampler]())
    done: list[Trial] = []
    for number in range(trials):
        asked = study.ask()
        trial = _tried(bench, asked, over, number, done)
        if report is not None:
            report(trial.strategy or "refused", number + 1, trials)
        figures = trial.figures
        if figures is None and trial.repeats is not None:
            figures = done[trial.repeats].figures
        if figures is None:
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(asked, [figures.held_bits, figures.kl])
        done.append(trial)
    return Search(sampler=sampler, seed=seed, trials=tuple(done), front=tuple(_front(bench, done)))


def require_optuna() -> Any:
    """The module optuna; raises ImportError naming the extra that brings it."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError('searching needs optuna, which is not installed; pip install "cachequant[tune]"') from error
    return optuna


def _tried(bench: Bench, asked: Any, over: Sequence[Space], number: int, done: Sequence[Trial]) -> Trial:
    """Propose, build, measure."""
    # places in lists, not values: optuna takes plain values only
    space = over[asked.suggest_categorical("strategy", range(len(over)))] if len(over) > 1 else over[0]
    place = over.index(space)
    settings = {
        field: options[asked.suggest_categorical(f"{place}.{field}", range(len(options)))]
        for field, options in space.searched.items()
    }
    trial = Trial(number=number, settings={"strategy": space.name, **space.fixed, **settings})
    try:
        built = registry.get(space.name)(**{**space.fixed, **settings})
        spec = registry.spec(built)
    except (ValidationError, ValueError, LookupError, OSError) as error:
        return trial.model_copy(update={"reason": message(error)})
    trial = trial.model_copy(update={"strategy": spec})
    same = [each.number for each in done if each.strategy == spec and each.repeats is None]
    if same:
        return trial.model_copy(update={"repeats": same[0]})
    try:
        return trial.model_copy(update={"figures": bench.measure(bench.ready(built), "tuning")})
    except Exception as error:
        # one strategy that fails on this model is no reason to lose the others
        return trial.model_copy(update={"reason": f"{type(error).__name__}: {message(error)}"})


def _front(bench: Bench, trials: Sequence[Trial]) -> list[Finding]:
    measured = [trial for trial in trials if trial.figures is not None]
    points = [(t.figures.held_bits, t.figures.kl) for t in measured if t.figures is not None]
    best = [trial for trial, on in zip(measured, pareto_front(points), strict=True) if on]
    findings = []
    for trial in sorted(best, key=lambda each: each.figures.held_bits if each.figures else 0.0):
        assert trial.strategy is not None and trial.figures is not None
        verified = reason = None
        try:
            verified = bench.measure(bench.ready(registry.parse(trial.strategy)), "verifying")
        except Exception as error:
            reason = f"{type(error).__name__}: {message(error)}"
        findings.append(Finding(strategy=trial.strategy, tuning=trial.figures, verified=verified, reason=reason))
    return findings
