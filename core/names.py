"""What strategies may be called: here, since their own tests ask as well as the registry."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ALIAS = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")


def faults_of_name(named: Any) -> list[str]:
    """What keeps the name of a class from being one; nothing if it may be called so."""
    name = getattr(named, "name", None)
    if name is None:
        return ['it has no name; write `name: ClassVar[str] = "..."`']
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return [f"its name is {name!r}; use lower-case words joined by hyphens"]
    return []


def aliases_of(named: type[Any]) -> Any:
    """The other names of a class, each with the settings it stands for; those of its bases remain theirs."""
    return named.__dict__.get("aliases", {})


def faults_of_aliases(named: type[Any]) -> list[str]:
    """What keeps the aliases of a class from being some, a line for each; nothing if all of them build."""
    aliases = aliases_of(named)
    if not isinstance(aliases, Mapping):
        return [f"they are {aliases!r}; write a mapping of names to settings"]
    faults = []
    for alias, settings in aliases.items():
        if not isinstance(alias, str) or not _ALIAS.fullmatch(alias):
            faults.append(f"{alias!r} is no alias; use lower-case words joined by hyphens or underscores")
            continue
        if alias == named.name:
            faults.append(f"{alias!r} is its name; leave it out")
            continue
        try:
            named(**settings)
        except Exception as error:
            faults.append(f"{alias!r} stands for {settings!r}, which does not build: {_in_one_line(error)}")
    return faults


def _in_one_line(error: Exception) -> str:
    """What an error says, without what pydantic adds for readers of tracebacks."""
    if isinstance(error, ValidationError):
        told = ((".".join(map(str, each["loc"])), each["msg"]) for each in error.errors())
        return "; ".join(f"{place}: {message}" if place else message for place, message in told)
    return " ".join(str(error).split())
