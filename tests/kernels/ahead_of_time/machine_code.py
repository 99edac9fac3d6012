"""Compile what host code launches for a GPU that need not be there, and read the machine code that comes out.

Works with Triton 3.6 to 3.9, in a process without TRITON_INTERPRET: kernels are interpreted or compiled, never both.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

MATRIX = re.compile(r"(HMMA|HGMMA|UTCHMMA|v_mfma)")


def release() -> str:
    """The version of Triton, to whose minor number figures are bound."""
    return ".".join(triton.__version__.split(".")[:2])


def missing(target: str) -> str | None:
    """What keeps this Triton from compiling for `target` and reading the result; None: nothing does."""
    backend = "amd" if TARGETS[target].backend == "hip" else "nvidia"
    if backend not in backends:
        return f"this Triton has no backend for {target}"
    try:
        return None if backend == "amd" or knobs.nvidia.cuobjdump.path else "this Triton came without cuobjdump"
    except RuntimeError as error:
        return str(error)


class Code(NamedTuple):
    """One compiled kernel. Sizes are bytes; the stack is a thread's, 0 unless registers spill."""

    name: str
    threads: int
    registers: int
    stack: int
    shared: int
    loop: Counter[str]
    """Instructions of the hottest loop by opcode without modifiers; of everything, if nothing loops."""

    def count(self, *opcodes: str) -> int:
        return sum(self.loop[opcode] for opcode in opcodes)

    def per(self, elements: int) -> float:
        """Thread instructions per element, of which one turn of the hottest loop treats `elements`."""
        return self.loop.total() * self.threads / elements


class _Absent:
    """A driver that knows what to compile for and can do nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        # the key under which a kernel keeps what it compiled
        return self.target

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compiled(target: str) -> Iterator[list[Code]]:
    """Kernels launched inside are compiled, specialised to their arguments as ever, listed, and not run.

    Tensors may be on any device. Raises KeyError for a target that is not in `TARGETS`.
    """
    codes: list[Code] = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        codes.append(_read(run(kernel, *args, grid=grid, warmup=True, **kwargs)))

    # host code asks torch which vendor it launches for
    hip = "ahead of time" if TARGETS[target].backend == "hip" else None
    with (
        patch.object(driver, "_active", _Absent(TARGETS[target])),
        patch.object(JITFunction, "run", compile_only),
        patch.object(torch.version, "hip", hip),
    ):
        yield codes


def _read(kernel: Any) -> Code:
    metadata = kernel.metadata
    threads = metadata.num_warps * metadata.target.warp_size
    if "cubin" in kernel.asm:
        registers, stack, instructions = _nvidia(kernel.asm["cubin"])
    else:
        registers, stack, instructions = _amd(kernel.asm["amdgcn"])
    return Code(metadata.name, threads, registers, stack, metadata.shared, _hottest(instructions))


class _Instruction(NamedTuple):
    place: int
    opcode: str
    target: int | None
    """Where a branch goes."""


def _nvidia(cubin: bytes) -> tuple[int, int, list[_Instruction]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        listing = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resource usage: {usage!r}")
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([^;]*);"
    instructions = []
    for place, opcode, operands in re.findall(pattern, listing):
        to = re.search(r"0x([0-9a-f]+)$", operands.strip()) if opcode == "BRA" else None
        instructions.append(_Instruction(int(place, 16), opcode, int(to[1], 16) if to else None))
    return int(found[1]), int(found[2]), instructions


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run([knobs.nvidia.cuobjdump.path, *arguments], capture_output=True, text=True, check=True).stdout


def _amd(listing: str) -> tuple[int, int, list[_Instruction]]:
    sizes = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", listing))
    body = listing[: listing.index("s_endpgm")]
    labels: dict[str, int] = {}
    lines = []
    for line in body.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+([a-z]\w+)(.*)", line):
            lines.append(found.groups())
    instructions = []
    for place, (opcode, operands) in enumerate(lines):
        to = labels.get(operands.strip()) if opcode.startswith(("s_cbranch", "s_branch")) else None
        instructions.append(_Instruction(place, opcode, to))
    return int(sizes["vgpr_count"]), int(sizes["private_segment_fixed_size"]), instructions


def _hottest(instructions: list[_Instruction]) -> Counter[str]:
    """Opcodes of the innermost loop with most matrix instructions, then with most instructions."""
    loops = [(i.target, i.place) for i in instructions if i.target is not None and i.target < i.place]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [Counter(i.opcode for i in instructions if start <= i.place <= end) for start, end in inner]
    if not bodies:
        return Counter(i.opcode for i in instructions)
    return max(bodies, key=lambda body: (sum(n for o, n in body.items() if MATRIX.match(o)), body.total()))
