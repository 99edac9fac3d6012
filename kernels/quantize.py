"""The reference encoder and decoder: float32, straight-line, the truth every other implementation must agree with."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import triton_serves, warn_once
from .checks import require_buffers, require_decodable, require_encodable
from .float8 import FLOAT8_MAX, from_float8, to_float8
from .format import Format, Side, row_words
from .packing import pack, unpack
from .rotation import hadamard_rotate

FLOAT16_MAX = 65504.0
MIDDLE_STEP = 63
LAST_STEP = 2 * MIDDLE_STEP
_ON_GRID = tuple((2**bits,) for bits in (2, 3, 4))


@dataclass(frozen=True)
class Steps:
    """A codebook by its grid: level `c` is `first + step * index[c]`, to float32 rounding."""

    index: Tensor
    """int32 `[2**bits]`, ascending from 0 to `LAST_STEP`."""
    step: Tensor
    """Scalar, dtype of the codebook."""
    first: Tensor
    """Scalar, dtype of the codebook."""


@dataclass(frozen=True, eq=False)
class Tables:
    """Fitted numbers of one side of one layer, shared by all tokens. Equal only to themselves.

    codebook: `[2**bits]` ascending levels, float32, for `codes="codebook"`. Up to 4 bits they lie on a grid of 127
        points from the first level to the last, so that kernels look up bytes: whatever is given is moved to the
        nearest point. The two ends, the middle between them, symmetry, and what is on the grid stay bitwise. Levels
        closer than a step may merge: of such codes, which decode alike, the first takes numbers up to the level and
        the last those above.
    scale, zero: `[kv_heads, head_dim]` float32, for `scale="static"`.
    sensitivity: `[kv_heads, head_dim]` float32, what an error in a channel costs: keys' outlier slots go where error
        times sensitivity is largest; without it, to the largest errors.
    gain, offset: scalars, float32: decoding reads `gain * level + offset` where encoding rounded to `level` (Q-Norm).
    """

    codebook: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    sensitivity: Tensor | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codebook is not None and self.codebook.shape in _ON_GRID:
            object.__setattr__(self, "codebook", _on_grid(self.codebook))

    @classmethod
    def of(cls, **tensors: Tensor) -> "Tables":
        """Tables of tensors that were those of others: a codebook is on its grid already and stays as it is."""
        tables = cls.__new__(cls)
        for field in fields(cls):
            object.__setattr__(tables, field.name, tensors.get(field.name))
        return tables

    def steps(self) -> Steps:
        """The codebook of 2, 3 or 4 bits as points of its grid; raises ValueError without one."""
        if self.codebook is None or self.codebook.shape not in _ON_GRID:
            raise ValueError("only tables with a codebook of 2, 3 or 4 bits have steps")
        return _steps(self.codebook)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are set, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device) -> "Tables":
        """The same tables on `device`."""
        return Tables(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


NO_TABLES = Tables()


def _steps(codebook: Tensor) -> Steps:
    first, last = codebook[0], codebook[-1]
    # a factor, because a quotient by a number is rounded otherwise on CUDA than on CPU
    step = (last - first) * (1 / LAST_STEP)
    # from the middle, seen from both ends, so that levels of opposite signs are rounded alike
    from_middle = ((codebook - first) - (last - codebook)) / (2 * step)
    index = torch.where(step > 0, from_middle.round() + MIDDLE_STEP, 0)
    return Steps(index.to(torch.int32), step, first)


def _on_grid(codebook: Tensor) -> Tensor:
    steps, last = _steps(codebook), codebook[-1]
    upwards = steps.first + steps.step * steps.index
    downwards = last - steps.step * (LAST_STEP - steps.index)
    # from the nearer end, which then stays bitwise, as the middle does
    levels = torch.where(steps.index < MIDDLE_STEP, upwards, downwards)
    return torch.where(steps.index == MIDDLE_STEP, (steps.first + last) / 2, levels)


def packed_shapes(
    fmt: Format, side: Side, head_dim: int, block: int, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What `encode` returns of states of `dtype`: per tensor what follows `[batch, kv_heads, blocks]`, and its type."""
    if fmt.codes == "exact":
        return {"exact": ((block, head_dim), dtype)}
    rows, length = (block, head_dim) if side == "key" else (head_dim, block)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((rows, row_words(length, fmt.bits)), torch.int32)
    }
    numbers = 1 if fmt.symmetric else 2
    if fmt.scale == "token":
        shapes["scales"] = ((block, fmt.groups(head_dim), numbers), torch.float16)
    elif fmt.scale == "channel":
        shapes["scales"] = ((head_dim, numbers), torch.float16)
    if fmt.outliers:
        shapes["outlier_index"] = ((rows, fmt.outliers), torch.int16)
        shapes["outlier_value"] = ((rows, fmt.outliers), torch.float16)
    return shapes


