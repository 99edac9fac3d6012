"""QAQ decides as the paper's equations and the authors' code do, and holds still where nothing changes."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from cachequant.core import Evidence, LayerSpec, round_up
from cachequant.core.calibration import Calibration, Recipe, Record, Statistics
from cachequant.core.calibration import Evidence as Measurements
from cachequant.kernels.format import row_bits
from cachequant.kernels.rows import decode_rows, encode_rows
from cachequant.strategies.qaq import QAQ, bits_for, key_deviation, largest_score, value_deviation

SPEC = LayerSpec(index=0, layers=2, kv_heads=2, head_dim=64, value_dim=32)
PROFILES = ["paper", "repository"]
INFINITY = math.inf

# allowed deviations so that the worked examples below hold for either profile: the values' root mean square is 1
EXAMPLE: dict[str, Any] = {"sigma_key": 0.1, "sigma_value": 0.1, "alpha": 0, "min_bits": 0, "granularity": "head"}


def evidence_of(
    spans: Tensor,
    attention: Tensor | None = None,
    present: Tensor | None = None,
    seen: int | None = None,
    newer: int = 0,
    norm: float = 300.0,
    size: float = 1.0,
) -> Evidence:
    """Ranges of `spans [batch, heads, n]` around 1 for keys and values alike; present: widths of both."""
    batch, heads, tokens = spans.shape
    return Evidence(
        tokens=tokens,
        seen=torch.full((batch,), tokens + newer if seen is None else seen),
        newer=newer,
        real=torch.ones(batch, tokens, dtype=torch.bool),
        attention=attention,
        low={"key": 1 - spans / 2, "value": 1 - spans / 2},
        high={"key": 1 + spans / 2, "value": 1 + spans / 2},
        widths={} if present is None else {"key": present, "value": present},
        measured={
            name: torch.full((batch, heads), float(n)) for name, n in (("query_norm", norm), ("value_size", size))
        },
    )


def tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


parametrize_profiles = pytest.mark.parametrize("profile", PROFILES)


# ---- worked examples: bits before they are rounded up to a width there is ------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "score", "paper", "repository"),
    [
        (0.1, 1, 6.3514, 5.3863),
        (0.1, 0.3, 4.6144, 3.7276),
        (0.1, 0.05, 2.0294, 1.6047),
        (0.1, 0.005, -1.2925, 0.2680),
        (0.1, 0, -INFINITY, 0),
        (1, 1, 3.0294, 2.3455),
        (1, 0.3, 1.2925, 1.1536),
        (1, 0.05, -1.2925, 0.2680),
    ],
)
def test_worked_example_bits_of_values(sigma, score, paper, repository):
    deviation = value_deviation(sigma, tensor(score), torch.tensor(50))
    assert bits_for(tensor(4.0), deviation, "paper").item() == pytest.approx(paper, abs=1e-3)
    assert bits_for(tensor(4.0), deviation, "repository").item() == pytest.approx(repository, abs=1e-3)


def test_worked_example_deviation_of_values():
    assert value_deviation(0.1, tensor(0.3), torch.tensor(50)).item() == pytest.approx(0.0471405, abs=1e-6)


@pytest.mark.parametrize(
    ("tokens", "sigma", "deviation", "paper", "repository"),
    [
        (50, 0.01, 0.027521, 7.3909, 6.4079),
        (50, 0.1, 0.104523, 5.4656, 4.5295),
        (50, 1, 0.161706, None, None),
        (4096, 0.1, 0.200255, 4.5276, 3.6476),
    ],
)
def test_worked_example_bits_of_keys(tokens, sigma, deviation, paper, repository):
    found = key_deviation(sigma, tensor(300.0), torch.tensor(tokens))
    assert found.item() == pytest.approx(deviation, abs=1e-6)
    bits = [bits_for(tensor(16.0), found, profile).item() for profile in PROFILES]
    if paper is not None:
        assert bits == pytest.approx([paper, repository], abs=1e-3)
    else:
        assert [math.ceil(b) for b in bits] == [5, 4]


# the newest three queries of two heads, six tokens
ATTENTION = torch.tensor([
    [
        [0.228, 0.254, 0.284, 0.234, 0, 0],
        [0.064, 0.264, 0.074, 0.380, 0.218, 0],
        [0.105, 0.275, 0.169, 0.206, 0.023, 0.223],
    ],
    [
        [0.175, 0.143, 0.476, 0.205, 0, 0],
        [0.138, 0.106, 0.468, 0.125, 0.163, 0],
        [0.242, 0.041, 0.247, 0.041, 0.285, 0.144],
    ],
])[None]  # fmt: skip
SPANS = torch.tensor([[0.93, 1.37, 2.09, 1.64, 2.37, 0.93], [2.44, 2.08, 2.29, 0.77, 1.78, 3.23]])[None]
RAW = {
    "paper": [[0.5843, 1.4136, 2.0694, 2.1397, 1.8692, 0.5523], [2.0619, 1.0726, 2.9463, 0.1586, 1.8428, 1.7176]],
    "repository": [[0.8071, 1.2216, 1.6316, 1.6796, 1.4991, 0.7935], [1.6265, 1.0368, 2.2791, 0.6398, 1.4821, 1.4030]],
}


def test_worked_example_scores_are_the_largest_of_the_window():
    expected = [[0.228, 0.275, 0.284, 0.38, 0.218, 0.223], [0.242, 0.143, 0.476, 0.205, 0.285, 0.144]]
    assert torch.equal(largest_score(ATTENTION, SPANS), torch.tensor([expected]))


@parametrize_profiles
def test_worked_example_bits_by_attention(profile):
    deviation = value_deviation(0.1, largest_score(ATTENTION, SPANS), torch.tensor(6))
    assert_close(bits_for(SPANS, deviation, profile), torch.tensor([RAW[profile]]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("profile", "value"),
    [
        # bits [1 2 3 3 8 8] and [3 2 3 1 8 8]
        ("paper", [[2, 2, 3, 3, 8, 8], [3, 2, 3, 2, 8, 8]]),
        # bits [1 2 2 2 8 8] and [2 2 3 1 8 8]
        ("repository", [[2, 2, 2, 2, 8, 8], [2, 2, 3, 2, 8, 8]]),
    ],
    ids=PROFILES,
)
def test_worked_example_widths_of_values(profile, value):
    decided = QAQ(**EXAMPLE, window=3, profile=profile).widths(SPEC, evidence_of(SPANS, ATTENTION))
    assert decided["value"].tolist() == [value]


@pytest.mark.parametrize(
    ("window", "key"),
    [(1, [[3, 3, 4, 3, 4, 3], [4, 4, 4, 3, 4, 4]]), (3, [[3, 3, 4, 3, 8, 8], [4, 4, 4, 3, 8, 8]])],
    ids="window{}".format,
)
def test_worked_example_widths_of_keys(window, key):
    decided = QAQ(**EXAMPLE, window=window, profile="repository").widths(SPEC, evidence_of(SPANS, ATTENTION))
    assert decided["key"].tolist() == [key]


@pytest.mark.parametrize(("numbers", "each"), [(8, 1), (128, 1), (4096, 21)])
@parametrize_profiles
def test_worked_example_counts_of_outliers(numbers, each, profile):
    for fmt in QAQ(alpha=0.01, profile=profile)._rows(numbers):
        assert (fmt.trim, fmt.outliers) == (each, 2 * each)


# ---- what the equations promise ------------------------------------------------------------------------------------


def test_numbers_deviate_by_no_more_than_the_equations_allow():
    numbers = uniform(200, 256) * 6 - 2
    for deviation in (0.5, 0.2, 0.1, 0.05, 0.01):
        bits = bits_for(numbers.amax() - numbers.amin(), tensor(deviation), "paper")
        width = int(round_up(bits, (2, 3, 4, 8)))
        fmt = next(fmt for fmt in QAQ(alpha=0)._rows(256) if row_bits(fmt) == width)
        error = decode_rows(encode_rows(numbers, fmt), fmt, 256) - numbers
        assert error.square().mean().sqrt() <= 1.01 * deviation


def pack_each(strategy: QAQ, states: Tensor, widths: Tensor) -> Tensor:
    """`states [n, numbers]` as rows of `widths [n]` stand for them."""
    back = states.clone()
    for fmt in strategy._rows(states.shape[-1]):
        here = widths == row_bits(fmt)
        back[here] = decode_rows(encode_rows(states[here], fmt), fmt, states.shape[-1])
    return back


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.2])
def test_outputs_deviate_by_no_more_than_their_share_of_the_values(sigma):
    generator = torch.Generator().manual_seed(0)
    values = (
        torch.randn(100, 32, generator=generator)
        * torch.logspace(-1, 1, 100)[torch.randperm(100, generator=generator)][:, None]
    )
    scores = (3 * torch.randn(1, 1, 1, 100, generator=generator)).softmax(-1)
    strategy = QAQ(alpha=0, window=1, granularity="head", sigma_value=sigma)
    size = values.square().mean().sqrt()
    spans = values.amax(-1) - values.amin(-1)
    widths = strategy.widths(SPEC, evidence_of(spans[None, None], scores, size=float(size)))["value"][0, 0]
    error = scores[0, 0] @ (pack_each(strategy, values, widths) - values)
    assert error.square().mean().sqrt() <= sigma * size
    assert len(widths.unique()) > 1


@pytest.mark.parametrize("sigma", [0.001, 0.003])
def test_scores_deviate_by_no_more_than_is_allowed_where_attention_is_even(sigma):
    # the bound takes all scores to be alike, about 1 / 100; a large one deviates by more
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(100, 64, generator=generator), torch.randn(200, 64, generator=generator) / 16
    strategy = QAQ(alpha=0, window=1, granularity="head", sigma_key=sigma)
    measured = strategy.measure(
        replace(SPEC, kv_heads=1),
        strategy.notice_query(SPEC, queries[None, None, None]),
        {"key": keys[None, None], "value": keys[None, None]},
        torch.ones(1, 100, dtype=torch.bool),
    )
    spans = keys.amax(-1) - keys.amin(-1)
    evidence = replace(evidence_of(spans[None, None]), measured=measured)
    widths = strategy.widths(SPEC, evidence)["key"][0, 0]
    back = pack_each(strategy, keys, widths)
    error = (queries @ back.T).softmax(-1) - (queries @ keys.T).softmax(-1)
    assert error.square().mean().sqrt() <= sigma


# ---- edges ---------------------------------------------------------------------------------------------------------


EDGES = tensor(0, 1e-30, 1e-8, 1, 1e30, INFINITY)


@parametrize_profiles
def test_bits_are_never_nan(profile):
    spans, sizes, scores = EDGES[:, None, None], EDGES[:-1, None], EDGES[:4]
    for tokens in torch.tensor([0, 1, 2, 10**6]):
        assert not bits_for(spans, value_deviation(0.1 * sizes, scores, tokens), profile).isnan().any()
        assert not bits_for(spans, key_deviation(0.1, EDGES[:-1], tokens), profile).isnan().any()


@parametrize_profiles
@pytest.mark.parametrize("min_bits", [0, 2, 3])
def test_what_needs_no_bits_gets_the_fewest(profile, min_bits):
    strategy = QAQ(min_bits=min_bits, window=1, profile=profile)
    spans = torch.tensor([[[0.0, 4.0]]])
    # one token has no range, the other no attention
    decided = strategy.widths(SPEC, evidence_of(spans, torch.tensor([[[[0.5, 0.0]]]])))
    assert decided["key"][..., 0].item() == min_bits
    assert decided["value"].tolist() == [[[min_bits, min_bits]]]


@parametrize_profiles
def test_a_single_token_needs_no_bits_for_its_key(profile):
    decided = QAQ(window=1, profile=profile).widths(SPEC, evidence_of(torch.full((1, 1, 1), 9.0)))
    assert decided["key"].tolist() == [[[2]]]


def test_only_the_paper_profile_goes_by_the_size_of_values():
    spans = tensor(0.5, 1, 2, 4, 8)[None, None]
    settings: dict[str, Any] = {"window": 1, "sigma_value": 0.3}
    small, large = evidence_of(spans, size=1), evidence_of(8 * spans, size=8)
    paper, repository = QAQ(**settings), QAQ(**settings, profile="repository")
    assert torch.equal(paper.widths(SPEC, small)["value"], paper.widths(SPEC, large)["value"])
    assert (repository.widths(SPEC, small)["value"] < repository.widths(SPEC, large)["value"]).any()
    absolute = evidence_of(8 * spans, size=1)
    assert torch.equal(repository.widths(SPEC, absolute)["value"], repository.widths(SPEC, large)["value"])


def test_attention_nobody_saw_counts_as_one():
    spans = uniform(2, 2, 9) * 4
    strategy = QAQ(granularity="head", window=1, sigma_value=0.3)
    unseen, all_of_it = evidence_of(spans), evidence_of(spans, torch.ones(2, 2, 1, 9))
    assert torch.equal(strategy.widths(SPEC, unseen)["value"], strategy.widths(SPEC, all_of_it)["value"])


def test_a_window_longer_than_the_sequence_leaves_all_at_the_most_bits():
    decided = QAQ(window=512, max_bits=4).widths(SPEC, evidence_of(SPANS[:, :1]))
    assert all((widths == 4).all() for widths in decided.values())


@pytest.mark.parametrize(("newer", "forced"), [(0, 4), (1, 3), (3, 1), (4, 0), (100, 0)])
def test_tokens_seen_by_fewer_queries_than_the_window_get_the_most_bits(newer, forced):
    strategy = QAQ(window=5, sigma_key=0.5, sigma_value=1)
    decided = strategy.widths(SPEC, evidence_of(torch.full((1, 1, 9), 1e-3), newer=newer))
    assert decided["key"].tolist() == [[[2] * (9 - forced) + [8] * forced]]
    assert decided["value"].tolist() == decided["key"].tolist()


@pytest.mark.parametrize("max_bits", [4, 8, 16])
@parametrize_profiles
def test_what_needs_more_bits_than_there_are_gets_the_most(profile, max_bits):
    strategy = QAQ(max_bits=max_bits, window=1, profile=profile)
    decided = strategy.widths(SPEC, evidence_of(torch.full((1, 1, 3), 1e30)))
    assert all((widths == max_bits).all() for widths in decided.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_attention_of_any_dtype_is_read(dtype):
    strategy = QAQ(**EXAMPLE, window=1)
    ours = strategy.widths(SPEC, evidence_of(SPANS, ATTENTION.to(dtype)))
    theirs = strategy.widths(SPEC, evidence_of(SPANS, ATTENTION.to(dtype).float()))
    assert all(torch.equal(ours[side], theirs[side]) for side in ours)


@pytest.mark.parametrize("granularity", ["head", "layer"])
@parametrize_profiles
def test_widths_are_uint8_of_the_formats_one_per_row(granularity, profile):
    strategy = QAQ(granularity=granularity, profile=profile, min_bits=0, max_bits=16)
    heads = 2 if granularity == "head" else 1
    spans = uniform(3, heads, 50) * torch.logspace(-3, 3, 50)
    formats = strategy.formats(SPEC)
    for side, widths in strategy.widths(SPEC, evidence_of(spans, uniform(3, 2, 5, 50, seed=1))).items():
        assert widths.dtype == torch.uint8 and widths.shape == (3, heads, 50)
        assert set(widths.unique().tolist()) <= {0, *(row_bits(fmt) for fmt in getattr(formats, side))}


def test_rows_of_a_batch_are_decided_apart():
    strategy = QAQ(granularity="head", window=3)
    spans, attention = uniform(3, 2, 40) * 4, uniform(3, 2, 3, 40, seed=1)
    evidence = replace(evidence_of(spans, attention), seen=torch.tensor([5, 40, 20]))
    together = strategy.widths(SPEC, evidence)
    for row in range(3):
        alone = evidence_of(spans[row : row + 1], attention[row : row + 1], seen=int(evidence.seen[row]))
        decided = strategy.widths(SPEC, alone)
        assert all(torch.equal(together[side][row], decided[side][0]) for side in together)


def test_nothing_is_decided_about_no_tokens():
    decided = QAQ().widths(SPEC, evidence_of(torch.empty(2, 1, 0), seen=4, newer=4))
    assert all(widths.shape == (2, 1, 0) for widths in decided.values())


# ---- hysteresis ----------------------------------------------------------------------------------------------------


def spans_that_want(bits: list[float], strategy: QAQ, tokens: int) -> Tensor:
    """Ranges `[1, 1, n]` of keys that want `bits`."""
    deviation = key_deviation(strategy.sigma_key, tensor(300.0), torch.tensor(tokens))
    return (2 * math.sqrt(3) * deviation * 2 ** torch.tensor(bits))[None, None]


@pytest.mark.parametrize(
    ("present", "wanted", "width"),
    [
        (3, 3.2, 3),
        (3, 3.3, 4),
        (4, 2.8, 4),
        (4, 2.7, 3),
        (3, 4.1, 4),
        (2, 7.9, 8),
        (8, 3.9, 8),
        (8, 3.7, 4),
        (8, 2.9, 4),
        (8, 1.9, 3),
        (8, 1.7, 2),
        (0, 0.2, 0),
        (0, 0.3, 2),
        (2, -0.2, 2),
        (2, -0.3, 0),
        (16, 2.5, 3),
    ],
)
def test_a_width_changes_when_what_is_wanted_is_further_off_than_the_hysteresis(present, wanted, width):
    strategy = QAQ(hysteresis=0.25, window=1, min_bits=0)
    evidence = evidence_of(spans_that_want([wanted], strategy, 40), seen=40)
    held = replace(evidence, widths={"key": torch.tensor([[[present]]], dtype=torch.uint8)})
    assert strategy.widths(SPEC, held)["key"].item() == width


def test_without_hysteresis_widths_are_what_is_wanted():
    strategy = QAQ(hysteresis=0, window=1)
    spans = spans_that_want([1.9, 2.1, 3.1, 4.1, 7.9], strategy, 5)
    present = torch.tensor([[[8, 2, 2, 2, 2]]], dtype=torch.uint8)
    assert strategy.widths(SPEC, evidence_of(spans, present=present))["key"].tolist() == [[[2, 3, 4, 8, 8]]]


@parametrize_profiles
@pytest.mark.parametrize("hysteresis", [0, 0.25, 2])
def test_the_same_evidence_again_changes_nothing(profile, hysteresis):
    strategy = QAQ(granularity="head", hysteresis=hysteresis, profile=profile, min_bits=0, max_bits=16)
    generator = torch.Generator().manual_seed(0)
    spans = uniform(2, 2, 200) * torch.logspace(-2, 2, 200)
    evidence = evidence_of(spans, uniform(2, 2, 5, 200, seed=1))
    before = torch.tensor([0, 2, 3, 4, 8, 16], dtype=torch.uint8)[torch.randint(6, (2, 2, 150), generator=generator)]
    first = strategy.widths(SPEC, replace(evidence, widths={"key": before, "value": before}))
    again = strategy.widths(SPEC, replace(evidence, widths=first))
    assert all(torch.equal(first[side], again[side]) for side in first)


def test_tokens_that_come_new_know_no_hysteresis():
    strategy = QAQ(hysteresis=0.25, window=1)
    spans = spans_that_want([3.1, 3.1], strategy, 2)
    evidence = replace(evidence_of(spans), widths={"key": torch.tensor([[[3]]], dtype=torch.uint8)})
    assert strategy.widths(SPEC, evidence)["key"].tolist() == [[[3, 4]]]


def test_shared_bits_are_the_wider_of_the_two():
    settings: dict[str, Any] = {**EXAMPLE, "window": 1}
    evidence = evidence_of(SPANS, ATTENTION)
    apart, shared = QAQ(**settings).widths(SPEC, evidence), QAQ(**settings, shared_bits=True).widths(SPEC, evidence)
    assert torch.equal(shared["key"], shared["value"])
    assert torch.equal(shared["key"], torch.maximum(apart["key"], apart["value"]))


# ---- granularity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "row", "heads"), [("head", 64, "apart"), ("layer", 128, "together"), ("token", 128, "together")]
)
def test_heads_share_a_row_where_they_share_bits(granularity, row, heads):
    strategy = QAQ(granularity=granularity, alpha=0.02, min_bits=0, max_bits=16)
    formats = strategy.formats(SPEC)
    assert formats.heads == heads and formats.drops
    assert [row_bits(fmt) for fmt in formats.key] == [2, 3, 4, 8, 16]
    assert {fmt.trim for fmt in formats.key[:-1]} == {math.ceil(0.01 * row)}
    assert {fmt.trim for fmt in formats.value[:-1]} == {math.ceil(0.01 * row / 2)}
    assert strategy.together == (granularity == "token")
    formats.require_fitting(64, 32, 2)


@pytest.mark.parametrize(("profile", "grid"), [("paper", "midpoint"), ("repository", "mean")])
def test_profiles_have_their_own_grids(profile, grid):
    formats = QAQ(profile=profile, min_bits=3).formats(SPEC)
    assert [(fmt.bits, fmt.grid) for fmt in formats.value] == [(3, grid), (4, grid), (8, grid)]
    assert not formats.drops


def test_a_layer_goes_by_the_head_with_the_largest_score():
    strategy = QAQ(window=1, sigma_value=0.3)
    attention = torch.tensor([[[[0.9, 0.0]], [[0.0, 0.1]]]])
    spans = torch.full((1, 1, 2), 4.0)
    both = strategy.widths(SPEC, evidence_of(spans, attention))["value"]
    largest = strategy.widths(SPEC, evidence_of(spans, torch.tensor([[[[0.9, 0.1]]]])))["value"]
    assert torch.equal(both, largest)
    assert both[0, 0, 0] > both[0, 0, 1]


def test_all_layers_go_by_the_widest_range_the_most_attention_the_largest_queries_and_the_smallest_values():
    strategy = QAQ(granularity="token", window=3)
    first = evidence_of(torch.tensor([[[1.0, 4.0, 2.0]]]), uniform(1, 2, 3, 3) / 2, norm=5, size=2)
    second = evidence_of(torch.tensor([[[2.0, 3.0, 1.0]]]), uniform(1, 2, 2, 3, seed=1) / 2, norm=7, size=1)
    second = replace(second, low={side: low - 9 for side, low in second.low.items()})
    merged = strategy.merge([first, second])
    assert (merged.tokens, merged.newer) == (3, 0)
    for side in ("key", "value"):
        assert torch.equal(merged.low[side], torch.minimum(first.low[side], second.low[side]))
        assert torch.equal(merged.high[side], torch.maximum(first.high[side], second.high[side]))
    assert {name: number.item() for name, number in merged.measured.items()} == {"query_norm": 7, "value_size": 1}
    for each in (merged, first, second):
        assert each.attention is not None
    expected = torch.maximum(first.attention.amax((1, 2)), second.attention.amax((1, 2)))
    assert torch.equal(largest_score(merged.attention, merged.low["key"])[:, 0], expected)
    assert all(widths.shape == (1, 1, 3) for widths in strategy.widths(SPEC, merged).values())


def test_layers_whose_attention_nobody_saw_leave_it_to_the_others():
    strategy = QAQ(granularity="token")
    unseen, seen = evidence_of(SPANS[:, :1]), evidence_of(SPANS[:, :1], ATTENTION)
    assert strategy.merge([unseen, unseen]).attention is None
    merged = strategy.merge([unseen, seen]).attention
    assert merged is not None
    assert torch.equal(merged.amax(2), ATTENTION.amax((1, 2))[:, None])


# ---- what is measured ----------------------------------------------------------------------------------------------

REAL = {
    "no-padding": torch.ones(2, 6, dtype=torch.bool),
    "left-padding": torch.tensor([[False, False, False, True, True, True], [True] * 6]),
    "right-padding": torch.tensor([[True, True, False, False, False, False], [True] * 6]),
}


def measured(strategy: QAQ, query: Tensor | None = None, real: Tensor = REAL["no-padding"]) -> dict[str, Tensor]:
    """What is measured of six tokens of two rows, and `query [2, 2, group, queries, 64]`."""
    generator = torch.Generator().manual_seed(0)
    states = {"key": torch.randn(2, 2, 6, 64, generator=generator), "value": values()}
    return strategy.measure(SPEC, None if query is None else strategy.notice_query(SPEC, query), states, real)


def values() -> Tensor:
    return (
        torch.randn(2, 2, 6, 32, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5.0])[:, None, None]
    )


@pytest.mark.parametrize("poison", [1e6, math.nan], ids=str)
@pytest.mark.parametrize("granularity", ["head", "layer", "token"])
@pytest.mark.parametrize("real", REAL.values(), ids=REAL)
def test_the_size_of_values_is_the_root_mean_square_of_real_tokens(real, granularity, poison):
    states = values().masked_fill(~real[:, None, :, None], poison)
    size = QAQ(granularity=granularity).measure(SPEC, None, {"key": uniform(2, 2, 6, 64), "value": states}, real)[
        "value_size"
    ]
    for row in range(2):
        heads = values()[row, :, real[row]]
        expected = heads.square().mean((1, 2)) if granularity == "head" else heads.square().mean()[None]
        assert_close(size[row], expected.sqrt())


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_without_a_calibration_query_norms_are_the_prompts_90th_percentile(granularity):
    # squared norms of a kv head's queries: 0, 1, ..., 20, in any order
    norms = torch.stack([torch.randperm(21, generator=torch.Generator().manual_seed(row)) for row in range(4)])
    query = torch.zeros(2, 2, 3, 7, 64)
    query[..., 5] = norms.view(2, 2, 3, 7).float().sqrt()
    query[1] *= 2
    expected = torch.tensor([[18.0, 18.0], [72.0, 72.0]])
    norm = measured(QAQ(granularity=granularity), query)["query_norm"]
    assert_close(norm, expected if granularity == "head" else expected[:, :1])


def test_a_layer_goes_by_its_largest_query_norm():
    query = torch.ones(2, 2, 3, 7, 64) * torch.tensor([1.0, 2.0])[:, None, None, None]
    assert measured(QAQ(granularity="layer"), query)["query_norm"].tolist() == [[256], [256]]


def test_queries_of_padding_are_left_out():
    query = uniform(2, 2, 3, 7, 64)
    padded = query.clone()
    padded[0, :, :, :4] = math.nan
    norm = measured(QAQ(granularity="head"), padded)["query_norm"]
    squares = query.square().sum(-1)
    assert_close(norm[0], squares[0, :, :, 4:].flatten(1).quantile(0.9, dim=-1))
    assert_close(norm[1], squares[1].flatten(1).quantile(0.9, dim=-1))


def test_where_no_query_was_seen_the_repositorys_constant_stands_in():
    assert measured(QAQ())["query_norm"].tolist() == [[300], [300]]
    padding = torch.full((2, 2, 3, 7, 64), math.nan)
    padding[1] = 0.5
    assert measured(QAQ(), padding)["query_norm"].tolist() == [[300], [16]]


@pytest.mark.parametrize("settings", [{"query_norm": 7.0}, {"query_norm": 7.0, "profile": "repository"}], ids=str)
def test_a_given_query_norm_is_taken(settings):
    assert measured(QAQ(**settings), uniform(2, 2, 3, 7, 64))["query_norm"].tolist() == [[7], [7]]


def test_the_repository_has_one_norm_for_all():
    norm = measured(QAQ(profile="repository", granularity="head"), uniform(2, 2, 3, 7, 64))["query_norm"]
    assert norm.tolist() == [[300, 300], [300, 300]]


def calibration(norms: Tensor | None) -> Calibration:
    strategy = QAQ()
    evidence = Measurements(windows=1, length=8, windows_sha256="", seconds=0)
    record = Record(strategy="qaq", settings={}, recipe=strategy.recipe(), model={}, layers={}, evidence=evidence)
    return Calibration(record, {0: {"key": Statistics(query_norm=norms)}})


def test_calibrated_norms_come_before_the_prompts():
    strategy = QAQ(calibration=calibration(tensor(3.0, 9.0)), granularity="head")
    assert measured(strategy, uniform(2, 2, 3, 7, 64))["query_norm"].tolist() == [[3, 9], [3, 9]]
    together = strategy.model_copy(update={"granularity": "layer"})
    assert measured(together)["query_norm"].tolist() == [[9], [9]]


def test_a_calibration_without_norms_is_refused():
    with pytest.raises(ValueError, match="holds no query norms; calibrate again"):
        measured(QAQ(calibration=calibration(None)))


def test_norms_are_calibrated_only_where_they_are_read():
    assert QAQ().recipe() == Recipe(query_quantile=0.9)
    assert QAQ(query_norm=5).recipe() == QAQ(profile="repository").recipe() == Recipe()


# ---- settings that cannot be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_key": 0.6}, "sigma_key=0.6: .* at most 0.5; use something like"),
        ({"sigma_value": 1.1}, "sigma_value=1.1: .* use something like"),
        ({"sigma_key": 0}, "sigma_key\n.*greater than 0"),
        ({"sigma_value": -1}, "sigma_value\n.*greater than 0"),
        ({"min_bits": 4, "max_bits": 3}, "min_bits=4 and max_bits=3 are no range; use 0, 2, 3, 4, 8 or 16"),
        ({"min_bits": 0, "max_bits": 0}, "max_bits=0 .*max_bits >= 2"),
        ({"min_bits": 1}, "min_bits\n.*0, 2, 3, 4, 8 or 16"),
        ({"alpha": 0.3}, "alpha\n.*less than or equal to 0.25"),
        ({"alpha": -0.1}, "alpha\n.*greater than or equal to 0"),
        ({"window": 0}, "window\n.*greater than or equal to 1"),
        ({"hysteresis": -1}, "hysteresis\n.*greater than or equal to 0"),
        ({"query_norm": 0}, "query_norm\n.*greater than 0"),
        ({"granularity": "channel"}, "granularity\n.*'head', 'layer' or 'token'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        QAQ(**settings)


def test_deviations_beyond_a_probability_are_the_repositorys():
    # the grid of its experiments
    for sigma in (1, 3, 10, 30):
        QAQ(profile="repository", sigma_key=sigma, sigma_value=sigma)


@pytest.mark.parametrize(
    ("granularity", "alpha", "numbers", "message"),
    [
        ("layer", 0.01, 131072, r"alpha=0.01 keeps 656 numbers .* row of 131072, .* alpha <= 0.00097 or granularity="),
        ("layer", 0.05, 4096, r"alpha=0.05 keeps 103 numbers .* row of 4096, .* alpha <= 0.03125 or granularity="),
        ("head", 0.25, 576, r"alpha=0.25 keeps 72 numbers .* row of 576, .* alpha <= 0.22222$"),
    ],
)
def test_more_outliers_than_there_are_slots_for_are_refused_and_told_what_fits(granularity, alpha, numbers, message):
    with pytest.raises(ValueError, match=message):
        QAQ(alpha=alpha, granularity=granularity)._rows(numbers)
    fitting = math.floor(2e5 * 64 / numbers) / 1e5
    assert QAQ(alpha=fitting)._rows(numbers)[0].trim <= 64
