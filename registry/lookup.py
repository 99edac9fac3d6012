"""From a line of text to an object that a plugin offers, and back."""

from difflib import get_close_matches
from typing import Any

from . import descriptions, specs
from .plugins import Plugins


def parse(plugins: Plugins, text: str) -> Any:
    """What a spec such as `uniform:bits=4,group_size=64` describes.

    Raises the kind's error for the name and ValueError for what cannot be read or does not fit the fields.
    """
    name = specs.named(text)
    offered = plugins.offer(name).offered if name else None
    name, values = specs.split(text, getattr(offered, "positional", None))
    assert offered is not None  # a text without a name is refused above
    fields = descriptions.fields(offered)
    for field in values:
        if field not in fields:
            close = get_close_matches(field, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            allowed = ", ".join(fields) or "no fields"
            raise ValueError(
                f"{plugins.kind.word} {name!r} has no field {field!r} (from {text!r}); it takes {allowed}{hint}"
            )
    return offered(**{k: specs.read(value, descriptions.accepts_none(fields[k])) for k, value in values.items()})


def spec(offered: Any) -> str:
    """The shortest text that `parse` turns into an equal object: fields at their default are left out."""
    return specs.join(offered.name, descriptions.settings(offered))
