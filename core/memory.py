"""What a cache really holds, counted from storages."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor


class MemoryReport(BaseModel):
    """Bytes held by a cache, one row per kind.

    Printing it gives a table. `rows` maps a kind ("key codes", "value scales", "key outliers", "codebooks",
    "static scales", "tail", "sinks", "cut block", "rope", "spare", "host layers") to bytes; they add up to
    `device_bytes + host_bytes`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    """Tokens cached per batch row."""
    elements: int
    """Key and value numbers that these tokens stand for, over batch, layers and heads."""
    exact_bytes: int
    """What the same tokens take unquantized in the model's dtype."""
    device_bytes: int
    """Bytes held where the model computes."""
    host_bytes: int
    """Bytes of copies kept in host memory by strategies that re-quantize."""
    rows: dict[str, int]

    @property
    def bits_per_element(self) -> float:
        """Device bits per cached number, everything included; 0 for an empty cache."""
        return 8 * self.device_bytes / self.elements if self.elements else 0.0

    @property
    def ratio(self) -> float:
        """How many times smaller than the unquantized cache; 1 for an empty cache."""
        return self.exact_bytes / self.device_bytes if self.device_bytes else 1.0

    def __str__(self) -> str:
        width = max([len(name) for name in self.rows] + [len("total")])
        lines = [f"{name:<{width}}  {size:>14,} B" for name, size in self.rows.items() if size]
        total = self.device_bytes + self.host_bytes
        lines.append(f"{'total':<{width}}  {total:>14,} B")
        summary = f"{self.tokens:,} tokens, {self.bits_per_element:.2f} bits per element, {self.ratio:.2f}x smaller"
        return "\n".join([summary, *lines])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in `value`, looking into dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
