"""A cache that stores nothing and shows what passes: states as a strategy would store them, gradients, and queries."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...kernels.format import MixedFormat, Side
from ..protocol import CacheQuantizer, LayerSpec
from .blocks import BlockLayer
from .cache import PackedCache
from .handles import LazyStates
from .layer import SIDES, PackedLayer
from .segments import Scoring, fold

Observer = Callable[["TapLayer", Side, Tensor, Tensor | None], None]
"""`(layer, side, states [batch, kv_heads, tokens, dim], gradient of the same shape or None)`."""
QueryObserver = Callable[["TapLayer", Tensor], None]
"""`(layer, query [batch, kv_heads, query_heads_per_kv_head, tokens, head_dim])`, after RoPE and scaled."""


class TapCache(PackedCache):
    """Pass to one forward over whole sequences; attention is exact.

    observe: called for every side of every layer that `strategy` packs; keys come before RoPE where its format says so.
    gradients: call it during the backward pass, with the gradient of what `backward` is called on; every number keeps
        its own. Only what leads to keys and values needs to be differentiable: parameters may be frozen.
    observe_query: called whenever attention reads one of these layers, more than once where layers share their keys;
        never where a model uses its keys before attention is called, as multi-head latent attention does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        strategy: CacheQuantizer,
        observe: Observer,
        *,
        gradients: bool = False,
        observe_query: QueryObserver | None = None,
    ) -> None:
        self._observe, self._gradients, self._observe_query = observe, gradients, observe_query
        super().__init__(model, strategy)

    def _require_ready(self, model: PreTrainedModel) -> None:
        pass  # it is here to make it so

    def _layer(self, *arguments: Any) -> PackedLayer:
        return TapLayer(self._observe, self._gradients, self._observe_query, *arguments)


class TapLayer(BlockLayer):
    """Hands on what it is given. `formats` is a MixedFormat where the strategy's is one."""

    def __init__(
        self, observe: Observer, gradients: bool, observe_query: QueryObserver | None, *arguments: Any
    ) -> None:
        super().__init__(*arguments)
        self._observe, self._gradients, self._observe_query = observe, gradients, observe_query

    @property
    def packed_tokens(self) -> int:
        """None, ever."""
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key, value = (self._tapped(side, t) for side, t in zip(SIDES, (key_states, value_states), strict=True))
        self.version += 1
        if not self.before_rope and self._observe_query is None:
            return key, value  # which may go through code of the model's own
        # both, or our attention would not know them for handles, and take the query for rotated
        return LazyStates(self, "key", 0, key), LazyStates(self, "value", 0, value)

    def observe(self, query: Tensor, key: LazyStates, scoring: Scoring) -> None:
        """Show the query."""
        if self._observe_query is not None:
            rows = fold(query.detach(), self.kv_heads, scoring.scaling)
            self._observe_query(self, rows.unflatten(2, (-1, query.shape[2])))

    def _ask_formats(self, spec: LayerSpec) -> None:
        formats: Any = self.strategy.formats(spec)
        if not isinstance(formats, MixedFormat):
            super()._ask_formats(spec)
            return
        formats.require_fitting(spec.head_dim, spec.value_dim, spec.kv_heads)
        self.formats = formats

    def _tapped(self, side: Side, states: Tensor) -> Tensor:
        if not self._gradients:
            self._observe(self, side, states.detach(), None)
            return states
        if not states.requires_grad:
            # the first layer: nothing before it needs a gradient
            states = states.detach().requires_grad_()
        states.register_hook(partial(self._observe, self, side, states.detach()))
        return states
