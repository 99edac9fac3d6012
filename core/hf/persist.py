"""A packed cache as one file: safetensors for the bytes, JSON in its header for everything else. No pickle."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..protocol import CacheQuantizer, Strategy
from .attach import attention_modules
from .compat import computes_on
from .identity import identity
from .layer import PackedLayer
from .rope import RotaryTable

if TYPE_CHECKING:
    from .cache import PackedCache

Loaded = TypeVar("Loaded", bound="PackedCache")

FILE_VERSION = 3


def save(cache: "PackedCache", path: str | os.PathLike[str]) -> None:
    """Write `cache` to `path`, replacing the file only when it is complete.

    Raises TypeError when a layer of the host's own holds something that is neither a tensor nor plain data.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PackedLayer):
            values, states = layer.state()
            tensors.update({f"{index}.{name}": tensor for name, tensor in states.items()})
            layers.append({"packed": values})
        else:
            layers.append({"host": _freeze(vars(layer), f"{index}.host", tensors)})
    tables = []
    for (kind, _), table in cache.rotary_tables.by_kind.items():
        tensors.update({f"rope.{len(tables)}.{name}": tensor for name, tensor in table.tensors().items()})
        tables.append({"kind": kind, "halved": table.halved})
    header = _Header(
        version=FILE_VERSION,
        model=cache.model_identity,
        strategy=_describe(cache.strategy),
        options=cache.options.model_dump(mode="json"),
        layers=layers,
        tables=tables,
    )
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(
            {name: t.contiguous() for name, t in tensors.items()}, partial, {"cachequant": header.model_dump_json()}
        )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(kind: type[Loaded], path: str | os.PathLike[str], model: PreTrainedModel, strategy: CacheQuantizer) -> Loaded:
    """The cache that `save` wrote, as a `kind` of PackedCache, on the model's devices.

    Raises FileNotFoundError, and ValueError for a damaged file, another file version, model, or strategy.
    """
    header, tensors = _read(Path(path))
    if header.version != FILE_VERSION:
        raise ValueError(
            f"{path} has file version {header.version}, this cachequant reads version {FILE_VERSION}; "
            "run the prompt again"
        )
    _require_equal(f"{path} was saved from another model", header.model, identity(model))
    _require_equal(f"{path} was saved with another strategy", header.strategy, _describe(strategy))
    cache = kind(model, strategy, **header.options)
    devices = {index: computes_on(module) for index, module in attention_modules(model).items()}
    try:
        _fill(cache, header, tensors, devices, computes_on(model))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; run the prompt again") from error
    return cache


def _fill(
    cache: "PackedCache", header: "_Header", tensors: dict[str, Tensor], devices: dict[int, Any], default: Any
) -> None:
    for index, layer in enumerate(cache.layers):
        saved = header.layers[index]
        device = devices.get(index, default)
        mine = {n.removeprefix(f"{index}."): t.to(device) for n, t in tensors.items() if n.startswith(f"{index}.")}
        if isinstance(layer, PackedLayer):
            layer.restore(saved["packed"], mine)
        else:
            vars(layer).update(_thaw(saved["host"], {n: t.to(device) for n, t in tensors.items()}, device))
    for number, saved in enumerate(header.tables):
        prefix = f"rope.{number}."
        # every device that serves this kind of layer needs the table
        for device in {devices.get(layer.index, default) for layer in cache.packed_layers}:
            named = {n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}
            cache.rotary_tables.by_kind[(saved["kind"], str(device))] = RotaryTable.restore(named, saved["halved"])


def _describe(strategy: CacheQuantizer) -> dict[str, Any]:
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"a cache of {strategy!r} cannot be saved or loaded: its settings are unknown; derive it from Strategy"
        )
    return strategy.describe()


class _Header(BaseModel):
    """The JSON beside the tensors."""

    model_config = ConfigDict(frozen=True)

    version: int
    model: dict[str, Any] = {}
    strategy: dict[str, Any] = {}
    options: dict[str, Any] = {}
    layers: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"no cache file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); run the prompt again") from error
    if "cachequant" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not one that PackedCache.save wrote")
    try:
        return _Header.model_validate_json(metadata["cachequant"]), tensors
    except ValidationError as error:
        raise ValueError(f"the header of {path} is damaged ({error}); run the prompt again") from error


def _require_equal(what: str, saved: dict[str, Any], given: dict[str, Any]) -> None:
    names = [name for name in {**saved, **given} if saved.get(name) != given.get(name)]
    if names:
        differences = "; ".join(f"{name}: {saved.get(name)!r} in the file, {given.get(name)!r} here" for name in names)
        raise ValueError(f"{what}: {differences}")


def _freeze(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON for the attributes of a host layer; tensors go to `tensors` under `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _freeze(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_freeze(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"{name} holds a {type(value).__name__}, which a cache file cannot keep; run the prompt again")


def _thaw(frozen: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Any:
    """The inverse of `_freeze`, on `device`."""
    ((kind, content),) = frozen.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _thaw(item, tensors, device) for key, item in content}
    if kind == "list":
        return [_thaw(item, tensors, device) for item in content]
    if kind == "dtype":
        return getattr(torch, content)
    return device if kind == "device" else content
