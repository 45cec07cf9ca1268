"""Python loops compiled by numba at their first use: it is slow to load, so no module has it at its top."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache


@cache
def compiled(function: Callable) -> Callable:
    """`function` compiled, and kept on disk where numba finds a place for it."""
    import numba

    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:
        return numba.njit(function)
