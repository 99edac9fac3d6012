"""`cachequant doctor` says which kernels are live and why others are not, whatever is missing or broken."""

import importlib.metadata
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cachequant import registry
from cachequant.benchmarks import doctor
from cachequant.benchmarks.cli import app
from cachequant.core import Format, LayerFormat, LayerSpec, MixedFormat
from cachequant.kernels import backend


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answers that are kept for the process, forgotten before and after; no GPU, no nvidia-smi, no interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.subprocess, "run", raising(FileNotFoundError("nvidia-smi")))
    for question in (backend._triton_missing, backend._gpu_problem):
        question.cache_clear()
    yield
    for question in (backend._triton_missing, backend._gpu_problem):
        question.cache_clear()


def raising(error: Exception) -> Any:
    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


def install(monkeypatch: pytest.MonkeyPatch, version: str = "3.9.0") -> None:
    """A Triton of that version, whose driver starts."""
    active = SimpleNamespace(get_current_target=lambda: "cuda:90")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=SimpleNamespace(active=active)))


def plug_in(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """One GPU of each capability."""

    def properties(index: int) -> Any:
        major, minor = capabilities[index]
        return SimpleNamespace(name=f"GPU {index}", major=major, minor=minor, total_memory=80 * 2**30)

    for name, answer in {
        "is_available": lambda: True,
        "init": lambda: None,
        "device_count": lambda: len(capabilities),
        "get_device_properties": properties,
        "get_device_capability": lambda index: capabilities[index],
        "get_device_name": lambda index: f"GPU {index}",
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.version, "hip", None)


def run(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert found.exit_code == 0, found.output
    return found.stdout


def diagnosed() -> dict[str, Any]:
    return json.loads(run("--json"))


def live(device: dict[str, Any]) -> dict[str, bool]:
    return {path["name"]: path["live"] for path in device["paths"]}


def reason(diagnosis: dict[str, Any], device: str, path: str = "triton") -> str:
    (found,) = [known for known in diagnosis["devices"] if known["name"] == device]
    return next(known["reason"] for known in found["paths"] if known["name"] == path)


def test_the_cpu_is_served_by_its_path_and_the_reference():
    cpu = diagnosed()["devices"][0]
    assert cpu["name"] == "cpu" and cpu["hardware"].startswith("CPU")
    assert live(cpu) == {"triton": False, "cpu": True, "reference": True}


def test_tables_hold_what_the_json_holds(monkeypatch):
    install(monkeypatch)
    plug_in(monkeypatch, (9, 0))
    text, diagnosis = run(), diagnosed()
    for version in diagnosis["versions"].values():
        assert version in text
    for device in diagnosis["devices"]:
        assert f"{device['name']}  {device['hardware']}" in text
        assert all(path["reason"] in text for path in device["paths"])
    for strategy in diagnosis["strategies"]:
        assert strategy["name"] in text and strategy["plugin"] in text
    assert "All plugins work." in text


def test_versions_are_those_installed(monkeypatch):
    install(monkeypatch, "3.7.1")
    versions = diagnosed()["versions"]
    assert list(versions) == ["cachequant", "python", "torch", "transformers", "triton", "NVIDIA driver"]
    assert versions["torch"].startswith(torch.__version__)
    assert versions["transformers"] == importlib.metadata.version("transformers")
    assert versions["triton"] == "3.7.1"


@pytest.mark.parametrize(
    ("toolkit", "hip", "text"),
    [(None, None, "built without CUDA"), ("12.8", None, "built for CUDA 12.8"), (None, "6.4", "built for ROCm 6.4")],
)
def test_builds_of_torch_are_told_apart(monkeypatch, toolkit, hip, text):
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert diagnosed()["versions"]["torch"] == f"{torch.__version__}, {text}"


def test_every_gpu_is_examined_for_itself(monkeypatch):
    install(monkeypatch)
    plug_in(monkeypatch, (9, 0), (7, 5))
    diagnosis = diagnosed()
    assert [device["name"] for device in diagnosis["devices"]] == ["cpu", "cuda:0", "cuda:1"]
    new, old = diagnosis["devices"][1:]
    assert new["hardware"] == "GPU 0, compute capability 9.0, 80.0 GiB"
    assert live(new) == {"triton": True, "cpu": False, "reference": True}
    assert live(old) == {"triton": False, "cpu": False, "reference": True}
    assert reason(diagnosis, "cuda:1") == "GPU 1 has compute capability 7.5, the kernels need 8.0"


def test_a_gpu_that_cannot_be_read_is_reported_not_raised(monkeypatch):
    install(monkeypatch)
    plug_in(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError("CUDA error: system not yet initialized")))
    monkeypatch.setattr(torch.cuda, "get_device_properties", raising(RuntimeError("system not yet initialized")))
    gpu = diagnosed()["devices"][1]
    assert gpu["hardware"] == "cannot be read: system not yet initialized"
    assert live(gpu)["triton"] is False and "system not yet initialized" in gpu["paths"][0]["reason"]


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    plug_in(monkeypatch, (9, 0))
    diagnosis = diagnosed()
    assert diagnosis["versions"]["triton"].startswith("none: ")
    assert reason(diagnosis, "cuda:0") == "triton is not installed; on Linux, pip install triton"
    assert live(diagnosis["devices"][1])["reference"]


def test_with_an_old_triton_it_says_so(monkeypatch):
    install(monkeypatch, "3.2.0")
    plug_in(monkeypatch, (9, 0))
    diagnosis = diagnosed()
    assert diagnosis["versions"]["triton"] == "3.2.0"
    assert reason(diagnosis, "cuda:0") == "triton 3.2.0 is older than 3.6; install a newer torch"


def test_with_a_triton_that_fails_to_import_it_says_so(monkeypatch):
    monkeypatch.setattr(backend, "triton_version", raising(OSError("libcuda.so.1: cannot open")))
    plug_in(monkeypatch, (9, 0))
    diagnosis = diagnosed()
    assert diagnosis["versions"]["triton"] == "none: libcuda.so.1: cannot open"
    assert "libcuda.so.1: cannot open" in reason(diagnosis, "cuda:0")


def test_without_a_driver_one_line_says_why_there_is_no_gpu(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError("Found no NVIDIA driver on your system.")))
    diagnosis = diagnosed()
    assert diagnosis["versions"]["NVIDIA driver"] == "none: there is no nvidia-smi"
    assert [device["name"] for device in diagnosis["devices"]] == ["cpu", "cuda"]
    assert diagnosis["devices"][1]["hardware"] == "none that torch can use"
    assert live(diagnosis["devices"][1]) == {"triton": False}
    assert reason(diagnosis, "cuda") == "CUDA cannot be used (RuntimeError: Found no NVIDIA driver on your system.)"


