"""KVQuant in use: every ablation generates, options and bytes are what they say, prompts are fitted once."""

from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from cachequant import registry
from cachequant.core import LayerSpec, PackedCache, Tables
from cachequant.core.calibration.kmeans import normal_float
from cachequant.core.hf.rope import RotaryFunction
from cachequant.strategies.kvquant import KVQuant

BLOCK = 32
SPEC = LayerSpec(index=0, layers=2, kv_heads=2, head_dim=128, value_dim=128)


@pytest.fixture(scope="module")
def model(build):
    """Four query and two kv heads of 24 channels in a hidden size of 64."""
    return build(head_dim=24, attention_bias=True)


def ready(strategy: KVQuant, model: Any, windows: Any) -> KVQuant:
    if strategy.calibrated:
        return strategy
    return strategy.calibrate(model, None, windows(2, 64), samples=2, heldout=0)


ABLATIONS = list(product(("static", "channel", "token"), ("pre", "post"), ("static", "channel", "token"), (0, 0.01)))


@pytest.mark.parametrize(("key_scale", "key_rope", "value_scale", "outliers"), ABLATIONS)
def test_every_ablation_generates_for_a_padded_batch(model, windows, key_scale, key_rope, value_scale, outliers):
    settings = {"key_scale": key_scale, "key_rope": key_rope, "value_scale": value_scale, "outliers": outliers}
    ids = windows(2, 70)
    mask = (torch.arange(70) >= torch.tensor([0, 37])[:, None]).long()
    ids = ids.masked_fill(mask == 0, 0)
    sinks = 0 if key_rope == "post" else 3
    measured = ready(KVQuant(bits=3, block=BLOCK, sink_tokens=sinks, **settings), model, windows)
    for datatype in ("nuq", "nf", "int"):
        strategy = KVQuant(**{**measured._given(), "datatype": datatype})
        cache = PackedCache(model, strategy, residual_length=4)
        output = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.stack(output.logits).isfinite().all()
        assert output.sequences.shape == (2, 75)
        layer = cache.packed_layers[1]
        assert layer.packed_tokens == 64
        assert layer.formats.key.rope == key_rope
        assert (layer.formats.key.scale, layer.formats.value.scale) == (key_scale, value_scale)
        assert layer.formats.key.outliers == (1 if outliers else 0)
        # sinks of the padded row begin after its padding
        assert bool(layer.sinks) == bool(sinks)
        if sinks:
            assert layer.sinks.positions().tolist() == [[0, 1, 2], [37, 38, 39]]
        logits = torch.stack(output.logits)
        # what stands where padding is does not matter
        again = PackedCache(model, strategy, residual_length=4)
        other = ids.masked_fill(mask == 0, 9)
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            model(other, attention_mask=mask, position_ids=positions, past_key_values=again)
            more = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = model(
                output.sequences[:, 70:71], attention_mask=more, position_ids=positions[:, -1:] + 1,
                past_key_values=again,
            ).logits  # fmt: skip
        assert_close(step[:, -1], logits[1], rtol=1e-4, atol=1e-4)


def test_settings_that_are_fitted_to_nothing_work_without_a_calibration(model, windows):
    strategy = KVQuant(datatype="nf", key_scale="token", block=BLOCK)
    assert strategy.calibrated
    cache = PackedCache(model, strategy, residual_length=0)
    with torch.no_grad():
        model(windows(1, 64), past_key_values=cache)
        assert model(windows(1, 1), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, True),
        ({"datatype": "nf"}, True),
        ({"datatype": "int", "key_scale": "channel"}, False),
        ({"datatype": "nf", "key_scale": "token", "value_scale": "static"}, True),
        ({"datatype": "int", "key_scale": "token", "q_norm": True}, True),
        ({"key_scale": "token"}, True),
    ],
    ids=str,
)
def test_what_is_fitted_needs_a_calibration(settings, needed):
    assert KVQuant(**settings).needs_statistics() == needed
    assert KVQuant(**settings).calibrated == (not needed)


def test_fewer_bits_lose_more_and_outliers_help(model, windows):
    ids = windows(1, 129, seed=5)
    with torch.no_grad():
        exact = model(ids).logits[0, -1]
    errors = {}
    for bits, outliers in product((2, 3, 4), (0, 0.05)):
        strategy = ready(KVQuant(bits=bits, outliers=outliers, block=BLOCK), model, windows)
        cache = PackedCache(model, strategy, residual_length=0)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
            errors[bits, outliers] = float((model(ids[:, -1:], past_key_values=cache).logits[0, -1] - exact).norm())
    assert errors[4, 0.05] < errors[2, 0.05]
    assert errors[4, 0] < errors[2, 0]
    assert errors[2, 0.05] < errors[2, 0]


# ---- options ---------------------------------------------------------------------------------------------------------


