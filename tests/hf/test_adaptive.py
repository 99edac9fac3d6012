"""Tokens whose widths are their own: what layers see, decide, hold and give back, in whatever way they are used."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise, product
from types import FunctionType, ModuleType
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cachequant.core import AdaptiveStrategy, Evidence, Format, LayerSpec, MixedFormat, PackedCache, SimulatedCache
from cachequant.core import pools as pools_module
from cachequant.core.hf import adaptive
from cachequant.core.hf.attention import IMPLEMENTATION, attention_forward
from cachequant.core.hf.handles import LazyStates
from cachequant.kernels import rows as rows_module
from cachequant.kernels.rows import decode_rows, encode_rows
from cachequant.strategies.h2o import H2O
from cachequant.strategies.qaq import QAQ

CLOSE = {"rtol": 0, "atol": 1e-5}
DOUBLE = {"rtol": 0, "atol": 1e-10}
SIDES = ("key", "value")
LADDER = (2, 3, 4, 8, 16)

Script = Callable[[LayerSpec, Evidence], dict[Any, Tensor]]


def constant(width: int) -> Script:
    """All tokens have one width."""
    return lambda layer, evidence: {
        side: torch.full_like(evidence.low[side], width, dtype=torch.uint8) for side in SIDES
    }


def mixed(*widths: int) -> Script:
    """Widths that differ between tokens, heads, rows, sides and decisions."""

    def script(layer: LayerSpec, evidence: Evidence) -> dict[Any, Tensor]:
        decided = {}
        for number, side in enumerate(SIDES):
            batch, heads, tokens = evidence.low[side].shape
            place = torch.arange(tokens) * 5 + torch.arange(heads)[:, None] * 3 + torch.arange(batch)[:, None, None] * 7
            chosen = (place + layer.index + number + tokens // 3) % len(widths)
            decided[side] = torch.tensor(widths, dtype=torch.uint8)[chosen]
        return decided

    return script


class Scripted(AdaptiveStrategy):
    """Widths that a test decides."""

    name: ClassVar[str] = "scripted"

    script: Any
    interval: int = 8
    host_copy: bool = True
    window: int | None = 0
    heads: Literal["apart", "together"] = "apart"
    alone: bool = True
    drops: bool = False
    widths_there_are: tuple[int, ...] = LADDER
    grid: Literal["ends", "midpoint", "mean"] = "midpoint"
    trim: int = 0

    @property
    def attention_window(self) -> int | None:
        return self.window

    @property
    def together(self) -> bool:
        return not self.alone

    def merge(self, evidence):
        first = evidence[0]
        return Evidence(
            **{**vars(first), "low": {side: ends.amin(1, keepdim=True) for side, ends in first.low.items()}}
        )

    def formats(self, layer: LayerSpec) -> MixedFormat:
        rows = tuple(
            Format(codes="exact")
            if bits == 16
            else Format(bits=bits, grid=self.grid, trim=self.trim, outliers=2 * self.trim)
            for bits in self.widths_there_are
        )
        return MixedFormat(key=rows, value=rows, heads=self.heads, drops=self.drops)

    def widths(self, layer: LayerSpec, evidence: Evidence) -> dict[Any, Tensor]:
        return self.script(layer, evidence)


GRANULARITIES = {
    "head": {},
    "layer": {"heads": "together"},
    "token": {"heads": "together", "alone": False},
}

some_strategies = pytest.mark.parametrize(
    "strategy",
    [
        QAQ(interval=6, granularity="head", min_bits=0, max_bits=16, sigma_value=0.5),
        QAQ(interval=6, granularity="token"),
    ],
    ids=["head-drops-16", "token"],
)

NEVER = 10_000
"""An interval after which nothing is ever packed."""


@pytest.fixture
def exact_rows(monkeypatch):
    """Rows of 16 bits have the model's own dtype: then nothing is lost, whatever was packed."""
    monkeypatch.setattr(rows_module, "half_dtype", lambda dtype: dtype)


@pytest.fixture
def model(build):
    return build("qwen3")


@pytest.fixture
def stock(build):
    """The same weights under transformers' own attention."""
    return build("qwen3")


@pytest.fixture
def walk(tokens, left_padded, step):
    """`walk(model, cache, pads, *pieces, seed=1)`: logits of a text that comes in pieces, rows padded at the left.

    A negative piece runs as steps of one token.
    """

    def run(model: PreTrainedModel, cache: Any, pads: tuple[int, ...], *pieces: int, seed: int = 1) -> Tensor:
        ids, mask = left_padded(tokens(len(pads), sum(map(abs, pieces)), seed=seed), list(pads))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits, stop = [], 0
        for size in [size for piece in pieces for size in ([piece] if piece > 0 else [1] * -piece)]:
            start, stop = stop, stop + size
            inputs = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            logits.append(step(model, ids[:, start:stop], cache, **inputs))
        return torch.cat(logits, dim=1)

    return run


@pytest.fixture
def states(dense):
    """`states(cache)`: keys and values of every packed layer, dense."""
    return lambda cache: [(dense(layer, "key"), dense(layer, "value")) for layer in cache.packed_layers]


# ---- what is remembered of attention ---------------------------------------------------------------------------------


def eager_maxima(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any = None) -> list[Tensor]:
    """Of every layer `[batch, kv_heads, queries, keys]`, from transformers' eager attention; padding queries give 0."""
    model.set_attn_implementation("eager")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        found = model(ids, output_attentions=True, **inputs).attentions
    heads = model.config.get_text_config().num_key_value_heads
    real = mask[:, None, -ids.shape[1] :, None].bool()
    return [attention.unflatten(1, (heads, -1)).amax(2).masked_fill(~real, 0) for attention in found]


# experts are not multiplied in float64
SINGLE = ("gpt-oss", "qwen3-next")


def precise(model: PreTrainedModel, architecture: str) -> tuple[PreTrainedModel, float]:
    """The model in the widest type it runs in, and how far two of its attentions may be apart."""
    return (model, 3e-6) if architecture in SINGLE else (model.double(), 1e-6)


