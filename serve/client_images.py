"""Image files as a caller has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

Image = str | os.PathLike[str] | bytes | BinaryIO
"""An image file: its path, its bytes, or a file opened in binary mode, which is read from where it stands."""


def read_image(image: Image) -> bytes:
    """The file's bytes, read once for all attempts.

    Raises:
        OSError: the path cannot be read.
        TypeError: a file opened in text mode, or nothing of the kind.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    data = image.read() if hasattr(image, "read") else None
    if not isinstance(data, bytes):
        raise TypeError(f"image: {type(image).__name__}; expected a path, bytes, or a file opened in binary mode")
    return data