def encode(
    states: Tensor,
    fmt: Format,
    side: Side,
    block: int,
    valid: Tensor | None = None,
    tables: Tables = NO_TABLES,
    out: dict[str, Tensor] | None = None,
    at: Tensor | None = None,
    when: Tensor | None = None,
) -> dict[str, Tensor]:
    """Quantize and pack whole blocks.

    states: `[batch, kv_heads, tokens, head_dim]`, tokens a multiple of `block`; any float dtype.
    valid: bool `[batch, tokens]`; tokens marked False (padding, sinks) are kept out of per-channel statistics and
        take no outlier slot.
    out: contiguous tensors `[batch, kv_heads, capacity, ...]` of `packed_shapes` to write the blocks to, and return.
    at: one integer on the device of `states`: the block of `out` to write first; None: 0. Nothing is written if the
        blocks do not fit from there on.
    when: one integer on that device: nothing is written if it is 0.

    Returns tensors `[batch, kv_heads, blocks, ...]` by kind: `codes` int32, `scales` float16 (scale, zero),
    `outlier_index` int16 and `outlier_value` float16; or `exact` in the dtype of `states`. Nothing waits for the
    device, so that a CUDA graph can be captured. Raises ValueError for arguments that do not fit each other.
    """
    require_encodable(states, block, valid, tables.tensors())
    require_buffers(out, at, when, states, block, packed_shapes(fmt, side, states.shape[-1], block, states.dtype))
    if fmt.codes != "exact" and triton_serves(states.device):
        _require_tables(fmt, tables)
        from .triton import encode as kernels

        problem = kernels.unserved(fmt, side, states.shape[-1], block, tables)
        if problem is None:
            return kernels.encode(states, fmt, side, block, valid, tables, out, at, when)
        warn_once(f"the Triton kernels do not encode {problem}; it is done by torch, which is slower")
    packed = _encode(states, fmt, side, block, valid, tables)
    return packed if out is None else _written(packed, out, at, when)


def _written(
    packed: dict[str, Tensor], out: dict[str, Tensor], at: Tensor | None, when: Tensor | None
) -> dict[str, Tensor]:
    for name, tensor in packed.items():
        blocks, capacity = tensor.shape[2], out[name].shape[2]
        if at is None and when is None:
            out[name][:, :, :blocks] = tensor
            continue
        first = 0 if at is None else at
        index = torch.arange(blocks, device=tensor.device) + first
        written = (index >= 0).all() & (index < capacity).all()
        if when is not None:
            written = written & (when != 0)
        index = index.clamp(0, capacity - 1)
        out[name].index_copy_(2, index, torch.where(written, tensor, out[name].index_select(2, index)))
    return out


