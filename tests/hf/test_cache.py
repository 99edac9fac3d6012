"""What can be done to a packed cache between two forwards, and what happens when it is done wrongly."""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from cachequant import registry
from cachequant.core import Format, LayerFormat, LayerSpec, PackedCache, Strategy, Tables, attach, detach
from cachequant.core.hf.attach import attention_modules
from cachequant.core.hf.attention import IMPLEMENTATION
from cachequant.core.hf.blocks import BlockLayer
from cachequant.core.hf.compat import CROP_IS_RELATIVE
from cachequant.core.hf.handles import LazyStates, StaleHandleError
from cachequant.strategies.uniform import Uniform

BLOCK, TAIL = 32, 16
PROMPT = 100  # 64 packed, 36 in the tail, which packs again at 48
CLOSE = {"rtol": 0, "atol": 1e-5}

STRATEGIES = {
    "token": "uniform:bits=4,block=32",
    "channel": "uniform:bits=4,block=32,key_scale=channel",
    "pre": "uniform:bits=4,block=32,key_scale=channel,key_rope=pre",
    "rotated": "uniform:bits=2,block=32,rotation=hadamard",
    "groups": "uniform:bits=3,value_bits=8,block=32,group_size=8,symmetric=true",
}


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return registry.parse(STRATEGIES[request.param])


@pytest.fixture
def model(build):
    return build("qwen3")


@pytest.fixture
def stock(build):
    """The same weights under transformers' own attention."""
    return build("qwen3")


@pytest.fixture
def fill(tokens, step):
    """`fill(model, strategy, rows=2, **options)`: a cache that holds a prompt of PROMPT tokens."""

    def filled(model: Any, strategy: Any, rows: int = 2, **options: Any) -> PackedCache:
        cache = PackedCache(model, strategy, **{"residual_length": TAIL, **options})
        step(model, tokens(rows, PROMPT), cache)
        return cache

    return filled


@pytest.fixture
def states(dense):
    """`states(cache)`: keys and values of every packed layer, dense."""
    return lambda cache: [(dense(layer, "key"), dense(layer, "value")) for layer in cache.packed_layers]


@pytest.fixture
def assert_states(states):
    """`assert_states(cache, expected, **tolerance)`: equal to the bit unless a tolerance is given."""

    def check(cache: PackedCache, expected: list[tuple[Tensor, Tensor]], **tolerance: float) -> None:
        for actual, wanted in zip(states(cache), expected, strict=True):
            torch.testing.assert_close(actual, wanted, **(tolerance or {"rtol": 0, "atol": 0}))

    return check


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [0, 3])
def test_attention_reads_exactly_what_the_packed_bytes_stand_for(
    model, stock, strategy, fill, tokens, step, dequantized, sinks
):
    cache = fill(model, strategy, sink_tokens=sinks)
    plain = dequantized(cache, stock)
    question = tokens(2, 5, seed=2)
    torch.testing.assert_close(step(model, question, cache), step(stock, question, plain), **CLOSE)


LEVELS = torch.linspace(-1, 1, 16) ** 3


class Chosen(Strategy):
    """Any two formats."""

    name = "chosen"

    key: Format
    value: Format

    def formats(self, layer):
        return LayerFormat(key=self.key, value=self.value, block=BLOCK)

    def tables(self, layer, side, first, valid):
        scale = torch.full((layer.kv_heads, layer.head_dim), 0.4)
        return Tables(codebook=LEVELS, scale=scale, zero=-4 * scale)

    # for codes="custom": one float16 scale per token and head, codes in bytes

    def encode(self, states, fmt, side, block, valid, tables):
        if fmt.codes != "custom":
            return super().encode(states, fmt, side, block, valid, tables)
        blocks = states.float().unflatten(2, (-1, block))
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
        return {"scale": scale, "bytes": (blocks / scale.float()).round().to(torch.int8)}

    def decode(self, packed, fmt, side, block, tables):
        return (packed["bytes"] * packed["scale"].float()).flatten(2, 3)


