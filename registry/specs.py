"""Strategies as one line of text, `uniform:bits=4,group_size=64`: command lines, file names, table rows.

Numbers, `true`, `false`, lists and double-quoted strings are JSON; `none` and `null` are None where the field accepts
it; any other word is a string as it stands. Commas inside quotes and brackets do not separate fields.

One field of a strategy may be given without its name, and comes first then: `preset:my preset.json`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

_FIELD = re.compile(r"\s*(\w+)\s*=\s*")
_SINGLE_QUOTED = re.compile(r"'[^']*'")
_WORD = re.compile(r"[A-Za-z_./~][\w./~+-]*")
_NONE = ("none", "null")
_DECODER = json.JSONDecoder()


def named(text: str) -> str:
    """The strategy's name, whatever follows it."""
    return text.partition(":")[0].strip()


def split(text: str, positional: str | None = None) -> tuple[str, dict[str, str]]:
    """Name and unread values of a spec; raises ValueError naming the part that cannot be read.

    positional: the field whose value may come first without its name. A value that looks like `field=value` itself
        has to be quoted.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not name:
        raise ValueError(f"{text!r} names no strategy; write name or name:field=value,field=value")
    if colon and not rest.strip():
        raise ValueError(f"{text!r} has no field after the colon; write {name!r} or '{name}:field=value'")
    values: dict[str, str] = {}
    while rest.strip():
        head = _FIELD.match(rest)
        if head is not None:
            field, rest = head[1], rest[head.end() :]
        elif positional is not None and not values:
            field, rest = positional, rest.lstrip()
        else:
            raise ValueError(f"cannot read {rest.strip()!r} in {text!r}; write field=value, separated by commas")
        if field in values:
            raise ValueError(f"{text!r} sets {field!r} twice; keep one")
        end = _value_end(text, field, rest)
        values[field] = rest[:end].strip()
        if not values[field]:
            raise ValueError(f'{text!r} gives {field!r} no value; write {field}=value, or {field}="" for an empty text')
        between, comma, rest = rest[end:].partition(",")
        if between.strip():
            raise ValueError(f"cannot read {between.strip()!r} after {field}={values[field]} in {text!r}; add a comma")
        if comma and not rest.strip():
            raise ValueError(f"{text!r} ends in a comma; remove it or add field=value")
    return name, values


def join(name: str, settings: Mapping[str, Any]) -> str:
    """The spec of JSON-able settings."""
    return rejoin(name, {field: write(value) for field, value in settings.items()})


def rejoin(name: str, values: Mapping[str, str]) -> str:
    """Inverse of `split`."""
    fields = ",".join(f"{field}={value}" for field, value in values.items())
    return f"{name}:{fields}" if fields else name


def read(value: str, nullable: bool) -> Any:
    """What an unread value of `split` means. nullable: whether the field it is for accepts None."""
    if value.startswith("'"):
        return value[1:-1]
    if value.lower() in _NONE:
        return None if nullable else value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def write(value: Any) -> str:
    """Inverse of `read`."""
    if value is None:
        return "none"
    if isinstance(value, str) and _WORD.fullmatch(value) and value.lower() not in _NONE and read(value, True) == value:
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _value_end(text: str, field: str, rest: str) -> int:
    """Where the value at the start of `rest` ends."""
    if quoted := _SINGLE_QUOTED.match(rest):
        return quoted.end()
    if not rest.startswith(('"', "[", "{")):
        return len(rest.split(",", 1)[0])
    try:
        return _DECODER.raw_decode(rest)[1]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"cannot read {field}={rest} in {text!r} as JSON: {error}; "
            "close every quote and bracket, and put strings inside brackets in double quotes"
        ) from error
