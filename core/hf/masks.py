"""The mask our attention receives, and what a query may see of a segment."""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The cheapest exact description of who sees whom; registered with transformers under our name.

    None: causal, aligned to the newest key, for any number of queries and any past. Bool `[batch, kv_length]`: causal
    with padding. Anything else (sliding, chunked, composed masks) is the full bool mask `[batch, 1, queries, keys]`.
    """
    if isinstance(q_offset, Tensor) and q_length > 1 and not torch.compiler.is_compiling():
        q_offset = int(q_offset)  # counted on the device: for a prompt it is worth waiting for
    plain = mask_function is causal_mask_function and local_size is None and kv_offset == 0
    if plain and not isinstance(q_offset, Tensor) and q_offset + q_length == kv_length:
        if attention_mask is None or bool(attention_mask.all()):
            return None
        # where it has another length than the cache, as transformers' own masks read it
        padding = attention_mask[:, :kv_length].bool()
        return torch.nn.functional.pad(padding, (0, kv_length - padding.shape[-1]), value=False)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **{**kwargs, "allow_is_causal_skip": False},
    )


def key_validity(mask: Tensor | None) -> Tensor | None:
    """Which cached tokens are real: bool `[batch, keys]`, or None if all are, or if the mask does not tell.

    A full mask tells only where all tokens are queries: one that hides old tokens from new ones does not make them
    padding.
    """
    if mask is None or mask.ndim == 2:
        return mask
    if mask.shape[-1] != mask.shape[-2]:
        return None
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return visible.any(dim=-2).any(dim=1)


class Visibility:
    """Which keys each query sees, served segment by segment.

    Masks come as bool (False hides) or as floats to be added, in the shapes of `attention_mask` above or as the
    user's own `[batch or 1, heads or 1, queries, keys]`.
    """

    def __init__(self, mask: Tensor | None, queries: int, keys: int, device: torch.device) -> None:
        if mask is not None and mask.dtype != torch.bool and (mask.ndim == 2 or not mask.is_floating_point()):
            raise ValueError(
                f"an attention mask of {mask.ndim} dimensions and {mask.dtype} is ambiguous; "
                "pass bool (False hides) or, with 4 dimensions, floats to be added"
            )
        self.keys = keys
        self._mask, self._queries, self._device = mask, queries, device

    def hide(self, scores: Tensor, start: int) -> Tensor:
        """Mask `scores [batch, kv_heads, query_heads_per_kv_head, queries, n]` of the keys from `start` on."""
        stop = start + scores.shape[-1]
        if self._mask is not None and self._mask.ndim == 4:
            return _apply(scores, self._mask[..., start:stop])
        if self._mask is not None:
            scores = scores.masked_fill(~self._mask[:, None, None, None, start:stop], -torch.inf)
        if self._queries > 1 and stop - 1 > self.keys - self._queries:
            scores = scores.masked_fill(torch.arange(start, stop, device=self._device) > self._last_seen(), -torch.inf)
        return scores

    def hide_at(self, scores: Tensor, positions: Tensor) -> Tensor:
        """The same for keys at `positions [batch, n]`."""
        if self._mask is not None and self._mask.ndim == 4:
            heads, queries = self._mask.shape[1:3]
            index = positions[:, None, None].expand(-1, heads, queries, -1)
            return _apply(scores, self._mask.expand(len(positions), -1, -1, -1).gather(-1, index))
        hidden = positions[:, None, None, None] > self._last_seen()
        if self._mask is not None:
            hidden = hidden | ~self._mask.expand(len(positions), -1).gather(1, positions)[:, None, None, None]
        return scores.masked_fill(hidden, -torch.inf)

    @property
    def boolean(self) -> bool:
        """Whether all heads see alike, and keys are either seen or not."""
        mask = self._mask
        return mask is None or (mask.dtype == torch.bool and (mask.ndim == 2 or mask.shape[1] == 1))

    @property
    def causal(self) -> bool:
        """Whether queries see no newer keys, beside what the mask says."""
        return self._mask is None or self._mask.ndim == 2

    def seen(self, start: int, stop: int) -> Tensor | None:
        """What the mask shows of the keys `[start, stop)`, if `boolean`: `[batch or 1, queries or 1, n]`, None: all."""
        if self._mask is None:
            return None
        return self._mask[:, None, start:stop] if self._mask.ndim == 2 else self._mask[:, 0, :, start:stop]

    def seen_at(self, positions: Tensor) -> Tensor | None:
        """The same for keys at `positions [batch, n]`, older than all queries."""
        seen = self.seen(0, self.keys)
        if seen is None:
            return None
        index = positions[:, None].expand(-1, seen.shape[1], -1)
        return seen.expand(len(positions), -1, -1).gather(-1, index)

    def tile(self, start: int, stop: int) -> "Visibility":
        """The same for queries `[start, stop)` of these, and `keys` as far as any of them may see."""
        mask, keys = self._mask, self.keys - self._queries + stop
        if mask is not None and mask.ndim == 4:
            # who sees whom is the mask's alone to say; one row says it of all queries
            mask, keys = mask if mask.shape[-2] == 1 else mask[..., start:stop, :], self.keys
        elif mask is not None:
            mask = mask[:, :keys]
        return Visibility(mask, stop - start, keys, self._device)

    def dense(self, batch: int) -> Tensor | None:
        """Bool or additive `[batch, 1, queries, keys]` for SDPA; None where its own causal rule does."""
        if self._mask is not None and self._mask.ndim == 4:
            return self._mask
        causal = None
        if self._queries > 1 and (self._mask is not None or self._queries != self.keys):
            causal = torch.arange(self.keys, device=self._device) <= self._last_seen()
        if self._mask is None:
            return causal
        padding = self._mask[:, None, None]
        return (padding if causal is None else padding & causal).expand(batch, 1, self._queries, -1)

    def _last_seen(self) -> Tensor:
        return torch.arange(self.keys - self._queries, self.keys, device=self._device)[:, None]


def _apply(scores: Tensor, mask: Tensor) -> Tensor:
    # [batch, heads, queries, n] -> [batch, kv_heads or 1, per kv head or 1, queries, n]
    mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, scores.shape[1:3])
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
