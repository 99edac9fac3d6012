"""Exact copies in host memory, from which packed tokens are made wider again."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.format import Side
from .store import compact


class HostCopy:
    """The exact states of the packed tokens of one layer, both sides, in host memory.

    On CUDA they are pinned, and copied on a stream of their own while the model goes on. Where host memory runs out,
    the copies are let go with a warning, and the object says so: `lost`.
    """

    def __init__(self) -> None:
        self.lost = False
        self.to_host = self.from_host = 0
        """Bytes copied so far."""
        self._buffers: dict[Side, Tensor] = {}
        self._tokens = 0
        self._order: Tensor | None = None
        """Which row of the buffers each batch row is; None: they are in order."""
        self._stream: torch.cuda.Stream | None = None

    def append(self, states: dict[Side, Tensor]) -> None:
        """Copy the exact tokens `[batch, kv_heads, n, dim]` that come next."""
        self._settle()
        count = states["key"].shape[2]
        reserved = self._tried(lambda: {side: self._reserved(side, new, count) for side, new in states.items()})
        if reserved is None:
            return
        self._buffers = reserved
        for side, new in states.items():
            self._copy(self._buffers[side][:, :, self._tokens : self._tokens + count], new)
            self.to_host += new.numel() * new.element_size()
        self._tokens += count

    def read(self, side: Side, rows: Tensor, heads: Tensor | None, tokens: Tensor) -> Tensor:
        """Exact states of the tokens at `rows, heads, tokens [n]`: `[n, dim]`, or `[n, kv_heads, dim]` of all heads."""
        self.wait()
        device = tokens.device
        buffer = self._buffers[side]
        rows, tokens = rows.to(buffer.device), tokens.to(buffer.device)
        rows = rows if self._order is None else self._order[rows]
        found = buffer[rows, :, tokens] if heads is None else buffer[rows, heads.to(buffer.device), tokens]
        self.from_host += found.numel() * found.element_size()
        return found.to(device)

    def lose(self, reason: str) -> None:
        """Let go of the copies; tokens stay as wide as they are, or become narrower."""
        warnings.warn(
            f"host memory for exact copies ran out ({reason}); going on as with host_copy=False: packed tokens can "
            "become narrower, not wider. Nothing that the cache holds is lost",
            stacklevel=2,
        )
        self.lost = True
        self._buffers, self._tokens, self._order = {}, 0, None

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens, and give the memory of the others back."""
        if tokens < self._tokens:
            self._tokens = tokens
            self._replace(lambda states: states[:, :, :tokens])

    def reorder(self, rows: Tensor) -> None:
        """Batch row `i` becomes the old row `rows[i]`; nothing is copied before tokens are appended."""
        if self._buffers:
            rows = rows.cpu()
            self._order = rows if self._order is None else self._order[rows]

    def state(self) -> dict[Side, Tensor]:
        """The copies, `[batch, kv_heads, tokens, dim]`, by side."""
        self._settle()
        self.wait()
        return {side: buffer[:, :, : self._tokens] for side, buffer in self._buffers.items()}

    def restore(self, states: dict[Side, Tensor], counts: dict[str, int | bool]) -> None:
        """Hold what `state` gave, now on the model's device, and count on from `lost`, `to_host` and `from_host`."""
        if states and states["key"].shape[2]:
            self.append(states)
        lost = self.lost
        for name, count in counts.items():
            setattr(self, name, count)
        self.lost |= lost

    def held_bytes(self) -> int:
        """Bytes of the storages, spare capacity included."""
        order = [] if self._order is None else [self._order]
        return sum(tensor.untyped_storage().nbytes() for tensor in [*self._buffers.values(), *order])

    def wait(self) -> None:
        """Until all copies have arrived."""
        if self._stream is not None:
            self._stream.synchronize()

    def __deepcopy__(self, memo: dict[int, object]) -> "HostCopy":
        copied = HostCopy()
        copied.lost, copied.to_host, copied.from_host = self.lost, self.to_host, self.from_host
        copied._buffers, copied._tokens, copied._order = dict(self._buffers), self._tokens, self._order
        self.wait()
        copied._replace(lambda states: states)
        return copied

    def _settle(self) -> None:
        """Put the rows in their order, if they are in another."""
        if self._order is not None:
            order, self._order = self._order, None
            self._replace(lambda states: states[order])

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Hold a changed copy of the tokens, in memory of its own."""
        self.wait()
        changed = self._tried(
            lambda: {
                side: _pinned_like(b, compact(change(b[:, :, : self._tokens]))) for side, b in self._buffers.items()
            }
        )
        if changed is not None:
            self._buffers = changed

    def _tried(self, make: Callable[[], dict[Side, Tensor]]) -> dict[Side, Tensor] | None:
        """New buffers, or None and nothing held any more where there is no memory for them."""
        if self.lost:
            return None
        try:
            return make()
        except (MemoryError, RuntimeError) as error:
            self.lose(str(error))
            return None

    def _reserved(self, side: Side, like: Tensor, count: int) -> Tensor:
        """The buffer with room for `count` more tokens such as `like [batch, kv_heads, ..., dim]`."""
        old = self._buffers.get(side)
        tokens = self._tokens + count
        if old is not None and tokens <= old.shape[2]:
            return old
        if old is not None:
            tokens = max(tokens, old.shape[2] + old.shape[2] // 32)
        shape = (*like.shape[:2], tokens, like.shape[3])
        with torch.inference_mode(False):
            grown = torch.empty(shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
        if old is not None:
            self.wait()
            grown[:, :, : self._tokens] = old[:, :, : self._tokens]
        return grown

    def _copy(self, place: Tensor, states: Tensor) -> None:
        if states.device.type != "cuda":
            place.copy_(states)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(states.device)
        self._stream.wait_stream(torch.cuda.current_stream(states.device))
        with torch.cuda.stream(self._stream):
            # a strided copy to the host would wait: one head of one row at a time is contiguous
            for row, source in zip(place.flatten(0, 1), states.contiguous().flatten(0, 1), strict=True):
                row.copy_(source, non_blocking=True)
        states.record_stream(self._stream)


def _pinned_like(old: Tensor, new: Tensor) -> Tensor:
    return new.pin_memory() if old.is_pinned() else new
