"""Amounts of memory as people write them: `80GB` is 80e9 bytes, `80GiB` is 80 * 2**30, `10%` a share."""

import re

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+|%)\s*")
_FORMS = "write a number and a unit, such as 80GB (80 * 10**9 bytes) or 80GiB (80 * 2**30 bytes)"
_COUNTS = {"": 1, "K": 2**10, "M": 2**20}
_COUNT = re.compile(r"\s*(\d+)\s*([KkMm]?)\s*")


def parse_size(text: str) -> int:
    """Bytes of `80GB`, `79.6GiB`, `512 MiB`; raises ValueError for anything else, a bare number and 0 included."""
    found = _AMOUNT.fullmatch(text)
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f"cannot read {text!r} as a size; {_FORMS}")
    size = int(float(found[1]) * UNITS[found[2].upper()])
    if not size:
        raise ValueError(f"{text!r} is no memory at all; {_FORMS}")
    return size


def parse_reserve(text: str, memory: int) -> int:
    """Bytes of a size, `0` for none, or of a share of `memory` bytes such as `10%`; raises ValueError otherwise."""
    if text.strip() == "0":
        return 0
    found = _AMOUNT.fullmatch(text)
    if found is None or found[2] != "%":
        try:
            return parse_size(text)
        except ValueError as error:
            raise ValueError(f"cannot read {text!r}; write a share such as 10%, a size such as 4GiB, or 0") from error
    share = float(found[1])
    if share >= 100:
        raise ValueError(f"{text!r} leaves nothing; reserve less than 100%")
    return int(memory * share / 100)


def parse_count(text: str) -> int:
    """Tokens of `131072`, `128K` (128 * 1024) or `1M` (1024 * 1024); raises ValueError for anything else."""
    found = _COUNT.fullmatch(text)
    tokens = int(found[1]) * _COUNTS[found[2].upper()] if found else 0
    if not tokens:
        raise ValueError(f"cannot read {text!r} as a number of tokens; write one such as 131072, 128K or 1M (of 1024)")
    return tokens


def size(number: float) -> str:
    """Bytes in the binary unit that suits them."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"