CHOSEN = {
    "codebook": Format(codes="codebook"),
    "codebook-channel-outliers": Format(codes="codebook", scale="channel", outliers=2),
    "codebook-static-outliers": Format(codes="codebook", scale="static", outliers=2),
    "static": Format(scale="static"),
    "3bit-outliers": Format(bits=3, outliers=1),
    "rotated-outliers": Format(bits=2, rotation="hadamard", outliers=2),
    "symmetric-channel": Format(bits=8, scale="channel", symmetric=True),
    "custom": Format(codes="custom"),
    "exact": Format(codes="exact"),
}


@pytest.mark.parametrize("rope", ["post", "pre"])
@pytest.mark.parametrize("key", CHOSEN)
@pytest.mark.parametrize("value", ["codebook-channel-outliers", "rotated-outliers", "custom", "exact"])
def test_any_pair_of_formats_is_read_as_it_decodes(model, stock, fill, tokens, step, dequantized, key, value, rope):
    strategy = Chosen(key=CHOSEN[key].model_copy(update={"rope": rope}), value=CHOSEN[value])
    cache = fill(model, strategy, sink_tokens=3)
    plain = dequantized(cache, stock)
    before = LazyStates.dequantized
    question = tokens(2, 5, seed=2)
    torch.testing.assert_close(step(model, question, cache), step(stock, question, plain), **CLOSE)
    assert LazyStates.dequantized == before


def test_packed_states_are_near_the_exact_ones_and_the_newest_are_the_exact_ones(
    model, stock, strategy, fill, tokens, step, dense
):
    plain = DynamicCache(config=stock.config)
    step(stock, tokens(2, PROMPT), plain)
    cache = fill(model, strategy)
    for layer, exact in zip(cache.packed_layers, plain.layers, strict=True):
        assert layer.packed_tokens == 2 * BLOCK
        for side, wanted in (("key", exact.keys), ("value", exact.values)):
            held = dense(layer, side)
            torch.testing.assert_close(held[:, :, 2 * BLOCK :], wanted[:, :, 2 * BLOCK :], **CLOSE)
            lost = (held - wanted)[:, :, : 2 * BLOCK]
            assert 0 < lost.norm() < 0.6 * wanted[:, :, : 2 * BLOCK].norm()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", ["token", "channel", "rotated", "groups"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "phi3"])
def test_other_attention_implementations_read_dequantized_states(
    build, fill, tokens, architecture, implementation, spec
):
    model = build(architecture)
    ours = fill(model, registry.parse(STRATEGIES[spec]), rows=1)
    theirs = copy.deepcopy(ours)
    # short: a block packed on the way could round a state to another code
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ids = torch.cat([tokens(1, PROMPT), tokens(1, 5, seed=2)], dim=1)
    before = LazyStates.dequantized
    expected = model.generate(ids, past_key_values=ours, **settings)
    assert LazyStates.dequantized == before
    model.set_attn_implementation(implementation)
    actual = model.generate(ids, past_key_values=theirs, **settings)
    assert LazyStates.dequantized > before
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), **CLOSE)


# ---- length ----------------------------------------------------------------------------------------------------------

CUTS = {
    "none": PROMPT,
    "in-tail": PROMPT - 9,
    "tail-start": 2 * BLOCK,
    "last-block-end": 2 * BLOCK - 1,
    "inside-block": BLOCK + 13,
    "block-boundary": BLOCK,
    "inside-first-block": 7,
    "sink": 2,
    "nothing-left": 0,
}


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("length", CUTS.values(), ids=CUTS)
def test_cutting_keeps_the_numbers_before_the_cut_and_goes_on(
    model, stock, strategy, fill, tokens, step, dequantized, length, sinks, states, assert_states
):
    cache = fill(model, strategy, sink_tokens=sinks)
    before = [(key[:, :, :length], value[:, :, :length]) for key, value in states(cache)]
    cache.truncate(length)
    assert cache.get_seq_length() == length
    assert_states(cache, before, rtol=0, atol=1e-6)
    plain = dequantized(cache, stock)
    # too few to fill a block, so that nothing is encoded anew
    question = tokens(2, 2, seed=2)
    torch.testing.assert_close(step(model, question, cache), step(stock, question, plain), **CLOSE)
    # enough to pack again
    more = step(model, tokens(2, 90, seed=3), cache)
    assert more.isfinite().all()
    assert cache.get_seq_length() == length + 92
    assert all(layer.packed_tokens >= 2 * BLOCK for layer in cache.packed_layers)