def _encode(
    states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
) -> dict[str, Tensor]:
    if fmt.codes == "exact":
        return {"exact": states.unflatten(2, (-1, block)).contiguous()}
    keep = _blockwise(valid, block)
    spread = _spread(states, fmt, side, block, keep, tables)
    codebook = _codebook(tables, fmt) if fmt.codes == "codebook" else None
    if fmt.codes == "float8":
        codes = to_float8(spread.ratio)
    elif codebook is None:
        # cells of a midpoint grid are half open, so that their halves are cells of a finer one
        nearest = spread.ratio.add_(0.5).floor_() if fmt.grid == "midpoint" else spread.ratio.round_()
        codes = nearest.clamp_(0, 2**fmt.bits - 1).to(torch.uint8)
    else:
        codes = torch.bucketize(spread.ratio.contiguous(), (codebook[1:] + codebook[:-1]) / 2)
        if fmt.unit == "norm":
            spread.stored["scales"] = _restored(spread.ratio, codebook[codes], spread.scale)
    packed = {"codes": _pack_rows(codes.flatten(-2), fmt, side), **spread.stored}
    if fmt.outliers:
        scale, zero = _normalised(spread.scale, spread.zero, tables)
        decoded = codes.float() if codebook is None else codebook[codes]
        residual = spread.states - (decoded * scale + zero).flatten(-2)
        if keep is not None:
            residual = residual * keep
        rows = residual if side == "key" else residual.transpose(-1, -2)
        if fmt.grid == "ends":
            index = _costs(rows, side, tables).topk(fmt.outliers, dim=-1).indices
        else:
            index = _tails(spread.states if side == "key" else spread.states.transpose(-1, -2), fmt.trim)
        packed["outlier_index"] = index.to(torch.int16)
        packed["outlier_value"] = rows.gather(-1, index).clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    return packed


def _restored(ratio: Tensor, level: Tensor, scale: Tensor) -> Tensor:
    """Stored scales with which levels have the norm of the numbers they stand for, `[..., groups, channels]` all."""
    encoded, decoded = (x.square().sum(-1, keepdim=True) for x in (ratio, level))
    # a codebook may have a level of zero, and a vector nothing else
    factor = torch.where(decoded > 0, (encoded / decoded).sqrt(), 1)
    return (scale * factor).clamp(max=FLOAT16_MAX).half()


def _tails(rows: Tensor, count: int) -> Tensor:
    """Where the `count` smallest and the `count` largest numbers of each row are, none twice: `[..., 2 * count]`."""
    low = rows.topk(count, dim=-1, largest=False).indices
    # where most numbers are equal, one would be among the largest too
    high = rows.scatter(-1, low, -torch.inf).topk(count, dim=-1).indices
    return torch.cat([low, high], dim=-1)


def _costs(residual: Tensor, side: Side, tables: Tables) -> Tensor:
    """By what the errors of a packed row compete for its slots."""
    if side == "value" or tables.sensitivity is None:
        return residual.abs()  # a row of values is one channel
    return residual.abs() * tables.sensitivity[:, None, None]


def normalise(
    states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None = None, tables: Tables = NO_TABLES
) -> tuple[Tensor, Tensor]:
    """Where `encode` finds numbers on their grids, the view that codebooks are fitted to.

    Arguments as for `encode`, of a format with affine codes or a codebook.

    Returns `[batch, kv_heads, tokens, head_dim]` float32: the numbers with their grid's range as [-1, 1] (beyond it
    saturates; 0 where a grid has no range), and half the width of that range. Codebooks of another unit than the range
    get multiples of that unit, and the unit.
    """
    spread = _spread(states, fmt, side, block, _blockwise(valid, block), tables)
    shape = (*states.shape[:2], -1, states.shape[3])
    ratio, scale = spread.ratio, spread.scale.expand_as(spread.ratio)
    if fmt.codes == "float8":
        ratio, scale = ratio / FLOAT8_MAX, scale * FLOAT8_MAX
    elif fmt.codes == "affine":
        half = (2**fmt.bits - 1) / 2
        ratio, scale = torch.where(scale > 0, ratio / half - 1, 0), scale * half
    return ratio.reshape(shape), scale.reshape(shape)


