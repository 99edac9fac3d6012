"""What the fused kernels attend to, and what they cannot serve."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .format import Format, LayerFormat, Side, row_words
from .quantize import Tables


class PackedSegment(NamedTuple):
    """The packed blocks of one layer.

    key, value: tensors `[batch, kv_heads, blocks, ...]` by kind, as `quantize.encode` returns them; views of buffers
        with spare capacity are fine.
    first: tokens before it are hidden, because they are held exact elsewhere.
    visible: bool `[batch or 1, queries or 1, tokens]`, None: all others are seen by every query.
    angles: for keys before RoPE, cos and sin `[batch or 1, tokens, head_dim / 2]`, both halves of a head alike.
    held: int32 `[1]`, how many of the blocks are there; None: all.
    """

    key: dict[str, Tensor]
    value: dict[str, Tensor]
    formats: LayerFormat
    tables: dict[Side, Tables]
    first: int = 0
    visible: Tensor | None = None
    angles: tuple[Tensor, Tensor] | None = None
    held: Tensor | None = None


class ExactSegment(NamedTuple):
    """Exact keys and values `[batch, kv_heads, tokens, dim]`.

    visible: bool `[batch or 1, queries or 1, tokens]`, None: all are. causal: the newest keys are the queries' own.
    held: int32 `[1]`, how many of the tokens are there; None: all.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None = None
    causal: bool = False
    held: Tensor | None = None


def unserved(formats: LayerFormat, head_dim: int, value_dim: int, block_angles: bool = True) -> str | None:
    """The option that keeps the fused kernels from blocks of these formats, with its reason; None: they serve them.

    block_angles: whether RoPE turns the first half of a head against the second, for keys before it.
    """
    return _unserved(formats, head_dim, value_dim, block_angles)  # type: ignore[arg-type]


@cache
def _unserved(formats: LayerFormat, head_dim: int, value_dim: int, block_angles: bool) -> str | None:
    for side, fmt, dim in (("key", formats.key, head_dim), ("value", formats.value, value_dim)):
        problem = _unserved_side(fmt, dim)
        # of such keys a step may read several blocks, one by one
        one_by_one = side == "key" and fmt.rope == "post"
        if problem is None and fmt.scale == "channel" and span_of(formats) > 1 and not one_by_one:
            before = "" if side == "value" else " before RoPE"
            problem = (
                f"scale='channel'{before} with block={formats.block}: blocks of at least {tile_of(formats)} are served"
            )
        if problem is not None:
            return f"{side} {problem}"
    if formats.block > 128 and max(head_dim, value_dim) > 128:
        return (
            f"block={formats.block} with heads of {max(head_dim, value_dim)} channels: blocks of up to 128 are served"
        )
    run = part_of(value_dim, formats.value)
    if run < 16:
        return f"value group={formats.value.group or value_dim}: a group has to be a multiple of 16 channels"
    if formats.key.rope == "pre":
        bits = formats.key.bits
        if formats.key.rotation != "none":
            return "key rope='pre' with rotation='hadamard'"
        if not block_angles:
            return "key rope='pre' of a model that turns other pairs of channels than (i, i + head_dim / 2)"
        if row_words(head_dim, bits) * 32 != head_dim * bits:
            return f"key rope='pre' with {bits} bits and head_dim={head_dim}: rows are padded, their halves no planes"
    return None


def _unserved_side(fmt: Format, dim: int) -> str | None:
    if fmt.codes == "exact":
        return "codes='exact' beside packed ones"
    if fmt.codes == "custom":
        return "codes='custom': only the strategy reads them"
    if fmt.codes == "codebook" and fmt.bits == 8:
        return "codes='codebook' with 8 bits: tables have up to 16 entries"
    if fmt.scale == "token" and fmt.groups(dim) > 8:
        return f"group={fmt.group}: {fmt.groups(dim)} scales per token, up to 8 are served"
    if dim > 256:
        return f"heads of {dim} channels: up to 256 are served"
    return None


def tile_of(formats: LayerFormat) -> int:
    """Tokens that a step of the fused kernel reads."""
    return max(formats.block, 128)


def span_of(formats: LayerFormat) -> int:
    """Blocks that a step reads."""
    return tile_of(formats) // formats.block


def part_of(value_dim: int, fmt: Format) -> int:
    """Channels of the values that are mixed at a time: the longest run of a power of two in a group."""
    group = value_dim // fmt.groups(value_dim) if fmt.scale == "token" else value_dim
    return group & -group


def prepare(formats: LayerFormat, tables: dict[Side, Tables], device: torch.device) -> None:
    """Make what the kernels read of `tables`, as they are, so that no launch in a CUDA graph has to."""
    from .triton import launch

    sides: tuple[tuple[Side, Format], ...] = (("key", formats.key), ("value", formats.value))
    for side, fmt in sides:
        if fmt.packed:
            launch.operands(tables[side], fmt, device)


