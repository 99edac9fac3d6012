"""Checks of what a strategy says about itself: settings, formats, calibrations, declarations."""

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from pydantic import ValidationError

from ...kernels.format import LayerFormat, MixedFormat
from ..adaptive import AdaptiveStrategy
from ..calibration import CalibratedStrategy
from ..protocol import CONTRACT_VERSION, CacheQuantizer, Strategy
from .check import Unmet, all_checks, contract_check, require
from .kinds import every_strategy, has_settings, needs_a_calibration
from .layers import layer_of
from .material import ready_for_model, tiny


@contract_check(every_strategy)
def check_declarations_fit_this_contract(strategy: CacheQuantizer) -> None:
    """It was written for this version of the contract, and gives a reason for every check that it does not keep."""
    version = getattr(strategy, "contract", None)
    require(
        version in (None, CONTRACT_VERSION),
        f"contract = {CONTRACT_VERSION}, which is the installed one, got {version!r}: read what changed, repair what "
        f"fails, then write contract = {CONTRACT_VERSION}; or install a cachequant whose contract is {version!r}",
    )
    exceptions = getattr(strategy, "exceptions", {})
    require(isinstance(exceptions, Mapping), f"exceptions to map names of checks to reasons, got {exceptions!r}")
    names = [check.__name__ for check in all_checks() if check is not check_declarations_fit_this_contract]
    for name, reason in exceptions.items():
        close = get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        require(name in names, f"exceptions to name checks that may be left out, got {name!r}{hint}")
        require(isinstance(reason, str) and bool(reason.strip()), f"a reason why {name} cannot be kept, got {reason!r}")


@contract_check(has_settings)
def check_settings_are_frozen_strict_and_round_trip(strategy: CacheQuantizer) -> None:
    """Fields cannot be assigned, unknown fields are refused, and the dumped settings build an equal strategy."""
    assert isinstance(strategy, Strategy)
    cls = type(strategy)
    for each in (strategy, ready_for_model(strategy)):
        require(cls.model_validate(each.model_dump()) == each, "model_validate(model_dump()) to be equal")
        require(hash(each) == hash(copy.deepcopy(each)), "equal strategies to hash alike")
    try:
        cls.model_validate({**strategy.model_dump(), "no_such_field": 1})
    except ValidationError:
        pass
    else:
        raise Unmet("an unknown field to be refused (ConfigDict(extra='forbid'))")
    for field in cls.model_fields:
        try:
            setattr(strategy, field, getattr(strategy, field))
        except ValidationError:
            continue
        raise Unmet(f"field {field!r} to be frozen (ConfigDict(frozen=True))")


@contract_check(every_strategy)
def check_formats_depend_on_the_layer_alone(strategy: CacheQuantizer) -> None:
    """Asked twice about one layer, a strategy answers the same: its formats, or None to keep the layer exact."""
    layer = layer_of(strategy)
    first, second = strategy.formats(layer), strategy.formats(layer)
    kind = MixedFormat if isinstance(strategy, AdaptiveStrategy) else LayerFormat
    require(first is None or isinstance(first, kind), f"formats() to return a {kind.__name__}, got {first!r}")
    require(first == second, "formats() to give the same answer twice")
    require(ready_for_model(strategy).formats(layer) == first, "a calibration not to change formats()")


@contract_check(needs_a_calibration)
def check_missing_and_foreign_calibrations_are_refused(strategy: CacheQuantizer) -> None:
    """A strategy that needs a calibration says so, and how to get one; another model's it does not use."""
    assert isinstance(strategy, CalibratedStrategy)
    model = tiny(strategy)
    _require_refusal(strategy.with_calibration(None), model, "calibrate", "an uncalibrated strategy")
    if strategy.calibration == "prompt":
        return  # fits every model
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    ready = ready_for_model(strategy)
    ready.require_model(model)
    _require_refusal(ready, other, "another model", "a strategy calibrated for other weights")


def _require_refusal(strategy: CacheQuantizer, model: Any, wanted: str, what: str) -> None:
    try:
        strategy.require_model(model)
    except ValueError as error:
        require(wanted in str(error), f"the refusal of {what} to say {wanted!r}, got {str(error)!r}")
    else:
        raise Unmet(f"{what} to be refused by require_model with a ValueError")