def splice(
    old: dict[str, Tensor], new: dict[str, Tensor], fmt: Format, side: Side, tokens: int, block: int
) -> dict[str, Tensor]:
    """One block, its first `tokens` tokens as `old` has them, the others as `new`.

    Decoded numbers that are encoded again get a smaller range where the outermost levels of a codebook lie inside it;
    what was coded once is therefore taken over. Grids per channel are those of a whole block and stay `new`.
    """
    if fmt.scale == "channel" or not fmt.packed:
        return new
    first = torch.arange(block, device=new["codes"].device) < tokens
    spliced = dict(new)
    if "scales" in new:
        spliced["scales"] = torch.where(first[:, None, None], old["scales"], new["scales"])
    if side == "key":
        for name in new.keys() - {"scales"}:
            spliced[name] = torch.where(first[:, None], old[name], new[name])
        return spliced
    by_nibble = fmt.codes == "codebook"
    codes = [unpack(packed["codes"], fmt.bits, block, by_nibble=by_nibble, dtype=torch.uint8) for packed in (old, new)]
    spliced["codes"] = pack(torch.where(first, *codes), fmt.bits, by_nibble=by_nibble)
    if fmt.outliers:
        index = torch.cat([old["outlier_index"], new["outlier_index"]], -1)
        value = torch.cat([old["outlier_value"], new["outlier_value"]], -1)
        of_old = torch.arange(index.shape[-1], device=index.device) < fmt.outliers
        value = value.masked_fill((index < tokens) != of_old, 0)
        largest = value.abs().topk(fmt.outliers, dim=-1).indices
        spliced["outlier_index"], spliced["outlier_value"] = index.gather(-1, largest), value.gather(-1, largest)
    return spliced


