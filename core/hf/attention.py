"""The attention function registered with transformers."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from .handles import LazyStates
from .masks import Visibility, attention_mask
from .precision import full_precision
from .segments import Scoring, dense_segment, fold
from .static_layer import StaticStates

IMPLEMENTATION = "cachequant"

# arguments of some architectures that change the result; ignoring one would be silently wrong
_FOREIGN = ("position_bias", "sinks", "indices", "block_indices")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over plain tensors, or over the packed layer behind lazy handles.

    query `[batch, query_heads, queries, head_dim]`; key, value `[batch, kv_heads, keys, dim]`. softcap bounds the
    scores (gemma2), s_aux are the logits of learned sinks (gpt-oss), `[query_heads]`.

    Returns `([batch, queries, query_heads, value_dim], None)`: probabilities are not materialised.
    """
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise ValueError(f"{type(module).__name__} passes {foreign} to attention, which a packed cache cannot honour")
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    if isinstance(key, StaticStates):
        if dropout:
            raise ValueError(f"dropout={dropout} cannot be applied over packed keys; call model.eval()")
        return key.layer.attend_one(query, attention_mask, scaling, softcap, s_aux), None
    visibility = Visibility(attention_mask, query.shape[2], key.shape[2], query.device)
    scoring = Scoring(visibility, scaling, softcap, s_aux)
    if isinstance(key, LazyStates) and isinstance(value, LazyStates):
        key.require_current()
        layer = key.layer
        with full_precision(query.device):
            query = layer.rotated_query(query, module)
            if layer.reads_packed(key):
                if dropout:
                    raise ValueError(f"dropout={dropout} cannot be applied over packed keys; call model.eval()")
                output = layer.attend(query, key, value, scoring)
                layer.settle()
                return output.transpose(1, 2).contiguous(), None
            layer.observe(query, key, scoring)
            key, value = key.materialize(), value.materialize()
            layer.settle()
    elif isinstance(key, LazyStates) or isinstance(value, LazyStates):
        # the model has already used one of the two (multi-head latent attention builds keys from both)
        layer = key.layer if isinstance(key, LazyStates) else value.layer  # type: ignore[union-attr]
        if layer.awaits_query:
            raise ValueError(f"layer {layer.index}: keys before RoPE need both of their handles; got one tensor")
        key, value = (t.materialize() if isinstance(t, LazyStates) else t for t in (key, value))
    if softcap is None and s_aux is None:
        causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
        mask = visibility.dense(query.shape[0]) if causal in (None, True) else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout:
        raise ValueError(f"dropout={dropout} with softcap or learned sinks is not supported; set attention_dropout=0")
    rows = fold(query, key.shape[1], scaling)
    partial = dense_segment(rows, key, value, 0, query.shape[2], scoring)
    return scoring.finish(partial, key.shape[1], query).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)
