"""What gets installed, and that it lives in peace with Hugging Face's package of the name `kernels`."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(find_spec("cachequant.core").origin).parents[1]
PYPROJECT = ROOT / "pyproject.toml"
NOT_SHIPPED = {"build", "dist", "docs", "examples", "tests", "venv"}

in_checkout = pytest.mark.skipif(not PYPROJECT.exists(), reason="an installed wheel has no pyproject.toml")

# What transformers takes from Hugging Face's `kernels`; any other name is some class.
HF_KERNELS = """
def use_kernel_forward_from_hub(layer_name):
    return lambda cls: cls

def use_kernelized_func(*functions):
    return lambda cls: cls

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
"""


def run(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Standard output of `python -c code` in `cwd`, with `path` first on PYTHONPATH."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """Metadata by which `importlib.metadata` takes `folder` for a place where `name` is installed."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(entry_points)


# --- the name `kernels`


def test_transformers_imports_at_the_root():
    run("import transformers; from transformers.models.llama import modeling_llama", cwd=ROOT)


def test_transformers_finds_hugging_faces_kernels_at_the_root(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(HF_KERNELS)
    distribution(tmp_path, "kernels", "0.18.2")
    code = """
import transformers
from transformers.models.llama import modeling_llama
import kernels
import cachequant.kernels.format
from transformers.utils import is_kernels_available
print(kernels.__file__)
print(is_kernels_available(MIN_VERSION="0.1", MAX_VERSION="1"))
"""
    file, available = run(code, cwd=ROOT, path=tmp_path).split()
    assert Path(file).parent == package
    assert available == "True"


# --- what is shipped


@in_checkout
def test_every_folder_of_code_is_listed():
    listed = set(tomllib.loads(PYPROJECT.read_text())["tool"]["setuptools"]["packages"])
    tops = [folder for folder in ROOT.iterdir() if folder.name not in NOT_SHIPPED and folder.name[0] != "."]
    shipped = {path.parent.relative_to(ROOT) for folder in tops for path in folder.rglob("*.py")}
    packages = {".".join(("cachequant", *folder.parts)) for folder in shipped}
    assert listed == packages | {"cachequant"}


@in_checkout
def test_data_patterns_find_the_type_marker_the_papers_tables_the_templates_and_the_reference_model():
    patterns = tomllib.loads(PYPROJECT.read_text())["tool"]["setuptools"]["package-data"]
    found = {
        path.relative_to(ROOT).as_posix()
        for package, globs in patterns.items()
        for glob in globs
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(glob)
    }
    model = {path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks" / "reference_model").iterdir()}
    papers = {f"benchmarks/papers/{name}.json" for name in ("kvquant", "qaq")}
    templates = {
        path.relative_to(ROOT).as_posix()
        for folder in ("report", "scaffold")
        for path in (ROOT / "benchmarks" / folder / "template").iterdir()
    }
    assert found == {"py.typed"} | papers | templates | model


def test_installed_files_are_the_package_and_nothing_else():
    try:
        files = importlib.metadata.files("cachequant") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed: the sources are on the path")
    names = {str(file) for file in files if "__pycache__" not in file.parts}
    if "cachequant/py.typed" not in names:
        pytest.skip("an editable installation lists its finder instead of the files")
    version = importlib.metadata.version("cachequant")
    tops = {file.parts[0] for file in files} - {".."}  # ../../../bin/cachequant
    assert tops == {"cachequant", f"cachequant-{version}.dist-info"}
    assert not [name for name in names if name.startswith(("cachequant/tests/", "cachequant/docs/"))]
    assert "cachequant/benchmarks/reference_model/config.json" in names


@in_checkout
def test_command_is_where_the_entry_point_says():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    module, _, attribute = project["scripts"]["cachequant"].partition(":")
    assert ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py").exists()
    assert attribute == "app"


# --- plugins


def test_strategy_of_another_distribution_is_found(tmp_path):
    (tmp_path / "cachequant_half.py").write_text('''
from typing import ClassVar

from cachequant.core import Format, LayerFormat, LayerSpec, Strategy
from cachequant.registry.hookspecs import hookimpl


class Half(Strategy):
    """Half the bits."""

    name: ClassVar[str] = "half"

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(bits=8), value=Format(bits=8))


@hookimpl
def cachequant_strategies():
    return [Half]
''')
    distribution(tmp_path, "cachequant-half", "1.0", "[cachequant]\nhalf = cachequant_half\nbroken = no_such_module\n")
    code = """
import warnings
from cachequant import registry
with warnings.catch_warnings(record=True) as caught:
    print(registry.describe("half").plugin, registry.spec(registry.parse("half")), *registry.names())
print(*[warning.message for warning in caught])
"""
    found, warned = run(code, cwd=tmp_path, path=tmp_path).splitlines()
    assert found.split()[:2] == ["cachequant-half:half", "half"]
    assert {"half", "none", "uniform"} <= set(found.split()[2:])
    assert "skipped plugin 'cachequant-half:broken' (no_such_module): ModuleNotFoundError" in warned
