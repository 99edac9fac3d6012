"""Which contexts fit beside the weights, strategy by strategy, and what takes the memory."""

from collections.abc import Callable, Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from ... import registry
from ...core import AdaptiveStrategy, CacheQuantizer, LayerSpec, MixedFormat
from ...kernels.format import row_bits
from ..errors import Unusable, message
from .formula import CacheFormula, Setting, device_bytes, formula, stock_formula
from .layers import HOST_KINDS
from .mixes import Mix
from .shapes import ModelShape
from .sizes import size

DEFAULT_STRATEGIES = (
    "uniform:bits=8",
    "uniform:bits=4",
    "uniform:bits=3",
    "uniform:bits=2",
    "kvquant:bits=4",
    "kvquant:bits=3",
    "kvquant:bits=2",
    "qaq",
    "h2o",
)
"""Those that every width and kind is seen in."""

MOST = 2**40
"""Tokens; what holds so many has no limit."""

CATEGORIES = {
    "static scales": "scales",
    "codebooks": "codebooks",
    "tail": "exact tail",
    "sinks": "sinks",
    "rope": "rope tables",
    "widths": "widths and indices",
    "attention history": "attention history",
    "spare": "spare",
    "host layers": "exact layers",
    "key exact": "exact tokens",
    "value exact": "exact tokens",
    "host copy": "host copies",
}
"""What rows of `PackedCache.memory()` are called here; of `key codes` and the like the last word counts."""

BASELINE = "DynamicCache, 16 bits"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(_Data):
    """Memory, in bytes."""

    memory: int
    """Of one device."""
    reserve: int
    """Left free on each: activations, workspaces, fragments."""
    weights: int
    """Of the whole model, which devices share evenly."""


class Figures(_Data):
    """What a cache of some length takes, over all devices."""

    tokens: int
    usual: int
    """Bytes as held after a prompt of this length."""
    worst: int
    """The most that any way to this length holds."""
    host: int
    """Bytes in host memory at most."""
    bits: float
    """Device bits per cached number, usually."""
    worst_bits: float
    ratio: float
    """How many times smaller than in 16 bits, usually."""
    prompt_excess: int
    """Bytes beyond `usual` until the first step after a prompt that was read in one forward."""
    fits: bool
    categories: dict[str, int]
    """The worst case by what it is for, largest first; weights among them, host copies in host memory."""


class Row(_Data):
    """One strategy, under one assumption."""

    strategy: str
    assumption: str | None = None
    """Of widths that it decides token by token."""
    error: str | None = None
    """Why there are no figures."""
    notes: tuple[str, ...] = ()
    longest: int | None = None
    """Tokens per sequence that fit; None where nothing grows, or in an error."""
    at: Figures | None = None
    """At the context asked for, else at the longest."""
    bytes_per_token: float | None = None
    """Device bytes of one more token of one sequence in a long text."""
    layer_bytes_per_token: tuple[float, ...] = ()
    """The same by layer, without what layers share."""
    limit_bits: float | None = None
    """Bits per number to which long texts tend; None where nothing grows."""

    @property
    def mean_layer_bytes(self) -> float | None:
        """Of the layers that grow."""
        growing = [each for each in self.layer_bytes_per_token if each]
        return sum(growing) / len(growing) if growing else None


class Plan(_Data):
    """All rows for one model on some devices."""

    model: str
    architecture: str
    parameters: int
    dtype: str
    layers: int
    positions: int | None
    setting: Setting
    budget: Budget
    context: int | None
    """Tokens asked about; None: the longest that fit."""
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


def make_plan(
    shape: ModelShape,
    strategies: Iterable[CacheQuantizer],
    setting: Setting,
    budget: Budget,
    context: int | None = None,
    averages: Sequence[float] = (4,),
) -> Plan:
    """A row per strategy, after the 16-bit baseline.

    context: tokens per sequence to give figures at; None: the longest that fit.
    averages: bits per row to assume, beside the bounds, of strategies that decide widths token by token.

    Raises Unusable, naming the option, where the weights do not fit or devices cannot share the model.
    """
    _require_room(shape, setting, budget)
    try:
        stock = stock_formula(shape.model_copy(update={"dtype": "bfloat16"}), setting)
        own = stock_formula(shape, setting)
    except ValueError as error:
        raise Unusable(message(error), "--devices" if "stages" in str(error) else "--tp") from error
    skipped = [index for index in setting.skip_layers or () if not -len(shape.layers) <= index < len(shape.layers)]
    if skipped:
        raise Unusable(
            f"layer {skipped[0]} does not exist, {shape.name} has layers 0 to {len(shape.layers) - 1}", "--skip-layers"
        )
    rows = [_row(BASELINE, stock, setting, budget, context)]
    if shape.itemsize != 2:
        rows.append(_row(f"DynamicCache, {shape.dtype}", own, setting, budget, context))
    for strategy in strategies:
        rows += _rows(strategy, shape, setting, budget, context, averages)
    return Plan(
        model=shape.name,
        architecture=shape.architecture,
        parameters=shape.parameters,
        dtype=shape.dtype,
        layers=len(shape.layers),
        positions=shape.positions,
        setting=setting,
        budget=budget,
        context=context,
        notes=(*shape.notes, *_notes(shape, rows)),
        rows=tuple(rows),
    )


