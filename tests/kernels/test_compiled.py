"""Kernels compiled ahead of time: their machine code, for GPUs that need not be there."""

from collections.abc import Callable

import pytest
from processes import Checks, Outcome

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile with")

CHECKS = {
    **{
        target: Checks("ahead_of_time/check_compiled.py", interpreted=False, arguments=("-k", target))
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    },
    "assembly": Checks("ahead_of_time/check_assembly.py"),
}


@pytest.mark.parametrize("checks", CHECKS.values(), ids=CHECKS)
def test_machine_code_passes_its_checks(checks: Checks, outcome: Callable[[Checks], Outcome]) -> None:
    passed, output = outcome(checks)
    if not passed:
        pytest.fail(output, pytrace=False)
    if " passed" not in output:
        pytest.skip(output.strip().splitlines()[-1])
