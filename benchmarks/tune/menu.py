"""What each side of each layer may be packed with, and the bytes that takes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from ... import registry
from ...core import AdaptiveStrategy, Format, LayerFormat, LayerSpec, Side, Strategy
from ...kernels.format import DEFAULT_BLOCK
from ..errors import message
from ..streaming import SMALLEST_BLOCK
from .bench import Bench

SIDES: tuple[Side, Side] = ("key", "value")
EXACT = "none"

DEFAULT = ("uniform", "uniform:rotation=hadamard", "uniform:key_scale=channel,key_rope=pre")
"""Tuned over unless others are asked for: no calibration, and every remedy for outlier channels."""


class Place(NamedTuple):
    """One side of one layer."""

    layer: int
    side: Side


class Rung(NamedTuple):
    """A strategy at one width, which could pack the whole model."""

    family: str
    """The spec it is a width of."""
    spec: str
    strategy: Strategy
    """Ready to be used."""


class Choice(NamedTuple):
    """What a place may be packed with."""

    spec: str
    strategy: Strategy
    bytes_per_token: float
    """Of all heads, block-wise metadata spread over the block."""
    before_rope: bool


@dataclass(frozen=True)
class Menu:
    """What every place may be packed with."""

    rungs: tuple[Rung, ...]
    served: dict[Place, dict[str, Choice]]
    """By place and spec of a rung; rungs that differ on the other side alone are one choice."""
    elements: int
    """Numbers that one token is cached as."""
    rope_bytes: float
    """Per packed token and sequence of the batch, once any place keeps keys before RoPE."""
    block: int

    @property
    def choices(self) -> dict[Place, tuple[Choice, ...]]:
        """The different choices of every place."""
        return {place: tuple(dict.fromkeys(served.values())) for place, served in self.served.items()}

    @property
    def families(self) -> dict[Place, list[list[Choice]]]:
        """The same by strategy, each from its narrowest width on."""
        names = list(dict.fromkeys(rung.family for rung in self.rungs))
        found: dict[Place, list[list[Choice]]] = {}
        for place, served in self.served.items():
            # of rungs that are one choice, the first has it
            first = {choice: rung.family for rung in reversed(self.rungs) for choice in [served[rung.spec]]}
            families = [[choice for choice, family in first.items() if family == name] for name in names]
            found[place] = [sorted(each, key=lambda choice: choice.bytes_per_token) for each in families if each]
        return found

    def cost(self, chosen: Mapping[Place, Choice]) -> float:
        """Bytes per token."""
        before_rope = any(choice.before_rope for choice in chosen.values())
        return sum(choice.bytes_per_token for choice in chosen.values()) + self.rope_bytes * before_rope

    def everywhere(self, key: str, value: str) -> dict[Place, Choice]:
        """One rung for all keys and one for all values."""
        return {place: served[key if place.side == "key" else value] for place, served in self.served.items()}


def ladder(spec: str) -> list[str]:
    """The spec at every width its strategy takes; as it is where it names a width or the strategy has none.

    Raises what `registry.parse` raises.
    """
    strategy: Any = registry.parse(spec)
    fields = {field.name: field for field in registry.describe(strategy.name).fields}
    widths = [width for width in fields["bits"].allowed if width is not None] if "bits" in fields else []
    named = "bits" in spec.partition(":")[2].replace("key_bits", "").replace("value_bits", "")
    if not widths or named:
        return [registry.spec(strategy)]
    given = {name: getattr(strategy, name) for name in fields}
    return [registry.spec(type(strategy)(**{**given, "bits": width})) for width in widths]


def block_of(specs: Sequence[str]) -> int:
    """Tokens that may be read in one pass: those of the smallest block, as far as the strategies say.

    Raises LookupError and ValueError for what is unknown, or packs no blocks.
    """
    blocks: list[int] = []
    for spec in specs:
        blocks += [getattr(_usable(step), "block", SMALLEST_BLOCK) for step in ladder(spec)]
    return min(blocks, default=SMALLEST_BLOCK)


def compose(bench: Bench, specs: Sequence[str], lenient: bool = False) -> tuple[Menu, list[str]]:
    """The menu of a model, and notes on specs left out of it.

    lenient: leave out what the model cannot be cached with; else it is an error.

    Raises ValueError for strategies that cannot be given sides of layers, and LookupError for unknown ones.
    """
    shapes = bench.shapes()
    if not shapes:
        raise ValueError("no layer of the model can be packed: none has full attention")
    notes: list[str] = []
    rungs: list[Rung] = []
    for spec in specs:
        steps = [(step, _usable(step)) for step in ladder(spec)]
        try:
            ready = [Rung(spec, step, bench.ready(strategy)) for step, strategy in steps]
            for rung in ready:
                bench.serves(rung.strategy)
        except ValueError as error:
            if not lenient:
                raise ValueError(f"{spec!r}: {message(error)}") from error
            notes.append(f"without {spec}: {message(error)}")
            continue
        rungs += [rung for rung in ready if rung.spec not in [known.spec for known in rungs]]
    if not rungs:
        raise ValueError(f"no strategy is left to tune over: {'; '.join(notes)}")
    menu = Menu(
        rungs=tuple(rungs),
        served={Place(shape.index, side): _served(rungs, shape, side, bench) for shape in shapes for side in SIDES},
        elements=sum(shape.kv_heads * (shape.head_dim + shape.value_dim) for shape in shapes),
        rope_bytes=bench.rope_bytes(),
        block=_one_block(rungs, shapes),
    )
    return menu, notes


def _usable(spec: str) -> Strategy:
    strategy = registry.parse(spec)
    if not isinstance(strategy, Strategy) or isinstance(strategy, AdaptiveStrategy):
        raise ValueError(
            f"{spec!r} gives tokens widths of their own while decoding; bits per layer and side are chosen among "
            "strategies that pack blocks. --method search takes it"
        )
    return strategy


def _one_block(rungs: Iterable[Rung], shapes: Iterable[LayerSpec]) -> int:
    """The block that all of them pack; exact numbers come in blocks of any size."""
    blocks: dict[str, int] = {}
    for rung, shape in product(rungs, shapes):
        formats = rung.strategy.formats(shape)
        if isinstance(formats, LayerFormat) and not formats.key.codes == formats.value.codes == "exact":
            blocks.setdefault(rung.spec, formats.block)
    one, first = next(iter(blocks.items()), ("", DEFAULT_BLOCK))
    for other, block in blocks.items():
        if block != first:
            raise ValueError(
                f"{one!r} packs blocks of {first} tokens, {other!r} of {block}; keys and values of a layer leave the "
                "exact tail together, so give all strategies the same block"
            )
    return first


def _served(rungs: Iterable[Rung], shape: LayerSpec, side: Side, bench: Bench) -> dict[str, Choice]:
    """The choice that each rung is in one place."""
    served: dict[str, Choice] = {}
    known: list[tuple[Any, Choice]] = []
    dim = shape.head_dim if side == "key" else shape.value_dim
    for _, spec, strategy in rungs:
        formats: Any = strategy.formats(shape)
        fmt = Format(codes="exact") if formats is None else getattr(formats, side)
        if fmt.codes == "custom":
            raise ValueError(
                f"{spec!r} stores bytes of its own, which no formula counts; bits per layer and side are chosen among "
                "shared formats. --method search takes it"
            )
        block = DEFAULT_BLOCK if formats is None else formats.block
        shared = type(strategy).encode is Strategy.encode and type(strategy).tables is Strategy.tables
        what = (fmt, type(strategy) if shared else strategy)
        same = [choice for other, choice in known if other == what]
        if not same:
            size = shape.kv_heads * fmt.bytes_per_token(side, dim, block, bench.panel.model.dtype.itemsize)
            known.append((what, Choice(spec, strategy, size, fmt.rope == "pre")))
        served[spec] = same[0] if same else known[-1][1]
    return served
