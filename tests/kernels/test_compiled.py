"""Kernels compiled ahead of time: their machine code, for GPUs that need not be there."""

from collections.abc import Callable

import pytest
from processes import Checks, Outcome

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile with")

# minutes of compiling
pytestmark = pytest.mark.slow

COMPILED = "ahead_of_time/check_compiled.py"

CHECKS = {
    "sm_90": Checks(COMPILED, interpreted=False, arguments=("-k", "sm_90")),
    "other targets": Checks(COMPILED, interpreted=False, arguments=("-k", "not sm_90")),
    "assembly": Checks("ahead_of_time/check_assembly.py"),
}


@pytest.mark.parametrize("checks", CHECKS.values(), ids=CHECKS)
def test_machine_code_passes_its_checks(checks: Checks, outcome: Callable[[Checks], Outcome]) -> None:
    passed, output = outcome(checks)
    if not passed:
        pytest.fail(output, pytrace=False)
    if " passed" not in output:
        pytest.skip(output.strip().splitlines()[-1])
