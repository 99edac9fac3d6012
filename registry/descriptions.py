"""What a strategy class says about itself: its summary and the settings it takes."""

import inspect
import types
from collections.abc import Collection, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from ..core import names
from . import specs

_CONSTRAINTS = {
    "ge": ">=",
    "gt": ">",
    "le": "<=",
    "lt": "<",
    "multiple_of": "multiple of",
    "min_length": "length >=",
    "max_length": "length <=",
    "pattern": "matches",
}


class FieldDescription(BaseModel):
    """One setting of a strategy."""

    model_config = ConfigDict(frozen=True)

    name: str
    type: str
    required: bool
    default: Any
    allowed: tuple[Any, ...]
    """The values to choose from; empty if the type and the constraints say it all."""
    constraints: tuple[str, ...]
    description: str


class Description(BaseModel):
    """A strategy as users see it."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Its own, or the alias it was asked for by."""
    stands_for: str
    """The spec that the name is short for: itself, or what an alias means."""
    aliases: Mapping[str, str]
    """The other names it is found by, each with the spec it is short for."""
    summary: str
    """The first line of the class's docstring."""
    plugin: str
    module: str
    fields: tuple[FieldDescription, ...]
    """With the defaults of the name asked for."""


def describe(strategy: type[Any], plugin: str, name: str | None = None, disputed: Collection[str] = ()) -> Description:
    """Read off the class what it says about itself.

    name: one of its aliases; None: its own name.
    disputed: names that find nothing, as others claim them, too; aliases among them are left out.
    """
    # a class without docstring would inherit, and show, that of its base
    summary = (strategy.__dict__.get("__doc__") or "").strip().partition("\n")[0]
    given = aliases(strategy)
    short = {alias: specs.join(strategy.name, settings(strategy(**each))) for alias, each in given.items()}
    asked: str = strategy.name if name is None else name
    return Description(
        name=asked,
        stands_for=short.get(asked, asked),
        aliases={alias: spec for alias, spec in short.items() if alias not in disputed},
        summary=summary,
        plugin=plugin,
        module=strategy.__module__,
        fields=tuple(_field(field, info, given.get(asked, {})) for field, info in fields(strategy).items()),
    )


def aliases(strategy: type[Any]) -> Mapping[str, Mapping[str, Any]]:
    """The other names of a class, each with the settings it stands for; those of its bases remain theirs."""
    return names.aliases_of(strategy)


def fields(strategy: type[Any]) -> Mapping[str, FieldInfo]:
    """The settings of a strategy class, which need not be a pydantic model."""
    if issubclass(strategy, BaseModel):
        return strategy.model_fields
    parameters = inspect.signature(strategy).parameters.values()
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {parameter.name: _parameter(parameter) for parameter in parameters if parameter.kind not in unnamed}


def settings(strategy: Any) -> dict[str, Any]:
    """The settings of a strategy that differ from their defaults, as JSON-able values."""
    known = fields(type(strategy))
    changed = [
        name for name, field in known.items() if field.is_required() or getattr(strategy, name) != _default(field)
    ]
    if isinstance(strategy, BaseModel):
        return strategy.model_dump(mode="json", include=set(changed))
    return {name: getattr(strategy, name) for name in changed}


def accepts_none(field: FieldInfo) -> bool:
    """Whether None is a value of the field's type."""
    return field.annotation is Any or type(None) in (field.annotation, *get_args(field.annotation))


def _parameter(parameter: inspect.Parameter) -> FieldInfo:
    annotation: Any = Any if parameter.annotation is parameter.empty else parameter.annotation
    if parameter.default is parameter.empty:
        return FieldInfo(annotation=annotation)
    return FieldInfo(annotation=annotation, default=parameter.default)


def _field(name: str, field: FieldInfo, given: Mapping[str, Any]) -> FieldDescription:
    """given: settings that an alias puts in the place of defaults."""
    required = field.is_required() and name not in given
    return FieldDescription(
        name=name,
        type=_type_text(field.annotation),
        required=required,
        default=given[name] if name in given else None if required else _default(field),
        allowed=_allowed(field.annotation),
        constraints=tuple(_constraints(field)),
        description=field.description or "",
    )


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def _type_text(annotation: Any) -> str:
    if annotation is type(None):
        return "None"
    if get_origin(annotation) is Literal:
        return " | ".join(repr(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(_type_text(part) for part in get_args(annotation))
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _allowed(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, None included if it may be that; nothing if any other type is accepted too."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [(None,) if part is type(None) else _allowed(part) for part in get_args(annotation)]
        return tuple(value for part in parts for value in part) if all(parts) else ()
    return ()


def _constraints(field: FieldInfo) -> list[str]:
    found = [(text, getattr(rule, key, None)) for rule in field.metadata for key, text in _CONSTRAINTS.items()]
    return [f"{text} {bound}" for text, bound in found if bound is not None]
