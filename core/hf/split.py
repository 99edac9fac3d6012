"""Heads split over processes: what a layer has to know where tensor parallelism leaves it some of its kv heads."""

import re
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...kernels.quantize import Tables
from ..protocol import CacheQuantizer, LayerSpec, Strategy

# projections that make the keys; the output of others is the same in every process
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")

_OF_HEADS = ("scale", "zero", "sensitivity")


class SplitHeads:
    """The processes over which the kv heads of a layer are split evenly, in the order of their ranks.

    mesh: one-dimensional. Methods that communicate say so: every process has to call them.
    """

    def __init__(self, mesh: Any) -> None:
        self.processes: int = mesh.size()
        self.rank: int = mesh.get_local_rank()
        self._group = mesh.get_group()

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # copies of a cache live in the same processes

    def tables(
        self, strategy: CacheQuantizer, spec: LayerSpec, side: Any, first: Tensor, valid: Tensor | None
    ) -> Tables:
        """This process's share of the tables of the whole layer, as one process would ask for them. Communicates.

        spec, first: of the heads held here, `first [batch, kv_heads, block, dim]`. Strategies without tables of their
        own are asked nothing that takes communication.
        """
        if isinstance(strategy, Strategy) and type(strategy).tables is Strategy.tables:
            return strategy.tables(spec, side, first, valid)
        whole = replace(spec, kv_heads=spec.kv_heads * self.processes)
        tables = strategy.tables(whole, side, self._gathered(first), valid)
        start = self.rank * spec.kv_heads
        own = {
            name: tensor[start : start + spec.kv_heads].clone() if name in _OF_HEADS else tensor
            for name, tensor in tables.tensors().items()
        }
        return Tables.of(**own)

    def _gathered(self, states: Tensor) -> Tensor:
        """`[batch, kv_heads, ...]` of all processes, as one."""
        parts = [torch.empty_like(states, memory_format=torch.contiguous_format) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, states.contiguous(), group=self._group)
        return torch.cat(parts, dim=1)


def split_heads(model: PreTrainedModel, modules: dict[int, Any]) -> dict[int, SplitHeads]:
    """By layer, how the kv heads of the attention `modules` are split; empty for a model in one process.

    Raises ValueError where heads do not divide evenly, or are split in a way that is not known here.
    """
    plan = getattr(model, "tp_plan", None)
    if not plan or (getattr(model, "tp_size", None) or 1) == 1:
        return {}
    rules = tuple(rule for rule, style in plan.items() if style == "colwise")
    names = {id(module): re.sub(r"\d+", "*", name) for name, module in model.named_modules()}
    return {
        index: SplitHeads(_mesh(model, module, projection))
        for index, module in modules.items()
        for projection in _KEY_PROJECTIONS
        # wrappers such as peft's put a name before the model's
        if f"{names[id(module)]}.{projection}".endswith(rules)
    }


def is_split(weight: Any, columns: bool = False) -> bool:
    """Whether a weight lies on a mesh of processes; columns: and each of them has columns of its own."""
    # what DTensor is known by, which not every build of torch has
    placements = getattr(weight, "placements", None)
    return placements is not None and (not columns or any(each.is_shard(1) for each in placements))


def here(weight: Any) -> Tensor:
    """What of a weight this process holds."""
    return weight.to_local() if is_split(weight) else weight


def _mesh(model: PreTrainedModel, module: nn.Module, projection: str) -> Any:
    weight: Any = getattr(module, projection).weight
    if not is_split(weight):
        raise ValueError(
            f"{type(model).__name__} was split over processes by a transformers that does not say how; update "
            "transformers, or use device_map"
        )
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"the heads of {type(model).__name__} are split over a mesh of {mesh.ndim} dimensions; a packed cache "
            "knows tensor parallelism alone"
        )
    head_dim = getattr(module, "head_dim", None)
    if projection == "k_proj" and head_dim and weight.shape[0] % (head_dim * mesh.size()):
        raise ValueError(
            f"{type(model).__name__} has {weight.shape[0] // head_dim} kv heads, which do not divide over "
            f"{mesh.size()} processes; use a number of processes that divides them, or device_map"
        )
    return mesh
