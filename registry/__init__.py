"""Strategies by name, whoever wrote them.

`registry.get("uniform")(bits=4)` is a class found by name and then its constructor;
`registry.parse("uniform:bits=4")` is the same in one line of text.
"""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from ..core import CacheQuantizer
from . import descriptions, specs
from .descriptions import Description, FieldDescription
from .plugins import DuplicateStrategy, Plugins, UnknownStrategy

__all__ = [
    "Description",
    "DuplicateStrategy",
    "FieldDescription",
    "UnknownStrategy",
    "describe",
    "get",
    "names",
    "parse",
    "register",
    "spec",
    "strategies",
    "unregister",
]

_plugins = Plugins()


def get(name: str) -> Callable[..., CacheQuantizer]:
    """The strategy class of that name; call it with its settings.

    Raises UnknownStrategy, listing what is installed, and DuplicateStrategy if two plugins claim the name.
    """
    return _plugins.offer(name).strategy


def names() -> list[str]:
    """The names of all installed strategies, sorted."""
    return list(strategies())


def strategies() -> dict[str, type[Any]]:
    """All installed strategy classes by name; raises DuplicateStrategy if two plugins claim one name."""
    return {offer.strategy.name: offer.strategy for offer in _plugins.offers()}


def describe(name: str) -> Description:
    """What a strategy does, where it comes from, and the settings it takes."""
    offer = _plugins.offer(name)
    return descriptions.describe(offer.strategy, offer.plugin)


def parse(text: str) -> CacheQuantizer:
    """The strategy that a spec such as `uniform:bits=4,group_size=64` describes.

    Raises UnknownStrategy for the name and ValueError for what cannot be read or does not fit the strategy's fields.
    """
    name, values = specs.split(text)
    strategy = _plugins.offer(name).strategy
    fields = descriptions.fields(strategy)
    for field in values:
        if field not in fields:
            close = get_close_matches(field, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            allowed = ", ".join(fields) or "no fields"
            raise ValueError(f"strategy {name!r} has no field {field!r} (from {text!r}); it takes {allowed}{hint}")
    return strategy(**{k: specs.read(value, descriptions.accepts_none(fields[k])) for k, value in values.items()})


def spec(strategy: CacheQuantizer) -> str:
    """The shortest text that `parse` turns into an equal strategy: fields at their default are left out."""
    return specs.join(strategy.name, descriptions.settings(strategy))


def register(plugin: object, name: str) -> None:
    """Add a plugin of this process, in a notebook or a test: any object with a `cachequant_strategies` hook."""
    _plugins.register(plugin, name)


def unregister(name: str) -> None:
    """Remove the plugin of that name and its strategies."""
    _plugins.unregister(name)
