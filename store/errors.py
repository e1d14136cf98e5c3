"""What a caller of the store has to tell apart, without loading a database library."""

from __future__ import annotations


class StoreUnavailableError(RuntimeError):
    """The database or the image store did not take a write or answer a read; the same call may succeed later."""
