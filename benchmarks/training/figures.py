"""Measures the reference model and its twin: perplexity, pass keys, and how much a rounded KV cache costs them."""

import functools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache
from transformers.cache_utils import DynamicLayer

from ..corpus import stdlib_text
from ..passkey import filler_ids, passkey_accuracy
from ..reference import outlier_twin

LOSS_TOKENS = 24576  # measured at every length
LOSS_LENGTHS = (512, 1024, 2048)
KEY_SAMPLES = {512: 50, 1024: 50, 2048: 100}  # by length
KEY_SEED = 7

# of a rounded cache
BITS = (8, 4, 3, 2)
GROUP = 64
ROUNDED_WINDOWS, ROUNDED_LENGTH = 24, 512
ROUNDED_KEY_SAMPLES, ROUNDED_KEY_LENGTH = 20, 2048


def measure(folder: Path) -> dict[str, Any]:
    """Return what a model card says about the model in `folder`, rounded to four significant digits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout = filler_ids(tokenizer)
    corpus = stdlib_text("heldout")
    figures: dict[str, Any] = {
        "python": corpus.python,
        "heldout_sha256": corpus.sha256,
        "heldout_characters": len(corpus.text),
        "heldout_files": corpus.n_files,
        "heldout_tokens": len(heldout),
    }
    figures["perplexity"] = {
        str(length): math.exp(mean_loss(model, windows(tokenizer, heldout, length, LOSS_TOKENS // length)))
        for length in LOSS_LENGTHS
    }
    figures["passkey"] = {}
    for length, samples in KEY_SAMPLES.items():
        result = passkey_accuracy(model, tokenizer, length, samples=samples, seed=KEY_SEED, filler=heldout)
        figures["passkey"][str(length)] = {"all": result.accuracy, **{str(k): v for k, v in result.by_depth.items()}}
    for name, each in {"plain": model, "twin": outlier_twin(model)}.items():
        rows = windows(tokenizer, heldout, ROUNDED_LENGTH, ROUNDED_WINDOWS)
        figures[f"sensitivity_{name}"] = sensitivity(each, rows)
        figures[f"passkey_{name}"] = {}
        for bits in BITS:
            caches = functools.partial(rounded_cache, each, bits)
            chosen = {"samples": ROUNDED_KEY_SAMPLES, "seed": KEY_SEED, "filler": heldout}
            result = passkey_accuracy(each, tokenizer, ROUNDED_KEY_LENGTH, caches, **chosen)
            figures[f"passkey_{name}"][f"{bits} bit"] = result.accuracy
    return significant(figures)


def significant(figures: Any) -> Any:
    """Round every float in nested dictionaries to four significant digits."""
    if isinstance(figures, dict):
        return {key: significant(value) for key, value in figures.items()}
    return float(f"{figures:.4g}") if isinstance(figures, float) else figures


# --- on held-out text


def windows(tokenizer: Any, ids: list[int], length: int, count: int) -> torch.Tensor:
    """Cut `count` evenly spaced windows [count, length] from `ids`, each beginning with BOS."""
    stride = (len(ids) - length) // count
    return torch.tensor([[tokenizer.bos_token_id, *ids[i * stride : i * stride + length - 1]] for i in range(count)])


@torch.inference_mode()
def mean_loss(model: Any, rows: torch.Tensor) -> float:
    """Mean loss in nats per token over windows `rows` [windows, length]."""
    losses = []
    for row in rows:
        logits = model(row[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits.float(), row[1:]))
    return torch.stack(losses).mean().item()


# --- through a rounded cache


class RoundedLayer(DynamicLayer):
    """Keeps keys (after RoPE) and values as `bits` wide asymmetric quantization would return them, in full precision.

    A simulation that depends on no strategy of this project: it says what the model is sensitive to, not what any
    strategy loses.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(rounded(key_states, self.bits), rounded(value_states, self.bits), *args, **kwargs)


def rounded(states: torch.Tensor, bits: int, group: int = GROUP) -> torch.Tensor:
    """Round `states` [batch, heads, seq, head_dim] to 2**bits levels between the extremes of each group of channels."""
    grouped = states.unflatten(-1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    return (((grouped - low) / step).round() * step + low).flatten(-2)


def rounded_cache(model: Any, bits: int) -> Cache:
    """Return an empty cache for `model` that rounds what it stores."""
    return Cache(layers=[RoundedLayer(bits) for _ in range(model.config.num_hidden_layers)])


@torch.inference_mode()
def sensitivity(model: Any, rows: torch.Tensor) -> dict[str, dict[str, float]]:
    """Perplexity, mean KL divergence from the exact cache in nats, and top-1 agreement with it, by bits.

    Args:
        rows: token ids [windows, length], each window beginning with BOS.
    """
    exact = [F.log_softmax(model(row[None], use_cache=False).logits[0, :-1], -1) for row in rows]
    figures = {"exact": {"perplexity": perplexity(exact, rows)}}
    for bits in BITS:
        logits = [model(row[None], past_key_values=rounded_cache(model, bits)).logits[0, :-1] for row in rows]
        lossy = [F.log_softmax(each, -1) for each in logits]
        pairs = list(zip(exact, lossy, strict=True))
        figures[f"{bits} bit"] = {
            "perplexity": perplexity(lossy, rows),
            "kl": sum((p.exp() * (p - q)).sum(-1).mean().item() for p, q in pairs) / len(pairs),
            "top1": sum((p.argmax(-1) == q.argmax(-1)).float().mean().item() for p, q in pairs) / len(pairs),
        }
    return figures


def perplexity(log_probs: list[torch.Tensor], rows: torch.Tensor) -> float:
    """Perplexity of windows `rows` [windows, length] from each one's log-probabilities [length - 1, vocabulary]."""
    losses = [F.nll_loss(each, row[1:]) for each, row in zip(log_probs, rows, strict=True)]
    return torch.stack(losses).mean().exp().item()
