"""Packed rows that stand for themselves: one token's key or value, of one head or of all, whatever its width.

The formats are those of `MixedFormat`. Rows are lists of named tensors with any leading dimensions: `[n, ...]` where
they are encoded, `[blocks, rows, ...]` where attention reads them. Keys and values have the same layout.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend, quantize
from .format import Format, row_bits
from .packing import pack, unpack
from .quantize import FLOAT16_MAX, NO_TABLES


class Run(NamedTuple):
    """Rows of one width of several owners, those of one after those of another."""

    fmt: Format
    rows: Mapping[str, Tensor]
    """As `encode_rows` gives them, `[n, ...]` contiguous."""
    starts: Tensor
    """Where each owner's rows start and the last one's end, int32 `[owners + 1]`."""
    tokens: Tensor
    """Which token of its owner a row is, int32 `[n]`; -1: it is empty."""
    most: int
    """Rows of the owner that has most."""
    peak: float
    """The largest outlier value, whatever its sign; 0 where there is none."""


def half_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what rows of 16 bits are kept: the model's dtype, or float16 where that is wider."""
    return dtype if dtype.itemsize <= 2 else torch.float16


def encode_rows(states: Tensor, fmt: Format) -> dict[str, Tensor]:
    """Pack `states [n, numbers]`: `codes`, `scales` (scale, zero), `outlier_index`, `outlier_value`, or `exact`."""
    if fmt.codes == "exact":
        dtype = half_dtype(states.dtype)
        limit = torch.finfo(dtype).max
        return {"exact": states.clamp(-limit, limit).to(dtype)}
    # blocks of one token: there may be none
    packed = quantize.encode(states[None, None], fmt, "key", 1)
    rows = {name: tensor[0, 0, :, 0] for name, tensor in packed.items()}
    return {**rows, "scales": rows["scales"][:, 0]}


