"""Lazy keys and values: what `Cache.update` returns instead of dequantized tensors."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...kernels.format import Side

if TYPE_CHECKING:
    from .layer import PackedLayer


class StaleHandleError(RuntimeError):
    """A handle was used after its cache layer had moved on."""


class LazyStates(Tensor):
    """The keys or values of one layer by shape, dtype and device, without storage.

    Our attention function reads `layer` and never touches the data. Any other operation on a handle (another
    attention implementation, `repeat_kv`, the latent expansion of MLA) runs on the dequantized tensor: always right,
    only slower.

    exact: the states of this very forward, set while the cache was empty before it. The handle owns them, so they
        are freed when attention is done, and layers that share keys and values find them as long as they need them.
    """

    layer: "PackedLayer"
    side: Side
    version: int
    exact: Tensor | None

    dequantized: ClassVar[int] = 0
    """How often any handle had to dequantize packed data: tests assert that decoding never does."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, layer: "PackedLayer", side: Side, like: Tensor, length: int, exact: Tensor | None) -> "LazyStates":
        batch, heads, _, dim = like.shape
        handle = Tensor._make_wrapper_subclass(
            cls, (batch, heads, length, dim), dtype=like.dtype, device=like.device, requires_grad=False
        )
        handle.layer, handle.side, handle.version, handle.exact = layer, side, layer.version, exact
        return handle

    def require_current(self) -> None:
        """Raise StaleHandleError if the layer was updated, cropped or reordered after this handle was issued."""
        if self.version != self.layer.version:
            raise StaleHandleError(
                f"this handle to the {self.side}s of layer {self.layer.index} is stale: the cache changed after it was "
                "issued. Use what the latest cache.update() returned"
            )

    def materialize(self) -> Tensor:
        """The states `[batch, kv_heads, length, dim]` in the model's dtype, after RoPE."""
        self.require_current()
        if self.exact is not None:
            return self.layer.rotated(self.exact, 0) if self.side == "key" else self.exact
        LazyStates.dequantized += 1
        return self.layer.dequantize(self.side)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyStates({self.side}s of layer {self.layer.index}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(LazyStates, LazyStates.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)