@pytest.mark.parametrize("rope", ["post", "pre"])
@pytest.mark.parametrize("length", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("architecture", ["llama", "dynamic-ntk", "gpt-neox"])
def test_an_unquantized_cache_goes_on_after_a_cut_as_the_stock_cache(
    build, fill, tokens, step, architecture, length, rope
):
    model, stock = build(architecture), build(architecture)
    cache = fill(model, registry.parse(f"none:block=32,key_rope={rope}"), sink_tokens=3)
    plain = DynamicCache(config=stock.config)
    step(stock, tokens(2, PROMPT), plain)
    if length < PROMPT:
        plain.crop(length - PROMPT)
        cache.crop(length - PROMPT)
    for chunk in tokens(2, 60, seed=3).split([1, 1, 40, 18], dim=1):
        torch.testing.assert_close(step(model, chunk, cache), step(stock, chunk, plain), **CLOSE)


@pytest.mark.skipif(not CROP_IS_RELATIVE, reason="this transformers crops to a length")
def test_cropping_nothing_changes_nothing(model, strategy, fill, states, assert_states):
    cache = fill(model, strategy)
    before, version = states(cache), cache.packed_layers[0].version
    cache.crop(0)
    assert_states(cache, before)
    assert cache.packed_layers[0].version == version


def test_cropping_the_tail_touches_no_packed_byte(model, strategy, fill):
    cache = fill(model, strategy)
    packed = [tensor for layer in cache.packed_layers for tensor in layer.stores["key"].read().values()]
    addresses = [tensor.data_ptr() for tensor in packed]
    cache.crop(-TAIL)
    after = [tensor.data_ptr() for layer in cache.packed_layers for tensor in layer.stores["key"].read().values()]
    assert after == addresses


@pytest.mark.skipif(not CROP_IS_RELATIVE, reason="this transformers crops to a length")
def test_cropping_to_a_positive_length_says_what_to_call(model, strategy, fill, states, assert_states):
    cache = fill(model, strategy)
    before = states(cache)
    with pytest.raises(ValueError, match=r"use cache.truncate\(length\)"):
        cache.crop(50)
    assert_states(cache, before)


def test_cut_that_a_sliding_layer_cannot_follow_is_refused_and_loses_nothing(build, fill, tokens, step):
    model = build("gemma3", layer_types=["full_attention", "sliding_attention", "full_attention"])
    cache, untouched = (fill(model, registry.parse(STRATEGIES["token"])) for _ in range(2))
    with pytest.raises(ValueError, match="sliding"):
        cache.truncate(50)
    assert torch.equal(step(model, tokens(2, 1), cache), step(model, tokens(2, 1), untouched))


def test_reset_cache_is_as_good_as_new(model, strategy, fill, tokens, step):
    used, fresh = (
        fill(model, strategy, sink_tokens=3),
        PackedCache(model, strategy, residual_length=TAIL, sink_tokens=3),
    )
    used.reset()
    assert used.get_seq_length() == 0
    assert used.memory().device_bytes == 0
    # another batch, too
    for chunk in tokens(3, 90, seed=4).split([80, 1, 9], dim=1):
        assert torch.equal(step(model, chunk, used), step(model, chunk, fresh))


# ---- batch -----------------------------------------------------------------------------------------------------------

CHANGES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
}