def decode_rows(rows: Mapping[str, Tensor], fmt: Format, numbers: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The states `[..., numbers]` that rows stand for."""
    if fmt.codes == "exact":
        return rows["exact"].to(dtype)
    scale, zero = rows["scales"].to(dtype).split(1, -1)
    x = unpack(rows["codes"], fmt.bits, numbers, dtype=dtype).mul_(scale).add_(zero)
    if fmt.outliers:
        x.scatter_add_(-1, rows["outlier_index"].long(), rows["outlier_value"].to(dtype))
    return x


def recode_rows(rows: dict[str, Tensor], fmt: Format, to: Format, numbers: int) -> dict[str, Tensor]:
    """Rows `[n, ...]` in a narrower format.

    Between midpoint grids this is what encoding the original numbers would give, to float16 rounding: the cells of the
    wider format lie in those of the narrower one, so codes only lose their last bits. Other grids are made anew for
    the decoded numbers.
    """
    if fmt.codes == "exact" or not (fmt.grid == to.grid == "midpoint" and fmt.outliers == to.outliers):
        return encode_rows(decode_rows(rows, fmt, numbers), to)
    lost = fmt.bits - to.bits
    codes = unpack(rows["codes"], fmt.bits, numbers, dtype=torch.uint8)
    scale, zero = rows["scales"].float().unbind(-1)
    scales = torch.stack([scale * 2**lost, zero + scale * (2**lost - 1) / 2], dim=-1)
    narrow = {
        "codes": pack(codes >> lost, to.bits),
        "scales": scales.clamp(-FLOAT16_MAX, FLOAT16_MAX).half(),
    }
    if not fmt.outliers:
        return narrow
    index = rows["outlier_index"].long()
    exact = decode_rows(rows, fmt, numbers).gather(-1, index)
    residual = exact - decode_rows(narrow, to.model_copy(update={"outliers": 0}), numbers).gather(-1, index)
    value = residual.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    return {**narrow, "outlier_index": rows["outlier_index"], "outlier_value": value}


def state_ends(states: Tensor, trim: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest of `states [..., numbers]` but for the `trim` smallest and largest: `[...]` float32."""
    states = states.float()
    if not trim:
        return states.amin(-1), states.amax(-1)
    low = states.topk(trim + 1, dim=-1, largest=False).values[..., -1]
    return low, states.topk(trim + 1, dim=-1).values[..., -1]


def row_ends(rows: Mapping[str, Tensor], fmt: Format, trim: int) -> tuple[Tensor, Tensor]:
    """Ends of the ranges that rows were encoded with, outliers left out: `[...]` float32.

    trim: for exact rows, which left nothing out. Of a mean grid only the distance between the ends is right.
    """
    if fmt.codes == "exact":
        return state_ends(rows["exact"], trim)
    scale, zero = rows["scales"].float().unbind(-1)
    if fmt.grid == "midpoint":
        low = zero - scale / 2
        return low, low + scale * 2**fmt.bits
    return zero, zero + scale * (2**fmt.bits - (fmt.grid == "ends"))


def row_scores(query: Tensor, rows: Mapping[str, Tensor], fmt: Format) -> Tensor:
    """Dot products `[blocks, heads, R, rows]` of `query [blocks, heads, R, dim]` with rows of `heads * dim` numbers."""
    heads, dim = query.shape[1], query.shape[-1]
    levels, scale, zero = _levels(rows, fmt, heads * dim, query.dtype)
    # [blocks, heads, dim, rows]
    scores = query @ levels.unflatten(-1, (heads, dim)).permute(0, 2, 3, 1)
    if scale is None or zero is None:
        return scores
    return scores * scale + query.sum(-1, keepdim=True) * zero


def row_mix(weights: Tensor, rows: Mapping[str, Tensor], fmt: Format, dim: int) -> Tensor:
    """Sums `[blocks, heads, R, dim]` of rows of `heads * dim` numbers, by `weights [blocks, heads, R, rows]`."""
    heads = weights.shape[1]
    levels, scale, zero = _levels(rows, fmt, heads * dim, weights.dtype)
    levels = levels.unflatten(-1, (heads, dim)).transpose(1, 2)
    if scale is None or zero is None:
        return weights @ levels
    return (weights * scale) @ levels + (weights * zero).sum(-1, keepdim=True)


def runs_served(lines: Tensor, formats: Collection[Format], dim: int) -> bool:
    """Whether `run_scores` and `run_mix` take queries or weights `lines [owners, heads, ...]` and such rows.

    Says once what keeps them from it on a device that kernels serve.
    """
    if not backend.triton_serves(lines.device):
        return False
    from .triton import rows as kernels

    problems = [kernels.unserved(row_bits(fmt), lines.shape[1], dim) for fmt in formats]
    if lines.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        problems.append(f"attention in {lines.dtype}")
    if lines.requires_grad and torch.is_grad_enabled():
        problems.append("gradients")
    for problem in filter(None, problems):
        backend.warn_once(f"rows of mixed widths: no kernel for {problem}; reading them with torch, slower")
        return False
    return True


def run_scores(query: Tensor, runs: Sequence[Run], tokens: int) -> Tensor:
    """Dot products float32 `[owners, heads, R, tokens]` with `query [owners, heads, R, dim]`; -inf where no row is.

    Only where `runs_served`.
    """
    from .triton import rows as kernels

    return kernels.scores(query, runs, tokens)


def run_mix(weights: Tensor, runs: Sequence[Run], dim: int) -> Tensor:
    """Sums of rows float32 `[owners, heads, R, dim]`, weighted by `weights [owners, heads, R, tokens]`.

    Only where `runs_served`.
    """
    from .triton import rows as kernels

    return kernels.mix(weights, runs, dim)


def _levels(
    rows: Mapping[str, Tensor], fmt: Format, numbers: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Levels `[blocks, rows, numbers]`, outliers among them, and scale and zero `[blocks, 1, 1, rows]` to go with them.

    An outlier is a level beyond the codes, so that scale and zero stay outside the dot product.
    """
    if fmt.codes == "exact":
        return rows["exact"].to(dtype), None, None
    levels = quantize.levels(rows["codes"], fmt, numbers, NO_TABLES, dtype)
    scales = rows["scales"].to(dtype)
    scale, zero = scales[..., :1], scales[..., 1:]
    # a row without a range has code 0 throughout, whatever the scale
    scale = scale.masked_fill(scale == 0, 1)
    if fmt.outliers:
        levels.scatter_add_(-1, rows["outlier_index"].long(), rows["outlier_value"].to(dtype) / scale)
    return levels, scale.transpose(1, 2).unsqueeze(1), zero.transpose(1, 2).unsqueeze(1)


def row_bytes(fmt: Format, numbers: int) -> dict[str, int]:
    """Bytes of one row, by kind."""
    if row_bits(fmt) == 16:
        return {"exact": numbers * 2}
    return fmt.block_bytes("key", numbers, 1, 2)