def attend(
    query: Tensor,
    packed: PackedSegment | None,
    exact: list[ExactSegment],
    scaling: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention of `query [batch, query_heads, queries, head_dim]` over all segments, by the Triton kernels.

    packed: of formats that `unserved` has nothing against. sink: logits of learned sinks, `[query_heads]`.

    Returns `[batch, query_heads, queries, value_dim]` in the query's dtype; a query that sees nothing gets zeros.
    Raises ValueError for tensors on several devices, mismatched shapes or buffers that are not contiguous.
    """
    from .triton import launch

    _require_fitting(query, packed, exact, sink)
    return launch.attend(query, packed, exact, scaling, softcap, sink)


def _require_fitting(
    query: Tensor, packed: PackedSegment | None, exact: list[ExactSegment], sink: Tensor | None
) -> None:
    """Raise ValueError unless all shapes, dtypes and devices go together: kernels would read beyond buffers."""
    batch, query_heads, queries, head_dim = query.shape
    if not query.is_floating_point() or query.dtype == torch.float64:
        raise ValueError(f"the fused kernels compute in float32, the query is {query.dtype}; use the reference")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, *(t for e in exact for t in (e.key, e.value)))):
        raise ValueError("the fused kernels have no gradients; use the reference, or torch.no_grad()")
    if packed is not None:
        blocks = _require_packed(packed, head_dim, query)
        kv_heads, value_dim = packed.value["codes"].shape[1], packed.value["codes"].shape[3]
        _require_visible(packed.visible, batch, queries, blocks * packed.formats.block, query)
        for angles in packed.angles or ():
            expected = (batch, blocks * packed.formats.block, head_dim // 2)
            if angles.shape[0] not in (1, batch) or angles.shape[1] < expected[1] or angles.shape[2] != expected[2]:
                raise ValueError(f"cos or sin {tuple(angles.shape)} do not fit {expected}: [batch or 1, tokens, half]")
            _require_device(query, angles)
    elif exact:
        kv_heads, value_dim = exact[0].key.shape[1], exact[0].value.shape[3]
    else:
        raise ValueError("nothing to attend to: no packed segment and no exact one")
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads do not divide among {kv_heads} kv heads")
    for segment in exact:
        tokens = segment.key.shape[2]
        key, value = (batch, kv_heads, tokens, head_dim), (batch, kv_heads, tokens, value_dim)
        if segment.key.shape != key or segment.value.shape != value:
            raise ValueError(
                f"exact keys {tuple(segment.key.shape)} and values {tuple(segment.value.shape)}, expected {key} and "
                f"{value}"
            )
        _require_visible(segment.visible, batch, queries, tokens, query)
        _require_held(segment.held, query)
        _require_device(query, segment.key, segment.value)
    if sink is not None:
        if sink.shape != (query_heads,):
            raise ValueError(f"sink logits {tuple(sink.shape)}, expected one of each of {query_heads} query heads")
        _require_device(query, sink)


def _require_packed(packed: PackedSegment, head_dim: int, query: Tensor) -> int:
    """The number of blocks, if keys and values have the same."""
    formats = packed.formats
    problem = unserved(formats, head_dim, packed.value["codes"].shape[3] if "codes" in packed.value else 16)
    if problem is not None:
        raise ValueError(f"the fused kernels do not serve {problem}")
    if formats.key.rope == "pre" and packed.angles is None:
        raise ValueError("keys before RoPE need cos and sin [batch or 1, tokens, head_dim / 2]")
    if row_words(head_dim, formats.key.bits) != packed.key["codes"].shape[4]:
        raise ValueError(
            f"packed keys of {packed.key['codes'].shape[4]} words per token are not of head_dim {head_dim}, the query's"
        )
    heads, blocks = packed.key["codes"].shape[1:3]
    sides: tuple[tuple[Side, dict[str, Tensor]], ...] = (("key", packed.key), ("value", packed.value))
    for side, held in sides:
        for name, tensor in held.items():
            if tensor.shape[:3] != (query.shape[0], heads, blocks):
                raise ValueError(
                    f"{side} {name} are {tuple(tensor.shape[:3])}, expected {(query.shape[0], heads, blocks)}: [batch, "
                    "kv_heads, blocks]"
                )
        _require_device(query, *held.values(), *packed.tables[side].tensors().values())
    _require_held(packed.held, query)
    return blocks


def _require_visible(visible: Tensor | None, batch: int, queries: int, tokens: int, query: Tensor) -> None:
    if visible is None:
        return
    fits = visible.ndim == 3 and visible.shape[0] in (1, batch) and visible.shape[1] in (1, queries)
    if visible.dtype != torch.bool or not fits or visible.shape[2] < tokens:
        raise ValueError(
            f"visible is {visible.dtype} {tuple(visible.shape)}, expected bool {(batch, queries, tokens)}: [batch or "
            "1, queries or 1, tokens]"
        )
    _require_device(query, visible)


def _require_held(held: Tensor | None, query: Tensor) -> None:
    if held is None:
        return
    if held.dtype != torch.int32 or held.numel() != 1:
        raise ValueError(f"held is {held.dtype} {tuple(held.shape)}, expected int32 [1]")
    _require_device(query, held)


def _require_device(query: Tensor, *tensors: Tensor) -> None:
    strays = {str(tensor.device) for tensor in tensors if tensor.device != query.device}
    if strays:
        raise ValueError(
            f"the query is on {query.device}, what it attends to on {sorted(strays)}; move the cache or the model"
        )
