"""The baselines that drop tokens: what stays for hand-made evidence, and what evidence a model gives."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from cachequant.core import AdaptiveStrategy, Evidence, Format, LayerSpec, PackedCache
from cachequant.core.hf.tiny import tiny_model
from cachequant.strategies.h2o import H2O
from cachequant.strategies.scissorhands import Scissorhands

BASELINES = (H2O, Scissorhands)
LAYER = LayerSpec(index=0, layers=2, kv_heads=2, head_dim=64, value_dim=64)


def evidence(
    attention: Tensor | None,
    *,
    real: Tensor | None = None,
    widths: Tensor | None = None,
    tail: int | Sequence[int] = 0,
    tokens: int = 0,
) -> Evidence:
    """Of one batch row unless `attention [batch, 2, rows, n]` or `real [batch, n]` have more.

    tail: real tokens newer than these, by batch row if they differ. tokens: n, where there is no attention.
    """
    if real is None:
        batch, tokens = (1, tokens) if attention is None else (attention.shape[0], attention.shape[3])
        real = torch.ones(batch, tokens, dtype=torch.bool)
    if widths is None:
        widths = torch.empty(len(real), 2, 0, dtype=torch.uint8)
    unused = {"key": torch.zeros(len(real), 2, real.shape[1]), "value": torch.zeros(len(real), 2, real.shape[1])}
    newer = torch.tensor(tail).expand(len(real))
    return Evidence(
        tokens=real.shape[1],
        seen=real.sum(-1) + newer,
        newer=int(newer.max()),
        real=real,
        attention=attention,
        low=unused,
        high=unused,
        widths={"key": widths, "value": widths},
    )


def decide(strategy: AdaptiveStrategy, known: Evidence) -> Tensor:
    """Widths `[batch, heads, n]`, after checking that they are widths."""
    widths = strategy.widths(LAYER, known)
    assert torch.equal(widths["key"], widths["value"])
    assert widths["key"].dtype == torch.uint8
    assert widths["key"].shape == (len(known.real), 2, known.tokens)
    assert torch.isin(widths["key"], torch.tensor([0, 16], dtype=torch.uint8)).all()
    return widths["key"]


def kept(strategy: AdaptiveStrategy, known: Evidence, row: int = 0, head: int = 0) -> list[int]:
    """Positions of the tokens that stay."""
    return decide(strategy, known)[row, head].nonzero().flatten().tolist()


def scores(tokens: int, best: Sequence[int] = (), batch: int = 1, rows: int = 1) -> Tensor:
    """Attention in which `best` come first, in this order, and then the others, the oldest last."""
    attention = torch.linspace(0, 0.5, tokens).expand(batch, 2, rows, tokens).clone()
    attention[..., list(best)] = torch.linspace(2, 1, len(best))
    return attention


def against(tokens: int, least: Sequence[int] = (), rows: int = 8) -> Tensor:
    """Of `rows` queries none finds `least` unimportant, and all find the others so."""
    attention = torch.ones(1, 2, rows, tokens, dtype=torch.bool)
    attention[..., list(least)] = False
    return attention


def random_attention(batch: int, rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 2, rows, tokens, generator=torch.Generator().manual_seed(seed))


# ---- the budget, of both -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("baseline", BASELINES)
def test_budget_is_exact_for_every_row_and_head_and_padding_is_no_part_of_it(baseline, keep):
    real = torch.arange(200) >= torch.tensor([0, 1, 77, 140])[:, None]
    widths = decide(baseline(keep=keep), evidence(random_attention(4, 8, 200), real=real))
    budget = {0.2: [40, 40, 25, 12], 0.5: [100, 100, 62, 30], 0.9: [180, 180, 111, 54]}[keep]
    assert (widths > 0).sum(-1).tolist() == [[count, count] for count in budget]
    assert not widths.movedim(1, -1)[~real].any()


@pytest.mark.parametrize("baseline", BASELINES)
def test_rows_and_heads_are_independent(baseline):
    real = torch.arange(100) >= torch.tensor([0, 40])[:, None]
    attention = random_attention(2, 8, 100)
    both = decide(baseline(keep=0.3), evidence(attention, real=real, tail=[10, 5]))
    for row, tail in ((0, 10), (1, 5)):
        one = evidence(attention[row : row + 1], real=real[row : row + 1], tail=tail)
        assert torch.equal(decide(baseline(keep=0.3), one)[0], both[row])
    swapped = decide(baseline(keep=0.3), evidence(attention.flip(1), real=real, tail=[10, 5]))
    assert torch.equal(swapped, both.flip(1))


@pytest.mark.parametrize("baseline", BASELINES)
def test_padding_in_front_changes_nothing(baseline):
    attention = random_attention(1, 8, 60)
    alone = decide(baseline(keep=0.4), evidence(attention))
    padded = evidence(torch.nn.functional.pad(attention, (30, 0)), real=(torch.arange(90) >= 30)[None])
    assert torch.equal(decide(baseline(keep=0.4), padded)[..., 30:], alone)


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_exact_tail_is_part_of_the_budget(baseline):
    attention = random_attention(2, 8, 800)
    known = evidence(attention, real=torch.arange(800) >= torch.tensor([0, 100])[:, None], tail=[50, 20])
    # 0.2 * 850 - 50 and 0.2 * 720 - 20
    assert (decide(baseline(keep=0.2), known) > 0).sum(-1).tolist() == [[120, 120], [124, 124]]


@pytest.mark.parametrize("baseline", BASELINES)
def test_tokens_before_a_tail_that_takes_the_budget_get_half_their_share(baseline):
    known = evidence(random_attention(1, 8, 64), tail=128)
    assert (decide(baseline(keep=0.2), known) > 0).sum(-1).tolist() == [[7, 7]]
    assert (decide(baseline(keep=1), known) > 0).all()


@pytest.mark.parametrize("baseline", BASELINES)
def test_what_was_dropped_stays_dropped_and_takes_no_place(baseline):
    # the best of all, and the newest of those that have a width already
    present = torch.full((1, 2, 90), 16, dtype=torch.uint8)
    present[..., [3, 50, 89]] = 0
    attention = torch.arange(100.0).expand(1, 2, 4, 100).clone()
    attention[..., 3] = 1000
    attention = -attention if baseline is Scissorhands else attention
    widths = decide(baseline(keep=0.2), evidence(attention, widths=present))
    assert not widths[..., [3, 50, 89]].any()
    assert (widths > 0).sum(-1).tolist() == [[20, 20]]


@pytest.mark.parametrize("baseline", BASELINES)
def test_nothing_comes_back_where_too_little_is_held_for_the_budget(baseline):
    present = torch.zeros(1, 2, 100, dtype=torch.uint8)
    present[..., :5] = 16
    widths = decide(baseline(keep=0.5), evidence(random_attention(1, 8, 100), widths=present))
    assert torch.equal(widths, present)


@pytest.mark.parametrize("baseline", BASELINES)
def test_without_attention_nothing_is_dropped(baseline):
    present = torch.full((2, 2, 30), 16, dtype=torch.uint8)
    present[0, 1, 7] = 0
    real = torch.arange(40) >= torch.tensor([0, 12])[:, None]
    widths = decide(baseline(keep=0.1), evidence(None, real=real, widths=present))
    expected = real[:, None].repeat(1, 2, 1)
    expected[0, 1, 7] = False
    assert torch.equal(widths > 0, expected)


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_budget_of_everything_keeps_everything_but_padding(baseline):
    real = torch.arange(50) >= torch.tensor([0, 13])[:, None]
    widths = decide(baseline(keep=1), evidence(random_attention(2, 8, 50), real=real, tail=[0, 3]))
    assert torch.equal(widths > 0, real[:, None].expand(-1, 2, -1))


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_few_tokens_keep_at_least_the_newest(baseline, tokens):
    assert kept(baseline(keep=0.01, recent=0), evidence(torch.ones(1, 2, 4, tokens))) == [tokens - 1]


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_row_that_is_all_padding_keeps_nothing(baseline):
    real = torch.stack([torch.ones(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)])
    widths = decide(baseline(keep=0.5), evidence(torch.zeros(2, 2, 4, 10), real=real))
    assert not widths[1].any()


@pytest.mark.parametrize("baseline", BASELINES)
def test_of_equal_tokens_the_newer_stay(baseline):
    assert kept(baseline(keep=0.25, recent=0), evidence(torch.ones(1, 2, 4, 20))) == [15, 16, 17, 18, 19]


@pytest.mark.parametrize("keep", [0.2, 0.5])
@pytest.mark.parametrize("baseline", BASELINES)
def test_budget_grows_with_the_text_over_many_decisions(baseline, keep):
    strategy, pads, start = baseline(keep=keep), torch.tensor([0, 40]), 130
    widths = None
    for step, tokens in enumerate(range(start, start + 10 * 64, 64)):
        real = torch.arange(tokens) >= pads[:, None]
        known = evidence(random_attention(2, 8, tokens, seed=step), real=real, widths=widths)
        before, widths = widths, decide(strategy, known)
        budget = [round(keep * (tokens - pad) + 0.499) for pad in pads.tolist()]
        assert (widths > 0).sum(-1).tolist() == [[count, count] for count in budget]
        if before is not None:
            assert not widths[..., : before.shape[-1]][before == 0].any()


@pytest.mark.parametrize("baseline", BASELINES)
def test_rows_are_exact_or_not_there(baseline):
    formats = baseline().formats(LAYER)
    assert formats.key == formats.value == (Format(codes="exact"),)
    assert (formats.heads, formats.drops) == ("apart", True)


@pytest.mark.parametrize(
    ("baseline", "settings"),
    [
        (H2O, {"keep": 0}),
        (H2O, {"keep": 1.01}),
        (H2O, {"recent": -0.1}),
        (H2O, {"recent": 1.5}),
        (H2O, {"interval": 0}),
        (H2O, {"window": 5}),
        (Scissorhands, {"keep": 0}),
        (Scissorhands, {"keep": 2}),
        (Scissorhands, {"recent": -1}),
        (Scissorhands, {"recent": 0.5}),
        (Scissorhands, {"window": 0}),
        (Scissorhands, {"window": 513}),
    ],
)
def test_settings_that_make_no_sense_are_refused(baseline, settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        baseline(**settings)


# ---- H2O -----------------------------------------------------------------------------------------------------------


def test_h2o_keeps_the_newest_and_the_heavy_hitters():
    attention = scores(20, best=(2, 7, 11))
    attention[:, 1] = scores(20, best=(0, 1, 2))[:, 0]
    known = evidence(attention)
    assert kept(H2O(keep=0.2), known, head=0) == [2, 7, 18, 19]
    assert kept(H2O(keep=0.2), known, head=1) == [0, 1, 18, 19]


@pytest.mark.parametrize(
    ("recent", "expected"),
    [(0, [1, 2, 3, 4]), (0.25, [1, 2, 3, 19]), (0.3, [1, 2, 18, 19]), (1, [16, 17, 18, 19])],
)
def test_h2o_divides_its_budget_as_told(recent, expected):
    assert kept(H2O(keep=0.2, recent=recent), evidence(scores(20, best=(1, 2, 3, 4)))) == expected


def test_h2o_counts_the_tail_among_the_newest():
    attention = scores(36, best=range(10))
    # 8 of 40 stay, 4 of them for being new
    assert kept(H2O(keep=0.2), evidence(attention[..., :40], tail=4)) == [0, 1, 2, 3]
    assert kept(H2O(keep=0.2), evidence(scores(38, best=range(10)), tail=2)) == [0, 1, 2, 3, 36, 37]
    # a tail that takes more leaves the rest to the heavy hitters, in the end half of 0.2 * 30
    assert kept(H2O(keep=0.2), evidence(scores(34, best=range(10)), tail=6)) == [0, 1, 2, 3]
    assert kept(H2O(keep=0.2), evidence(scores(30, best=range(10)), tail=10)) == [0, 1, 2]


def test_h2o_finds_the_newest_among_the_real_tokens():
    # padding may stand anywhere
    real = torch.ones(1, 20, dtype=torch.bool)
    real[:, [0, 1, 17, 19]] = False
    assert kept(H2O(keep=0.25, recent=0.5), evidence(scores(20, best=(5, 6, 7)), real=real)) == [5, 6, 16, 18]


def test_h2o_sums_over_the_query_heads_of_a_kv_head():
    attention = torch.rand(2, 2, 3, 4, 5)
    torch.testing.assert_close(H2O().notice(attention), attention.sum(2))
    assert H2O().attention_window is None


# ---- Scissorhands --------------------------------------------------------------------------------------------------


def test_scissorhands_keeps_what_the_fewest_queries_find_unimportant():
    attention = against(20, least=(4, 9))
    attention[:, 0, 0, 12] = False
    attention[:, 1, :3, 13] = False
    assert kept(Scissorhands(keep=0.25, recent=2), evidence(attention), head=0) == [4, 9, 12, 18, 19]
    assert kept(Scissorhands(keep=0.25, recent=2), evidence(attention), head=1) == [4, 9, 13, 18, 19]


def test_scissorhands_keeps_the_newest_beyond_its_budget():
    assert kept(Scissorhands(keep=0.1, recent=6), evidence(against(20, least=(4, 9)))) == [14, 15, 16, 17, 18, 19]
    assert kept(Scissorhands(keep=0.1, recent=6), evidence(against(20, least=(4, 9)), tail=4)) == [18, 19]


def test_scissorhands_notices_what_gets_less_than_the_average():
    attention = torch.tensor(
        [
            # two queries that see 4 and 5 tokens: the averages are 1/4 and 1/5
            [0.3, 0.24, 0.26, 0.2, 0.0],
            [0.3, 0.24, 0.19, 0.06, 0.21],
        ]
    )[None, None, None]
    noticed = Scissorhands().notice(attention)
    assert noticed.shape == (1, 1, 2, 5)
    assert noticed[0, 0].int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 1, 0]]
    assert Scissorhands(window=7).attention_window == 7


def test_scissorhands_takes_the_mean_of_the_query_heads_of_a_kv_head():
    apart = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1]])[None, None, :, None]
    assert Scissorhands().notice(apart)[0, 0, 0].int().tolist() == [0, 0, 1]


def test_scissorhands_averages_over_the_tokens_that_are_there():
    # of 8 tokens two are padding, two were dropped: 0.2 is less than a quarter, though more than an eighth
    attention = torch.tensor([0, 0, 0.2, 0, 0.3, 0, 0.3, 0.2])[None, None, None, None]
    noticed = Scissorhands().notice(attention)[0, 0, 0]
    assert noticed[[2, 4, 6, 7]].int().tolist() == [1, 0, 0, 1]


def test_scissorhands_holds_nothing_against_a_token_for_queries_before_it_or_of_padding():
    attention = torch.ones(4, 4).tril()
    attention = (attention / attention.sum(-1, keepdim=True) * torch.tensor([0, 1, 1, 1])[:, None])[None, None, None]
    attention[0, 0, 0, 3] = torch.tensor([0.4, 0.4, 0.0, 0.2])
    noticed = Scissorhands().notice(attention)[0, 0]
    assert not noticed[0].any()
    assert not noticed.triu(1).any()
    # a token that is seen, with a probability too small for a float, is unimportant
    assert noticed[3].int().tolist() == [0, 0, 1, 1]


def test_scissorhands_rows_of_earlier_forwards_padded_with_zeros_hold_nothing_against_newer_tokens():
    attention = against(20)
    attention[:, :, :6, 10:] = False
    assert kept(Scissorhands(keep=0.5, recent=0), evidence(attention)) == list(range(10, 20))


# ---- on a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model()


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def step(model: LlamaForCausalLM, ids: Tensor, cache: Any, **inputs: Any) -> Tensor:
    return model(ids, past_key_values=cache, **inputs).logits


def eager_attention(ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """By layer `[batch, kv_heads, query heads of one, queries, keys]`, of one forward without our cache."""
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        found = eager(ids, attention_mask=mask, output_attentions=True).attentions
    return [attention.unflatten(1, (2, 2)) for attention in found]


@pytest.mark.parametrize("baseline", BASELINES)
def test_generation_meets_the_budget_and_saves_memory(model, baseline):
    ids = tokens(2, 200)
    sizes = {}
    for keep, held in ((1, 264), (0.5, 132), (0.2, 53)):
        cache = PackedCache(model, baseline(keep=keep))
        generated = model.generate(ids, past_key_values=cache, max_new_tokens=80, do_sample=False)
        assert generated.shape == (2, 280)
        for layer in cache.packed_layers:
            assert layer.packed_tokens == 264
            assert (layer.pools["key"].widths > 0).sum(-1).tolist() == [held] * 4
        sizes[keep] = cache.memory().device_bytes
    assert sizes[0.2] < sizes[0.5] < sizes[1]


@pytest.mark.parametrize("baseline", BASELINES)
def test_keeping_everything_is_exact_to_rounding(model, baseline):
    ids = tokens(2, 190)
    cache, stock = PackedCache(model, baseline(keep=1)), DynamicCache(config=model.config)
    plain = tiny_model()
    for start, stop in ((0, 150), (150, 151), (151, 180), (180, 190)):
        logits = step(model, ids[:, start:stop], cache)
        expected = step(plain, ids[:, start:stop], stock)
        # rows of 16 bits are float16 here
        torch.testing.assert_close(logits, expected, rtol=0, atol=0.02)
    assert cache.packed_layers[0].packed_tokens == 150


@pytest.mark.parametrize(
    ("chunks", "interval", "tolerance"), [((40,), 64, 1e-5), ((25, 10, 1, 4), 64, 1e-5), ((25, 10, 1, 4), 10, 5e-3)]
)
def test_h2o_score_is_the_sum_of_eager_attention(model, chunks, interval, tolerance):
    ids = tokens(2, 40)
    mask = (torch.arange(40) >= torch.tensor([0, 9])[:, None]).long()
    # at an interval of 10 there are rows of float16 in between
    cache = PackedCache(model, H2O(keep=1, interval=interval))
    for stop, chunk in zip(torch.tensor(chunks).cumsum(0).tolist(), chunks, strict=True):
        step(model, ids[:, stop - chunk : stop], cache, attention_mask=mask[:, :stop])
    for layer, attention in zip(cache.packed_layers, eager_attention(ids, mask), strict=True):
        queries = attention * mask[:, None, None, :, None]
        torch.testing.assert_close(layer.history.rows, queries.sum((2, 3))[:, :, None], rtol=0, atol=tolerance)


def test_h2o_drops_what_eager_attention_says(model):
    ids = tokens(1, 120)
    cache = PackedCache(model, H2O(keep=0.2, recent=0.25))
    step(model, ids, cache)
    for layer, attention in zip(cache.packed_layers, eager_attention(ids), strict=True):
        heavy = attention.sum((2, 3))[..., :114].topk(18).indices
        expected = torch.zeros(1, 2, 120, dtype=torch.bool).scatter_(2, heavy, True)
        expected[..., 114:] = True
        assert torch.equal(layer.pools["key"].widths.unflatten(0, (1, 2)) > 0, expected)


def test_scissorhands_asks_the_newest_queries(model):
    ids = tokens(1, 60)
    cache = PackedCache(model, Scissorhands(window=12, interval=62))
    for start, stop in ((0, 53), (53, 60)):
        step(model, ids[:, start:stop], cache)
    for layer, attention in zip(cache.packed_layers, eager_attention(ids), strict=True):
        shared = attention.mean(2)
        average = 1 / torch.arange(1, 61)[:, None]
        expected = ((shared < average) & torch.ones(60, 60, dtype=torch.bool).tril())[:, :, 50:]
        # two more queries are to come before the decision
        assert torch.equal(layer.history.rows, expected)


@pytest.mark.parametrize("baseline", BASELINES)
def test_padded_rows_keep_what_they_keep_alone(model, baseline):
    ids, pads = tokens(2, 130), [0, 45]
    mask = (torch.arange(130) >= torch.tensor(pads)[:, None]).long()
    strategy = baseline(keep=0.3)
    both = PackedCache(model, strategy)
    model.generate(ids, attention_mask=mask, past_key_values=both, max_new_tokens=70, do_sample=False)
    for row, pad in enumerate(pads):
        alone = PackedCache(model, strategy)
        model.generate(ids[row : row + 1, pad:], past_key_values=alone, max_new_tokens=70, do_sample=False)
        for one, layer in zip(alone.packed_layers, both.packed_layers, strict=True):
            widths = layer.pools["key"].widths.unflatten(0, (2, 2))
            assert not widths[row, :, :pad].any()
            assert torch.equal(one.pools["key"].widths, widths[row, :, pad:])


def test_a_dropped_token_is_attended_to_no_more(model):
    ids = tokens(1, 130)
    cache = PackedCache(model, H2O(keep=0.2))
    step(model, ids[:, :129], cache)
    before = [layer.history.rows.clone() for layer in cache.packed_layers]
    step(model, ids[:, 129:], cache)
    for layer, sums in zip(cache.packed_layers, before, strict=True):
        grown = (layer.history.rows[..., :129] > sums)[0, :, 0]
        held = layer.pools["key"].widths > 0
        assert not grown[~held].any()
        assert grown[held].float().mean() > 0.5


@pytest.mark.parametrize("baseline", BASELINES)
def test_what_was_dropped_survives_a_file(model, baseline, tmp_path):
    ids, strategy = tokens(2, 120), baseline(keep=0.3)
    cache = PackedCache(model, strategy)
    step(model, ids[:, :100], cache)
    step(model, ids[:, 100:110], cache)
    cache.save(tmp_path / "cache.safetensors")
    again = PackedCache.load(tmp_path / "cache.safetensors", model, strategy)
    torch.testing.assert_close(step(model, ids[:, 110:], again), step(model, ids[:, 110:], cache))
    for one, other in zip(cache.packed_layers, again.packed_layers, strict=True):
        assert torch.equal(one.history.rows, other.history.rows)
