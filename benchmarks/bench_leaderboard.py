"""Every variant of every installed strategy on the reference model and its outlier twin.

The time is that of one streaming evaluation, without the calibration of strategies that need one; what it found is in
`extra_info` and in the summary below the tables.
"""

from contextlib import suppress

import pytest

from cachequant.benchmarks.leaderboard import installed, measure
from cachequant.benchmarks.subjects import REFERENCE, TWIN


@pytest.mark.parametrize("panel", [REFERENCE, TWIN])
@pytest.mark.parametrize("candidate", installed(), ids=lambda candidate: candidate.spec)
def test_leaderboard(benchmark, subjects, enter, candidate, panel):
    benchmark.group = panel
    with suppress(Exception):  # told again by the row
        subjects[panel].ready(candidate.build())
    row = benchmark.pedantic(measure, args=(subjects[panel], candidate), rounds=1, iterations=1)
    enter(row)
    if row.error:
        pytest.fail(row.error, pytrace=False)
    benchmark.extra_info.update(
        strategy=row.strategy,
        bits_per_element=row.memory.bits_per_element,
        bytes=row.memory.device_bytes,
        ratio=row.memory.ratio,
        **row.accuracy.model_dump(),
    )
