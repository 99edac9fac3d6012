"""What makes states or statistics of one model useless to another."""

import hashlib
import json
import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .attach import attention_modules

_CONFIGURATION = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "rope_parameters")  # fmt: skip

# Casts and light fine-tuning move the marks of weights by less; other weights, such as another seed's, by more.
TOLERANCE = 0.05
_COLUMNS = 64


def configuration(model: PreTrainedModel) -> dict[str, Any]:
    """Shape and RoPE, as JSON sees them, so that they compare equal after a round trip."""
    config = model.config.get_text_config(decoder=True)
    return json.loads(json.dumps({name: _attribute(config, name) for name in _CONFIGURATION}, default=str))


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """For cached states: the configuration, and a hash of some weights."""
    return {**configuration(model), "weights": _fingerprint(model.get_input_embeddings())}


def identify(model: PreTrainedModel) -> dict[str, Any]:
    """For statistics, which serve any dtype of a model: its configuration, and marks of its attention weights."""
    config = model.config.to_dict()
    # not what varies with how the model was loaded
    for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "_attn_implementation", "use_cache"):
        config.pop(name, None)
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        **configuration(model),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "attention_weights": {str(index): _marks(module) for index, module in attention_modules(model).items()},
    }


def differences(saved: dict[str, Any], model: PreTrainedModel) -> list[str]:
    """How `model` differs from the one that `identify` described, in what matters to statistics."""
    given = configuration(model)
    found = [f"{name} was {saved.get(name)!r}, is {given[name]!r}" for name in given if saved.get(name) != given[name]]
    if found:
        return found
    for index, module in attention_modules(model).items():
        before, now = saved.get("attention_weights", {}).get(str(index)), _marks(module)
        if before and now and not all(_close(*pair) for pair in zip(before, now, strict=False)):
            return [f"the attention weights of layer {index} are others"]
    return []


def _close(before: float, now: float) -> bool:
    return abs(before - now) <= TOLERANCE


def _attribute(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:
        # configurations with settings per layer refuse to name one for all, with an error of their own
        return None


def _fingerprint(embeddings: nn.Module) -> str | None:
    weight = getattr(embeddings, "weight", None)
    if type(weight) is not nn.Parameter or weight.device.type == "meta":
        return None  # sharded or offloaded
    return hashlib.sha256(weight[:64].detach().float().cpu().numpy().tobytes()).hexdigest()[:16]


def _marks(attention: nn.Module) -> list[float]:
    """Two numbers for each matrix of the module, from a sample with every output channel in it.

    The logarithm of its root mean square, and its projection on a fixed wave relative to the deviation that random
    weights have: about standard normal, so that two models rarely agree in all of them.
    """
    marks = []
    for weight in attention.parameters():
        if weight.ndim == 2 and weight.is_floating_point() and weight.device.type != "meta":
            sample = weight.detach()[:, :_COLUMNS].float().flatten()
            wave = torch.sin((torch.arange(sample.numel(), device=sample.device) % 8191) * 0.7) * math.sqrt(2)
            norm = max(float(sample.norm()), 1e-30)
            marks += [math.log(norm / math.sqrt(sample.numel())), float(sample @ wave) / norm]
    return marks
