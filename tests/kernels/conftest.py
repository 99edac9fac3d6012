"""Tensors this small are slower on two threads. Checks that need processes of their own begin before the first test."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from processes import Beside, Checks, Outcome

BESIDE = pytest.StashKey[Beside]()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    calls = [item.callspec for item in session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    chosen = [found for call in calls if isinstance(found := call.params.get("checks"), Checks)]
    session.config.stash[BESIDE] = Beside(chosen)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if BESIDE in session.config.stash:
        session.config.stash[BESIDE].stop()


@pytest.fixture
def outcome(pytestconfig: pytest.Config) -> Callable[[Checks], Outcome]:
    """What came of the checks that a test has as its parameter `checks`."""
    return pytestconfig.stash[BESIDE].outcome