PIECES = {"prefill": (40,), "chunks": (17, 20, 3), "decoding": (30, -10)}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("pads", [(0,), (9, 0, 25)], ids=["one", "padded"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "gpt-oss", "qwen3-next"])
def test_remembered_attention_is_that_of_eager_models(build, walk, tokens, left_padded, architecture, pads, pieces):
    # float32: eager attention to nothing but padding is NaN in float64
    model = build(architecture)
    cache = PackedCache(model, Scripted(script=constant(4), window=NEVER, interval=NEVER), residual_length=0)
    walk(model, cache, pads, *pieces)
    ids, mask = left_padded(tokens(len(pads), 40), list(pads))
    expected = eager_maxima(build(architecture), ids, mask)
    # layers of other kinds have none
    expected = dict(zip([i for i in range(3) if architecture != "qwen3-next" or i], expected[-3:], strict=False))
    for layer in cache.packed_layers:
        tolerance = 3e-6 if architecture in SINGLE else 1e-6
        torch.testing.assert_close(layer.history.read(40), expected[layer.index], rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [1, 5])
def test_only_the_queries_that_the_next_decision_asks_for_are_remembered(model, build, walk, tokens, window):
    cache = PackedCache(model, Scripted(script=constant(16), window=window, interval=12), residual_length=4)
    for piece in (10, 1, 1, 1, 1):
        walk(model, cache, (0, 0), piece)
        layer = cache.packed_layers[0]
        length = layer.get_seq_length()
        wanted = max(0, window - max(0, 16 - length))
        assert (0 if layer.history.rows is None else layer.history.rows.shape[2]) == wanted
    decided = []

    def script(layer, evidence):
        decided.append((layer.index, evidence.attention))
        return constant(16)(layer, evidence)

    cache = PackedCache(model, Scripted(script=script, window=window, interval=12), residual_length=4)
    walk(model, cache, (0, 0), 10, -6)
    expected = eager_maxima(build("qwen3"), tokens(2, 16), torch.ones(2, 16, dtype=torch.long))
    assert len(decided) == 3
    for index, attention in decided:
        torch.testing.assert_close(attention, expected[index][:, :, -window:, :12], **CLOSE)


