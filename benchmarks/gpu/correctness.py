"""Whether compiled kernels compute what the reference does: a hard condition for any timing."""

from collections.abc import Iterator
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from ...kernels import quantize
from ...kernels.backend import interpreted, reference_only
from ...kernels.fused import unserved
from .cases import SIDES, Case, Made, grid, made
from .machine import Machine, captured, in_parallel
from .results import Check, message

# queries and weights are rounded to float16, outputs to the query's dtype
TOLERANCE = 2e-3
TOLERANCE_BFLOAT16 = 6e-3
# numbers that lie on the edge of two codes, and what depends on them
TOLERANCE_ENCODE = 1e-3
TOLERANCE_UNPACK = 1e-6

BLOCKS, BLOCKS_DRY = 35, 2


class WrongResult(RuntimeError):
    """Kernels computed something else than the reference."""


class Task(NamedTuple):
    """One case for one process. stored: encoding and unpacking instead of attention."""

    case: Case
    device: str
    stored: bool


def run(machine: Machine) -> Iterator[Check | str]:
    """All checks, as they come; a sentence for each that there was no time for."""
    cases = [case for case in grid() if case.dry or not machine.dry]
    tasks = [Task(case, str(machine.device), False) for case in cases]
    tasks += [Task(case, str(machine.device), True) for case in cases if case.stored]
    for task, found in in_parallel(check, tasks, machine):
        if found is None:
            yield f"correctness of {task.case.name}{' (encode, unpack)' * task.stored}: the section's time was up"
        else:
            yield from found


def require_right(checks: list[Check]) -> None:
    """Raise WrongResult unless all results that came are right, and no kernel faulted."""
    wrong = [f"{each.case} ({each.variant}): {_finding(each)}" for each in checks if each.wrong]
    wrong += [
        f"{each.case} ({each.variant}): {each.failure}" for each in checks if "CUDA error" in (each.failure or "")
    ]
    if wrong:
        raise WrongResult(f"{len(wrong)} checks failed, nothing was timed: " + "; ".join(wrong))


def check(task: Task) -> list[Check]:
    """In whichever process: every comparison of a task."""
    case, device = task.case, torch.device(task.device)
    with torch.inference_mode():
        try:
            data = made(case, BLOCKS_DRY if device.type == "cpu" else BLOCKS, device)
        except Exception as error:  # one broken case must not hide the others
            return [Check(case=case.name, variant="portable", error=None, tolerance=0, failure=message(error))]
        return list(_storage(data) if task.stored else _attention(data))


def _attention(data: Made) -> Iterator[Check]:
    tolerance = TOLERANCE_BFLOAT16 if data.case.dtype == torch.bfloat16 else TOLERANCE
    from ...kernels.triton import launch

    # in the interpreter, and where the assembly is another, there is only one variant
    variants = ("portable",) if interpreted() or torch.version.hip is not None else ("assembly", "portable")
    for variant in variants:
        error, equal, failure = None, None, None
        problem = unserved(data.case.formats, data.case.head_dim, data.case.head_dim)
        try:
            if problem is not None:
                raise NotImplementedError(f"not served: {problem}")
            with patch.object(launch, "assembly", lambda v=variant: v == "assembly"):
                error = relative(data.attend(), data.truth)
                equal = None if data.query.device.type == "cpu" else replay_equals(data)
        except Exception as raised:
            failure = message(raised)
        yield Check(
            case=data.case.name,
            variant=variant,
            error=error,
            tolerance=tolerance,
            replay_equal=equal,
            failure=failure,
        )


def replay_equals(data: Made) -> bool:
    """Whether a captured graph gives for another query what an eager call gives, bit for bit."""
    first = data.query.clone()
    outputs: list[Tensor] = []
    graph = captured(lambda: outputs.append(data.attend()))
    data.query.copy_(first.flip(1))
    outputs[-1].fill_(torch.nan)
    graph.replay()
    replayed = outputs[-1].clone()
    eager = data.attend()
    data.query.copy_(first)
    return torch.equal(replayed, eager)


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the error over the norm of the truth; infinite where there are NaN."""
    error = ((found.double() - truth).norm() / truth.norm()).item()
    return error if error == error else float("inf")


def _storage(data: Made) -> Iterator[Check]:
    """Encoding and unpacking by kernels, against the reference on the CPU."""
    case, device = data.case, data.query.device
    differing: list[float] = []
    worst: list[float] = []
    failures: dict[str, str] = {}
    for side in SIDES:
        fmt, block = getattr(case.formats, side), case.formats.block
        tables = data.packed.tables[side]
        held = data.packed.key if side == "key" else data.packed.value
        try:
            packed = quantize.encode(data.states[side].to(device), fmt, side, block, tables=tables)
            unequal = sum((packed[name] != tensor).sum().item() for name, tensor in held.items())
            differing.append(unequal / sum(tensor.numel() for tensor in held.values()))
        except Exception as raised:
            failures["encode"] = message(raised)
        try:
            with reference_only():
                truth = quantize.decode(held, fmt, side, case.head_dim, block, tables, torch.float64)
            decoded = quantize.decode(held, fmt, side, case.head_dim, block, tables, torch.float32)
            worst.append(((decoded.double() - truth).abs().max() / truth.abs().max()).item())
        except Exception as raised:
            failures["unpack"] = message(raised)
    found: tuple[tuple[Literal["encode", "unpack"], list[float], float], ...] = (
        ("encode", differing, TOLERANCE_ENCODE),
        ("unpack", worst, TOLERANCE_UNPACK),
    )
    for variant, errors, tolerance in found:
        failure = failures.get(variant)
        error = None if failure else max(errors)
        yield Check(case=case.name, variant=variant, error=error, tolerance=tolerance, failure=failure)


def _finding(check: Check) -> str:
    if check.replay_equal is False:
        return "a CUDA graph gave another result than the eager call"
    return f"error {check.error:.1e}, allowed {check.tolerance:.0e}"
