"""Checks that need a process of their own, because Triton either interprets or compiles all kernels of a process.

One process runs beside the tests, from the last checks to the first. A test whose checks have not begun runs them
itself: two cores are busy to the end, whichever tests are asked for.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

SECONDS = 600
"""What a process may take: several times what it takes on a busy machine."""


class Checks(NamedTuple):
    """Tests of one file, given relative to this folder, with more arguments of pytest."""

    file: str
    interpreted: bool = True
    arguments: tuple[str, ...] = ()


class Outcome(NamedTuple):
    passed: bool
    output: str


class Beside:
    """Runs checks beside the tests, until it is stopped."""

    def __init__(self, checks: Sequence[Checks]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._processes: list[subprocess.Popen[str]] = []
        self._outcomes = {each: self._pool.submit(self._run, each) for each in reversed(checks)}

    def outcome(self, checks: Checks) -> Outcome:
        future = self._outcomes[checks]
        return self._run(checks) if future.cancel() else future.result()

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()

    def _run(self, checks: Checks) -> Outcome:
        file = Path(__file__).parent / checks.file
        command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
        with TemporaryDirectory() as compiled:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRITON_CACHE_DIR": compiled}
            environment |= {"TRITON_INTERPRET": "1" if checks.interpreted else "0"}
            # `-m` puts the working directory on the path, where the modules of the checks are
            process = subprocess.Popen(
                [*command, *checks.arguments, str(file)],
                cwd=file.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            self._processes.append(process)
            try:
                output, _ = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                output += f"\n{checks.file} took more than {SECONDS} s and was stopped"
        return Outcome(process.returncode == 0, output)
