"""Padding never matters: a padded row is quantized as if it were alone, and its first real tokens are the sinks."""

import pytest
import torch
from torch import Tensor

from cachequant import registry
from cachequant.core import PackedCache
from cachequant.core.hf.layer import PackedLayer

BLOCK, TAIL, LENGTH = 32, 16, 100
CLOSE = {"rtol": 0, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 1e-10}

PER_TOKEN = {
    "token": "uniform:bits=4,block=32",
    "rotated": "uniform:bits=2,block=32,rotation=hadamard",
    "groups": "uniform:bits=3,block=32,group_size=8",
    "token-pre": "uniform:bits=4,block=32,key_rope=pre",
}
PER_CHANNEL = {
    "channel": "uniform:bits=4,block=32,key_scale=channel",
    "channel-pre": "uniform:bits=2,block=32,key_scale=channel,key_rope=pre",
}
EVERY = PER_TOKEN | PER_CHANNEL


@pytest.fixture
def model(build):
    """In float64, where no rounding error of a larger batch can move a state to another code."""
    return build("llama").double()


@pytest.fixture
def forced(model, left_padded, step):
    """`forced(spec, ids, pads, split, **options)`: logits of fixed ids fed in chunks, and the cache after them."""

    def feed(spec: str, ids: Tensor, pads: list[int], split: list[int], **options):
        cache = PackedCache(model, registry.parse(spec), **{"residual_length": TAIL, **options})
        _, mask = left_padded(ids, pads)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        start, logits = 0, []
        for length in split:
            stop = start + length
            inputs = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            logits.append(step(model, ids[:, start:stop], cache, **inputs))
            start = stop
        return torch.cat(logits, 1), cache

    return feed


@pytest.fixture
def beside(tokens):
    """`beside(ids, pad)`: a batch whose first row is `ids` after `pad` tokens of padding, and whose second is full."""

    def batch(ids: Tensor, pad: int) -> Tensor:
        padded = torch.nn.functional.pad(ids, (pad, 0))
        return torch.cat([padded, tokens(1, padded.shape[1], seed=7)])

    return batch


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("pad", [BLOCK, 3 * BLOCK])
@pytest.mark.parametrize("spec", EVERY.values(), ids=EVERY)
def test_row_padded_by_whole_blocks_gives_the_logits_of_the_row_alone(forced, beside, tokens, spec, pad, sinks):
    ids = tokens(1, LENGTH + 60)
    alone, _ = forced(spec, ids, [0], [LENGTH, 1, 1, 40, 18], sink_tokens=sinks)
    padded, _ = forced(spec, beside(ids, pad), [pad, 0], [LENGTH + pad, 1, 1, 40, 18], sink_tokens=sinks)
    torch.testing.assert_close(padded[0, pad:], alone[0], **EXACT)


@pytest.fixture
def packed_layer(blank_layer):
    """`packed_layer(spec, states, mask, split, sinks)`: a layer given `states` in chunks of `split` tokens."""

    def fed(spec: str, states: tuple[Tensor, Tensor], mask: Tensor | None, split: list[int], sinks: int) -> PackedLayer:
        layer = blank_layer(registry.parse(spec), residual_length=0, sink_tokens=sinks)
        start = 0
        for length in split:
            layer.note_mask(None if mask is None else mask[:, : start + length])
            layer.update(*(each[:, :, start : start + length] for each in states))
            start += length
        return layer

    return fed


