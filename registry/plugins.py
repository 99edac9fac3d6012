"""Plugins and what they offer: strategies, and tasks to measure them on."""

import importlib
import importlib.metadata
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from threading import RLock
from typing import Any, NamedTuple

import pluggy

from ..core import CacheQuantizer, Strategy
from . import hookspecs

BUILTIN = ("none", "uniform", "kvquant", "qnorm", "qaq", "h2o", "scissorhands", "preset")
TASKS = ("perplexity", "passkey", "needle", "continuation", "speed", "lm_eval")

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_METHODS = [name for name, value in vars(CacheQuantizer).items() if callable(value) and not name.startswith("_")]


class UnknownStrategy(LookupError):
    """No installed plugin offers a strategy of this name."""


class DuplicateStrategy(ValueError):
    """Two plugins offer a strategy of the same name."""


class UnknownTask(LookupError):
    """No installed plugin offers a task of this name."""


class DuplicateTask(ValueError):
    """Two plugins offer a task of the same name."""


@dataclass(frozen=True)
class Kind:
    """What plugins may offer, and through which hook."""

    word: str
    hook: str
    package: str
    """Where the built-in ones live, one module each."""
    builtin: tuple[str, ...]
    missing: Callable[[type[Any]], list[str]]
    """What keeps a class from being one."""
    unknown: type[LookupError]
    duplicate: type[ValueError]


class Offer(NamedTuple):
    """A class and the plugin it came from."""

    plugin: str
    offered: type[Any]

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} ({self.offered.__module__}.{self.offered.__qualname__})"


class Plugins:
    """What is offered of one kind. Nothing is imported before the first question; threads may ask at once."""

    def __init__(self, kind: Kind | None = None) -> None:
        self.kind = kind or STRATEGY
        self._lock = RLock()
        self._manager: pluggy.PluginManager | None = None
        self._offers: list[Offer] = []

    def register(self, plugin: object, name: str) -> None:
        """Add an object with one of the hooks. Nothing is added if it raises."""
        with self._lock:
            manager = self._discovered()
            self._offers = self._offers + _add(self.kind, manager, plugin, name)

    def unregister(self, name: str) -> None:
        """Remove a plugin and what it offers."""
        with self._lock:
            manager = self._discovered()
            if not manager.has_plugin(name):
                installed = ", ".join(sorted(known for known, _ in manager.list_name_plugin()))
                raise LookupError(f"no plugin named {name!r}; installed: {installed}")
            manager.unregister(name=name)
            self._offers = [offer for offer in self._offers if offer.plugin != name]

    def holds(self, name: str) -> bool:
        """Whether a plugin of that name has been loaded; loads none."""
        with self._lock:
            return self._manager is not None and self._manager.has_plugin(name)

    def offer(self, name: str) -> Offer:
        """The one of this name."""
        offers = self._all()
        found = [offer for offer in offers if offer.offered.name == name]
        if not found:
            raise self.kind.unknown(_unknown(self.kind.word, name, sorted({offer.offered.name for offer in offers})))
        _refuse_duplicates(self.kind, found)
        return found[0]

    def offers(self) -> list[Offer]:
        """All of them, by name."""
        offers = self._all()
        _refuse_duplicates(self.kind, offers)
        return sorted(offers, key=lambda offer: offer.offered.name)

    def _all(self) -> list[Offer]:
        with self._lock:
            self._discovered()
            return self._offers

    def _discovered(self) -> pluggy.PluginManager:
        if self._manager is not None:
            return self._manager
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        offers = []
        for word in self.kind.builtin:
            module = importlib.import_module(f"{self.kind.package}.{word}", __package__)
            offers += _add(self.kind, manager, module, f"{hookspecs.PROJECT}:{word}")
        # set before third parties load, which may build on what they look up here
        self._manager, self._offers = manager, offers
        try:
            for entry in importlib.metadata.entry_points(group=hookspecs.PROJECT):
                self._load(manager, entry)
        except BaseException:
            self._manager = None
            raise
        return manager

    def _load(self, manager: pluggy.PluginManager, entry: importlib.metadata.EntryPoint) -> None:
        plugin = f"{entry.dist.name}:{entry.name}" if entry.dist else entry.name
        try:
            self._offers = self._offers + _add(self.kind, manager, entry.load(), plugin)
        except Exception as error:
            # one broken plugin must not take the others down
            message = f"skipped plugin {plugin!r} ({entry.value}): {error!r}; repair or uninstall it"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _add(kind: Kind, manager: pluggy.PluginManager, plugin: object, name: str) -> list[Offer]:
    """Register `plugin` and return what it offers; raises, with the manager unchanged, if that is not usable."""
    if manager.has_plugin(name):
        raise ValueError(f"a plugin named {name!r} is registered already; unregister it first or choose another name")
    manager.register(plugin, name)
    try:
        if not manager.get_hookcallers(plugin):
            raise TypeError(
                f"plugin {name!r} implements no hook; give it a function `{kind.hook}` that is decorated "
                f"with cachequant.registry.hookspecs.hookimpl and returns a list of {kind.word} classes"
            )
        caller = getattr(manager.hook, kind.hook)
        # a plugin may offer something else alone
        offered = next((hook.function() for hook in caller.get_hookimpls() if hook.plugin is plugin), ())
        if not isinstance(offered, list | tuple):
            raise TypeError(f"{kind.hook}() of plugin {name!r} must return a list, got {offered!r}")
        for each in offered:
            if missing := _missing(kind, each):
                raise TypeError(f"plugin {name!r} offers {each!r}, which is no {kind.word}: {'; '.join(missing)}")
        return [Offer(name, each) for each in offered]
    except Exception:
        manager.unregister(plugin)
        raise