def longest_context(fits: Callable[[int], bool]) -> int | None:
    """The largest number of tokens for which `fits` says so, which does not for more once it did not; None: all."""
    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
        if high > MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def mixes_of(strategy: CacheQuantizer, shape: ModelShape, averages: Sequence[float]) -> list[Mix | None]:
    """What to assume of widths: nothing where formats say all; the budget of evictions; bounds and `averages`.

    Raises ValueError for averages that no mixture of the strategy's widths has.
    """
    layer = next((each for each in shape.layers if each.kind == "full"), None)
    if not isinstance(strategy, AdaptiveStrategy) or layer is None:
        return [None]
    spec = LayerSpec(layer.index, len(shape.layers), layer.kv_heads, layer.head_dim, layer.value_dim)
    formats = strategy.formats(spec)
    if not isinstance(formats, MixedFormat):
        return [None]
    widths = {row_bits(fmt) for fmt in (*formats.key, *formats.value)} | ({0} if formats.drops else set())
    keep = getattr(strategy, "keep", None)
    if widths == {0, 16} and isinstance(keep, float):
        return [Mix(kind="kept", keep=keep)]
    for bits in averages:
        if not min(widths) <= bits <= max(widths):
            raise ValueError(
                f"no mixture of widths {sorted(widths)} has {bits:g} bits on average; give {min(widths)} to "
                f"{max(widths)} as --average-bits"
            )
    return [Mix(kind="least"), *(Mix(kind="average", bits=bits) for bits in averages), Mix(kind="most")]


def categories_of(rows: dict[str, int]) -> dict[str, int]:
    """Bytes by what they are for, largest first."""
    found: dict[str, int] = {}
    for name, count in rows.items():
        category = CATEGORIES.get(name) or name.split()[-1]
        found[category] = found.get(category, 0) + count
    return dict(sorted(((name, count) for name, count in found.items() if count), key=lambda each: -each[1]))


def _require_room(shape: ModelShape, setting: Setting, budget: Budget) -> None:
    room = budget.memory - budget.reserve
    needed = -(-budget.weights // setting.devices)
    if needed > room:
        shared = f", {size(needed)} on each of {setting.devices} devices" if setting.devices > 1 else ""
        raise Unusable(
            f"the weights of {shape.name} take {size(budget.weights)}{shared}; {size(budget.memory)} less a reserve of "
            f"{size(budget.reserve)} are {size(needed - room)} too little. Use more --devices, --tp, a smaller "
            "--reserve, or --weights for quantized ones",
            "--memory",
        )


def _rows(
    strategy: CacheQuantizer,
    shape: ModelShape,
    setting: Setting,
    budget: Budget,
    context: int | None,
    averages: Sequence[float],
) -> list[Row]:
    spec = registry.spec(strategy)
    rows = []
    try:
        for mix in mixes_of(strategy, shape, averages):
            found = formula(strategy, shape, setting, mix)
            assumption = None if mix is None else mix.label(*_ladder(strategy, shape))
            notes = (f"bytes of {' and '.join(found.measured)} measured on random states",) if found.measured else ()
            rows.append(_row(spec, found, setting, budget, context, assumption, notes))
    except (ValueError, NotImplementedError) as error:
        return [Row(strategy=spec, error=message(error))]
    return rows


def _ladder(strategy: CacheQuantizer, shape: ModelShape) -> tuple[tuple[int, ...], bool]:
    layer = next(each for each in shape.layers if each.kind == "full")
    formats = strategy.formats(
        LayerSpec(layer.index, len(shape.layers), layer.kv_heads, layer.head_dim, layer.value_dim)
    )
    assert isinstance(formats, MixedFormat)  # else there was no mix
    return tuple(row_bits(fmt) for fmt in formats.key), formats.drops


def _row(
    name: str,
    found: CacheFormula,
    setting: Setting,
    budget: Budget,
    context: int | None,
    assumption: str | None = None,
    notes: tuple[str, ...] = (),
) -> Row:
    room = budget.memory - budget.reserve - -(-budget.weights // setting.devices)

    def fits(tokens: int) -> bool:
        return found.largest(tokens) <= room

    longest = longest_context(fits)
    tokens = context if context is not None else longest
    return Row(
        strategy=name,
        assumption=assumption,
        notes=notes,
        longest=longest,
        at=None if tokens is None else _figures(found, tokens, budget, fits(tokens)),
        bytes_per_token=found.slope(),
        layer_bytes_per_token=found.layer_slopes(),
        limit_bits=found.limit_bits(),
    )


def _figures(found: CacheFormula, tokens: int, budget: Budget, fits: bool) -> Figures:
    worst = found.held(tokens, "worst")
    usual = device_bytes(found.held(tokens))
    elements = found.elements(tokens)
    return Figures(
        tokens=tokens,
        usual=usual,
        worst=device_bytes(worst),
        host=sum(count for name, count in worst.items() if name in HOST_KINDS),
        bits=found.bits(tokens),
        worst_bits=found.bits(tokens, "worst"),
        ratio=2 * elements / usual if usual else 1.0,
        prompt_excess=device_bytes(found.held(tokens, "prompt")) - usual,
        fits=fits,
        categories=categories_of({**worst, "weights": budget.weights}),
    )


def _notes(shape: ModelShape, rows: list[Row]) -> list[str]:
    notes = []
    reached = [row.at.tokens for row in rows if row.at is not None]
    if shape.positions is not None and reached and max(reached) > shape.positions:
        notes.append(
            f"{shape.name} has {shape.positions:,} positions (max_position_embeddings): more need RoPE scaling or "
            "training for them. Only memory is counted here"
        )
    excess = max((row.at.prompt_excess for row in rows if row.at is not None), default=0)
    if excess > 0:
        notes.append(
            f"layers with a sliding window hold a prompt read in one forward whole until the next step: up to "
            f"{size(excess)} more here. Read long prompts in chunks"
        )
    return notes
