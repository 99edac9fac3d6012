"""Checks of a strategy at work in the caches."""

import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.format import Side
from ..adaptive import AdaptiveStrategy
from ..protocol import CacheQuantizer
from .check import contract_check, require
from .kinds import every_strategy, has_settings, packs_once
from .material import block_of, ready_for_model, tiny, tokens_of

if TYPE_CHECKING:
    from ..hf.cache import PackedCache

OPTIONS: dict[str, Any] = {"residual_length": 16, "sink_tokens": 2}


@contract_check(packs_once)
def check_streaming_equals_the_simulation(strategy: CacheQuantizer) -> None:
    """Decoding through the packed cache and the one-forward simulation give the same logits (float64, 1e-6)."""
    from ..hf.simulate import SimulatedCache

    model = tiny(strategy, torch.float64)
    tokens = tokens_of(2, 180 + block_of(strategy))
    with torch.no_grad():
        simulated = model(
            tokens, past_key_values=SimulatedCache(model, ready_for_model(strategy), prefill=60, chunk=37, **OPTIONS)
        ).logits
        streamed = _stream(model, _cache(model, strategy), tokens, 60, 37)
    worst = float((simulated - streamed).abs().max())
    require(worst <= 1e-6, f"simulated and streamed logits to agree to 1e-6, differ by {worst}")


@contract_check(every_strategy)
def check_generation_equals_dequantized_attention(strategy: CacheQuantizer) -> None:
    """Attention over packed bytes equals attention over what `dequantize` gives, sinks and tail included."""
    model = tiny(strategy)
    cache, tokens = _filled(model, strategy)
    other = copy.deepcopy(cache)
    with torch.no_grad():
        packed = model(tokens[:, -1:], past_key_values=cache).logits
        layers = other.packed_layers
        for layer in layers:
            layer.attend = _dense_attention(layer)  # type: ignore[method-assign]
        dense = model(tokens[:, -1:], past_key_values=other).logits
    worst = float((packed - dense).abs().max())
    require(worst <= 1e-4, f"packed and dequantized attention to agree to 1e-4, differ by {worst}")


@contract_check(every_strategy)
def check_batch_operations_move_whole_rows(strategy: CacheQuantizer) -> None:
    """reorder, select and repeat of the cache do to the next logits what they do to the rows."""
    model = tiny(strategy)
    index = torch.tensor([1, 0, 1])
    for name, operate in (
        ("batch_select_indices", lambda cache: cache.batch_select_indices(index)),
        ("reorder_cache", lambda cache: cache.reorder_cache(index)),
        ("batch_repeat_interleave", lambda cache: cache.batch_repeat_interleave(2)),
    ):
        cache, tokens = _filled(model, strategy)
        changed = copy.deepcopy(cache)
        operate(changed)
        rows = torch.tensor([0, 0, 1, 1]) if name == "batch_repeat_interleave" else index
        with torch.no_grad():
            expected = model(tokens[:, -1:], past_key_values=cache).logits[rows]
            got = model(tokens[rows, -1:], past_key_values=changed).logits
        require(bool((expected - got).abs().max() <= 1e-4), f"{name} to move whole rows")


@contract_check(every_strategy)
def check_crop_forgets_what_came_after(strategy: CacheQuantizer) -> None:
    """A cache cropped to a whole number of blocks equals one that never saw the rest."""
    model = tiny(strategy)
    block = block_of(strategy)
    tokens = tokens_of(1, 3 * block + 7)
    longer = _cache(model, strategy, residual_length=0)
    with torch.no_grad():
        model(tokens[:, : 2 * block], past_key_values=longer)
        shorter = copy.deepcopy(longer)
        model(tokens[:, 2 * block :], past_key_values=longer)
        # exact layers may have nothing packed yet
        packing = [layer for layer in longer.packed_layers if layer.packed_tokens]
        held = [_held(layer, 2 * block) for layer in packing]
        longer.crop(-(block + 7))
        require(longer.get_seq_length() == 2 * block, f"crop to leave {2 * block} tokens")
        if isinstance(strategy, AdaptiveStrategy):
            # what came after may have changed widths before it was cropped
            left = [_held(layer, 2 * block) for layer in packing]
            require(all(map(torch.equal, held, left)), "crop to leave the other tokens as they are")
            return
        pair = [model(tokens[:, :3], past_key_values=cache).logits for cache in (longer, shorter)]
    require(bool((pair[0] - pair[1]).abs().max() <= 1e-4), "a cropped cache to equal one never filled")