def test_warnings_of_a_driver_too_old_do_not_disturb_the_output(monkeypatch, recwarn):
    def warn() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warn)
    assert diagnosed()["devices"][1]["name"] == "cuda"
    assert not recwarn


@pytest.mark.parametrize(
    ("code", "out", "err", "text"),
    [
        (0, "570.86.15\n570.86.15\n", "", "570.86.15"),
        (18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570\n", "", None),
        (9, "", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", None),
        (1, "", "", "none: nvidia-smi says nothing"),
    ],
)
def test_the_driver_is_what_nvidia_smi_says(monkeypatch, code, out, err, text):
    done = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: done)
    expected = text or f"none: nvidia-smi says {(out or err).splitlines()[0]}"
    assert doctor._driver() == expected


def test_a_driver_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor.subprocess, "run", raising(subprocess.TimeoutExpired("nvidia-smi", doctor.PATIENCE)))
    assert doctor._driver() == "nvidia-smi gives no answer in 20 s"


def test_the_interpreter_is_named(monkeypatch):
    install(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    diagnosis = diagnosed()
    assert live(diagnosis["devices"][0])["triton"]
    assert "in the interpreter" in reason(diagnosis, "cpu")


def test_an_accelerator_of_another_kind_is_listed(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    diagnosis = diagnosed()
    assert diagnosis["devices"][-1]["name"] == "mps"
    assert reason(diagnosis, "mps") == "compiles for CUDA and ROCm, not for mps"


# ---- strategies ------------------------------------------------------------------------------------------------------


def entry(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, "cachequant")


def test_strategies_are_listed_with_their_codes():
    found = {strategy["name"]: strategy for strategy in diagnosed()["strategies"]}
    assert list(found) == registry.names()
    codes = {name: found[name]["codes"] for name in ("uniform", "kvquant", "none", "qaq")}
    assert codes == {"uniform": "affine", "kvquant": "codebook", "none": "exact", "qaq": "affine"}
    assert found["uniform"]["plugin"] == "cachequant:uniform"


@pytest.mark.parametrize("times", [1, 2])
def test_broken_plugins_are_problems_each_time_it_is_asked(monkeypatch, times):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry("broken", "no_such_module")])
    for _ in range(times):
        diagnosis = diagnosed()
        assert diagnosis["problems"] == [
            "skipped plugin 'broken' (no_such_module): ModuleNotFoundError(\"No module named 'no_such_module'\"); "
            "repair or uninstall it"
        ]
    assert "uniform" in [strategy["name"] for strategy in diagnosis["strategies"]]
    text = " ".join(run().split())
    assert "problem: skipped plugin 'broken' (no_such_module)" in text and "All plugins work." not in text