@pytest.fixture
def some_states():
    """`some_states(rows, length)`: keys and values `[rows, 2, length, 32]`."""

    def sample(rows: int, length: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        key, value = (torch.randn(rows, 2, length, 32, generator=generator) for _ in range(2))
        return key * torch.logspace(-1, 1, 32), value

    return sample


POST = {name: spec for name, spec in EVERY.items() if "pre" not in name}


@pytest.mark.parametrize("pad", [1, 5, 31, 37, 63])
@pytest.mark.parametrize("spec", [spec for spec in PER_TOKEN.values() if "pre" not in spec])
def test_per_token_strategies_give_the_same_numbers_after_any_padding(packed_layer, some_states, spec, pad, dense):
    alone = some_states(1, 160)
    padded = tuple(torch.nn.functional.pad(each, (0, 0, pad, 0), value=9.0) for each in alone)
    mask = torch.arange(160 + pad)[None] >= pad
    expected = packed_layer(spec, alone, None, [160], 0)
    actual = packed_layer(spec, padded, mask, [160 + pad], 0)
    both = actual.packed_tokens - pad  # packed with and without padding
    assert both >= 96
    for side in ("key", "value"):
        assert torch.equal(dense(actual, side)[:, :, pad:][:, :, :both], dense(expected, side)[:, :, :both])


@pytest.mark.parametrize("split", [[160], [20, 20, 120], [150, *[1] * 10]], ids=["whole", "chunks", "steps"])
@pytest.mark.parametrize("spec", POST.values(), ids=POST)
def test_huge_padding_spoils_no_real_token(packed_layer, some_states, spec, split, dense):
    states = some_states(3, 160)
    mask = torch.arange(160)[None] >= torch.tensor([0, 45, 7])[:, None]
    hidden = ~mask[:, None, :, None]
    huge = tuple(each.masked_fill(hidden, 1e4) for each in states)
    expected, actual = (packed_layer(spec, each, mask, split, 0) for each in (states, huge))
    for side in ("key", "value"):
        kept = mask[:, None, :, None].expand_as(states[0])
        assert torch.equal(dense(actual, side)[kept], dense(expected, side)[kept])


@pytest.mark.parametrize("spec", EVERY.values(), ids=EVERY)
def test_what_stands_at_padding_changes_no_logit(forced, tokens, spec):
    ids, pads = tokens(2, LENGTH + 20), [41, 5]
    other = torch.where(
        torch.arange(LENGTH + 20)[None] < torch.tensor(pads)[:, None], tokens(2, LENGTH + 20, seed=9), ids
    )
    assert not torch.equal(ids, other)
    first, second = (forced(spec, each, pads, [LENGTH, 1, 19])[0] for each in (ids, other))
    for row, pad in enumerate(pads):
        assert torch.equal(first[row, pad:], second[row, pad:])


SPLITS = {"whole": [160], "pads-first": [40, 120], "row-begins-later": [33, 33, 94], "steps": [100, *[1] * 60]}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("pads", [[0, 0, 0], [0, 5, 66], [40, 40, 40], [30, 31, 32]], ids=str)
@pytest.mark.parametrize("spec", POST.values(), ids=POST)
def test_first_real_tokens_of_each_row_are_exact_and_only_they(packed_layer, some_states, spec, pads, split, dense):
    states = some_states(3, 160)
    mask = torch.arange(160)[None] >= torch.tensor(pads)[:, None]
    layer = packed_layer(spec, states, mask if any(pads) else None, split, sinks=3)
    assert layer.packed_tokens == 160
    for side, exact in zip(("key", "value"), states, strict=True):
        equal = (dense(layer, side) == exact).all(-1).all(1)
        for row, pad in enumerate(pads):
            assert equal[row, pad:].nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("spec", PER_CHANNEL.values(), ids=PER_CHANNEL)
def test_sinks_stay_out_of_channel_statistics(packed_layer, some_states, spec, dense):
    spec = spec.replace(",key_rope=pre", "")
    key, value = some_states(1, 64)
    key[:, :, :3] *= 1e3  # as attention sinks have it
    spoilt, kept = (dense(packed_layer(spec, (key, value), None, [64], sinks), "key") for sinks in (0, 3))
    errors = [(each - key)[:, :, 3:32].norm() for each in (spoilt, kept)]
    assert errors[0] > 20 * errors[1]


def test_user_masks_in_four_dimensions_are_obeyed(build, tokens, step):
    model, stock = build("llama"), build("llama")
    ids = tokens(2, 90)
    mask = torch.rand(2, 1, 90, 90, generator=torch.Generator().manual_seed(0)) < 0.7
    mask = (mask | torch.eye(90, dtype=torch.bool)).tril()
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = step(stock, ids, None, attention_mask=additive)
    for given in (mask, additive):
        cache = PackedCache(model, registry.parse("none:block=32"), residual_length=TAIL, sink_tokens=2)
        logits = [
            step(model, ids[:, a:b], cache, attention_mask=given[:, :, a:b, :b])
            for a, b in [(0, 70), (70, 71), (71, 90)]
        ]
        torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)
