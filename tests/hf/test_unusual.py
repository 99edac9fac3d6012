"""Rare combinations that once gave silently wrong results, or an error that helped nobody."""

import contextlib
import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from cachequant import registry
from cachequant.core import Format, LayerFormat, PackedCache, SimulatedCache, Strategy, attach, detach
from cachequant.core.hf.attach import is_attached
from cachequant.core.hf.attention import IMPLEMENTATION, attention_forward
from cachequant.core.hf.tiny import tiny_model
from cachequant.kernels import backend

PRE = "none:key_rope=pre,block=32"
POST = "none:block=32"
CLOSE = {"rtol": 0, "atol": 2e-5}
KINDS = ["sliding_attention", "full_attention"] * 2


def cache_of(model, spec=POST, **options):
    return PackedCache(model, registry.parse(spec), **{"residual_length": 0, **options})


def random_tokens(batch, length, seed=0):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, cache, *pieces, **kwargs):
    return torch.cat([model(piece, past_key_values=cache, **kwargs).logits for piece in pieces], dim=1)


COPIES = {
    "deepcopy": lambda model: copy.deepcopy(model),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "base model first": lambda model: attach(model.model) or model,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_of_an_attached_model_are_attached_once(make):
    model = tiny_model()
    if make is not COPIES["base model first"]:
        attach(model)
    other = make(model)
    pieces = random_tokens(1, 60).split([50, 10], dim=1)
    expected = run(tiny_model(), DynamicCache(), *pieces)
    torch.testing.assert_close(run(other, cache_of(other, PRE), *pieces), expected, **CLOSE)
    detach(other)
    assert not is_attached(other)
    assert other.config._attn_implementation != IMPLEMENTATION
    assert all(not module._forward_pre_hooks for module in other.modules())


def test_sinks_that_the_mask_hides_stay_hidden():
    model, stock = tiny_model(), tiny_model()
    first, second = random_tokens(2, 80).split([70, 10], dim=1)
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[0, 2:40] = 0
    cache, plain = cache_of(model, sink_tokens=4), DynamicCache()
    for length, piece in ((70, first), (80, second)):
        got = run(model, cache, piece, attention_mask=mask[:, :length])
        torch.testing.assert_close(got, run(stock, plain, piece, attention_mask=mask[:, :length]), **CLOSE)


def test_a_full_mask_of_one_step_does_not_make_old_tokens_padding():
    model = tiny_model()
    strategy = "uniform:bits=8,key_scale=channel,block=32"
    prompt, step = random_tokens(1, 64).split([63, 1], dim=1)
    hiding = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    hiding[..., :16] = False
    hidden, plain = (cache_of(model, strategy) for _ in range(2))
    run(model, hidden, prompt)
    run(model, hidden, step, attention_mask=hiding)
    run(model, plain, prompt, step)
    for store in ("key", "value"):
        held = [cache.packed_layers[0].stores[store].read()["scales"] for cache in (hidden, plain)]
        assert torch.equal(*held)


@pytest.mark.parametrize("kind", ["soft bias", "per head"])
def test_full_masks_that_hide_nothing_for_all_leave_statistics_alone(kind):
    model = tiny_model()
    tokens = random_tokens(1, 64)
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    mask = torch.where(causal, -0.01, torch.finfo(torch.float32).min)[None, None]
    if kind == "per head":
        mask = causal[None, None].repeat(1, 4, 1, 1)
        mask[:, 0, :, :16] = torch.eye(64, dtype=torch.bool)[:, :16]
    masked, plain = (cache_of(model, "uniform:bits=8,key_scale=channel,block=32") for _ in range(2))
    run(model, masked, tokens, attention_mask=mask)
    run(model, plain, tokens)
    # layer 0 sees the same states whatever the mask
    assert torch.equal(*(cache.packed_layers[0].stores["key"].read()["scales"] for cache in (masked, plain)))


def build(kind, **settings):
    base = {
        "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**base, **settings})).eval()


def test_layers_without_positions_are_not_rotated():
    model = build("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    stock = copy.deepcopy(model)
    pieces = random_tokens(1, 60).split([50, 10], dim=1)
    expected = run(stock, DynamicCache(), *pieces)
    torch.testing.assert_close(run(model, cache_of(model, PRE), *pieces), expected, **CLOSE)


def test_a_model_that_uses_its_keys_before_attention_is_refused_before_rope():
    model = build("diffllama")
    with pytest.raises(ValueError, match="keys before RoPE are not supported"):
        run(model, cache_of(model, PRE), random_tokens(1, 50))


@pytest.mark.parametrize("kind", ["doge", "git"])
def test_models_that_build_their_own_masks_are_refused_and_left_alone(kind):
    model = build(kind)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="builds its own attention mask"):
        attach(model)
    assert model.config._attn_implementation == before


def test_gradients_flow_through_the_tokens_of_a_continuation():
    gradients = []
    for cached in (True, False):
        model = tiny_model()
        first, second = random_tokens(1, 60).split([50, 10], dim=1)
        cache = cache_of(model) if cached else DynamicCache()
        run(model, cache, first)
        model(second, past_key_values=cache).logits.square().mean().backward()
        gradients.append([layer.self_attn.k_proj.weight.grad for layer in model.model.layers])
    for packed, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-3, atol=1e-6)


def test_gradients_that_another_attention_would_lose_raise():
    model = tiny_model()
    cache = cache_of(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="gradients do not flow"):
        model(random_tokens(1, 40), past_key_values=cache)


def test_dropout_over_packed_keys_is_refused():
    model = tiny_model()
    cache = cache_of(model)
    run(model, cache, random_tokens(1, 40))
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match="dropout"):
        run(model, cache, random_tokens(1, 2))


