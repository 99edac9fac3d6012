"""What packing, prefill and decoding take, for every variant of every installed strategy and transformers' caches.

Caches are filled by a prefill of the text, so that keys before RoPE and widths that attention decides are what they are
in use. Contenders run one after the other: on a machine that does other things too, read ratios from the task `speed`
of `cachequant bench`, where they take turns.
"""

import time

import pytest

from cachequant.benchmarks.arena import DECODED, of_memory
from cachequant.benchmarks.held import weigh
from cachequant.benchmarks.packing import packing, prefill

ROUNDS, ROUNDS_SECONDS = 5, 0.6


def test_encode(benchmark, arena, strategy):
    benchmark.group = "encode"
    with arena.measuring("encode", strategy) as contender:
        work = packing(contender, arena.ids(arena.packed))
        packed = _repeated(benchmark, work.pack, work.fresh)
        size = work.packed_bytes(packed)
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update(
            strategy=strategy,
            group="encode",
            model=arena.panel("model").card.panel,
            context=work.tokens,
            bytes=size,
            packed_bits_per_element=8 * size / work.elements,
            ms_per_1024_tokens=1e3 * seconds * 1024 / work.tokens,
            bytes_per_second=work.exact_bytes / seconds,
        )


def test_prefill(benchmark, arena, strategy, context):
    benchmark.group = f"prefill of {context} tokens"
    _require(arena, context)
    with arena.measuring(benchmark.group, strategy) as contender:
        ids = arena.ids(context)

        def fill():
            cache = contender.new_cache()
            prefill(contender.model, ids, cache)
            return cache

        cache = _repeated(benchmark, fill)
        _, memory = weigh(cache, contender.model, 1)
        benchmark.extra_info.update(
            strategy=strategy,
            group="prefill",
            model=arena.panel("model").card.panel,
            context=context,
            tokens_per_second=context / benchmark.stats.stats.median,
            **of_memory(memory),
        )


def test_decode(benchmark, arena, strategy, context):
    benchmark.group = f"decode one token at {context} tokens"
    _require(arena, context)
    with arena.measuring(benchmark.group, strategy) as contender:
        ids = arena.ids(context + DECODED + 1)
        cache = contender.new_cache()
        prefill(contender.model, ids[:, :context], cache)
        # bytes at the context that the group names, not where decoding ends
        _, memory = weigh(cache, contender.model, 1)
        following = iter(ids[:, context:].split(1, dim=1))
        benchmark.pedantic(lambda: prefill(contender.model, next(following), cache), rounds=DECODED, warmup_rounds=1)
        benchmark.extra_info.update(
            strategy=strategy,
            group="decode",
            model=arena.panel("model").card.panel,
            context=context,
            tokens_per_second=1 / benchmark.stats.stats.median,
            **of_memory(memory),
        )


def _repeated(benchmark, target, fresh=None):
    """What `target(fresh())` returns in the last round: few of them where one takes long, after one that warms up."""

    def arguments():
        return ((fresh(),), {}) if fresh else ((), {})

    given, _ = arguments()
    start = time.perf_counter()
    target(*given)
    rounds = int(ROUNDS_SECONDS / (time.perf_counter() - start))
    return benchmark.pedantic(target, setup=arguments, rounds=min(max(rounds, 1), ROUNDS))


def _require(arena, context):
    """Skip a length that the model does not take; one that was asked for was refused before."""
    if reason := arena.refusal(context):
        pytest.skip(reason)
