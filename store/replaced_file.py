"""One file on a local path or fsspec URL that is written beside its place and moved there whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import fsspec

from store.synced_files import sync_folder


class HashedSink:
    """A file to append to that also knows the SHA-256 of what it was given."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._file.write(data)
        self.num_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._file.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    def sha256(self) -> str:
        return self._digest.hexdigest()


class ReplacedFile:
    """The file at a path or URL; OSError where the place cannot be read or written.

    On a bucket the move is a copy within the bucket; whoever reads meanwhile sees the old or the new object.
    """

    def __init__(self, url: str):
        self.url = url.removeprefix("file://")
        self.local = "://" not in self.url
        if self.local:
            self._path = Path(self.url)
        else:
            self._filesystem, self._key = fsspec.core.url_to_fs(self.url)

    def exists(self) -> bool:
        return self._path.exists() if self.local else self._filesystem.exists(self._key)

    def reachable(self) -> bool:
        """Whether a file that is not there is gone: not so where its folder is not there either, perhaps a volume of
        another machine. A bucket that does not answer raises."""
        return self._path.parent.is_dir() if self.local else True

    def open(self) -> IO[bytes]:
        """The file as it is, for reading."""
        return open(self._path, "rb") if self.local else self._filesystem.open(self._key, "rb")

    @contextmanager
    def writing(self, token: str) -> Iterator[HashedSink]:
        """Writes the file under a temporary name, on disk when the block ends, removed when it raises.

        Args:
            token: 32 hexadecimal digits, of this attempt alone.
        """
        temporary = self._temporary(token)
        try:
            if self.local:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with open(temporary, "xb") as file:
                    yield HashedSink(file)
                    file.flush()
                    os.fsync(file.fileno())
            else:
                self._filesystem.makedirs(temporary.rsplit("/", 1)[0], exist_ok=True)
                with self._filesystem.open(temporary, "wb") as file:
                    yield HashedSink(file)
        except BaseException:
            self.discard(token)
            raise

    def open_temporary(self, token: str) -> IO[bytes]:
        """What `writing` has written, for reading."""
        temporary = self._temporary(token)
        return open(temporary, "rb") if self.local else self._filesystem.open(temporary, "rb")

    def move(self, token: str) -> None:
        """Puts what `writing` has written in the file's place."""
        temporary = self._temporary(token)
        if self.local:
            os.replace(temporary, self._path)
            sync_folder(self._path.parent)
        else:
            self._filesystem.mv(temporary, self._key)

    def discard(self, token: str) -> None:
        """Removes what `writing` has written, if it is there."""
        temporary = self._temporary(token)
        if self.local:
            Path(temporary).unlink(missing_ok=True)
        elif self._filesystem.exists(temporary):
            self._filesystem.rm_file(temporary)

    def discard_all(self) -> None:
        """Removes what interrupted attempts have left; one that is under way fails when it moves its file."""
        if self.local:
            for leftover in self._path.parent.glob(f".{self._path.name}.*.tmp"):
                leftover.unlink(missing_ok=True)
            return
        folder, _, name = self._key.rpartition("/")
        for leftover in self._filesystem.glob(f"{folder}/.{name}.*.tmp"):
            self._filesystem.rm_file(leftover)

    def remove(self) -> bool:
        """Removes the file; False where none was."""
        if not self.exists():
            return False
        if self.local:
            self._path.unlink(missing_ok=True)
            sync_folder(self._path.parent)
        else:
            self._filesystem.rm_file(self._key)
        return True

    def _temporary(self, token: str) -> str:
        folder, separator, name = (str(self._path) if self.local else self._key).rpartition("/")
        return f"{folder}{separator}.{name}.{token}.tmp"
