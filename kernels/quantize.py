"""The reference encoder and decoder: float32, straight-line, the truth every other implementation must agree with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Format, Side
from .packing import pack, unpack
from .rotation import hadamard_rotate

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Tables:
    """Fitted numbers of one side of one layer, shared by all tokens.

    codebook: `[2**bits]` ascending levels, float32, for `codes="codebook"`.
    scale, zero: `[kv_heads, head_dim]` float32, for `scale="static"`.
    """

    codebook: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are set, by name."""
        named = {"codebook": self.codebook, "scale": self.scale, "zero": self.zero}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device) -> "Tables":
        """The same tables on `device`."""
        return Tables(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


NO_TABLES = Tables()


def encode(
    states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None = None, tables: Tables = NO_TABLES
) -> dict[str, Tensor]:
    """Quantize and pack whole blocks.

    states: `[batch, kv_heads, tokens, head_dim]`, tokens a multiple of `block`; any float dtype.
    valid: bool `[batch, tokens]`; tokens marked False (padding, sinks) are kept out of per-channel statistics and
        take no outlier slot.

    Returns tensors `[batch, kv_heads, blocks, ...]` by kind: `codes` int32, `scales` float16 (scale, zero),
    `outlier_index` int16 and `outlier_value` float16; or `exact` in the dtype of `states`.
    """
    x = states.unflatten(2, (-1, block))
    if fmt.codes == "exact":
        return {"exact": x.contiguous()}
    x = x.float()
    if fmt.rotation == "hadamard":
        x = hadamard_rotate(x)
    # [batch, 1, blocks, block, 1]
    keep = None if valid is None else valid.unflatten(1, (-1, block))[:, None, :, :, None]
    packed = {}
    if fmt.scale == "static":
        scale, zero = _static_grid(tables)
    else:
        packed["scales"] = _online_scales(x, fmt, keep)
        scale, zero = _grid(packed["scales"], fmt)
    grouped = x.unflatten(-1, (scale.shape[-2], -1))
    ratio = (grouped - zero) / scale
    # a zero scale means a constant vector: level 0 and the zero point give it back
    ratio = torch.where(scale > 0, ratio, torch.zeros_like(ratio))
    codebook = _codebook(tables, fmt) if fmt.codes == "codebook" else None
    if codebook is None:
        codes = ratio.round_().clamp_(0, 2**fmt.bits - 1).to(torch.uint8)
    else:
        codes = torch.bucketize(ratio.contiguous(), (codebook[1:] + codebook[:-1]) / 2)
    packed = {"codes": _pack_rows(codes.flatten(-2), fmt, side), **packed}
    if fmt.outliers:
        levels = codes.float() if codebook is None else codebook[codes]
        residual = x - (levels * scale + zero).flatten(-2)
        if keep is not None:
            residual = residual * keep
        rows = residual if side == "key" else residual.transpose(-1, -2)
        index = rows.abs().topk(fmt.outliers, dim=-1).indices
        packed["outlier_index"] = index.to(torch.int16)
        packed["outlier_value"] = rows.gather(-1, index).clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    return packed


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
    x = decode_rows(packed, fmt, side, head_dim, block, tables, dtype)
    x = x if side == "key" else x.transpose(-1, -2)
    if fmt.rotation == "hadamard":
        x = hadamard_rotate(x)
    return x.flatten(2, 3)


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
    scale, zero = _static_grid(tables) if fmt.scale == "static" else _grid(packed["scales"], fmt)
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
    codes = unpack(words, fmt.bits, length, by_nibble=True, dtype=torch.int32)
    return _codebook(tables, fmt).to(dtype)[codes]


def _pack_rows(codes: Tensor, fmt: Format, side: Side) -> Tensor:
    rows = codes if side == "key" else codes.transpose(-1, -2)
    return pack(rows, fmt.bits, by_nibble=fmt.codes == "codebook")


def _online_scales(x: Tensor, fmt: Format, keep: Tensor | None) -> Tensor:
    """float16 `(scale, zero)`, or `(scale,)` when symmetric, from the range of each group.

    `[..., blocks, block, groups, numbers]` per token, `[..., blocks, head_dim, numbers]` per channel.
    """
    if fmt.scale == "token":
        grouped = x.unflatten(-1, (fmt.groups(x.shape[-1]), -1))
        low, high = grouped.amin(-1), grouped.amax(-1)
    else:
        low, high = _channel_range(x, keep)
    steps = 2 if fmt.codes == "codebook" else 2**fmt.bits - 1
    if fmt.symmetric:
        numbers = [2 * torch.maximum(high, -low) / steps]
    elif fmt.codes == "codebook":
        numbers = [(high - low) / steps, (high + low) / 2]
    else:
        numbers = [(high - low) / steps, low]
    return torch.stack(numbers, dim=-1).clamp(-FLOAT16_MAX, FLOAT16_MAX).half()


def _channel_range(x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    if keep is None:
        return x.amin(-2), x.amax(-2)
    low = x.masked_fill(~keep, torch.inf).amin(-2)
    high = x.masked_fill(~keep, -torch.inf).amax(-2)
    # a block without a single valid token has no range
    empty = ~keep.any(-2)
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def _grid(scales: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Stored scales as float32 `(scale, zero)` that broadcast over `[..., block, groups, head_dim / groups]`."""
    scales = scales.float()
    # token: [..., block, groups, 1]; channel: [..., 1, 1, head_dim]
    scales = scales.unsqueeze(-2) if fmt.scale == "token" else scales[..., None, None, :, :]
    scale = scales[..., 0]
    if not fmt.symmetric:
        return scale, scales[..., 1]
    zero = torch.zeros_like(scale) if fmt.codes == "codebook" else scale * (-(2**fmt.bits - 1) / 2)
    return scale, zero


def _static_grid(tables: Tables) -> tuple[Tensor, Tensor]:
    if tables.scale is None or tables.zero is None:
        raise ValueError("scale='static' needs tables with scale and zero; return them from the strategy's tables()")
    return tables.scale[:, None, None, None], tables.zero[:, None, None, None]


def _codebook(tables: Tables, fmt: Format) -> Tensor:
    if tables.codebook is None or tables.codebook.shape != (2**fmt.bits,):
        raise ValueError(
            f"codes='codebook' with bits={fmt.bits} needs a table of {2**fmt.bits} levels; "
            "return one from the strategy's tables()"
        )
    return tables.codebook
