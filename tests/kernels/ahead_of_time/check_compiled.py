"""What the kernels compile to, against bounds and figures on record: `test_compiled.py` runs this in a subprocess.

The figures are instructions per element of the hottest loop, which a kernel pays wherever it runs. After a change that
is meant to move them, `record.py` writes new ones.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from machine_code import MATRIX, Code, missing, release
from variants import CASES, VARIANTS, measure

FIGURES = json.loads((Path(__file__).parent / "figures.json").read_text())
TOLERANCE = 0.1

NVIDIA = [case for case in CASES if case[1] != "gfx942"]

nvidia = pytest.mark.parametrize(("name", "target"), NVIDIA)
amd = pytest.mark.parametrize(("name", "target"), [case for case in CASES if case[1] == "gfx942"])
# encoding and unpacking convert, and multiply no matrices
products = pytest.mark.parametrize(
    ("name", "target"), [case for case in NVIDIA if not case[0].startswith(("encode", "unpack"))]
)


@cache
def code_of(name: str, target: str) -> Code:
    problem = missing(target)
    if problem is not None:
        pytest.skip(problem)
    return measure(VARIANTS[name], target)


def matrix_products(code: Code) -> int:
    return sum(count for opcode, count in code.loop.items() if MATRIX.match(opcode))


@nvidia
def test_registers_and_shared_memory_suffice(name: str, target: str) -> None:
    code, bounds = code_of(name, target), VARIANTS[name]
    assert code.stack <= bounds.stack
    assert code.registers <= bounds.registers
    assert code.shared <= bounds.shared


@products
def test_unpacked_codes_stay_in_registers(name: str, target: str) -> None:
    code = code_of(name, target)
    assert code.count("LDL", "STL") == 0
    assert code.count("STS", "STSM") <= VARIANTS[name].stores


@products
def test_codes_reach_matrix_units_without_conversion(name: str, target: str) -> None:
    code = code_of(name, target)
    assert code.count("I2F", "I2FP", "F2I") == 0
    assert matrix_products(code) > 0


@nvidia
def test_instructions_per_element_are_those_on_record(name: str, target: str) -> None:
    record = FIGURES.get(release(), {}).get(f"{name} {target}")
    if record is None:
        pytest.skip(f"nothing on record for Triton {release()}; record.py writes it")
    assert code_of(name, target).per(VARIANTS[name].elements) == pytest.approx(record["instructions"], rel=TOLERANCE)


@amd
def test_amd_gets_matrix_products_and_no_spills(name: str, target: str) -> None:
    code = code_of(name, target)
    assert code.stack == 0
    assert matrix_products(code) > 0 or name.startswith("encode")
