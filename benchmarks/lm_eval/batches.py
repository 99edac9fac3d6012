"""Which sequences share a batch, and where each lies in it, so that a batch gives what each row gives alone.

A packed cache counts its blocks from the first column of a batch. A row that is shifted by whole blocks is packed as it
is alone; shifted otherwise, other tokens would share scales, and other tokens would be packed when it is scored.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

# tokens per forward where it makes no difference: bounds the logits that are held
LONGEST_CHUNK = 512

UNSCORED = -1


class Grid(BaseModel):
    """What a cache asks of batches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block: int | None
    """Rows may be shifted by multiples of this many tokens; None: not at all."""
    chunk: int
    """Tokens fed at a time through the cache give what tokens fed alone give, if the chunks end where blocks end."""
    residual: int = 0
    """Newest tokens that the cache keeps exact: blocks end this many tokens late."""
    alone: bool = False
    """Whether rows influence each other, as where a strategy fits itself to the first tokens it packs."""

    def steps(self, start: int, stop: int) -> Iterator[slice]:
        """Columns `[start, stop)` chunk by chunk."""
        while start < stop:
            # nothing is packed before one block is there beside the residual
            end = max(start + self.chunk - (start - self.residual) % self.chunk, self.residual + self.chunk)
            end = min(end, stop, start + LONGEST_CHUNK)
            yield slice(start, end)
            start = end


class Row(NamedTuple):
    """A continuation to score after a context; both have tokens."""

    request: int
    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def fed(self) -> tuple[int, ...]:
        """All but the last token, which is only predicted."""
        return (*self.context, *self.continuation[:-1])


class Layout(NamedTuple):
    """A batch as tensors; columns before a row's start and after its end are padding."""

    ids: Tensor
    """int64 `[batch, columns]`."""
    targets: Tensor
    """The next token where it is scored, else -1: int64 `[batch, columns]`."""
    starts: Tensor
    """Column of each row's first token, int64 `[batch]`."""
    ends: Tensor
    """Column after each row's last token, int64 `[batch]`."""

    @property
    def scored_from(self) -> int:
        """The first column with a target."""
        return int((self.targets != UNSCORED).any(0).int().argmax())

    @property
    def positions(self) -> Tensor:
        """Position of each token in its row, 0 where padding precedes it: int64 `[batch, columns]`."""
        return (torch.arange(self.ids.shape[1]) - self.starts[:, None]).clamp(min=0)

    def begun(self, columns: int) -> Tensor:
        """Mask of the first `columns` columns that hides what precedes the rows; nothing scored sees what follows."""
        return (torch.arange(columns) >= self.starts[:, None]).long()


def batched(rows: Sequence[Row], size: int, grid: Grid) -> Iterator[list[Row]]:
    """All rows, in batches of at most `size` whose contexts end in one column though rows begin at whole blocks."""
    alike: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        alike[len(row.context) % grid.block if grid.block else len(row.context)].append(row)
    for key in sorted(alike, reverse=True):
        # rows of one context stand together, the longest first: what does not fit in memory shows at once
        ordered = sorted(alike[key], key=lambda row: (-len(row.context), row.context, -len(row.continuation)))
        step = 1 if grid.alone else size
        yield from (ordered[start : start + step] for start in range(0, len(ordered), step))


def aligned(rows: Sequence[Row]) -> Layout:
    """Contexts end in one column: shorter ones are padded on the left."""
    longest = max(len(row.context) for row in rows)
    return _laid_out(rows, [longest - len(row.context) for row in rows], 1)


def flush(rows: Sequence[Row], multiple: int) -> Layout:
    """Rows begin in the first column, and columns are a multiple."""
    return _laid_out(rows, [0] * len(rows), multiple)


def _laid_out(rows: Sequence[Row], starts: list[int], multiple: int) -> Layout:
    ends = [start + len(row.fed) for start, row in zip(starts, rows, strict=True)]
    columns = -(-max(ends) // multiple) * multiple
    ids = torch.zeros(len(rows), columns, dtype=torch.long)
    targets = torch.full_like(ids, UNSCORED)
    for i, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        ids[i, start:end] = torch.tensor(row.fed)
        targets[i, end - len(row.continuation) : end] = torch.tensor(row.continuation)
    return Layout(ids, targets, torch.tensor(starts), torch.tensor(ends))
