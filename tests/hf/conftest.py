"""Small random models of many architectures, built from their configs: no network, milliseconds per forward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from cachequant.core import CacheQuantizer, PackedCache, Side
from cachequant.core.hf.layer import PackedLayer

VOCABULARY = 199
PAD = 0

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    # tied random weights repeat one token for ever
    "tie_word_embeddings": False,
}

SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Architecture:
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Beside SMALL, or instead of it."""
    attention: str = "sdpa"
    """What stock transformers runs it with; eager where SDPA would ignore the softcap or the learned sinks."""


def rope(kind: str = "default", **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


ARCHITECTURES = {
    "llama": Architecture("llama"),
    "llama3-rope": Architecture(
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "yarn": Architecture("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "dynamic-ntk": Architecture("llama", {"max_position_embeddings": 32, **rope("dynamic", factor=4.0)}),
    "mistral": Architecture("mistral", {"sliding_window": None}),
    "mistral-sliding": Architecture("mistral", {"sliding_window": 24}),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", {"head_dim": 32}),
    "gemma2": Architecture("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, **SLIDING}, attention="eager"),
    "gemma3": Architecture("gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 32, **SLIDING}),
    "gemma3n": Architecture(
        "gemma3n_text",
        {
            "num_hidden_layers": 4,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "head_dim": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
    ),
    "phi3": Architecture("phi3", {"sliding_window": None, **rope(partial_rotary_factor=0.5)}),
    "gpt-neox": Architecture("gpt_neox", {"num_key_value_heads": 4, **rope(partial_rotary_factor=0.25)}),
    "stablelm": Architecture("stablelm", rope(partial_rotary_factor=0.25)),
    "gpt-oss": Architecture(
        "gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING}, attention="eager"
    ),
    "qwen3-next": Architecture(
        "qwen3_next",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            **EXPERTS,
        },
    ),
    "lfm2": Architecture("lfm2", {"layer_types": ["conv", "full_attention", "full_attention"]}),
    "deepseek-v3": Architecture(
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            **EXPERTS,
        },
    ),
    "gpt2": Architecture("gpt2"),
    "opt": Architecture("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}


def build_model(architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    entry = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(entry.model_type, **{**SMALL, **entry.settings, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=entry.attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # sharper than the default: attention that differs between tokens, logits far from ties
                parameter.normal_(std=0.12)
    return model


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Every architecture by name, unless the test parametrizes it itself."""
    return request.param


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedModel]:
    """`build(architecture, seed=0, **config)`: equal arguments give equal weights."""
    return build_model


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """`tokens(rows, length, seed=1)`: random token ids that are neither padding nor the beginning of a text."""

    def sample(rows: int, length: int, seed: int = 1) -> Tensor:
        return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))

    return sample


@pytest.fixture(scope="session")
def left_padded() -> Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]:
    """`left_padded(ids, pads)`: ids whose first `pads[row]` tokens are padding, and the attention mask saying so."""

    def pad(ids: Tensor, pads: list[int]) -> tuple[Tensor, Tensor]:
        real = torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]
        return ids.masked_fill(~real, PAD), real.long()

    return pad


@pytest.fixture(scope="session")
def step() -> Callable[..., Tensor]:
    """`step(model, ids, cache, **inputs)`: one forward, its logits `[rows, tokens, vocabulary]`."""

    @torch.no_grad()
    def forward(model: PreTrainedModel, ids: Tensor, cache: Any, **inputs: Any) -> Tensor:
        return model(ids, past_key_values=cache, **inputs).logits

    return forward


@pytest.fixture(scope="session")
def dense() -> Callable[[PackedLayer, Side], Tensor]:
    """`dense(layer, side)`: what all tokens of a layer stand for, `[batch, kv_heads, tokens, dim]`, keys after RoPE."""

    def unpack(layer: PackedLayer, side: Side) -> Tensor:
        packed = layer.packed_tokens
        tail = layer.tails[side].read()
        parts = [layer.rotated(tail, packed) if side == "key" else tail]
        if packed:
            parts.insert(0, layer.dequantize(side, packed))
        return torch.cat(parts, dim=2)

    return unpack


@pytest.fixture(scope="session")
def dequantized(dense) -> Callable[[PackedCache, PreTrainedModel], DynamicCache]:
    """`dequantized(cache, model)`: the stock cache that holds the numbers a packed cache stands for."""

    def unpack(cache: PackedCache, model: PreTrainedModel) -> DynamicCache:
        stock = DynamicCache(config=model.config)
        for layer in cache.packed_layers:
            stock.update(dense(layer, "key"), dense(layer, "value"), layer.index)
        return stock

    return unpack


@pytest.fixture(scope="session")
def blank_layer() -> Callable[..., PackedLayer]:
    """`blank_layer(strategy, **options)`: an empty layer, to be given states of any shape without a model."""
    model = build_model("qwen3")

    def layer(strategy: CacheQuantizer, **options: Any) -> PackedLayer:
        return PackedCache(model, strategy, **options).packed_layers[0]

    return layer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers() -> Iterator[None]:
    """No advice about random models."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)
