"""From tensors and formats to launches of the fused attention kernels."""

import contextlib
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import backend
from ..format import Format, LayerFormat, Side, row_words
from ..fused import ExactSegment, PackedSegment, part_of, span_of, tile_of
from ..quantize import NO_TABLES, Tables
from ..rotation import hadamard_rotate
from .attend import attend_blocks
from .exact import attend_exact, combine

EXACT_TILE = 64

# bytes of a step that are loaded ahead of it, into shared memory
STAGED_BYTES = 1 << 15

# programs per multiprocessor: enough to hide the latency of memory, few enough to be merged cheaply
PROGRAMS = 4


class Operands(NamedTuple):
    """What the kernel reads of one side's tables, made once per table.

    levels: float32 `[2]`, `level = levels[0] * entry + levels[1]`; None: a level is its code.
    table: int32, four entries each, of codebooks. grid: float32 `[kv_heads, 2, dim]`, static scale and zero
    of an entry.
    """

    levels: Tensor | None
    table: Tensor | None
    grid: Tensor | None


class Shape(NamedTuple):
    """Of one launch: batch, kv heads, rows (query heads of a kv head times queries), queries and head dims."""

    batch: int
    kv_heads: int
    rows: int
    queries: int
    head_dim: int
    value_dim: int


def attend(
    query: Tensor,
    packed: PackedSegment | None,
    exact: list[ExactSegment],
    scaling: float,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    """See `fused.attend`."""
    shape = _shape(query, packed, exact)
    rows = query.reshape(shape.batch * shape.kv_heads, shape.rows, shape.head_dim).contiguous()
    packed_splits = 0 if packed is None else _splits(shape, packed)
    exact_splits = [_exact_splits(shape, segment.key.shape[2]) for segment in exact]
    slots = packed_splits + sum(exact_splits)
    # every slot is written, empty splits included
    mix = query.new_empty(shape.batch * shape.kv_heads, slots, shape.rows, shape.value_dim, dtype=torch.float32)
    lse = query.new_empty(shape.batch * shape.kv_heads, slots, shape.rows, dtype=torch.float32)
    with _on(query.device):
        if packed is not None:
            _launch_packed(rows, packed, shape, packed_splits, mix, lse, scaling, softcap)
        first_slot = packed_splits
        for segment, splits in zip(exact, exact_splits, strict=True):
            _launch_exact(rows, segment, shape, first_slot, splits, mix, lse, scaling, softcap)
            first_slot += splits
        out = query.new_empty(*query.shape[:3], shape.value_dim)
        combine[(shape.rows, shape.batch * shape.kv_heads)](
            mix, lse, None if sink is None else sink.contiguous(), out,
            shape.rows, shape.queries, shape.kv_heads, packed_splits, slots,
            DIM=shape.value_dim, PAD=_power_of_two(shape.value_dim),
            BASIS=1 if packed is None else packed.formats.value.basis(shape.value_dim), SLOTS=32,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def processors(device: torch.device) -> int:
    """Multiprocessors that programs are spread over."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def assembly() -> bool:
    """Whether kernels may use NVIDIA's assembly."""
    return not backend.interpreted() and torch.version.hip is None


def operands(tables: Tables, fmt: Format, device: torch.device) -> Operands:
    """What the kernel reads of `tables`, made once for their tensors.

    Where these have been written to since, it is made anew in the same memory, which a CUDA graph may be reading.
    """
    tensors = tuple(tables.tensors().values())
    form = (fmt.codes, fmt.bits, fmt.scale, fmt.symmetric)
    if not tensors:
        return _of_format(*form, device)
    versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    kept = _operands.setdefault(tensors[0], {})
    entry = kept.get((form, *map(id, tensors)))
    if entry is None:
        # they outlive this forward
        with torch.inference_mode(False), torch.no_grad():
            entry = kept[(form, *map(id, tensors))] = _Kept(tensors, versions, _made(tables, fmt, device))
    elif entry.versions != versions:
        for old, new in zip(entry.operands, _made(tables, fmt, device), strict=True):
            if old is not None and new is not None:
                old.copy_(new)
        entry.versions[:] = versions
    return entry.operands


class _Kept(NamedTuple):
    tensors: tuple[Tensor, ...]
    versions: list[int]
    operands: Operands


_operands: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@cache
def _of_format(codes: str, bits: int, scale: str, symmetric: bool, device: torch.device) -> Operands:
    fmt = Format.model_validate({"codes": codes, "bits": bits, "scale": scale, "symmetric": symmetric})
    with torch.inference_mode(False), torch.no_grad():
        return _made(NO_TABLES, fmt, device)


def _made(tables: Tables, fmt: Format, device: torch.device) -> Operands:
    factor = torch.ones((), dtype=torch.float32, device=device)
    offset = torch.zeros_like(factor)
    table = None
    trivial = fmt.codes != "codebook" and tables.gain is None
    if fmt.codes == "codebook":
        steps = tables.steps()
        factor, offset = steps.step.float(), steps.first.float()
        table = steps.index.to(torch.uint8).view(torch.int32)
    elif fmt.codes == "affine" and fmt.symmetric and fmt.scale != "static":
        offset, trivial = offset - (2**fmt.bits - 1) / 2, False
    if tables.gain is not None and tables.offset is not None:
        factor, offset = factor * tables.gain, offset * tables.gain + tables.offset
        if fmt.codes == "affine" and fmt.symmetric and fmt.scale != "static":
            # the reference moves the zero point before it stretches the scale
            offset = tables.offset - (2**fmt.bits - 1) / 2
    if fmt.scale == "static":
        if tables.scale is None or tables.zero is None:
            raise ValueError(
                "scale='static' needs tables with scale and zero; return them from the strategy's tables()"
            )
        grid = torch.stack([tables.scale * factor, tables.scale * offset + tables.zero], dim=1).float().contiguous()
        return Operands(None, table, grid)
    return Operands(None if trivial else torch.stack([factor, offset]).float(), table, None)


# ---- launches ------------------------------------------------------------------------------------------------------


def _launch_packed(
    rows: Tensor,
    packed: PackedSegment,
    shape: Shape,
    splits: int,
    mix: Tensor,
    lse: Tensor,
    scaling: float,
    softcap: float | None,
) -> None:
    formats = packed.formats
    key_format, value_format = formats.key, formats.value
    if key_format.rotation == "hadamard":
        rows = hadamard_rotate(rows.float(), key_format.basis(shape.head_dim))
    held = packed.key["codes"].shape[2]
    layout = _layout(shape, formats)
    tiles = -(-shape.rows // layout.rows)
    span = span_of(formats)
    with_outliers = key_format.outliers or value_format.outliers
    scratch = None
    if with_outliers:
        programs = shape.batch * shape.kv_heads * splits * tiles
        scratch = rows.new_empty(programs, (shape.head_dim + span * formats.block) * layout.rows, dtype=torch.float32)
    cos, sin, angle_stride = _angles(packed.angles, key_format)
    visible, visible_batch, visible_query = _visible(packed.visible)
    key_arguments, key_capacity = _side(packed, "key", shape.head_dim, rows.device)
    value_arguments, value_capacity = _side(packed, "value", shape.value_dim, rows.device)
    attend_blocks[(shape.batch * shape.kv_heads, splits, tiles)](
        rows, *key_arguments, *value_arguments, cos, sin, visible, scratch, mix, lse, packed.held,
        scaling, softcap, shape.rows, shape.queries, held, packed.first, shape.kv_heads, mix.shape[1],
        key_capacity, value_capacity, visible_batch, visible_query, angle_stride,
        HEAD_DIM=shape.head_dim, VALUE_DIM=shape.value_dim, BLOCK=formats.block, SPAN=span,
        ROWS=layout.rows, EVEN=layout.even, DEFER=layout.rows <= 8,
        **_constants("KEY", key_format, shape.head_dim, shape.head_dim),
        **_constants("VALUE", value_format, shape.value_dim, formats.block),
        PART=part_of(shape.value_dim, value_format), BOUNDED=packed.first > 0 or span > 1, ASM=assembly(),
        num_warps=layout.warps, num_stages=layout.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _launch_exact(
    rows: Tensor,
    segment: ExactSegment,
    shape: Shape,
    first_slot: int,
    splits: int,
    mix: Tensor,
    lse: Tensor,
    scaling: float,
    softcap: float | None,
) -> None:
    visible, visible_batch, visible_query = _visible(segment.visible)
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (segment.key, segment.value))
    columns = 16 if shape.rows <= 16 else 32
    head_pad, value_pad = _power_of_two(shape.head_dim), _power_of_two(shape.value_dim)
    # tiles of keys and of values wait in shared memory, of which some GPUs have 99 KiB
    token_bytes = (head_pad + value_pad) * key.element_size()
    sizes = (EXACT_TILE, EXACT_TILE // 2)
    tile = next((size for size in sizes if size * token_bytes <= STAGED_BYTES), EXACT_TILE // 4)
    attend_exact[(shape.batch * shape.kv_heads, splits, -(-shape.rows // columns))](
        rows, key, value, visible, mix, lse, segment.held,
        scaling, softcap, shape.rows, shape.queries, key.shape[2], shape.kv_heads, mix.shape[1], first_slot,
        *key.stride()[:3], *value.stride()[:3], visible_batch, visible_query,
        HEAD_DIM=shape.head_dim, VALUE_DIM=shape.value_dim,
        HEAD_PAD=head_pad, VALUE_PAD=value_pad, TILE=tile, ROWS=columns, CAUSAL=segment.causal and shape.queries > 1,
        num_warps=4, num_stages=2 if tile * token_bytes <= STAGED_BYTES else 1, enable_fp_fusion=True,
    )  # fmt: skip


class _Layout(NamedTuple):
    rows: int
    even: bool
    warps: int
    stages: int


def _layout(shape: Shape, formats: LayerFormat) -> _Layout:
    """Rows per program and how they lie in the matrix unit."""
    hip = torch.version.hip is not None
    key, value = formats.key, formats.value
    tile = tile_of(formats)
    staged = tile * (shape.head_dim * key.bits + shape.value_dim * value.bits) // 8
    if key.rope == "pre":
        staged += tile * shape.head_dim * 2
    stages = 2 if staged <= 2 * STAGED_BYTES else 1
    # more where registers would spill
    looked_up = value.codes == "codebook" and value.outliers > 0
    warps = 4 if key.rope == "pre" or looked_up or hip else 2
    least = 16 if hip else 8
    if shape.rows <= least // 2:
        return _Layout(least // 2, True, warps, stages)
    for count in (8, 16):
        if shape.rows <= count and count >= least:
            return _Layout(count, False, warps, stages)
    if max(shape.head_dim, shape.value_dim, tile) > 128:
        return _Layout(16, False, warps, stages)
    return _Layout(32, False, 4, stages)


def _splits(shape: Shape, packed: PackedSegment) -> int:
    """Programs along the blocks: all get the same number of steps, but for the last."""
    steps = max(1, -(-packed.key["codes"].shape[2] // span_of(packed.formats)))
    layout = _layout(shape, packed.formats)
    beside = shape.batch * shape.kv_heads * -(-shape.rows // layout.rows)
    return _balanced(steps, processors(packed.key["codes"].device) * PROGRAMS // beside)


def _exact_splits(shape: Shape, tokens: int) -> int:
    # a short tail is one program's work; a whole exact cache is spread
    beside = shape.batch * shape.kv_heads * -(-shape.rows // 16)
    return _balanced(max(1, -(-tokens // (4 * EXACT_TILE))), 2 * PROGRAMS * 132 // beside)


def _balanced(steps: int, wanted: int) -> int:
    per_split = -(-steps // max(1, min(steps, wanted)))
    return -(-steps // per_split)


def _constants(prefix: str, fmt: Format, dim: int, length: int) -> dict[str, Any]:
    """The constants of one side; a packed row has `length` codes."""
    constants = {
        "BITS": fmt.bits,
        "ROW": row_words(length, fmt.bits),
        "SCALE": fmt.scale,
        "GROUPS": fmt.groups(dim) if fmt.scale == "token" else 1,
        "ZERO": not fmt.symmetric,
        "LUT": fmt.codes == "codebook",
        "FLOAT": fmt.codes == "float8",
        "OUTLIERS": fmt.outliers,
    }
    return {f"{prefix}_{name}": value for name, value in constants.items()}


# ---- checks --------------------------------------------------------------------------------------------------------


def _shape(query: Tensor, packed: PackedSegment | None, exact: list[ExactSegment]) -> Shape:
    batch, query_heads, queries, head_dim = query.shape
    if packed is not None:
        # rows of packed values are channels
        kv_heads, value_dim = packed.key["codes"].shape[1], packed.value["codes"].shape[3]
    else:
        kv_heads, value_dim = exact[0].key.shape[1], exact[0].value.shape[3]
    return Shape(batch, kv_heads, query_heads // kv_heads * queries, queries, head_dim, value_dim)


def _side(packed: PackedSegment, side: Side, dim: int, device: torch.device) -> tuple[list[Tensor | None], int]:
    """The kernel's arguments of one side, and for how many blocks its buffers have room."""
    held: Mapping[str, Tensor] = packed.key if side == "key" else packed.value
    fmt: Format = getattr(packed.formats, side)
    table = operands(packed.tables[side], fmt, device)
    capacities = {name: _capacity(tensor, side, name) for name, tensor in held.items()}
    if len(set(capacities.values())) != 1:
        raise ValueError(f"{side} buffers have room for {capacities} blocks; one number is needed throughout")
    scales = held.get("scales")
    if scales is not None and not fmt.symmetric:
        scales = scales.view(torch.int32)
    arguments = [
        held["codes"], scales, table.table, table.levels, table.grid, held.get("outlier_index"),
        held.get("outlier_value"),
    ]  # fmt: skip
    return arguments, capacities["codes"]


def _capacity(tensor: Tensor, side: Side, name: str) -> int:
    """Blocks between the first block of one head and that of the next, in a contiguous buffer."""
    batch, heads, blocks = tensor.shape[:3]
    inner = tensor[0, 0, 0].numel() if tensor.numel() else 1
    if not blocks or not batch:
        return blocks
    capacity = blocks
    if heads > 1:
        capacity = tensor.stride(1) // inner
    elif batch > 1:
        capacity = tensor.stride(0) // inner
    expected = [heads * capacity * inner, capacity * inner, *_contiguous_strides(tensor.shape[2:])]
    fits = zip(tensor.shape, tensor.stride(), expected, strict=True)
    wrong = any(size > 1 and stride != wanted for size, stride, wanted in fits)
    if wrong:
        raise ValueError(
            f"{side} {name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} is no view of a contiguous "
            "buffer [batch, kv_heads, capacity, ...]; pass it through .contiguous()"
        )
    return capacity


def _contiguous_strides(shape: torch.Size) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return strides[::-1]


def _visible(visible: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Bytes, and their strides by batch row and query; 0 where one stands for all."""
    if visible is None:
        return None, 0, 0
    visible = visible if visible.stride(-1) == 1 else visible.contiguous()
    batch, query = (0 if size == 1 else step for size, step in zip(visible.shape[:2], visible.stride(), strict=False))
    return visible.view(torch.uint8), batch, query


def _angles(angles: tuple[Tensor, Tensor] | None, fmt: Format) -> tuple[Tensor | None, Tensor | None, int]:
    """cos and sin with equal strides, and that of the batch."""
    if fmt.rope == "post" or angles is None:
        return None, None, 0
    dense = [t.stride()[1:] == (t.shape[2], 1) for t in angles]
    cos, sin = angles if all(dense) and angles[0].stride() == angles[1].stride() else (t.contiguous() for t in angles)
    return cos, sin, 0 if cos.shape[0] == 1 else cos.stride(0)


def _power_of_two(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
