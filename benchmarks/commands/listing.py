"""`cachequant list`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ... import registry
from ...registry.descriptions import Description


def list_all() -> None:
    """Show the installed strategies, the benchmark tasks, and their settings."""
    console = Console()
    with _told_last():
        for name in registry.names():
            _show(console, registry.describe(name))
        console.print("[bold]Tasks[/] of cachequant bench:\n")
        for name in registry.tasks.names():
            _show(console, registry.tasks.describe(name))


@contextmanager
def _told_last() -> Iterator[None]:
    """Print what the registry warns of to stderr, each once and below all else; other warnings are left as they are."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            yield
    finally:
        console = Console(stderr=True)
        skipped = {}
        for warning in caught:
            message = str(warning.message)
            if issubclass(warning.category, RuntimeWarning) and message.startswith("skipped plugin"):
                skipped[message] = None
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        for message in skipped:
            console.print(f"[yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _show(console: Console, description: Description) -> None:
    plugin = "" if description.plugin.startswith("cachequant:") else f" [dim](from {escape(description.plugin)})[/]"
    console.print(f"[bold]{escape(description.name)}[/]{plugin}  {escape(description.summary)}", highlight=False)
    for alias, spec in description.aliases.items():
        console.print(f"  [bold]{escape(alias)}[/] is {escape(spec)}", highlight=False)
    if not description.fields:
        console.print("[dim]  no settings[/]\n")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("field", "type", "default", "allowed", "description"):
        table.add_column(heading, overflow="fold")
    for field in description.fields:
        allowed = ", ".join([*map(_value, field.allowed), *field.constraints])
        default = "required" if field.required else _value(field.default)
        # the alternatives stand in a column of their own
        kind = " | ".join(dict.fromkeys(type(value).__name__ for value in field.allowed)) or field.type
        table.add_row(*map(escape, (field.name, kind.replace("NoneType", "None"), default, allowed, field.description)))
    console.print(table)


def _value(value: Any) -> str:
    """As it is written in a spec."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
