"""The code of a deployment as one zip file, which replicas unpack that start after the deploying job's end."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

from store.synced_files import replacing

# What a replica imports; nothing above it (data pipelines, training, jobs) belongs into a live service.
PACKAGES = ("modeling", "monitoring", "serve", "store")
# The same code gives the same bytes, hence the same name and no restart of replicas.
_DATE = (1980, 1, 1, 0, 0, 0)


def _files(root: Path) -> list[Path]:
    files = []
    for package in PACKAGES:
        if not (root / package / "__init__.py").exists():
            raise ValueError(f"no package {package!r} in {root}; a release is made from a checkout of dermray")
        files += [
            file
            for file in (root / package).rglob("*")
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
        ]
    return sorted(files)


def write_release(root: Path, releases: Path) -> Path:
    """Packs the packages below `root` into `<releases>/<sha256[:16]>.zip`, unless that is there already.

    Raises:
        ValueError: `root` is no checkout.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in _files(root):
            entry = zipfile.ZipInfo(file.relative_to(root).as_posix(), _DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
    path = releases / f"{hashlib.sha256(content.getvalue()).hexdigest()[:16]}.zip"
    if not path.exists():
        releases.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content.getvalue())
            temporary.chmod(0o644)
    return path
