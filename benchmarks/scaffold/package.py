"""A package of a strategy of one's own: installable, tested, ranked. What `cachequant new` writes.

`template/` is such a package itself, of a strategy called my-strategy, with `.txt` behind the names of its files: as
Python they would be shipped, linted and collected as ours. Its names are replaced.
"""

import ast
import json
import keyword
import re
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ... import registry
from ..errors import Unusable

TEMPLATE = Path(__file__).parent / "template"

# where each file of the template goes
FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "my_strategy.py.txt": "my_strategy.py",
    "test_contract.py.txt": "tests/test_contract.py",
    "README.md.txt": "README.md",
}

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# pytest and setuptools look for them
_RESERVED = ("tests", "conftest", "setup")
_AUTHORS = "authors = [{ name = AUTHOR }]\n"


class Names(NamedTuple):
    """What a strategy is called, and where."""

    name: str
    """In specs, on tables, and as a distribution."""
    module: str
    strategy: str
    """The class."""

    @classmethod
    def of(cls, name: str) -> "Names":
        """The names that follow from the strategy's."""
        return cls(name, name.replace("-", "_"), "".join(word.capitalize() for word in name.split("-")))


EXAMPLE = Names.of("my-strategy")


def write_package(name: str, folder: Path, author: str | None = None) -> list[Path]:
    """Write the package of a strategy called `name` to `folder`, which may exist if it is empty.

    Returns the files. Raises Unusable, naming the option, and leaves nothing behind then.
    """
    names = Names.of(name)
    _require_usable(names)
    _require_author(author)
    folder = folder.expanduser()
    _require_empty(folder)
    place = folder.resolve()
    contents = {path: _content(source, names, author) for path, source in _destinations(names).items()}
    try:
        # beside the folder, so that it appears at once and whole
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name[:64]}-") as partial:
            made = Path(partial, "package")
            for path, content in contents.items():
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).write_text(content, encoding="utf-8")
            if place.is_dir():  # perhaps the one the user is in: kept, and filled
                for each in made.iterdir():
                    each.rename(place / each.name)
            else:
                made.rename(place)
    except OSError as error:
        raise Unusable(f"cannot write to {folder}: {error.strerror}; choose another folder", "--out") from error
    return [folder / path for path in contents]


def _destinations(names: Names) -> dict[str, str]:
    """The template's file by where it goes."""
    return {_renamed(path, names): source for source, path in FILES.items()}


def _content(source: str, names: Names, author: str | None) -> str:
    text = _renamed(_read(source), names)
    # JSON's strings are TOML's
    line = "" if author is None else _AUTHORS.replace("AUTHOR", json.dumps(author, ensure_ascii=False))
    return text.replace(_AUTHORS, line)


def _read(source: str) -> str:
    return (TEMPLATE / source).read_text(encoding="utf-8")


def _renamed(text: str, names: Names) -> str:
    for old, new in zip(EXAMPLE, names, strict=True):
        text = text.replace(old, new)
    return text


def _require_usable(names: Names) -> None:
    """Raise Unusable for names that no strategy, distribution, module or class can have, or that are taken."""
    name, option = names.name, "NAME"
    if not _NAME.fullmatch(name):
        raise Unusable(
            f"{name!r} cannot be a strategy's name; use lower-case words joined by hyphens, the first beginning with "
            "a letter, such as two-bit-values",
            option,
        )
    try:
        registry.get(name)
    except registry.UnknownStrategy:
        pass
    except registry.DuplicateStrategy as error:
        raise Unusable(str(error), option) from error
    else:
        plugin = registry.describe(name).plugin
        raise Unusable(
            f"a strategy named {name!r} is installed already (plugin {plugin!r}); choose another name", option
        )
    if taken := _taken(names):
        free = f"{name.removeprefix('test-')}-cache"
        raise Unusable(f"{name!r} would make {taken}; choose another name, such as {free}", option)


def _taken(names: Names) -> str | None:
    """What the names collide with."""
    name, module, strategy = names
    if keyword.iskeyword(module):
        return f"a module {module!r}, which is a keyword of Python"
    if module in _RESERVED or module.startswith("test_"):
        return f"a module {module!r}, which stands for something else in a folder with tests"
    if module in sys.stdlib_module_names or find_spec(module) is not None:
        return f"a module {module!r}, and there is one already"
    if keyword.iskeyword(strategy):
        return f"a class {strategy!r}, which is a keyword of Python"
    if strategy in _imported():
        return f"a class {strategy!r}, which its file has to import from elsewhere"
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return f"a distribution {name!r}, and one is installed already"


def _imported() -> set[str]:
    """What the strategy's file imports by name."""
    tree = ast.parse(_read("my_strategy.py.txt"))
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


def _require_author(author: str | None) -> None:
    if author is not None and not (author.strip() and author.isprintable()):
        raise Unusable(f"{author!r} is no name; write it in one line, or leave --author out", "--author")


def _require_empty(folder: Path) -> None:
    """Raise Unusable for a folder that cannot be made or filled."""
    try:
        if folder.is_dir():
            if any(folder.iterdir()):
                raise Unusable(f"{folder} is not empty; choose another folder with --out, or remove it", "--out")
        elif folder.exists():
            raise Unusable(f"{folder} is a file; choose another folder with --out", "--out")
        elif not folder.resolve().parent.is_dir():
            raise Unusable(f"there is no folder {folder.parent} to write to; make it, or choose another", "--out")
    except OSError as error:
        raise Unusable(f"cannot write to {folder}: {error.strerror}; choose another folder", "--out") from error
