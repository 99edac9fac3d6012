"""Attention over packed blocks on CPUs: what `attention` computes, without decoding to dense rows.

Bytes are spread plane by plane, as many at a time as caches hold, and multiplied plane by plane in the order in which
codes lie in memory, so that no code is moved to its natural place: it is the few queries and weights that are
rearranged. Scales and zeros stay outside the products, grouped ones too; outlier slots are sparse products beside the
dense ones. All of that is float32, and as exact as the reference.

Values of bfloat16 models with a scale per token take `torch.ops.aten._weight_int8pack_mm` where it works: it multiplies
bfloat16 weights with int8 codes and sums in float32. That rounds weights to bfloat16, as SDPA does, and the sums of
some ten thousand tokens. Scores never take it: they are exponentiated, and of a rounded score of 16 the weight is off
by 3 %.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from . import backend
from .attention import Partial, softmax_weights
from .format import Format, Side
from .quantize import NO_TABLES, Tables, decode_grid

# numbers of a tile: its float32 levels should stay in the cores' caches
TILE = 1 << 20

# the same for int8 rows
INT8_TILE = 1 << 21

# rows of queries up to which int8 products, which read the codes once per four rows, beat float32 ones
INT8_ROWS = 8

# rows up to which a product per group of channels is cheaper than decoding
GROUPED_ROWS = 64

# lookups of outlier slots are per row of queries, decoding them is not
SPARSE_ROWS = 16


def serves(rows: Tensor, fmt: Format, side: Side, tables: Tables = NO_TABLES) -> bool:
    """Whether there is something to gain here for `rows [batch, kv_heads, rows, head_dim]` of queries.

    Not for exact blocks and custom formats; float64 and gradients; many rows where channels have groups or outliers.
    """
    if not (backend.cpu_serves(rows.device) and rows.dtype == torch.float32):
        return False
    known = fmt.codes in ("affine", "float8") or (fmt.codes == "codebook" and tables.codebook is not None)
    if not known or (rows.requires_grad and torch.is_grad_enabled()):
        return False
    count, head_dim = rows.shape[2:]
    if side == "key" and fmt.scale == "token" and fmt.groups(head_dim) > 1:
        return count * fmt.groups(head_dim) <= GROUPED_ROWS
    return not fmt.outliers or count <= SPARSE_ROWS


def packed_scores(
    query: Tensor, packed: dict[str, Tensor], fmt: Format, block: int, tables: Tables = NO_TABLES
) -> Tensor:
    """`attention.packed_scores` of what `serves` says yes to."""
    rows = query.shape[2]
    words, scale, zero = _grid(packed, fmt, tables)
    query = query.flatten(0, 1)
    heads, blocks = words.shape[:2]
    groups = scale.shape[-1] if fmt.scale == "token" else 1
    if fmt.scale == "token":
        sums = query.unflatten(-1, (groups, -1)).sum(-1)
        constant, factors = sums, _apart(query, groups)[:, None]
    else:
        # [heads, blocks or 1, rows, head_dim]
        constant, factors = query, query[:, None] * scale[:, :, None]
    factors = _arranged(factors, fmt)
    scores = query.new_empty(heads, rows, blocks * block)
    for span, tile in _tiles(words, fmt, tables):
        if fmt.scale != "channel":
            tile = tile.flatten(2, 3).unsqueeze(2)
        # [heads, groups * rows, tokens]
        dots = _products(factors[:, span.heads, span.blocks if fmt.scale == "channel" else slice(None)], tile)
        dots = dots.transpose(1, 2).flatten(-2)
        tokens = span.tokens(block)
        place = scores[span.heads, :, tokens]
        if fmt.scale != "token":
            place.copy_(dots)
        elif groups == 1:
            torch.mul(dots, scale[span.heads, tokens].transpose(-1, -2), out=place)
        else:
            grouped = dots.unflatten(1, (groups, rows))
            torch.sum(grouped.mul_(scale[span.heads, tokens].transpose(-1, -2).unsqueeze(2)), 1, out=place)
    if fmt.scale == "token" and groups == 1:
        scores.addcmul_(constant, zero.transpose(-1, -2))
    elif fmt.scale == "token":
        scores.baddbmm_(constant, zero.transpose(-1, -2))
    else:
        scores.unflatten(-1, (zero.shape[1], -1)).add_((constant @ zero.transpose(-1, -2)).unsqueeze(-1))
    if fmt.outliers:
        index, value = packed["outlier_index"].flatten(0, 1), packed["outlier_value"].flatten(0, 1)
        scores += _sparse_products(query, index.flatten(1, 2), value.flatten(1, 2))
    return scores.unflatten(0, packed["codes"].shape[:2])


def packed_partial(
    scores: Tensor,
    packed: dict[str, Tensor],
    fmt: Format,
    value_dim: int,
    block: int,
    tables: Tables = NO_TABLES,
    rounded: bool = False,
) -> Partial:
    """`attention.packed_partial` of what `serves` says yes to.

    rounded: whether weights and sums over many tokens may be rounded to bfloat16.
    """
    assert value_dim == packed["codes"].shape[3]
    weights, maximum, total = softmax_weights(scores)
    words, scale, zero = _grid(packed, fmt, tables)
    flat = weights.flatten(0, 1)
    # [heads, groups, rows, tokens]
    factors = flat.unsqueeze(1)
    if fmt.scale == "token":
        factors = factors * scale.transpose(-1, -2).unsqueeze(2)
    if rounded and _takes_int8(fmt, scores.shape[2]):
        mix = _int8_mix(factors, words, fmt)
        zero = zero + scale * _middle(fmt.bits)
    else:
        mix = _float_mix(factors, words, fmt, tables, scale if fmt.scale == "channel" else None)
    if fmt.scale == "token":
        # this way round it is a product of few rows, the other way one of few columns, which is ten times slower
        mix += (zero.transpose(1, 2) @ flat.transpose(1, 2)).unsqueeze(-1)
    mix = mix.transpose(1, 2).flatten(2)
    if fmt.scale == "static":
        mix = mix * scale + total.flatten(0, 1) * zero
    elif fmt.scale == "channel":
        mix += flat.unflatten(-1, (-1, block)).sum(-1) @ zero
    if fmt.outliers:
        mix += _sparse_mix(flat, packed["outlier_index"].flatten(0, 1), packed["outlier_value"].flatten(0, 1))
    return Partial(mix.unflatten(0, scores.shape[:2]), maximum, total)


@cache
def int8_products_work() -> bool:
    """Whether torch's int8 product is there, right, and written for this machine; tried once."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return False  # a loop over single numbers, ten times slower than going through float32
    generator = torch.Generator("cpu").manual_seed(0)
    weights = torch.randn(4, 4096, generator=generator, dtype=torch.float32, device="cpu").bfloat16()
    codes = torch.randint(-128, 128, (128, 4096), generator=generator, dtype=torch.int8, device="cpu")
    try:
        found = _int8_products(weights, codes, weights.new_ones(128)).float()
    except (AttributeError, RuntimeError):
        return False
    expected = weights.float() @ codes.float().T
    return torch.allclose(found, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().mean()))