@pytest.mark.parametrize("architecture", ["llama", "gpt-oss", "gemma2"])
@pytest.mark.parametrize("pads", [(0,), (9, 0, 25)], ids=["one", "padded"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_attention_over_packed_tokens_is_remembered_as_over_what_they_stand_for(
    build, walk, tokens, left_padded, dequantized, architecture, pads, granularity
):
    (model, tolerance), (plain, _) = (precise(build(architecture), architecture) for _ in range(2))
    # every layer of full attention, so that a stock cache can take over
    strategy = Scripted(script=mixed(*LADDER), window=NEVER, interval=30, trim=1, **GRANULARITIES[granularity])
    cache = PackedCache(model, strategy, residual_length=10)
    walk(model, cache, pads, 50)
    assert all(layer.packed_tokens == 40 for layer in cache.packed_layers)
    past = DynamicCache(config=model.config)
    for layer, held in zip(past.layers, cache.layers, strict=True):
        if held not in cache.packed_layers:
            layer.update(held.keys.clone(), held.values.clone())
            layer.cumulative_length = 50
    for layer, held in zip(dequantized(cache, plain).layers, cache.layers, strict=True):
        if held in cache.packed_layers:
            past.layers[held.index].update(layer.keys, layer.values)
    ids, mask = left_padded(tokens(len(pads), 57), list(pads))
    walk_on(model, cache, ids, mask, 7)
    expected = eager_maxima(plain, ids[:, 50:], mask, past)
    for layer in cache.packed_layers:
        newest = layer.history.read(57)[:, :, -7:]
        torch.testing.assert_close(newest, expected[layer.index].to(newest.dtype), rtol=0, atol=tolerance)


@torch.no_grad()
def walk_on(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Logits of the last `count` of `ids`, the first of which are in the cache."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
    return model(ids[:, -count:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits


# ---- attention over pools --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", ["nothing", "tiles", "chunks", "both"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("pads", [(0,), (9, 0, 25)], ids=["one", "padded"])
def test_attention_over_pools_is_attention_over_what_they_stand_for(
    build, walk, tokens, left_padded, dequantized, monkeypatch, pads, granularity, small
):
    if small in ("tiles", "both"):
        monkeypatch.setattr(adaptive, "SCORE_NUMBERS", 700)
    if small in ("chunks", "both"):
        monkeypatch.setattr(pools_module, "CHUNK_NUMBERS", 1500)
    model, plain = build("qwen3").double(), build("qwen3").double()
    strategy = Scripted(script=mixed(2, 3, 4, 8, 16), window=3, interval=20, trim=1, **GRANULARITIES[granularity])
    cache = PackedCache(model, strategy, residual_length=10, sink_tokens=2)
    walk(model, cache, pads, 90)
    past = dequantized(cache, plain)
    ids, mask = left_padded(tokens(len(pads), 103), list(pads))
    before = LazyStates.dequantized
    actual = walk_on(model, cache, ids, mask, 13)
    assert LazyStates.dequantized == before
    torch.testing.assert_close(actual, walk_on(plain, past, ids, mask, 13), **DOUBLE)


@pytest.mark.parametrize("numbers", [1 << 24, 700], ids=["whole", "tiles"])
def test_dropped_tokens_are_attended_to_by_none(build, walk, tokens, dequantized, monkeypatch, numbers):
    monkeypatch.setattr(adaptive, "SCORE_NUMBERS", numbers)
    model, plain = build("llama").double(), build("llama").double()
    dropping = Scripted(script=mixed(0, 4, 16), drops=True, interval=20, heads="together")

    # the same for keys and values, and for all rows: then a mask can say it too
    def script(layer, evidence):
        key = mixed(0, 4, 16)(LayerSpec(0, 1, 1, 1, 1), evidence)["key"][:1].expand(len(evidence.seen), -1, -1)
        return {"key": key.clone(), "value": key.clone()}

    cache = PackedCache(model, dropping.model_copy(update={"script": script}), residual_length=10)
    walk(model, cache, (0, 0), 90)
    held = cache.packed_layers[0].pools["key"].widths > 0
    assert 0 < held.sum() < held.numel()
    past = DynamicCache(config=plain.config)
    for layer in cache.packed_layers:
        tails = [layer.tails[side].read() for side in SIDES]
        dense = [layer.dense(side, 80) for side in SIDES]
        past.update(*(torch.cat(pair, dim=2) for pair in zip(dense, tails, strict=True)), layer.index)
    visible = torch.cat([held, torch.ones(2, 10 + 13, dtype=torch.bool)], dim=1)[:, None, None]
    causal = torch.ones(103, 103, dtype=torch.bool).tril()[90:]
    ids = tokens(2, 103)
    actual = walk_on(model, cache, ids, torch.ones_like(ids), 13)
    with torch.no_grad():
        positions = torch.arange(90, 103)[None]
        inputs = {"attention_mask": visible & causal, "position_ids": positions, "past_key_values": past}
        expected = plain(ids[:, 90:], **inputs).logits
    torch.testing.assert_close(actual, expected, **DOUBLE)


@pytest.mark.parametrize("numbers", [1 << 24, 700], ids=["whole", "tiles"])
def test_a_mask_that_shows_later_tokens_is_obeyed(build, walk, tokens, dequantized, monkeypatch, numbers):
    # as images are seen by gemma3, or prefixes by others
    monkeypatch.setattr(adaptive, "SCORE_NUMBERS", numbers)
    model, plain = build("llama").double(), build("llama").double()
    cache = PackedCache(model, Scripted(script=mixed(*LADDER), window=5, interval=20), residual_length=10)
    walk(model, cache, (0, 0), 90)
    past = dequantized(cache, plain)
    mask = torch.ones(2, 1, 13, 103, dtype=torch.bool)
    mask[..., :4, 98:] = False
    ids = tokens(2, 103)
    logits = []
    with torch.no_grad():
        for subject, held in ((model, cache), (plain, past)):
            inputs = {"attention_mask": mask, "position_ids": torch.arange(90, 103)[None], "past_key_values": held}
            logits.append(subject(ids[:, 90:], **inputs).logits)
    torch.testing.assert_close(*logits, **DOUBLE)


# ---- every way to generate -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    settings: dict[str, Any] = field(default_factory=dict)
    pads: tuple[int, ...] = (0,)
    turns: int = 1
    assisted: bool = False
    crop: int = 0


MODES = {
    "greedy": Mode(),
    "sampling": Mode({"do_sample": True, "top_k": 20, "num_return_sequences": 2}),
    "beam": Mode({"num_beams": 3}),
    "padded": Mode(pads=(17, 0, 41)),
    "padded-beam": Mode({"num_beams": 3}, pads=(17, 0, 41)),
    "chunked-prefill": Mode({"prefill_chunk_size": 17}),
    "padded-chunked-prefill": Mode({"prefill_chunk_size": 17}, pads=(17, 0, 41)),
    "two-turns": Mode(turns=2),
    "two-turns-with-a-crop": Mode(turns=2, crop=29),
    "padded-two-turns": Mode(pads=(17, 0, 41), turns=2),
    "assisted": Mode({"num_assistant_tokens": 4}, assisted=True),
    "prompt-lookup": Mode({"prompt_lookup_num_tokens": 6}),
}

STRATEGIES = {
    "layer": QAQ(interval=6),
    "head-drops-16": QAQ(interval=6, granularity="head", min_bits=0, max_bits=16, sigma_value=0.5),
    "token": QAQ(interval=6, granularity="token"),
    "no-copy": QAQ(interval=6, host_copy=False, hysteresis=0),
}


@pytest.fixture
def run(build, tokens, left_padded):
    """`run(architecture, mode, new_cache)`: sequences, logits and cache of what a fresh model generates."""

    @torch.no_grad()
    def generate(architecture: str, how: Mode, new_cache: Callable[[PreTrainedModel], Any]) -> tuple[Any, ...]:
        model = build(architecture)
        cache = new_cache(model)
        settings = {"do_sample": False, "max_new_tokens": 12, **how.settings}
        if how.assisted:
            settings["assistant_model"] = assistant = build(architecture)
            torch.manual_seed(5)
            for parameter in assistant.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        ids, mask = left_padded(tokens(len(how.pads), 70), list(how.pads))
        logits = []
        for turn in range(how.turns):
            if turn and how.crop:
                ids = ids[:, : -how.crop]
                cache.crop(ids.shape[1] - cache.get_seq_length())
            if turn:
                ids = torch.cat([ids, tokens(len(how.pads), 9, seed=10 + turn)], dim=1)
            mask = torch.nn.functional.pad(mask[:, : ids.shape[1]], (0, max(0, ids.shape[1] - mask.shape[1])), value=1)
            torch.manual_seed(3)
            result = model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                return_dict_in_generate=True,
                output_logits=True,
                **settings,
            )
            ids = result.sequences
            logits += result.logits
        return ids, torch.stack(logits), cache

    return generate


@pytest.mark.usefixtures("exact_rows")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode_equals_the_stock_cache_where_nothing_is_lost(run, mode):
    # nearly no tail: rejected candidates, and cuts between turns, reach what is packed
    residual = 2
    strategy = Scripted(script=constant(16), interval=5, window=3)
    sequences, logits, cache = run("qwen3", mode, lambda model: PackedCache(model, strategy, residual_length=residual))
    expected, exact, _ = run("qwen3", mode, lambda model: DynamicCache(config=model.config))
    assert torch.equal(sequences, expected)
    torch.testing.assert_close(logits, exact, **CLOSE)
    for layer in cache.packed_layers:
        # a rejected candidate may leave fewer than the residual
        assert layer.get_seq_length() - residual - layer.packed_tokens < 5
        assert_consistent(layer)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode_runs_with_bits_by_attention(run, mode):
    strategy = STRATEGIES["head-drops-16"]
    sequences, logits, cache = run("qwen3", mode, lambda model: PackedCache(model, strategy, residual_length=7))
    assert sequences.shape[1] == 70 + 12 * mode.turns + (9 - mode.crop) * (mode.turns - 1)
    assert torch.isfinite(logits).all()
    for layer in cache.packed_layers:
        assert_consistent(layer)


def assert_consistent(layer: Any) -> None:
    """Tensors that go together have sizes that go together."""
    owners = len(layer.tails["key"].read()) * (1 if layer._heads > 1 else layer.kv_heads)
    for side in SIDES:
        assert layer.pools[side].widths.shape == (owners, layer.packed_tokens)
    assert layer.tails["key"].length == layer.tails["value"].length
    if layer._real is not None:
        assert layer._real.shape == (len(layer.tails["key"].read()), layer.get_seq_length())
        packed = layer._real[:, : layer.packed_tokens].repeat_interleave(owners // len(layer._real), dim=0)
        for side in SIDES:
            assert not layer.pools[side].widths[~packed].any()
    if layer.host is not None and not layer.host.lost and layer.packed_tokens:
        assert layer.host.state()["key"].shape[2] == layer.packed_tokens
    if layer.history.rows is not None:
        assert layer.history.rows.shape[-1] == layer.history.queries <= layer.get_seq_length()


@pytest.mark.parametrize("granularity", ["head", "layer", "token"])
def test_a_row_is_the_same_alone_and_in_a_padded_batch(build, tokens, left_padded, granularity):
    pads, strategy = (17, 0, 31), QAQ(interval=6, granularity=granularity, window=3)
    ids, mask = left_padded(tokens(3, 70), list(pads))
    settings = {"max_new_tokens": 10, "do_sample": False}
    model = build("qwen3")
    both = PackedCache(model, strategy, residual_length=7)
    batch = model.generate(ids, attention_mask=mask, past_key_values=both, **settings)
    for row, pad in enumerate(pads):
        alone = PackedCache(model, strategy, residual_length=7)
        single = model.generate(ids[row : row + 1, pad:], past_key_values=alone, **settings)
        assert torch.equal(single[0], batch[row, pad:])
        for one, layer in zip(alone.packed_layers, both.packed_layers, strict=True):
            for side in SIDES:
                widths = layer.pools[side].widths.unflatten(0, (3, -1))[row]
                assert torch.equal(one.pools[side].widths, widths[:, pad:])
                assert not widths[:, :pad].any()


@torch.no_grad()
def test_rows_that_begin_after_the_first_decision_are_measured_when_they_do(model, tokens, left_padded):
    # the second row is padding as long as the first is measured
    cache, first, second = (PackedCache(model, QAQ(interval=8, window=1), residual_length=0) for _ in range(3))
    ids, mask = left_padded(tokens(2, 70), [0, 40])
    for stop in (20, 40, 70):
        walk_on(model, cache, ids[:, :stop], mask[:, :stop], stop - cache.get_seq_length())
        walk_on(model, first, ids[:1, :stop], mask[:1, :stop], stop - first.get_seq_length())
    walk_on(model, second, ids[1:, 40:], mask[1:, 40:], 30)
    for layer, one, other in zip(cache.packed_layers, first.packed_layers, second.packed_layers, strict=True):
        for name, measured in layer.measured.items():
            alone = torch.cat([one.measured[name], other.measured[name]])
            torch.testing.assert_close(measured, alone, rtol=1e-4, atol=1e-4)
        assert layer._queries is None


# ---- operations ------------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, tuple[Callable[[PackedCache], Any], Callable[[Tensor], Tensor]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), lambda t: t[[2, 0, 0]]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), lambda t: t[[2, 1]]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), lambda t: t.repeat_interleave(2, 0)),
}
PADS = (9, 0, 25)


@some_strategies
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_change_their_places_with_all_that_is_known_of_them(
    model, tokens, left_padded, walk, states, operation, strategy
):
    change, rows = OPERATIONS[operation]
    cache = PackedCache(model, strategy, residual_length=7, sink_tokens=2)
    walk(model, cache, PADS, 60, -3)
    untouched, before = copy.deepcopy(cache), raw_states(cache)
    change(cache)
    for now, old in zip(raw_states(cache), before, strict=True):
        for side in SIDES:
            assert torch.equal(now[side], rows(old[side]))
    ids, mask = left_padded(tokens(3, 80), list(PADS))
    for stop in (60, 61, 64, 80):
        actual = walk_on(model, cache, rows(ids[:, :stop]), rows(mask[:, :stop]), stop - cache.get_seq_length())
        expected = walk_on(model, untouched, ids[:, :stop], mask[:, :stop], stop - untouched.get_seq_length())
        torch.testing.assert_close(actual, rows(expected), **CLOSE)
    for layer, other in zip(cache.packed_layers, untouched.packed_layers, strict=True):
        assert_consistent(layer)
        for side in SIDES:
            widths, wanted = (
                each.pools[side].widths.unflatten(0, (-1, len(each.pools[side].widths) // len(each.tails[side].read())))
                for each in (layer, other)
            )
            assert torch.equal(widths, rows(wanted))


def raw_states(cache: PackedCache) -> list[dict[str, Tensor]]:
    """What is held of every token, zeros where it was dropped."""
    return [
        {side: torch.cat([layer.dense(side, layer.packed_tokens), layer.tails[side].read()], dim=2) for side in SIDES}
        for layer in cache.packed_layers
    ]


@pytest.mark.parametrize("kept", [0, 1, 30, 53, 58])
@some_strategies
def test_a_cut_keeps_the_first_tokens_as_they_are_and_goes_on(model, walk, strategy, kept):
    cache = PackedCache(model, strategy, residual_length=7)
    walk(model, cache, PADS, 60)
    before = raw_states(cache)
    cache.truncate(kept)
    assert cache.get_seq_length() == kept
    for layer, now, old in zip(cache.packed_layers, raw_states(cache), before, strict=True):
        assert layer.packed_tokens == min(kept, 53)
        assert_consistent(layer)
        for side in SIDES:
            assert torch.equal(now[side], old[side][:, :, :kept])
    logits = walk(model, cache, (0, 0, 0), 9, -20)
    assert torch.isfinite(logits).all()
    for layer in cache.packed_layers:
        assert_consistent(layer)


@pytest.mark.parametrize("kept", [0, 30])
def test_what_was_cut_before_it_was_packed_leaves_no_trace(model, walk, kept):
    cut, straight = (PackedCache(model, QAQ(interval=8), residual_length=40) for _ in range(2))
    walk(model, cut, PADS, 45, seed=7)
    cut.truncate(kept)
    ids_then = 70 - kept
    if kept:
        walk(model, straight, PADS, 45, seed=7)
        for layer in straight.packed_layers:
            layer._queries = layer._queries[..., :kept].clone()
            for tail in layer.tails.values():
                tail.truncate(kept)
            layer._real = layer._real[:, :kept].clone()
    logits = [walk(model, cache, (0, 0, 0), ids_then, seed=8) for cache in (cut, straight)]
    assert torch.equal(*logits)
    for layer, other in zip(cut.packed_layers, straight.packed_layers, strict=True):
        assert torch.equal(layer.measured["query_norm"], other.measured["query_norm"])
        for side in SIDES:
            assert torch.equal(layer.pools[side].widths, other.pools[side].widths)


def test_tokens_that_replace_padding_in_the_tail_are_real(model, tokens, step):
    # a cut forgets which of the tokens behind it were padding
    cache = PackedCache(model, QAQ(interval=8), residual_length=16)
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, 35:] = 0
    step(model, tokens(1, 40), cache, attention_mask=mask)
    cache.truncate(35)
    step(model, tokens(1, 40), cache)
    for layer in cache.packed_layers:
        assert (layer.pools["key"].widths > 0).all()


def test_what_was_packed_as_real_stays_real_when_a_mask_hides_it_later(model, tokens, step):
    cache = PackedCache(model, QAQ(interval=8, host_copy=False), residual_length=8, sink_tokens=2)
    step(model, tokens(1, 40), cache)
    mask = torch.ones(1, 50, dtype=torch.long)
    mask[:, :20] = 0
    step(model, tokens(1, 10), cache, attention_mask=mask)
    for layer in cache.packed_layers:
        assert layer.packed_tokens == 42
        assert (layer.pools["key"].widths > 0).all()
        assert (layer.pools["key"].widths == 16).nonzero()[:, 1].tolist() == [0, 1]


@some_strategies
def test_a_reset_cache_is_as_new(model, walk, strategy):
    used, new = (PackedCache(model, strategy, residual_length=7) for _ in range(2))
    walk(model, used, (9, 0, 25), 60, -9, seed=4)
    used.reset()
    assert used.memory().device_bytes == new.memory().device_bytes == 0
    assert torch.equal(*(walk(model, cache, (0, 3), 50, -9) for cache in (used, new)))


@some_strategies
def test_a_deep_copy_goes_on_alone(model, walk, strategy):
    cache = PackedCache(model, strategy, residual_length=7)
    walk(model, cache, PADS, 60, -3)
    twin, third = copy.deepcopy(cache), copy.deepcopy(cache)
    assert twin._council is not cache._council
    assert twin._council.layers == twin.packed_layers
    expected = walk(model, cache, (0, 0, 0), -20, seed=2)
    assert torch.equal(walk(model, twin, (0, 0, 0), -20, seed=2), expected)
    third.truncate(3)
    assert torch.equal(walk(model, twin, (0, 0, 0), 5, seed=3), walk(model, cache, (0, 0, 0), 5, seed=3))


SAVED = {"before packing": (11,), "packed": (60,), "about to decide": (60, -5), "decided while decoding": (60, -9)}


@pytest.mark.parametrize("pieces", SAVED.values(), ids=SAVED)
@some_strategies
def test_a_saved_cache_goes_on_as_if_it_had_never_been(model, build, walk, tmp_path, strategy, pieces):
    pads = (5, 0) if pieces == (11,) else (25, 0)
    cache = PackedCache(model, strategy, residual_length=7, sink_tokens=2)
    walk(model, cache, pads, *pieces)
    cache.save(tmp_path / "cache")
    other = build("qwen3")
    loaded = PackedCache.load(tmp_path / "cache", other, strategy)
    # spare room is not saved
    used = [
        {name: n for name, n in each.memory().rows.items() if name not in ("spare", "host copy")}
        for each in (cache, loaded)
    ]
    assert used[0] == used[1]
    assert reachable_bytes(loaded) == sum(loaded.memory().rows.values())
    for sizes in ((-3,), (13,), (-2,)):
        assert torch.equal(walk(other, loaded, (0, 0), *sizes), walk(model, cache, (0, 0), *sizes))
    for mine, theirs in zip(loaded.packed_layers, cache.packed_layers, strict=True):
        assert_consistent(mine)
        assert torch.equal(mine.pools["value"].widths, theirs.pools["value"].widths)
        if mine.host is not None:
            counts = [(layer.host.to_host, layer.host.from_host, layer.host.lost) for layer in (mine, theirs)]
            assert counts[0] == counts[1]


def test_an_emptied_cache_is_saved_and_loaded(model, walk, tmp_path):
    cache = PackedCache(model, QAQ(interval=8), residual_length=7)
    walk(model, cache, PADS, 60)
    cache.truncate(0)
    cache.save(tmp_path / "cache")
    loaded = PackedCache.load(tmp_path / "cache", model, cache.strategy)
    assert torch.equal(*(walk(model, each, PADS, 60, -9) for each in (cache, loaded)))


@some_strategies
@pytest.mark.parametrize("failing", [0, 2])
def test_an_interrupted_forward_is_mended_by_a_cut(model, walk, strategy, failing):
    cache, calm = (PackedCache(model, strategy, residual_length=7) for _ in range(2))
    for each in (cache, calm):
        walk(model, each, PADS, 60, -2)
    module = model.model.layers[failing].mlp
    handle = module.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        walk(model, cache, (0, 0, 0), 3)
    handle.remove()
    cache.truncate(62)
    # no layer had come to a decision
    assert torch.equal(*(walk(model, each, (0, 0, 0), -12) for each in (cache, calm)))


def test_a_cache_changed_in_inference_mode_goes_on_outside_it(model, tokens, step, walk):
    cache = PackedCache(model, STRATEGIES["head-drops-16"], residual_length=7, sink_tokens=2)
    with torch.inference_mode():
        walk(model, cache, (9, 0), 60, -3)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-20)
    step(model, tokens(2, 9), cache)
    model(tokens(2, 9), past_key_values=cache).logits.mean().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


# ---- widths that change ----------------------------------------------------------------------------------------------


def stored(layer: Any, side: str) -> Tensor:
    """The packed tokens dense, float64, `[batch, kv_heads, tokens, dim]`."""
    rows = layer.pools[side].dense(torch.float64)
    if layer._heads == 1:
        return rows.unflatten(0, (-1, layer.kv_heads))
    return rows.unflatten(-1, (layer.kv_heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("heads", ["apart", "together"])
@pytest.mark.parametrize("grid", ["midpoint", "mean", "ends"])
@pytest.mark.parametrize(("first", "then"), list(product((2, 4, 16), repeat=2)), ids=lambda width: f"{width}bit")
def test_tokens_that_rise_are_as_encoded_from_the_original(build, tokens, step, first, then, grid, heads):
    model = build("llama", num_hidden_layers=1)
    rounds = {20: first}

    def script(layer, evidence):
        return constant(rounds.get(evidence.tokens, then))(layer, evidence)

    strategy = Scripted(script=script, grid=grid, heads=heads, trim=1 if grid != "ends" else 0)
    cache = PackedCache(model, strategy, residual_length=4)
    exact = DynamicCache(config=model.config)
    ids = tokens(2, 32)
    for start, stop in ((0, 24), (24, 32)):
        step(model, ids[:, start:stop], cache)
    step(build("llama", num_hidden_layers=1), ids, exact)
    layer = cache.packed_layers[0]
    assert layer.packed_tokens == 28
    copies = 0
    for side, states in (("key", exact.layers[0].keys), ("value", exact.layers[0].values)):
        fmt = layer.pools[side].formats[then]
        rows = layer._rows(states[:, :, :28])
        wanted = decode_rows(encode_rows(rows.flatten(0, 1), fmt), fmt, rows.shape[-1], torch.float64)
        wanted = layer._apart(wanted.unflatten(0, rows.shape[:2]).unsqueeze(1))[..., :] if layer._heads == 1 else None
        if wanted is None:
            flat = decode_rows(encode_rows(rows.flatten(0, 1), fmt), fmt, rows.shape[-1], torch.float64)
            wanted = flat.unflatten(0, rows.shape[:2]).unflatten(-1, (layer.kv_heads, -1)).transpose(1, 2)
        held = stored(layer, side)
        if then >= first:
            # prefill and decoding differ in the last bits of states
            torch.testing.assert_close(held, wanted, rtol=0, atol=2e-2 if then < 16 else 2e-3)
        else:
            lost = (held - wanted)[:, :, :20].abs().amax()
            assert lost <= (states.amax() - states.amin()) / (2**then - 1)
        copies += 2 * layer.kv_heads * 20 * states.shape[-1] * 4
    assert layer.host.from_host == (copies if then > first else 0)
    assert layer.host.to_host == copies // 20 * 28


def test_rising_to_the_very_bits_of_direct_encoding(build, tokens, step):
    model = build("llama")
    wave = iter([4, 2, 8, 3, 16, 2, 4, 2, 8])
    narrow = Scripted(script=lambda layer, evidence: constant(widths[evidence.tokens])(layer, evidence), interval=8)
    widths = {24 + 8 * number: width for number, width in enumerate(wave)}
    straight = narrow.model_copy(update={"script": constant(8)})
    caches = [PackedCache(model, strategy, residual_length=8) for strategy in (narrow, straight)]
    ids = tokens(1, 96)
    for cache in caches:
        step(model, ids[:, :32], cache)
    # layer 0 gets the same states whatever was lost; at the end both have 8 bits
    for start in range(32, 96, 8):
        for cache in caches:
            step(model, ids[:, start : start + 8], cache)
    first, second = (cache.packed_layers[0] for cache in caches)
    for side in SIDES:
        assert torch.equal(first.pools[side].widths, second.pools[side].widths)
        assert torch.equal(stored(first, side), stored(second, side))


@pytest.mark.parametrize("heads", ["apart", "together"])
def test_without_copies_nothing_ever_rises(model, walk, heads):
    seen = []

    def script(layer, evidence):
        if layer.index == 0:
            seen.append(evidence.widths["key"].clone())
        return mixed(*LADDER)(layer, evidence)

    strategy = Scripted(script=script, host_copy=False, heads=heads, interval=3)
    cache = PackedCache(model, strategy, residual_length=4)
    walk(model, cache, (0, 5), 30, -30)
    assert len(seen) > 9
    for old, new in pairwise(seen):
        assert (new[..., : old.shape[-1]] <= old).all()
    assert (seen[-1][..., : seen[0].shape[-1]] < seen[0].new_tensor(16)).all()
    assert cache.memory().host_bytes == 0
    assert "host copy" not in cache.memory().rows


def test_dropped_tokens_come_back_from_copies_and_from_nowhere_else(model, walk):
    rounds = {20: 0}

    def script(layer, evidence):
        return constant(rounds.get(evidence.tokens, 4))(layer, evidence)

    for host_copy in (True, False):
        strategy = Scripted(script=script, drops=True, host_copy=host_copy)
        cache = PackedCache(model, strategy, residual_length=4)
        walk(model, cache, (0,), 24)
        assert not cache.packed_layers[0].pools["key"].widths.any()
        walk(model, cache, (0,), 8)
        back = cache.packed_layers[0].pools["key"].widths
        assert (back[:, 20:] == 4).all()
        assert (back[:, :20] == (4 if host_copy else 0)).all()


def test_a_token_is_dropped_where_either_side_is(model, walk):
    def script(layer, evidence):
        widths = constant(4)(layer, evidence)
        widths["key"][..., 3] = 0
        widths["value"][:, 0, 7] = 0
        return widths

    cache = PackedCache(model, Scripted(script=script, drops=True), residual_length=4, sink_tokens=1)
    walk(model, cache, (0, 0), 30)
    for side in SIDES:
        widths = cache.packed_layers[0].pools[side].widths.unflatten(0, (2, 2))
        assert (widths[..., 0] == 16).all()
        assert (widths[..., 3] == 0).all()
        assert (widths[:, 0, 7] == 0).all()
        assert (widths[:, 1, 7] == 4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("there", [(2, 4), (2, 4, 16)], ids=str)
def test_sinks_have_sixteen_bits_from_the_first_packing(build, walk, dtype, there):
    model = build("qwen3").to(dtype)
    strategy = Scripted(script=constant(2), widths_there_are=there, host_copy=False)
    cache = PackedCache(model, strategy, residual_length=4, sink_tokens=3)
    for piece in (13, -12):
        walk(model, cache, (0, 7) if piece == 13 else (0, 0), piece)
        for layer in cache.packed_layers:
            for side in SIDES:
                widths = layer.pools[side].widths.unflatten(0, (2, 2))
                assert (widths[0, :, :3] == 16).all()
                # the other row is padding first
                assert (widths[1, :, :7] == 0).all()
                assert (widths[1, :, 7:10] == 16).all()
                assert (widths[0, :, 3:] == 2).all()
                exact = layer.pools[side]._pools[16].rows["exact"]
                assert exact.dtype == (torch.float16 if dtype == torch.float32 else dtype)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_padding_has_no_width_and_its_values_do_not_matter(model, strategy):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 2, 60, 32, generator=generator)
    query = torch.randn(3, 4, 60, 32, generator=generator)
    pads = torch.tensor([9, 0, 25])
    real = torch.arange(60) >= pads[:, None]
    module = model.model.layers[0].self_attn
    outputs = []
    for filling in (0.0, 3e4):
        cache = PackedCache(model, strategy, residual_length=7)
        for start, stop in ((0, 40), (40, 41), (41, 60)):
            mask = real[:, :stop]
            new = [t.masked_fill(~real[:, None, :, None], filling)[:, :, start:stop] for t in (keys, values)]
            for layer in cache.packed_layers:
                layer.note_mask(mask)
                handles = layer.update(*new)
                asked = query[:, :, start:stop].masked_fill(~real[:, None, start:stop, None], filling)
                output, _ = attention_forward(module, asked, *handles, mask)
        outputs.append(output[real[:, 41:]])
        for layer in cache.packed_layers:
            assert_consistent(layer)
            assert not layer.pools["value"].widths.unflatten(0, (3, -1))[2, :, :25].any()
    assert torch.equal(*outputs)


# ---- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 8])
@pytest.mark.parametrize("residual", [0, 10])
@pytest.mark.parametrize("prompt", [1, 5, 40])
def test_tokens_leave_the_tail_when_an_interval_of_them_waits(model, walk, interval, residual, prompt):
    cache = PackedCache(model, QAQ(interval=interval, window=1), residual_length=residual)
    packed = 0
    for length in (prompt, *range(prompt + 1, prompt + 14)):
        walk(model, cache, (0,), length - cache.get_seq_length(), seed=length)
        if length - packed - residual >= interval:
            packed = length - residual
        for layer in cache.packed_layers:
            assert layer.packed_tokens == packed
            assert layer.tails["key"].length == length - packed
            assert_consistent(layer)


def test_the_newest_but_one_of_a_window_have_most_bits_where_no_tail_is_kept(model, walk):
    cache = PackedCache(model, QAQ(interval=1, window=5, min_bits=2, max_bits=8), residual_length=0)
    for piece in (30, -6):
        walk(model, cache, (0, 4), piece) if piece > 0 else walk(model, cache, (0, 0), piece)
        for layer in cache.packed_layers:
            assert layer.tails["key"].length == 0
            for side in SIDES:
                assert (layer.pools[side].widths[:, -4:] == 8).all()
    assert (cache.packed_layers[-1].pools["value"].widths[:, :-4] < 8).any()


def test_every_layer_decides_with_the_others_where_they_decide_together(model, walk):
    decisions = []

    def script(layer, evidence):
        decisions.append((layer.index, evidence.tokens))
        return constant(4)(layer, evidence)

    cache = PackedCache(model, Scripted(script=script, heads="together", alone=False), residual_length=4)
    walk(model, cache, (0,), 20, -16)
    assert decisions == [(2, 16), (2, 24), (2, 32)]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def spoil(change: Callable[[dict[Any, Tensor]], Any]) -> Script:
    def script(layer, evidence):
        widths = constant(4)(layer, evidence)
        return change(widths) if layer.index == 0 else widths

    return script


FAULTS: dict[str, tuple[Callable[[dict[Any, Tensor]], Any], str]] = {
    "dtype": (lambda w: {**w, "value": w["value"].long()}, "'scripted' gave value widths of torch.int64"),
    "shape": (lambda w: {**w, "key": w["key"][..., 1:]}, r"'scripted' gave key widths .* expected uint8 \(2, 2, "),
    "heads": (lambda w: {**w, "key": w["key"].repeat(1, 2, 1)}, "'scripted' gave key widths"),
    "dimensions": (lambda w: {**w, "key": w["key"][0]}, "'scripted' gave key widths"),
    "width": (lambda w: {**w, "key": w["key"] + 1}, r"'scripted' gave key widths \[5\], its formats have \[2, 3, 4"),
    "zero": (lambda w: {**w, "value": w["value"] * 0}, r"'scripted' gave value widths \[0\], its formats have"),
    "side": (lambda w: {"key": w["key"]}, "'scripted' gave widths as"),
    "nothing": (lambda w: None, "'scripted' gave widths as"),
    "raises": (lambda w: 1 // 0, "division"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_widths_that_are_none_are_refused_by_name_and_nothing_is_lost(model, walk, fault, message):
    calm, cache = (
        PackedCache(model, Scripted(script=script), residual_length=4)
        for script in (constant(4), lambda layer, evidence: current[0](layer, evidence))
    )
    current = [constant(4)]
    for each in (calm, cache):
        walk(model, each, PADS[:2], 30, -3)
    current[0] = spoil(fault)
    with pytest.raises((ValueError, ZeroDivisionError), match=message):
        walk(model, cache, (0, 0), 5)
    current[0] = constant(4)
    with pytest.raises(RuntimeError, match=r"truncate\(33\)"):
        walk(model, cache, (0, 0), 5)
    cache.truncate(33)
    assert torch.equal(*(walk(model, each, (0, 0), 5, -9) for each in (cache, calm)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "strategy",
    [QAQ(interval=4), QAQ(interval=4, window=8, granularity="head"), H2O(keep=1, interval=4)],
    ids=["qaq", "qaq-long-window", "h2o"],
)
def test_other_attention_implementations_read_dequantized_states_and_tokens_are_packed_yet(
    model, build, walk, dequantized, strategy, implementation
):
    cache = PackedCache(model, strategy, residual_length=3)
    walk(model, cache, (0, 0), 40, -3)
    model.set_attn_implementation(implementation)
    plain = build("qwen3")
    plain.set_attn_implementation(implementation)
    for _ in range(3):
        # what is due is packed when the next forward begins
        copied = copy.deepcopy(cache)
        past = None
        before = LazyStates.dequantized
        for layer in copied.packed_layers:
            if layer.due:
                copied._council.decide(layer, overdue=True)
        past = dequantized(copied, plain)
        start = cache.get_seq_length()
        ids = torch.randint(2, 199, (2, 5), generator=torch.Generator().manual_seed(start))
        with torch.no_grad():
            positions = torch.arange(start, start + 5)[None]
            actual = model(ids, past_key_values=cache, position_ids=positions).logits
            expected = plain(ids, past_key_values=past, position_ids=positions).logits
        torch.testing.assert_close(actual, expected, **CLOSE)
        assert LazyStates.dequantized > before
    assert cache.packed_layers[0].get_seq_length() == 58
    assert cache.packed_layers[0].packed_tokens == 50
    model.set_attn_implementation(IMPLEMENTATION)
    assert torch.isfinite(walk(model, cache, (0, 0), -9)).all()
    for layer in cache.packed_layers:
        assert_consistent(layer)


def test_padding_that_left_while_another_implementation_read_is_no_token(model, tokens, left_padded):
    cache = PackedCache(model, QAQ(interval=4), residual_length=30)
    model.set_attn_implementation("sdpa")
    ids, mask = left_padded(tokens(2, 60), [20, 0])
    for stop in (25, 26, 45, 60):
        walk_on(model, cache, ids[:, :stop], mask[:, :stop], stop - cache.get_seq_length())
        if stop == 45:
            cache.crop(-1)
            cache.reorder_cache(torch.tensor([1, 0]))
            ids, mask = ids.flip(0), mask.flip(0)
            cache.reorder_cache(torch.tensor([1, 0]))
            ids, mask = ids.flip(0), mask.flip(0)
    for layer in cache.packed_layers:
        widths = layer.pools["key"].widths
        assert widths.shape == (2, 14)
        assert not widths[0].any()
        assert widths[1].all()


def test_other_attention_implementations_cannot_leave_dropped_tokens_out(model, walk):
    strategy = Scripted(script=mixed(0, 4), drops=True)
    cache = PackedCache(model, strategy, residual_length=4)
    walk(model, cache, (3, 0), 30)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"has dropped tokens, .* Attach the model again"):
        walk(model, cache, (0, 0), 1)


def test_a_simulated_cache_refuses_widths_that_change(model):
    with pytest.raises(ValueError, match="'qaq' packs tokens again while decoding"):
        SimulatedCache(model, QAQ())


# ---- bytes -----------------------------------------------------------------------------------------------------------


def reachable_bytes(root: Any) -> int:
    """Bytes of every storage reachable through attributes and containers."""
    found: dict[int, int] = {}
    waiting, known = [root], set()
    while waiting:
        thing = waiting.pop()
        if id(thing) in known or isinstance(thing, (type, FunctionType, ModuleType, str, bytes)):
            continue
        known.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            # an empty one may lie where another begins
            found[storage.data_ptr()] = max(storage.nbytes(), found.get(storage.data_ptr(), 0))
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple, set, frozenset)):
            waiting += thing
        if hasattr(thing, "__dict__"):
            waiting += vars(thing).values()
    return sum(found.values())


@pytest.mark.parametrize("strategy", [*STRATEGIES.values(), H2O(interval=6, keep=0.5)], ids=[*STRATEGIES, "h2o"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_report_is_the_sum_of_all_storages_reachable_from_the_cache(build, walk, architecture, strategy):
    model = build(architecture)
    cache = PackedCache(model, strategy, residual_length=7, sink_tokens=2)

    def check(moment: str) -> None:
        report = cache.memory()
        assert report.device_bytes + report.host_bytes == reachable_bytes(cache), moment
        assert sum(report.rows.values()) == report.device_bytes + report.host_bytes, moment
        assert all(size >= 0 for size in report.rows.values()), moment
        held = {tensor.untyped_storage().data_ptr() for layer in cache.packed_layers for tensor in layer.tensors()}
        assert len(held) <= sum(len(layer.tensors()) for layer in cache.packed_layers)
        copies = sum(layer.host.held_bytes() for layer in cache.packed_layers if layer.host is not None)
        assert report.host_bytes == copies

    check("new")
    walk(model, cache, PADS, 60)
    check("prompt")
    for _ in range(10):
        walk(model, cache, (0, 0, 0), 1)
        check("decoding")
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    check("reordered")
    if len(cache.packed_layers) == len(cache.layers):
        cache.truncate(20)
        check("cut")
    cache.batch_select_indices(torch.tensor([1]))
    check("selected")
    cache = copy.deepcopy(cache)
    check("copied")
    cache.reset()
    check("reset")


# ---- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:no layer of Mistral")
@pytest.mark.usefixtures("exact_rows")
@pytest.mark.parametrize(
    ("granularity", "numbers"), [("head", 1 << 24), ("token", 3000)], ids=["head-whole", "token-tiles"]
)
def test_every_architecture_is_unchanged_where_nothing_is_lost(
    build, walk, monkeypatch, architecture, granularity, numbers
):
    monkeypatch.setattr(adaptive, "SCORE_NUMBERS", numbers)
    model, plain = build(architecture), build(architecture)
    cache = PackedCache(
        model, Scripted(script=constant(16), window=4, interval=6, **GRANULARITIES[granularity]), residual_length=5
    )
    actual = walk(model, cache, (9, 0), 40, -9)
    expected = walk(plain, DynamicCache(config=plain.config), (9, 0), 40, -9)
    torch.testing.assert_close(actual[:, 9:], expected[:, 9:], rtol=0, atol=3e-5)
    for layer in cache.packed_layers:
        assert layer.packed_tokens >= 40
        assert_consistent(layer)


@pytest.mark.filterwarnings("ignore:no layer of Mistral")
def test_every_architecture_decodes_with_bits_by_attention(build, walk, architecture):
    model = build(architecture)
    cache = PackedCache(model, QAQ(interval=6), residual_length=5)
    assert torch.isfinite(walk(model, cache, (9, 0), 40, -9)[:, 9:]).all()
    for layer in cache.packed_layers:
        assert layer.packed_tokens >= 38
        assert_consistent(layer)


def test_latent_attention_needs_every_token(build, walk):
    model = build("deepseek-v3")
    cache = PackedCache(model, Scripted(script=mixed(0, 4), drops=True), residual_length=5)
    walk(model, cache, (0,), 40)
    with pytest.raises(RuntimeError, match="has dropped tokens"):
        walk(model, cache, (0,), 1)


def test_layers_that_borrow_keys_and_values_are_asked_for_their_attention(build, tokens, left_padded, walk):
    model = build("gemma3n")
    cache = PackedCache(model, Scripted(script=constant(16), window=NEVER, interval=NEVER), residual_length=0)
    walk(model, cache, (5, 0), 30, -4)
    ids, mask = left_padded(tokens(2, 34), [5, 0])
    expected = eager_maxima(build("gemma3n"), ids, mask)
    (layer,) = cache.packed_layers
    # layer 3 reads what layer 1 wrote
    torch.testing.assert_close(layer.history.read(34), torch.maximum(expected[1], expected[3]), **CLOSE)


def test_nothing_is_warned_about(model, walk):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(model, PackedCache(model, QAQ(interval=4), residual_length=0), PADS, 40, -9)
