"""How far buffers grow ahead of what they hold: the rules of `core/store.py` and `core/host.py` as arithmetic."""

from typing import Literal

from ...core.store import TAIL_STEP

Filling = Literal["prompt", "steps", "usual", "worst"]
"""How a cache came to its tokens. prompt: all in one forward, which leaves no spare capacity but the tail's. steps: a
prompt, then one token per forward. usual: as prompt, once layers with a sliding window have let go of it, which they do
at the next step. worst: a bound on all, but on those layers before that step; it never falls with length."""

SPARE = 32
"""Buffers grow by this part of themselves."""


def tail_capacity(tokens: int) -> int:
    """Tokens that an `ExactTail` of `tokens` tokens has room for."""
    return -(-tokens // TAIL_STEP) * TAIL_STEP


def store_capacity(blocks: int, first: int, filling: Filling) -> int:
    """Blocks that a `PackedStore` of `blocks` blocks has room for; `first` of them came at once, the others singly."""
    if filling in ("prompt", "usual"):
        return blocks
    if filling == "worst":
        grown = blocks - 1 + max(1, (blocks - 1) // SPARE)
        return max(blocks, grown) if blocks else 0
    capacity = max(first, min(blocks, 1))
    while capacity < blocks:
        capacity += max(1, capacity // SPARE)
    return capacity


def host_capacity(tokens: int, first: int, interval: int, filling: Filling) -> int:
    """Tokens that a `HostCopy` of `tokens` has room for; `first` of them came at once, the others `interval` by it."""
    if filling in ("prompt", "usual") or not tokens:
        return tokens
    if filling == "worst":
        return tokens + tokens // SPARE
    capacity = first
    while capacity < tokens:
        needed = first + ((capacity - first) // interval + 1) * interval
        capacity = max(needed, capacity + capacity // SPARE)
    return capacity
