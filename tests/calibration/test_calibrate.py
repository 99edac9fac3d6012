"""A calibration measures what the model really computes, can be interrupted anywhere, and leaves the model alone."""

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

from cachequant.core import Format, LayerFormat, LayerSpec, PackedCache, Side, Strategy, Tables, attach
from cachequant.core.calibration import CalibratedStrategy, Statistics, fitted_tables, resume
from cachequant.core.calibration.statistics import BINS
from cachequant.core.hf.attach import attention_modules, is_attached
from cachequant.core.hf.calibrate import EVIDENCE_CHUNK, cut
from cachequant.core.hf.taps import TapCache
from cachequant.kernels.quantize import decode
from cachequant.strategies.kvquant import KVQuant
from cachequant.strategies.qnorm import QNorm

BLOCK = 32
PLAIN = KVQuant(block=BLOCK)


def tapped(model: PreTrainedModel, ids: Tensor, strategy: Any) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """States and gradients `[batch, kv_heads, tokens, head_dim]` that taps see, by layer and side."""
    seen = {}

    def observe(layer: Any, side: str, states: Tensor, gradient: Tensor) -> None:
        seen[layer.index, side] = states, gradient

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    logits = model(ids, past_key_values=TapCache(model, strategy, observe, gradients=True), use_cache=True).logits
    cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    return seen