def decode(
    packed: dict[str, Tensor],
    fmt: Format,
    side: Side,
    head_dim: int,
    block: int,
    tables: Tables = NO_TABLES,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The states `[batch, kv_heads, tokens, head_dim]` that packed blocks stand for, in their original basis."""
    if fmt.codes == "exact":
        return packed["exact"].flatten(2, 3).to(dtype)
    require_decodable(packed, packed_shapes(fmt, side, head_dim, block), tables.tensors())
    if triton_serves(packed["codes"].device):
        _require_tables(fmt, tables)
        from .triton import unpack as kernels

        problem = kernels.unserved(fmt, side, head_dim, block, tables)
        if problem is None:
            if fmt.rotation == "none":
                return kernels.decode(packed, fmt, side, head_dim, block, tables, dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            rotated = kernels.decode(packed, fmt, side, head_dim, block, tables, wide)
            return hadamard_rotate(rotated, fmt.basis(head_dim)).to(dtype)
        warn_once(f"the Triton kernels do not decode {problem}; it is done by torch, which is slower")
    x = decode_rows(packed, fmt, side, head_dim, block, tables, dtype)
    x = x if side == "key" else x.transpose(-1, -2)
    return hadamard_rotate(x, fmt.basis(head_dim)).flatten(2, 3)


def decode_rows(
    packed: dict[str, Tensor],
    fmt: Format,
    side: Side,
    head_dim: int,
    block: int,
    tables: Tables,
    dtype: torch.dtype,
) -> Tensor:
    """Decoded rows in storage order and in the rotated basis, if the format has one.

    `[batch, kv_heads, blocks, block, head_dim]` for keys, `[..., head_dim, block]` for values.
    """
    x = levels(packed["codes"], fmt, head_dim if side == "key" else block, tables, dtype)
    scale, zero = decode_grid(packed, fmt, tables)
    # [..., tokens, groups, channels per group], or that with the token axis last
    grouped = x.unflatten(-1 if side == "key" else -2, (scale.shape[-2], -1))
    if side == "value":
        scale, zero = scale.movedim(-3, -1), zero.movedim(-3, -1)
    grouped.mul_(scale.to(dtype)).add_(zero.to(dtype))
    if fmt.outliers:
        x.scatter_add_(-1, packed["outlier_index"].long(), packed["outlier_value"].to(dtype))
    return x


def levels(words: Tensor, fmt: Format, length: int, tables: Tables, dtype: torch.dtype) -> Tensor:
    """The level of every code, before scale and zero: rows `[..., length]`."""
    if fmt.codes == "affine":
        return unpack(words, fmt.bits, length, dtype=dtype)
    if fmt.codes == "float8":
        return from_float8(unpack(words, fmt.bits, length), dtype)
    codes = unpack(words, fmt.bits, length, by_nibble=True, dtype=torch.int32)
    # on CPU several times faster than indexing with the codes
    return _codebook(tables, fmt).to(dtype).index_select(0, codes.flatten()).view(codes.shape)


def decode_grid(packed: dict[str, Tensor], fmt: Format, tables: Tables) -> tuple[Tensor, Tensor]:
    """float32 scale and zero of decoding, broadcastable to `[..., blocks, block, groups, head_dim / groups]`."""
    return _normalised(*_static_grid(tables) if fmt.scale == "static" else _grid(packed["scales"], fmt), tables)


class _Spread(NamedTuple):
    """States `[batch, kv_heads, blocks, block, head_dim]` on their grids; the others as `decode_grid`."""

    states: Tensor
    ratio: Tensor
    """(states - zero) / scale, `[..., groups, head_dim / groups]`."""
    scale: Tensor
    zero: Tensor
    stored: dict[str, Tensor]
    """What of the grids has to be kept with the codes."""


def _spread(states: Tensor, fmt: Format, side: Side, block: int, keep: Tensor | None, tables: Tables) -> _Spread:
    x = states.unflatten(2, (-1, block)).float()
    x = hadamard_rotate(x, fmt.basis(x.shape[-1]))
    stored: dict[str, Tensor] = {}
    if fmt.scale == "static":
        scale, zero = _static_grid(tables)
    else:
        stored["scales"] = _online_scales(x, fmt, side, keep, tables)
        scale, zero = _grid(stored["scales"], fmt)
    grouped = x.unflatten(-1, (scale.shape[-2], -1))
    ratio = (grouped - zero) / scale
    # a zero scale means a constant vector: level 0 and the zero point give it back
    return _Spread(x, torch.where(scale > 0, ratio, torch.zeros_like(ratio)), scale, zero, stored)


def _blockwise(valid: Tensor | None, block: int) -> Tensor | None:
    """`valid [batch, tokens]` as `[batch, 1, blocks, block, 1]`."""
    return None if valid is None else valid.unflatten(1, (-1, block))[:, None, :, :, None]


def _normalised(scale: Tensor, zero: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """The grid that decodes: a level `c` stands for `scale * (gain * c + offset) + zero`."""
    if tables.gain is None or tables.offset is None:
        return scale, zero
    return scale * tables.gain, zero + scale * tables.offset


def _pack_rows(codes: Tensor, fmt: Format, side: Side) -> Tensor:
    rows = codes if side == "key" else codes.transpose(-1, -2)
    return pack(rows, fmt.bits, by_nibble=fmt.codes == "codebook")


def _online_scales(x: Tensor, fmt: Format, side: Side, keep: Tensor | None, tables: Tables) -> Tensor:
    """float16 `(scale, zero)`, or `(scale,)` when symmetric, from the range of each group.

    `[..., blocks, block, groups, numbers]` per token, `[..., blocks, head_dim, numbers]` per channel.
    """
    seen = keep if fmt.scale == "channel" else None  # a token's range is of that token alone
    if fmt.trim:
        outside = _left_to_slots(x, fmt, side, keep, tables)
        seen = ~outside if seen is None else seen & ~outside
    vectors, kept = _vectors(x, fmt), None if seen is None else _vectors(seen, fmt)
    if fmt.unit != "range":
        return vectors.square().mean(-1, keepdim=True).sqrt().clamp(max=FLOAT16_MAX).half()
    low, high = _ranges(vectors, kept)
    if fmt.grid != "ends":
        step = (high - low) / 2**fmt.bits
        zero = low + step / 2 if fmt.grid == "midpoint" else _mean(vectors, kept) - step * 2 ** (fmt.bits - 1)
        return torch.stack([step, zero], dim=-1).clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    steps = 2 if fmt.codes == "codebook" else 2**fmt.bits - 1
    if fmt.codes == "float8":
        numbers = [torch.maximum(high, -low) / FLOAT8_MAX]
    elif fmt.symmetric:
        numbers = [2 * torch.maximum(high, -low) / steps]
    elif fmt.codes == "codebook":
        numbers = [(high - low) / steps, (high + low) / 2]
    else:
        numbers = [(high - low) / steps, low]
    return torch.stack(numbers, dim=-1).clamp(-FLOAT16_MAX, FLOAT16_MAX).half()


def _vectors(x: Tensor, fmt: Format) -> Tensor:
    """`x [..., block, head_dim]` with the numbers that share a scale in the last dimension: a view."""
    return x.unflatten(-1, (fmt.groups(x.shape[-1]), -1)) if fmt.scale == "token" else x.transpose(-1, -2)


def _ranges(x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest number that `keep` marks along the last dimension; 0 where it marks none."""
    if keep is None:
        return x.amin(-1), x.amax(-1)
    none = ~keep.any(-1)
    low, high = x.masked_fill(~keep, torch.inf).amin(-1), x.masked_fill(~keep, -torch.inf).amax(-1)
    return low.masked_fill(none, 0), high.masked_fill(none, 0)


def _mean(x: Tensor, keep: Tensor | None) -> Tensor:
    """Mean of the numbers that `keep` marks along the last dimension; 0 where it marks none."""
    if keep is None:
        return x.mean(-1)
    return x.masked_fill(~keep, 0).sum(-1) / keep.sum(-1).clamp(min=1)


def _left_to_slots(x: Tensor, fmt: Format, side: Side, keep: Tensor | None, tables: Tables) -> Tensor:
    """Which numbers are left to outlier slots, so that ranges need not cover them: bool, as `x`.

    Candidates are the `trim` largest and smallest of each scale, by rank. Where a packed row has more of them than
    slots, those that would cost most beyond the range of the rest are taken; the others stay inside the range. Slots
    go to the costliest errors in the end: what saturates by less than others are rounded saturates.
    """
    vectors = _vectors(x, fmt)
    low, high = vectors, vectors
    if keep is not None and fmt.scale == "channel":
        ignored = ~_vectors(keep, fmt)
        low, high = low.masked_fill(ignored, torch.inf), high.masked_fill(ignored, -torch.inf)
    low = low.topk(fmt.trim + 1, dim=-1, largest=False).values[..., -1:]
    high = high.topk(fmt.trim + 1, dim=-1).values[..., -1:]
    excess = (vectors - high).clamp(min=0) + (low - vectors).clamp(min=0)
    excess = excess.flatten(-2) if fmt.scale == "token" else excess.transpose(-1, -2)
    if keep is not None:
        excess = excess.masked_fill(~keep, 0)
    rows = _costs(excess if side == "key" else excess.transpose(-1, -2), side, tables)
    largest = rows.topk(fmt.outliers, dim=-1)
    stored = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, largest.indices, largest.values > 0)
    return stored if side == "key" else stored.transpose(-1, -2)


