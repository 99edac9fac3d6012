"""Attention over segments of keys and values, merged by log-sum-exp.

Every segment (packed chunk, sinks, exact tail) yields a `Partial`; partials merge in any order. Queries are folded:
the query heads that share a kv head, and the query positions, form one row axis
`R = (query_heads / kv_heads) * queries`, so no key or value is ever repeated.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .format import Format
from .quantize import NO_TABLES, Tables, decode_grid, decode_rows, levels
from .rotation import hadamard_rotate


class Partial(NamedTuple):
    """Unfinished softmax-weighted sum over one segment.

    mix: `[batch, kv_heads, R, value_dim]`, sum of exp(score - maximum) * value.
    maximum, total: `[batch, kv_heads, R, 1]`. A row that saw no key has maximum -inf, total 0, mix 0.
    """

    mix: Tensor
    maximum: Tensor
    total: Tensor


def merge(a: Partial, b: Partial) -> Partial:
    """One partial for the union of two disjoint segments."""
    maximum = torch.maximum(a.maximum, b.maximum)
    keep_a, keep_b = _decay(a.maximum, maximum), _decay(b.maximum, maximum)
    return Partial(a.mix * keep_a + b.mix * keep_b, maximum, a.total * keep_a + b.total * keep_b)


def finish(partial: Partial, sink: Tensor | None = None) -> Tensor:
    """Normalised output `[batch, kv_heads, R, value_dim]`; rows that saw no key are zero.

    sink: logits `[kv_heads, R]` of a learned attention sink (gpt-oss), which takes weight and adds no value.
    """
    mix, _, total = partial if sink is None else with_sink(partial, sink)
    return mix / total.masked_fill(total == 0, 1)


def with_sink(partial: Partial, sink: Tensor) -> Partial:
    """`partial` and a learned sink, whose logits are `[kv_heads, R]`."""
    mix, maximum, total = partial
    sink = sink[..., None].to(total.dtype)
    highest = torch.maximum(maximum, sink)
    decay = _decay(maximum, highest)
    return Partial(mix * decay, highest, total * decay + _decay(sink, highest))


def dense_partial(scores: Tensor, values: Tensor) -> Partial:
    """scores `[batch, kv_heads, R, n]` (masked entries -inf), values `[batch, kv_heads, n, value_dim]`."""
    weights, maximum, total = softmax_weights(scores)
    return Partial(weights @ values, maximum, total)


def packed_partial(
    scores: Tensor, packed: dict[str, Tensor], fmt: Format, value_dim: int, block: int, tables: Tables = NO_TABLES
) -> Partial:
    """`dense_partial` with packed value blocks; with a rotated format, `mix` stays in the rotated basis."""
    weights, maximum, total = softmax_weights(scores)
    if fmt.codes == "exact":
        return Partial(weights @ packed["exact"].flatten(2, 3).to(weights.dtype), maximum, total)
    # [batch, kv_heads, blocks, R, block]
    weights = weights.unflatten(-1, (-1, block)).transpose(2, 3)
    if _foldable(fmt, value_dim):
        rows = levels(packed["codes"], fmt, block, tables, weights.dtype)
        scale, zero = _numbers(packed, fmt, tables, weights.dtype)
        if fmt.scale == "token":
            # one scale and zero per token: into the weights, and a constant added to every channel
            mix = (weights * scale) @ rows.transpose(-1, -2) + (weights * zero).sum(-1, keepdim=True)
        else:
            mix = (weights @ rows.transpose(-1, -2)) * scale + weights.sum(-1, keepdim=True) * zero
    else:
        rows = decode_rows(packed, fmt, "value", value_dim, block, tables, weights.dtype)
        mix = weights @ rows.transpose(-1, -2)
    return Partial(mix.sum(2), maximum, total)


def packed_scores(
    query: Tensor, packed: dict[str, Tensor], fmt: Format, block: int, tables: Tables = NO_TABLES
) -> Tensor:
    """Dot products `[batch, kv_heads, R, tokens]` of `query [batch, kv_heads, R, head_dim]` with packed key blocks.

    With a rotated format the caller passes the query in the rotated basis.
    """
    if fmt.codes == "exact":
        return query @ packed["exact"].flatten(2, 3).to(query.dtype).transpose(-1, -2)
    query = query.unsqueeze(2)
    head_dim = query.shape[-1]
    if _foldable(fmt, head_dim):
        rows = levels(packed["codes"], fmt, head_dim, tables, query.dtype)
        scale, zero = _numbers(packed, fmt, tables, query.dtype)
        if fmt.scale == "token":
            scores = (query @ rows.transpose(-1, -2)) * scale + query.sum(-1, keepdim=True) * zero
        else:
            scores = (query * scale) @ rows.transpose(-1, -2) + (query * zero).sum(-1, keepdim=True)
    else:
        rows = decode_rows(packed, fmt, "key", head_dim, block, tables, query.dtype)
        scores = query @ rows.transpose(-1, -2)
    return scores.transpose(2, 3).flatten(-2)


def unrotate(partial: Partial, fmt: Format) -> Partial:
    """`partial` with its mix back in the original basis of the values."""
    if not fmt.packed:
        return partial
    return partial._replace(mix=hadamard_rotate(partial.mix, fmt.basis(partial.mix.shape[-1])))


def attend_reference(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Plain softmax attention, the truth for every other path.

    query `[batch, kv_heads, R, head_dim]`, key and value `[batch, kv_heads, n, dim]`, mask bool broadcastable to
    `[batch, kv_heads, R, n]`.
    """
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ value


def _foldable(fmt: Format, head_dim: int) -> bool:
    """Whether scale and zero can stay outside the dot product: one grid per token, or one per channel and block."""
    return not fmt.outliers and (fmt.scale != "token" or fmt.groups(head_dim) == 1)


def _numbers(packed: dict[str, Tensor], fmt: Format, tables: Tables, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale and zero of a foldable format, `[..., blocks, 1, block]` per token, `[..., blocks, 1, channels]` else."""
    # [..., block, 1, 1] per token, [..., 1, 1, channels] else
    scale, zero = (number.to(dtype) for number in decode_grid(packed, fmt, tables))
    if fmt.scale == "token":
        return scale.flatten(-3).unsqueeze(-2), zero.flatten(-3).unsqueeze(-2)
    return scale.squeeze(-2), zero.squeeze(-2)


def softmax_weights(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    maximum = scores.amax(-1, keepdim=True)
    weights = (scores - maximum.masked_fill(maximum == -torch.inf, 0)).exp_()
    return weights, maximum, weights.sum(-1, keepdim=True)


def _decay(old: Tensor, new: Tensor) -> Tensor:
    """exp(old - new), 0 where nothing was seen."""
    return torch.exp(old - new.masked_fill(new == -torch.inf, 0))