def _missing(kind: Kind, offered: object) -> list[str]:
    """What keeps `offered` from being what its plugin says it is."""
    if not isinstance(offered, type):
        return ["it is no class; return the class itself, not an instance"]
    missing = kind.missing(offered)
    name = getattr(offered, "name", None)
    if name is None:
        missing.append('it has no name; write `name: ClassVar[str] = "..."`')
    elif not isinstance(name, str) or not _NAME.fullmatch(name):
        missing.append(f"its name is {name!r}; use lower-case words joined by hyphens")
    return missing


def _undefined_methods(strategy: type[Any]) -> list[str]:
    return [f"it does not define {name}(...)" for name in _METHODS if not _defines(strategy, name)]


def _no_task(task: type[Any]) -> list[str]:
    # by name: the base class is of a layer above
    methods = ("prepare", "measure")
    undefined = [name for name in methods if not callable(getattr(task, name, None))]
    return [
        f"it does not define {name}(...); derive it from cachequant.benchmarks.tasks.base.Task" for name in undefined
    ]


def _defines(strategy: type[Any], method: str) -> bool:
    found = getattr(strategy, method, None)
    return callable(found) and found not in (getattr(CacheQuantizer, method), Strategy.formats)


def _unknown(word: str, name: str, names: list[str]) -> str:
    if ":" in name:
        return f"no {word} named {name!r}; registry.parse({name!r}) reads names with settings"
    close = get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no {word} named {name!r}; installed: {', '.join(names)}{hint}"


def _refuse_duplicates(kind: Kind, offers: list[Offer]) -> None:
    seen: dict[str, Offer] = {}
    for offer in offers:
        name = offer.offered.name
        if name in seen:
            raise kind.duplicate(
                f"{seen[name]} and {offer} both offer a {kind.word} named {name!r}; "
                f"uninstall one or rename its {kind.word}"
            )
        seen[name] = offer


STRATEGY = Kind(
    "strategy",
    "cachequant_strategies",
    "..strategies",
    BUILTIN,
    _undefined_methods,
    UnknownStrategy,
    DuplicateStrategy,
)
TASK = Kind("task", "cachequant_tasks", "..benchmarks.tasks", TASKS, _no_task, UnknownTask, DuplicateTask)
