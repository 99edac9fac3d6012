"""Text that every Python installation carries: the language's help topics and the standard library's sources.

The reference model is trained on one part of it and measured on the other. Both are read from the running interpreter,
so nothing has to be downloaded or shipped; a report names the interpreter's version and the text's hash.
"""

import hashlib
import importlib
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Held out by name, not at random: the same modules are then unseen on every Python version, whatever else it carries.
# They are old, change little between versions, and hold more documentation than most.
HELDOUT_MODULES = frozenset(
    (
        *("bisect", "calendar", "cmd", "colorsys", "contextlib", "copy", "csv", "difflib", "fractions", "graphlib"),
        *("heapq", "pprint", "queue", "random", "sched", "shlex", "statistics", "string", "textwrap", "timeit"),
    )
)
# Only topics whose paragraphs appear in no other topic: `compound`, for one, repeats `for`, `with` and `class`.
HELDOUT_TOPICS = frozenset(("debugger", "formatstrings", "import", "objects", "string-methods", "typesmapping"))

# Tests and demos are not library code, the rest is data or was written by a build on one particular machine.
SKIPPED_FOLDERS = frozenset(
    (
        *("__pycache__", "dist-packages", "lib-dynload", "site-packages"),
        *("idle_test", "idlelib", "lib2to3", "test", "tests", "turtledemo"),
        *("encodings", "pydoc_data"),
    )
)
SKIPPED_PREFIXES = ("__phello__", "_sysconfigdata", "config-", "sitecustomize", "usercustomize")
SKIPPED_MODULES = frozenset(("html.entities", "stringprep"))

SEPARATOR = "\n\n\n"


@dataclass(frozen=True)
class Corpus:
    """One part of the interpreter's text, with what is needed to name it in a report."""

    text: str
    python: str
    sha256: str
    n_files: int


def stdlib_text(split: Literal["train", "heldout"]) -> Corpus:
    """Return one part of the running interpreter's help topics and standard-library sources, in a fixed order.

    Raises:
        ValueError: `split` is neither "train" nor "heldout".
        FileNotFoundError: this Python carries no sources or no topics (zipped, embedded or stripped).
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    heldout = split == "heldout"
    topics = [text for name, text in sorted(_topics().items()) if (name in HELDOUT_TOPICS) == heldout]
    sources = [text for name, text in sorted(_sources().items()) if (name in HELDOUT_MODULES) == heldout]
    documents = [document.strip() for document in topics + sources]
    documents = [document for document in documents if document]
    text = SEPARATOR.join(documents) + "\n"
    return Corpus(text, platform.python_version(), hashlib.sha256(text.encode()).hexdigest(), len(documents))


def _topics() -> dict[str, str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise FileNotFoundError(_missing("the module pydoc_data.topics")) from error
    return topics


def _sources() -> dict[str, str]:
    """Map dotted module names to their sources."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = {}
    for folder, folders, files in os.walk(root):
        # pruned while walking: site-packages can hold more than everything else together
        folders[:] = [name for name in folders if _is_kept(name)]
        for path in (Path(folder, file) for file in files if file.endswith(".py") and _is_kept(file)):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            if name not in SKIPPED_MODULES:
                # a stray byte in one module must not take the whole corpus down
                sources[name] = path.read_text(encoding="utf-8", errors="replace")
    if missing := sorted(HELDOUT_MODULES - sources.keys()):
        raise FileNotFoundError(_missing(f"the sources of {', '.join(missing)} under {root}"))
    return sources


def _is_kept(name: str) -> bool:
    return name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)


def _missing(what: str) -> str:
    return (
        f"this Python ({platform.python_version()}) does not carry {what}: it is zipped, embedded or stripped. "
        f"Use a Python with its standard library as files, or pass a text file of your own instead."
    )
