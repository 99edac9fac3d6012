"""What a plugin implements: one function, or both.

A third-party plugin is a module that defines it, and one line of its `pyproject.toml`::

    [project.entry-points.cachequant]
    fp8 = "cachequant_fp8"
"""

from collections.abc import Sequence

import pluggy

PROJECT = "cachequant"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def cachequant_strategies() -> Sequence[type]:
    """The strategy classes this plugin offers, each satisfying `cachequant.core.CacheQuantizer`."""
    return ()


@hookspec
def cachequant_tasks() -> Sequence[type]:
    """The benchmark tasks this plugin offers, each a subclass of `cachequant.benchmarks.tasks.base.Task`."""
    return ()
