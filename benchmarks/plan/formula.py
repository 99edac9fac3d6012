"""Bytes that a cache holds, computed from a model's shape and a strategy's formats: nothing is filled.

Each layer's formats are asked for as the cache asks, and `layers.py` says what such a layer allocates. Bytes that only
a strategy knows (`codes="custom"`) are those of one block of random states, encoded.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ...core import AdaptiveStrategy, CacheQuantizer, LayerFormat, LayerSpec, MixedFormat, Side
from ...core.calibration import CalibratedStrategy
from ...core.hf.blocks import EXACT
from ...core.hf.layer import ROWS as NAMES
from ...core.hf.layer import CacheOptions
from ...core.memory import tensors_in
from ...kernels.format import Format, row_bits
from ...kernels.quantize import packed_shapes
from ...kernels.rows import row_bytes
from ...strategies.preset import Preset
from ...strategies.qnorm import QNorm
from .growth import Filling, tail_capacity
from .layers import HOST_KINDS, Blocks, HostLayer, LayerBytes, Rows, RowSizes, Sizes, Tail
from .mixes import Mix
from .shapes import LayerShape, ModelShape, Rope

SIDES: tuple[Side, Side] = ("key", "value")

SIXTEEN_BITS = Format(codes="exact")


class Setting(BaseModel):
    """What else decides how much a cache holds, beside model, strategy and length. Options of None: the strategy's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int = Field(default=1, ge=1, description="Sequences at a time.")
    residual_length: int | None = Field(default=None, ge=0, description="Newest tokens kept exact.")
    sink_tokens: int | None = Field(default=None, ge=0, le=128, description="First tokens kept exact.")
    skip_layers: tuple[int, ...] | None = Field(default=None, description="Layers left exact.")
    tensor_parallel: int = Field(default=1, ge=1, description="Devices that share the heads of every layer.")
    stages: int = Field(default=1, ge=1, description="Groups of such devices, each with a stretch of the layers.")
    padded: bool = Field(default=False, description="Whether rows begin at different tokens.")
    kernels: bool = Field(default=False, description="Whether Triton's kernels serve: pools keep an index for them.")

    @property
    def devices(self) -> int:
        """In all."""
        return self.tensor_parallel * self.stages


@dataclass(frozen=True)
class Stage:
    """What one device holds; with tensor parallelism, each of a group."""

    layers: tuple[tuple[LayerBytes, int], ...]
    """Layers, and how many there are alike."""
    tables: tuple[int, ...]
    """Bytes per token of the rotary tables."""

    def held(self, tokens: int, filling: Filling, prompt: int) -> dict[str, int]:
        """Bytes by kind."""
        rows: dict[str, int] = {}
        for layer, count in self.layers:
            for name, size in layer.held(tokens, filling, prompt).items():
                rows[name] = rows.get(name, 0) + size * count
        rows["rope"] = sum(self.tables) * tail_capacity(tokens)
        return rows


@dataclass(frozen=True)
class CacheFormula:
    """The bytes of one strategy's cache, as a function of its length."""

    batch: int
    tensor_parallel: int
    stages: tuple[Stage, ...]
    by_layer: tuple[LayerBytes, ...]
    numbers: tuple[tuple[int, int | None], ...]
    """Of each layer, on a device: key and value numbers per token and row, and how many tokens it keeps, None: all."""
    measured: tuple[str, ...] = ()
    """What was encoded to learn its bytes."""

    def held(self, tokens: int, filling: Filling = "usual", prompt: int = 1) -> dict[str, int]:
        """Bytes by kind on all devices together, `host copy` in host memory."""
        rows: dict[str, int] = {}
        for stage in self.stages:
            for name, size in stage.held(tokens, filling, prompt).items():
                rows[name] = rows.get(name, 0) + size * self.tensor_parallel
        return rows

    def largest(self, tokens: int, filling: Filling = "worst", prompt: int = 1) -> int:
        """Bytes on the device that holds most, host memory left out."""
        return max(device_bytes(stage.held(tokens, filling, prompt)) for stage in self.stages)

    def elements(self, tokens: int) -> int:
        """Key and value numbers that the tokens stand for, over batch, layers and heads."""
        held = (count * min(tokens, tokens if kept is None else kept) for count, kept in self.numbers)
        return self.batch * self.tensor_parallel * sum(held)

    def bits(self, tokens: int, filling: Filling = "usual", prompt: int = 1) -> float:
        """Device bits per cached number; 0 for an empty cache."""
        elements = self.elements(tokens)
        return 8 * device_bytes(self.held(tokens, filling, prompt)) / elements if elements else 0.0

    def layer_slopes(self) -> tuple[float, ...]:
        """Device bytes of one more token of one row in a long text, by layer, rotary tables left out."""
        slopes = {layer: _slope(lambda n, layer=layer: layer.held(n, "usual", n)) for layer in set(self.by_layer)}
        return tuple(slopes[layer] * self.tensor_parallel / self.batch for layer in self.by_layer)

    def slope(self) -> float:
        """Device bytes of one more token of one row in a long text, rotary tables included."""
        return _slope(lambda tokens: self.held(tokens)) / self.batch

    def limit_bits(self) -> float | None:
        """Bits per number to which a long text tends; None where nothing grows."""
        growing = self.tensor_parallel * sum(count for count, kept in self.numbers if kept is None)
        return 8 * self.slope() / growing if growing else None


