"""Plugins and what they offer: strategies, and tasks to measure them on."""

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from threading import RLock
from typing import Any, NamedTuple

import pluggy

from ..core import CacheQuantizer, Strategy, names
from ..core.protocol import CONTRACT_VERSION
from . import descriptions, hookspecs
from .descriptions import Description

BUILTIN = (
    "none",
    "uniform",
    "int8",
    "fp8",
    "kivi",
    "rotated",
    "turboquant",
    "kvquant",
    "qnorm",
    "qaq",
    "h2o",
    "scissorhands",
    "preset",
)
TASKS = ("perplexity", "passkey", "needle", "continuation", "speed", "lm_eval")

_METHODS = [name for name, value in vars(CacheQuantizer).items() if callable(value) and not name.startswith("_")]


class UnknownStrategy(LookupError):
    """No installed plugin offers a strategy of this name."""


class DuplicateStrategy(ValueError):
    """Two plugins offer a strategy of the same name."""


class UnusablePlugin(TypeError):
    """A plugin offers what is no strategy or task, or nothing."""


class OtherContract(UnusablePlugin):
    """A plugin offers a strategy that was written for another version of the contract."""


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
    contract: int | None = None
    """The version of what they have to keep; None: there are no versions of it."""


class Offer(NamedTuple):
    """A class and the plugin it came from."""

    plugin: str
    offered: type[Any]

    @property
    def aliases(self) -> Mapping[str, Mapping[str, Any]]:
        """Other names it is found by, and the settings they stand for."""
        return descriptions.aliases(self.offered)

    def goes_by(self, name: str) -> bool:
        """Whether it is found by that name."""
        return name == self.offered.name or name in self.aliases

    def settings(self, name: str) -> Mapping[str, Any]:
        """What one of its names stands for: nothing but itself, or the settings of an alias."""
        return {} if name == self.offered.name else self.aliases[name]

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} ({self.offered.__module__}.{self.offered.__qualname__})"


class Plugins:
    """What is offered of one kind. Nothing is imported before the first question; threads may ask at once."""

    def __init__(self, kind: Kind | None = None) -> None:
        self.kind = kind or STRATEGY
        self._lock = RLock()
        self._manager: pluggy.PluginManager | None = None
        self._offers: list[Offer] = []
        self._builtin: list[Offer] = []

    def register(self, plugin: object, name: str) -> None:
        """Add an object with one of the hooks. Nothing is added if it raises.

        Raises UnusablePlugin, the kind's error where a name is that of a built-in one, and ValueError where a plugin
        of that name is there already.
        """
        with self._lock:
            manager = self._discovered()
            self._offers = self._offers + _add(self.kind, manager, plugin, name, self._builtin)

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
        """The one of this name, or alias."""
        offers = self._all()
        found = [offer for offer in offers if offer.goes_by(name)]
        if not found:
            raise self.kind.unknown(_unknown(self.kind.word, name, offers))
        if len(found) > 1:
            raise self.kind.duplicate(_dispute(self.kind, name, found))
        return found[0]

    def offers(self) -> list[Offer]:
        """All of them, by name; what two plugins offer by one name is left out, with a RuntimeWarning.

        A plugin whose alias another one claims is warned of, too, and goes by its other names.
        """
        offers = sorted(self._all(), key=lambda offer: offer.offered.name)
        disputed = _disputed(offers)
        for name, claims in sorted(disputed.items()):
            # the others go on working; who asks for this one is told again, by an error
            what = "plugins" if _names_one(name, claims) else "plugin aliases"
            message = f"skipped {what} that collide: {_dispute(self.kind, name, claims)}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return [offer for offer in offers if offer.offered.name not in disputed]

    def describe(self, name: str) -> Description:
        """What the one of this name, or alias, says about itself, without the aliases that others claim."""
        offer = self.offer(name)
        return descriptions.describe(offer.offered, offer.plugin, name, _disputed(self._all()))

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
            offers += _add(self.kind, manager, module, f"{hookspecs.PROJECT}:{word}", ())
        # set before third parties load, which may build on what they look up here
        self._manager, self._offers, self._builtin = manager, offers, offers
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
            self._offers = self._offers + _add(self.kind, manager, entry.load(), plugin, self._builtin)
        # one broken plugin must not take the others down, nor end a process it was not asked about
        except (Exception, SystemExit) as error:
            known = isinstance(error, self.kind.duplicate | UnusablePlugin)
            advised = isinstance(error, self.kind.duplicate | OtherContract)
            reason = f"{error if known else repr(error)}{'' if advised else '; repair or uninstall it'}"
            warnings.warn(f"skipped plugin {plugin!r} ({entry.value}): {reason}", RuntimeWarning, stacklevel=2)