def test_two_plugins_of_one_name_are_a_problem(monkeypatch, tmp_path):
    (tmp_path / "second_uniform.py").write_text("""
from cachequant.registry.hookspecs import hookimpl
from cachequant.strategies.uniform import Uniform


@hookimpl
def cachequant_strategies():
    return [Uniform]
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry("second", "second_uniform")])
    (problem,) = diagnosed()["problems"]
    assert "both offer a strategy named 'uniform'" in problem


def test_strategies_say_whether_triton_serves_them():
    pytest.importorskip("triton")
    found = {strategy["name"]: strategy for strategy in diagnosed()["strategies"]}
    assert all(strategy["served"] for strategy in found.values() if strategy["plugin"].startswith("cachequant:"))
    assert found["uniform"]["note"] == "" and found["none"]["note"] == ""


def test_strategies_that_need_a_calibration_say_how_to_get_one():
    notes = {strategy["name"]: strategy["note"] for strategy in diagnosed()["strategies"]}
    assert notes["kvquant"] == "refused until calibrated: cachequant calibrate kvquant"
    assert notes["qnorm"] == "refused until calibrated: cachequant calibrate qnorm"
    # it measures the prompt where there is no calibration
    assert "calibrat" not in notes["qaq"]
    assert notes["kvquant"] in " ".join(run().split())


def test_rows_of_mixed_widths_are_unknown_without_triton(monkeypatch):
    for module in ("triton", "cachequant.kernels.triton.rows"):
        monkeypatch.setitem(sys.modules, module, None)
    found = {strategy["name"]: strategy for strategy in diagnosed()["strategies"]}
    for name in ("qaq", "h2o", "scissorhands"):
        assert found[name]["served"] is None
        assert found[name]["note"] == "rows of mixed widths are only known where Triton is (ModuleNotFoundError)"
    assert found["uniform"]["served"] is True


EXACT, WIDE = Format(codes="exact"), Format(codes="codebook", bits=8)


@pytest.mark.parametrize(
    ("formats", "served", "note"),
    [
        (None, False, "nothing is packed: torch attends to all layers"),
        (LayerFormat(key=EXACT, value=EXACT), True, ""),
        (LayerFormat(key=EXACT, value=Format()), False, "key codes='exact'"),
        (LayerFormat(key=WIDE, value=Format()), False, "key codes='codebook' with 8 bits"),
        (LayerFormat(key=Format(codes="custom"), value=Format()), False, "key codes='custom'"),
    ],
)
def test_the_option_that_keeps_a_strategy_from_triton_is_named(formats, served, note):
    class Offered:
        name = "offered"

        def formats(self, layer: LayerSpec) -> LayerFormat | None:
            return formats

    found = doctor._found(Offered, "plugin")
    assert found.served is served and found.note.startswith(note) and bool(found.note) == bool(note)


@pytest.mark.parametrize(
    ("heads", "asked"), [("apart", {(16, 1, 128), (4, 1, 128)}), ("together", {(16, 8, 128), (4, 8, 128)})]
)
def test_rows_are_asked_for_as_pools_ask(monkeypatch, heads, asked):
    rows = pytest.importorskip("cachequant.kernels.triton.rows", exc_type=ImportError)
    questions = set()
    monkeypatch.setattr(rows, "unserved", lambda *question: questions.add(question) or "rows of such a kind")
    formats = MixedFormat(key=(Format(bits=4),), value=(EXACT,), heads=heads)
    assert doctor._served(formats) == (False, ["rows of such a kind"])
    monkeypatch.setattr(rows, "unserved", lambda *question: questions.add(question))
    assert doctor._served(formats) == (True, [])
    assert questions == asked


def test_strategies_that_cannot_be_made_without_settings_are_listed():
    class Demanding:
        name = "demanding"

        def __init__(self, bits: int) -> None:
            self.bits = bits

    found = doctor._found(Demanding, "plugin")
    assert found.codes == "unknown without settings (TypeError)"
    assert found.served is None and found.note == ""
