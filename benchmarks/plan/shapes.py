"""What a model's cache is made of: its layers and its weights, from the config alone.

The model is built on the meta device, where tensors have shapes and no memory, and reads a few tokens there: the shapes
of keys and values are those that arrive, of whatever attention.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from ...core.hf.attach import attention_modules
from ...core.memory import tensors_in
from .. import reference
from ..errors import Unusable, message

LLAMA: Mapping[str, Any] = {"model_type": "llama", "vocab_size": 32000, "dtype": "float16"}
LLAMA_3: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


def _llama(base: Mapping[str, Any], hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**base, **sizes, "num_attention_heads": heads, **more}


NAMED: dict[str, dict[str, Any]] = {
    "llama-7b": _llama(LLAMA, 4096, 11008, 32, 32),
    "llama-13b": _llama(LLAMA, 5120, 13824, 40, 40),
    "llama-30b": _llama(LLAMA, 6656, 17920, 60, 52),
    "llama-65b": _llama(LLAMA, 8192, 22016, 80, 64),
    "llama-2-7b": _llama(LLAMA, 4096, 11008, 32, 32, max_position_embeddings=4096),
    "llama-2-13b": _llama(LLAMA, 5120, 13824, 40, 40, max_position_embeddings=4096),
    "llama-2-70b": _llama(LLAMA, 8192, 28672, 80, 64, max_position_embeddings=4096, num_key_value_heads=8),
    "llama-3-8b": _llama(LLAMA_3, 4096, 14336, 32, 32),
    "llama-3-70b": _llama(LLAMA_3, 8192, 28672, 80, 64),
    "llama-3.1-8b": _llama(LLAMA_3, 4096, 14336, 32, 32, max_position_embeddings=131072),
    "llama-3.1-70b": _llama(LLAMA_3, 8192, 28672, 80, 64, max_position_embeddings=131072),
    "mistral-7b": _llama(LLAMA_3, 4096, 14336, 32, 32, model_type="mistral", vocab_size=32000, sliding_window=4096),
}
"""Models that need no file, as the fields of their configs."""

ROWS = 3
"""Of the batch that is read on the meta device, to tell what holds one row from what is shared by all."""
FIRST, SECOND = 2, 4
"""Tokens that are read there, to tell what grows."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rope(_Data):
    """The rotary angles a layer is given."""

    kind: str
    """Layers of one kind share a table."""
    numbers: int
    """Of a token's cosines, and of its sines, as a table keeps them: half of them where halves are equal."""
    itemsize: int


class LayerShape(_Data):
    """What one layer caches. kv_heads and dims are those of the tensors that arrive at the cache; 0: none do."""

    index: int
    kind: Literal["full", "sliding", "other", "borrowed"]
    """full: a strategy may pack it. sliding, other: the host's own layer. borrowed: it reads another layer's."""
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    query_heads: int = 0
    window: int | None = None
    """Tokens that the host keeps; None: all."""
    latent: bool = False
    """Whether it caches a latent that all heads share, which tensor parallelism does not split."""
    rope: Rope | None = None
    """None where keys before RoPE cannot be had."""
    row_bytes: int = 0
    """Beside keys and values, per batch row: recurrent and convolution states."""
    row_token_bytes: int = 0
    """The same for each token."""
    shared_bytes: int = 0
    """Whatever the batch."""

    @property
    def numbers(self) -> int:
        """Key and value numbers of a token."""
        return self.kv_heads * (self.head_dim + self.value_dim)


