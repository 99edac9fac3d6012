"""From a line of text to an object that a plugin offers, and back."""

from difflib import get_close_matches
from typing import Any

from . import descriptions, specs
from .plugins import Plugins


def parse(plugins: Plugins, text: str) -> Any:
    """What a spec such as `uniform:bits=4,group_size=64` describes; an alias stands for its settings.

    Raises the kind's error for the name and ValueError for what cannot be read or does not fit the fields.
    """
    name = specs.named(text)
    offer = plugins.offer(name) if name else None
    name, values = specs.split(text, getattr(offer.offered, "positional", None) if offer else None)
    assert offer is not None  # a text without a name is refused above
    offered = offer.offered
    fields = descriptions.fields(offered)
    for field in values:
        if field not in fields:
            close = get_close_matches(field, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            allowed = ", ".join(fields) or "no fields"
            raise ValueError(
                f"{plugins.kind.word} {name!r} has no field {field!r} (from {text!r}); it takes {allowed}{hint}"
            )
    given = {field: specs.read(value, descriptions.accepts_none(fields[field])) for field, value in values.items()}
    return offered(**{**offer.settings(name), **given})


def spec(offered: Any) -> str:
    """The shortest text that `parse` turns into an equal object: fields at their default are left out."""
    return specs.join(offered.name, descriptions.settings(offered))
