"""What `kernels.quantize` asks of its arguments, whichever implementation serves them."""

from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Of each tensor of packed blocks what follows `[batch, kv_heads, blocks]`, and the dtype."""


def require_encodable(states: Tensor, block: int, valid: Tensor | None, tables: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless whole blocks of states can be encoded with `valid` and the tables."""
    if states.ndim != 4 or not states.is_floating_point():
        raise ValueError(
            f"states must be floats [batch, kv_heads, tokens, head_dim], got {states.dtype} {list(states.shape)}"
        )
    if states.shape[2] % block:
        raise ValueError(f"{states.shape[2]} tokens are not whole blocks of {block}; keep the rest exact")
    _require_device("states", states.device, {} if valid is None else {"valid": valid})
    _require_device("states", states.device, tables, "tables.")
    seen = (states.shape[0], states.shape[2])
    if valid is not None and (valid.dtype != torch.bool or valid.shape != seen):
        raise ValueError(f"valid must be bool {list(seen)}, got {valid.dtype} {list(valid.shape)}")
    for name in ("scale", "zero", "sensitivity"):
        if name in tables and tables[name].shape != (states.shape[1], states.shape[3]):
            raise ValueError(
                f"tables.{name} must be [kv_heads, head_dim] = {[states.shape[1], states.shape[3]]}, "
                f"got {list(tables[name].shape)}"
            )


def require_buffers(
    out: Mapping[str, Tensor] | None, at: Tensor | None, when: Tensor | None, states: Tensor, block: int, shapes: Shapes
) -> None:
    """Raise ValueError unless blocks of `shapes` can be written to `out`, from `at` on, `when` that is not 0."""
    if out is None:
        if at is not None or when is not None:
            raise ValueError("at and when say where and when to write to out; give out, or neither")
        return
    if out.keys() != shapes.keys():
        raise ValueError(f"out must hold {sorted(shapes)}, got {sorted(out)}")
    _require_device("states", states.device, out, "out.")
    capacity = next(iter(out.values())).shape[2]
    for name, (shape, dtype) in shapes.items():
        expected, found = (*states.shape[:2], capacity, *shape), out[name]
        if found.shape != expected or found.dtype != dtype:
            raise ValueError(
                f"out[{name!r}] must be {dtype} {list(expected)}, got {found.dtype} {list(found.shape)}; capacity is "
                "the third size, the same for all"
            )
        if not found.is_contiguous():
            raise ValueError(f"out[{name!r}] must be contiguous, got strides {list(found.stride())}")
    if states.shape[2] > capacity * block:
        raise ValueError(f"{states.shape[2] // block} blocks do not fit the {capacity} of out")
    for name, tensor in (("at", at), ("when", when)):
        if tensor is None:
            continue
        if tensor.numel() != 1 or tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be one int32 or int64, got {tensor.dtype} {list(tensor.shape)}")
        _require_device("states", states.device, {name: tensor})


def require_decodable(packed: Mapping[str, Tensor], shapes: Shapes, tables: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `packed` are blocks of `shapes` on the device of the tables."""
    missing = shapes.keys() - packed.keys()
    if missing:
        raise ValueError(f"packed blocks lack {sorted(missing)}; they have {sorted(packed)}")
    first = packed[next(iter(shapes))]
    for name, (shape, dtype) in shapes.items():
        expected, found = (*first.shape[:3], *shape), packed[name]
        if found.shape != expected or found.dtype != dtype:
            raise ValueError(
                f"packed[{name!r}] must be {dtype} {list(expected)}, got {found.dtype} {list(found.shape)}"
            )
    _require_device("packed blocks", first.device, packed)
    _require_device("packed blocks", first.device, tables, "tables.")


def _require_device(whose: str, device: torch.device, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{prefix}{name} is on {tensor.device}, {whose} are on {device}; move one of them")
