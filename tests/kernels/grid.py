"""What the fused attention kernels are tried with, and what they should give. Imports no Triton."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cachequant.kernels import backend, quantize
from cachequant.kernels.float8 import FLOAT8_MAX
from cachequant.kernels.format import Format, LayerFormat, Side
from cachequant.kernels.fused import ExactSegment, PackedSegment, unserved
from cachequant.kernels.quantize import Tables

TOLERANCE = 2e-3
PLAIN = Format()

Mask = Literal["none", "padding", "batch", "queries", "shared", "blind"]
Data = Literal["normal", "constant", "spike", "repeated"]


@dataclass(frozen=True)
class Case:
    """One call of `fused.attend`. Sizes are factors on normal numbers."""

    key: Format | None = PLAIN
    """None: nothing is packed."""
    value: Format = PLAIN
    qnorm: tuple[bool, bool] = (False, False)
    """Whether tables of keys, and of values, have a gain and an offset."""
    block: int = 128
    blocks: int = 2
    spare: int = 0
    """Blocks that the buffers have room for beyond those passed on."""
    held: int | None = None
    """Blocks, of those passed on, that a count on the device says are there."""
    first: int = 0
    batch: int = 1
    kv_heads: int = 1
    heads: int = 4
    """Query heads per kv head."""
    queries: int = 1
    head_dim: int = 64
    value_dim: int | None = None
    exact: tuple[int, ...] = (5,)
    """Tokens of the exact segments; the last is causal."""
    exact_held: int | None = None
    """Tokens of the last one that a count on the device says are there."""
    mask: Mask = "none"
    softcap: float | None = None
    sink: bool = False
    dtype: torch.dtype = torch.float16
    data: Data = "normal"
    key_size: float = 1.0
    value_size: float = 1.0
    query_size: float = 1.5
    own_angles: bool = False
    """Whether every batch row has angles of its own."""
    transposed: bool = False
    """Whether queries lie in memory by position, as models make them."""


class Problem(NamedTuple):
    """Arguments of `fused.attend`."""

    query: Tensor
    packed: PackedSegment | None
    exact: list[ExactSegment]
    scaling: float
    softcap: float | None
    sink: Tensor | None


def problem(case: Case, seed: int = 0) -> Problem:
    """The arguments a case stands for, on the CPU. All that must not be read is NaN, or as wrong as can be."""
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(case.batch, case.heads * case.kv_heads, case.queries, case.head_dim, generator=draw)
    query = (query * case.query_size).to(case.dtype)
    if case.transposed:
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    sink = torch.randn(case.heads * case.kv_heads, generator=draw) * 2 + 5 if case.sink else None
    packed = None if case.key is None else _packed(case, draw)
    exact = [_exact(case, index, draw) for index in range(len(case.exact))]
    return Problem(query, packed, exact, case.head_dim**-0.5, case.softcap, sink)


def expected(given: Problem) -> Tensor:
    """Softmax attention over everything decoded, float64."""
    queries = given.query.shape[2]
    parts = [_shown(segment, queries) for segment in given.exact]
    if given.packed is not None:
        parts.append(_decoded(given.packed, given.query.shape[-1], queries))
    key, value = torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)
    seen = torch.cat([part[2].expand(len(key), queries, -1) for part in parts], 2)[:, None]
    heads = given.query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    scores = given.query.double() @ key.transpose(-1, -2) * given.scaling
    if given.softcap is not None:
        scores = given.softcap * torch.tanh(scores / given.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if given.sink is not None:
        beside = given.sink.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, beside], -1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1).nan_to_num(0.0) @ value


def on_device(given: Problem, device: torch.device) -> Problem:
    """The same problem, without the poison around its tensors."""
    return _moved(given, device)


def relative_error(found: Tensor, want: Tensor) -> float:
    """Of all numbers together, infinite where any is no number."""
    difference = (found.double().cpu() - want).norm() / want.norm().clamp(min=1e-300)
    return float(difference.nan_to_num(nan=torch.inf))


def poison_like(tensor: Tensor) -> float | int | bool:
    """What stands where nothing may be read."""
    if tensor.is_floating_point():
        return float("nan")
    return True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max


def guarded(tensor: Tensor, room: int = 0) -> Tensor:
    """A view of the same numbers in the middle of poison, with `room` more blocks or tokens in dim 2."""
    shape = (*tensor.shape[:2], tensor.shape[2] + room, *tensor.shape[3:]) if room else tensor.shape
    count, margin = torch.Size(shape).numel(), 2048
    poison = poison_like(tensor)
    around = torch.full((count + 2 * margin,), poison, dtype=tensor.dtype)
    view = around[margin : margin + count].view(shape)
    view = view[:, :, : tensor.shape[2]] if room else view
    return view.copy_(tensor)


def _packed(case: Case, draw: torch.Generator) -> PackedSegment:
    assert case.key is not None
    formats = LayerFormat(key=case.key, value=case.value, block=case.block)  # type: ignore[arg-type]
    tokens, dims = case.blocks * case.block, (case.head_dim, case.value_dim or case.head_dim)
    keys = _states(case, tokens, case.head_dim, case.key_size, draw)
    keys[..., 5] = keys[..., 5] * (100 if case.data == "spike" else 4) + 2 * case.key_size
    values = _states(case, tokens, dims[1], case.value_size, draw)
    tables: dict[Side, Tables] = {
        "key": _tables(case.key, keys, case.qnorm[0], draw),
        "value": _tables(case.value, values, case.qnorm[1], draw),
    }
    with backend.reference_only():
        packed = [
            quantize.encode(keys, case.key, "key", case.block, tables=tables["key"]),
            quantize.encode(values, case.value, "value", case.block, tables=tables["value"]),
        ]
    held = case.blocks if case.held is None else case.held
    for side in packed:
        for name, tensor in side.items():
            tensor[:, :, held:] = poison_like(tensor)
            side[name] = guarded(tensor, case.spare)
    angles = None
    if case.key.rope == "pre":
        turn = torch.rand(case.batch if case.own_angles else 1, tokens, case.head_dim // 2, generator=draw) * 6.3
        angles = (guarded(turn.cos()), guarded(turn.sin()))
    return PackedSegment(
        packed[0],
        packed[1],
        formats,
        tables,
        case.first,
        _visible(case, tokens, draw),
        angles,
        None if case.held is None else torch.tensor([case.held], dtype=torch.int32),
    )


def _exact(case: Case, index: int, draw: torch.Generator) -> ExactSegment:
    tokens, last = case.exact[index], index == len(case.exact) - 1
    keys = _states(case, tokens, case.head_dim, case.key_size, draw).to(case.dtype)
    values = _states(case, tokens, case.value_dim or case.head_dim, case.value_size, draw).to(case.dtype)
    held = None
    if last and case.exact_held is not None:
        held = torch.tensor([case.exact_held], dtype=torch.int32)
        keys[:, :, case.exact_held :] = values[:, :, case.exact_held :] = float("nan")
    room = case.spare and 7
    return ExactSegment(guarded(keys, room), guarded(values, room), _visible(case, tokens, draw), last, held)


def _states(case: Case, tokens: int, dim: int, size: float, draw: torch.Generator) -> Tensor:
    shape = (case.batch, case.kv_heads, tokens, dim)
    if case.data == "constant":
        return torch.full(shape, 0.75 * size)
    if case.data == "repeated":
        return (torch.randn(*shape[:2], 1, dim, generator=draw) * size).expand(shape).clone()
    return torch.randn(shape, generator=draw) * size


def _tables(fmt: Format, states: Tensor, qnorm: bool, draw: torch.Generator) -> Tables:
    tables: dict[str, Tensor] = {}
    if fmt.codes == "codebook":
        tables["codebook"] = torch.rand(2**fmt.bits, generator=draw).mul_(1.8).sub_(1.0).sort().values
    if fmt.scale == "static":
        low, high = states.amin((0, 2)), states.amax((0, 2))
        steps = {"codebook": 2, "float8": 2 * FLOAT8_MAX}.get(fmt.codes, 2**fmt.bits - 1)
        tables["scale"] = (high - low) * 0.9 / steps
        tables["zero"] = low * 0.9 if fmt.codes == "affine" else (high + low) / 2
    if qnorm:
        tables |= {"gain": torch.tensor(1.07), "offset": torch.tensor(-0.06)}
    return Tables(**tables)


def _visible(case: Case, tokens: int, draw: torch.Generator) -> Tensor | None:
    if case.mask == "none":
        return None
    if case.mask == "padding":
        hidden = torch.arange(case.batch)[:, None, None] * 37 + 3
        return guarded(torch.arange(tokens) >= hidden) if tokens > 3 else None
    shape = (
        1 if case.mask == "shared" else case.batch,
        1 if case.mask == "batch" else case.queries,
        tokens,
    )
    seen = torch.rand(shape, generator=draw) < 0.6
    if case.mask == "blind":
        seen[0, 0] = False
    return guarded(seen)


def _shown(segment: ExactSegment, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = segment.key.shape[2] if segment.held is None else int(segment.held)
    place = torch.arange(tokens)
    seen = torch.ones(1, queries, tokens, dtype=torch.bool)
    if segment.causal:
        seen = seen & (place <= torch.arange(tokens - queries, tokens)[:, None])
    if segment.visible is not None:
        seen = seen & segment.visible[..., :tokens]
    return segment.key[:, :, :tokens].double(), segment.value[:, :, :tokens].double(), seen


def _decoded(packed: PackedSegment, head_dim: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    formats, block = packed.formats, packed.formats.block
    blocks = packed.key["codes"].shape[2] if packed.held is None else int(packed.held)
    keys = {name: tensor[:, :, :blocks] for name, tensor in packed.key.items()}
    values = {name: tensor[:, :, :blocks] for name, tensor in packed.value.items()}
    with backend.reference_only():
        key = quantize.decode(keys, formats.key, "key", head_dim, block, packed.tables["key"], torch.float64)
        value_dim = packed.value["codes"].shape[3]
        value = quantize.decode(values, formats.value, "value", value_dim, block, packed.tables["value"], torch.float64)
    if packed.angles is not None:
        cos, sin = (angle[:, None, : blocks * block].double().repeat(1, 1, 1, 2) for angle in packed.angles)
        first, second = key.chunk(2, -1)
        key = key * cos + torch.cat([-second, first], -1) * sin
    seen = (torch.arange(blocks * block) >= packed.first).expand(1, queries, -1)
    if packed.visible is not None:
        seen = seen & packed.visible[..., : blocks * block]
    return key, value, seen


def _moved(what: Any, device: torch.device) -> Any:
    if isinstance(what, Tensor | Tables):
        return what.to(device)
    if isinstance(what, dict):
        return {name: _moved(value, device) for name, value in what.items()}
    if isinstance(what, tuple) and hasattr(what, "_fields"):
        return type(what)(*(_moved(value, device) for value in what))
    if isinstance(what, list | tuple):
        return type(what)(_moved(value, device) for value in what)
    return what


# ---- cases ---------------------------------------------------------------------------------------------------------

GRIDS = ("token", "2 groups", "groups", "channel", "static")
LEVELS = ("affine", "symmetric", "symmetric qnorm", "codebook", "codebook qnorm")
OPTIONS: Mapping[str, Sequence[Any]] = {
    "key_bits": (2, 3, 4, 8),
    "key_grid": GRIDS,
    "key_levels": LEVELS,
    "key_extra": ("none", "outliers", "trim", "hadamard", "pre", "pre, outliers"),
    "value_bits": (2, 3, 4, 8),
    "value_grid": GRIDS,
    "value_levels": LEVELS,
    "value_extra": ("none", "outliers", "trim", "hadamard"),
    "block": (32, 64, 128, 256),
    "dims": ((64, 64), (80, 80), (96, 96), (128, 64), (64, 128)),
    "heads": (1, 4, 7, 16),
    "owners": ((1, 1), (2, 1), (1, 2)),
    "queries": (1, 2),
    "exact": ((7,), (), (4, 70)),
    "mask": ("none", "padding", "batch", "queries", "shared"),
    "dtype": (torch.float16, torch.float32),
    "first": (0, 5, 130),
    "spare": (0, 2),
    "softcap": (None, 4.0),
    "sink": (False, True),
}


def case_of(choice: Mapping[str, Any]) -> Case | None:
    """The case of one choice per option; None where they do not go together."""
    head_dim, value_dim = choice["dims"]
    batch, kv_heads = choice["owners"]
    blocks = {32: 5, 64: 3, 128: 2, 256: 1}[choice["block"]]
    try:
        key = _format(choice, "key", head_dim)
        value = _format(choice, "value", value_dim)
        formats = LayerFormat(key=key, value=value, block=choice["block"])
        formats.require_fitting(head_dim, value_dim)
    except ValueError:
        return None
    causal_fits = not choice["exact"] or choice["exact"][-1] >= choice["queries"]
    if unserved(formats, head_dim, value_dim) is not None or not causal_fits:
        return None
    return Case(
        key, value, ("qnorm" in choice["key_levels"], "qnorm" in choice["value_levels"]),
        choice["block"], blocks, choice["spare"], None, choice["first"], batch, kv_heads, choice["heads"],
        choice["queries"], head_dim, value_dim, choice["exact"], None, choice["mask"], choice["softcap"],
        choice["sink"], choice["dtype"], own_angles=batch > 1,
    )  # fmt: skip


def _format(choice: Mapping[str, Any], side: Side, dim: int) -> Format:
    bits, grid, levels, extra = (choice[f"{side}_{name}"] for name in ("bits", "grid", "levels", "extra"))
    counts = [n for n in range(1, 9) if dim % n == 0 and (side == "key" or (dim // n) % 16 == 0)]
    groups = {"2 groups": 2, "groups": counts[-1]}.get(grid)
    outliers = {"outliers": 3, "trim": 2, "pre, outliers": 1}.get(extra, 0)
    return Format(
        codes="codebook" if "codebook" in levels else "affine",
        bits=bits,
        scale=grid if grid in ("channel", "static") else "token",
        group=dim // groups if groups else None,
        symmetric="symmetric" in levels,
        outliers=outliers,
        trim=int(extra == "trim"),
        rotation="hadamard" if extra == "hadamard" else "none",
        rope="pre" if "pre" in extra else "post",
    )


def covering(options: Mapping[str, Sequence[Any]], seed: int = 2) -> list[dict[str, Any]]:
    """Few choices, one of each option, among which any two that `case_of` lets go together do."""
    draw = random.Random(seed)
    missing = {
        frozenset(((a, x), (b, y))): 0 for a, b in combinations(options, 2) for x, y in product(options[a], options[b])
    }
    found = []
    while missing:
        # pairs that were tried in vain come last, and are given up when only they are left
        least = min(missing.values())
        if least == PATIENCE:
            break
        pair = draw.choice([pair for pair, tried in missing.items() if tried == least])
        missing[pair] += 1
        candidates = [_completed(dict(pair), options, missing, draw) for _ in range(30)]
        fitting = [choice for choice in candidates if case_of(choice) is not None]
        if not fitting:
            continue
        best = max(
            fitting, key=lambda choice: sum(frozenset(two) in missing for two in combinations(choice.items(), 2))
        )
        found.append(best)
        for two in combinations(best.items(), 2):
            missing.pop(frozenset(two), None)
    return found


PATIENCE = 6


def _completed(
    choice: dict[str, Any],
    options: Mapping[str, Sequence[Any]],
    missing: Mapping[frozenset[Any], int],
    draw: random.Random,
) -> dict[str, Any]:
    """`choice` with one of every option, of those that make most of the missing pairs."""
    tried = missing.get(frozenset(choice.items()), 0)
    for name in draw.sample(list(options), len(options)):
        if name not in choice:
            # the more often a pair was tried in vain, the less is asked for beside it
            worth = {
                x: sum(frozenset(((name, x), other)) in missing for other in choice.items())
                + draw.random() * (1 + 2 * tried)
                for x in options[name]
            }
            choice[name] = max(worth, key=worth.__getitem__)
    return choice


PAIRS = {f"pair-{index}": case for index, case in enumerate(map(case_of, covering(OPTIONS))) if case is not None}
"""Any two options that go together are in one of them."""

FLOAT8 = Format(bits=8, codes="float8", symmetric=True)
_GROUPED, _BY_CHANNEL, _STATIC, _PRE_FLOAT8 = (
    FLOAT8.model_copy(update=change)
    for change in ({"group": 16}, {"scale": "channel"}, {"scale": "static"}, {"rope": "pre"})
)
ROTATED = Format(rotation="hadamard", rotation_size=16)
_TRIMMED = Format(bits=2, outliers=3, trim=1)
_PRE = Format(bits=3, scale="channel", rope="pre", outliers=1)

SPECIAL = {
    "nothing exact": Case(exact=()),
    "nothing packed": Case(None, exact=(70,), heads=7, kv_heads=2, batch=2),
    "exact segments of one token and of many": Case(None, exact=(1, 600), heads=5, queries=3, mask="batch"),
    "an exact segment without tokens": Case(exact=(0, 3)),
    "sinks and a tail": Case(first=4, exact=(4, 65), spare=1, dtype=torch.float32),
    "many queries": Case(_TRIMMED, _TRIMMED, exact=(4, 45), queries=40, heads=2, blocks=1, transposed=True),
    "many query heads": Case(Format(bits=2), head_dim=80, heads=20, queries=3),
    "few query heads, many queries": Case(exact=(9,), queries=9, heads=5, blocks=1),
    "a full unit of query heads": Case(Format(bits=3), heads=8),
    "groups and planes that cut across each other": Case(
        Format(bits=2, group=32), Format(bits=3, group=16), head_dim=96
    ),
    "groups finer than planes before RoPE": Case(Format(bits=8, group=16, rope="pre"), head_dim=128, value_dim=16),
    "entries and symmetric scales": Case(
        Format(bits=3, codes="codebook", symmetric=True, scale="channel"),
        Format(bits=2, codes="codebook", symmetric=True),
    ),
    "a chunk of masked queries of several rows": Case(
        batch=2, kv_heads=2, exact=(20,), queries=17, heads=2, blocks=1, mask="padding", transposed=True
    ),
    "wide heads": Case(Format(bits=2), Format(bits=3), head_dim=256, heads=5),
    "wide heads before RoPE": Case(_PRE, head_dim=256, value_dim=64, blocks=1, heads=16, queries=2),
    "values wider than keys": Case(Format(bits=8), Format(bits=4), head_dim=48, value_dim=256, heads=16),
    "8-bit floats": Case(FLOAT8, FLOAT8, head_dim=128, heads=8, spare=1, exact=(4, 9)),
    "8-bit floats of all sizes": Case(_GROUPED, FLOAT8, key_size=300, value_size=1e-5, dtype=torch.float32),
    "8-bit floats in groups, and keys before RoPE": Case(
        _PRE_FLOAT8, _GROUPED, (True, True), block=64, blocks=3, queries=2
    ),
    "8-bit floats by channel": Case(_BY_CHANNEL, _BY_CHANNEL, heads=7, head_dim=80),
    "8-bit floats by channel, levels moved": Case(_BY_CHANNEL, _STATIC, (True, True), mask="padding", batch=2),
    "8-bit floats on a static grid": Case(_STATIC, FLOAT8, (True, True), value_dim=128, queries=3),
    "8-bit floats on a static grid before RoPE": Case(
        _STATIC.model_copy(update={"rope": "pre"}), _BY_CHANNEL, (False, True), blocks=1
    ),
    "8-bit floats beside integers": Case(FLOAT8, Format(bits=4), head_dim=16),
    "integers beside 8-bit floats": Case(Format(bits=3), FLOAT8, value_dim=16, block=32),
    "keys by channel in short blocks, values in groups": Case(
        Format(bits=2, scale="channel"), Format(bits=2, group=32), block=32, blocks=9, head_dim=128, held=6, first=33
    ),
    "keys by their norm": Case(
        Format(bits=3, codes="codebook", symmetric=True, unit="norm", rotation="hadamard"), head_dim=80
    ),
    "keys rotated in blocks": Case(ROTATED, head_dim=128),
    "values rotated in blocks": Case(value=ROTATED, head_dim=96, value_dim=80, exact=(4, 9), spare=1),
    "narrow keys": Case(Format(bits=3), Format(bits=8), head_dim=24, value_dim=16),
    "keys of no whole words": Case(Format(bits=2, group=25), head_dim=100, value_dim=112),
    "midpoint and mean grids": Case(Format(bits=3, grid="midpoint"), Format(grid="mean")),
    "more slots than widths": Case(Format(bits=2, outliers=9), Format(bits=2, outliers=7), blocks=1, heads=2),
    "fewer blocks than the buffer has": Case(
        Format(bits=3, rope="pre", outliers=1),
        _TRIMMED,
        blocks=5,
        block=32,
        held=3,
        spare=2,
        exact=(4, 50),
        exact_held=33,
        queries=3,
    ),
    "one block of many": Case(blocks=6, held=1, spare=2, batch=2, kv_heads=2, exact=()),
    "no blocks yet": Case(_TRIMMED, _TRIMMED, blocks=3, held=0, exact=(4, 50), exact_held=33, queries=5),
    "no tokens yet": Case(exact=(4, 50), exact_held=0),
    "neither blocks nor tokens": Case(blocks=2, held=0, exact=(50,), exact_held=0, batch=2),
    "all blocks hidden": Case(blocks=2, first=256, exact=(3,)),
    "all but one token hidden": Case(_TRIMMED, blocks=3, block=64, first=191, exact=()),
    "angles by row": Case(_PRE, batch=3, own_angles=True, mask="padding", exact=(6,), queries=2),
    "values of 1e-6": Case(value_size=1e-6, dtype=torch.float32),
    "values of 1e4": Case(Format(bits=2), Format(bits=2), value_size=9e3),
    "keys of 1e-6": Case(Format(scale="channel"), key_size=1e-6, dtype=torch.float32),
    "keys of 1e3": Case(Format(bits=8), key_size=1e3, dtype=torch.float32),
    "keys of 1e3 before RoPE": Case(_PRE, key_size=1e3, dtype=torch.float32),
    "queries of 300": Case(Format(bits=2), query_size=300),
    "queries of 1e-6": Case(_PRE, _TRIMMED, query_size=1e-6, dtype=torch.float32),
    "queries of zeros": Case(_TRIMMED, Format(scale="channel", outliers=2), query_size=0),
    "a channel far beyond the others": Case(data="spike", dtype=torch.float32),
    "a channel far beyond the others, scaled apart": Case(Format(bits=3, scale="channel"), data="spike"),
    "a channel far beyond the others, spread": Case(Format(rotation="hadamard"), data="spike"),
    "numbers all alike": Case(Format(bits=2), Format(bits=3, group=16), data="constant"),
    "numbers all alike in channels": Case(Format(scale="channel"), Format(bits=8, scale="channel"), data="constant"),
    "tokens all alike": Case(_PRE, Format(scale="channel", outliers=1), data="repeated"),
    "a strong softcap": Case(query_size=100, softcap=0.5),
    "a softcap that is hardly felt": Case(softcap=1e4, dtype=torch.float32, exact=(4, 9), queries=3),
    "learned sinks and queries that see nothing": Case(mask="blind", sink=True, queries=3, heads=5, exact=(9,)),
    "queries that see nothing": Case(_TRIMMED, _TRIMMED, mask="blind", batch=2, queries=3, exact=(4, 9), block=64),
}

CASES = PAIRS | SPECIAL
