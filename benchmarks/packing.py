"""What packing costs by itself, apart from the forward that makes the states.

Strategies that pack whole blocks are asked to encode states of the model as a cache asks them. Those that decide token
by token pack what a prefill has left waiting, evidence included. Caches of transformers are given the states.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..core import AdaptiveStrategy, PackedCache, detach
from ..core.hf.adaptive import AdaptiveLayer
from ..core.hf.blocks import ENCODE_NUMBERS
from ..core.hf.layer import PackedLayer
from ..core.hf.taps import TapCache, TapLayer
from ..kernels.format import Format, Side
from ..kernels.quantize import NO_TABLES, Tables
from .contenders import Contender
from .held import weigh


@dataclass(frozen=True)
class Packing:
    """Something to time: `pack(fresh())`, `fresh` untimed and asked anew each time."""

    tokens: int
    exact_bytes: int
    """Of the states that are packed."""
    elements: int
    """Numbers in them."""
    fresh: Callable[[], Any]
    pack: Callable[[Any], Any]
    """Returns what `packed_bytes` takes."""
    packed_bytes: Callable[[Any], int]


def packing(contender: Contender, ids: Tensor) -> Packing:
    """How `contender` packs what its model makes of `ids [1, tokens]`.

    Raises ValueError where it packs nothing of so few tokens.
    """
    if contender.strategy is None:
        return _stock(contender, ids)
    return _waiting(contender, ids) if isinstance(contender.strategy, AdaptiveStrategy) else _blocks(contender, ids)


@torch.inference_mode()
def prefill(model: Any, ids: Tensor, cache: Any) -> None:
    """One pass over `ids [1, tokens]`, finished when it returns."""
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finish(model.device)


def finish(device: torch.device) -> None:
    """Wait for what was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Work:
    """One side of one layer: whole blocks of states and how they are encoded."""

    states: Tensor
    fmt: Format
    side: Side
    block: int
    tables: Tables


def _blocks(contender: Contender, ids: Tensor) -> Packing:
    strategy: Any = contender.strategy
    work: list[_Work] = []

    def observe(layer: TapLayer, side: Side, states: Tensor, gradient: Tensor | None) -> None:
        fmt, block = getattr(layer.formats, side), layer.formats.block
        whole = states[:, :, : states.shape[2] // block * block]
        if not whole.shape[2]:
            raise ValueError(f"{contender.spec} packs blocks of {block} tokens, there are {states.shape[2]}")
        fits = fmt.codes != "exact"
        tables = strategy.tables(layer.spec, side, whole[:, :, :block], None) if fits else NO_TABLES
        work.append(_Work(whole, fmt, side, block, tables.to(states.device)))

    prefill(contender.model, ids, TapCache(contender.model, strategy, observe))
    if not work:
        raise ValueError(f"{contender.spec} packs no layer of {type(contender.model).__name__}")

    @torch.inference_mode()
    def pack(nothing: None) -> list[dict[str, Tensor]]:
        packed = []
        for each in work:
            # long prompts in pieces, as the cache does
            step = max(1, ENCODE_NUMBERS // each.states[:, :, : each.block].numel()) * each.block
            for piece in each.states.split(step, dim=2):
                packed.append(strategy.encode(piece, each.fmt, each.side, each.block, None, each.tables))
        finish(contender.model.device)
        return packed

    return Packing(
        tokens=min(each.states.shape[2] for each in work),
        exact_bytes=sum(each.states.numel() * each.states.itemsize for each in work),
        elements=sum(each.states.numel() for each in work),
        fresh=lambda: None,
        pack=pack,
        packed_bytes=lambda packed: sum(tensor.nbytes for named in packed for tensor in named.values()),
    )


class _WaitingLayer(AdaptiveLayer):
    """Packs when it is told to, not after attention."""

    def settle(self) -> None:
        pass

    def pack(self) -> None:
        """What attention would have had done."""
        super().settle()


class _WaitingCache(PackedCache):
    """Holds the whole prompt exact, and all that is known about it."""

    def _layer(self, *arguments: Any) -> PackedLayer:
        return _WaitingLayer(self._council, *arguments)


def _waiting(contender: Contender, ids: Tensor) -> Packing:
    def fresh() -> _WaitingCache:
        cache = _WaitingCache(contender.model, contender.source, residual_length=0)
        prefill(contender.model, ids, cache)
        if not any(layer.due for layer in cache.packed_layers if isinstance(layer, _WaitingLayer)):
            raise ValueError(f"{contender.spec} packs nothing of {ids.shape[1]} tokens")
        return cache

    @torch.inference_mode()
    def pack(cache: _WaitingCache) -> _WaitingCache:
        for layer in cache.packed_layers:
            if isinstance(layer, _WaitingLayer):
                layer.pack()
        finish(contender.model.device)
        return cache

    example = fresh()
    packed = [layer for layer in example.packed_layers if isinstance(layer, _WaitingLayer) and layer.due]
    numbers = sum(layer.elements() for layer in packed)
    return Packing(
        tokens=ids.shape[1],
        exact_bytes=numbers * contender.model.dtype.itemsize,
        elements=numbers,
        fresh=fresh,
        pack=pack,
        packed_bytes=lambda cache: round(weigh(cache, contender.model, 1)[1].packed_bits_per_element * numbers / 8),
    )


def _stock(contender: Contender, ids: Tensor) -> Packing:
    # nothing of ours may be on the model while transformers' caches are filled
    detach(contender.model)
    exact: Any = DynamicCache(config=contender.model.config)
    prefill(contender.model, ids, exact)
    holding = [(index, layer) for index, layer in enumerate(exact.layers) if hasattr(layer, "keys")]
    states: list[tuple[int, Tensor, Tensor]] = [(index, layer.keys, layer.values) for index, layer in holding]
    sides = [side for _, *both in states for side in both]

    @torch.inference_mode()
    def pack(cache: Any) -> Any:
        for index, key, value in states:
            cache.update(key, value, index)
        finish(contender.model.device)
        return cache

    return Packing(
        tokens=ids.shape[1],
        exact_bytes=sum(side.numel() * side.itemsize for side in sides),
        elements=sum(side.numel() for side in sides),
        fresh=contender.new_cache,
        pack=pack,
        packed_bytes=lambda cache: weigh(cache, contender.model, 1)[1].device_bytes,
    )
