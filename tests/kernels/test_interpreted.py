"""The kernels pass their checks in Triton's interpreter."""

from pathlib import Path

import pytest
from processes import Checks

pytest.importorskip("triton", reason="Triton is not installed: no kernels to interpret")

CHECKS = [Checks(f"interpreted/{file.name}") for file in sorted(Path(__file__).parent.glob("interpreted/check_*.py"))]


@pytest.mark.parametrize("checks", CHECKS, ids=lambda checks: Path(checks.file).stem)
def test_kernels_pass_their_checks_in_the_interpreter(checks, outcome):
    passed, output = outcome(checks)
    if not passed:
        pytest.fail(output, pytrace=False)


def test_there_are_checks():
    assert CHECKS
