"""Which checks a strategy has to pass, and passing them all."""

from collections.abc import Mapping

from ..protocol import CacheQuantizer
from . import caches, kept, packed, settings, widths
from .check import Check, ContractError, applies, label
from .settings import check_declarations_fit_this_contract

# what is cheap and explains most comes first
_CHAPTERS = (settings, packed, kept, widths, caches)

CHECKS: tuple[Check, ...] = tuple(
    check for chapter in _CHAPTERS for name, check in vars(chapter).items() if name.startswith("check_")
)
"""Every check there is."""


def checks_for(strategy: CacheQuantizer) -> tuple[Check, ...]:
    """The checks that are for a strategy of this kind, those that it declares not to keep among them."""
    return tuple(check for check in CHECKS if applies(check, strategy))


def exceptions_of(strategy: CacheQuantizer) -> dict[str, str]:
    """The checks that a strategy declares not to keep, by name, with its reasons."""
    declared = getattr(strategy, "exceptions", {})
    if not isinstance(declared, Mapping):
        return {}  # a check of its own says so, which nobody is excepted from
    return {name: reason for name, reason in declared.items() if name != check_declarations_fit_this_contract.__name__}


def check_strategy(strategy: CacheQuantizer) -> None:
    """Run every check that is for the strategy; raises ContractError at the first that fails.

    A check that the strategy declares not to keep has to fail: an exception that is not needed hides what breaks later.
    """
    exceptions = exceptions_of(strategy)
    for check in checks_for(strategy):
        if check.__name__ not in exceptions:
            check(strategy)
            continue
        try:
            check(strategy)
        except ContractError:
            continue
        raise ContractError(
            f"strategy {label(strategy)!r} declares that it does not keep {check.__name__} "
            f"({exceptions[check.__name__]!r}), but keeps it: expected no such exception, remove it"
        )
