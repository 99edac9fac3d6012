"""What a plugin implements: one function.

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
