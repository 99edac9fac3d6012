"""What makes states or statistics of one model useless to another."""

import hashlib
import json
import math
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attach import attention_modules

_CONFIGURATION = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "rope_parameters")  # fmt: skip

# Casts and light fine-tuning move the size of a layer's weights less than this; other weights move it more.
TOLERANCE = 0.01
_COLUMNS = 64


def configuration(model: PreTrainedModel) -> dict[str, Any]:
    """Shape and RoPE, as JSON sees them, so that they compare equal after a round trip."""
    config = model.config.get_text_config(decoder=True)
    return json.loads(json.dumps({name: _attribute(config, name) for name in _CONFIGURATION}, default=str))


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """For cached states: the configuration, and a hash of some weights."""
    return {**configuration(model), "weights": _fingerprint(model.get_input_embeddings())}


def identify(model: PreTrainedModel) -> dict[str, Any]:
    """For statistics, which serve any dtype of a model: its configuration, and the size of its attention weights."""
    config = model.config.to_dict()
    # not what varies with how the model was loaded
    for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "_attn_implementation", "use_cache"):
        config.pop(name, None)
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        **configuration(model),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "attention_weights": {str(index): _size(module) for index, module in attention_modules(model).items()},
    }


def differences(saved: dict[str, Any], model: PreTrainedModel) -> list[str]:
    """How `model` differs from the one that `identify` described, in what matters to statistics."""
    given = configuration(model)
    found = [f"{name} was {saved.get(name)!r}, is {given[name]!r}" for name in given if saved.get(name) != given[name]]
    if found:
        return found
    sizes = {str(index): _size(module) for index, module in attention_modules(model).items()}
    for index, size in sizes.items():
        before = saved.get("attention_weights", {}).get(index)
        if size is not None and before is not None and not math.isclose(size, before, rel_tol=TOLERANCE):
            return [f"the attention weights of layer {index} have size {before:.5g} there, {size:.5g} here"]
    return []


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


def _size(attention: nn.Module) -> float | None:
    """Root mean square of a sample of the module's matrices, every output channel in it; None if none can be read."""
    squares = count = 0.0
    for weight in attention.parameters():
        if weight.ndim == 2 and weight.is_floating_point() and weight.device.type != "meta":
            sample = weight.detach()[:, :_COLUMNS].float()
            squares += float(sample.square().sum())
            count += sample.numel()
    return math.sqrt(squares / count) if count else None
