"""Benchmark tasks by name, whoever wrote them; specs are those of strategies: `passkey:length=512,samples=40`."""

from typing import Any

from . import lookup
from .descriptions import Description
from .plugins import TASK, Plugins

plugins = Plugins(TASK)


def get(name: str) -> Any:
    """The task class of that name; raises UnknownTask, listing what is installed, and DuplicateTask."""
    return plugins.offer(name).offered


def names() -> list[str]:
    """The names of all installed tasks, sorted."""
    return [offer.offered.name for offer in plugins.offers()]


def describe(name: str) -> Description:
    """What a task measures, where it comes from, and the settings it takes."""
    return plugins.describe(name)


def parse(text: str) -> Any:
    """The task that a spec describes; raises UnknownTask for the name and ValueError for its fields."""
    return lookup.parse(plugins, text)


def spec(task: Any) -> str:
    """The shortest text that `parse` turns into an equal task."""
    return lookup.spec(task)
