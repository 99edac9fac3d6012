"""Kernels compiled ahead of time: their machine code, for GPUs that need not be there."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "ahead_of_time"

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run_checks(file: str, tmp_path: Path, *arguments: str, interpret: bool = False) -> None:
    """The tests of a file, in a process that interprets or compiles every kernel and finds none compiled before."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(HERE / file)]
    # `-m` puts the working directory on the path, where the modules of the checks are
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if " passed" not in done.stdout:
        pytest.skip(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_within_their_bounds(target: str, tmp_path: Path) -> None:
    run_checks("check_compiled.py", tmp_path, "-k", target)


def test_assembly_does_what_the_portable_form_does(tmp_path: Path) -> None:
    run_checks("check_assembly.py", tmp_path, interpret=True)
