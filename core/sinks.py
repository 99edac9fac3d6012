"""Attention sinks: the first real tokens of each batch row, exact, beside the codes that attention then skips."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.format import Side
from .store import allocate, compact


class Sinks:
    """The sinks of one layer: immutable, replaced as a whole when blocks are packed.

    Where rows are left-padded they begin at different tokens, so positions are per row. A sink whose token has not
    been packed yet is still in the exact tail, and not present here.
    """

    def __init__(self, count: int, first: Tensor | None = None, states: dict[Side, Tensor] | None = None) -> None:
        self.count = count
        self.first = first
        """Index of each row's first real token, `[batch]`; None: 0 for all."""
        self.states = states or {}
        """Exact states `[batch, kv_heads, count, dim]`, keys as stored."""

    def __bool__(self) -> bool:
        return bool(self.states)

    def positions(self) -> Tensor:
        """Token indices `[batch, count]`."""
        states = self.states["key"]
        return _positions(self.count, self.first, states.shape[0], states.device)

    def advance(self, leaving: dict[Side, Tensor], past: int, validity: Tensor | None) -> tuple["Sinks", Tensor | None]:
        """The sinks once tokens `leaving [batch, kv_heads, n, dim]`, from index `past` on, leave the exact tail.

        validity: bool `[batch, keys]` of all tokens so far, or None if all are real.

        Returns them, and which of the leaving tokens statistics may include: bool `[batch, n]`, None for all.
        """
        batch, _, tokens, _ = leaving["key"].shape
        valid = None if validity is None else validity.expand(batch, -1)[:, past : past + tokens]
        if not self.count:
            return self, valid
        first = self.first_real(past, validity, batch)
        local = _positions(self.count, first, batch, leaving["key"].device) - past
        entering = (local >= 0) & (local < tokens)
        states = {}
        for side, source in leaving.items():
            index = local.clamp(0, tokens - 1)[:, None, :, None].expand(-1, source.shape[1], -1, source.shape[3])
            old = self.states.get(side)
            if old is None:
                old = allocate(source, tuple(index.shape)).zero_()
            states[side] = compact(torch.where(entering[:, None, :, None], source.gather(2, index), old))
        if entering.any():
            is_sink = (torch.arange(tokens, device=local.device)[None, :, None] == local[:, None, :]).any(-1)
            valid = ~is_sink if valid is None else valid & ~is_sink
        return Sinks(self.count, first, states), valid

    def first_real(self, past: int, validity: Tensor | None, batch: int) -> Tensor | None:
        """`first` once tokens from index `past` on leave the exact tail; arguments as for `advance`."""
        known = self.first if past else None
        if validity is None or (past and known is None):
            return known
        validity = validity.expand(batch, -1)
        found = torch.where(validity.any(-1), validity.int().argmax(-1), validity.shape[-1])
        # a row that had begun before keeps its beginning, whatever this forward's mask hides
        return found if known is None else torch.where(known < past, known, found)

    def covers(self, start: int, stop: int) -> Tensor | None:
        """Packed tokens of `[start, stop)` that the sinks replace, or that precede them: bool `[batch, n]`, or None."""
        if not self or (self.first is None and start >= self.count):
            return None
        positions = self.positions()
        return torch.arange(start, stop, device=positions.device) <= positions[:, -1:]

    def restore(self, states: Tensor, side: Side, start: int, packed: int) -> None:
        """Put the sinks among the `packed` tokens into decoded `states` of the tokens from `start` on, in place."""
        if not self:
            return
        positions = self.positions()
        inside = (positions >= start) & (positions < min(start + states.shape[2], packed))
        rows, slots = inside.nonzero(as_tuple=True)
        states[rows, :, positions[rows, slots] - start] = self.states[side][rows, :, slots].to(states.dtype)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Sinks":
        """Sinks with a changed batch dimension."""
        first = None if self.first is None else compact(change(self.first))
        return Sinks(self.count, first, {side: compact(change(states)) for side, states in self.states.items()})

    def held_bytes(self) -> int:
        """Bytes of the storages."""
        held = [*self.states.values(), *([] if self.first is None else [self.first])]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


def _positions(count: int, first: Tensor | None, batch: int, device: torch.device) -> Tensor:
    offsets = torch.arange(count, device=device)
    return offsets.expand(batch, -1) if first is None else first[:, None] + offsets