def test_full_masks_of_integers_are_refused():
    model = tiny_model()
    cache = cache_of(model)
    run(model, cache, random_tokens(1, 40))
    with pytest.raises(ValueError, match="ambiguous"):
        run(model, cache, random_tokens(1, 1), attention_mask=torch.ones(1, 1, 1, 41, dtype=torch.long))


def test_rows_whose_angles_differ_in_sign_alone_keep_their_own():
    model = tiny_model()
    tokens = random_tokens(1, 60).expand(2, -1)
    positions = torch.stack([torch.arange(60), -torch.arange(60)])
    expected = run(tiny_model(), DynamicCache(), tokens, position_ids=positions)
    cache = cache_of(model, PRE)
    got = [run(model, cache, tokens[:, s], position_ids=positions[:, s]) for s in (slice(0, 50), slice(50, 60))]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, **CLOSE)


def test_a_cache_changed_in_inference_mode_goes_on_outside_it():
    model = tiny_model()
    cache = cache_of(model, residual_length=16, sink_tokens=2)
    with torch.inference_mode():
        run(model, cache, random_tokens(2, 90))
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-5)
    run(model, cache, random_tokens(2, 3))
    model(random_tokens(2, 3), past_key_values=cache).logits.mean().backward()


def test_lengths_below_zero_and_cuts_of_a_simulation_are_refused():
    model = tiny_model()
    cache = cache_of(model)
    run(model, cache, random_tokens(1, 40))
    with pytest.raises(ValueError, match="0 or more"):
        cache.truncate(-3)
    assert cache.get_seq_length() == 40
    simulated = SimulatedCache(model, registry.parse(POST))
    run(model, simulated, random_tokens(1, 40))
    with pytest.raises(RuntimeError, match="cannot be cut"):
        simulated.crop(-5)


def test_more_outliers_than_a_row_has_are_refused_at_construction():
    class Greedy(Strategy):
        name = "greedy"

        def formats(self, layer):
            return LayerFormat(key=Format(), value=Format(outliers=64), block=32)

    with pytest.raises(ValueError, match="64 outlier slots do not fit a row of 32"):
        PackedCache(tiny_model(), Greedy())


