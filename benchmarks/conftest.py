"""`pytest --benchmark-only` runs the leaderboards here; a plain `pytest` leaves them alone.

Its options are in pytest_options.py; docs/pytest-benchmark.md tells what to do with them.
"""

import io
import shutil
from typing import Any, Literal

import pytest
from rich.console import Console

from cachequant.benchmarks import pytest_options
from cachequant.benchmarks.pytest_options import ASKED

WIDTH = 120

ARENA = pytest.StashKey[Any]()


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Offer the options where another configuration than pyproject.toml has not loaded their plugin."""
    if not pluginmanager.has_plugin(pytest_options.__name__):
        pluginmanager.register(pytest_options, pytest_options.__name__)


def pytest_ignore_collect(config: pytest.Config) -> Literal[True] | None:
    """Collect this folder in a leaderboard run alone. None: no opinion, the other rules decide."""
    return None if config.getoption("benchmark_only", False) else True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Strategies, contexts, tasks and panels for the benchmarks that ask for them by name."""
    if "arena" not in metafunc.fixturenames:
        return
    for name, values in metafunc.config.stash[ASKED].choices.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Load model and texts before the first benchmark that needs them: a wrong option is a usage error still."""
    config = session.config
    needing = [item for item in session.items if "arena" in getattr(item, "fixturenames", ())]
    if not needing or config.option.collectonly:
        return
    from cachequant.benchmarks.arena import Arena

    contexts = {item.callspec.params["context"] for item in needing if "context" in item.fixturenames}  # type: ignore
    config.stash[ARENA] = Arena.open(config.stash[ASKED], contexts)


@pytest.fixture(scope="session")
def arena(request: pytest.FixtureRequest) -> Any:
    """Models, strategies and results: benchmarks/arena.py."""
    return request.config.stash[ARENA]


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Say beside machine_info, which pytest-benchmark compares before there is a model, what was measured."""
    arena = config.stash.get(ARENA, None)
    if arena is not None:
        output_json["cachequant"] = arena.conditions()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show the leaderboards below pytest-benchmark's own tables."""
    arena = config.stash.get(ARENA, None)
    if arena is None:
        return
    from cachequant.benchmarks.report.run import conditions
    from cachequant.benchmarks.report.tables import failures, terminal_tables

    text = io.StringIO()
    # pytest-benchmark's own tables are as wide, whatever the terminal
    width = max(WIDTH, shutil.get_terminal_size().columns)
    console = Console(file=text, width=width, force_terminal=terminalreporter.hasmarkup, highlight=False)
    record = arena.record()
    for sheet in record.sheets():
        terminalreporter.section(f"leaderboard: memory against accuracy, {sheet.task} (*: Pareto-optimal)")
        for table in terminal_tables(sheet, width):
            console.print(table)
        for failure in failures(sheet):
            console.print(f"failed: {failure}", markup=False)
        terminalreporter.write_line(_taken(text))
    if arena.failures:
        terminalreporter.section("leaderboard: benchmarks that failed")
        for failure in arena.failures:
            console.print(failure, markup=False)
        terminalreporter.write_line(_taken(text))
    if record.results:
        for paragraph in conditions(record):
            console.print(paragraph, markup=False)
        terminalreporter.write_line(_taken(text))


def _taken(text: io.StringIO) -> str:
    """What was written, which is then forgotten."""
    found = text.getvalue().rstrip()
    text.seek(0)
    text.truncate()
    return found
