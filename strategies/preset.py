"""Presets: another strategy for every layer and side, inline or from a file that `cachequant tune` wrote.

`registry/presets.py` is the file, `docs/tuning.md` says how one is found.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor

from ..core import AdaptiveStrategy, Format, LayerFormat, LayerSpec, MixedFormat, Side, Strategy, Tables
from ..core.calibration import CalibratedStrategy
from ..registry import presets, spec
from ..registry.hookspecs import hookimpl
from ..registry.presets import Contents, Layers, Rotation, Sides

SIDES: tuple[Side, Side] = ("key", "value")
EXACT = Format(codes="exact")


class Source(BaseModel):
    """A preset file as it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    contents: Contents


def _read(given: Any) -> Any:
    if isinstance(given, str | os.PathLike):
        return Source(path=os.fspath(given), contents=presets.read(given).contents)
    return given


def _path(source: Source | None) -> str | None:
    return None if source is None else source.path


class Entry(NamedTuple):
    """One child and where the preset names it."""

    place: str
    side: Side
    child: Strategy


class Preset(Contents, Strategy):
    """Other strategies, each for some layers and sides, from a file or inline."""

    name: ClassVar[str] = "preset"
    positional: ClassVar[str | None] = "file"
    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {"default": {"key": "uniform:bits=4", "value": "uniform:bits=2"}, "layers": {0: "uniform:bits=8"}},
    )

    file: Annotated[Source | None, BeforeValidator(_read), PlainSerializer(_path, when_used="json")] = Field(
        default=None, description="A preset file; fields given beside it take the place of its own."
    )

    @model_validator(mode="before")
    @classmethod
    def _begin_with_the_file(cls, given: dict[str, Any]) -> dict[str, Any]:
        source = _read(given.get("file"))
        if source is None:
            if "default" not in given:
                raise ValueError("a preset needs a file, preset:FILE, or a default, preset:default=SPEC")
            return given
        held = Source.model_validate(source).contents
        return {**{name: getattr(held, name) for name in Contents.model_fields}, **given, "file": source}

    @model_validator(mode="after")
    def _children_pack_blocks(self) -> "Preset":
        for place, _, child in self._entries():
            if isinstance(child, Preset):
                raise ValueError(f"{place} is a preset itself; name the strategies that it consists of")
            if isinstance(child, AdaptiveStrategy):
                raise ValueError(
                    f"{place}: {spec(child)!r} gives tokens widths of their own and changes them while decoding, for "
                    "keys and values together; a preset packs whole blocks. Use it for the whole model, by itself"
                )
        for side in SIDES:
            own = self._with_functions_of_their_own(side)
            if len(own) > 1:
                raise ValueError(
                    f"{self._where()}{spec(own[0])!r} and {spec(own[1])!r} both encode {side}s in a way of their own, "
                    f"and encoding does not know its layer; use one of them for the {side}s of all layers that need it"
                )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_what_the_file_says(self, write: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        written = write(self)
        if self.file is None or info.mode != "json":
            return written
        held = self.file.contents
        same = {name for name in Contents.model_fields if getattr(self, name) == getattr(held, name)}
        return {name: value for name, value in written.items() if name not in same}

    # ---- who packs what --------------------------------------------------------------------------------------------

    def sides(self, layer: int) -> Sides:
        """What packs the keys and the values of a layer."""
        return self.layers.get(layer, self.default)

    def children(self) -> list[Strategy]:
        """The strategies it consists of, each once."""
        return _distinct(child for _, _, child in self._entries())

    def with_each(self, change: Callable[[Strategy], Strategy]) -> "Preset":
        """The same preset of changed strategies: calibrated ones, for example."""
        children = self.children()
        changed = [change(child) for child in children]

        def swapped(sides: Sides) -> Sides:
            key, value = (changed[children.index(getattr(sides, side))] for side in SIDES)
            return Sides(key=key, value=value)

        return Preset(
            default=swapped(self.default),
            layers=Layers({index: swapped(sides) for index, sides in self.layers.items()}),
            options=self.options,
            rotation=self.rotation,
            file=self.file,
        )

    # ---- what the cache asks ---------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What it consists of: caches that were saved outlive the names of files."""

        def both(sides: Sides) -> dict[str, Any]:
            return {side: getattr(sides, side).describe() for side in SIDES}

        return {
            "name": self.name,
            "default": both(self.default),
            "layers": {str(index): both(sides) for index, sides in self.layers.items()},
            "options": self.options.model_dump(mode="json"),
            **({} if self.rotation == Rotation() else {"rotation": self.rotation.model_dump(mode="json")}),
        }

    def require_model(self, model: Any) -> None:
        """Raise ValueError for layers that the model has not, and where a child is not ready for it."""
        self._require_layers(model.config.get_text_config(decoder=True).num_hidden_layers)
        for child in self.children():
            child.require_model(model)

    def cache_options(self) -> dict[str, Any]:
        """The preset's own; where it is silent, what keeps most exact of all that the children ask for."""
        asked = [child.cache_options() for child in self.children()]
        options: dict[str, Any] = {}
        for name in ("residual_length", "sink_tokens"):
            given = [each[name] for each in asked if each.get(name) is not None]
            options |= {name: max(given)} if given else {}
        skipped = {index for each in asked for index in each.get("skip_layers") or ()}
        options |= {"skip_layers": tuple(sorted(skipped))} if skipped else {}
        return {**options, **self.options.model_dump()}

    def formats(self, layer: LayerSpec) -> LayerFormat | None:
        """The key format of one child and the value format of another."""
        self._require_layers(layer.layers)
        found: dict[Side, LayerFormat | None] = {side: self._rotated(layer, side) for side in SIDES}
        if all(formats is None for formats in found.values()):
            return None
        formats: dict[Side, Format] = {
            side: EXACT if each is None else getattr(each, side) for side, each in found.items()
        }
        block = self._block(layer, {side: each for side, each in found.items() if each is not None})
        combined = LayerFormat.model_validate({**formats, "block": block})
        try:
            combined.require_fitting(layer.head_dim, layer.value_dim)
        except ValueError as error:
            raise ValueError(f"{self._where()}layer {layer.index}: {error}") from error
        return combined

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        """Those of the child that packs this side of the layer."""
        return getattr(self.sides(layer.index), side).tables(layer, side, first, valid)

    def encode(
        self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
    ) -> dict[str, Tensor]:
        """By the child's own encoder where it has one, else by the shared one."""
        own = self._packing(side, fmt)
        packs = super().encode if own is None else own.encode
        return packs(states, fmt, side, block, valid, tables)

    def decode(self, packed: Mapping[str, Tensor], fmt: Format, side: Side, block: int, tables: Tables) -> Tensor:
        """By the one child of this side that has codes of its own."""
        own = self._packing(side, fmt)
        return (
            super().decode(packed, fmt, side, block, tables)
            if own is None
            else own.decode(packed, fmt, side, block, tables)
        )

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _where(self) -> str:
        return "" if self.file is None else f"{self.file.path}: "

    def _entries(self) -> Iterator[Entry]:
        named = {"default": self.default, **{f"layers.{index}": sides for index, sides in self.layers.items()}}
        for place, sides in named.items():
            for side in SIDES:
                yield Entry(f"{self._where()}{place}.{side}", side, getattr(sides, side))

    def _require_layers(self, layers: int) -> None:
        beyond = [index for index in self.layers if index >= layers]
        if beyond:
            raise ValueError(
                f"{self._where()}layers.{beyond[0]} is beyond the model, which has layers 0 to {layers - 1}; "
                "the preset is of another model"
            )

    def _asked(self, layer: LayerSpec, side: Side) -> LayerFormat | None:
        """What the child of one side answers for the layer."""
        child = getattr(self.sides(layer.index), side)
        try:
            formats = child.formats(layer)
        except ValueError as error:
            raise ValueError(f"{self._where()}layer {layer.index}, {side}s by {spec(child)!r}: {error}") from error
        if isinstance(formats, MixedFormat):
            raise ValueError(
                f"{self._where()}layer {layer.index}: {spec(child)!r} gives tokens widths of their own; a preset packs "
                "whole blocks"
            )
        own = self._with_functions_of_their_own(side)
        packed = formats is not None and getattr(formats, side).packed
        if own and packed and _encoder(child) == own[0] and not self._alone(side):
            raise ValueError(
                f"{self._where()}{spec(child)!r} encodes {side}s in a way of its own but in a shared format, so that "
                f"encoding cannot tell them from those of the others; use it for the {side}s of all layers"
            )
        return formats

    def _block(self, layer: LayerSpec, found: Mapping[Side, LayerFormat]) -> int:
        """Tokens that both sides pack at a time: those of the side whose numbers are of a block, else the most."""
        packed: dict[Side, LayerFormat] = {
            side: each for side, each in found.items() if getattr(each, side).codes != "exact"
        }
        bound = {
            side: each.block for side, each in packed.items() if self._of_a_block(layer, side, getattr(each, side))
        }
        if len(set(bound.values())) > 1:
            sides = self.sides(layer.index)
            raise ValueError(
                f"{self._where()}layer {layer.index}: keys and values leave the exact tail together, but "
                f"{spec(sides.key)!r} packs blocks of {bound['key']} tokens and {spec(sides.value)!r} of "
                f"{bound['value']}; give both the same block"
            )
        return max(bound.values() or [each.block for each in (packed or found).values()])

    def _of_a_block(self, layer: LayerSpec, side: Side, fmt: Format) -> bool:
        """Whether what is packed differs with the tokens of a block; a token with a scale of its own does not."""
        child = getattr(self.sides(layer.index), side)
        # who fits tables to blocks, or packs them, expects its own
        own = isinstance(child, CalibratedStrategy) or type(_encoder(child)).encode is not Strategy.encode
        return own or fmt.scale == "channel" or (side == "value" and fmt.outliers > 0)

    def _rotated(self, layer: LayerSpec, side: Side) -> LayerFormat | None:
        """What the child of one side answers, in the basis that the preset rotates it to."""
        formats = self._asked(layer, side)
        if formats is None or not self.rotation.turns(side):
            return formats
        fmt: Format = getattr(formats, side)
        if fmt.codes == "exact" or fmt.rotation != "none":
            return formats
        child = getattr(self.sides(layer.index), side)
        if fmt.codes == "custom" or fmt.scale != "token" or isinstance(child, CalibratedStrategy):
            raise ValueError(
                f"{self._where()}layer {layer.index}: rotation mixes channels, and {spec(child)!r} packs {side}s with "
                "scales of single channels, tables fitted to them, or bytes of its own; rotate the other side alone, "
                "or take a strategy with a scale per token"
            )
        rotated = Format.model_validate({**dict(fmt), "rotation": "hadamard", "rotation_size": self.rotation.size})
        return formats.model_copy(update={side: rotated})

    @cached_property
    def _encoders(self) -> dict[Side, list[Strategy]]:
        """What encodes each side, each once: asked for with every block, and many layers have many."""
        return {side: _distinct(_encoder(child) for _, of, child in self._entries() if of == side) for side in SIDES}

    def _with_functions_of_their_own(self, side: Side) -> list[Strategy]:
        shared = (Strategy.encode, Strategy.decode)
        return [each for each in self._encoders[side] if (type(each).encode, type(each).decode) != shared]

    def _alone(self, side: Side) -> bool:
        return len(self._encoders[side]) == 1

    def _packing(self, side: Side, fmt: Format) -> Strategy | None:
        """The child whose functions are meant by a format; None: the shared ones."""
        own = self._with_functions_of_their_own(side)
        return own[0] if own and (fmt.codes == "custom" or self._alone(side)) else None


def _encoder(child: Strategy) -> Strategy:
    """Whose `encode` a child's is: Q-Norm changes nothing but how its base is decoded."""
    return getattr(child, "base") if child.name == "qnorm" else child  # noqa: B009 (strategies do not know each other)


def _distinct(strategies: Iterator[Strategy]) -> list[Strategy]:
    found: list[Strategy] = []
    for strategy in strategies:
        if strategy not in found:
            found.append(strategy)
    return found


@hookimpl
def cachequant_strategies() -> list[type[Strategy]]:
    """Offer `preset`."""
    return [Preset]
