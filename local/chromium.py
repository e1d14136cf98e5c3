"""An installed Chromium and how Playwright starts it: no browser of Playwright's own is downloaded."""

from __future__ import annotations

import os
import shutil
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = "--disable-gpu --disable-dev-shm-usage --disable-background-networking --disable-component-update".split()


def find_chromium() -> str | None:
    """The installed browser's program, or None."""
    return next((found for found in map(shutil.which, PROGRAMS) if found), None)


def launch_options() -> dict[str, Any]:
    """What `playwright.chromium.launch` is told.

    Raises:
        ValueError: no Chromium is installed.
    """
    program = find_chromium()
    if program is None:
        raise ValueError(f"no browser is installed; expected one of {', '.join(PROGRAMS)}")
    # Its sandbox refuses root, which containers run as.
    return {"executable_path": program, "args": [*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]}