@pytest.mark.parametrize("pads", [[0, 0, 0], [40, 0, 5]], ids=["full", "padded"])
@pytest.mark.parametrize(("change", "rows"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("spec", [*STRATEGIES.values(), "none:block=32", "none:block=32,key_rope=pre"])
def test_rows_move_with_everything_that_belongs_to_them(
    model, stock, spec, tokens, left_padded, step, dequantized, change, rows, pads, states, assert_states
):
    ids, mask = left_padded(tokens(3, PROMPT), pads)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = PackedCache(model, registry.parse(spec), residual_length=TAIL, sink_tokens=3)
    step(model, ids, cache, attention_mask=mask, position_ids=positions)
    before = states(cache)
    change(cache)
    assert_states(cache, [(key[rows], value[rows]) for key, value in before])
    plain = dequantized(cache, stock)
    # unquantized, a long way, so that moved rows are packed
    for length in (1, 3, 40) if spec.startswith("none") else (1, 3):
        mask = torch.nn.functional.pad(mask, (0, length), value=1)
        positions = positions[:, -1:] + torch.arange(1, length + 1)
        inputs = {"attention_mask": mask[rows], "position_ids": positions[rows]}
        chunk = tokens(3, length, seed=length)[rows]
        expected, actual = step(stock, chunk, plain, **inputs), step(model, chunk, cache, **inputs)
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_copies_share_nothing(model, strategy, fill, tokens, step, states, assert_states):
    cache = fill(model, strategy, sink_tokens=3)
    twin = copy.deepcopy(cache)
    assert_states(twin, states(cache))
    assert twin.memory() == cache.memory()
    first, second = (step(model, tokens(2, 50, seed=5), each) for each in (twin, cache))
    assert torch.equal(first, second)
    before = states(twin)
    cache.truncate(10)
    step(model, tokens(2, 80, seed=6), cache)
    cache.reset()
    assert_states(twin, before)


def test_one_prompt_serves_several_continuations(model, strategy, fill, tokens):
    prompt = fill(model, strategy, rows=1)
    settings = {"max_new_tokens": 8, "do_sample": False}

    def answers(cache, seed):
        ids = torch.cat([tokens(1, PROMPT), tokens(1, 5, seed=seed)], 1)
        return model.generate(ids, past_key_values=cache, **settings)

    copies = [answers(copy.deepcopy(prompt), seed) for seed in (6, 7)]
    alone = [answers(fill(model, strategy, rows=1), seed) for seed in (6, 7)]
    assert all(map(torch.equal, copies, alone))


# ---- threads and several caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["token", "pre"])
def test_four_threads_with_four_caches_on_one_model_do_not_disturb_each_other(model, tokens, spec):
    strategy = registry.parse(STRATEGIES[spec])

    def answer(seed):
        cache = PackedCache(model, strategy, residual_length=TAIL, sink_tokens=seed)
        return model.generate(
            tokens(1 + seed % 2, 60 + seed, seed=seed), past_key_values=cache, max_new_tokens=16, do_sample=False
        )

    alone = [answer(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, range(4)))
    assert all(map(torch.equal, together, alone))


def test_caches_of_different_strategies_take_turns_on_one_model(model, tokens, step):
    strategies = [registry.parse(spec) for spec in STRATEGIES.values()]
    caches = [PackedCache(model, strategy, residual_length=TAIL) for strategy in strategies]
    alone = [PackedCache(model, strategy, residual_length=TAIL) for strategy in strategies]
    chunks = tokens(1, 90).split([80, 1, 9], dim=1)
    in_turn = [[step(model, chunk, cache) for cache in caches] for chunk in chunks]
    for index, cache in enumerate(alone):
        for turn, chunk in enumerate(chunks):
            assert torch.equal(step(model, chunk, cache), in_turn[turn][index])


# ---- attach, detach, on ----------------------------------------------------------------------------------------------


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_attaching_again_changes_nothing(model):
    attach(model)
    once = hooks(model)
    attach(model)
    PackedCache(model, Uniform())
    assert hooks(model) == once == len(attention_modules(model)) == 3
    detach(model)
    assert hooks(model) == 0


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss", "qwen3-next", "deepseek-v3"])
def test_detaching_gives_the_model_its_attention_back(build, tokens, step, architecture):
    model = build(architecture)
    implementation = model.config._attn_implementation
    before = step(model, tokens(1, 20), None)
    attach(model)
    assert model.config._attn_implementation == IMPLEMENTATION
    detach(model)
    detach(model)
    assert model.config._attn_implementation == implementation
    assert hooks(model) == 0
    assert torch.equal(step(model, tokens(1, 20), None), before)


def test_detached_model_reads_a_cache_after_rope_through_dequantized_states(
    model, stock, fill, tokens, step, dequantized
):
    cache = fill(model, registry.parse(STRATEGIES["channel"]))
    plain = dequantized(cache, stock)
    detach(model)
    question = tokens(2, 5, seed=2)
    torch.testing.assert_close(step(model, question, cache), step(stock, question, plain), **CLOSE)


@pytest.fixture
def seen(model):
    """The caches that the model's forwards were given."""
    caches: list[Any] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    return caches


def test_plain_generate_uses_a_packed_cache_inside_the_context_only(model, strategy, tokens, seen):
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(
        tokens(2, 70), past_key_values=PackedCache(model, strategy, residual_length=TAIL), **settings
    )
    detach(model)
    implementation = model.config._attn_implementation
    plain = model.generate(tokens(2, 70), **settings)
    seen.clear()
    with strategy.on(model, residual_length=TAIL):
        assert torch.equal(model.generate(tokens(2, 70), **settings), expected)
        first = seen[-1]
        model.generate(tokens(2, 70), **settings)
        assert isinstance(first, PackedCache)
        assert isinstance(seen[-1], PackedCache)
        assert seen[-1] is not first
    assert model.config._attn_implementation == implementation
    assert hooks(model) == 1  # the one of this test
    assert "_prepare_cache_for_generation" not in vars(model)
    assert torch.equal(model.generate(tokens(2, 70), **settings), plain)
    assert not isinstance(seen[-1], PackedCache)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"use_cache": False}, type(None)),
        ({"cache_implementation": "static"}, transformers.StaticCache),
        ({"past_key_values": "dynamic"}, DynamicCache),
    ],
    ids=["use_cache=False", "cache_implementation", "past_key_values"],
)
def test_context_respects_what_the_caller_asks_for(model, tokens, seen, settings, kind):
    if "past_key_values" in settings:
        settings = {"past_key_values": DynamicCache(config=model.config)}
    expected = model.generate(tokens(1, 30), max_new_tokens=4, do_sample=False, disable_compile=True)
    with Uniform().on(model):
        actual = model.generate(tokens(1, 30), max_new_tokens=4, do_sample=False, disable_compile=True, **settings)
    assert type(seen[-1]) is kind
    assert torch.equal(actual, expected)


