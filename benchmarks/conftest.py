"""`pytest --benchmark-only` runs the leaderboards here; a plain `pytest` leaves them alone."""

import io
import shutil
from collections.abc import Callable
from typing import Any, Literal

import pytest
from rich.console import Console
from rich.markup import escape

from cachequant.benchmarks.leaderboard import Leaderboard, Row, Subject
from cachequant.benchmarks.report.tables import describe, terminal_tables
from cachequant.benchmarks.subjects import Unusable, prepare

BOARD = pytest.StashKey[Leaderboard]()


def pytest_ignore_collect(config: pytest.Config) -> Literal[True] | None:
    """Collect this folder in a leaderboard run alone. None: no opinion, the other rules decide."""
    return None if config.getoption("benchmark_only", False) else True


@pytest.fixture(scope="session")
def subjects(request: pytest.FixtureRequest) -> dict[str, Subject]:
    """The reference model and its outlier twin by panel, each with its exact run."""
    try:
        board, prepared = prepare()
    except Unusable as error:
        pytest.skip(str(error))
    request.config.stash[BOARD] = board
    return {subject.card.panel: subject for subject in prepared}


@pytest.fixture
def enter(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Puts a row on the leaderboard that the terminal summary shows."""

    def add(row: Row) -> None:
        board = request.config.stash[BOARD]
        request.config.stash[BOARD] = board.with_rows([*board.rows, row])

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show the leaderboard below pytest-benchmark's own tables."""
    board = config.stash.get(BOARD, None)
    if board is None or not board.rows:
        return
    text = io.StringIO()
    console = Console(file=text, width=shutil.get_terminal_size().columns)
    for table in terminal_tables(board, console.width):
        console.print(table)
    console.print(escape(describe(board)), highlight=False)
    terminalreporter.section("leaderboard: memory against accuracy (*: Pareto-optimal)")
    terminalreporter.write_line(text.getvalue().rstrip())
