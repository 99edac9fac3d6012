"""What a preset says: which strategy packs which side of which layer; as plain data and as a JSON file.

`strategies/preset.py` is the strategy that follows it; `docs/tuning.md` describes the file.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from ..core import Side, Strategy
from ..core.calibration import CalibratedStrategy, Calibration
from . import parse, spec, specs

VERSION = 1
MARK = "cachequant_preset"

# a calibration written so lies where the preset file lies, wherever that is
_BESIDE = "./"


def _read_strategy(given: Any, info: ValidationInfo) -> Strategy:
    """A strategy, or what its spec describes: of all equal specs in one file the same object."""
    known: dict[str, Strategy] = {} if info.context is None else info.context
    if isinstance(given, str):
        if given not in known:
            try:
                found: Any = parse(given)
            except ValidationError as error:
                raise ValueError(f"{given!r}: {told(error)}") from error
            except (LookupError, OSError) as error:
                raise ValueError(str(error)) from error
            known[given] = found
        given = known[given]
    if not isinstance(given, Strategy):
        raise ValueError(f"{given!r} is no strategy; give a spec such as 'uniform:bits=4'")
    return given


Child = Annotated[InstanceOf[Strategy], BeforeValidator(_read_strategy), PlainSerializer(spec)]


class Sides(BaseModel):
    """What packs the keys and what packs the values of a layer; one spec stands for both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Child
    value: Child

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, given: Any, info: ValidationInfo) -> Any:
        if isinstance(given, str | Strategy):
            both = _read_strategy(given, info)
            return {"key": both, "value": both}
        if not isinstance(given, Mapping | Sides):
            raise ValueError(f'{given!r} is neither a spec nor {{"key": spec, "value": spec}}')
        return given

    @model_serializer(mode="wrap")
    def _short_where_equal(self, write: SerializerFunctionWrapHandler) -> Any:
        written = write(self)
        return written["key"] if written["key"] == written["value"] else written


class Layers(dict[int, Sides]):
    """By layer index, in order; hashable, because strategies are. Nothing writes to it once it is made."""

    def __hash__(self) -> int:  # type: ignore[override] (dicts are not)
        return hash(tuple(self.items()))


def _in_order(layers: dict[int, Sides]) -> Layers:
    return Layers(sorted(layers.items()))


