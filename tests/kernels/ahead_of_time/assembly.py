"""Inline PTX in Triton's interpreter, which has none: what kernels write in assembly runs on NumPy, bit for bit."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Words = NDArray[np.uint32]


@contextmanager
def emulated() -> Iterator[None]:
    """Inside, interpreted kernels may use inline assembly of 32-bit registers; unknown instructions raise KeyError."""
    with patch.object(InterpreterBuilder, "create_inline_asm", _create_inline_asm):
        yield


def _create_inline_asm(
    self: InterpreterBuilder, text: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
) -> SimpleNamespace:
    # of 16-bit numbers, neighbours share a register
    outputs = run(text, constraints, [np.ascontiguousarray(value.data).view(np.uint32) for value in values])
    like = values[0]
    handles = [TensorHandle(words.view(like.data.dtype), like.dtype.scalar) for words in outputs]
    return SimpleNamespace(get_result=lambda index: handles[index])


def run(text: str, constraints: str, inputs: list[Words]) -> list[Words]:
    """What `text` leaves in its outputs. Raises ValueError if an output may share a register with an input that is
    still to be read."""
    kinds = constraints.split(",")
    outputs = [kind for kind in kinds if kind.startswith("=")]
    if set(kinds) - {"=r", "=&r", "r"} or len(outputs) + len(inputs) != len(kinds):
        raise ValueError(f"constraints {constraints!r} do not fit {len(inputs)} inputs of 32 bits")
    lines = re.findall(r"([a-z][\w.]*)\s+([^;{}]+);", re.sub(r"\.reg[^;]*;", "", text))
    if len(lines) > 1 and "=r" in outputs:
        raise ValueError("several instructions need outputs of their own: =&r")
    registers = {f"${len(outputs) + index}": words for index, words in enumerate(inputs)}
    for opcode, operands in lines:
        to, *sources = (operand.strip() for operand in operands.split(","))
        arguments = [registers[name] if name in registers else np.uint32(int(name, 0)) for name in sources]
        registers[to] = np.broadcast_to(_OPERATIONS[opcode](*arguments), inputs[0].shape).astype(np.uint32)
    return [registers[f"${index}"] for index in range(len(outputs))]


def _permute(low: Words, high: Words, selector: Words) -> Words:
    """prmt: each nibble of the selector names one of eight bytes, or with its highest bit set that byte's sign."""
    from_bytes = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(low)
    for byte in range(4):
        nibble = selector >> np.uint32(4 * byte) & np.uint32(15)
        found = (from_bytes >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint32)
        found = found & np.uint32(255)
        sign = (found >> np.uint32(7)) * np.uint32(255)
        result = result | np.where(nibble & np.uint32(8), sign, found).astype(np.uint32) << np.uint32(8 * byte)
    return result


def _logic(a: Words, b: Words, c: Words, table: Words) -> Words:
    """lop3: bit `4 * a + 2 * b + c` of the table, for every bit of the operands."""
    result = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            x, y, z = (~word if not row & bit else word for word, bit in ((a, 4), (b, 2), (c, 1)))
            result = result | x & y & z
    return result


def _halves(operation: Callable[..., NDArray[np.float64]]) -> Callable[..., Words]:
    """An operation on two float16 per register, rounded once."""

    def on_words(*words: Words) -> Words:
        numbers = (np.ascontiguousarray(word).view(np.float16).astype(np.float64) for word in words)
        return operation(*numbers).astype(np.float16).view(np.uint32)

    return on_words


_OPERATIONS = {
    "add.rn.f16x2": _halves(np.add),
    "sub.rn.f16x2": _halves(np.subtract),
    "mul.rn.f16x2": _halves(np.multiply),
    "neg.f16x2": _halves(np.negative),
    "fma.rn.f16x2": _halves(lambda a, b, c: a * b + c),
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "not.b32": np.invert,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "shr.b32": np.right_shift,
    "prmt.b32": _permute,
    "lop3.b32": _logic,
}