_LONG = 2**24
"""A multiple of every block, interval and buffer's step that is long enough for shares to be exact."""


def _slope(held: Any) -> float:
    return (device_bytes(held(2 * _LONG)) - device_bytes(held(_LONG))) / _LONG


def device_bytes(rows: dict[str, int]) -> int:
    """The sum of what lies where the model computes."""
    return sum(size for name, size in rows.items() if name not in HOST_KINDS)


def formula(strategy: CacheQuantizer, shape: ModelShape, setting: Setting, mix: Mix | None = None) -> CacheFormula:
    """The bytes of a strategy's cache for a model.

    mix: what to assume of widths, for strategies that decide them token by token; see `mixes`.

    Raises ValueError where the strategy refuses the model's shape, and for settings that do not fit it.
    """
    given = setting.model_dump(include={"residual_length", "sink_tokens", "skip_layers"}, exclude_none=True)
    options = CacheOptions(**{**strategy.cache_options(), **given})
    skipped = skipped_layers(options.skip_layers, len(shape.layers))
    built = [
        _packed(strategy, layer, shape, setting, options, mix)
        if layer.kind == "full" and layer.index not in skipped
        else _Built(host_layer(layer, shape, setting))
        for layer in shape.layers
    ]
    return _assembled(built, shape, setting)


def stock_formula(shape: ModelShape, setting: Setting) -> CacheFormula:
    """The bytes of transformers' `DynamicCache`."""
    return _assembled([_Built(host_layer(layer, shape, setting)) for layer in shape.layers], shape, setting)


def skipped_layers(indices: Iterable[int], layers: int) -> set[int]:
    """Indices from 0 on; raises ValueError for layers that do not exist."""
    for index in indices:
        if not -layers <= index < layers:
            raise ValueError(f"skip_layers names layer {index}, the model has layers 0 to {layers - 1}")
    return {index % layers for index in indices}


def host_layer(layer: LayerShape, shape: ModelShape, setting: Setting) -> HostLayer:
    """A layer as transformers keeps it."""
    token = setting.batch * _local(layer, setting).numbers * shape.itemsize
    fixed = setting.batch * layer.row_bytes + layer.shared_bytes
    return HostLayer(token, layer.window, fixed, setting.batch * layer.row_token_bytes)


