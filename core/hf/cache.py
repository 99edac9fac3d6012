"""The packed cache: a transformers `Cache` whose full-attention layers hold what a strategy makes of them."""

import inspect
import os
import warnings
from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ...kernels.format import LayerFormat, MixedFormat
from ..adaptive import AdaptiveStrategy
from ..calibration.artifact import Calibration
from ..memory import MemoryReport, tensors_in
from ..protocol import CacheQuantizer, LayerSpec
from .adaptive import AdaptiveLayer, Council
from .attach import attach, attention_modules
from .blocks import BlockLayer
from .compat import tokens_to_remove
from .identity import identity
from .layer import CacheOptions, PackedLayer
from .persist import load, save
from .rope import RotaryTables
from .split import split_heads


class PackedCache(Cache):
    """A cache to pass as `past_key_values`, holding quantized keys and values as packed bytes.

    Constructing it attaches to the model: our attention function, which reads packed bytes, becomes its attention
    implementation (`detach(model)` undoes it). Everything else about the model and `generate` stays as it is: beams,
    sampling, padded batches, chunked prefill, several turns, assisted decoding.

    A forward reads packed what was packed before it, and its own tokens exact; so the first one is unquantized. Layers
    that are not full attention (sliding window, linear, hybrid) keep the host's own layer.

    model: a decoder-only transformers model.
    strategy: from `registry.get(name)(...)`, or any `CacheQuantizer`.
    residual_length: newest tokens kept exact, 128 by default; up to `block - 1` more wait there to fill a block.
    sink_tokens: first real tokens of each batch row kept exact, 0 by default; in 16 bits by strategies that give tokens
        widths of their own.
    skip_layers: indices of layers to leave exact, `-1` being the last.

    Where an option is not given, what the strategy asks for (`strategy.cache_options()`) takes the default's place.

    Raises ValueError for encoder-decoder models, for layers that do not exist, and for shapes the strategy refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        strategy: CacheQuantizer,
        *,
        residual_length: int | None = None,
        sink_tokens: int | None = None,
        skip_layers: Iterable[int] | None = None,
    ) -> None:
        if isinstance(strategy, type) or not isinstance(strategy, CacheQuantizer):
            raise TypeError(
                f"strategy must be an instance of a CacheQuantizer, such as registry.get('uniform')(bits=4), "
                f"got {strategy!r}"
            )
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder model; PackedCache serves decoder-only models"
            )
        self.strategy = strategy
        skipped = None if skip_layers is None else tuple(skip_layers)
        given = {"residual_length": residual_length, "sink_tokens": sink_tokens, "skip_layers": skipped}
        given = {name: option for name, option in given.items() if option is not None}
        self.options = CacheOptions(**{**strategy.cache_options(), **given})
        self._require_ready(model)
        config = model.config.get_text_config(decoder=True)
        host = DynamicCache(config=config).layers
        if not host:
            raise ValueError(
                f"transformers plans no cache layers for {type(model).__name__}; update it (older versions plan none "
                "where num_kv_shared_layers is 0) or check the model's configuration"
            )
        skipped = {_layer_index(index, len(host)) for index in self.options.skip_layers}
        # layers that borrow another layer's keys and values are never written
        borrowing = getattr(config, "num_kv_shared_layers", 0) or 0
        self.rotary_tables = RotaryTables()
        self._council = Council()
        layers = [
            self._layer(strategy, index, len(host), self.options, self.rotary_tables)
            if type(layer) is DynamicLayer and index not in skipped and index < config.num_hidden_layers - borrowing
            else layer
            for index, layer in enumerate(host)
        ]
        super().__init__(layers=layers)
        if not self.packed_layers:
            warnings.warn(
                f"no layer of {type(model).__name__} can be packed (none has full attention, or all are skipped): "
                "this cache holds what the stock one would",
                stacklevel=2,
            )
        self.model_identity = identity(model)
        self._ask_strategy(model)
        attach(model)

    def _require_ready(self, model: PreTrainedModel) -> None:
        self.strategy.require_model(model)

    def _layer(self, *arguments: Any) -> PackedLayer:
        if isinstance(self.strategy, AdaptiveStrategy):
            return AdaptiveLayer(self._council, *arguments)
        return BlockLayer(*arguments)

    @property
    def packed_layers(self) -> list[PackedLayer]:
        """The layers that a strategy packs."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the states of one layer; returns lazy handles for packed layers.

        Raises RuntimeError when an earlier forward was interrupted between two layers.
        """
        packed = self.packed_layers
        if packed and packed[0].index == layer_idx:
            self._require_aligned(packed)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def memory(self) -> MemoryReport:
        """What is held right now, counted from storages."""
        rows: dict[str, int] = {}
        host_rows: dict[str, int] = {}
        elements = exact = host = 0
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                for found, sizes in ((rows, layer.used_bytes()), (host_rows, layer.host_bytes())):
                    for name, size in sizes.items():
                        found[name] = found.get(name, 0) + size
                elements += layer.elements()
                exact += layer.elements() * layer.dtype.itemsize if layer.is_initialized else 0
            else:
                held = sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(vars(layer)))
                states = tensors_in([getattr(layer, "keys", None), getattr(layer, "values", None)])
                elements += sum(tensor.numel() for tensor in states)
                host += held
                exact += held  # the stock cache holds the same
        rows["rope"] = self.rotary_tables.held_bytes()
        rows["host layers"] = host
        return MemoryReport(
            tokens=int(self.get_seq_length()),
            elements=elements,
            exact_bytes=exact,
            device_bytes=sum(rows.values()),
            host_bytes=sum(host_rows.values()),
            rows={**rows, **host_rows},
        )

    def transferred_bytes(self) -> dict[str, int]:
        """Bytes copied `to_host` and `from_host` since the cache was filled, by strategies that keep exact copies."""
        copies = [layer.host for layer in self.layers if isinstance(layer, AdaptiveLayer) and layer.host is not None]
        return {name: sum(getattr(copy, name) for copy in copies) for name in ("to_host", "from_host")}

    # ---- changes of batch and length reach the rotary tables too ---------------------------------------------------

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; also mends a cache whose last forward was interrupted.

        Raises ValueError when a layer that is not packed cannot be cut to that length.
        """
        # the host's layers first: they may refuse
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PackedLayer) or not isinstance(layer, CacheLayerMixin):
                continue
            if layer.get_seq_length() <= length:
                continue
            try:
                layer.crop(tokens_to_remove(layer.get_seq_length(), length))  # type: ignore[attr-defined]
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"layer {index} cannot be cut to {length} tokens: {error}; reset the cache") from error
        for layer in self.packed_layers:
            layer.truncate(length)
        self._cut_rotary_tables()

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers: `crop(-k)` removes the newest `k` tokens."""
        super().crop(tokens_to_remove)
        self._cut_rotary_tables()

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.rotary_tables.by_kind.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes the old row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.rotary_tables.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self.rotary_tables.map(
            lambda tensor: tensor[indices.to(tensor.device) if isinstance(indices, Tensor) else indices]
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.rotary_tables.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    # ---- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file with a JSON header; see `core/hf/persist.py`."""
        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel, strategy: CacheQuantizer) -> Self:
        """Read a cache written by `save`, for the same model and strategy.

        Raises ValueError naming what differs, or that the file is damaged.
        """
        return load(cls, path, model, strategy)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _ask_strategy(self, model: PreTrainedModel) -> None:
        """Ask about every layer with the shapes its module declares, so that a misfit shows before a forward."""
        modules = attention_modules(model)
        split = split_heads(model, modules)
        for layer in self.packed_layers:
            layer.split = split.get(layer.index)
            module = modules.get(layer.index)
            # latent attention caches other tensors than its heads: asked at its first update
            if module is None or hasattr(module, "kv_lora_rank"):
                continue
            spec = _declared_shape(module, model.config.get_text_config(decoder=True), layer.index, len(self.layers))
            formats = self.strategy.formats(spec)
            self._require_served(formats)
            if isinstance(formats, MixedFormat):
                formats.require_fitting(spec.head_dim, spec.value_dim, spec.kv_heads)
                if layer.split is not None:
                    self._require_heads_apart(formats, layer.split.processes)
            elif formats is not None:
                formats.require_fitting(spec.head_dim, spec.value_dim)
            if isinstance(layer, AdaptiveLayer):
                layer.packs = formats is not None
            layer.before_rope = isinstance(formats, LayerFormat) and formats.key.rope == "pre"
            if layer.before_rope and "position_embeddings" not in inspect.signature(type(module).forward).parameters:
                raise ValueError(
                    f"{self.strategy!r} stores keys before RoPE, but {type(module).__name__} takes no "
                    "position_embeddings (cos, sin); use a strategy that stores keys after RoPE"
                )

    def _require_served(self, formats: LayerFormat | MixedFormat | None) -> None:
        """Raise ValueError for formats that a kind of cache cannot hold."""

    def _require_heads_apart(self, formats: MixedFormat, processes: int) -> None:
        """Raise ValueError where widths depend on heads that other processes hold."""
        strategy = self.strategy
        if formats.heads == "together" or (isinstance(strategy, AdaptiveStrategy) and strategy.together):
            raise ValueError(
                f"{strategy.name!r} with these settings decides for all heads of a token together, but the heads of "
                f"this model are split over {processes} processes. Use settings by which every head decides for itself "
                "(granularity='head' of qaq), or device_map instead of tensor parallelism"
            )
        if isinstance(getattr(strategy, "calibration", None), Calibration):
            raise ValueError(
                f"{strategy.name!r} has a calibration of all heads, but the heads of this model are split over "
                f"{processes} processes. Leave the calibration out, so that the prompt is measured, or give query_norm"
            )

    def _cut_rotary_tables(self) -> None:
        self.rotary_tables.truncate(max((layer.get_seq_length() for layer in self.packed_layers), default=0))

    def _require_aligned(self, packed: list[PackedLayer]) -> None:
        lengths = {layer.index: layer.get_seq_length() for layer in packed}
        shortest = min(lengths.values())
        if shortest != max(lengths.values()):
            behind = [index for index, length in lengths.items() if length == shortest]
            raise RuntimeError(
                f"an earlier forward was interrupted: layers {behind} hold {shortest} tokens, others "
                f"{max(lengths.values())}. Call cache.truncate({shortest}) to drop what was half written"
            )


def _declared_shape(module: Any, config: Any, index: int, layers: int) -> LayerSpec:
    """What a module says of its heads; the tensors that arrive may be fewer (tensor parallelism), never others."""
    config = getattr(module, "config", config)
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    projection = getattr(module, "k_proj", None)
    heads = getattr(projection, "out_features", 0) // head_dim or getattr(module, "num_key_value_heads", None)
    return LayerSpec(index, layers, heads or config.num_attention_heads, head_dim, head_dim)


def _layer_index(index: int, layers: int) -> int:
    if not -layers <= index < layers:
        raise ValueError(f"skip_layers names layer {index}, the model has layers 0 to {layers - 1}")
    return index % layers
