"""Strategies by name, whoever wrote them.

`registry.get("uniform")(bits=4)` is a class found by name and then its constructor;
`registry.parse("uniform:bits=4")` is the same in one line of text. `registry.tasks` finds what they are measured on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ..core import CacheQuantizer
from . import lookup, tasks
from .descriptions import Description, FieldDescription
from .plugins import TASK, DuplicateStrategy, DuplicateTask, Plugins, UnknownStrategy, UnknownTask

__all__ = [
    "Description",
    "DuplicateStrategy",
    "DuplicateTask",
    "FieldDescription",
    "UnknownStrategy",
    "UnknownTask",
    "describe",
    "get",
    "names",
    "parse",
    "register",
    "spec",
    "strategies",
    "tasks",
    "unregister",
]

_plugins = Plugins()


def get(name: str) -> Callable[..., CacheQuantizer]:
    """The strategy class of that name; call it with its settings.

    An alias gives the class with settings already in place, which those of the call override.

    Raises UnknownStrategy, listing what is installed, and DuplicateStrategy if two plugins claim the name.
    """
    offer = _plugins.offer(name)
    settings = offer.settings(name)
    return partial(offer.offered, **settings) if settings else offer.offered


def names() -> list[str]:
    """The names of all installed strategies, sorted; aliases are in their descriptions."""
    return list(strategies())


def strategies() -> dict[str, type[Any]]:
    """All installed strategy classes by name; a name that two plugins claim is left out, with a RuntimeWarning."""
    return {offer.offered.name: offer.offered for offer in _plugins.offers()}


def describe(name: str) -> Description:
    """What a strategy does, where it comes from, and the settings it takes: for an alias, with what it stands for."""
    return _plugins.describe(name)


def parse(text: str) -> CacheQuantizer:
    """The strategy that a spec such as `uniform:bits=4,group_size=64` or `preset:FILE` describes.

    Raises UnknownStrategy for the name and ValueError for what cannot be read or does not fit the strategy's fields.
    """
    return lookup.parse(_plugins, text)


def spec(strategy: CacheQuantizer) -> str:
    """The shortest text that `parse` turns into an equal strategy: fields at their default are left out, and aliases
    are written as what they stand for.
    """
    return lookup.spec(strategy)


def register(plugin: object, name: str) -> None:
    """Add a plugin of this process, in a notebook or a test: any object with one of the hooks of `hookspecs`.

    Raises TypeError for what is no strategy or was written for another contract, DuplicateStrategy where a name is
    that of a built-in one, and ValueError where a plugin of that name is there already.
    """
    _plugins.register(plugin, name)
    # else the built-in tasks are not even imported
    if hasattr(plugin, TASK.hook):
        try:
            tasks.plugins.register(plugin, name)
        except Exception:
            _plugins.unregister(name)
            raise


def unregister(name: str) -> None:
    """Remove the plugin of that name and what it offers."""
    _plugins.unregister(name)
    if tasks.plugins.holds(name):
        tasks.plugins.unregister(name)
