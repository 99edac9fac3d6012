"""The contract in pytest."""

import inspect
from collections.abc import Callable
from typing import Any

from ..protocol import CacheQuantizer
from .check import Check, ContractError, label
from .running import checks_for, exceptions_of


def parametrize_with_strategies(*strategies: type[Any] | CacheQuantizer) -> Callable[[Any], Any]:
    """Decorate a test with arguments `strategy` and `check`, or `strategy` alone, to run it with each.

    strategies: classes, which stand for each of their `variants`, and instances, which stand for themselves.

    With `check`, a test gets every check that is for the strategy. Those that it declares not to keep are expected to
    fail, by its reason; if one passes, the test fails. Raises ImportError without pytest, TypeError for a test without
    these arguments and for what is no strategy, and ContractError for variants that do not build.
    """
    try:
        import pytest
    except ImportError as error:
        raise ImportError(
            "parametrize_with_strategies needs pytest, which is not installed; "
            'run pip install pytest, or pip install "cachequant[test]"'
        ) from error
    if not strategies:
        raise TypeError("parametrize_with_strategies() got no strategy; give classes or instances")
    tried = [each for given in strategies for each in _instances(given)]

    def decorate(test: Any) -> Any:
        arguments = inspect.signature(test).parameters
        if "strategy" not in arguments:
            raise TypeError(f"{test.__name__} has no argument `strategy`; write def {test.__name__}(strategy, check)")
        if "check" not in arguments:
            return pytest.mark.parametrize("strategy", tried, ids=label)(test)
        pairs = [_pair(strategy, check) for strategy in tried for check in checks_for(strategy)]
        return pytest.mark.parametrize(("strategy", "check"), pairs)(test)

    return decorate


def _instances(given: type[Any] | CacheQuantizer) -> list[CacheQuantizer]:
    if not isinstance(given, type):
        if not isinstance(given, CacheQuantizer):
            raise TypeError(f"{given!r} is no strategy; give classes or instances of CacheQuantizer")
        return [given]
    built: list[CacheQuantizer] = []
    for settings in getattr(given, "variants", ({},)):
        try:
            built.append(given(**settings))
        except Exception as error:
            name = getattr(given, "name", given.__name__)
            raise ContractError(
                f"strategy {name!r}: expected every one of its variants to build, but {settings!r} raised {error!r}"
            ) from error
    return built


def _pair(strategy: CacheQuantizer, check: Check) -> Any:
    import pytest

    reason = exceptions_of(strategy).get(check.__name__)
    marks: tuple[pytest.MarkDecorator, ...] = ()
    if reason is not None:
        marks = (pytest.mark.xfail(reason=str(reason), raises=ContractError, strict=True),)
    sentence = check.__name__.removeprefix("check_")
    return pytest.param(strategy, check, marks=marks, id=f"{label(strategy)}-{sentence}")
