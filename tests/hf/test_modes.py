"""Every way to generate gives with the packed cache what it gives with the stock one.

The strategy is `none`, which stores states as they are: whatever differs is a fault of the cache, the attention
function, the masks or the rotary tables, and of nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from cachequant import registry
from cachequant.core import PackedCache, attach
from cachequant.core.hf.compat import CROP_IS_RELATIVE
from cachequant.core.hf.handles import LazyStates

PROMPT = 70
NEW_TOKENS = 20
LOGITS = 1e-5  # float32


@dataclass(frozen=True)
class Mode:
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `generate`."""
    pads: tuple[int, ...] = (0,)
    """Left padding of each prompt of the batch."""
    turns: int = 1
    assisted: bool = False


MODES = {
    "greedy": Mode(),
    "sampling": Mode({"do_sample": True, "top_k": 20, "num_return_sequences": 2}),
    "beam": Mode({"num_beams": 3}),
    "padded": Mode(pads=(17, 0, 41)),
    "padded-beam": Mode({"num_beams": 3}, pads=(17, 0, 41)),
    "chunked-prefill": Mode({"prefill_chunk_size": 17}),
    # the third row begins in the third chunk
    "padded-chunked-prefill": Mode({"prefill_chunk_size": 17}, pads=(17, 0, 41)),
    "three-turns": Mode(turns=3),
    "padded-three-turns": Mode(pads=(17, 0, 41), turns=3),
    "assisted": Mode({"num_assistant_tokens": 4}, assisted=True),
    "prompt-lookup": Mode({"prompt_lookup_num_tokens": 6}),
}

# blocks and tail are small enough that every mode packs during the prompt and again while decoding
BLOCK = 32
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "post": ("none:block=32", {"residual_length": 16}),
    "pre": ("none:block=32,key_rope=pre", {"residual_length": 16}),
    "post-sinks-skip": ("none:block=32", {"residual_length": 16, "sink_tokens": 3, "skip_layers": [-1]}),
    "pre-sinks-skip": ("none:block=32,key_rope=pre", {"residual_length": 16, "sink_tokens": 3, "skip_layers": [-1]}),
    "post-no-tail": ("none:block=32", {"residual_length": 0}),
    "pre-no-tail-sinks": ("none:block=32,key_rope=pre", {"residual_length": 0, "sink_tokens": 40}),
}

STATEFUL = "assisted generation is not supported with stateful models"

# what stock transformers refuses, and how it says so
REFUSED = {
    ("qwen3-next", "assisted"): STATEFUL,
    ("qwen3-next", "prompt-lookup"): STATEFUL,
}

# older ones cannot roll back a sliding window, nor hybrids
REFUSED_IS_COMPLETE = Version(transformers.__version__) >= Version("5.23")

NO_ROTATION_TO_POSTPONE = {
    "deepseek-v3": "latent attention caches a latent and an already rotated part, not keys",
    "gpt2": "learned positions",
    "opt": "learned positions",
}

DEQUANTIZES = {
    "deepseek-v3": "the model expands latents to keys and values itself, so it needs them dense",
}


class Outcome(NamedTuple):
    sequences: Tensor
    logits: Tensor
    cache: Any


NewCache = Callable[[PreTrainedModel], Any]


def stock_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def packed_cache(name: str) -> Callable[[PreTrainedModel], PackedCache]:
    spec, options = CACHES[name]
    return lambda model: PackedCache(model, registry.parse(spec), **options)


