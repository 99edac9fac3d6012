"""Switching a model to our attention, and back."""

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .attention import IMPLEMENTATION
from .layer import PackedLayer
from .rope import find_rotary_function

PROBE_TOKENS = 4


# these read or cut the mask themselves before attention is called, and expect it in full
_OWN_MASKS = frozenset({"doge", "git", "hy_v4"})


class _Attachment(NamedTuple):
    """Kept on each attention module, so that copies of a model are attached, and detached, like the original."""

    previous: str
    hook: RemovableHandle


def attach(model: PreTrainedModel) -> None:
    """Make our attention function the model's; doing it again changes nothing.

    Without a packed cache the function does what SDPA does, so the model still works with any other cache.

    Raises ValueError when the model does not let its attention be replaced.
    """
    config = model.config.get_text_config(decoder=True)
    modules = attention_modules(model).values()
    if config.model_type in _OWN_MASKS:
        raise ValueError(f"{type(model).__name__} builds its own attention mask; its attention cannot be replaced")
    previous = config._attn_implementation
    if previous != IMPLEMENTATION:
        _set_implementation(model, IMPLEMENTATION)
    own = "sdpa" if previous in (None, IMPLEMENTATION) else previous
    for module in modules:
        if _attachment(module) is None:
            hook = module.register_forward_pre_hook(_before_attention, with_kwargs=True)
            module._cachequant = _Attachment(own, hook)


def is_attached(model: PreTrainedModel) -> bool:
    """Whether our attention function is the model's."""
    return any(_attachment(module) is not None for module in attention_modules(model).values())


def detach(model: PreTrainedModel) -> None:
    """Give the model its own attention back; packed caches made for it then read through dequantized tensors."""
    previous = None
    for module in attention_modules(model).values():
        attachment = _attachment(module)
        if attachment is not None:
            attachment.hook.remove()
            previous = attachment.previous
            del module._cachequant
    if previous is not None:
        _set_implementation(model, previous)


def _attachment(module: nn.Module) -> _Attachment | None:
    return module.__dict__.get("_cachequant")


def attention_modules(model: nn.Module) -> dict[int, Any]:
    """The modules that write to the cache, by layer: they know their layer and take the cache as an argument."""
    found: dict[int, Any] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            continue
        parameters = _parameters(type(module))
        takes_cache = "past_key_values" in parameters or "layer_past" in parameters
        inner = any(isinstance(getattr(child, "layer_idx", None), int) for child in module.children())
        if takes_cache and "hidden_states" in parameters and not inner:
            found[index] = module
    return found


@cache
def _parameters(module_class: type[nn.Module]) -> tuple[str, ...]:
    # of the class: accelerate replaces `forward` on instances
    return tuple(inspect.signature(module_class.forward).parameters)[1:]


def _set_implementation(model: PreTrainedModel, name: str | None) -> None:
    config = model.config
    text = config.get_text_config(decoder=True)
    part = next((key for key in config.sub_configs if getattr(config, key, None) is text), None)
    # only the decoder reads the cache: a vision tower keeps its own attention
    model.set_attn_implementation(name if part is None else {part: name})  # type: ignore[arg-type]
    if text._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} did not accept the attention implementation {name!r}, it uses "
            f"{text._attn_implementation!r}; this architecture computes attention in a way that cannot be replaced"
        )


def _before_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tell the layer about padding and, where keys are stored before RoPE, swap the position embeddings."""
    bound = {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs} if args else kwargs
    cache_name = "past_key_values" if "past_key_values" in bound else "layer_past"
    layers = getattr(bound.get(cache_name), "layers", ())
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    if not isinstance(layer, PackedLayer):
        return None
    layer.note_mask(bound.get("attention_mask"))
    if not layer.before_rope:
        return None
    return (), _with_identity_rope(module, layer, bound, cache_name)


def _with_identity_rope(module: Any, layer: PackedLayer, bound: dict[str, Any], cache_name: str) -> dict[str, Any]:
    """The arguments of the attention call with embeddings that rotate nothing; the layer keeps the true ones."""
    implementation = module.config._attn_implementation
    if implementation != IMPLEMENTATION:
        raise RuntimeError(
            f"this cache stores keys before RoPE, which only the attention implementation {IMPLEMENTATION!r} can read; "
            f"the model now uses {implementation!r}. Switch it back, or use a strategy with rope='post'"
        )
    angles = bound.get("position_embeddings")
    given = angles if isinstance(angles, tuple) else ()
    if len(given) != 2 or not all(isinstance(t, Tensor) and not t.is_complex() for t in given):
        raise ValueError(
            f"keys before RoPE are not supported for {type(module).__name__}: it is given no position_embeddings "
            "(cos, sin). Use a strategy that stores keys after RoPE"
        )
    cos, sin = given

    def project(cos: Tensor, sin: Tensor) -> Tensor:
        probe = _Probe()
        arguments = {**bound, "position_embeddings": (cos, sin), "attention_mask": None, cache_name: probe}
        arguments["hidden_states"] = bound["hidden_states"][:, :PROBE_TOKENS]
        for name in ("position_ids", "cache_position"):
            if isinstance(bound.get(name), Tensor):
                arguments[name] = bound[name][..., :PROBE_TOKENS]
        with torch.no_grad():
            module.forward(**arguments)
        return probe.keys

    layer.require_batch(bound["hidden_states"].shape[0])  # before the table is touched
    rotary = find_rotary_function(module, cos[:, :PROBE_TOKENS], sin[:, :PROBE_TOKENS], project)
    kind = getattr(module, "layer_type", None) or ("sliding" if getattr(module, "is_sliding", False) else "full")
    table = layer.rotary_tables.get(kind, cos.device)
    table.append(cos, sin, layer.get_seq_length(), layer.index)
    layer.note_rope(module, rotary, table, cos, sin)
    one, zero = cos.new_ones(()).expand_as(cos), sin.new_zeros(()).expand_as(sin)
    return {**bound, "position_embeddings": (one, zero)}


class _Probe:
    """Stands in for the cache while the rotary function is probed, and remembers the keys."""

    keys: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys = key_states
        return key_states, value_states

    def get_seq_length(self, *args: Any) -> int:
        return 0
