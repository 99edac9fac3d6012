"""Rotary embedding of keys that were stored before it.

The attention module is run with identity position embeddings `(cos=1, sin=0)`, which makes the model's own rotary
function an exact no-op; the true embeddings are kept here and applied when keys are read. No code per architecture:
the model's function is found in its module and must pass a bitwise probe.
"""

import inspect
import sys
import weakref
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from ..store import ExactTail

Slice = Literal["full", "leading", "trailing"]

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(states [batch, heads, tokens, head_dim], cos, sin [batch or 1, tokens, dims])` to rotated states."""

Project = Callable[[Tensor, Tensor], Tensor]
"""Runs the attention module on its first tokens with the given cos and sin; returns the keys it hands to the cache."""


class RotaryFunction:
    """The model's own rotary function, applied to all or to a slice of the channels."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, Tensor]], part: Slice, dims: int) -> None:
        self._function, self._part, self._dims = function, part, dims
        # some models rotate one tensor at a time, most take queries and keys together
        self._single = next(iter(inspect.signature(function).parameters)) in ("x", "tensor")

    def __call__(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `states [batch, heads, tokens, head_dim]` with `cos, sin [batch or 1, tokens, dims]`."""
        if self._part == "full":
            return self._rotate(states, cos, sin)
        if self._part == "leading":
            return torch.cat([self._rotate(states[..., : self._dims], cos, sin), states[..., self._dims :]], -1)
        return torch.cat([states[..., : -self._dims], self._rotate(states[..., -self._dims :], cos, sin)], -1)

    def _rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self._single:
            return self._function(states, cos, sin)  # type: ignore[return-value]
        no_queries = states[:, :0]
        return self._function(no_queries, states, cos, sin)[1]

    def turns_halves(self, head_dim: int) -> bool:
        """Whether each channel of the first half of a head turns against its like in the second, by one angle."""
        return self._part == "full" and _turns_halves(self._function, head_dim)


@cache
def _turns_halves(function: Callable[..., Tensor | tuple[Tensor, Tensor]], head_dim: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 1, 3, head_dim, generator=generator)
    angles = torch.rand(1, 3, head_dim // 2, generator=generator) * 6.0
    cos, sin = angles.cos(), angles.sin()
    first, second = states.chunk(2, dim=-1)
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    rotate = RotaryFunction(function, "full", head_dim)
    try:
        turned = rotate(states, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    except RuntimeError:
        return False  # its angles have another shape
    return turned.shape == expected.shape and torch.allclose(turned, expected, atol=1e-5)


_found: "weakref.WeakKeyDictionary[nn.Module, Rotate]" = weakref.WeakKeyDictionary()


def find_rotary_function(module: nn.Module, cos: Tensor, sin: Tensor, project: Project) -> Rotate:
    """The rotary function of an attention module, proven on `project` with random angles, once per module.

    cos, sin: `[batch, tokens, dims]`, only for their shape and dtype: position 0 would not rotate at all.

    Raises ValueError when no variant reproduces the module's keys bitwise.
    """
    if module not in _found:
        _found[module] = _probe(module, cos, sin, project)
    return _found[module]


def _probe(module: nn.Module, cos: Tensor, sin: Tensor, project: Project) -> Rotate:
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(cos.shape, generator=generator) * 6.0
    probe_cos, probe_sin = angles.cos().to(cos), angles.sin().to(sin)
    plain = project(torch.ones_like(cos), torch.zeros_like(sin))
    if not plain.isfinite().all():
        raise ValueError(
            f"the first keys of {type(module).__name__} are not finite; the model computes in {plain.dtype}. Try "
            "bfloat16 or float32, and check its weights"
        )
    rotated = project(probe_cos, probe_sin)
    if torch.equal(plain, rotated):
        return _no_rotation  # some layers of some models have no positions
    function = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    parts: tuple[Slice, ...] = ("full", "leading", "trailing") if function is not None else ()
    for part in parts:
        candidate = RotaryFunction(function, part, cos.shape[-1])  # type: ignore[arg-type]
        try:
            if torch.equal(candidate(plain, probe_cos, probe_sin), rotated):
                return candidate
        except RuntimeError:
            continue  # shapes of this variant do not fit
    raise ValueError(
        f"keys before RoPE are not supported for {type(module).__name__}: its rotary embedding could not be reproduced "
        "bitwise. Use a strategy that stores keys after RoPE (rope='post')"
    )


def is_no_rotation(rotate: Rotate) -> bool:
    """Whether `rotate` leaves keys as they are."""
    return rotate is _no_rotation


def _no_rotation(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return states


class RotaryTable:
    """cos and sin of every cached token, shared by the layers of one kind on one device.

    Kept in the model's dtype, as half the channels where both halves are equal, and as one row where all batch rows
    are: 256 bytes per token for heads of 128 in 16 bits, beside 34,816 of a 4-bit cache of 32 layers with 8 kv heads.
    Of bfloat16 models in float16, which kernels turn keys with: it has all their digits but those beyond the seventh
    decimal place.
    """

    def __init__(self) -> None:
        self._cos: ExactTail | None = None
        self._sin: ExactTail | None = None
        self._halved = True
        self._owner: int | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return 0 if self._cos is None else self._cos.length

    def append(self, cos: Tensor, sin: Tensor, past: int, layer: int) -> None:
        """Store `cos, sin [batch or 1, tokens, dims]` of the tokens from `past` on, once per forward."""
        if self._owner is None:
            self._owner = layer
        if layer == self._owner:
            self.truncate(past)  # what an interrupted forward may have left
        elif self.length == past + cos.shape[1]:
            return  # the first layer of this forward has stored them
        if self.length != past:
            raise RuntimeError(f"the rotary table holds {self.length} tokens, the cache {past}; reset the cache")
        if cos.shape[0] > 1 and bool((cos == cos[:1]).all() and (sin == sin[:1]).all()):
            cos, sin = cos[:1], sin[:1]
        halves = cos.shape[-1] % 2 == 0 and all(torch.equal(*t.chunk(2, dim=-1)) for t in (cos, sin))
        if self._halved and not halves:
            self._widen()
        if self._halved:
            cos, sin = (t.chunk(2, dim=-1)[0] for t in (cos, sin))
        if cos.dtype == torch.bfloat16:
            cos, sin = cos.half(), sin.half()
        self._cos, self._sin = _extend(self._cos, cos), _extend(self._sin, sin)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """cos and sin `[batch or 1, stop - start, dims]`; callers cast them to the dtype they rotate."""
        return self._pair(lambda held: held[:, start:stop])

    def read_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same `[batch, n, dims]` of the tokens `positions [batch, n]`."""
        return self._pair(lambda held: _rows_at(held, positions))

    def halves(self, stop: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin `[batch or 1, stop, dims / 2]` where they stand for both halves, else None: views."""
        if not self._halved or self._cos is None or self._sin is None:
            return None
        return self._cos.read()[:, 0, :stop], self._sin.read()[:, 0, :stop]

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        for tail in self._tails():
            tail.truncate(length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension, unless one row stands for all."""
        for tail in self._tails():
            if tail.read().shape[0] > 1:
                tail.map(change)

    def held_bytes(self) -> int:
        """Bytes of the storages."""
        return sum(tail.held_bytes() for tail in self._tails())

    def tensors(self) -> dict[str, Tensor]:
        """The stored part of the tables, for saving."""
        named = {"cos": self._cos, "sin": self._sin}
        return {name: tail.read() for name, tail in named.items() if tail is not None}

    @property
    def halved(self) -> bool:
        """Whether the stored channels stand for both halves."""
        return self._halved

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], halved: bool) -> "RotaryTable":
        """The inverse of `tensors`."""
        table = cls()
        table._halved = halved
        if tensors:
            table._cos, table._sin = (_extend(None, tensors[name][:, 0]) for name in ("cos", "sin"))
        return table

    def _pair(self, pick: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        if self._cos is None or self._sin is None:
            raise RuntimeError("the rotary table is empty; reset the cache and run the prompt again")
        cos, sin = (pick(tail.read()[:, 0]) for tail in (self._cos, self._sin))
        return (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)) if self._halved else (cos, sin)

    def _tails(self) -> list[ExactTail]:
        return [tail for tail in (self._cos, self._sin) if tail is not None]

    def _widen(self) -> None:
        for tail in self._tails():
            tail.replace(torch.cat([tail.read()] * 2, dim=-1))
        self._halved = False


class RotaryTables:
    """The tables of a cache: one per kind of layer and device, shared by its layers."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple[str, str], RotaryTable] = {}

    def get(self, kind: str, device: torch.device) -> RotaryTable:
        """The table of one kind of layer on one device."""
        return self.by_kind.setdefault((kind, str(device)), RotaryTable())

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        for table in self.by_kind.values():
            table.truncate(length)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension."""
        for table in self.by_kind.values():
            table.map(change)

    def held_bytes(self) -> int:
        """Bytes of the storages."""
        return sum(table.held_bytes() for table in self.by_kind.values())


def _rows_at(held: Tensor, positions: Tensor) -> Tensor:
    index = positions[..., None].expand(-1, -1, held.shape[-1])
    return held.expand(len(positions), -1, -1).gather(1, index)


def _extend(tail: ExactTail | None, states: Tensor) -> ExactTail:
    states = states.unsqueeze(1)
    if tail is None:
        tail = ExactTail(states)
    held = tail.read()
    if held.shape[0] < states.shape[0]:
        tail.replace(held.expand(states.shape[0], -1, -1, -1))
    tail.append(states)  # a single row broadcasts
    return tail
