"""Attention over a packed layer by the fused kernels, where they can serve it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import backend, fused
from ...kernels.format import LayerFormat
from ...kernels.fused import ExactSegment, PackedSegment
from .handles import LazyStates
from .segments import Scoring

if TYPE_CHECKING:
    from .blocks import BlockLayer


def attend_fused(
    layer: "BlockLayer", query: Tensor, key: LazyStates, value: LazyStates, scoring: Scoring
) -> Tensor | None:
    """As `segments.attend_packed`, or None where something else has to do it.

    Warns once about an option that keeps a layer from the kernels of its device.
    """
    if not backend.triton_serves(query.device) or query.dtype == torch.float64:
        return None
    newest_key = key.rotated_exact()
    learned = [t for t in (query, newest_key, value.exact, scoring.s_aux) if t is not None and t.requires_grad]
    if learned and torch.is_grad_enabled():
        return None  # the kernels have no gradients
    both_exact = layer.formats.key.codes == layer.formats.value.codes == "exact"
    angles = layer.angles(key.start) if layer.turned else None
    formats = _read_as(layer)
    problem = None
    if not scoring.visibility.boolean:
        problem = "an attention mask that is added, or differs by head"
    elif both_exact:
        widest = max(layer.head_dim, layer.value_dim)
        problem = f"heads of {widest} channels: up to 256 are served" if widest > 256 else None
    else:
        problem = fused.unserved(formats, layer.head_dim, layer.value_dim, not layer.turned or angles is not None)
    if problem is not None:
        if "custom" not in (formats.key.codes, formats.value.codes):
            backend.warn_once(f"packed attention runs on the slower torch path, not on Triton: {problem}")
        return None
    if both_exact:
        # sinks among them
        packed, older = None, _exact_blocks(layer, key.start, scoring)
    else:
        packed, older = _packed(layer, formats, key.start, scoring, angles), _sinks(layer, key.start, scoring)
    view = scoring.visibility
    newest = ExactSegment(newest_key, value.exact, view.seen(key.start, view.keys), view.causal)
    segments = [newest] if older is None else [older, newest]
    return fused.attend(query, packed, segments, scoring.scaling, scoring.softcap, scoring.s_aux)


def _read_as(layer: "BlockLayer") -> LayerFormat:
    """The layer's formats; without positions, keys before RoPE are as after it."""
    formats = layer.formats
    if formats.key.rope == "post" or layer.turned:
        return formats
    return formats.model_copy(update={"key": formats.key.model_copy(update={"rope": "post"})})


def _packed(
    layer: "BlockLayer",
    formats: LayerFormat,
    packed: int,
    scoring: Scoring,
    angles: tuple[Tensor, Tensor] | None,
) -> PackedSegment:
    key, value = (layer.stores[side].read(0, packed // formats.block) for side in ("key", "value"))
    visible = scoring.visibility.seen(0, packed)
    first = 0
    if layer.sinks and layer.sinks.first is None:
        first = min(layer.sinks.count, packed)
    else:
        covered = layer.sinks.covers(0, packed)
        if covered is not None:
            visible = ~covered[:, None] if visible is None else visible & ~covered[:, None]
    return PackedSegment(key, value, formats, layer.tables, first, visible, angles)


def _sinks(layer: "BlockLayer", packed: int, scoring: Scoring) -> ExactSegment | None:
    sinks = layer.present_sinks(packed)
    if sinks is None:
        return None
    positions, present, key, value = sinks
    visible = scoring.visibility.seen_at(positions)
    if layer.sinks.first is not None or layer.sinks.count > packed:
        visible = present[:, None] if visible is None else visible & present[:, None]
    return ExactSegment(key, value, visible)


def _exact_blocks(layer: "BlockLayer", packed: int, scoring: Scoring) -> ExactSegment:
    blocks = packed // layer.formats.block
    key, value = (layer.stores[side].read(0, blocks)["exact"].flatten(2, 3) for side in ("key", "value"))
    return ExactSegment(layer.rotated(key, 0), value, scoring.visibility.seen(0, packed))
