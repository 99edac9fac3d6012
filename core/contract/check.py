"""What a check is: a function with a sentence for a name, for the strategies that it is about."""

import json
import re
from collections.abc import Callable
from functools import wraps

from pydantic import BaseModel

from ..protocol import CacheQuantizer
from .kinds import Kind

Check = Callable[[CacheQuantizer], None]

_WORD = re.compile(r"[\w./~+-]+")
_kinds: dict[Check, Kind] = {}


class ContractError(AssertionError):
    """A strategy does not do what `CacheQuantizer` asks."""


class Unmet(Exception):
    """What a check expected; it becomes a ContractError that says of whom."""


def require(condition: bool, expectation: str) -> None:
    """Raise Unmet unless `condition`."""
    if not condition:
        raise Unmet(expectation)


def contract_check(kind: Kind) -> Callable[[Check], Check]:
    """Make a function a check of the contract, for strategies of a kind.

    Whatever it raises becomes a ContractError that names strategy, check and expectation. Of strategies of another
    kind it expects nothing.
    """

    def decorate(function: Check) -> Check:
        @wraps(function)
        def check(strategy: CacheQuantizer) -> None:
            if not applies(check, strategy):
                return
            try:
                function(strategy)
            except Unmet as unmet:
                failure = ContractError(f"{_unkept(strategy, check)}: expected {unmet}")
                raise failure.with_traceback(unmet.__traceback__) from None
            except Exception as error:
                expectation = (function.__doc__ or "").strip().partition("\n")[0]
                raise ContractError(
                    f"{_unkept(strategy, check)}: expected {expectation!r}, but it raised {error!r}"
                ) from error

        _kinds[check] = kind
        return check

    return decorate


def applies(check: Check, strategy: CacheQuantizer) -> bool:
    """Whether a strategy is of the kind that a check is for."""
    try:
        return _kinds[check](strategy)
    except Exception:
        return True  # it cannot say what it is; the check says so


def all_checks() -> tuple[Check, ...]:
    """In the order they were defined."""
    return tuple(_kinds)


def label(strategy: CacheQuantizer) -> str:
    """Name and settings that differ from their defaults, as in a spec."""
    name = getattr(strategy, "name", type(strategy).__name__)
    if not isinstance(strategy, BaseModel):
        return f"{name}:{strategy!r}"
    try:
        settings = strategy.model_dump(mode="json", include=_changed(strategy))
        fields = ",".join(f"{field}={_written(value)}" for field, value in settings.items())
    except Exception:
        fields = repr(strategy)  # what is wrong with it has to be told all the same
    return f"{name}:{fields}" if fields else name


def _changed(strategy: BaseModel) -> set[str]:
    defaults = {
        name: field.get_default(call_default_factory=True, validated_data={})
        for name, field in type(strategy).model_fields.items()
    }
    return {name for name, default in defaults.items() if getattr(strategy, name) != default}


def _written(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and _WORD.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _unkept(strategy: CacheQuantizer, check: Check) -> str:
    return f"strategy {label(strategy)!r} does not keep {check.__name__}"