def _grid(scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Stored scales as float32 `(scale, zero)` that broadcast over `[..., block, groups, head_dim / groups]`."""
    scales = scales.float()
    # token: [..., block, groups, 1]; channel: [..., 1, 1, head_dim]
    scales = scales.unsqueeze(-2) if fmt.scale == "token" else scales[..., None, None, :, :]
    scale = scales[..., 0]
    if not fmt.symmetric:
        return scale, scales[..., 1]
    zero = scale * (-(2**fmt.bits - 1) / 2) if fmt.codes == "affine" else torch.zeros_like(scale)
    return scale, zero


def _static_grid(tables: Tables) -> tuple[Tensor, Tensor]:
    if tables.scale is None or tables.zero is None:
        raise ValueError("scale='static' needs tables with scale and zero; return them from the strategy's tables()")
    return tables.scale[:, None, None, None], tables.zero[:, None, None, None]


def _require_tables(fmt: Format, tables: Tables) -> None:
    if fmt.scale == "static":
        _static_grid(tables)
    if fmt.codes == "codebook":
        _codebook(tables, fmt)


def _codebook(tables: Tables, fmt: Format) -> Tensor:
    if tables.codebook is None or tables.codebook.shape != (2**fmt.bits,):
        raise ValueError(
            f"codes='codebook' with bits={fmt.bits} needs a table of {2**fmt.bits} levels; "
            "return one from the strategy's tables()"
        )
    return tables.codebook
