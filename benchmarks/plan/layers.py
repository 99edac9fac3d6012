"""Bytes that one layer holds, by kind, as functions of its tokens: what `core/hf` allocates, without allocating.

All are plain data, and equal where layers are alike, so that a model of eighty layers takes one or two computations.
The kinds are the rows of `PackedCache.memory()`.
"""

from dataclasses import dataclass
from typing import Protocol

from ...core.hf.adaptive import MEASURED_QUERIES
from ...core.pools import ROWS
from .growth import Filling, host_capacity, store_capacity, tail_capacity
from .mixes import Mix

Sizes = tuple[tuple[str, int], ...]
"""Kinds and bytes."""

HOST_KINDS = frozenset({"host copy"})
"""What lies in host memory."""

INDEX = 8
"""Bytes of an index of torch."""


class LayerBytes(Protocol):
    """One layer of a cache."""

    def held(self, tokens: int, filling: Filling, prompt: int) -> dict[str, int]:
        """Bytes by kind of `tokens` tokens per row, the first `prompt` of which came at once where filling is steps."""
        ...


@dataclass(frozen=True)
class Tail:
    """A layer that stays exact in the packed cache, whose strategy leaves it out."""

    token: int
    """Bytes of a token of all rows and heads, keys and values, in the model's dtype."""

    def held(self, tokens: int, filling: Filling, prompt: int) -> dict[str, int]:
        """See `LayerBytes`."""
        return {"tail": tokens * self.token, "spare": (tail_capacity(tokens) - tokens) * self.token}


@dataclass(frozen=True)
class HostLayer:
    """A layer that transformers keeps: skipped, sliding window, linear, or empty."""

    token: int
    window: int | None
    fixed: int
    """Bytes whatever the length."""
    growing: int
    """Bytes per token beside keys and values."""

    def held(self, tokens: int, filling: Filling, prompt: int) -> dict[str, int]:
        """See `LayerBytes`. What a sliding window keeps of a prompt lies in the prompt's memory until the next step."""
        whole = self.window is None or filling == "prompt" or (filling == "steps" and prompt >= tokens)
        held = tokens if whole or self.window is None else min(tokens, self.window)
        return {"host layers": held * self.token + self.fixed + tokens * self.growing}


@dataclass(frozen=True)
class Blocks:
    """A `BlockLayer`: sinks, packed blocks, exact tail."""

    block: int
    residual: int
    token: int
    packed: Sizes
    """Of a block of all rows and heads."""
    once: Sizes
    """As soon as there is a block: tables and sinks."""

    def held(self, tokens: int, filling: Filling, prompt: int) -> dict[str, int]:
        """See `LayerBytes`."""
        blocks = max(0, tokens - self.residual) // self.block
        tail = tokens - blocks * self.block
        if filling == "worst":
            tail = min(tokens, self.residual + self.block - 1)
        room = store_capacity(blocks, max(0, min(prompt, tokens) - self.residual) // self.block, filling)
        rows = _summed([(name, size * blocks) for name, size in self.packed])
        rows = _summed([*rows.items(), *(self.once if blocks else ())])
        spare = (room - blocks) * _whole(self.packed) + (tail_capacity(tail) - tail) * self.token
        return {**rows, "tail": tail * self.token, "spare": spare}


@dataclass(frozen=True)
class RowSizes:
    """The rows of one side: which widths the strategy may choose, and what one of each takes, sinks' included."""

    widths: tuple[int, ...]
    sizes: tuple[tuple[int, Sizes], ...]


@dataclass(frozen=True)
class Rows:
    """An `AdaptiveLayer`: pools of rows, each width its own, and exact tail."""

    batch: int
    owners: int
    heads: int
    """That arrive."""
    query_heads: int
    token: int
    """Bytes of a token of all rows and heads, keys and values, in the model's dtype."""
    key: RowSizes
    value: RowSizes
    drops: bool
    interval: int
    residual: int
    sinks: int
    window: int | None
    """Queries that the history is of; None: the sum of all."""
    noticed: int
    """Bytes of one number in it."""
    measured: int
    """Bytes of what the strategy measures on the prompt."""
    remembers_queries: bool
    """Whether it keeps a float of every query until then."""
    host_copy: bool
    indexed: bool
    """Whether pools keep the index that Triton's kernels read."""
    padded: bool
    mix: Mix

    def held(self, tokens: int, filling: Filling, prompt: int) -> dict[str, int]:
        """See `LayerBytes`."""
        first = min(prompt, tokens) if filling == "steps" else tokens
        first = first - self.residual if first - self.residual >= self.interval else 0
        packed = first + max(0, tokens - first - self.residual) // self.interval * self.interval
        tail = tokens - packed
        if filling == "worst":
            packed, tail = max(0, tokens - self.residual), min(tokens, self.residual + self.interval - 1)
        found = [*self._pools("key", self.key, packed, filling), *self._pools("value", self.value, packed, filling)]
        found += [("tail", tail * self.token), ("spare", (tail_capacity(tail) - tail) * self.token)]
        history = self._history(tokens, packed, tail, filling)
        found.append(("attention history", self.batch * self.heads * history * tokens * self.noticed))
        found.append(("widths", (self.measured if packed else 0) + (self.batch * tokens if self.padded else 0)))
        if self.remembers_queries and (not packed or filling == "worst"):
            # until the first decision; the worst case does not know when that was
            queries = min(tokens, MEASURED_QUERIES, self.residual + self.interval - 1)
            found.append(("widths", self.batch * self.query_heads * queries * 4))
        if self.host_copy:
            room = host_capacity(packed, first or min(packed, self.interval), self.interval, filling)
            found.append(("host copy", room * self.token))
        return _summed(found)

    def _pools(self, side: str, rows: RowSizes, packed: int, filling: Filling) -> list[tuple[str, int]]:
        """The pools of one side once `packed` tokens were decided about."""
        if not packed:
            return []
        sizes = dict(rows.sizes)
        counts = self.mix.counts(packed, self.residual, self.sinks, rows.widths, self.drops)
        found = [("widths", self.owners * packed)]
        for width, count in counts.items():
            blocks = -(-count // ROWS)
            found += [(f"{side} {name}", self.owners * count * size) for name, size in sizes[width]]
            found.append(("widths", self._places(blocks)))
            found.append(("spare", self.owners * (blocks * ROWS - count) * _whole(sizes[width])))
        if filling == "worst" or self.mix.kind == "most":
            # tokens that have another width begin a block of it
            for width in sizes.keys() - counts.keys():
                found.append(("widths", self._places(1)))
                found.append(("spare", self.owners * (ROWS - 1) * _whole(sizes[width])))
        return found

    def _places(self, blocks: int) -> int:
        """Bytes that say where the rows of so many blocks of every owner are."""
        index = 4 * (self.owners * blocks * ROWS + self.owners + 1) if self.indexed else 0
        return self.owners * blocks * INDEX + index

    def _history(self, tokens: int, packed: int, tail: int, filling: Filling) -> int:
        """Rows of the attention history."""
        if self.window is None:
            return min(tokens, 1)
        if not self.window:
            return 0
        if filling == "worst":
            return min(tokens, self.window if self.window > self.interval else self.window - 1)
        since = tail - self.residual if packed else tail
        before = max(0, self.window - self.interval) if packed else 0
        ahead = self.interval if packed else self.interval + self.residual
        return min(self.window, before + max(0, since - max(0, ahead - self.window)))


def _whole(sizes: Sizes) -> int:
    return sum(size for _, size in sizes)


def _summed(sizes: list[tuple[str, int]]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for name, size in sizes:
        rows[name] = rows.get(name, 0) + size
    return rows
