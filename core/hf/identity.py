"""What makes states or statistics of one model useless to another."""

import hashlib
import json
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attach import attention_modules
from .split import here, is_split, split_heads

_CONFIGURATION = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "rope_parameters")  # fmt: skip

# Casts and fine-tuning move the marks of weights by less; other weights, such as another seed's, by more.
SIZE_TOLERANCE, PROJECTION_TOLERANCE = 0.05, 0.3
_COLUMNS = 64

Marks = dict[str, list[float]]


def configuration(model: PreTrainedModel) -> dict[str, Any]:
    """Shape and RoPE, as JSON sees them, so that they compare equal after a round trip."""
    config = model.config.get_text_config(decoder=True)
    return json.loads(json.dumps({name: _attribute(config, name) for name in _CONFIGURATION}, default=str))


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """For cached states: the configuration, a hash of some weights, and which heads they are of, if not of all."""
    split = split_heads(model, attention_modules(model)).values()
    shares = {f"{each.rank} of {each.processes}" for each in split}
    return {
        **configuration(model),
        "weights": _fingerprint(model.get_input_embeddings()),
        **({"process": sorted(shares)} if shares else {}),
    }


def identify(model: PreTrainedModel) -> dict[str, Any]:
    """For statistics, which serve any dtype of a model: its configuration, and marks of its attention weights."""
    return {
        **configuration(model),
        "config_sha256": hashlib.sha256(_settings(model)).hexdigest()[:16],
        "attention_weights": {str(index): _marks(module) for index, module in attention_modules(model).items()},
    }


def digest(model: PreTrainedModel) -> str:
    """For figures: a hash of the configuration and of a sample of all attention weights, bit by bit.

    Marks would not do: their last digits depend on how many threads add them up.
    """
    found = hashlib.sha256(_settings(model))
    for index, module in attention_modules(model).items():
        for name, weight in _sampled(module).items():
            sample = _whole(weight.detach()).contiguous().flatten().view(torch.uint8)
            found.update(f"{index} {name}".encode())
            found.update(sample.cpu().numpy().tobytes())
    return found.hexdigest()


def differences(saved: dict[str, Any], model: PreTrainedModel) -> list[str]:
    """How `model` differs from the one that `identify` described, in what matters to statistics."""
    given = configuration(model)
    found = [f"{name} was {saved.get(name)!r}, is {given[name]!r}" for name in given if saved.get(name) != given[name]]
    if found:
        return found
    for index, module in attention_modules(model).items():
        before, now = saved.get("attention_weights", {}).get(str(index), {}), _marks(module)
        for name in before.keys() & now.keys():
            size, projection = (abs(x - y) for x, y in zip(before[name], now[name], strict=True))
            if size > SIZE_TOLERANCE or projection > PROJECTION_TOLERANCE:
                return [f"the weights {name} of attention layer {index} are others"]
    return []


def _settings(model: PreTrainedModel) -> bytes:
    """The configuration, but for what varies with how the model was loaded."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "_attn_implementation", "use_cache"):
        config.pop(name, None)
    return json.dumps(config, sort_keys=True, default=str).encode()


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


_known: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, list[weakref.ref[Tensor]], Marks]]" = (
    weakref.WeakKeyDictionary()
)


def _marks(attention: nn.Module) -> Marks:
    """Two numbers for each weight and bias of the module, from a sample with every output channel in it.

    The logarithm of its root mean square, and its projection on a fixed wave relative to the deviation that random
    weights have: about standard normal, so that two models rarely agree in all of them.
    """
    weights = _sampled(attention)
    # reading weights takes a while, and a cache is made for every generate
    held: list[Any] = [here(weight) for weight in weights.values()]
    state = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in held]
    known = _known.get(attention)
    # an address alone may be that of a parameter that is gone
    if known is None or known[0] != state or any(a() is not b for a, b in zip(known[1], weights.values(), strict=True)):
        # peft wraps layers; biases that are zero say nothing
        found = {name.replace(".base_layer", ""): _mark(_whole(weight.detach())) for name, weight in weights.items()}
        marks = {name: mark for name, mark in found.items() if mark}
        known = _known[attention] = (state, [weakref.ref(weight) for weight in weights.values()], marks)
    return known[2]


def _sampled(attention: nn.Module) -> dict[str, nn.Parameter]:
    """The weights and biases that tell models apart, by name. Adapters are left out."""
    return {
        name: weight
        for name, weight in attention.named_parameters()
        if weight.is_floating_point()
        and weight.numel()
        and weight.device.type != "meta"
        and "lora_" not in name
        # these would have to be sent whole
        and not is_split(weight, columns=True)
    }


def _whole(weight: Any) -> Tensor:
    """The sample of a weight, from all processes that hold parts of it; they all have to ask."""
    columns = weight.flatten(1)[:, :_COLUMNS] if weight.ndim > 1 else weight
    return columns.full_tensor() if is_split(columns) else columns


def _mark(sample: Tensor) -> list[float]:
    sample = sample.float().flatten()
    wave = torch.arange(sample.numel(), device=sample.device, dtype=torch.float32).remainder_(8191).mul_(0.7).sin_()
    norm = float(sample.norm())
    if not norm:
        return []
    return [math.log(norm / math.sqrt(sample.numel())), float(sample @ wave) * math.sqrt(2) / norm]
