"""Prefill and decode steps of packed caches beside transformers' own.

Here the contenders run one after the other; `python -m cachequant.benchmarks.speed` lets them take turns, which is what
ratios should be read from on a machine that does other things too.
"""

import pytest
import torch
from transformers.utils.import_utils import is_optimum_quanto_available

from cachequant.benchmarks.held import held_bytes
from cachequant.benchmarks.speed import BASELINE, CONTEXT, PREFILL_TOKENS, QUANTO, build_model, contenders

SPECS = ("uniform:bits=4", "uniform:bits=2")
NAMES = (BASELINE, *((QUANTO,) if is_optimum_quanto_available() else ()), *SPECS)


@pytest.fixture(scope="module")
def runners():
    found = contenders(build_model(), SPECS)
    return dict(zip(NAMES, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(group=f"decode one token at {CONTEXT} tokens of context, bfloat16")
def test_decode(benchmark, runners, name):
    cache = runners[name].filled(CONTEXT)
    benchmark.extra_info.update(context=CONTEXT, bytes=held_bytes(cache))
    benchmark.pedantic(runners[name].forward, args=(torch.tensor([[7]]), cache), rounds=24, warmup_rounds=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(group=f"prefill {PREFILL_TOKENS} tokens, bfloat16")
def test_prefill(benchmark, runners, name):
    ids = torch.arange(PREFILL_TOKENS)[None] % 2048
    runner = runners[name]
    benchmark.extra_info.update(tokens=PREFILL_TOKENS)
    benchmark.pedantic(lambda: runner.forward(ids, runner.new_cache()), rounds=3, warmup_rounds=1)