class ModelShape(_Data):
    """A model as its cache and its device see it."""

    name: str
    architecture: str
    dtype: str
    parameters: int
    positions: int | None
    layers: tuple[LayerShape, ...]
    notes: tuple[str, ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the model, and of its exact cache."""
        return getattr(torch, self.dtype).itemsize

    @property
    def weights(self) -> int:
        """Bytes of the parameters in its dtype."""
        return self.parameters * self.itemsize


def read_config(name: str | None) -> tuple[str, Any]:
    """What to call the model, and its config: of a named shape, a folder, a hub repository; None: the reference.

    Raises Unusable.
    """
    if name in NAMED:
        settings = dict(NAMED[name])
        return name, AutoConfig.for_model(settings.pop("model_type"), **settings)
    source: str | Path = reference.FOLDER if name is None else Path(name).expanduser()
    label = "reference" if name is None else str(name)
    if name is not None and not Path(source).exists():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            known = ", ".join(NAMED)
            raise Unusable(
                f"there is no folder {name!r}; give one with config.json, a hub name owner/model, or one of {known}",
                "--model",
            )
        source = name
    elif isinstance(source, Path) and source.is_dir() and not (source / "config.json").is_file():
        raise Unusable(f"{source} holds no config.json", "--model")
    try:
        return label, AutoConfig.from_pretrained(source)
    except Exception as error:
        # from_pretrained raises whatever hub and file readers raise
        raise Unusable(f"cannot read the config of {name}: {message(error)}", "--model") from error


def shape_of(name: str, config: Any, dtype: str | None = None) -> ModelShape:
    """The shape of a model in `dtype`; None: the config's own, bfloat16 where that is none of three.

    Raises Unusable for models that are not decoders, or that transformers cannot build.
    """
    if config.is_encoder_decoder:
        raise Unusable(f"{name} is an encoder-decoder model; a packed cache serves decoder-only models", "--model")
    text = config.get_text_config(decoder=True)
    dtype = dtype or _own_dtype(config, text)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is slow without an extension is not run
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(_timeless(config), dtype=getattr(torch, dtype))
        if getattr(model, "_can_set_experts_implementation", lambda: False)():
            model.set_experts_implementation("batched_mm")  # the others are of some dtypes only, or look at numbers
        second = _cached(model, text, SECOND)
        holding = any(_beside(layer)[0] for layer in second.layers)
        first = _cached(model, text, FIRST) if holding else second
    except Exception as error:
        # model code raises whatever it likes
        raise Unusable(f"transformers cannot build {name} from its config: {message(error)}", "--model") from error
    finally:
        logging.set_verbosity(verbosity)
    quantized = getattr(config, "quantization_config", None)
    notes = (
        [
            "the config says that its weights are quantized, which is not counted: they are taken as "
            f"{dtype}; give their size with --weights"
        ]
        if quantized
        else []
    )
    return ModelShape(
        name=name,
        architecture=type(model).__name__,
        dtype=dtype,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        positions=getattr(text, "max_position_embeddings", None),
        layers=_layers(model, text, first, second),
        notes=tuple(notes),
    )


def _timeless(config: Any) -> Any:
    """The config without what looks at ids and positions, of which there are none: shapes do not depend on it."""

    def settled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {name: settled(each) for name, each in value.items()}
        return {**kept, "rope_type": "default"} if kept.get("rope_type") in ("dynamic", "longrope") else kept

    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    if hasattr(text, "rope_parameters"):
        text.rope_parameters = settled(text.rope_parameters)
    for each in (config, text):
        each.pad_token_id = None
    return config


def _own_dtype(config: Any, text: Any) -> str:
    own = str(getattr(config, "dtype", None) or getattr(text, "dtype", None)).removeprefix("torch.")
    return own if own in ("float32", "bfloat16", "float16") else "bfloat16"


class _Cached(NamedTuple):
    """The host's cache after a forward, and the angles that attention was given, by layer."""

    layers: list[Any]
    angles: dict[int, tuple[Tensor, Tensor]]


def _cached(model: Any, text: Any, tokens: int) -> _Cached:
    angles: dict[int, tuple[Tensor, Tensor]] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("position_embeddings")
        if isinstance(given, tuple) and len(given) == 2 and all(isinstance(t, Tensor) for t in given):
            angles[module.layer_idx] = given

    modules = attention_modules(model).values()
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    cache = DynamicCache(config=text)
    with torch.no_grad():
        model(torch.zeros(ROWS, tokens, dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    return _Cached(list(cache.layers), angles)


def _layers(model: Any, text: Any, first: _Cached, second: _Cached) -> tuple[LayerShape, ...]:
    modules = attention_modules(model)
    equal = _equal_halves(model)
    return tuple(
        _layer(index, text, modules.get(index), before, after, second.angles.get(index), equal)
        for index, (before, after) in enumerate(zip(first.layers, second.layers, strict=True))
    )


def _layer(
    index: int, text: Any, module: Any, first: Any, second: Any, angles: tuple[Tensor, Tensor] | None, equal: bool
) -> LayerShape:
    keys, values = (getattr(second, name, None) for name in ("keys", "values"))
    before, after = _beside(first), _beside(second)
    per_token = (after[0] - before[0]) // (SECOND - FIRST)
    shape = LayerShape(
        index=index,
        kind="borrowed" if type(second) is DynamicLayer else "other",
        row_bytes=before[0] - per_token * FIRST,
        row_token_bytes=per_token,
        shared_bytes=after[1],
    )
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.ndim != 4:
        return shape
    window = getattr(second, "sliding_window", None)
    latent = hasattr(module, "kv_lora_rank")
    holding = {
        "kind": "full" if type(second) is DynamicLayer else "sliding" if window is not None else "other",
        "kv_heads": keys.shape[1],
        "head_dim": keys.shape[3],
        "value_dim": values.shape[3],
        "query_heads": text.num_attention_heads,
        "window": window,
        "latent": latent,
        "rope": None if latent or angles is None else _rope(module, angles[0], equal),
    }
    return shape.model_copy(update=holding)


def _beside(layer: Any) -> tuple[int, int]:
    """Bytes that a host layer holds beside keys and values: of one row of the batch, and of all together."""
    rows = shared = 0
    for name, value in vars(layer).items():
        if name in ("keys", "values"):
            continue
        for tensor in tensors_in(value):
            held = tensor.untyped_storage().nbytes()
            if tensor.ndim and tensor.shape[0] == ROWS:
                rows += held // ROWS
            else:
                shared += held
    return rows, shared


def _rope(module: nn.Module, cos: Tensor, equal: bool) -> Rope | None:
    if cos.is_complex():
        return None
    kind = getattr(module, "layer_type", None) or ("sliding" if getattr(module, "is_sliding", False) else "full")
    numbers = cos.shape[-1] // 2 if equal and cos.shape[-1] % 2 == 0 else cos.shape[-1]
    return Rope(kind=str(kind), numbers=numbers, itemsize=cos.dtype.itemsize)


def _equal_halves(model: nn.Module) -> bool:
    """Whether both halves of a token's angles are equal, as they are unless neighbouring channels turn together."""
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding") and hasattr(module, "config"):
            try:
                with torch.device("cpu"):
                    cos, _ = type(module)(module.config)(torch.zeros(1, 2, 1), torch.arange(2)[None])
            except (TypeError, ValueError, KeyError, AttributeError):
                continue  # one of those that want to know for which kind of layer; their halves are equal
            return torch.equal(*cos.chunk(2, dim=-1)) if cos.shape[-1] % 2 == 0 else False
    return True
