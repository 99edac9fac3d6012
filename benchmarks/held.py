"""What caches hold, ours and transformers', in the figures of a results row."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

from ..core import MemoryReport, PackedCache
from ..core.hf.layer import PackedLayer

# What does not grow with the context, or is kept exact on purpose.
UNPACKED_ROWS = frozenset(
    {
        "tail",
        "cut block",
        "sinks",
        "spare",
        "codebooks",
        "static scales",
        "attention history",
        "host layers",
        "host copy",
    }
)


class Memory(BaseModel):
    """What a cache held."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    """Per batch row."""
    device_bytes: int
    host_bytes: int
    exact_bytes: int
    bits_per_element: float
    """Device bits per key or value number as held: exact tail, metadata and spare capacity included."""
    packed_bits_per_element: float
    """The same of the packed part alone, to which long contexts converge."""
    ratio: float
    """How many times smaller than the unquantized cache in the model's dtype."""


class LayerBits(BaseModel):
    """Bits per number of the packed part of one layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    key: float
    value: float


def weigh(cache: Cache, model: Any, batch: int) -> tuple[MemoryReport, Memory]:
    """Bytes of the storages behind a cache that holds `batch` rows, by kind and summed up."""
    report = cache.memory() if isinstance(cache, PackedCache) else _stock_report(cache, model, batch)
    return report, summarize(report)


def summarize(report: MemoryReport) -> Memory:
    """The figures of a row."""
    return Memory(
        tokens=report.tokens,
        device_bytes=report.device_bytes,
        host_bytes=report.host_bytes,
        exact_bytes=report.exact_bytes,
        bits_per_element=report.bits_per_element,
        packed_bits_per_element=packed_bits(report),
        ratio=report.ratio,
    )


def packed_bits(report: MemoryReport) -> float:
    """Device bits per number of the packed part alone; 0 where nothing is packed."""
    exact = sum(report.rows.get(name, 0) for name in ("tail", "sinks", "host layers"))
    share = 1 - exact / report.exact_bytes if report.exact_bytes else 0.0
    packed = sum(size for name, size in report.rows.items() if name not in UNPACKED_ROWS)
    return 8 * packed / (report.elements * share) if packed and share > 0 else 0.0


def bits_by_layer(cache: Cache) -> tuple[LayerBits, ...]:
    """Of the packed part of each layer that a strategy packs; nothing for caches of transformers."""
    found = []
    for layer in cache.layers if isinstance(cache, PackedCache) else ():
        if not isinstance(layer, PackedLayer) or not layer.packed_tokens:
            continue
        rows = layer.used_bytes()
        numbers = layer.elements() * layer.packed_tokens / layer.get_seq_length()
        total = layer.head_dim + layer.value_dim
        sizes = {
            side: 8
            * sum(size for name, size in rows.items() if name.startswith(f"{side} ") and name not in UNPACKED_ROWS)
            / (numbers * dim / total)
            for side, dim in (("key", layer.head_dim), ("value", layer.value_dim))
        }
        found.append(LayerBits(index=layer.index, **sizes))
    return tuple(found)


def held_bytes(cache: Cache) -> int:
    """Bytes of all storages behind a cache of ours or of transformers."""
    if isinstance(cache, PackedCache):
        report = cache.memory()
        return report.device_bytes + report.host_bytes
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for tensor in plain_tensors(list(vars(layer).values())):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def plain_tensors(value: Any) -> list[Tensor]:
    """The tensors that own memory inside `value`: wrapper subclasses, such as quanto's, hold others."""
    if isinstance(value, dict):
        return plain_tensors(list(value.values()))
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in plain_tensors(item)]
    if not isinstance(value, Tensor):
        return []
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
    return [tensor for name in names for tensor in plain_tensors(getattr(value, name))]


def _stock_report(cache: Cache, model: Any, batch: int) -> MemoryReport:
    """A cache of transformers says only how many tokens it has seen; what it holds of them is counted."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    elements = 0
    for layer in cache.layers:
        if isinstance(layer, QuantizedLayer):
            # packed tensors do not show what they stand for; no layer of such a cache slides
            elements += 2 * batch * heads * size * int(layer.get_seq_length())
        else:
            states = plain_tensors([getattr(layer, "keys", None), getattr(layer, "values", None)])
            elements += sum(tensor.numel() for tensor in states)
    held = held_bytes(cache)
    return MemoryReport(
        tokens=int(cache.get_seq_length()),
        elements=elements,
        exact_bytes=elements * model.dtype.itemsize,
        device_bytes=held,
        host_bytes=0,
        rows={"cache": held},
    )
