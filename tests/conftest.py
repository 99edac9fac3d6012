"""`pytest` runs the tests; `pytest --benchmark-only` runs the leaderboards and does not even import the tests."""

from typing import Literal

import pytest


def pytest_ignore_collect(config: pytest.Config) -> Literal[True] | None:
    """Leave this folder out of a leaderboard run. None: no opinion, the other rules decide."""
    return True if config.getoption("benchmark_only", False) else None
