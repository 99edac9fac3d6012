"""Streaming-exact simulation: one forward that gives the logits of decoding through the packed cache.

Query `i` of a teacher-forced forward sees those tokens as what their codes stand for that its forward of the streamed
run would find packed, and the others exact. It equals feeding the same tokens chunk by chunk through a `PackedCache`,
to rounding, and costs one forward. It does not hold for strategies that encode a token again later.

With `every_token` it is the protocol of papers instead, for comparison with their figures: nothing is seen exact.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...kernels.attention import dense_partial, merge
from ...kernels.format import Side
from ..adaptive import AdaptiveStrategy
from ..protocol import CacheQuantizer
from .blocks import BlockLayer
from .cache import PackedCache
from .handles import LazyStates
from .masks import key_validity
from .segments import Scoring, fold

QUERY_TILE = 256


class SimulatedCache(PackedCache):
    """Pass to one forward over whole sequences: `model(ids, past_key_values=SimulatedCache(model, strategy))`.

    prefill: tokens of the first forward of the streamed run, which attends exactly; 0 means one chunk.
    chunk: tokens of each later forward; 1 is token-by-token decoding.

    every_token: the evaluation that papers such as KVQuant (https://arxiv.org/abs/2401.18079) report. Every query reads
        every token, itself included, as what its codes stand for; only sinks stay exact. `residual_length` is then 0,
        and sequences are whole blocks: a block that is not full could not be packed as it would be later.

    The other options are those of `PackedCache`. A second forward raises RuntimeError.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        strategy: CacheQuantizer,
        *,
        prefill: int = 0,
        chunk: int = 1,
        every_token: bool = False,
        residual_length: int | None = None,
        sink_tokens: int | None = None,
        skip_layers: Iterable[int] | None = None,
    ) -> None:
        if isinstance(strategy, AdaptiveStrategy):
            raise ValueError(
                f"{strategy.name!r} packs tokens again while decoding, which one forward cannot show; stream the text "
                "through a PackedCache"
            )
        if chunk < 1 or prefill < 0:
            raise ValueError(f"chunk={chunk} must be at least 1 and prefill={prefill} at least 0")
        if every_token:
            if prefill or chunk != 1 or residual_length:
                raise ValueError(
                    f"every_token=True leaves nothing exact and has no schedule, got prefill={prefill}, chunk={chunk}, "
                    f"residual_length={residual_length}; leave them out"
                )
            residual_length = 0
        self._schedule = (prefill or chunk, chunk, every_token)
        super().__init__(
            model, strategy, residual_length=residual_length, sink_tokens=sink_tokens, skip_layers=skip_layers
        )

    def _layer(self, *arguments: Any) -> BlockLayer:
        return _SimulatedLayer(*self._schedule, *arguments)


class _SimulatedLayer(BlockLayer):
    """Holds every token twice: packed as far as the end of the run would have it, and exact in the tail."""

    def __init__(self, prefill: int, chunk: int, every_token: bool, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._prefill, self._chunk, self._every_token = prefill, chunk, every_token

    def get_seq_length(self) -> int:
        return self.tails["key"].length if self.is_initialized else 0

    def truncate(self, length: int) -> None:
        raise RuntimeError("a SimulatedCache serves one forward over whole sequences and cannot be cut")

    def reads_packed(self, key: LazyStates) -> bool:
        return True

    def _store(self, key_states: Tensor, value_states: Tensor) -> dict[Side, Tensor]:
        if self.get_seq_length():
            raise RuntimeError("a SimulatedCache serves one forward over whole sequences; make a new one for the next")
        tokens, block = key_states.shape[2], self.formats.block
        if self._every_token and tokens % block:
            raise ValueError(
                f"every_token=True needs whole blocks of {block} tokens, the sequence has {tokens}; "
                f"use {tokens // block * block or block}"
            )
        states: dict[Side, Tensor] = {"key": key_states, "value": value_states}
        packing = max(0, tokens - self.options.residual_length) // block * block
        if packing:
            leaving: dict[Side, Tensor] = {side: new[:, :, :packing] for side, new in states.items()}
            self.sinks, valid = self.sinks.advance(leaving, 0, key_validity(self._mask))
            self.tables = self._fitted(leaving, valid)
            for side, old in leaving.items():
                self.stores[side].append(self._encode(old, side, valid, self.tables[side]))
        for side, new in states.items():
            self.tails[side].append(new)
        return states

    def attend(self, query: Tensor, key: LazyStates, value: LazyStates, scoring: Scoring) -> Tensor:
        rows = fold(query, self.kv_heads, scoring.scaling).unflatten(2, (-1, query.shape[2]))
        exact_key, exact_value = key.rotated_exact().to(rows.dtype), value.exact.to(rows.dtype)
        packed_key, packed_value = exact_key[:, :, :0], exact_value[:, :, :0]
        if self.packed_tokens:
            packed_key, packed_value = (self._dequantized(side, rows.dtype) for side in ("key", "value"))
        outputs = []
        for start in range(0, query.shape[2], QUERY_TILE):
            stop = min(start + QUERY_TILE, query.shape[2])
            tile = rows[:, :, :, start:stop].flatten(2, 3)
            packed = min(stop, self.packed_tokens)
            queries = stop - start
            band = torch.arange(stop, device=query.device) < self._packed_before(start, stop)[:, None]
            seen = scoring.visibility.tile(start, stop)
            parts = []
            for keys, values, mask in (
                (packed_key[:, :, :packed], packed_value[:, :, :packed], band[:, :packed]),
                (exact_key[:, :, :stop], exact_value[:, :, :stop], ~band),
            ):
                if not mask.any():
                    continue
                scores = seen.hide(scoring.scores(tile, keys, queries), 0).masked_fill(~mask, -torch.inf)
                parts.append(dense_partial(scores.flatten(2, 3), values))
            total = parts[0] if len(parts) == 1 else merge(*parts)
            outputs.append(scoring.finish(total, self.kv_heads, query[:, :, start:stop]))
        return torch.cat(outputs, dim=2)

    def _dequantized(self, side: Side, dtype: torch.dtype) -> Tensor:
        states = self._decode(self.stores[side].read(), side, dtype)
        states = self.rotated(states, 0) if side == "key" else states
        # sinks come from the exact side: rotated in the model's dtype, as the packed cache does
        hidden = self.sinks.covers(0, self.packed_tokens)
        if hidden is None:
            return states
        exact = self.tails[side].read()[:, :, : self.packed_tokens]
        exact = self.rotated(exact, 0) if side == "key" else exact
        return torch.where(hidden[:, None, :, None], exact.to(dtype), states)

    def _packed_before(self, start: int, stop: int) -> Tensor:
        """How many tokens each of the queries `[start, stop)` reads as packed."""
        query = torch.arange(start, stop, device=self.device)
        if self._every_token:
            return torch.full_like(query, self.packed_tokens)
        begin = query - (query - self._prefill) % self._chunk  # of the forward that runs the query
        packed = (begin - self.options.residual_length).clamp(min=0) // self.formats.block * self.formats.block
        return torch.where(query < self._prefill, 0, packed)
