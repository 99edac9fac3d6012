"""Who may import whom. The installed package is read, so the claims hold for a wheel as for a checkout."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(find_spec("cachequant.core").origin).parents[1]

# folder: what its files may import of ours, beside their own folder
MAY_IMPORT = {
    "kernels": (),
    "core": ("kernels",),
    "registry": ("core",),
    "strategies": ("core", "kernels", "registry"),
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, *, annotations: bool = True) -> Iterator[tuple[int, str]]:
    """Line and full name of every module or name that `path` imports, also inside functions.

    annotations: whether imports under `if TYPE_CHECKING:` count, which never happen in a running program.
    """
    package = ("cachequant", *path.relative_to(ROOT).parts[:-1])
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), annotations):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            prefix = [*base, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*prefix, alias.name])) for alias in node.names)


def nodes(tree: ast.AST, annotations: bool) -> Iterator[ast.AST]:
    """`ast.walk`, without the bodies of `if TYPE_CHECKING:` unless annotations count."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if annotations or not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield from nodes(child, annotations)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_layer_imports_only_what_lies_below_it(folder):
    allowed = [f"cachequant.{module}" for module in (folder, *MAY_IMPORT[folder])]
    offences = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(folder)
        for line, name in imports(path)
        if within(name, "cachequant") and not any(within(name, module) for module in allowed)
    ]
    assert not offences, f"{folder} may import {allowed} only"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_layer_reaches_its_own_package_by_relative_imports(folder):
    # an absolute `cachequant.x` in a checkout may be another installation's file, and `core.x` is nobody's
    offences = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(folder)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _absolute(node)
        if name.partition(".")[0] in ("cachequant", "core", "kernels", "registry", "strategies", "benchmarks")
    ]
    assert not offences, "write `from ..core import ...`"


def _absolute(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_only_core_hf_imports_transformers_in_a_running_program():
    offences = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for folder in MAY_IMPORT
        for path in sources(folder)
        if ROOT / "core" / "hf" not in path.parents
        for line, name in imports(path, annotations=False)
        if within(name, "transformers")
    ]
    assert not offences


def test_only_the_kernels_know_triton():
    # where it is missing, old or broken, everything else has to work; kernels/backend.py finds out
    offences = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for folder in MAY_IMPORT
        for path in sources(folder)
        if ROOT / "kernels" / "triton" not in path.parents
        for line, name in imports(path)
        if within(name, "triton") or (folder != "kernels" and within(name, "cachequant.kernels.triton"))
    ]
    assert not offences


def test_hook_specifications_import_only_pluggy_and_the_standard_library():
    # strategies import them while the registry is importing strategies
    for _, name in imports(ROOT / "registry" / "hookspecs.py"):
        assert name.partition(".")[0] in {"pluggy", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", [path.stem for path in sources("strategies")])
def test_importing_a_strategy_first_imports_no_other(module):
    # strategies may ask the registry, which imports them all: not before someone asks them
    code = (
        f"import sys, cachequant.strategies.{module}; "
        "print(*[name for name in sys.modules if name.startswith('cachequant.strategies.')])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == [f"cachequant.strategies.{module}"]


def test_importing_the_registry_imports_no_strategy():
    code = "import sys, cachequant.registry; sys.exit(any('cachequant.strategies' in name for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_looking_up_strategies_does_not_import_transformers():
    # it takes seconds, which `cachequant list` and every plugin would pay
    code = "import sys; from cachequant import registry; registry.names(); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_is_no_regular_package():
    # Hugging Face ships a package whose import name is `kernels`, and transformers imports it. A folder without
    # __init__.py gives way to it on sys.path; one with __init__.py hides it in every process started at the root.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_namespace_folders_have_no_init():
    for folder in (".", "strategies", "benchmarks", "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), folder


def test_no_module_lies_at_the_root():
    # the root is the package: setuptools would ship it as cachequant/<file>, conftest.py and setup.py too
    assert not list(ROOT.glob("*.py"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_layer_is_not_empty(folder):
    assert sources(folder), f"the claims about {folder} would hold of nothing"