def _int8_products(weights: Tensor, codes: Tensor, unit: Tensor) -> Tensor:
    """`weights [rows, n] @ codes [channels, n].T * unit [channels]`, bfloat16; n a multiple of 32, all contiguous."""
    return torch.ops.aten._weight_int8pack_mm(weights, codes, unit)


class _Span(NamedTuple):
    """What part of all heads and blocks a tile is."""

    heads: slice
    blocks: slice

    def tokens(self, block: int) -> slice:
        return slice(self.blocks.start * block, self.blocks.stop * block)


def _grid(packed: dict[str, Tensor], fmt: Format, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Words `[heads, blocks, rows, words]` of all batch rows, and float32 scale and zero.

    `[heads, tokens, groups]` per token, `[heads, blocks, channels]` per channel, `[heads, 1, channels]` static.
    """
    codes = packed["codes"]
    numbers = []
    for number in decode_grid(packed, fmt, tables):
        if fmt.scale == "token":
            number = number.squeeze(-1).flatten(2, 3)
        elif fmt.scale == "channel":
            number = number[..., 0, 0, :]
        else:
            number = number[..., 0, 0, :].expand(codes.shape[0], -1, -1, -1)
        numbers.append(number.flatten(0, 1).contiguous())
    return codes.flatten(0, 1), *numbers


def _tiles(words: Tensor, fmt: Format, tables: Tables) -> Iterator[tuple[_Span, Tensor]]:
    """Levels of all codes, a part at a time: float32 `[planes, heads, blocks, rows, run]`, gone with the next part."""
    scratch = _Scratch()
    heads, blocks = words.shape[:2]
    numbers = words[0, 0].numel() * 32 // fmt.bits
    some_blocks = min(max(1, TILE // (heads * numbers)), blocks)
    some_heads = min(max(1, TILE // (some_blocks * numbers)), heads)
    for head in range(0, heads, some_heads):
        for start in range(0, blocks, some_blocks):
            span = _Span(slice(head, min(head + some_heads, heads)), slice(start, min(start + some_blocks, blocks)))
            yield span, _levels(words[span], fmt, tables, scratch)


class _Scratch:
    """Memory that tile after tile is worked on in: fresh pages cost more than the work."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised, or as it was left when last taken."""
        key = (name, shape, dtype)
        if key not in self._held:
            self._held[key] = torch.empty(shape, dtype=dtype, device="cpu")
        return self._held[key]


def _levels(words: Tensor, fmt: Format, tables: Tables, scratch: _Scratch) -> Tensor:
    """float32 `[planes, ..., rows, run]`: what `_arranged` numbers are to be multiplied with."""
    if fmt.codes == "affine":
        codes = _codes(words, fmt.bits, scratch)
        return scratch.take("levels", codes.shape, torch.float32).copy_(codes)
    if fmt.codes == "float8":
        return _float8_levels(_as_bytes(words).unsqueeze(0), scratch)
    assert tables.codebook is not None
    table = tables.codebook.float()
    if fmt.bits == 3:
        found = _codes(words, 3, scratch)
        shape = found.shape
    else:
        # one look-up per byte, of all the levels in it
        table = _byte_table(table, fmt.bits)
        found = _as_bytes(words)
        shape = (1, *found.shape[:-1], found.shape[-1] * 8 // fmt.bits)
    index = scratch.take("index", found.shape, torch.int32).copy_(found).flatten()
    levels = scratch.take("levels", index.shape, table.dtype)
    return torch.index_select(table, 0, index, out=levels).view(torch.float32).view(shape)


def _float8_levels(codes: Tensor, scratch: _Scratch) -> Tensor:
    """float32 levels of the bytes `codes`: a third of what a look-up takes, a fifteenth of torch's conversion.

    A byte widened with its sign and moved up is the float16 that is its level, once the sign's copy is cleared. What no
    encoder makes of a number, NaN, is read as 1.875.
    """
    halves = scratch.take("codes", codes.shape, torch.int16).copy_(codes.view(torch.int8))
    halves.bitwise_left_shift_(7).bitwise_and_(~0x407F)
    return scratch.take("levels", codes.shape, torch.float32).copy_(halves.view(torch.float16))


def _byte_table(codebook: Tensor, bits: int) -> Tensor:
    """The levels that each byte stands for, lowest bits first, as one number of so many bytes: `[256]`."""
    count = 8 // bits
    digits = [torch.arange(256, device=codebook.device) >> bits * place & (1 << bits) - 1 for place in range(count)]
    wide = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}[count]
    return codebook[torch.stack(digits, -1)].view(wide).flatten()


def _codes(words: Tensor, bits: int, scratch: _Scratch) -> Tensor:
    """uint8 `[planes, ..., rows, run]`: the codes at one place of each byte, place by place."""
    if bits == 8:
        return _as_bytes(words).unsqueeze(0)
    if bits != 3:
        codes = _planes(_widest(words.flatten(-2)), range(0, 8, bits), (1 << bits) - 1, scratch, "codes")
        return codes.view(torch.uint8).view(8 // bits, *words.shape[:-1], -1)
    count = words.shape[-1] // 3 * 2
    low, high = words[..., :count], words[..., count:]
    # what a shift by two carries from one byte into the next is never read
    high = torch.stack([high, high >> 2], dim=-1).flatten(-2)
    codes = _planes(_widest(low.contiguous()), (0, 4, 2, 6), 3, scratch, "codes")
    codes |= _planes(_widest(high), (0, 4, 1, 5), 1, scratch, "high").bitwise_left_shift_(2)
    return codes.view(torch.uint8)


def _planes(words: Tensor, shifts: Sequence[int], mask: int, scratch: _Scratch, name: str) -> Tensor:
    """`words >> shifts`, of whose bytes the bits of `mask` are kept: `[shifts, ...]`."""
    places = torch.tensor(shifts, dtype=words.dtype, device=words.device).view(-1, *[1] * words.ndim)
    planes = scratch.take(name, (len(shifts), *words.shape), words.dtype)
    return torch.bitwise_right_shift(words, places, out=planes).bitwise_and_(_in_every_byte(mask, words.dtype))


def _in_every_byte(value: int, dtype: torch.dtype) -> int:
    return int.from_bytes(bytes([value]) * dtype.itemsize, "little", signed=True)


def _widest(words: Tensor) -> Tensor:
    """int32 words by twos, as int64, where they lie so: half as many numbers to work on."""
    steps = (*words.stride()[:-1], words.storage_offset(), words.shape[-1])
    return words.view(torch.int64) if words.stride(-1) == 1 and not any(step % 2 for step in steps) else words


def _as_bytes(words: Tensor) -> Tensor:
    # a last dimension of size 1 may have any stride, which a view of bytes refuses
    return (words if words.stride(-1) == 1 else words.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def _axes(fmt: Format) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A row of codes as axes: their sizes, which of them are planes, and in what order the others make a run.

    See `packing`: natural order is that of the axes, the order in memory is by word, half and byte.
    """
    if fmt.bits == 3:
        # k, pair, plane, word, half
        return (2, 2, 2, -1, 2), (0, 2), (3, 1, 4)
    if fmt.codes != "codebook":
        # byte, place, half
        return (2, 8 // fmt.bits, -1), (1,), (2, 0)
    if fmt.bits == 4:
        # half, nibble, word, byte
        return (2, 2, -1, 2), (), (2, 0, 3, 1)
    return (2, 8 // fmt.bits, -1), (), (2, 0, 1)


def _arranged(numbers: Tensor, fmt: Format) -> Tensor:
    """`numbers [..., row]` in the order in which codes lie in memory: `[planes, ..., run]`."""
    sizes, planes, run = _axes(fmt)
    unit = 32 if fmt.bits == 3 else 32 // fmt.bits
    numbers = pad(numbers, (0, -numbers.shape[-1] % unit)).unflatten(-1, sizes)
    first = numbers.ndim - len(sizes)
    order = (*(first + axis for axis in planes), *range(first), *(first + axis for axis in run))
    count = prod(sizes[axis] for axis in planes)
    return numbers.permute(order).reshape(count, *numbers.shape[:first], -1)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """`[..., n, m]`: products of `left [planes, ..., n, run]` with `right [planes, ..., m, run]`, added up."""
    batch = left.shape[1:-2]
    left, right = left.flatten(1, -3), right.flatten(1, -3).transpose(-1, -2)
    sums = torch.bmm(left[0], right[0])
    for plane in range(1, len(left)):
        sums.baddbmm_(left[plane], right[plane])
    return sums.unflatten(0, batch)


def _apart(query: Tensor, groups: int) -> Tensor:
    """`query [heads, rows, head_dim]` with all but one group of channels 0, in turn: `[heads, groups * rows, ...]`."""
    if groups == 1:
        return query
    alone = torch.eye(groups, dtype=query.dtype, device=query.device)[:, None, :, None]
    return (query.unflatten(-1, (groups, -1)).unsqueeze(1) * alone).flatten(3).flatten(1, 2)


def _float_mix(factors: Tensor, words: Tensor, fmt: Format, tables: Tables, scale: Tensor | None) -> Tensor:
    """Sums of levels `[heads, groups, rows, channels of a group]`, by `factors [heads, groups, rows, tokens]`.

    scale: `[heads, blocks, channels]`, to be multiplied with the sums of each block.
    """
    heads, groups, rows, _ = factors.shape
    blocks, dim = words.shape[1:3]
    factors = _arranged(factors.unflatten(-1, (blocks, -1)).movedim(3, 1), fmt)
    mix = factors.new_zeros(heads, groups, rows, dim // groups)
    for span, tile in _tiles(words, fmt, tables):
        # [heads, blocks, groups, rows, channels]
        sums = _products(factors[:, span.heads, span.blocks], tile.unflatten(3, (groups, -1)))
        if scale is not None:
            sums *= scale[span.heads, span.blocks, None, None]
        mix[span.heads].add_(sums.sum(1))
    return mix


def _takes_int8(fmt: Format, rows: int) -> bool:
    # static grids may have their codes far from the middle
    served = fmt.codes == "affine" and fmt.bits != 3 and fmt.scale == "token"
    return served and rows <= INT8_ROWS and int8_products_work()


def _middle(bits: int) -> float:
    """The code, or the place between two, that `_signed_rows` makes 0."""
    return 128 if bits == 8 else (2**bits - 1) / 2


def _int8_mix(factors: Tensor, words: Tensor, fmt: Format) -> Tensor:
    """`_float_mix` of codes around `_middle`: sums that do not grow with it lose little by being rounded."""
    heads, groups, rows, tokens = factors.shape
    blocks, dim = words.shape[1:3]
    # [planes, heads, groups, rows, blocks, run]
    factors = _arranged(factors.bfloat16().unflatten(-1, (blocks, -1)), fmt)
    mix = factors.new_zeros(heads, groups, rows, dim // groups, dtype=torch.float32)
    unit = mix.new_full((dim // groups,), 2.0 ** (fmt.bits - 8), dtype=torch.bfloat16)
    step = max(1, INT8_TILE // (dim * tokens // blocks))
    scratch = _Scratch()
    for head in range(heads):
        for start in range(0, blocks, step):
            some = slice(start, start + step)
            codes = _signed_rows(words[head, some], fmt.bits, scratch).unflatten(0, (groups, -1))
            weights = factors[:, head, :, :, some].permute(1, 2, 0, 3, 4).flatten(2)
            for place, by, group in zip(mix[head], weights, codes, strict=True):
                place.add_(_int8_products(by, group, unit))
    return mix


def _signed_rows(words: Tensor, bits: int, scratch: _Scratch) -> Tensor:
    """int8 rows `[rows, planes * blocks * run]` of `words [blocks, rows, words]`, all blocks of a row side by side.

    A code lies in the upper bits of its byte, its sign flipped and the next bit set: the levels are even steps around
    0, but for 8 bits, which have no next bit.
    """
    blocks, rows, _ = words.shape
    words = _widest(words)
    spread = scratch.take("codes", (rows, 8 // bits, blocks, words.shape[-1]), words.dtype)
    places = spread.permute(1, 2, 0, 3)
    flip = _in_every_byte(128 | 128 >> bits, words.dtype)
    if bits == 8:
        torch.bitwise_xor(words, flip, out=places[0])
    else:
        kept = _in_every_byte(256 - (1 << 8 - bits), words.dtype)
        shifted = scratch.take("shifted", words.shape, words.dtype)
        for plane, place in enumerate(places):
            torch.bitwise_left_shift(words, 8 - bits * (plane + 1), out=shifted)
            torch.bitwise_and(shifted, kept, out=place)
        spread.bitwise_xor_(flip)
    return spread.view(torch.int8).flatten(1)


def _sparse_products(query: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Products `[heads, rows, n]` of `query [heads, rows, dim]` with vectors, 0 but at `index [heads, n, k]`."""
    heads, rows, dim = query.shape
    table = query.transpose(1, 2).reshape(-1, rows)
    index = index.long() + dim * torch.arange(heads, device=query.device)[:, None, None]
    sums = embedding_bag(index.flatten(0, 1), table, per_sample_weights=value.to(query.dtype).flatten(0, 1), mode="sum")
    return sums.unflatten(0, (heads, -1)).transpose(1, 2)


def _sparse_mix(weights: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """`[heads, rows, channels]`: what `weights [heads, rows, tokens]` make of slots `[heads, blocks, channels, k]`."""
    blocks = index.shape[1]
    # a block of a head as a head of its own
    apart = weights.unflatten(-1, (blocks, -1)).transpose(1, 2).flatten(0, 1)
    sums = _sparse_products(apart, index.flatten(0, 1), value.flatten(0, 1))
    return sums.unflatten(0, (-1, blocks)).sum(1)
