"""Buffers that grow along the sequence: packed blocks, and the exact tail. They know no format and no strategy."""

from collections.abc import Callable

import torch
from torch import Tensor

TAIL_STEP = 32


class PackedStore:
    """Named tensors `[batch, kv_heads, blocks, ...]` of one side of one layer, contiguous, with spare capacity.

    Spare capacity is at most one block or 1/32 of the blocks: appending copies the buffer rarely enough to be
    negligible beside the decode steps in between, each of which reads all of it.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self._buffers: dict[str, Tensor] = {}

    def append(self, packed: dict[str, Tensor]) -> None:
        """Append blocks that `require_fitting` accepts."""
        self.require_fitting(packed)
        count = next(iter(packed.values())).shape[2]
        self._reserve(packed, self.blocks + count)
        for name, tensor in packed.items():
            self._buffers[name][:, :, self.blocks : self.blocks + count] = tensor
        self.blocks += count

    def require_fitting(self, packed: dict[str, Tensor]) -> None:
        """Raise ValueError unless `packed` has the names held and one number of blocks, dim 2, throughout."""
        counts = {name: tensor.shape[2] for name, tensor in packed.items()}
        if len(set(counts.values())) != 1 or (self._buffers and counts.keys() != self._buffers.keys()):
            raise ValueError(
                f"encode returned {counts} blocks by name, the store holds {sorted(self._buffers)}; "
                "return the same names each time, all with dim 2 equal to the number of blocks"
            )

    def read(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """Views of blocks `[start, stop)`."""
        stop = self.blocks if stop is None else stop
        return {name: buffer[:, :, start:stop] for name, buffer in self._buffers.items()}

    def truncate(self, blocks: int) -> None:
        """Keep the first `blocks` blocks and give the memory of the others back."""
        if blocks < self.blocks:
            self.blocks = blocks
            self._buffers = {name: compact(buffer[:, :, :blocks]) for name, buffer in self._buffers.items()}

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension to the blocks held."""
        self._buffers = {name: compact(change(tensor)) for name, tensor in self.read().items()}

    def tensors(self) -> list[Tensor]:
        """The buffers, spare capacity included."""
        return list(self._buffers.values())

    def used_bytes(self) -> dict[str, int]:
        """Bytes of the blocks held, by name."""
        return {name: tensor.numel() * tensor.element_size() for name, tensor in self.read().items()}

    def held_bytes(self) -> int:
        """Bytes of the storages behind the blocks, spare capacity included."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.tensors())

    def _reserve(self, like: dict[str, Tensor], blocks: int) -> None:
        capacity = next((buffer.shape[2] for buffer in self._buffers.values()), 0)
        if blocks <= capacity:
            return
        if capacity:
            blocks = max(blocks, capacity + max(1, capacity // 32))
        for name, tensor in like.items():
            grown = allocate(tensor, (*tensor.shape[:2], blocks, *tensor.shape[3:]))
            if capacity:
                grown[:, :, : self.blocks] = self._buffers[name][:, :, : self.blocks]
            self._buffers[name] = grown


class ExactTail:
    """The newest tokens of one side of one layer, in the model's dtype: `[batch, kv_heads, length, dim]`."""

    def __init__(self, like: Tensor) -> None:
        self.length = 0
        self._buffer = allocate(like, (*like.shape[:2], 0, like.shape[3]))

    def append(self, states: Tensor) -> None:
        """Append tokens `[batch, kv_heads, tokens, dim]`."""
        total = self.length + states.shape[2]
        if total > self._buffer.shape[2]:
            capacity = -(-total // TAIL_STEP) * TAIL_STEP
            grown = allocate(self._buffer, (*self._buffer.shape[:2], capacity, self._buffer.shape[3]))
            grown[:, :, : self.length] = self.read()
            self._buffer = grown
        self._buffer[:, :, self.length : total] = states
        self.length = total

    @property
    def dtype(self) -> torch.dtype:
        """Of the tokens."""
        return self._buffer.dtype

    def read(self) -> Tensor:
        """View of the tokens held."""
        return self._buffer[:, :, : self.length]

    def replace(self, states: Tensor) -> None:
        """Hold exactly `states`, in memory of their own."""
        self._buffer = allocate(states, (*states.shape[:2], 0, states.shape[3]))
        self.length = 0
        self.append(states)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.length = min(self.length, length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension."""
        self._buffer = compact(change(self.read()))

    def tensors(self) -> list[Tensor]:
        """The buffer, spare capacity included."""
        return [self._buffer]

    def used_bytes(self) -> int:
        """Bytes of the tokens held."""
        return self.read().numel() * self._buffer.element_size()

    def held_bytes(self) -> int:
        """Bytes of the storage behind them."""
        return self._buffer.untyped_storage().nbytes()


def allocate(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised memory in the dtype and on the device of `like`, writable in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=like.dtype, device=like.device)


def compact(view: Tensor) -> Tensor:
    """A copy of `view` without the storage around it."""
    return allocate(view, tuple(view.shape)).copy_(view)
