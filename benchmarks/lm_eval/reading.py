"""What an evaluation read of the cache: a score says nothing about a cache that was not read."""

from collections import Counter
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

from ...core.hf.layer import PackedLayer
from ..held import Memory, weigh

Protocol = Literal["decode", "stream", "paper"]


class Reading(BaseModel):
    """How the scores of an evaluation came about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: Protocol
    tokens: int
    """Tokens that were scored or generated."""
    packed_share: float
    """Of all the tokens that those attended to, the share that was read packed (or dropped), 0 to 1; layers average."""
    memory: Memory | None
    """What the cache held at the end of the largest batch; None where none was packed, as in simulations."""
    rows: int
    """Sequences of that batch."""


class Meter:
    """Adds up what is read while an evaluation runs."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tokens = self._rows = 0
        self._seen = self._packed = 0.0
        self._memory: Memory | None = None
        self._largest = 0

    def add(self, packed: list[tuple[Tensor, int]], starts: Tensor, positions: Tensor, counted: Tensor) -> None:
        """Count queries at `positions [n]` of rows that begin at `starts [batch]`, those that are `counted [batch, n]`.

        packed: per layer, how many of the first tokens each query reads packed, `[n]`, and how many sinks of these it
            reads exact.
        """
        begin = starts[:, None]
        self._tokens += int(counted.sum())
        self._seen += float((counted * (positions + 1 - begin)).sum())
        # most layers of a model are alike
        alike = Counter((tuple(tokens.tolist()), sinks) for tokens, sinks in packed)
        for (tokens, sinks), layers in alike.items():
            read = (torch.tensor(tokens) - begin - sinks).clamp(min=0)
            self._packed += float((counted * read).sum()) * layers / len(packed)

    def weigh(self, cache: Cache, rows: int) -> None:
        """Remember what a cache holds, if it is the largest so far."""
        size = rows * int(cache.get_seq_length())
        if size > self._largest:
            self._largest, self._rows = size, rows
            self._memory = weigh(cache, self._model, rows)[1]

    def read(self, protocol: Protocol) -> Reading:
        """What was added up."""
        return Reading(
            protocol=protocol,
            tokens=self._tokens,
            packed_share=self._packed / self._seen if self._seen else 0.0,
            memory=self._memory,
            rows=self._rows,
        )


def packed_by_layer(cache: Cache, queries: int) -> list[tuple[Tensor, int]]:
    """What `queries` tokens fed next will read packed: for `Meter.add`."""
    found = []
    for layer in cache.layers:
        tokens = sinks = 0
        if isinstance(layer, PackedLayer):
            tokens, sinks = layer.packed_tokens, layer.options.sink_tokens
        elif isinstance(layer, QuantizedLayer) and layer.is_initialized:
            residual: Any = layer.keys  # empty, and without dimensions, where all is packed
            tokens = int(layer.get_seq_length()) - (residual.shape[-2] if residual.dim() == 4 else 0)
        found.append((torch.full((queries,), tokens), sinks))
    return found