class Projections:
    """Keys before RoPE and values as they leave the stock model's own modules, with their gradients."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, model_type: str) -> None:
        self.outputs: dict[tuple[int, str], Tensor] = {}
        self.model_type = model_type
        names = {"phi3": ["qkv_proj"], "gpt_neox": ["query_key_value"]}.get(model_type)
        names = names or ["k_norm" if model_type in ("qwen3", "gemma3_text") else "k_proj", "v_proj"]
        for index, module in attention_modules(model).items():
            for name in names:
                getattr(module, name).register_forward_hook(self._keep(index, name))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        logits = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits
        cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()

    def _keep(self, index: int, name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Tensor) -> None:
            output.retain_grad()
            self.outputs[index, name] = output

        return hook

    def of(self, index: int, side: str, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor]:
        """States and gradient `[batch, kv_heads, tokens, dim]`."""
        if self.model_type == "phi3":
            output = self.outputs[index, "qkv_proj"]
            at = heads * dim + (kv_heads * dim if side == "value" else 0)
            pick = lambda t: t[..., at : at + kv_heads * dim].unflatten(-1, (kv_heads, dim))  # noqa: E731
        elif self.model_type == "gpt_neox":
            output = self.outputs[index, "query_key_value"]
            part = 1 if side == "key" else 2
            pick = lambda t: t.unflatten(-1, (heads, 3, dim))[..., part, :]  # noqa: E731
        elif side == "key" and (index, "k_norm") in self.outputs:
            output = self.outputs[index, "k_norm"]
            # gemma3 normalises after it has moved the heads to the front
            pick = (lambda t: t.transpose(1, 2)) if output.shape[1] == kv_heads else (lambda t: t)
        else:
            output = self.outputs[index, "k_proj" if side == "key" else "v_proj"]
            pick = lambda t: t.unflatten(-1, (kv_heads, dim))  # noqa: E731
        return pick(output.detach()).transpose(1, 2), pick(output.grad).transpose(1, 2)


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


ARCHITECTURES = {
    "llama": ("llama", {}),
    "yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "biases": ("qwen2", {}),
    "key-norm": ("qwen3", {"head_dim": 32}),
    "fused": ("phi3", {"sliding_window": None}),
    "partial-rotary": ("gpt_neox", {"num_key_value_heads": 4, **rope("default", partial_rotary_factor=0.25)}),
    "sliding": (
        "gemma3_text",
        {
            "head_dim": 32,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_taps_see_keys_before_rope_and_values_and_their_gradients(build, windows, architecture):
    model_type, settings = ARCHITECTURES[architecture]
    ids = windows(1, 50)
    seen = tapped(build(model_type, dtype=torch.float64, **settings), ids, PLAIN)
    model = build(model_type, dtype=torch.float64, **settings)
    stock = Projections(model, ids, model_type)
    full = [i for i, kind in enumerate(settings.get("layer_types", ["full_attention"] * 2)) if kind[0] == "f"]
    assert sorted(seen) == [(i, side) for i in full for side in ("key", "value")]
    for (index, side), (states, gradient) in seen.items():
        expected = stock.of(index, side, 4, states.shape[1], states.shape[3])
        assert_close(states, expected[0], rtol=1e-10, atol=1e-12)
        assert gradient.abs().max() > 1e-3
        assert_close(gradient, expected[1], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("key_rope", ["pre", "post"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_under_taps_computes_what_it_computes_without(build, windows, architecture, key_rope, gradients):
    model_type, settings = ARCHITECTURES[architecture]
    model, ids = build(model_type, dtype=torch.float64, **settings), windows(2, 50)
    strategy = KVQuant(block=BLOCK, key_rope=key_rope)
    with torch.set_grad_enabled(gradients):
        expected = model(ids).logits
        cache = TapCache(model, strategy, lambda *arguments: None, gradients=gradients)
        assert_close(model(ids, past_key_values=cache).logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "yarn", "partial-rotary"])
def test_taps_see_rotated_keys_where_those_are_stored(build, windows, architecture):
    model_type, settings = ARCHITECTURES[architecture]
    ids = windows(1, 50)
    seen = tapped(build(model_type, dtype=torch.float64, **settings), ids, KVQuant(block=BLOCK, key_rope="post"))
    stored = {}

    class Retaining(DynamicCache):
        def update(self, key, value, layer_idx, *args, **kwargs):
            for side, states in (("key", key), ("value", value)):
                states.retain_grad()
                stored[layer_idx, side] = states
            return super().update(key, value, layer_idx, *args, **kwargs)

    model = build(model_type, dtype=torch.float64, **settings)
    logits = model(ids, past_key_values=Retaining(config=model.config), use_cache=True).logits
    cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    assert sorted(seen) == sorted(stored)
    for place, (states, gradient) in seen.items():
        assert_close(states, stored[place].detach(), rtol=1e-10, atol=1e-12)
        assert_close(gradient, stored[place].grad, rtol=1e-7, atol=1e-10)


# ---- what is measured ------------------------------------------------------------------------------------------------


def measured(model: PreTrainedModel, ids: Tensor, strategy: Any = PLAIN, **options: Any) -> Any:
    """The calibration of `strategy` on all of `ids`."""
    return strategy.calibrate(model, None, ids, **{"samples": len(ids), "heldout": 0, **options}).calibration


def states_and_gradients(build: Any, ids: Tensor, index: int, side: str) -> tuple[Tensor, Tensor]:
    """Of all windows `[windows, kv_heads, tokens, head_dim]`, from the stock model."""
    found = [Projections(build(), row[None], "llama").of(index, side, 4, 2, 16) for row in ids]
    return tuple(torch.cat([pair[part] for pair in found]) for part in (0, 1))


@pytest.mark.parametrize("profile", ["paper", "repository"])
def test_key_ranges_are_percentiles_of_all_windows_without_sinks_in_the_paper(build, windows, profile):
    ids = windows(3, 40)
    strategy = KVQuant(block=BLOCK, outliers=0.04, sink_tokens=3, profile=profile)
    calibration = measured(build(), ids, strategy)
    for index in range(2):
        states, _ = states_and_gradients(build, ids, index, "key")
        kept = states[:, :, 3:] if profile == "paper" else states
        rows = kept.permute(1, 3, 0, 2).flatten(2).double().numpy()
        expected = torch.from_numpy(np.percentile(rows, [2, 98], axis=-1)).float()
        statistics = calibration.of(index, "key")
        # float16, of numbers that agree to float32
        assert_close(torch.stack([statistics.low, statistics.high]), expected, rtol=2**-10, atol=1e-4)
        assert calibration.of(index, "value").low is None


@pytest.mark.parametrize("side", ["key", "value"])
def test_densities_are_histograms_weighted_by_squared_gradients(build, windows, side):
    ids = windows(3, 40)
    strategy = KVQuant(block=BLOCK, outliers=0, sink_tokens=2)
    calibration = measured(build(), ids, strategy)
    states, gradient = states_and_gradients(build, ids, 1, side)
    states, fisher = states[:, :, 2:].double(), gradient[:, :, 2:].double().square()
    statistics = calibration.of(1, side)
    if side == "key":
        low, high = (bound[None, :, None].double() for bound in (statistics.low, statistics.high))
    else:
        low, high = states.amin(-1, keepdim=True), states.amax(-1, keepdim=True)
    width = ((high - low) / 2).expand_as(states)
    points = (states - (high + low) / 2) / width
    assert statistics.density[0].sum() == points.numel()
    for row, weights in zip(statistics.density, (torch.ones_like(fisher), fisher, fisher * width**2), strict=True):
        expected, _ = np.histogram(points.clamp(-1, 1).numpy(), BINS, (-1, 1), weights=weights.numpy())
        # a number on the border of two bins may fall into either: compare what lies below each bin
        assert float(row.sum()) == pytest.approx(expected.sum(), rel=1e-3)
        drift = (row.double().cumsum(0) - torch.from_numpy(expected).cumsum(0)).abs().max()
        assert drift <= 0.01 * expected.sum()


def test_sensitivities_are_roots_of_mean_fisher_information(build, windows):
    ids = windows(3, 40)
    calibration = measured(build(), ids, KVQuant(block=BLOCK, sink_tokens=2, outliers=0))
    for index, side in ((0, "key"), (1, "key"), (1, "value")):
        _, gradient = states_and_gradients(build, ids, index, side)
        expected = gradient[:, :, 2:].double().square().mean((0, 2)).sqrt()
        assert_close(calibration.of(index, side).sensitivity, (expected / expected.max()).float(), rtol=1e-3, atol=1e-6)


def test_every_side_of_every_packed_layer_is_measured_and_described(build, windows):
    calibration = measured(build(**ARCHITECTURES["sliding"][1], model_type="gemma3_text"), windows(2, 40))
    record = calibration.record
    assert set(calibration.statistics) == set(record.layers) == {1, 2}
    assert record.layers[1].shape.head_dim == 32
    assert record.layers[1].views["key"]["rope"] == "pre"
    assert record.strategy == "kvquant"
    assert record.evidence.windows == 2
    assert record.evidence.length == 40
    assert record.evidence.perplexity is None


def test_the_order_of_windows_does_not_matter(build, windows):
    ids = windows(4, 40)
    first, second = (measured(build(), order) for order in (ids, ids.flip(0)))
    for index in (0, 1):
        for side in ("key", "value"):
            a, b = first.of(index, side).tensors(), second.of(index, side).tensors()
            assert a.keys() == b.keys()
            for name in a:
                assert_close(a[name], b[name], rtol=1e-5, atol=0)
        assert torch.equal(first.of(index, "key").low, second.of(index, "key").low)


def test_only_the_windows_asked_for_are_measured(build, windows):
    ids = windows(5, 60)
    few = PLAIN.calibrate(build(), None, ids, samples=2, length=40, heldout=0).calibration
    assert equal(few, measured(build(), ids[:2, :40]))


def test_what_needs_no_gradients_measures_none(build, windows):
    for strategy in (KVQuant(block=BLOCK, weights="equal"), KVQuant(block=BLOCK, datatype="nf"), QNorm(base="uniform")):
        statistics = measured(build(), windows(2, 140), strategy).of(0, "key")
        assert statistics.sensitivity is None
        assert torch.equal(statistics.density[0], statistics.density[1])


def test_held_out_windows_measure_perplexity_with_and_without_the_cache(build, windows):
    model, ids = build(), windows(3, 200)
    evidence = PLAIN.calibrate(model, None, ids, samples=2, heldout=1).calibration.record.evidence
    with torch.no_grad():
        logits = model(ids[2:]).logits[0, :-1]
    assert evidence.perplexity_exact == pytest.approx(float(cross_entropy(logits, ids[2, 1:]).exp()), rel=1e-4)
    assert evidence.perplexity == pytest.approx(evidence.perplexity_exact, rel=0.2)
    assert evidence.perplexity != evidence.perplexity_exact
    assert evidence.heldout_tokens == 199
    assert evidence.residual_length == 128


def test_perplexity_is_that_of_streaming_through_the_packed_cache(build, windows):
    model, ids = build(), windows(3, 230)
    strategy = PLAIN.calibrate(model, None, ids, samples=2, heldout=1)
    cache, logits = PackedCache(model, strategy), []
    with torch.no_grad():
        for part in ids[2:].split(EVIDENCE_CHUNK, dim=1):
            logits.append(model(part, past_key_values=cache).logits[0])
    expected = cross_entropy(torch.cat(logits)[:-1], ids[2, 1:]).exp()
    assert strategy.calibration.record.evidence.perplexity == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("length", "told"), [(EVIDENCE_CHUNK + 128 + BLOCK - 1, False), (EVIDENCE_CHUNK + 128 + BLOCK, True)]
)
def test_windows_that_read_nothing_packed_tell_no_perplexity(build, windows, length, told):
    evidence = PLAIN.calibrate(build(), None, windows(3, length), samples=2).calibration.record.evidence
    assert (evidence.perplexity is not None) == told
    assert evidence.perplexity_exact is not None


def test_block_statistics_come_from_whole_blocks(build, windows):
    strategy = KVQuant(block=BLOCK, key_scale="channel", value_scale="channel", outliers=0, sink_tokens=1)
    calibration = measured(build(), windows(2, 2 * BLOCK + 9), strategy)
    assert calibration.of(0, "key").low is None
    assert calibration.of(0, "key").density[0].sum() == 2 * (2 * BLOCK - 1) * 2 * 16
    with pytest.raises(ValueError, match="windows of 20 tokens are shorter than a block of 32; use longer ones"):
        measured(build(), windows(2, 20), strategy)


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
@pytest.mark.parametrize("attached", [False, True], ids=["plain", "attached"])
def test_the_model_is_left_as_it_was(build, windows, attached, fails):
    model = build()
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    if attached:
        attach(model)
    training = {name: module.training for name, module in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    implementation = model.config._attn_implementation
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def report(name: str, done: int, count: int) -> None:
        if fails and (name, done) == ("densities", 1):
            raise KeyboardInterrupt

    try:
        PLAIN.calibrate(model, None, windows(3, 40), samples=2, report=report)
    except KeyboardInterrupt:
        assert fails
    assert {name: module.training for name, module in model.named_modules()} == training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert is_attached(model) == attached
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_calibrating_works_in_any_gradient_mode(build, windows, context):
    ids = windows(3, 40)
    expected = PLAIN.calibrate(build(), None, ids, samples=2).calibration
    model = build()
    with context():
        assert equal(PLAIN.calibrate(model, None, ids, samples=2).calibration, expected)
        # ids that were made in this mode
        assert equal(PLAIN.calibrate(model, None, ids.clone(), samples=2).calibration, expected)
        assert measured_text(model).of(0, "key").sensitivity is not None


def measured_text(model: PreTrainedModel) -> Any:
    return PLAIN.calibrate(model, Words(1), numbers(3, 95), samples=2, length=40, heldout=0).calibration


def test_gradient_checkpointing_is_no_obstacle(build, windows):
    model = build()
    model.model.gradient_checkpointing = True
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    model.train()
    assert equal(measured(model, windows(2, 40)), measured(build(), windows(2, 40)))
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_model_that_is_calibrated_again_gives_the_same(build, windows):
    model, ids = build(), windows(3, 40)
    first = PLAIN.calibrate(model, None, ids, samples=2)
    again = first.calibrate(model, None, ids, samples=2)
    assert equal(first.calibration, again.calibration)


# ---- interrupted -----------------------------------------------------------------------------------------------------


def equal(first: Any, second: Any) -> bool:
    """Whether two calibrations hold the same, but for the time they took."""
    records = []
    for calibration in (first, second):
        evidence = calibration.record.evidence.model_copy(update={"seconds": 0})
        records.append(calibration.record.model_copy(update={"evidence": evidence}))
    tensors = [calibration._tensors() for calibration in (first, second)]
    return (
        records[0] == records[1]
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    )


class Interruption:
    """A report that stops at one place, once, and remembers where it was called."""

    def __init__(self, name: str, done: int) -> None:
        self.place, self.calls = (name, done), []

    def __call__(self, name: str, done: int, count: int) -> None:
        self.calls.append((name, done))
        if self.calls[-1] == self.place:
            self.place = None
            raise KeyboardInterrupt


PLACES = [("ranges", 0), ("ranges", 1), ("ranges", 3), ("densities", 0), ("densities", 2), ("densities", 3)]


@pytest.mark.parametrize(("name", "done"), [*PLACES, ("evidence", 0), ("evidence", 1)])
def test_an_interrupted_calibration_goes_on_where_it_stopped(build, windows, tmp_path, name, done):
    ids = windows(4, 40)
    expected = PLAIN.calibrate(build(), None, ids, samples=3).calibration
    report = Interruption(name, done)
    with pytest.raises(KeyboardInterrupt):
        PLAIN.calibrate(build(), None, ids, samples=3, folder=tmp_path, report=report)
    stopped = len(report.calls)
    assert [path.name for path in tmp_path.iterdir()] == [resume.FILE]
    found = PLAIN.calibrate(build(), None, ids, samples=3, folder=tmp_path, report=report).calibration
    assert equal(found, expected)
    assert not list(tmp_path.iterdir())
    # perplexities are measured anew, statistics are not
    assert report.calls[stopped] == (name, 0 if name == "evidence" else done)


@pytest.mark.parametrize("name", ["ranges", "densities"])
def test_half_a_window_is_never_counted(build, windows, tmp_path, monkeypatch, name):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.0)
    ids = windows(3, 40)
    expected = measured(build(), ids)
    model = build()
    place = []

    def report(name: str, done: int, count: int) -> None:
        place[:] = [name, done]

    def stop(module: Any, *arguments: Any) -> None:
        if place == [name, 1]:
            raise MemoryError

    # after the first layer's keys were seen
    handle = model.model.layers[1].mlp.register_forward_hook(stop)
    with pytest.raises(MemoryError):
        measured(model, ids, folder=tmp_path, report=report)
    handle.remove()
    calls = []
    found = measured(model, ids, folder=tmp_path, report=lambda name, done, count: calls.append((name, done)))
    assert calls[0] == (name, 1)
    assert equal(found, expected)


def test_resuming_repeatedly_gives_the_same(build, windows, tmp_path):
    ids = windows(3, 40)
    expected = measured(build(), ids)
    for name, done in PLACES:
        if done < 3:
            with pytest.raises(KeyboardInterrupt):
                measured(build(), ids, folder=tmp_path, report=Interruption(name, done))
    assert equal(measured(build(), ids, folder=tmp_path), expected)


@pytest.mark.parametrize("online", [KVQuant(block=BLOCK, key_scale="token"), QNorm(base="uniform:bits=2,block=32")])
def test_online_grids_resume_too(build, windows, tmp_path, online):
    ids = windows(3, 40)
    expected = measured(build(), ids, online)
    for name, done in (("ranges", 1), ("densities", 1)):
        with pytest.raises(KeyboardInterrupt):
            measured(build(), ids, online, folder=tmp_path, report=Interruption(name, done))
    assert equal(measured(build(), ids, online, folder=tmp_path), expected)


def test_another_job_does_not_take_over_what_was_interrupted(build, windows, tmp_path):
    ids = windows(3, 40)
    with pytest.raises(KeyboardInterrupt):
        measured(build(), ids, folder=tmp_path, report=Interruption("densities", 1))
    others = [
        (build(seed=1), ids, PLAIN),
        (build(), ids.flip(0), PLAIN),
        (build(), ids[:2], PLAIN),
        (build(), ids, KVQuant(block=BLOCK, outliers=0)),
    ]
    for model, texts, strategy in others:
        with pytest.raises(ValueError, match="calibration of another model, text or settings that was interrupted"):
            measured(model, texts, strategy, folder=tmp_path)
    assert equal(measured(build(), ids, folder=tmp_path), measured(build(), ids))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"nothing", lambda data: b""])
def test_a_damaged_intermediate_file_is_refused(build, windows, tmp_path, damage):
    ids = windows(2, 40)
    with pytest.raises(KeyboardInterrupt):
        measured(build(), ids, folder=tmp_path, report=Interruption("densities", 1))
    path = tmp_path / resume.FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"is damaged .*; remove it to begin anew"):
        measured(build(), ids, folder=tmp_path)
    path.unlink()
    assert equal(measured(build(), ids, folder=tmp_path), measured(build(), ids))


# ---- texts -----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of numbers between spaces; begins with 1 and, if asked to, ends with 2."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __init__(self, *begin_and_end: int) -> None:
        self.ends = list(begin_and_end)

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> Any:
        ids = [int(word) for word in text.split()]
        return SimpleNamespace(input_ids=self.ends[:1] + ids + self.ends[1:] if add_special_tokens else ids)


def numbers(first: int, last: int) -> str:
    return " ".join(map(str, range(first, last)))


def test_windows_are_spread_evenly_over_the_text_and_held_out_ones_are_its_end(build):
    found, rest = cut(build(), Words(), numbers(0, 100), 3, 10, 2)
    assert [row[0] for row in found.tolist()] == [0, 35, 70]
    assert found[1].tolist() == list(range(35, 45))
    assert rest.tolist() == [list(range(80, 90)), list(range(90, 100))]


def test_windows_begin_as_the_tokenizer_begins_a_text(build):
    for tokenizer in (Words(1), Words(1, 2)):
        found, rest = cut(build(), tokenizer, [numbers(3, 30), numbers(30, 60)], 2, 10, 1)
        assert found.shape == (2, 10)
        assert torch.cat([found, rest])[:, 0].tolist() == [1, 1, 1]
        assert found[0].tolist() == [1, *range(3, 12)]
        assert rest[0].tolist() == [1, *range(51, 60)]


def test_a_text_of_exactly_the_windows_is_enough_and_one_token_less_is_not(build):
    found, rest = cut(build(), Words(), numbers(0, 40), 3, 10, 1)
    assert torch.equal(torch.cat([found, rest]).flatten(), torch.arange(40))
    with pytest.raises(
        ValueError, match=r"has 39 tokens; 3 windows of 10 and 1 held out need 40.*use at most 2 samples"
    ):
        cut(build(), Words(), numbers(0, 39), 3, 10, 1)
    with pytest.raises(ValueError, match="Give a longer text, or use shorter windows"):
        cut(build(), Words(), numbers(0, 9), 3, 10, 1)


def test_one_window_and_no_held_out_ones(build):
    found, rest = cut(build(), Words(), numbers(0, 30), 1, 10, 0)
    assert found.tolist() == [list(range(10))]
    assert rest.shape[0] == 0


def test_the_default_length_is_what_the_model_takes(build):
    found, _ = cut(build(max_position_embeddings=64), Words(), numbers(0, 500), 2, None, 0)
    assert found.shape == (2, 64)


def test_texts_calibrate_like_their_token_ids(build):
    model = build()
    ids = torch.tensor([[1, *range(3, 42)], [1, *range(56, 95)]])
    assert equal(measured_text(model), measured(model, ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"heldout": -1}, "heldout=-1 at least 0"),
        ({"samples": 9}, r"at least samples \+ heldout = 10 windows, got torch.int64 \(4, 40\)"),
        ({"texts": torch.rand(4, 40)}, "must be .* integers .* got torch.float32"),
        ({"texts": torch.arange(40)}, r"must be \[windows, length\]"),
        ({"texts": torch.ones(4, 600, dtype=torch.long)}, "windows of 600 tokens: use 2 to 512, the model's context"),
        ({"length": 1}, "windows of 1 tokens: use 2 to 512"),
        ({"texts": "some text"}, "texts need a tokenizer; give one, or token ids"),
    ],
    ids=str,
)
def test_what_cannot_be_calibrated_on_is_named(build, windows, options, message):
    arguments = {"texts": windows(4, 40), "samples": 2, **options}
    with pytest.raises(ValueError, match=message):
        PLAIN.calibrate(build(), None, arguments.pop("texts"), **arguments)


def test_windows_longer_than_the_context_are_refused_for_texts_too(build):
    with pytest.raises(ValueError, match="windows of 100 tokens: use 2 to 64"):
        cut(build(max_position_embeddings=64), Words(), numbers(0, 500), 2, 100, 0)


# ---- models and states that are out of the ordinary ------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(("projection", "side"), [("k_proj", "key"), ("v_proj", "value")])
def test_states_that_are_not_finite_are_named(build, windows, poison, projection, side):
    model = build()
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, projection).weight[5, 5] = poison
    for key_rope in ("pre", "post"):
        before_rope = side == "key" and key_rope == "pre"
        message = "keys .* are not finite" if before_rope else f"layer 1: the states of the {side}s are not finite"
        with pytest.raises(ValueError, match=message):
            measured(model, windows(2, 40), KVQuant(block=BLOCK, weights="equal", key_rope=key_rope))
        assert not is_attached(model)


def test_gradients_that_are_not_finite_are_named(build, windows):
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    with pytest.raises(ValueError, match=r"layer 1: the gradients of the \w+s are not finite in window 0"):
        measured(model, windows(2, 40))


def generates(model: PreTrainedModel, strategy: Any, ids: Tensor) -> Tensor:
    """Logits of a second forward, which reads what the first one packed."""
    cache = PackedCache(model, strategy, residual_length=0)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        return model(ids[:, -1:], past_key_values=cache).logits


def test_dead_channels_stay_dead(build, windows):
    model = build()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[3:6] = 0
            layer.self_attn.v_proj.weight[7] = 0
    strategy = PLAIN.calibrate(model, None, windows(2, 40), samples=2, heldout=0)
    assert strategy.calibration.of(0, "key").low[0, 3:6].eq(0).all()
    cache = PackedCache(model, strategy, residual_length=0)
    with torch.no_grad():
        model(windows(2, 97), past_key_values=cache)
    layer = cache.packed_layers[0]
    keys = layer._decode(layer.stores["key"].read(), "key", torch.float32)
    assert keys.isfinite().all()
    assert keys[:, 0, :, 3:6].eq(0).all()
    assert generates(model, strategy, windows(2, 97)).isfinite().all()


def test_a_text_of_one_token_gives_something_usable(build, windows):
    model = build()
    strategy = PLAIN.calibrate(model, None, torch.full((2, 40), 5), samples=2, heldout=0)
    for ids in (windows(2, 97), torch.full((2, 97), 5)):
        assert generates(model, strategy, ids).isfinite().all()


@pytest.mark.parametrize("outliers", [0, 0.25])
@pytest.mark.parametrize(
    "settings", [{}, {"value_scale": "static"}, {"key_scale": "channel", "value_scale": "channel"}], ids=str
)
def test_states_far_beyond_what_was_measured_saturate_and_stay_finite(build, windows, settings, outliers):
    strategy = KVQuant(block=BLOCK, bits=2, outliers=outliers, **settings)
    strategy = strategy.calibrate(build(), None, windows(2, 40), samples=2, heldout=0)
    spec = strategy.calibration.record.layers[0].shape
    formats = strategy.formats(spec)
    states = torch.randn(2, 2, 2 * BLOCK, 16, generator=torch.Generator().manual_seed(0)) * 1e3
    for side in ("key", "value"):
        fmt, tables = getattr(formats, side), strategy.tables(spec, side, states[:, :, :BLOCK], None)
        packed = strategy.encode(states, fmt, side, BLOCK, None, tables)
        back = decode(packed, fmt, side, 16, BLOCK, tables)
        assert back.isfinite().all()
        assert (back - states).square().mean() < states.square().mean()
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in packed.items()}
        assert sum(sizes.values()) == 2 * 2 * 2 * sum(fmt.block_bytes(side, 16, BLOCK, 4).values())
        if fmt.scale == "static" and not outliers:
            statistics = strategy.calibration.of(0, side)
            assert (back >= statistics.low[:, None] - 1e-3).all()
            assert (back <= statistics.high[:, None] + 1e-3).all()


def test_a_layer_that_shows_no_keys_is_named(build, windows, monkeypatch):
    model = build()
    layer = model.model.layers[1]
    forward = layer.forward

    def without_cache(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "past_key_values": None})

    monkeypatch.setattr(layer, "forward", without_cache)
    with pytest.raises(ValueError, match=r"layers \[1\] showed no keys\..*gradient_checkpointing_disable"):
        measured(model, windows(2, 40))


@pytest.mark.filterwarnings("ignore:no layer of")
def test_a_model_without_full_attention_has_nothing_to_calibrate(build, windows):
    with pytest.raises(ValueError, match="MistralForCausalLM has no full-attention layer: nothing to calibrate"):
        measured(build("mistral", sliding_window=24), windows(2, 40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_in_another_dtype_gives_nearly_the_same_statistics(build, windows, dtype):
    ids = windows(2, 64)
    expected, found = measured(build(), ids), measured(build(dtype=dtype), ids)
    for index in (0, 1):
        a, b = expected.of(index, "key"), found.of(index, "key")
        assert_close(b.high, a.high, rtol=0.1, atol=0.1)
        assert_close(b.sensitivity, a.sensitivity, rtol=0.3, atol=0.05)
        assert b.density.isfinite().all()


class Partly(CalibratedStrategy):
    """Codebooks for the values of the second layer; `key_codes` for its keys; nothing in the first layer."""

    name: ClassVar[str] = "partly"

    key_codes: str = "exact"

    def formats(self, layer: LayerSpec) -> LayerFormat | None:
        value = Format(codes="codebook", bits=2)
        return None if layer.index == 0 else LayerFormat(key=Format(codes=self.key_codes), value=value, block=BLOCK)

    def fit(self, layer: LayerSpec, side: Side, fmt: Format, statistics: Statistics) -> Tables:
        return fitted_tables(statistics, fmt, side, "nuq", "equal")


class PartlyUniform(Strategy):
    """The same without a calibration, on affine grids."""

    name: ClassVar[str] = "partly-uniform"

    def formats(self, layer: LayerSpec) -> LayerFormat | None:
        key = Format(codes="exact")
        return None if layer.index == 0 else LayerFormat(key=key, value=Format(bits=2), block=BLOCK)


@pytest.mark.parametrize(
    "strategy", [Partly(), QNorm(base=Partly()), QNorm(base=PartlyUniform())], ids=["alone", "q-norm", "q-norm-uniform"]
)
def test_exact_layers_and_sides_are_not_measured(build, windows, strategy):
    model = build()
    strategy = strategy.calibrate(model, None, windows(2, 64), samples=2, heldout=0)
    calibration = strategy.calibration
    assert {index: list(sides) for index, sides in calibration.statistics.items()} == {1: ["value"]}
    assert {index: list(layer.views) for index, layer in calibration.record.layers.items()} == {1: ["value"]}
    strategy.require_model(model)
    cache = PackedCache(model, strategy, residual_length=0)
    with torch.no_grad():
        model(windows(2, 96), past_key_values=cache)
        assert model(windows(2, 1), past_key_values=cache).logits.isfinite().all()
    layer = cache.packed_layers[1]
    assert layer.packed_tokens == 96
    assert (layer.tables["value"].gain is None) == isinstance(strategy, Partly)


def test_codes_of_its_own_cannot_be_calibrated(build, windows):
    with pytest.raises(ValueError, match="'custom' codes of the keys of layer 1 cannot be calibrated"):
        measured(build(), windows(2, 40), Partly(key_codes="custom"))


def test_windows_of_nothing_but_sinks_are_refused(build, windows):
    strategy = KVQuant(block=BLOCK, sink_tokens=40, outliers=0)
    with pytest.raises(ValueError, match="windows of 40 tokens are all sinks with sink_tokens=40; use longer windows"):
        measured(build(), windows(2, 40), strategy)
    # the rest of a block is not measured
    with pytest.raises(ValueError, match="whole blocks of 32 in windows of 63 tokens are all sinks"):
        measured(build(), windows(2, 63), strategy)
    assert measured(build(), windows(2, 64), strategy).of(1, "key").density[0].sum() == 2 * 24 * 2 * 16


def test_windows_shorter_than_a_block_are_refused_at_once(build, windows):
    calls = []
    with pytest.raises(ValueError, match="windows of 20 tokens are shorter than a block of 32; use longer ones"):
        measured(build(), windows(3, 20), report=lambda *call: calls.append(call))
    assert calls == [("ranges", 0, 3)]


def test_token_ids_may_be_of_any_integer_type(build, windows):
    ids = windows(3, 40)
    assert equal(*(PLAIN.calibrate(build(), None, each, samples=2).calibration for each in (ids, ids.int())))


def test_a_strategy_first_used_in_inference_mode_serves_gradients_later(build, windows):
    model = build()
    strategy = PLAIN.calibrate(model, None, windows(2, 64), samples=2, heldout=0)
    for context in (torch.inference_mode, torch.enable_grad):
        with context():
            cache = PackedCache(model, strategy, residual_length=0)
            model(windows(2, 64), past_key_values=cache)
            logits = model(windows(2, 3), past_key_values=cache).logits
    logits.sum().backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.abs().max() > 0
    assert not any(tensor.is_inference() for tensor in cache.packed_layers[0].tables["key"].tensors().values())