def test_context_cleans_up_after_an_exception(model):
    implementation = model.config._attn_implementation
    with pytest.raises(KeyError), Uniform().on(model):
        raise KeyError
    assert model.config._attn_implementation == implementation
    assert hooks(model) == 0
    assert "_prepare_cache_for_generation" not in vars(model)


def test_contexts_nest(model, tokens, seen):
    with Uniform(bits=8).on(model):
        with Uniform(bits=2).on(model):
            model.generate(tokens(1, 30), max_new_tokens=2, do_sample=False)
            assert seen[-1].strategy == Uniform(bits=2)
        model.generate(tokens(1, 30), max_new_tokens=2, do_sample=False)
        assert seen[-1].strategy == Uniform(bits=8)
        assert model.config._attn_implementation == IMPLEMENTATION


def test_context_leaves_an_attached_model_attached(model, fill, tokens, step):
    cache = fill(model, registry.parse(STRATEGIES["pre"]))
    with Uniform().on(model):
        pass
    assert model.config._attn_implementation == IMPLEMENTATION
    step(model, tokens(2, 1), cache)


def test_misfit_is_reported_on_entering_the_context(model):
    with pytest.raises(ValueError, match="a group of 24"), Uniform(group_size=24).on(model):
        pass
    assert hooks(model) == 0


# ---- autograd and inference mode -------------------------------------------------------------------------------------