@contract_check(every_strategy)
def check_reset_and_copies_share_nothing(strategy: CacheQuantizer) -> None:
    """A reset cache behaves like a new one, and a deep copy lives on its own."""
    model = tiny(strategy)
    cache, tokens = _filled(model, strategy)
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        expected = model(tokens[:, -1:], past_key_values=cache).logits
        cache.reset()
        require(cache.get_seq_length() == 0 and cache.memory().elements == 0, "reset to empty the cache")
        again = model(tokens[:, -1:], past_key_values=twin).logits
        _stream(model, cache, tokens, block_of(strategy), 41)
        refilled = model(tokens[:, -1:], past_key_values=cache).logits
    require(torch.equal(expected, again), "a deep copy to be unaffected by the original")
    require(bool((expected - refilled).abs().max() <= 1e-4), "a reset cache to behave like a new one")


@contract_check(has_settings)
def check_saved_caches_resume(strategy: CacheQuantizer) -> None:
    """A cache read back from its file gives the same logits."""
    from ..hf.cache import PackedCache

    model = tiny(strategy)
    cache, tokens = _filled(model, strategy)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        loaded = PackedCache.load(path, model, ready_for_model(strategy))
        pair = [model(tokens[:, -1:], past_key_values=c).logits for c in (cache, loaded)]
    require(torch.equal(*pair), "a cache read back from its file to give the same logits")


@contract_check(every_strategy)
def check_memory_counts_every_byte(strategy: CacheQuantizer) -> None:
    """The rows of the memory report add up, and count all that the stores and tails hold."""
    model = tiny(strategy)
    cache, _ = _filled(model, strategy)
    report = cache.memory()
    require(sum(report.rows.values()) == report.device_bytes + report.host_bytes, "memory rows to add up")
    held = sum(tensor.untyped_storage().nbytes() for layer in cache.packed_layers for tensor in layer.tensors())
    counted = report.device_bytes - report.rows["rope"] - report.rows["host layers"]
    require(held == counted, f"the memory report to count the {held} bytes held, got {counted}")


def _cache(model: Any, strategy: CacheQuantizer, **options: Any) -> "PackedCache":
    from ..hf.cache import PackedCache

    return PackedCache(model, ready_for_model(strategy), **{**OPTIONS, **options})


def _filled(model: Any, strategy: CacheQuantizer) -> tuple["PackedCache", Tensor]:
    """A cache with packed blocks, sinks and a tail, and the tokens it was filled with."""
    cache = _cache(model, strategy)
    tokens = tokens_of(2, 2 * block_of(strategy) + 29)
    _stream(model, cache, tokens, block_of(strategy), 41)
    return cache, tokens


def _stream(model: Any, cache: "PackedCache", tokens: Tensor, prefill: int, chunk: int) -> Tensor:
    bounds = [0, *range(prefill, tokens.shape[1], chunk), tokens.shape[1]]
    with torch.no_grad():
        pieces = [tokens[:, a:b] for a, b in itertools.pairwise(bounds)]
        return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


def _dense_attention(layer: Any) -> Callable[..., Tensor]:
    """What `PackedLayer.attend` must equal: plain attention over dequantized states."""
    from ...kernels.attention import attend_reference

    def attend(query: Tensor, key: Any, value: Any, scoring: Any) -> Tensor:
        rows = query.float().unflatten(1, (layer.kv_heads, -1)).flatten(2, 3)
        states = [_held(layer, handle.start, handle.side) for handle in (key, value)]
        states = [torch.cat([s, h.rotated_exact()], dim=2).float() for s, h in zip(states, (key, value), strict=True)]
        kept = _kept(layer, key.start, key.shape[2])
        output = attend_reference(rows, states[0], states[1], scoring.scaling, kept)
        return output.reshape(query.shape).to(query.dtype)

    return attend


def _held(layer: Any, packed: int, side: Side = "key") -> Tensor:
    """The first `packed` tokens as they are packed, dense."""
    read = layer.dense if hasattr(layer, "pools") else layer.dequantize
    return read(side, min(packed, layer.packed_tokens))


def _kept(layer: Any, packed: int, tokens: int) -> Tensor | None:
    """Which tokens were not dropped, `[batch, heads or 1, 1, tokens]`; None: all."""
    if not hasattr(layer, "pools"):
        return None
    widths = layer.pools["key"].widths.unflatten(0, (layer.tails["key"].read().shape[0], -1))[:, :, None, :packed]
    return torch.nn.functional.pad(widths > 0, (0, tokens - packed), value=True)