class Options(BaseModel):
    """Options of the cache that take the place of what the strategies ask for; None leaves it to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    residual_length: int | None = Field(default=None, ge=0)
    sink_tokens: int | None = Field(default=None, ge=0, le=128)
    skip_layers: tuple[int, ...] | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> Any:
        return {name: option for name, option in write(self).items() if option is not None}


class Rotation(BaseModel):
    """The Hadamard rotation of sides whose strategies have none of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sides: Literal["none", "key", "value", "both"] = "none"
    size: int | None = Field(
        default=None, ge=2, description="Channels rotated together; None: all that head_dim allows."
    )

    def turns(self, side: Side) -> bool:
        """Whether a side is rotated."""
        return self.sides in (side, "both")

    @model_validator(mode="after")
    def _size_is_of_something(self) -> "Rotation":
        if self.size is not None and (self.sides == "none" or self.size & (self.size - 1)):
            raise ValueError(
                f"size={self.size} is how many channels are rotated together: a power of two, with sides 'key', "
                f"'value' or 'both', got {self.sides!r}"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _sides_alone(cls, given: Any) -> Any:
        return {"sides": given} if isinstance(given, str) else given

    @model_serializer(mode="wrap")
    def _short_without_size(self, write: SerializerFunctionWrapHandler) -> Any:
        return self.sides if self.size is None else write(self)


class Contents(BaseModel):
    """Which strategy packs what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: Sides = Field(description="Spec for layers that are not named, or {'key': SPEC, 'value': SPEC}.")
    layers: Annotated[dict[Annotated[int, Field(ge=0)], Sides], AfterValidator(_in_order)] = Field(
        default=Layers(), description="The same by layer index, 0 being the first."
    )
    options: Options = Field(
        default=Options(), description="residual_length, sink_tokens and skip_layers, before what the strategies ask."
    )
    rotation: Rotation = Field(
        default=Rotation(),
        description="What is rotated before it is packed: none, key, value, both, or {'sides': ..., 'size': channels}.",
    )


class Saved(NamedTuple):
    """A preset file that was read."""

    contents: Contents
    evidence: dict[str, Any]
    """How it was found: model, text, bytes, divergence, as far as its writer said."""


def read(path: str | os.PathLike[str]) -> Saved:
    """The preset in a file; `~` is the home directory.

    Raises FileNotFoundError, other OSError, and ValueError naming file and entry for what is damaged or unknown.
    """
    place = Path(path).expanduser()
    try:
        content = json.loads(place.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no preset file {path}; `cachequant tune` writes one") from error
    except ValueError as error:  # bytes that are no text, and text that is no JSON
        raise ValueError(f"{path} is damaged, or no preset: {error}") from error
    if not isinstance(content, dict) or MARK not in content:
        raise ValueError(f'{path} is no preset: it does not begin with {{"{MARK}": {VERSION}')
    version = content.pop(MARK)
    if version != VERSION:
        raise ValueError(f"{path} has preset version {version!r}, this cachequant reads version {VERSION}")
    evidence = content.pop("evidence", {})
    if not isinstance(evidence, dict):
        raise ValueError(f"{path}: evidence is {evidence!r}; it has to be an object, or left out")
    try:
        return Saved(Contents.model_validate(_anchored(content, place.parent), context={}), evidence)
    except ValidationError as error:
        raise ValueError(f"{path}: {told(error)}") from error


def write(path: str | os.PathLike[str], contents: Contents, evidence: Mapping[str, Any]) -> None:
    """Write a preset file, replacing an older one only when the new one is complete.

    Raises ValueError where a strategy's calibration was never saved, and OSError.
    """
    place = Path(path).expanduser()
    text = json.dumps({**as_json(contents, place.parent), "evidence": dict(evidence)}, indent=2, ensure_ascii=False)
    partial = place.with_name(place.name + ".partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def as_json(contents: Contents, folder: Path) -> dict[str, Any]:
    """What a preset file in `folder` holds, without evidence; calibrations under `folder` are named from there."""

    def written(sides: Sides) -> Any:
        key, value = _spec_from(sides.key, folder), _spec_from(sides.value, folder)
        return key if key == value else {"key": key, "value": value}

    return {
        MARK: VERSION,
        "default": written(contents.default),
        "layers": {str(index): written(sides) for index, sides in contents.layers.items()},
        "options": contents.options.model_dump(mode="json"),
        **({} if contents.rotation == Rotation() else {"rotation": contents.rotation.model_dump(mode="json")}),
    }


def told(error: ValidationError) -> str:
    """What pydantic found wrong, in one line: entry and reason."""
    return "; ".join(
        f"{'.'.join(map(str, each['loc']))}: {reason}" if each["loc"] else reason
        for each in error.errors()
        for reason in [each["msg"].removeprefix("Value error, ")]
    )


def _spec_from(strategy: Strategy, folder: Path) -> str:
    """The spec as a file in `folder` writes it."""
    if not (isinstance(strategy, CalibratedStrategy) and isinstance(strategy.calibration, Calibration)):
        return spec(strategy)
    source = strategy.calibration.source
    if source is None:
        raise ValueError(
            f"the calibration of {strategy.name!r} was never saved, so no file can name it; "
            "use what strategy.save_pretrained(folder) returns"
        )
    place, root = Path(source).expanduser().resolve(), folder.resolve()
    if not place.is_dir():
        return spec(strategy)  # a name on the hub
    name, values = specs.split(spec(strategy))
    near = _BESIDE + place.relative_to(root).as_posix() if place.is_relative_to(root) else str(place)
    return specs.rejoin(name, {**values, "calibration": specs.write(near)})


def _anchored(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`content` with calibrations that lie beside the file named by where they are."""

    def place(given: Any) -> Any:
        if isinstance(given, dict):
            return {side: place(each) for side, each in given.items()}
        if not isinstance(given, str):
            return given
        try:
            name, values = specs.split(given)
        except ValueError:
            return given  # told, with its place, when it is parsed
        source = specs.read(values.get("calibration", ""), True)
        if not isinstance(source, str) or not source.startswith(_BESIDE):
            return given
        return specs.rejoin(name, {**values, "calibration": specs.write(str(folder / source))})

    return {name: place(given) if name in ("default", "layers") else given for name, given in content.items()}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name stand twice, and readers take the last."""
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{repeated[0]!r} stands there twice; keep one")
    return dict(pairs)
