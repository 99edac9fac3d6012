"""Lazy keys and values: what `Cache.update` returns instead of dequantized tensors."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...kernels.format import Side
from .precision import full_precision

if TYPE_CHECKING:
    from .layer import PackedLayer


class StaleHandleError(RuntimeError):
    """A handle was used after its cache layer had moved on."""


class LazyStates(Tensor):
    """The keys or values of one layer by shape, dtype and device, without storage.

    Our attention function reads `layer` and never touches the data. Any other operation on a handle (another
    attention implementation, `repeat_kv`, the latent expansion of MLA) runs on the dequantized tensor: right, only
    slower. Where it could not be right, with a query that still has to be rotated or gradients to keep, it raises.

    start, exact: what this forward may read as packed, tokens `[0, start)`, and the exact states
        `[batch, kv_heads, length - start, dim]` of the others (keys as stored). Tokens that this forward packed are
        still read exact by it; the handle owns them, so they are freed when attention is done.
    """

    layer: "PackedLayer"
    side: Side
    version: int
    start: int
    exact: Tensor

    dequantized: ClassVar[int] = 0
    """How often any handle had to dequantize packed data: tests assert that decoding never does."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, layer: "PackedLayer", side: Side, start: int, exact: Tensor) -> "LazyStates":
        batch, heads, tokens, dim = exact.shape
        handle = Tensor._make_wrapper_subclass(
            cls, (batch, heads, start + tokens, dim), dtype=exact.dtype, device=exact.device, requires_grad=False
        )
        handle.layer, handle.side, handle.version, handle.start, handle.exact = layer, side, layer.version, start, exact
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
        if not self.start and self.layer.reads_packed(self):
            raise RuntimeError(
                f"a SimulatedCache cannot serve this model: layer {self.layer.index} uses its keys or values before "
                "attention is called, as multi-head latent attention does. Stream the text through a PackedCache"
            )
        if not self.start:
            # the tail is a view with room behind it, but a handle claims to be contiguous
            return self.rotated_exact().contiguous()
        LazyStates.dequantized += 1
        with full_precision(self.exact.device):
            return torch.cat([self.layer.dequantize(self.side, self.start), self.rotated_exact()], dim=2)

    def _for_others(self) -> Tensor:
        """`materialize` for code that is not our attention, which cannot know what the handle left undone."""
        if self.layer.awaits_query:
            raise ValueError(
                f"keys before RoPE are not supported here: layer {self.layer.index} uses its keys before attention is "
                "called. Use a strategy that stores keys after RoPE"
            )
        if self.exact.requires_grad:
            raise RuntimeError(
                "gradients do not flow through the keys and values of a packed cache outside its own attention "
                "function; wrap the forward in torch.no_grad()"
            )
        return self.materialize()

    def rotated_exact(self) -> Tensor:
        """The exact part, keys after RoPE."""
        return self.layer.rotated(self.exact, self.start) if self.side == "key" else self.exact

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyStates({self.side}s of layer {self.layer.index}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(LazyStates, LazyStates._for_others, (args, kwargs or {}))
        return func(*args, **kwargs)
