"""Options of `pytest --benchmark-only`: a plugin that `pyproject.toml` loads, so that they are known from the start.

In a conftest.py they would come too late: pytest looks for those where the words behind unknown options point.
benchmarks/conftest.py registers it where another configuration is in force.
"""

from typing import Any

import pytest

LENGTHS = (256, 512, 1024)
# half of what `cachequant bench` reads by default: all groups together are to take a few minutes
TASKS = ("perplexity:windows=2",)
PREFIX = "cachequant_"

ASKED = pytest.StashKey[Any]()
"""What the options say, as `asked.Asked`, once collection begins."""

OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"metavar": "PATH", "help": "Model folder or hub name. Default: the bundled reference."},
    "--text": {"metavar": "FILE", "help": "UTF-8 text. Default: held-out standard library."},
    "--strategies": {
        "metavar": "SPECS",
        "action": "append",
        "help": "Specs such as uniform:bits=4, or `all` for every installed variant; repeat, or separate by ';'. "
        "Caches of transformers are measured beside them. Default: all.",
    },
    "--tasks": {
        "metavar": "SPECS",
        "action": "append",
        "help": f"What accuracy is: specs such as passkey; repeat, or separate by ';'. Default: {TASKS[0]}.",
    },
    "--lengths": {
        "metavar": "TOKENS",
        "help": "Contexts to prefill and to decode at, such as 512,4096. "
        f"Default: those of {','.join(map(str, LENGTHS))} that the model takes.",
    },
    "--device": {"metavar": "DEVICE", "help": "Where the model computes. Default: cpu."},
    "--dtype": {
        "metavar": "DTYPE",
        "help": "Dtype of model and exact cache: float32, bfloat16 or float16. Default: float32.",
    },
    "--threads": {"metavar": "N", "help": "CPU threads. Default: torch's choice."},
    "--calibration-text": {
        "metavar": "FILE",
        "help": "UTF-8 text that strategies are calibrated on. Default: the rest of the standard library.",
    },
    "--no-baselines": {"action": "store_true", "help": "Leave the caches of transformers out."},
    "--no-twin": {"action": "store_true", "help": "Leave the model's twin with outlier key channels out."},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the options, under names of their own for whoever reads them."""
    group = parser.getgroup("cachequant", "cachequant: what pytest --benchmark-only measures")
    for name, how in OPTIONS.items():
        group.addoption(name, dest=destination(name), default=None, **how)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse options that nothing would read."""
    if config.getoption("benchmark_only", False):
        return
    for name in OPTIONS:
        if config.getoption(destination(name)) is not None:
            raise pytest.UsageError(f"{name} says what benchmarks measure; add --benchmark-only")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Read the options before anything is collected."""
    if session.config.getoption("benchmark_only", False):
        # imported here: a plain `pytest` has no need of torch yet
        from .asked import asked

        session.config.stash[ASKED] = asked(session.config)


def destination(option: str) -> str:
    """The name by which `config.getoption` knows an option."""
    return PREFIX + option.removeprefix("--").replace("-", "_")
