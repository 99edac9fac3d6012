"""What the device's memory gives at best, and whether its matrix units keep float16 subnormals."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .machine import Machine
from .results import Ceilings, Exactness

# (programs per multiprocessor, numbers of a step, warps)
READERS = ((8, 4096, 8), (16, 2048, 4), (8, 2048, 4), (4, 8192, 8), (32, 4096, 8))

# (rows, columns, terms, warps): few warps take mma.sync, four wgmma where there is one
PRODUCTS = ((32, 8, 32, 2), (64, 16, 16, 1), (64, 8, 32, 4), (128, 64, 64, 4))


class FlushedSubnormals(RuntimeError):
    """The matrix units do not compute with float16 subnormals, which all kernels here do."""


def measure(machine: Machine) -> Ceilings:
    """Bandwidths; in a dry run the kernels only run."""
    from . import probes

    count = 4096
    if not machine.dry:
        # a multiple of every reader's step; a third of what is free, beside its copy
        count = min(1 << 30, torch.cuda.mem_get_info(machine.device)[0] // 12 // 8192 * 8192)
    numbers = torch.empty(count, dtype=torch.int32, device=machine.device).random_()
    size = numbers.numel() * numbers.itemsize
    copied = _copy(machine, numbers)
    best = None
    for per_processor, tile, warps in READERS[: 1 if machine.dry else None]:
        programs = per_processor * processors(machine.device)
        sums = torch.empty(programs, dtype=torch.int32, device=machine.device)
        launch: Any = probes.read[(programs,)]
        taken = machine.microseconds([partial(launch, numbers, sums, count, TILE=tile, num_warps=warps)])
        if int(sums.sum()) & 0xFFFFFFFF != int(numbers.sum()) & 0xFFFFFFFF:
            raise RuntimeError("the kernel that measures the read bandwidth did not read everything")
        if taken is not None:
            best = taken if best is None else min(best, taken)
    return Ceilings(
        read_tb_s=None if best is None else size / best / 1e6,
        copy_tb_s=None if copied is None else 2 * size / copied / 1e6,
    )


def _copy(machine: Machine, numbers: Tensor) -> float | None:
    copy = torch.empty_like(numbers)
    return machine.microseconds([lambda: copy.copy_(numbers)])


def subnormals(machine: Machine) -> list[Exactness]:
    """Whether products of all 1024 subnormals with small integers are exact, by shape of the matrix unit."""
    from . import probes

    found = []
    generator = torch.Generator().manual_seed(0)
    for rows, columns, terms, warps in PRODUCTS:
        # every subnormal once, and at random
        bits = torch.randint(0, 1024, (rows, terms), dtype=torch.int32, generator=generator)
        bits.view(-1)[:1024] = torch.arange(1024, dtype=torch.int32)
        factors = torch.randint(-8, 9, (terms, columns), generator=generator).half()
        out = torch.full((rows, columns), torch.nan, device=machine.device)
        launch: Any = probes.product[(1,)]
        kernel = launch(
            bits.to(machine.device), factors.to(machine.device), out, M=rows, N=columns, K=terms, num_warps=warps
        )
        truth = (bits.double() @ factors.double()) * 2.0**-24
        shape = f"{rows}x{columns}x{terms} on {warps} warp{'s' * (warps > 1)}"
        exact = torch.equal(out.cpu().double(), truth)
        found.append(Exactness(shape=shape, instruction=_instruction(kernel), exact=exact))
    return found


def require_subnormals(found: list[Exactness]) -> None:
    """Raise FlushedSubnormals unless all were exact."""
    flushed = [f"{each.shape}, {each.instruction}" for each in found if not each.exact]
    if flushed:
        raise FlushedSubnormals(
            f"float16 subnormals do not survive the matrix units ({'; '.join(flushed)}): packed codes are fed to them "
            "as subnormals, so every result of the fused kernels would be wrong on this device"
        )


def processors(device: torch.device) -> int:
    """Multiprocessors; 1 on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _instruction(kernel: Any) -> str | None:
    """The family of matrix instructions that a compiled kernel has; None where nothing was compiled."""
    text = getattr(kernel, "asm", {}).get("ptx", "")
    return next((name for name in ("wgmma", "tcgen05", "mma.sync") if name in text), None)
