"""Measurements as they come, one JSON line each: a run that was killed goes on where it stopped."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

VERSION = 1


class Occupied(ValueError):
    """The journal is another run's: it holds other measurements, or is being written."""


class Journal:
    """Values by name; what was put survives a kill of the process, though not a power cut."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """about: what the values depend on, as JSON; a journal about something else is refused.

        Raises Occupied, and OSError.
        """
        self.path = path
        self._about = json.loads(json.dumps(about))
        self._values: dict[str, dict[str, Any]] = {}
        self.resumed = 0
        """How many values an earlier run left."""

    @contextmanager
    def opened(self) -> Iterator["Journal"]:
        """Read what is there; nobody else writes meanwhile. Raises Occupied, and OSError."""
        lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise Occupied(f"another run writes to {self.path}; wait for it, or choose another --out") from error
        try:
            self._read()
            yield self
        finally:
            lock.release()

    def find(self, name: str) -> dict[str, Any] | None:
        """The value of that name, if it was measured."""
        return self._values.get(name)

    def put(self, name: str, value: dict[str, Any]) -> None:
        """Keep a value."""
        self._values[name] = value
        self._append({"name": name, **value})

    def _read(self) -> None:
        lines, whole = _lines(self.path)
        if not lines:
            self.path.unlink(missing_ok=True)
            self._append({"cachequant_tune": VERSION, "about": self._about})
            return
        head = lines[0]
        if head.get("cachequant_tune") != VERSION:
            raise Occupied(f"{self.path} is no journal of this version; choose another --out, or remove it")
        before = head.get("about", {})
        changed = [name for name in {**before, **self._about} if before.get(name) != self._about.get(name)]
        if changed:
            name = changed[0]
            raise Occupied(
                f"{self.path} holds measurements of another run: its {name} was {before.get(name)!r}, is "
                f"{self._about.get(name)!r}; choose another --out, or remove the file"
            )
        if not whole:  # killed within a line
            self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._values = {line.pop("name"): line for line in lines[1:]}
        self.resumed = len(self._values)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines that were written whole, and whether that is all."""
    if not path.exists():
        return [], True
    text = path.read_text(encoding="utf-8", errors="replace")
    found = []
    for line in text.splitlines(keepends=True):
        try:
            read = json.loads(line)
        except json.JSONDecodeError:
            return found, False
        if not line.endswith("\n") or not isinstance(read, dict):
            return found, False
        found.append(read)
    return found, True
