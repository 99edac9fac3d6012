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
        self._stream: torch.cuda.Stream | None = None

    def append(self, states: dict[Side, Tensor]) -> None:
        """Copy the exact tokens `[batch, kv_heads, n, dim]` that come next."""
        if self.lost:
            return
        count = states["key"].shape[2]
        try:
            for side, new in states.items():
                self._reserve(side, new, self._tokens + count)
        except (MemoryError, RuntimeError) as error:
            self.lose(str(error))
            return
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
        self._buffers, self._tokens = {}, 0

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens, and give the memory of the others back."""
        if tokens < self._tokens:
            self.wait()
            self._tokens = tokens
            self._buffers = {
                side: _pinned_like(buffer, compact(buffer[:, :, :tokens])) for side, buffer in self._buffers.items()
            }

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension, made for tensors on any device."""
        self.wait()
        self._buffers = {
            side: _pinned_like(old, compact(change(states)))
            for (side, old), states in zip(self._buffers.items(), self.state().values(), strict=True)
        }

    def state(self) -> dict[Side, Tensor]:
        """The copies, `[batch, kv_heads, tokens, dim]`, by side."""
        self.wait()
        return {side: buffer[:, :, : self._tokens] for side, buffer in self._buffers.items()}

    def restore(self, states: dict[Side, Tensor], counts: dict[str, int | bool]) -> None:
        """Hold what `state` gave, now on the model's device, and count on from `lost`, `to_host` and `from_host`."""
        if states and states["key"].shape[2]:
            self.append(states)
        for name, count in counts.items():
            setattr(self, name, count)

    def held_bytes(self) -> int:
        """Bytes of the storages, spare capacity included."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers.values())

    def wait(self) -> None:
        """Until all copies have arrived."""
        if self._stream is not None:
            self._stream.synchronize()

    def __deepcopy__(self, memo: dict[int, object]) -> "HostCopy":
        self.wait()
        copied = HostCopy()
        copied.lost, copied.to_host, copied.from_host, copied._tokens = (
            self.lost,
            self.to_host,
            self.from_host,
            self._tokens,
        )
        copied._buffers = {side: _pinned_like(buffer, buffer.clone()) for side, buffer in self._buffers.items()}
        return copied

    def _reserve(self, side: Side, like: Tensor, tokens: int) -> None:
        old = self._buffers.get(side)
        capacity = 0 if old is None else old.shape[2]
        if tokens <= capacity:
            return
        if old is not None:
            tokens = max(tokens, capacity + capacity // 32)
        shape = (*like.shape[:2], tokens, like.shape[3])
        with torch.inference_mode(False):
            grown = torch.empty(shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
        if old is not None:
            self.wait()
            grown[:, :, : self._tokens] = old[:, :, : self._tokens]
        self._buffers[side] = grown

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
