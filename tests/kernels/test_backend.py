"""Which implementation serves a device, also where Triton or the driver is missing, old or broken."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cachequant.kernels import backend

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answers that are kept for the process, forgotten before and after."""
    kept = (backend._triton_missing, backend._gpu_problem, backend.warn_once)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for question in kept:
        question.cache_clear()
    yield
    for question in kept:
        question.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, version: str = "3.9.0", driver: Any = None) -> None:
    """A Triton of that version whose driver is `driver`."""
    target = SimpleNamespace(get_current_target=lambda: "cuda:90")
    runtime = SimpleNamespace(driver=driver or SimpleNamespace(active=target))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "triton.runtime", runtime)


def plug_in(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), init: Any = lambda: None) -> None:
    """A GPU of that capability."""
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.version, "hip", None)


def break_import(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """`import triton` raises `error`, from inside the module."""

    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            return ModuleSpec(name, self) if name == "triton" else None  # type: ignore[arg-type]

        def create_module(self, spec: ModuleSpec) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])


def raising(error: Exception) -> Any:
    def raise_it(*_: object) -> None:
        raise error

    return raise_it


def test_a_gpu_with_triton_is_served_by_it(monkeypatch):
    install(monkeypatch)
    plug_in(monkeypatch)
    assert backend.triton_serves(GPU) and not backend.cpu_serves(GPU)
    paths = backend.paths(GPU)
    assert [path.name for path in paths] == ["triton", "cpu", "reference"]
    assert [path.problem is None for path in paths] == [True, False, True]


def test_tensors_on_the_cpu_are_served_by_the_cpu_path():
    assert backend.cpu_serves(CPU) and not backend.triton_serves(CPU)
    assert [path.problem is None for path in backend.paths(CPU)] == [False, True, True]


@pytest.mark.parametrize("word, on", [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)])
def test_the_interpreter_is_switched_on_by_the_words_that_triton_takes(monkeypatch, word, on):
    install(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert backend.interpreted() is on
    assert backend.triton_serves(CPU) is on


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_devices_are_served_by_the_reference(device):
    paths = backend.paths(torch.device(device))
    assert [path.problem is None for path in paths] == [False, False, True]
    assert paths[0].problem == f"compiles for CUDA and ROCm, not for {device}"


def test_without_triton_the_answer_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    plug_in(monkeypatch)
    assert backend.triton_problem(GPU) == "triton is not installed; on Linux, pip install triton"


def test_a_folder_named_triton_is_no_triton(monkeypatch, tmp_path):
    (tmp_path / "triton").mkdir()
    for name in {"triton", *(name for name in sys.modules if name.partition(".")[0] == "triton")}:
        # what stands there afterwards, or nothing, is what stood there before
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    problem = backend.triton_problem(GPU)
    assert problem and problem.startswith("triton cannot be imported (AttributeError") and "__version__" in problem


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libtriton.so: undefined symbol: PyInit"),
        ModuleNotFoundError("No module named 'numpy'", name="numpy"),
        OSError("libcuda.so.1: cannot open shared object file"),
        RuntimeError("broken\nand more of it"),
        AttributeError("partially initialized module"),
        SyntaxError("invalid syntax"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_triton_that_fails_to_import_is_reported_not_raised(monkeypatch, error):
    break_import(monkeypatch, error)
    plug_in(monkeypatch)
    problem = backend.triton_problem(GPU)
    assert problem and str(error).splitlines()[0] in problem and "\n" not in problem
    assert not backend.triton_serves(GPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.triton_problem(CPU) == problem


@pytest.mark.parametrize(
    "version, live",
    [
        ("2.3.1", False),
        ("3.2.0", False),
        ("3.5.1+gitabcdef12", False),
        ("3.6.0", True),
        ("3.10.0", True),
        ("4.0", True),
    ],
)
def test_tritons_from_3_6_are_live(monkeypatch, version, live):
    install(monkeypatch, version)
    plug_in(monkeypatch)
    expected = None if live else f"triton {version} is older than 3.6; install a newer torch"
    assert backend.triton_problem(GPU) == expected


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("Torch not compiled with CUDA enabled"),
        RuntimeError("Found no NVIDIA driver on your system. Please check"),
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),
        RuntimeError("CUDA error: system not yet initialized\nCUDA kernel errors might be asynchronously reported"),
    ],
)
@pytest.mark.parametrize("device", [GPU, torch.device("cuda")])
def test_without_a_driver_that_works_the_answer_says_why(monkeypatch, error, device):
    install(monkeypatch)
    plug_in(monkeypatch, init=raising(error))
    problem = backend.triton_problem(device)
    assert problem == f"CUDA cannot be used ({type(error).__name__}: {str(error).splitlines()[0]})"


