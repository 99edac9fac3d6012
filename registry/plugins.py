"""Plugins and the strategies they offer."""

import importlib
import importlib.metadata
import re
import warnings
from difflib import get_close_matches
from threading import RLock
from typing import Any, NamedTuple

import pluggy

from ..core import CacheQuantizer, Strategy
from . import hookspecs

BUILTIN = ("none", "uniform", "kvquant", "qnorm", "qaq", "h2o", "scissorhands")

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_METHODS = [name for name, value in vars(CacheQuantizer).items() if callable(value) and not name.startswith("_")]


class UnknownStrategy(LookupError):
    """No installed plugin offers a strategy of this name."""


class DuplicateStrategy(ValueError):
    """Two plugins offer a strategy of the same name."""


class Offer(NamedTuple):
    """A strategy class and the plugin it came from."""

    plugin: str
    strategy: type[Any]

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} ({self.strategy.__module__}.{self.strategy.__qualname__})"


class Plugins:
    """The strategies of this process. Nothing is imported before the first question; threads may ask at once."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._manager: pluggy.PluginManager | None = None
        self._offers: list[Offer] = []

    def register(self, plugin: object, name: str) -> None:
        """Add an object with a `cachequant_strategies` hook. Nothing is added if it raises."""
        with self._lock:
            manager = self._discovered()
            self._offers = self._offers + _add(manager, plugin, name)

    def unregister(self, name: str) -> None:
        """Remove a plugin and its strategies."""
        with self._lock:
            manager = self._discovered()
            if not manager.has_plugin(name):
                installed = ", ".join(sorted(known for known, _ in manager.list_name_plugin()))
                raise LookupError(f"no plugin named {name!r}; installed: {installed}")
            manager.unregister(name=name)
            self._offers = [offer for offer in self._offers if offer.plugin != name]

    def offer(self, name: str) -> Offer:
        """The one strategy of this name."""
        offers = self._all()
        found = [offer for offer in offers if offer.strategy.name == name]
        if not found:
            raise UnknownStrategy(_unknown(name, sorted({offer.strategy.name for offer in offers})))
        _refuse_duplicates(found)
        return found[0]

    def offers(self) -> list[Offer]:
        """Every strategy, by name."""
        offers = self._all()
        _refuse_duplicates(offers)
        return sorted(offers, key=lambda offer: offer.strategy.name)

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
        for word in BUILTIN:
            module = importlib.import_module(f"..strategies.{word}", __package__)
            offers += _add(manager, module, f"{hookspecs.PROJECT}:{word}")
        # set before third parties load, which may build on a strategy that they look up here
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
            self._offers = self._offers + _add(manager, entry.load(), plugin)
        except Exception as error:
            # one broken plugin must not take the others down
            message = f"skipped plugin {plugin!r} ({entry.value}): {error!r}; repair or uninstall it"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _add(manager: pluggy.PluginManager, plugin: object, name: str) -> list[Offer]:
    """Register `plugin` and return what it offers; raises, with the manager unchanged, if that is not usable."""
    if manager.has_plugin(name):
        raise ValueError(f"a plugin named {name!r} is registered already; unregister it first or choose another name")
    manager.register(plugin, name)
    try:
        hooks = [hook for hook in manager.hook.cachequant_strategies.get_hookimpls() if hook.plugin is plugin]
        if not hooks:
            raise TypeError(
                f"plugin {name!r} implements no hook; give it a function `cachequant_strategies` that is decorated "
                "with cachequant.registry.hookspecs.hookimpl and returns a list of strategy classes"
            )
        strategies = hooks[0].function()
        if not isinstance(strategies, list | tuple):
            raise TypeError(f"cachequant_strategies() of plugin {name!r} must return a list, got {strategies!r}")
        for strategy in strategies:
            if missing := _missing(strategy):
                raise TypeError(f"plugin {name!r} offers {strategy!r}, which is no strategy: {'; '.join(missing)}")
        return [Offer(name, strategy) for strategy in strategies]
    except Exception:
        manager.unregister(plugin)
        raise


def _missing(strategy: object) -> list[str]:
    """What keeps `strategy` from satisfying `CacheQuantizer`."""
    if not isinstance(strategy, type):
        return ["it is no class; return the class itself, not an instance"]
    missing = [f"it does not define {name}(...)" for name in _METHODS if not _defines(strategy, name)]
    name = getattr(strategy, "name", None)
    if name is None:
        missing.append('it has no name; write `name: ClassVar[str] = "..."`')
    elif not isinstance(name, str) or not _NAME.fullmatch(name):
        missing.append(f"its name is {name!r}; use lower-case words joined by hyphens")
    return missing


def _defines(strategy: type[Any], method: str) -> bool:
    found = getattr(strategy, method, None)
    return callable(found) and found not in (getattr(CacheQuantizer, method), Strategy.formats)


def _unknown(name: str, names: list[str]) -> str:
    if ":" in name:
        return f"no strategy named {name!r}; registry.parse({name!r}) reads names with settings"
    close = get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no strategy named {name!r}; installed: {', '.join(names)}{hint}"


def _refuse_duplicates(offers: list[Offer]) -> None:
    seen: dict[str, Offer] = {}
    for offer in offers:
        name = offer.strategy.name
        if name in seen:
            raise DuplicateStrategy(
                f"{seen[name]} and {offer} both offer a strategy named {name!r}; uninstall one or rename its strategy"
            )
        seen[name] = offer
