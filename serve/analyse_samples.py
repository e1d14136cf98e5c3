"""Sample lesions of the Analyse page: generated pictures, for a first look without one's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A generated lesion.

    Attributes:
        name: of its file, which the page loads.
        title: what it looks like.
        picture: the file, JPEG.
        metadata: what the form would say of it.
    """

    name: str
    title: str
    picture: bytes
    metadata: dict[str, Any]


def load_samples() -> dict[str, Sample]:
    """The samples by name, in the order in which they are shown."""
    folder = resources.files("serve").joinpath("web").joinpath("samples")
    entries = json.loads(folder.joinpath("samples.json").read_text(encoding="utf-8"))
    return {
        entry["file"]: Sample(
            entry["file"], entry["title"], folder.joinpath(entry["file"]).read_bytes(), entry["metadata"]
        )
        for entry in entries
    }
