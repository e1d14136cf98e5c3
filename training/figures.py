"""Matplotlib without a screen."""

from __future__ import annotations

from typing import Any


def headless_pyplot() -> Any:
    """`matplotlib.pyplot` with the backend that only writes files; imported when asked for, as it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
