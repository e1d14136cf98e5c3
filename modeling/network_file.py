"""A network in another precision than the bundle's, wherever it lies, known by its hash."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pydantic import BaseModel, ConfigDict, Field

from modeling.bundle_manifest import sha256_file


class NetworkFile(BaseModel):
    """An ONNX file that was made from a bundle's: a path or any fsspec URL, and the sha256 of its bytes (hex)."""

    model_config = ConfigDict(extra="forbid")

    uri: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    precision: str = Field(description="fp16 or int8")
    name: str = Field(description="for the engine's name: the precision, and how it was reached where that varies")

    def fetch(self, cache_dir: Path) -> Path:
        """The file on local disk, its hash checked; what is not local is copied to `cache_dir` once.

        Raises:
            ValueError: it is gone or was changed.
        """
        local = _local_path(self.uri)
        if local is not None:
            return self._checked(local)
        cached = cache_dir / f"{self.sha256}.onnx"
        if not cached.exists() or sha256_file(cached) != self.sha256:
            self._download(cached)
        return cached

    def _checked(self, path: Path) -> Path:
        if not path.exists():
            raise ValueError(f"network {self.uri} not found; run export_engine again")
        if (found := sha256_file(path)) != self.sha256:
            raise ValueError(f"network {self.uri} has sha256 {found}, expected {self.sha256}; run export_engine again")
        return path

    def _download(self, target: Path) -> None:
        import fsspec

        target.parent.mkdir(parents=True, exist_ok=True)
        filesystem, path = fsspec.core.url_to_fs(self.uri)
        descriptor, partial = tempfile.mkstemp(dir=target.parent, suffix=".partial")
        os.close(descriptor)
        try:
            try:
                filesystem.get_file(path, partial)
            except FileNotFoundError as error:
                raise ValueError(f"network {self.uri} not found; run export_engine again") from error
            os.replace(self._checked(Path(partial)), target)
        finally:
            Path(partial).unlink(missing_ok=True)


def _local_path(uri: str) -> Path | None:
    if uri.startswith("file://"):
        return Path(url2pathname(urlsplit(uri).path))
    return None if "://" in uri else Path(uri)


def keep_network(path: Path, folder: Path, precision: str, name: str | None = None) -> NetworkFile:
    """Moves a new network into `folder` under a name that no other network's bytes ever have: what a running service
    refers to stays as it is."""
    sha256, name = sha256_file(path), name or precision
    target = folder / f"{name}-{sha256[:16]}.onnx"
    os.replace(path, target)
    return NetworkFile(uri=str(target), sha256=sha256, precision=precision, name=name)
