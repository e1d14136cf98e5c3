"""Where paths start: relative ones in a config at the absolute DERMRAY_HOME, never at the working directory, which in a
submitted job or a worker is a temporary copy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

REPO_ROOT = Path(__file__).resolve().parents[1]
# Set by Ray for the entry point of a submitted job; its working directory is an unpacked, temporary copy.
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_SQLITE = "sqlite:///"


def dermray_home() -> Path:
    """The absolute folder that all relative config paths start from (default: `var/` in the checkout).

    Raises:
        ValueError: in a submitted job without DERMRAY_HOME: its checkout is a temporary copy.
    """
    home = os.environ.get("DERMRAY_HOME")
    if home:
        if not Path(home).is_absolute():
            raise ValueError(f"DERMRAY_HOME is {home!r}; expected an absolute path")
        return Path(home)
    if os.environ.get(SUBMITTED):
        raise ValueError("DERMRAY_HOME is not set; pass it in the submitted job's runtime_env env_vars")
    return REPO_ROOT / "var"


def resolve_location(value: str, base: Path | None = None) -> str:
    """Makes a path or SQLite URL absolute against `base` (default DERMRAY_HOME); other URLs pass unchanged."""
    if value.startswith(_SQLITE):
        path = value.removeprefix(_SQLITE)
        return value if not path or path.startswith(("/", ":")) else _SQLITE + resolve_location(path, base)
    if "://" in value:
        return value
    path = Path(value).expanduser()
    return str(path if path.is_absolute() else Path(os.path.normpath((base or dermray_home()) / path)))


class LocationMarker:
    """Marks a field as a path, so that a flag's value can be resolved where the user typed it."""


Location = Annotated[str, LocationMarker(), AfterValidator(resolve_location)]
"""A path or URL. Relative in YAML: from DERMRAY_HOME. Relative in a flag: from where the command was typed."""
