"""The kernels pass their checks in Triton's interpreter."""

from pathlib import Path
from typing import Any

import pytest
from processes import Checks

pytest.importorskip("triton", reason="Triton is not installed: no kernels to interpret")

# every option of attention against every other: minutes
SLOW = {"check_attend"}

CHECKS = [Checks(f"interpreted/{file.name}") for file in sorted(Path(__file__).parent.glob("interpreted/check_*.py"))]


def _named(checks: Checks) -> Any:
    name = Path(checks.file).stem
    return pytest.param(checks, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("checks", [_named(checks) for checks in CHECKS])
def test_kernels_pass_their_checks_in_the_interpreter(checks, outcome):
    passed, output = outcome(checks)
    if not passed:
        pytest.fail(output, pytrace=False)


def test_there_are_checks():
    assert {Path(checks.file).stem for checks in CHECKS} > SLOW
