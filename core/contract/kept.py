"""The check that a strategy keeps no state."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..adaptive import AdaptiveStrategy
from ..protocol import CacheQuantizer, Strategy
from .check import contract_check, require
from .evidence import evidence_for
from .kinds import every_strategy
from .layers import layer_of
from .material import packings, rebuilt

_CONTAINERS = (dict, list, set, bytearray, Tensor)


@contract_check(every_strategy)
def check_nothing_is_kept_on_the_strategy(strategy: CacheQuantizer) -> None:
    """Used for all it is for, a strategy is as it was: its fields, its private attributes and those of its class."""
    layer, sides = layer_of(strategy), packings(strategy)
    tried = rebuilt(sides[0].strategy if sides else strategy)
    before = _held(tried)
    tried.cache_options()
    tried.formats(layer)
    for packing in (replace(side, strategy=tried) for side in sides):
        tables = packing.tables(packing.states())
        packing.decode(packing.encode(packing.states(), None, tables), tables)
    if isinstance(tried, AdaptiveStrategy):
        for _, evidence in evidence_for(tried):
            tried.widths(layer, evidence)
    after = _held(tried)
    changed = sorted(name for name in before.keys() | after.keys() if not _alike(before.get(name), after.get(name)))
    require(not changed, f"nothing to be kept on the strategy, but {', '.join(changed)} changed by using it")


def _held(strategy: Any) -> dict[str, Any]:
    """Copies of what hangs on a strategy, by name; what a class computes once from the fields is no state."""
    cls = type(strategy)
    held = dict(getattr(strategy, "__dict__", {}))
    held |= getattr(strategy, "__pydantic_private__", None) or {}
    for each in cls.__mro__:
        if each is Strategy:
            break
        shared = {name: value for name, value in vars(each).items() if not name.startswith("__")}
        held |= {f"{each.__name__}.{name}": value for name, value in shared.items() if isinstance(value, _CONTAINERS)}
    return {
        name: _copied(value)
        for name, value in held.items()
        if not isinstance(getattr(cls, name, None), cached_property)
    }


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:
        return value  # locks and the like: it can only be replaced


def _alike(first: Any, second: Any) -> bool:
    """Equal, where `==` says so; else by what it consists of."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(_alike(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_alike, first, second))
    if type(first).__eq__ is object.__eq__:
        return _alike(getattr(first, "__dict__", None), getattr(second, "__dict__", None))
    equal = first == second
    return bool(equal.all() if hasattr(equal, "all") else equal)