def test_gradients_flow_through_a_prompt_as_without_a_cache(model, stock, strategy, tokens):
    gradients = []
    for each, cache in ((stock, None), (model, PackedCache(model, strategy, residual_length=TAIL))):
        each(tokens(1, 60), past_key_values=cache, use_cache=cache is not None).logits.square().mean().backward()
        gradients.append(each.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("sinks", [0, 3])
def test_cache_filled_in_inference_mode_serves_outside_of_it(model, strategy, fill, tokens, sinks):
    with torch.inference_mode():
        cache = fill(model, strategy, sink_tokens=sinks)
    with torch.no_grad():
        model(tokens(2, 40, seed=2), past_key_values=cache)
    assert cache.get_seq_length() == PROMPT + 40


@pytest.mark.parametrize("change", [change for change, _ in CHANGES.values()], ids=CHANGES)
def test_rows_moved_in_inference_mode_serve_outside_of_it(model, strategy, fill, tokens, change, dense):
    cache = fill(model, strategy, rows=3)
    with torch.inference_mode():
        change(cache)
    rows = len(dense(cache.packed_layers[0], "key"))
    with torch.no_grad():
        model(tokens(rows, 40, seed=2), past_key_values=cache)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_group_that_does_not_divide_a_head_is_reported_at_construction(model):
    with pytest.raises(ValueError, match=r"24 channels does not divide head_dim=32; use one of \[8, 16, 32\]"):
        PackedCache(model, Uniform(group_size=24))
    assert hooks(model) == 0


@pytest.mark.parametrize("bits", [0, 1, 5, 16, 4.5, "four"])
def test_bits_that_are_not_offered_name_those_that_are(bits):
    with pytest.raises(ValidationError, match="Input should be 2, 3, 4 or 8"):
        Uniform(bits=bits)


def test_something_that_is_no_strategy_is_named(model):
    with pytest.raises(TypeError, match=r"strategy must be an instance of a CacheQuantizer, such as .*got 'uniform'"):
        PackedCache(model, "uniform")


@pytest.mark.parametrize("options", [{"residual_length": -1}, {"sink_tokens": -1}, {"sink_tokens": 129}], ids=str)
def test_options_out_of_range_are_refused(model, options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        PackedCache(model, Uniform(), **options)


@pytest.mark.parametrize("layer", [3, -4])
def test_skipped_layers_must_exist(model, layer):
    with pytest.raises(ValueError, match=f"skip_layers names layer {layer}, the model has layers 0 to 2"):
        PackedCache(model, Uniform(), skip_layers=[0, layer])


@pytest.mark.parametrize(
    ("skipped", "packed"), [([0], [1, 2]), ([-1], [0, 1]), ([0, 1, 2], []), ([1, -2], [0, 2])], ids=str
)
def test_skipped_layers_stay_exact(model, skipped, packed):
    assert [layer.index for layer in PackedCache(model, Uniform(), skip_layers=skipped).packed_layers] == packed


def test_encoder_decoder_models_are_refused():
    config = AutoConfig.for_model("t5", d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=50)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        PackedCache(AutoModelForSeq2SeqLM.from_config(config), Uniform())


def test_architecture_whose_attention_cannot_be_replaced_is_refused_and_left_alone():
    config = AutoConfig.for_model(
        "falcon", vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    model = AutoModelForCausalLM.from_config(config)
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match="FalconForCausalLM did not accept the attention implementation"):
        PackedCache(model, Uniform())
    assert model.config._attn_implementation == implementation
    assert hooks(model) == 0


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_keys_before_rope_need_a_model_with_rope(build, architecture):
    with pytest.raises(
        ValueError, match=r"takes no\s+position_embeddings \(cos, sin\); use a strategy that stores keys after"
    ):
        PackedCache(build(architecture), Uniform(key_rope="pre"))


@pytest.mark.parametrize("interleave", [True, False])
def test_latent_attention_refuses_keys_before_rope_in_its_first_forward(build, tokens, step, interleave):
    model = build("deepseek-v3", rope_interleave=interleave)
    cache = PackedCache(model, Uniform(key_rope="pre", block=32))
    with pytest.raises(
        ValueError, match=r"keys before RoPE are not supported .* use a strategy that stores keys after RoPE"
    ):
        step(model, tokens(1, 20), cache)
    assert cache.get_seq_length() == 0
    step(model, tokens(1, 20), PackedCache(model, Uniform()))


class ShuffledKeys(LlamaAttention):
    """Rotates keys by a function of its own, which no probe can know."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        cos, sin = position_embeddings
        return super().forward(hidden_states, (cos.flip(-1), sin.flip(-1)), attention_mask, past_key_values, **kwargs)


def test_rotary_embedding_that_cannot_be_reproduced_is_refused(build, tokens, step):
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = ShuffledKeys
    cache = PackedCache(model, Uniform(key_rope="pre"))
    with pytest.raises(ValueError, match="ShuffledKeys: its rotary embedding could not be reproduced bitwise"):
        step(model, tokens(1, 20), cache)
    assert cache.get_seq_length() == 0
    step(model, tokens(1, 20), PackedCache(model, Uniform()))


@pytest.fixture
def undisturbed(model, fill, tokens, step):
    """`undisturbed(strategy, mistake, **options)`: `mistake(cache)` raises, and the cache goes on as if it had not."""

    def check(strategy: Any, mistake: Any, **options: Any) -> None:
        cache, untouched = (fill(model, strategy, **options) for _ in range(2))
        mistake(cache)
        assert cache.get_seq_length() == PROMPT
        for chunk in tokens(2, 50, seed=8).split([1, 40, 9], dim=1):
            assert torch.equal(step(model, chunk, cache), step(model, chunk, untouched))

    return check


@pytest.mark.parametrize(
    ("spec", "rows", "pads"),
    [
        pytest.param(
            spec,
            rows,
            pads,
            id=f"{name}-{rows}-{'padded' if pads else 'full'}",
        )
        for (name, spec), rows, pads in product(STRATEGIES.items(), (1, 3), (0, 1))
    ],
)
def test_forward_of_another_batch_is_refused_and_loses_nothing(model, spec, undisturbed, tokens, step, rows, pads):
    def mistake(cache):
        mask = torch.ones(rows, PROMPT + 1, dtype=torch.long)
        positions = PROMPT - pads * torch.arange(rows)[:, None]
        with pytest.raises(ValueError, match=f"the cache holds a batch of 2, this forward has {rows}"):
            step(model, tokens(rows, 1), cache, attention_mask=mask, position_ids=positions)

    undisturbed(registry.parse(spec), mistake)


@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, id=name) for name, spec in STRATEGIES.items()],
)
def test_forward_of_another_batch_after_a_padded_prompt_is_refused(model, spec, tokens, left_padded, step):
    ids, mask = left_padded(tokens(2, PROMPT), [9, 0])
    cache = PackedCache(model, registry.parse(spec), residual_length=TAIL)
    step(model, ids, cache, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"the cache holds a batch of 2, this forward has {rows}"):
            step(model, tokens(rows, 1), cache, position_ids=PROMPT - torch.arange(rows)[:, None])


def test_states_of_another_dtype_are_refused_and_lose_nothing(model, build, strategy, undisturbed, tokens, step):
    other = build("qwen3").to(torch.bfloat16)
    attach(other)

    def mistake(cache):
        with pytest.raises(ValueError, match=r"keys are torch\.bfloat16 on cpu, the cache holds torch\.float32"):
            step(other, tokens(2, 1), cache)

    undisturbed(strategy, mistake)


def test_states_of_another_model_are_refused_and_lose_nothing(model, build, strategy, undisturbed, tokens, step):
    other = build("qwen3", num_key_value_heads=1)
    attach(other)

    def mistake(cache):
        with pytest.raises(ValueError, match="a cache serves one model"):
            step(other, tokens(2, 1), cache)

    undisturbed(strategy, mistake)


NEW = torch.zeros(2, 2, 1, 32)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.packed_layers[0].update(NEW, NEW),
        lambda cache: cache.truncate(50),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reset(),
    ],
    ids=["update", "truncate", "reorder", "reset"],
)
def test_stale_handles_raise(model, fill, change, side):
    cache = fill(model, registry.parse(STRATEGIES["token"]))
    handles = dict(zip(("key", "value"), cache.packed_layers[0].update(NEW, NEW), strict=True))
    assert (handles[side] + 1).shape == (2, 2, PROMPT + 1, 32)
    change(cache)
    with pytest.raises(StaleHandleError, match=f"this handle to the {side}s of layer 0 is stale"):
        handles[side] + 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keys_before_rope_raise_under_another_attention_and_are_not_lost(
    model, undisturbed, tokens, step, implementation
):
    def mistake(cache):
        model.set_attn_implementation(implementation)
        with pytest.raises(RuntimeError, match=f"the model now uses '{implementation}'. Switch it back"):
            step(model, tokens(2, 1), cache)
        model.set_attn_implementation(IMPLEMENTATION)

    undisturbed(registry.parse(STRATEGIES["pre"]), mistake)


def test_keys_before_rope_raise_on_a_detached_model_and_are_not_lost(model, undisturbed, tokens, step):
    def mistake(cache):
        detach(model)
        with pytest.raises(RuntimeError, match="the model is not attached"):
            step(model, tokens(2, 1), cache)
        attach(model)

    undisturbed(registry.parse(STRATEGIES["pre"]), mistake)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("length", [0, PROMPT], ids=["first-forward", "decoding"])
@pytest.mark.parametrize("spec", [*STRATEGIES.values(), "none:block=32", "none:block=32,key_rope=pre"])
def test_interrupted_forward_is_noticed_and_mended(
    model, stock, tokens, step, dequantized, monkeypatch, spec, length, sinks, states
):
    strategy = registry.parse(spec)
    cache = PackedCache(model, strategy, residual_length=TAIL, sink_tokens=sinks)
    if length:
        step(model, tokens(2, length), cache)
    intact = [tuple(t.clone() for t in pair) for pair in states(cache)[1:]] if length else []
    # what is exact is packed without the strategy
    encode, calls = BlockLayer._encode, []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == 4:  # the values of layer 1
            raise MemoryError
        return encode(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BlockLayer, "_encode", failing)
        with pytest.raises(MemoryError):
            step(model, tokens(2, 60, seed=2), cache)
    with pytest.raises(RuntimeError, match=rf"an earlier forward was interrupted: .*cache\.truncate\({length}\)"):
        step(model, tokens(2, 1), cache)
    cache.truncate(length)
    assert cache.get_seq_length() == length
    if length:
        # the layers that were not reached have lost nothing
        for actual, expected in zip(states(cache)[1:], intact, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    plain = dequantized(cache, stock) if length else DynamicCache(config=stock.config)
    chunks = [1, 2, 60] if spec.startswith("none") else [1, 2]
    for chunk in tokens(2, sum(chunks), seed=9).split(chunks, dim=1):
        torch.testing.assert_close(step(model, chunk, cache), step(stock, chunk, plain), **CLOSE)


def test_encoder_that_changes_its_names_loses_nothing(model, undisturbed, tokens, step, monkeypatch):
    def mistake(cache):
        encode = Uniform.encode

        def renamed(self, given, fmt, side, *args):
            packed = encode(self, given, fmt, side, *args)
            return {f"new {name}": tensor for name, tensor in packed.items()} if side == "value" else packed

        with monkeypatch.context() as patch:
            patch.setattr(Uniform, "encode", renamed)
            with pytest.raises(ValueError, match="return the same names each time"):
                step(model, tokens(2, 20), cache)

    undisturbed(registry.parse(STRATEGIES["token"]), mistake)


def test_offloading_between_update_and_attention_is_refused(model, fill):
    cache = fill(model, Uniform())
    with pytest.raises(NotImplementedError, match="use fewer bits or device_map"):
        cache.packed_layers[0].offload()


def test_strategy_hears_of_the_shapes_that_really_arrive(model, fill):
    heard = []

    class Curious(Uniform):
        name = "curious"

        def formats(self, layer: LayerSpec):
            heard.append(layer)
            return super().formats(layer)

    fill(model, Curious(), skip_layers=[0])
    assert heard == [LayerSpec(index, 3, 2, 32, 32) for index in (1, 2, 1, 2)]
