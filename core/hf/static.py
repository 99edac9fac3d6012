"""The static cache: packed, in memory allocated once, so that decoding compiles to one graph."""

from collections.abc import Iterable
from typing import Any, ClassVar, Never

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ...kernels.format import LayerFormat, MixedFormat
from ..adaptive import AdaptiveStrategy
from ..protocol import CacheQuantizer, LayerSpec, Strategy
from .attach import attention_modules
from .attention import IMPLEMENTATION
from .blocks import EXACT
from .cache import PackedCache
from .layer import PackedLayer
from .static_layer import StaticPackedLayer


class StaticPackedCache(PackedCache):
    """A `PackedCache` for at most `max_length` tokens whose decode step compiles: `torch.compile(model.forward)`.

    Run the prompt through the model itself and the tokens that follow, one of each row at a time, through the compiled
    model: one graph, which a CUDA graph can replay. What is packed when, and so every logit, is as in a `PackedCache`
    with the same options, but for the rounding of sums. `generate` works too, and compiles by itself on a GPU.

    max_length: tokens that fit, prompt included. More raise ValueError where the host counts them: in prompts, and in
        steps on the CPU that are not compiled. Other steps beyond it store nothing and set a flag that
        `require_sound` and the next prompt look at.

    The other options, and what is attached to the model, are as for `PackedCache`. The same cache serves text after
    text after `reset()`, in the same memory; its batch size may change only then.

    Raises ValueError, beside what `PackedCache` refuses, for strategies that decide widths while decoding, bring their
    own encoder or bytes, or store keys before RoPE, and for models with layers that have no fixed size: `PackedCache`
    serves all of these.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        strategy: CacheQuantizer,
        *,
        max_length: int,
        residual_length: int | None = None,
        sink_tokens: int | None = None,
        skip_layers: Iterable[int] | None = None,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length={max_length}: a static cache is made for at least one token")
        if isinstance(strategy, AdaptiveStrategy):
            raise ValueError(
                f"{strategy.name!r} gives tokens new widths while decoding, which has no fixed size; use PackedCache"
            )
        self.max_length = max_length
        super().__init__(
            model, strategy, residual_length=residual_length, sink_tokens=sink_tokens, skip_layers=skip_layers
        )
        self._config = model.config.get_text_config(decoder=True)
        self.layers = self._static_layers(self.layers)
        self._first = next(iter(self._fixed_layers()), None)

    def _layer(self, *arguments: Any) -> PackedLayer:
        return StaticPackedLayer(self.max_length, *arguments)

    def _static_layers(self, layers: list[Any]) -> list[Any]:
        """`layers` with a fixed size for those that no strategy packs."""
        hosts = StaticCache(config=self._config, max_cache_len=self.max_length).layers
        static = []
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                # all layers of full attention share a mask, so all have to hold as many tokens
                layer = StaticPackedLayer(
                    self.max_length, _Exact(), index, len(layers), self.options, self.rotary_tables
                )
            elif not isinstance(layer, PackedLayer):
                layer = hosts[index]
            if not layer.is_compileable:
                raise ValueError(
                    f"layer {index} ({type(layer).__name__}) has no fixed size that compiles; use PackedCache"
                )
            static.append(layer)
        return static

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store the states of one layer; returns what our attention function reads."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, StaticPackedLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        if self._config._attn_implementation != IMPLEMENTATION:
            raise RuntimeError(
                f"a static cache is read by the attention implementation {IMPLEMENTATION!r}; the model now uses "
                f"{self._config._attn_implementation!r}. Call attach(model)"
            )
        first = layer is self._first
        if key_states.shape[2] == 1 and layer.frozen and (not first or self._all_frozen()):
            return layer.update(key_states, value_states)
        if not first or torch.compiler.is_compiling():
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        for each in self._fixed_layers():
            each.require_sound()
            each.thaw()
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception:
            # refused, so everything is as it was; after an interrupted forward layers stay apart, to be noticed again
            if len({each.get_seq_length() for each in self._fixed_layers()}) == 1:
                for each in self._fixed_layers():
                    each.freeze()
            raise

    def require_sound(self) -> None:
        """Raise RuntimeError if steps went beyond `max_length`. Waits for the device."""
        for layer in self._fixed_layers():
            layer.require_sound()

    # ---- changes between forwards ------------------------------------------------------------------------------------

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; also mends a cache whose last forward was interrupted or went too far.

        Raises ValueError for a cut inside a packed block, and where a layer that is not packed cannot be cut.
        """
        self._require_croppable()
        super().truncate(length)

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers: `crop(-k)` removes the newest `k` tokens. Raises ValueError as `truncate` does."""
        self._require_croppable()
        super().crop(tokens_to_remove)

    def save(self, path: Any) -> Never:
        """Refused: raises NotImplementedError."""
        raise NotImplementedError("a static cache is not written to files; use PackedCache for caches to keep")

    @classmethod
    def load(cls, path: Any, model: PreTrainedModel, strategy: CacheQuantizer) -> Never:
        """Refused: raises NotImplementedError."""
        raise NotImplementedError("a static cache is not read from files; use PackedCache.load")

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _require_ready(self, model: PreTrainedModel) -> None:
        super()._require_ready(model)
        if any(hasattr(module, "kv_lora_rank") for module in attention_modules(model).values()):
            raise ValueError(
                f"{type(model).__name__} caches latents and expands them itself, where a static cache has no tensors "
                "to give; use PackedCache"
            )

    def _require_served(self, formats: LayerFormat | MixedFormat | None) -> None:
        if not isinstance(formats, LayerFormat):
            return
        if formats.key.rope == "pre":
            raise ValueError(
                f"{self.strategy!r} stores keys before RoPE, which a static cache does not read; use PackedCache, or a "
                "strategy that stores keys after RoPE"
            )
        if "custom" in (formats.key.codes, formats.value.codes):
            raise ValueError(
                f"{self.strategy!r} stores bytes of its own, which only its own functions read; use PackedCache"
            )

    def _require_croppable(self) -> None:
        for index, layer in enumerate(self.layers):
            if isinstance(layer, CacheLayerMixin) and not isinstance(layer, PackedLayer):
                raise ValueError(
                    f"layer {index} ({type(layer).__name__}) cannot be cut; use PackedCache, or reset the cache"
                )

    def _fixed_layers(self) -> list[StaticPackedLayer]:
        return [layer for layer in self.layers if isinstance(layer, StaticPackedLayer)]

    def _all_frozen(self) -> bool:
        return all(layer.frozen for layer in self._fixed_layers())


class _Exact(Strategy):
    """What skipped layers are given."""

    name: ClassVar[str] = "exact"

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return EXACT