def test_sinks_of_the_strategy_are_the_caches_default(model, windows):
    strategy = ready(KVQuant(sink_tokens=5, block=BLOCK), model, windows)
    assert PackedCache(model, strategy).options.sink_tokens == 5
    assert PackedCache(model, strategy, sink_tokens=2).options.sink_tokens == 2
    assert PackedCache(model, strategy, sink_tokens=0).options.sink_tokens == 0
    assert PackedCache(model, strategy).options.residual_length == 128


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0, 0.01, 0.03, 0.1])
def test_slots_are_the_share_of_a_row_rounded_up(dim, bits, outliers):
    spec = LayerSpec(index=0, layers=1, kv_heads=1, head_dim=dim, value_dim=dim)
    formats = KVQuant(bits=bits, outliers=outliers).formats(spec)
    formats.require_fitting(dim, dim)
    exact = round(outliers * dim, 9)
    assert exact <= formats.key.outliers < exact + 1
    assert formats.key.trim == 0
    assert round(outliers * 128, 9) <= formats.value.outliers < outliers * 128 + 1
    assert round(outliers * dim / 2, 9) <= formats.value.trim < outliers * dim / 2 + 1


def test_key_and_value_bits_may_differ():
    formats = KVQuant(bits=3, value_bits=2).formats(SPEC)
    assert (formats.key.bits, formats.value.bits) == (3, 2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("fisher-scaled", False, True)),
        ({"profile": "repository"}, ("fisher", True, True)),
        ({"profile": "repository", "sink_tokens": 0}, ("fisher", False, True)),
        ({"weights": "equal"}, ("equal", False, False)),
        ({"datatype": "nf"}, ("fisher-scaled", False, False)),
    ],
    ids=str,
)
def test_profiles_decide_weights_and_sinks(settings, expected):
    strategy = KVQuant(**settings)
    recipe = strategy.recipe()
    assert (strategy._weights(), recipe.ranges_include_sinks, recipe.gradients) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": "prompt", "weights": "fisher"}, "has no gradients"),
        ({"outliers": 0.3}, "less than or equal to 0.25"),
        ({"outliers": -0.1}, "greater than or equal to 0"),
        ({"bits": 5}, "Input should be 2, 3 or 4"),
        ({"sink_tokens": 129}, "less than or equal to 128"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        KVQuant(**settings)


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outliers", [0, 0.04])
@pytest.mark.parametrize("bits", [2, 4])
def test_memory_is_codes_slots_and_the_numbers_all_tokens_share(build, windows, bits, outliers):
    model = build(head_dim=64)
    strategy = ready(KVQuant(bits=bits, outliers=outliers, block=BLOCK, sink_tokens=3), model, windows)
    cache = PackedCache(model, strategy, residual_length=0)
    batch, tokens, dim = 2, 2 * BLOCK, 64
    with torch.no_grad():
        model(windows(batch, tokens), past_key_values=cache)
    rows = cache.memory().rows
    heads = batch * 2 * 2 * tokens  # rows, kv heads, layers
    key_slots, value_slots = (3, 2) if outliers else (0, 0)
    assert rows["key codes"] + rows.get("key outliers", 0) == heads * (dim * bits // 8 + 4 * key_slots)
    assert rows["value codes"] == heads * dim * bits // 8
    assert rows["value scales"] == heads * 4
    assert rows.get("value outliers", 0) == heads * 4 * value_slots * dim // BLOCK
    assert "key scales" not in rows
    assert rows["codebooks"] == 2 * 2 * 2**bits * 4
    # scale and zero of every channel of the keys, and its sensitivity where slots are given by it
    assert rows["static scales"] == 2 * (3 if outliers else 2) * 2 * dim * 4
    assert rows["sinks"] >= 2 * 2 * batch * 2 * 3 * dim * 4
    # one row for both rows of the batch and both layers: cos and sin, half the channels
    assert rows["rope"] >= tokens * dim * 4
    assert rows["tail"] == 0


# ---- fitted to the prompt --------------------------------------------------------------------------------------------


def test_a_prompt_is_fitted_with_its_first_block_and_never_again(model, windows, monkeypatch):
    fits = []
    fit = KVQuant.fit

    def counted(self: KVQuant, layer: LayerSpec, side: Any, fmt: Any, statistics: Any) -> Any:
        fits.append((layer.index, side))
        return fit(self, layer, side, fmt, statistics)

    monkeypatch.setattr(KVQuant, "fit", counted)
    cache = PackedCache(model, KVQuant(calibration="prompt", block=BLOCK), residual_length=0)
    with torch.no_grad():
        for length in (20, 20, 64, 1, 40):
            model(windows(2, length), past_key_values=cache)
    assert sorted(fits) == [(i, side) for i in (0, 1) for side in ("key", "value")]


@pytest.mark.parametrize(("tokens", "fitted"), [(15, False), (16, True)])
def test_a_prompt_of_few_tokens_is_read_with_normal_float(tokens, fitted):
    strategy = KVQuant(calibration="prompt", bits=2, block=BLOCK)
    states = torch.randn(1, 2, BLOCK, 128, generator=torch.Generator().manual_seed(0)).exp()
    valid = (torch.arange(BLOCK) >= BLOCK - tokens)[None]
    for side in ("key", "value"):
        codebook = strategy.tables(SPEC, side, states, valid).codebook
        assert torch.equal(codebook, Tables(codebook=normal_float(2)).codebook) != fitted


def test_a_saved_cache_of_a_prompt_fit_goes_on_without_fitting(model, windows, monkeypatch, tmp_path):
    strategy = KVQuant(calibration="prompt", block=BLOCK, bits=3)
    cache = PackedCache(model, strategy, residual_length=8)
    with torch.no_grad():
        model(windows(2, 90), past_key_values=cache)
    cache.save(tmp_path / "cache")
    monkeypatch.setattr(KVQuant, "fit", lambda *arguments: pytest.fail("fitted again"))
    loaded = PackedCache.load(tmp_path / "cache", model, KVQuant(calibration="prompt", block=BLOCK, bits=3))
    with torch.no_grad():
        for length in (1, 40, 1):
            ids = windows(2, length, seed=length)
            pair = [model(ids, past_key_values=each).logits for each in (cache, loaded)]
            assert torch.equal(*pair)
    assert torch.equal(cache.packed_layers[0].tables["key"].codebook, loaded.packed_layers[0].tables["key"].codebook)


def test_a_saved_cache_resumes_with_the_calibration_read_from_anywhere(model, windows, tmp_path):
    strategy = ready(KVQuant(block=BLOCK), model, windows)
    cache = PackedCache(model, strategy, residual_length=0)
    with torch.no_grad():
        model(windows(1, 64), past_key_values=cache)
    cache.save(tmp_path / "cache")
    strategy.save_pretrained(tmp_path / "folder")
    loaded = PackedCache.load(tmp_path / "cache", model, KVQuant.from_pretrained(tmp_path / "folder"))
    with torch.no_grad():
        pair = [model(windows(1, 1), past_key_values=each).logits for each in (cache, loaded)]
    assert torch.equal(*pair)
    other = strategy.calibrate(model, None, windows(2, 64, seed=8), samples=2, heldout=0)
    with pytest.raises(ValueError, match="was saved with another strategy: calibration"):
        PackedCache.load(tmp_path / "cache", model, other)


def test_a_reset_cache_is_fitted_to_the_next_prompt(model, windows):
    cache = PackedCache(model, KVQuant(calibration="prompt", block=BLOCK), residual_length=0)
    codebooks = []
    for seed in (1, 2):
        with torch.no_grad():
            model(windows(1, 64, seed=seed), past_key_values=cache)
        codebooks.append(cache.packed_layers[1].tables["key"].codebook)
        cache.reset()
    assert not torch.equal(*codebooks)


# ---- a worked example: RoPE on read ----------------------------------------------------------------------------------


def test_worked_example_keys_rotated_on_read_score_as_in_the_fused_formula():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rotate = RotaryFunction(apply_rotary_pos_emb, "full", 4)
    query, key = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, -1, 0.25, 2], [-0.4, 0.3, 1.2, -0.7]))
    frequencies = torch.tensor([1.0, 1e4**-0.5, 1.0, 1e4**-0.5], dtype=torch.float64)

    def rotated(states: torch.Tensor, position: int) -> torch.Tensor:
        angles = (position * frequencies)[None, None]
        return rotate(states[None, None, None], angles.cos(), angles.sin()).flatten()

    query, rotated_key = rotated(query, 5), rotated(key, 3)
    assert_close(query, torch.tensor([0.381562, -1.098709, -0.408547, 1.947521]).double(), atol=1e-6, rtol=0)
    assert_close(rotated_key, torch.tensor([0.226653, 0.320862, -1.244439, -0.690686]).double(), atol=1e-6, rtol=0)
    cos, sin = (3 * frequencies).cos(), (3 * frequencies).sin()
    sign = torch.tensor([1.0, 1, -1, -1]).double()
    fused = (key * (cos * query + sign * sin * query.roll(2))).sum()
    assert float(query @ rotated_key) == pytest.approx(-1.1027666295, abs=1e-9)
    assert float(fused) == pytest.approx(-1.1027666295, abs=1e-9)


def test_variants_cover_all_bits_with_and_without_outliers_and_a_prompt():
    specs = [registry.spec(KVQuant(**settings)) for settings in KVQuant.variants]
    assert len(set(specs)) == len(specs)
    assert {(KVQuant(**v).bits, KVQuant(**v).outliers > 0) for v in KVQuant.variants} >= set(
        product((2, 3, 4), (True, False))
    )
