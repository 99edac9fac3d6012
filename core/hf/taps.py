"""A cache that stores nothing and shows what passes: keys and values as a strategy would store them, and gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...kernels.format import Side
from ..protocol import CacheQuantizer
from .cache import PackedCache
from .handles import LazyStates
from .layer import SIDES, PackedLayer

Observer = Callable[["TapLayer", Side, Tensor, Tensor | None], None]
"""`(layer, side, states [batch, kv_heads, tokens, dim], gradient of the same shape or None)`."""


class TapCache(PackedCache):
    """Pass to one forward over whole sequences; attention is exact.

    observe: called for every side of every layer that `strategy` packs; keys come before RoPE where its format says so.
    gradients: call it during the backward pass, with the gradient of what `backward` is called on; every number keeps
        its own. Only what leads to keys and values needs to be differentiable: parameters may be frozen.
    """

    def __init__(
        self, model: PreTrainedModel, strategy: CacheQuantizer, observe: Observer, *, gradients: bool = False
    ) -> None:
        self._observe, self._gradients = observe, gradients
        super().__init__(model, strategy)

    def _require_ready(self, model: PreTrainedModel) -> None:
        pass  # it is here to make it so

    def _layer(self, *arguments: Any) -> PackedLayer:
        return TapLayer(self._observe, self._gradients, *arguments)


class TapLayer(PackedLayer):
    """Hands on what it is given."""

    def __init__(self, observe: Observer, gradients: bool, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._observe, self._gradients = observe, gradients

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key, value = (self._tapped(side, t) for side, t in zip(SIDES, (key_states, value_states), strict=True))
        self.version += 1
        if not self.before_rope:
            return key, value  # which may go through code of the model's own
        # both, or our attention would take the query for rotated
        return LazyStates(self, "key", 0, key), LazyStates(self, "value", 0, value)

    def _tapped(self, side: Side, states: Tensor) -> Tensor:
        if not self._gradients:
            self._observe(self, side, states.detach(), None)
            return states
        if not states.requires_grad:
            # the first layer: nothing before it needs a gradient
            states = states.detach().requires_grad_()
        states.register_hook(partial(self._observe, self, side, states.detach()))
        return states
