"""Cutting inside a packed block, as every reuse of a prompt does."""

import copy

import pytest
import torch

from cachequant import registry
from cachequant.core import PackedCache
from cachequant.core.hf.tiny import tiny_model

PROMPT = 200
# by how much answers may change: old and new outliers of a value row compete for its slots
SPECS = {
    "uniform:bits=3": 1e-5,
    "uniform:bits=2,group_size=32": 1e-5,
    "kvquant:bits=2,outliers=0": 1e-5,
    "kvquant:bits=3": 0.05,
    "kvquant:bits=4,key_rope=post,key_scale=token": 0.05,
    "qnorm:base=uniform,bits=2": 1e-5,
}


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def ready(spec, model):
    strategy = registry.parse(spec)
    calibrated = getattr(strategy, "calibrated", True)
    return strategy if calibrated else strategy.calibrate(model, None, tokens(4, 384, 5), samples=4, heldout=0)


@torch.no_grad()
def ask(model, cache, question):
    """Logits of the last tokens; the question is read in passes, so that packed data is read too."""
    return [model(part, past_key_values=cache).logits for part in question.split(70, dim=1)][-1]


@pytest.mark.parametrize("spec", SPECS)
def test_asking_again_and_again_gives_the_answer_of_the_first_cut(model, spec):
    cache = PackedCache(model, ready(spec, model), residual_length=16)
    question = tokens(1, 240, 1)
    with torch.no_grad():
        model(tokens(1, PROMPT, 0), past_key_values=cache)
    answers = []
    for _ in range(5):
        answers.append(ask(model, cache, question))
        cache.truncate(PROMPT)
    # the first question found the end of the prompt exact, the others what the cut left
    changes = [float((answer - answers[1]).norm() / answers[1].norm()) for answer in answers[2:]]
    assert max(changes) <= SPECS[spec], changes


def test_codes_cut_in_the_first_block_are_read_with_the_codebook_they_were_made_with(model, tmp_path):
    strategy = registry.parse("kvquant:bits=2,outliers=0,key_scale=token,key_rope=post,calibration=prompt")
    cache = PackedCache(model, strategy, residual_length=0)
    with torch.no_grad():
        model(tokens(1, 128, 0), past_key_values=cache)
    question = tokens(1, 210, 1)
    cache.truncate(100)
    cache.save(tmp_path / "cache.safetensors")
    answers = []
    for each in (cache, PackedCache.load(tmp_path / "cache.safetensors", model, strategy)):
        for _ in range(3):
            answers.append(ask(model, each, question))
            each.truncate(100)
    assert all(torch.equal(answer, answers[0]) for answer in answers[1:])
    cache.truncate(0)
    with torch.no_grad():
        model(tokens(1, 128, 7), past_key_values=cache)
        fresh = PackedCache(model, strategy, residual_length=0)
        model(tokens(1, 128, 7), past_key_values=fresh)
    assert torch.equal(ask(model, cache, question), ask(model, fresh, question))


def test_cut_codes_follow_their_rows_into_files_and_copies(model, tmp_path):
    strategy = ready("kvquant:bits=2,outliers=0", model)
    cache = PackedCache(model, strategy, residual_length=0)
    with torch.no_grad():
        model(tokens(2, 300, 0), past_key_values=cache)
    cache.truncate(180)
    assert cache.memory().rows["cut block"] > 0
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.save(tmp_path / "cache.safetensors")
    loaded = PackedCache.load(tmp_path / "cache.safetensors", model, strategy)
    question = tokens(2, 210, 1)
    assert torch.equal(ask(model, loaded, question), ask(model, copy.deepcopy(cache), question))


def test_cutting_further_back_forgets_the_codes_in_between(model):
    strategy = ready("kvquant:bits=2,outliers=0", model)
    short, long = (PackedCache(model, strategy, residual_length=0) for _ in range(2))
    with torch.no_grad():
        for cache in (short, long):
            model(tokens(1, 256, 0), past_key_values=cache)
        short.truncate(140)
        long.truncate(180)
        long.truncate(140)
    question = tokens(1, 210, 1)
    assert torch.equal(ask(model, short, question), ask(model, long, question))
    long.truncate(128)
    assert long.memory().rows["cut block"] == 0
