"""Pictures as pages show them: turned upright, small, JPEG. Few are made at a time, and few wait for their turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import cv2
from starlette.requests import Request
from starlette.responses import Response

from modeling.preprocessing import decode_image
from serve.errors import unavailable
from serve.etags import matches
from serve.explanation import shrink

# Longest side on a page, pixels; with it and this quality a photograph of skin has some 60 KB.
PAGE_SIDE = 640
_QUALITY = 85
# A picture of 48 million pixels takes half a second and 150 MB; the ingress has other things to do meanwhile.
_THREADS = 1
# A page of a thousand lesions asks for those in sight, six at a time; so many are several people's.
_MAX_WAITING = 64


def page_jpeg(data: bytes, side: int = PAGE_SIDE) -> bytes:
    """A stored picture or a drawn map, at most `side` pixels on its longest side; without metadata."""
    shown = cv2.cvtColor(shrink(decode_image(data), side), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", shown, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()


class PagePictures:
    """Makes the pictures of one ingress replica's pages.

    Args:
        retry_after_s: what a 503 tells the browser.
    """

    def __init__(self, retry_after_s: int, max_waiting: int = _MAX_WAITING):
        self._retry_after_s = retry_after_s
        self._max_waiting = max_waiting
        self._waiting = 0
        self._turn = asyncio.Semaphore(2 * _THREADS)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pages")

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits until a picture may be made.

        Raises:
            ApiError: 503 when too many wait already.
        """
        if self._waiting >= self._max_waiting:
            raise unavailable(f"{self._waiting} pictures of pages wait already", self._retry_after_s)
        self._waiting += 1
        try:
            async with self._turn:
                yield
        finally:
            self._waiting -= 1

    async def jpeg(self, data: bytes, side: int = PAGE_SIDE) -> bytes:
        """`page_jpeg` in a thread; to be called in a `turn`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, page_jpeg, data, side)


def picture_headers(tag: str) -> dict[str, str]:
    """Kept by the browser only, and asked for again each time: the picture may be erased."""
    return {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}


def unchanged(request: Request, tag: str) -> Response | None:
    """304 for a browser that has the picture of this tag already."""
    known = matches(request.headers.get("If-None-Match"), tag)
    return Response(status_code=304, headers=picture_headers(tag)) if known else None
