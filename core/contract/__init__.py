"""What every strategy must satisfy, as plain functions a plugin author can run.

In a test file of your own::

    from cachequant.core.contract import parametrize_with_strategies

    @parametrize_with_strategies(MyStrategy)
    def test_contract(strategy, check):
        check(strategy)

or all at once: `check_strategy(MyStrategy())`. A failed check raises `ContractError` with the strategy, the check and
what was expected. Which checks there are for a strategy follows from what it is: `checks_for(strategy)`. Strategies
that have to be calibrated come as they are: the checks calibrate them. The checks themselves are the functions of
`settings`, `packed`, `kept`, `widths` and `caches`; `CHECKS` are all of them.

What cannot be kept is declared, `exceptions = {"check_...": "why not"}`, and an exception that is not needed is a
failure, too. It may be a property where what cannot be kept depends on the settings.

What no check can see: a strategy that behaves differently outside of tests; memory that it holds beside its bytes
without decoding from it; and states kept elsewhere by bytes that could have held as much as is decoded.
"""

from ...kernels.quantize import Tables
from ..protocol import CONTRACT_VERSION as VERSION
from . import caches, kept, packed, settings, widths
from .check import Check, ContractError
from .layers import LAYER
from .parametrize import parametrize_with_strategies
from .running import CHECKS, check_strategy, checks_for

__all__ = [
    "CHECKS",
    "LAYER",
    "VERSION",
    "Check",
    "ContractError",
    "Tables",
    "caches",
    "check_strategy",
    "checks_for",
    "kept",
    "packed",
    "parametrize_with_strategies",
    "settings",
    "widths",
]
