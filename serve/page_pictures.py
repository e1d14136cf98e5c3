"""Pictures as pages show them: turned upright, small, JPEG."""

from __future__ import annotations

import cv2

from modeling.preprocessing import decode_image
from serve.explanation import shrink

# Longest side on a page, pixels; with it and this quality a photograph of skin has some 60 KB.
PAGE_SIDE = 640
_QUALITY = 85


def page_jpeg(data: bytes, side: int = PAGE_SIDE) -> bytes:
    """A stored picture or a drawn map, at most `side` pixels on its longest side; without metadata."""
    shown = cv2.cvtColor(shrink(decode_image(data), side), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", shown, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()
