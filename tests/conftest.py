"""`pytest` runs the tests; `pytest --benchmark-only` runs the leaderboards and does not even import the tests.

`pytest -m slow` runs those that start browsers, clusters and other processes, or whole evaluations.
"""

from typing import Literal

import pytest

# Whatever needs one of these starts something large.
SLOW_FIXTURES = {"browser", "cluster"}


def pytest_configure(config: pytest.Config) -> None:
    """As in pyproject.toml, which tests beside an installed wheel do not have."""
    config.addinivalue_line("markers", "slow: starts browsers, clusters or processes, compiles or evaluates for long")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a slow fixture, before markers are selected by."""
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


def pytest_ignore_collect(config: pytest.Config) -> Literal[True] | None:
    """Leave this folder out of a leaderboard run. None: no opinion, the other rules decide."""
    return True if config.getoption("benchmark_only", False) else None