def _add(kind: Kind, manager: pluggy.PluginManager, plugin: object, name: str, builtin: Sequence[Offer]) -> list[Offer]:
    """Register `plugin` and return what it offers; raises, with the manager unchanged, if that is not usable."""
    if manager.has_plugin(name):
        raise ValueError(f"a plugin named {name!r} is registered already; unregister it first or choose another name")
    manager.register(plugin, name)
    try:
        if not manager.get_hookcallers(plugin):
            raise UnusablePlugin(
                f"plugin {name!r} implements no hook; give it a function `{kind.hook}` that is decorated "
                f"with cachequant.registry.hookspecs.hookimpl and returns a list of {kind.word} classes"
            )
        caller = getattr(manager.hook, kind.hook)
        # a plugin may offer something else alone
        offered = next((hook.function() for hook in caller.get_hookimpls() if hook.plugin is plugin), ())
        if not isinstance(offered, list | tuple):
            raise UnusablePlugin(f"{kind.hook}() of plugin {name!r} must return a list, got {offered!r}")
        offers = [Offer(name, each) for each in offered]
        for offer in offers:
            _require_usable(kind, offer)
            _require_names_of_its_own(kind, offer, builtin)
        return offers
    except BaseException:
        manager.unregister(plugin)
        raise


def _require_usable(kind: Kind, offer: Offer) -> None:
    """Raise UnusablePlugin, saying what to do, for what could not be used under its names."""
    plugin, offered = offer
    if missing := _missing(kind, offered):
        raise UnusablePlugin(f"plugin {plugin!r} offers {offered!r}, which is no {kind.word}: {'; '.join(missing)}")
    if kind.contract is not None:
        _require_contract(offer, kind.contract)
    if faults := names.faults_of_aliases(offered):
        raise UnusablePlugin(f"plugin {plugin!r} offers {offered.name!r} with aliases: {'; '.join(faults)}")


def _require_contract(offer: Offer, installed: int) -> None:
    """Raise UnusablePlugin for what was not written for the installed version of the contract."""
    plugin, offered = offer
    contract = getattr(offered, "contract", None)
    if contract is None:
        return
    if type(contract) is not int:
        raise UnusablePlugin(
            f"plugin {plugin!r} offers {offered.name!r} with contract = {contract!r}, which has to be a whole number, "
            f"such as contract = {installed}, that of this cachequant"
        )
    if contract != installed:
        advice = (
            "upgrade cachequant"
            if contract > installed
            else "upgrade the plugin; its author runs cachequant.core.contract.check_strategy, and writes "
            f"contract = {installed} when it passes"
        )
        raise OtherContract(
            f"plugin {plugin!r} offers {offered.name!r}, written for contract {contract}; this cachequant has contract "
            f"{installed}: {advice}"
        )


def _require_names_of_its_own(kind: Kind, offer: Offer, builtin: Sequence[Offer]) -> None:
    """Raise the kind's error where a name or alias is that of a built-in one."""
    for name in (offer.offered.name, *offer.aliases):
        taken = next((each for each in builtin if each.goes_by(name)), None)
        if taken is not None:
            raise kind.duplicate(f"{_claims(kind, name, (taken, offer))}; rename that of {offer.plugin!r}")


def _missing(kind: Kind, offered: object) -> list[str]:
    """What keeps `offered` from being what its plugin says it is."""
    if not isinstance(offered, type):
        return ["it is no class; return the class itself, not an instance"]
    return kind.missing(offered) + names.faults_of_name(offered)


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


def _unknown(word: str, name: str, offers: Sequence[Offer]) -> str:
    if ":" in name:
        return f"no {word} named {name!r}; registry.parse({name!r}) reads names with settings"
    disputed = _disputed(offers).keys()
    known_names = sorted({offer.offered.name for offer in offers} - disputed)
    aliases = sorted({alias for offer in offers for alias in offer.aliases} - disputed)
    close = get_close_matches(name, [*known_names, *aliases], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    known = ", ".join(known_names) + (f"; aliases: {', '.join(aliases)}" if aliases else "")
    return f"no {word} named {name!r}; installed: {known}{hint}"


def _disputed(offers: Sequence[Offer]) -> dict[str, list[Offer]]:
    """Names and aliases that more than one claims, and who does."""
    claims: dict[str, list[Offer]] = {}
    for offer in offers:
        for name in (offer.offered.name, *offer.aliases):
            claims.setdefault(name, []).append(offer)
    return {name: claimed for name, claimed in claims.items() if len(claimed) > 1}


def _names_one(name: str, claims: Sequence[Offer]) -> bool:
    """Whether it is the own name of one of them, and not an alias of all."""
    return any(offer.offered.name == name for offer in claims)


def _dispute(kind: Kind, name: str, offers: Sequence[Offer]) -> str:
    renamed = kind.word if _names_one(name, offers) else "alias"
    return f"{_claims(kind, name, offers)}; uninstall one or rename its {renamed}"


def _claims(kind: Kind, name: str, offers: Sequence[Offer]) -> str:
    number = "both" if len(offers) == 2 else "all"
    return f"{' and '.join(map(str, offers))} {number} offer a {kind.word} named {name!r}"


STRATEGY = Kind(
    "strategy",
    "cachequant_strategies",
    "..strategies",
    BUILTIN,
    _undefined_methods,
    UnknownStrategy,
    DuplicateStrategy,
    CONTRACT_VERSION,
)
TASK = Kind("task", "cachequant_tasks", "..benchmarks.tasks", TASKS, _no_task, UnknownTask, DuplicateTask)
