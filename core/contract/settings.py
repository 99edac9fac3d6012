"""Checks of what a strategy says about itself: settings, formats, calibrations, declarations."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from ...kernels.format import LayerFormat, MixedFormat
from ..adaptive import AdaptiveStrategy
from ..calibration import CalibratedStrategy
from ..names import faults_of_aliases, faults_of_name
from ..protocol import CONTRACT_VERSION, CacheQuantizer, Strategy
from .check import Unmet, all_checks, contract_check, require
from .kinds import every_strategy, has_settings, needs_a_calibration
from .layers import DEPTHS, LAYER, layer_of, layers_of, packed_layer
from .material import ready_for_model, tiny


@contract_check(every_strategy)
def check_declarations_fit_this_contract(strategy: CacheQuantizer) -> None:
    """It was written for this version of the contract, and gives a reason for every check that it does not keep."""
    version = getattr(strategy, "contract", None)
    require(version is None or type(version) is int, f"contract to be a whole number, got {version!r}")
    newer = version is not None and version > CONTRACT_VERSION
    repair = f"read what changed, repair what fails, then write contract = {CONTRACT_VERSION}"
    advice = "upgrade cachequant" if newer else repair
    require(
        version in (None, CONTRACT_VERSION),
        f"contract = {CONTRACT_VERSION}, which is the installed one, got {version!r}: {advice}",
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
def check_the_registry_takes_its_names(strategy: CacheQuantizer) -> None:
    """Its name and aliases can be typed, aliases build, and what it says of its fields is about fields it has."""
    cls = type(strategy)
    for faults in (faults_of_name(cls), faults_of_aliases(cls)):
        require(not faults, f"names that the registry takes, but {'; '.join(faults)}")
    fields = cls.model_fields if issubclass(cls, BaseModel) else inspect.signature(cls).parameters
    positional = getattr(strategy, "positional", None)
    named = {"positional": [] if positional is None else [positional]}
    named["searchable"] = list(getattr(strategy, "searchable", {}))
    for what, names in named.items():
        absent = [name for name in names if name not in fields]
        require(not absent, f"{what} to name fields, {', '.join(fields) or 'of which there are none'}, got {absent}")


@contract_check(every_strategy)
def check_formats_depend_on_the_layer_alone(strategy: CacheQuantizer) -> None:
    """Asked twice about a layer, a strategy answers the same: its formats, or None to keep the layer exact."""
    kind = MixedFormat if isinstance(strategy, AdaptiveStrategy) else LayerFormat
    layers = [layer for depth in DEPTHS for layer in layers_of(depth)]
    answers = [strategy.formats(layer) for layer in layers]
    for layer, answer in zip(layers, answers, strict=True):
        require(
            answer is None or isinstance(answer, kind),
            f"formats() of layer {layer.index} of {layer.layers} to return a {kind.__name__}, got {answer!r}",
        )
    again = [strategy.formats(layer) for layer in layers[::-1]][::-1]
    calibrated = [ready_for_model(strategy).formats(layer) for layer in layers]
    for layer, *given in zip(layers, answers, again, calibrated, strict=True):
        where = f"of layer {layer.index} of {layer.layers}"
        require(given[0] == given[1], f"formats() {where} to give the same answer twice")
        require(given[0] == given[2], f"a calibration not to change formats() {where}")


@contract_check(every_strategy)
def check_some_layer_is_packed(strategy: CacheQuantizer) -> None:
    """Of the models that it is tried on, it packs at least one layer."""
    *depths, deepest = DEPTHS
    require(
        packed_layer(strategy) is not None,
        f"formats() to pack some layer, but of models of {', '.join(map(str, depths))} and {deepest} layers it keeps "
        f"all {sum(DEPTHS)} exact",
    )


@contract_check(every_strategy)
def check_formats_fit_values_of_another_width(strategy: CacheQuantizer) -> None:
    """Of a layer whose values are half as wide as its keys it gives formats that fit, or refuses by a ValueError."""
    layer = replace(layer_of(strategy), value_dim=LAYER.head_dim // 2)
    try:
        formats = strategy.formats(layer)
    except ValueError:
        return
    heads = (layer.kv_heads,) if isinstance(formats, MixedFormat) else ()
    try:
        if formats is not None:
            formats.require_fitting(layer.head_dim, layer.value_dim, *heads)
    except ValueError as error:
        raise Unmet(
            f"formats() of a layer with head_dim={layer.head_dim} and value_dim={layer.value_dim} to fit it, or to "
            f"raise a ValueError, but {error}"
        ) from error


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
