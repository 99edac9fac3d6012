"""The bundled reference model, and its twin with key outliers like those of large models.

A model this small has key channels of like size, and any quantizer looks good on it. In LLaMA-class models a few key
channels are an order of magnitude larger than the rest (KIVI, https://arxiv.org/abs/2402.02750). The twin has them and
computes the same function, so that what a quantizer loses on it is lost to the outliers alone.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parent / "reference_model"

# A wrong guess about how a model rotates its keys moves its logits by far more than rounding does.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.2


def load(dtype: torch.dtype = torch.float32, twin: bool = False) -> tuple[Any, Any]:
    """Return the reference model, or its outlier twin, and the tokenizer.

    Raises:
        FileNotFoundError: the weights were not installed with the package.
    """
    if not (FOLDER / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no model.safetensors in {FOLDER}; install cachequant with its package data, "
            "or train the model with `python -m cachequant.benchmarks.training.train`"
        )
    # the twin is made in float32 and rounded once
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="sdpa").eval()
    model = outlier_twin(model) if twin else model
    return model.to(dtype), AutoTokenizer.from_pretrained(FOLDER)


def outlier_twin(model: Any, channels: int = 2, scale: float = 12.0, seed: int = 1) -> Any:
    """Return a copy of `model` that computes the same logits with larger keys in a few channels.

    In every key head, `channels` pairs of channels that rotate together (d and d + head_dim / 2) grow by `scale` times
    a random 0.5 to 1.5, and the same channels of the queries that meet them shrink alike: their products stay.

    Raises:
        ValueError: `model` has no separate q_proj and k_proj, normalizes queries or keys, does not rotate whole heads
            in halves, or has fewer than `channels` pairs per head; or `scale` is not positive.
    """
    twin = copy.deepcopy(model)
    attentions = _attentions(twin)
    head_dim = attentions[0].head_dim
    pairs = head_dim // 2
    if not 0 < channels <= pairs:
        raise ValueError(f"channels={channels} pairs in heads of {pairs}; use 1 to {pairs}")
    if scale <= 0:
        raise ValueError(f"scale={scale} is not positive; use 12 for outliers like LLaMA's, 1 for hardly any")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for attention in attentions:
            heads = attention.k_proj.weight.shape[0] // head_dim
            factors = torch.ones(heads, head_dim)
            for head in range(heads):
                pair = torch.randperm(pairs, generator=generator)[:channels]
                factor = scale * (0.5 + torch.rand(channels, generator=generator))
                factors[head, pair] = factors[head, pair + pairs] = factor
            groups = attention.q_proj.weight.shape[0] // (heads * head_dim)
            _scale_rows(attention.k_proj, factors)
            _scale_rows(attention.q_proj, factors.repeat_interleave(groups, 0).reciprocal())
    _check_same(model, twin)
    return twin


def _attentions(model: Any) -> list[Any]:
    name = type(model).__name__
    attentions = [module for module in model.modules() if hasattr(module, "k_proj")]
    if not attentions or not all(hasattr(module, "q_proj") and hasattr(module, "head_dim") for module in attentions):
        raise ValueError(
            f"{name} has no attention layers with separate q_proj and k_proj; "
            "use a Llama-type model (Llama, Mistral, Qwen2)"
        )
    if any(hasattr(module, norm) for module in attentions for norm in ("q_norm", "k_norm")):
        raise ValueError(
            f"{name} normalizes queries or keys, which undoes any scaling of their channels; "
            "use a model without q_norm and k_norm (Llama, Mistral, Qwen2)"
        )
    return attentions


def _scale_rows(linear: torch.nn.Linear, factors: torch.Tensor) -> None:
    """Multiply the outputs of `linear` by `factors` [heads, head_dim]."""
    factors = factors.flatten().to(linear.weight.device)
    linear.weight.mul_(factors[:, None])
    if linear.bias is not None:
        linear.bias.mul_(factors)


@torch.inference_mode()
def _check_same(model: Any, twin: Any) -> None:
    """Compare the two on a few tokens: rotary embeddings that pair other channels only show when run."""
    ids = torch.arange(32, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    exact, scaled = (each(ids, use_cache=False).logits.float() for each in (model, twin))
    error = ((exact - scaled).abs().max() / exact.std()).item()
    if not error <= TOLERANCE.get(model.dtype, HALF_TOLERANCE):
        raise ValueError(
            f"{type(model).__name__} does not keep its logits when channels d and d + head_dim / 2 are scaled together "
            f"(largest change {error:.2g} of their deviation): it rotates its keys in another way. "
            "Use a Llama-type model (Llama, Mistral, Qwen2)"
        )