def _assembled(built: "list[_Built]", shape: ModelShape, setting: Setting) -> CacheFormula:
    count = len(built)
    if setting.stages > count:
        raise ValueError(f"{setting.stages} stages of a model of {count} layers; use at most {count}")
    edges = [count * stage // setting.stages for stage in range(setting.stages + 1)]
    return CacheFormula(
        batch=setting.batch,
        tensor_parallel=setting.tensor_parallel,
        stages=tuple(_stage(built[start:stop], setting) for start, stop in pairwise(edges)),
        by_layer=tuple(each.layer for each in built),
        numbers=tuple((_local(layer, setting).numbers, _kept(layer)) for layer in shape.layers),
        measured=tuple(dict.fromkeys(name for each in built for name in each.measured)),
    )


def _stage(built: "list[_Built]", setting: Setting) -> Stage:
    # a table per kind of layer, shared by its layers on a device
    tables = {each.rope.kind: each.rope for each in built if each.rope is not None}
    rows = setting.batch if setting.padded else 1
    return Stage(
        layers=tuple(Counter(each.layer for each in built).items()),
        tables=tuple(2 * rope.numbers * rope.itemsize * rows for rope in tables.values()),
    )


def _kept(layer: LayerShape) -> int | None:
    """Tokens that count as cached, as `PackedCache.memory` counts them."""
    return None if layer.window is None else layer.window - 1


@dataclass(frozen=True)
class _Built:
    layer: LayerBytes
    rope: Rope | None = None
    measured: tuple[str, ...] = ()


def _local(layer: LayerShape, setting: Setting) -> LayerShape:
    """The layer as one device of a tensor-parallel group has it."""
    parts = setting.tensor_parallel
    if parts == 1 or layer.latent or not layer.kv_heads:
        return layer
    if layer.kv_heads % parts or layer.query_heads % parts:
        able = [n for n in range(1, layer.kv_heads + 1) if not layer.kv_heads % n and not layer.query_heads % n]
        raise ValueError(
            f"{layer.kv_heads} kv heads of layer {layer.index} cannot be shared by {parts} devices; use one of {able}"
        )
    heads = {"kv_heads": layer.kv_heads // parts, "query_heads": layer.query_heads // parts}
    return layer.model_copy(update=heads)


def _packed(
    strategy: CacheQuantizer,
    layer: LayerShape,
    shape: ModelShape,
    setting: Setting,
    options: CacheOptions,
    mix: Mix | None,
) -> _Built:
    layer = _local(layer, setting)
    spec = LayerSpec(layer.index, len(shape.layers), layer.kv_heads, layer.head_dim, layer.value_dim)
    formats = strategy.formats(spec)
    if isinstance(strategy, AdaptiveStrategy):
        return _Built(_rows(strategy, formats, spec, layer, shape, setting, options, mix))
    if isinstance(formats, MixedFormat):
        raise ValueError(f"{strategy.name!r} gives tokens widths of their own, but no way to decide them")
    formats = formats or EXACT
    formats.require_fitting(spec.head_dim, spec.value_dim)
    if formats.key.rope == "pre" and layer.rope is None:
        raise ValueError(
            f"layer {layer.index} of {shape.architecture} hands over no keys before RoPE; use a strategy that stores "
            "them after"
        )
    numbers = setting.batch * layer.numbers
    packed: list[tuple[str, int]] = []
    once: list[tuple[str, int]] = []
    measured = []
    for side in SIDES:
        fmt: Format = getattr(formats, side)
        block, tables = _encoded(strategy, spec, formats, side, shape)
        packed += [(name, setting.batch * size) for name, size in block]
        once += tables
        measured += [f"{side}s"] if fmt.codes == "custom" else []
    if options.sink_tokens:
        first = 8 * setting.batch if setting.padded else 0
        once.append(("sinks", options.sink_tokens * numbers * shape.itemsize + first))
    blocks = Blocks(formats.block, options.residual_length, numbers * shape.itemsize, tuple(packed), tuple(once))
    return _Built(blocks, layer.rope if formats.key.rope == "pre" else None, tuple(measured))


def _encoded(
    strategy: CacheQuantizer, spec: LayerSpec, formats: LayerFormat, side: Side, shape: ModelShape
) -> tuple[Sizes, Sizes]:
    """Bytes by kind of a block of one row, and of the tables of a layer."""
    fmt: Format = getattr(formats, side)
    dim = spec.head_dim if side == "key" else spec.value_dim
    if fmt.codes == "custom":
        return _measured(strategy, spec, formats, side, shape)
    shapes = packed_shapes(fmt, side, dim, formats.block, getattr(torch, shape.dtype))
    block = [
        (f"{side} {NAMES.get(name, name)}", spec.kv_heads * prod(dims) * dtype.itemsize)
        for name, (dims, dtype) in shapes.items()
    ]
    return tuple(block), _tables(strategy, spec, fmt, side, dim)


def _tables(strategy: CacheQuantizer, spec: LayerSpec, fmt: Format, side: Side, dim: int) -> Sizes:
    """What a format of the shared encoder reads beside codes, in float32."""
    if isinstance(strategy, Preset):
        strategy = getattr(strategy.sides(spec.index), side)
    tables = [("codebooks", 2**fmt.bits * 4)] if fmt.codes == "codebook" else []
    channels = spec.kv_heads * dim * 4
    if fmt.scale == "static":
        tables.append(("static scales", 2 * channels))
    if isinstance(strategy, CalibratedStrategy) and strategy.calibration != "prompt":
        weighted = strategy.needs_statistics() and strategy.recipe().gradients
        if side == "key" and fmt.outliers and weighted:
            tables.append(("static scales", channels))  # what errors in a channel cost
    if isinstance(strategy, QNorm) or getattr(strategy, "q_norm", False):
        tables.append(("codebooks", 8))  # gain and offset
    return tuple(tables)


def _measured(
    strategy: CacheQuantizer, spec: LayerSpec, formats: LayerFormat, side: Side, shape: ModelShape
) -> tuple[Sizes, Sizes]:
    """The same by encoding a block of random states, on the CPU."""
    dim = spec.head_dim if side == "key" else spec.value_dim
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, spec.kv_heads, formats.block, dim, generator=generator).to(getattr(torch, shape.dtype))
    tables = strategy.tables(spec, side, states, None)
    packed = strategy.encode(states, getattr(formats, side), side, formats.block, None, tables)
    block = tuple((f"{side} {NAMES.get(name, name)}", t.numel() * t.element_size()) for name, t in packed.items())
    fitted = tables.tensors().items()
    return block, tuple((NAMES.get(name, "static scales"), t.untyped_storage().nbytes()) for name, t in fitted)


def _rows(
    strategy: AdaptiveStrategy,
    formats: LayerFormat | MixedFormat | None,
    spec: LayerSpec,
    layer: LayerShape,
    shape: ModelShape,
    setting: Setting,
    options: CacheOptions,
    mix: Mix | None,
) -> LayerBytes:
    token = setting.batch * layer.numbers * shape.itemsize
    if formats is None:
        return Tail(token)
    if not isinstance(formats, MixedFormat):
        raise ValueError(f"{strategy.name!r} decides widths token by token, and gave a {type(formats).__name__}")
    formats.require_fitting(spec.head_dim, spec.value_dim, spec.kv_heads)
    if setting.tensor_parallel > 1 and (formats.heads == "together" or strategy.together):
        raise ValueError(
            f"{strategy.name!r} with these settings decides for all heads of a token together, which "
            "--tp splits; use settings by which every head decides for itself (granularity='head' of qaq), or --devices"
        )
    heads = spec.kv_heads if formats.heads == "together" else 1
    sixteen = (SIXTEEN_BITS,) if options.sink_tokens else ()
    key, value = (
        _row_sizes(own, sixteen, heads * dim)
        for own, dim in ((formats.key, spec.head_dim), (formats.value, spec.value_dim))
    )
    queries = layer.query_heads // layer.kv_heads
    seen = torch.zeros(1, spec.kv_heads, queries, 1, 1)
    noticed = strategy.notice(seen) if strategy.attention_window != 0 else seen
    query = torch.zeros(1, spec.kv_heads, queries, 1, spec.head_dim)
    states: dict[Side, torch.Tensor] = {
        "key": torch.zeros(1, spec.kv_heads, 1, spec.head_dim),
        "value": torch.zeros(1, spec.kv_heads, 1, spec.value_dim),
    }
    remembered = strategy.notice_query(spec, query)
    measured = strategy.measure(spec, remembered, states, torch.ones(1, 1, dtype=torch.bool))
    return Rows(
        batch=setting.batch,
        owners=setting.batch * (1 if formats.heads == "together" else spec.kv_heads),
        heads=spec.kv_heads,
        query_heads=layer.query_heads,
        token=token,
        key=key,
        value=value,
        drops=formats.drops,
        interval=strategy.interval,
        residual=options.residual_length,
        sinks=options.sink_tokens,
        window=strategy.attention_window,
        noticed=noticed.element_size(),
        measured=setting.batch * sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(measured)),
        remembers_queries=remembered is not None,
        host_copy=strategy.host_copy,
        indexed=setting.kernels,
        padded=setting.padded,
        mix=mix or Mix(kind="most"),
    )


def _row_sizes(own: tuple[Format, ...], sinks: tuple[Format, ...], numbers: int) -> RowSizes:
    sizes = {
        row_bits(fmt): tuple((NAMES.get(name, name), size) for name, size in row_bytes(fmt, numbers).items())
        for fmt in (*own, *sinks)
    }
    return RowSizes(tuple(row_bits(fmt) for fmt in own), tuple(sizes.items()))
