"""A model small enough for contract checks: random weights, no files, no network."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_model(dtype: torch.dtype = torch.float32, layers: int = 2) -> LlamaForCausalLM:
    """A few Llama layers, 4 query and 2 kv heads of 64 channels, 97 tokens; the same weights every time."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # wide enough that attention is peaked and greedy tokens are not ties
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    return model