def test_a_strategy_class_instead_of_an_instance_is_named():
    with pytest.raises(TypeError, match="must be an instance"):
        PackedCache(tiny_model(), registry.get("uniform"))


def test_a_model_of_which_nothing_can_be_packed_is_told():
    with pytest.warns(UserWarning, match="no layer of MistralForCausalLM can be packed"):
        cache_of(build("mistral", sliding_window=16))


@pytest.mark.parametrize("spec", [POST, PRE])
def test_settings_that_a_configuration_keeps_per_layer_are_no_obstacle(spec):
    model = build("gemma4_text", num_hidden_layers=4, num_kv_shared_layers=2, sliding_window=16, layer_types=KINDS)
    assert cache_of(model, spec).packed_layers
    pieces = random_tokens(1, 60).split([50, 10], dim=1)
    expected = run(copy.deepcopy(model), DynamicCache(config=model.config), *pieces)
    torch.testing.assert_close(run(model, cache_of(model, spec), *pieces), expected, **CLOSE)


def test_cutting_into_packed_blocks_keeps_the_dtype_of_either_side():
    model = tiny_model()
    cache = cache_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        run(model, cache, random_tokens(1, 60))
        cache.crop(-20)
        run(model, cache, random_tokens(1, 3))
    assert cache.get_seq_length() == 43


def test_a_strategy_whose_settings_are_unknown_is_not_saved(tmp_path):
    inner = registry.parse("uniform")

    class Bare:
        name = "bare"
        require_model, cache_options = inner.require_model, inner.cache_options
        formats, tables, encode, decode = inner.formats, inner.tables, inner.encode, inner.decode

    with pytest.raises(TypeError, match="derive it from Strategy"):
        PackedCache(tiny_model(), Bare()).save(tmp_path / "cache.safetensors")


@pytest.mark.parametrize("length", [55, 64])
def test_padding_masks_of_another_length_are_read_as_transformers_reads_them(length):
    tokens, mask = random_tokens(1, 60), torch.ones(1, length, dtype=torch.long)
    mask[:, :10] = 0
    model, stock = tiny_model(), tiny_model()
    attach(model)
    with torch.no_grad():
        got, expected = (each(tokens, attention_mask=mask).logits[:, 10:] for each in (model, stock))
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", ["position_bias", "sinks", "indices", "block_indices"])
def test_arguments_that_attention_cannot_honour_are_refused(name):
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=name):
        attention_forward(tiny_model(), states, states, states, None, **{name: states})


@pytest.mark.parametrize(
    "spec", ["uniform:bits=8,rotation=hadamard", "kvquant:key_rope=post,calibration=prompt", "h2o"]
)
@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_autocast_leaves_packed_attention_alone(spec, reference):
    model = tiny_model()
    generator = torch.Generator().manual_seed(2)
    key, value = (torch.randn(1, 2, 1, 64, generator=generator) for _ in range(2))
    query = torch.randn(1, 4, 1, 64, generator=generator)

    def attend(autocast):
        cache = cache_of(model, spec)
        run(model, cache, random_tokens(1, 260))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            handles = cache.layers[0].update(key, value)
            return attention_forward(model.model.layers[0].self_attn, query, *handles, None)[0]

    with backend.reference_only() if reference else contextlib.nullcontext():
        assert torch.equal(attend(False), attend(True))


@pytest.mark.parametrize(
    "spec",
    [
        "uniform:bits=8,rotation=hadamard",
        "uniform:bits=8,key_scale=channel,key_rope=pre",
        "kvquant:calibration=prompt",
        "qaq",
    ],
)
def test_models_decode_under_autocast(spec):
    model = tiny_model()

    def logits():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(model, cache_of(model, spec), random_tokens(1, 260), random_tokens(1, 1), random_tokens(1, 1))

    with backend.reference_only():
        expected = logits()
    assert (logits() - expected).norm() <= 1e-2 * expected.norm()