def test_a_gpu_that_is_not_there_is_reported_not_raised(monkeypatch):
    install(monkeypatch)
    plug_in(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", raising(AssertionError("Invalid device id")))
    assert backend.triton_problem(torch.device("cuda", 7)) == "CUDA cannot be used (AssertionError: Invalid device id)"


@pytest.mark.parametrize("capability, live", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((10, 0), True)])
def test_gpus_from_ampere_are_live(monkeypatch, capability, live):
    install(monkeypatch)
    plug_in(monkeypatch, capability)
    expected = None if live else "Some GPU has compute capability 7.5, the kernels need 8.0"
    assert backend.triton_problem(GPU) == expected


def test_capabilities_of_amd_gpus_are_not_those_of_nvidia(monkeypatch):
    install(monkeypatch)
    plug_in(monkeypatch, (7, 5))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert backend.triton_serves(GPU)


def test_a_machine_without_a_compiler_for_tritons_driver_is_reported_not_raised(monkeypatch):
    class Driver:
        @property
        def active(self) -> Any:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    install(monkeypatch, driver=Driver())
    plug_in(monkeypatch)
    problem = backend.triton_problem(GPU)
    assert problem == (
        "Triton's driver does not start (RuntimeError: Failed to find C compiler. "
        "Please specify via CC environment variable)"
    )


def test_every_gpu_is_asked_once(monkeypatch):
    asked = []
    install(monkeypatch)
    plug_in(monkeypatch, init=lambda: asked.append(None))
    for _ in range(3):
        backend.triton_serves(GPU)
        backend.triton_serves(torch.device("cuda", 1))
    assert len(asked) == 2


def test_reference_only_switches_everything_else_off_and_on_again(monkeypatch):
    install(monkeypatch)
    plug_in(monkeypatch)
    with pytest.raises(ZeroDivisionError), backend.reference_only():
        with backend.reference_only():
            pass
        for device in (CPU, GPU):
            assert not backend.triton_serves(device) and not backend.cpu_serves(device)
            problems = [path.problem for path in backend.paths(device)]
            assert problems == ["switched off by kernels.backend.reference_only()"] * 2 + [None]
        _ = 1 / 0
    assert backend.triton_serves(GPU) and backend.cpu_serves(CPU)


def test_a_warning_is_given_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            backend.warn_once("group=24 is served by the reference")
        backend.warn_once("group=40 is served by the reference")
    assert [str(warning.message)[:8] for warning in caught] == ["group=24", "group=40"]


def test_a_warning_made_an_error_is_raised_each_time():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="group=24"):
                backend.warn_once("group=24 is served by the reference")


ROOT = Path(backend.__file__).parents[1]
MODULES = [f"cachequant.kernels.{path.stem}" for path in sorted((ROOT / "kernels").glob("*.py"))]


def test_everything_imports_without_triton():
    code = f"""
import importlib, sys
sys.modules["triton"] = None
import torch
for module in {[*MODULES, "cachequant.core", "cachequant.registry"]!r}:
    importlib.import_module(module)
from cachequant import registry
from cachequant.kernels import backend
registry.names()
assert not backend.triton_serves(torch.device("cuda", 0))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_kernels_imports_no_triton():
    # it takes half a second, and processes that only read on the CPU never need it
    code = f"""
import importlib, sys
import torch
torch_did = "triton" in sys.modules
for module in {MODULES!r}:
    importlib.import_module(module)
assert ("triton" in sys.modules) == torch_did
assert not [name for name in sys.modules if name.startswith("cachequant.kernels.triton")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
