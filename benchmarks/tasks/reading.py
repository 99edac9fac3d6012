"""How tasks read through a cache: in which passes, how many rows at once, and how much of it is packed then."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, QuantizedLayer

from ...core import AdaptiveStrategy, PackedCache, Strategy, detach
from ...core.calibration import CalibratedStrategy
from ...core.hf.layer import PackedLayer
from ...strategies.preset import Preset
from ..contenders import Contender
from ..streaming import SMALLEST_BLOCK
from .base import Metric

PACKED = Metric(name="packed_share", label="read packed", better="higher", digits=0, percent=True)
"""Of what the cache holds when it is read, the share that is packed or dropped; the rest is read exact."""


def fresh_cache(contender: Contender) -> Cache:
    """An empty cache. Those of transformers are read by the model's own attention."""
    if contender.strategy is None:
        detach(contender.model)
    return contender.new_cache()


@torch.inference_mode()
def prefilled_alone(contender: Contender, ids: Sequence[int]) -> Cache:
    """A cache that holds one prompt and nothing else: what is weighed.

    What rows of a batch share, such as codebooks and angles, weighs less per number the more rows there are, and how
    many there are is not the same for every contender.
    """
    cache = fresh_cache(contender)
    prompt = torch.tensor([list(ids)], device=contender.model.device)
    contender.model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def steps(cache: Cache, start: int, stop: int) -> Iterator[slice]:
    """Passes over the tokens `[start, stop)` in which each finds packed what it would find when decoded alone.

    start: tokens that `cache` holds from one pass, the prefill.
    """
    chunk, origin = SMALLEST_BLOCK, 0
    if isinstance(cache, PackedCache):
        origin = cache.options.residual_length
        if isinstance(cache.strategy, AdaptiveStrategy):
            chunk = cache.strategy.interval
            # the prefill was packed whole, if it was long enough
            origin = start if start >= origin + chunk else origin
    while start < stop:
        end = start + chunk - (start - origin) % chunk
        yield slice(start, min(end, stop))
        start = end


def rows_at_once(contender: Contender, rows: int) -> int:
    """`rows`, or 1 where rows of a batch would influence each other."""
    return rows if contender.strategy is None or _rows_apart(contender.strategy) else 1


def _rows_apart(strategy: Any) -> bool:
    """Whether no row of a batch matters to another: tables that are fitted to the text at hand are shared by all."""
    if isinstance(strategy, Preset):
        return all(_rows_apart(child) for child in strategy.children())
    if not isinstance(strategy, Strategy):
        return False
    if isinstance(strategy, CalibratedStrategy) and type(strategy).tables is CalibratedStrategy.tables:
        return strategy.calibration != "prompt"
    return type(strategy).tables is Strategy.tables


def packed_share(cache: Cache) -> float:
    """Of the tokens held, the share that the next pass reads packed, or that were dropped, 0 to 1; layers average."""
    shares = []
    for layer in cache.layers:
        if not isinstance(layer, CacheLayerMixin):
            continue  # keeps a state, not tokens
        held, packed = int(layer.get_seq_length()), 0
        if isinstance(layer, PackedLayer):
            packed = max(0, layer.packed_tokens - layer.options.sink_tokens)
        elif isinstance(layer, QuantizedLayer) and layer.keys is not None:
            packed = held - (layer.keys.shape[-2] if layer.keys.dim() == 4 else 0)
        shares.append(packed / held if held else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


def standard_errors(samples: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Of the means of those columns; empty where one sample says nothing about them."""
    if len(samples) < 2:
        return {}
    return {
        name: torch.tensor([sample[name] for sample in samples], dtype=torch.float64).std().item() / len(samples) ** 0.5
        for name in names
    }


def mean(samples: Sequence[dict[str, Any]], name: str) -> float:
    """Of one column."""
    return sum(sample[name] for sample in samples) / len(samples)


def spread(count: int) -> list[float]:
    """Depths from 0, the beginning, to 1, the end; the middle if one is asked for."""
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]


def require_length(length: int, most: int, least: int, why: str) -> None:
    """Raise ValueError unless `least <= length <= most`, what the model takes. why: what takes `least` tokens."""
    if least > most:
        raise ValueError(f"{why} takes {least} tokens, the model's context has room for {most}; use another model")
    if length > most:
        raise ValueError(f"length={length} is beyond the model's context; use at most {most}")
    if length < least:
        raise ValueError(f"length={length} is too short: {why} takes {least} tokens; use at least {least}")