@pytest.fixture(scope="module")
def run(build, tokens, left_padded) -> Callable[[str, str, NewCache], Outcome]:
    """`run(architecture, mode, new_cache)`: what a fresh model generates (dynamic NTK models remember past lengths)."""

    def assistant(architecture: str) -> PreTrainedModel:
        # agrees with the model often, not always: candidates are accepted and rejected
        model = build(architecture)
        torch.manual_seed(5)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
        return model

    @torch.no_grad()
    def generate(architecture: str, mode: str, new_cache: NewCache) -> Outcome:
        how = MODES[mode]
        model = build(architecture)
        cache = new_cache(model)
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **how.settings}
        if how.assisted:
            settings["assistant_model"] = assistant(architecture)
        ids, mask = left_padded(tokens(len(how.pads), PROMPT), list(how.pads))
        logits = []
        for turn in range(how.turns):
            if turn:
                ids = torch.cat([ids, tokens(len(how.pads), 9, seed=10 + turn)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
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
        return Outcome(ids, torch.stack(logits), cache)

    return generate


@pytest.fixture(scope="module")
def stock(run) -> Callable[[str, str], Outcome]:
    """`stock(architecture, mode)`: what transformers' own cache gives."""
    return lru_cache(maxsize=None)(lambda architecture, mode: run(architecture, mode, stock_cache))


def assert_same(actual: Outcome, expected: Outcome) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=LOGITS)


@pytest.fixture
def check(run, stock) -> Callable[[str, str, str], None]:
    """`check(architecture, cache, mode)`: the claim of this file."""

    def equals_stock(architecture: str, cache: str, mode: str) -> None:
        if (architecture, mode) in REFUSED:
            pytest.skip(f"stock transformers: {REFUSED[architecture, mode]}")
        if cache.startswith("pre") and architecture in NO_ROTATION_TO_POSTPONE:
            pytest.skip(NO_ROTATION_TO_POSTPONE[architecture])
        try:
            expected = stock(architecture, mode)
        except ValueError as error:
            if REFUSED_IS_COMPLETE:
                raise
            pytest.skip(f"stock transformers {transformers.__version__}: {error}")
        before = LazyStates.dequantized
        outcome = run(architecture, mode, packed_cache(cache))
        assert_same(outcome, expected)
        assert LazyStates.dequantized == before or architecture in DEQUANTIZES
        assert all(layer.packed_tokens >= 2 * BLOCK for layer in outcome.cache.packed_layers)

    return equals_stock


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", ["post", "pre"])
def test_every_mode_of_every_architecture_equals_the_stock_cache(check, architecture, cache, mode):
    check(architecture, cache, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", ["post-sinks-skip", "pre-sinks-skip", "post-no-tail", "pre-no-tail-sinks"])
@pytest.mark.parametrize("architecture", ["llama", "dynamic-ntk", "gemma3", "gpt-neox", "gpt-oss"])
def test_sinks_skipped_layers_and_no_tail_change_nothing(check, architecture, cache, mode):
    check(architecture, cache, mode)


@pytest.mark.parametrize(("architecture", "mode"), REFUSED, ids="-".join)
def test_what_stock_transformers_refuses_we_refuse_alike(run, architecture, mode):
    for new_cache in (stock_cache, packed_cache("post")):
        with pytest.raises(ValueError, match=REFUSED[architecture, mode]):
            run(architecture, mode, new_cache)


def test_full_attention_layers_are_packed_and_others_left_to_the_host(build, architecture):
    model = build(architecture)
    config = model.config
    everywhere = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [everywhere] * config.num_hidden_layers
    # the last layers of gemma3n read what earlier ones wrote
    owners = len(kinds) - getattr(config, "num_kv_shared_layers", 0)
    expected = [index for index, kind in enumerate(kinds[:owners]) if kind == "full_attention"]
    assert [layer.index for layer in packed_cache("post")(model).packed_layers] == expected


@pytest.mark.parametrize("mode", ["assisted", "prompt-lookup"])
def test_candidates_are_accepted_and_rejected(run, mode):
    # else these modes would be greedy decoding, or would never crop
    crops, forwards = [], []

    class Watched(PackedCache):
        def crop(self, tokens_to_remove):
            crops.append(tokens_to_remove)
            super().crop(tokens_to_remove)

    def watched(model):
        model.register_forward_pre_hook(lambda *_: forwards.append(None))
        return Watched(model, registry.parse("none:block=32"), residual_length=16)

    run("qwen3", mode, watched)
    assert len(forwards) < NEW_TOKENS
    assert min(crops) < 0 or (crops and not CROP_IS_RELATIVE)


def attached(new_cache: NewCache) -> NewCache:
    def attach_first(model: PreTrainedModel) -> Any:
        attach(model)
        return new_cache(model)

    return attach_first


@pytest.mark.parametrize("mode", ["padded", "beam", "chunked-prefill"])
def test_attached_model_serves_the_stock_cache(run, stock, architecture, mode):
    assert_same(run(architecture, mode, attached(stock_cache)), stock(architecture, mode))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("mode", ["greedy", "padded", "chunked-prefill"])
def test_attached_model_serves_a_static_cache(run, stock, architecture, mode):
    def static(model):
        return StaticCache(config=model.config, max_cache_len=PROMPT + NEW_TOKENS)

    assert_same(run(architecture, mode, attached(static)), stock(architecture, mode))


@torch.no_grad()
def test_attached_model_without_cache_is_unchanged(build, tokens, left_padded, architecture):
    model = build(architecture)
    ids, mask = left_padded(tokens(3, 40), [11, 0, 24])
    expected = model(ids, attention_mask=mask).logits
    attach(model)
    actual = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("cache", ["post", "pre"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 0.02), (torch.bfloat16, 0.15)], ids=str
)
def test_other_dtypes_agree_to_their_precision(build, tokens, step, dtype, tolerance, cache):
    stock, subject = build("qwen3").to(dtype), build("qwen3").to(dtype)
    spec, options = CACHES[cache]
    packed = PackedCache(subject, registry.parse(spec), **options)
    plain = DynamicCache(config=stock.config)
    for chunk in tokens(2, 96).split([70, 1, 1, 20, 4], dim=1):
        expected, actual = step(stock, chunk, plain), step(subject, chunk, packed)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
