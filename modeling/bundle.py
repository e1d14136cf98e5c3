"""The model bundle: one directory with everything that scores a lesion; its manifest hashes every file.

Nothing in it is pickled (ONNX, LightGBM text, JSON, npz, Parquet) and nothing in it identifies a patient.
`modeling.bundle_manifest` writes one; here it is fetched, verified and opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from pydantic import ValidationError

from modeling.bundle_manifest import (
    IMAGE_SCORER,
    MANIFEST,
    PARITY,
    PROJECTION,
    REFERENCE,
    BundleManifest,
    files_below,
    sha256_file,
    write_manifest,
)
from modeling.schema import TaskSpec

if TYPE_CHECKING:
    import pandas

    from modeling.abstention import AbstentionRule
    from modeling.metadata_fusion import ContextModel
    from modeling.tested_risks import TestedRisks

__all__ = ["Bundle", "BundleManifest", "default_cache_dir", "load_bundle", "write_manifest"]


class _Contexts(Mapping[str, "ContextModel"]):
    """The bundle's fusion models by context, loaded on first use: the image scorer's replica needs no LightGBM."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._loaded: dict[str, ContextModel] = {}

    def __getitem__(self, context: str) -> ContextModel:
        if context not in self._bundle.manifest.contexts:
            raise KeyError(context)
        if context not in self._loaded:
            from modeling.metadata_fusion import ContextModel

            self._loaded[context] = ContextModel.load(
                self._bundle.directory / "contexts" / context, self._bundle.manifest.task
            )
        return self._loaded[context]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.manifest.contexts)

    def __len__(self) -> int:
        return len(self._bundle.manifest.contexts)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on local disk.

    Attributes:
        directory: where its files lie.
        digest: hex sha256 of manifest.json.
        manifest: the parsed manifest.
    """

    directory: Path
    digest: str
    manifest: BundleManifest

    def __post_init__(self) -> None:
        object.__setattr__(self, "_contexts", _Contexts(self))

    @property
    def task(self) -> TaskSpec:
        return self.manifest.task

    def _of_image_model(self, name: str) -> Path:
        if "image" not in self.manifest.modalities:
            raise ValueError(f"bundle {self.manifest.name!r} has no image model")
        return self.directory / name

    @property
    def onnx_path(self) -> Path:
        """The image model; ValueError for a bundle that scores metadata only, as for `projection` and `parity`."""
        return self._of_image_model(IMAGE_SCORER)

    @property
    def contexts(self) -> Mapping[str, ContextModel]:
        """Fusion models by context, each loaded on first access; KeyError for a context the bundle lacks."""
        return self._contexts  # type: ignore[attr-defined]

    def projection(self) -> tuple[np.ndarray, np.ndarray]:
        """(matrix float32 (D, 64), mean float32 (D,)): a logged embedding is `(embedding - mean) @ matrix`."""
        with np.load(self._of_image_model(PROJECTION), allow_pickle=False) as arrays:
            return arrays["matrix"].astype(np.float32), arrays["mean"].astype(np.float32)

    def abstention(self) -> AbstentionRule | None:
        """When the model does not score; None for bundles of before, of metadata alone, and of little data: they score
        everything.

        Raises:
            ValueError: the rule's files are unreadable or do not fit the network.
        """
        from modeling.abstention import AbstentionRule

        rule = AbstentionRule.load(self.directory) if "image" in self.manifest.modalities else None
        if rule is not None and len(rule.distance.mean) != self.manifest.embedding_dim:
            raise ValueError(
                f"bundle {self.manifest.name!r}: its abstention rule reads {len(rule.distance.mean)}-d embeddings, "
                f"its network gives {self.manifest.embedding_dim}"
            )
        return rule

    def parity(self) -> dict[str, np.ndarray]:
        """Fixed inputs and what torch answered: images uint8 (P, S, S, 3), logits (P, K), embedding (P, D) float32."""
        with np.load(self._of_image_model(PARITY), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("images", "logits", "embedding")}

    def reference(self) -> pandas.DataFrame:
        """The gate-split rows as this model scored them; drift is measured against them."""
        import pandas

        return pandas.read_parquet(self.directory / REFERENCE)

    def tested_risks(self) -> dict[str, TestedRisks]:
        """Risks of the gate split's lesions, and what they were, by context; without pandas."""
        from pyarrow import parquet

        from modeling.tested_risks import TestedRisks

        file = self.directory / REFERENCE
        columns = {f"risk_{context}": context for context in self.manifest.contexts}
        known = [name for name in columns if name in parquet.read_schema(file).names]
        table = parquet.read_table(file, columns=["label", *known])
        malignant = np.isin(table["label"].to_numpy(), self.task.malignant)
        return {columns[name]: TestedRisks(table[name].to_numpy(), malignant) for name in known}

    def metrics(self, context: str) -> dict[str, Any]:
        """The context's metrics.json; ValueError for a context the bundle lacks."""
        if context not in self.manifest.contexts:
            raise ValueError(
                f"bundle {self.manifest.name!r} has no context {context!r}; it has {self.manifest.contexts}"
            )
        return json.loads((self.directory / "contexts" / context / "metrics.json").read_text(encoding="utf-8"))


def _read_manifest(data: bytes, uri: str, sha256: str | None) -> tuple[BundleManifest, str]:
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(f"bundle {uri}: {MANIFEST} has sha256 {digest}, expected {sha256}; refused")
    try:
        manifest = BundleManifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or MANIFEST
        raise ValueError(f"bundle {uri}: {MANIFEST} is not valid: {field}: {first['msg']}") from error
    missing = [name for name in manifest.required_files if name not in manifest.files]
    if missing:
        raise ValueError(f"bundle {uri}: the manifest lacks {', '.join(missing)}")
    return manifest, digest


def _verify(directory: Path, manifest: BundleManifest, uri: str) -> None:
    present = set(files_below(directory))
    missing = sorted(set(manifest.files) - present)
    if missing:
        raise ValueError(f"bundle {uri}: {', '.join(missing)} missing; refused")
    # A file the manifest does not hash could be an extra booster that a loader picks up.
    unlisted = sorted(present - set(manifest.files))
    if unlisted:
        raise ValueError(f"bundle {uri}: {', '.join(unlisted)} not in the manifest; refused")
    for name, expected in manifest.files.items():
        actual = sha256_file(directory / name)
        if actual != expected:
            raise ValueError(f"bundle {uri}: {name} has sha256 {actual}, the manifest says {expected}; refused")


def default_cache_dir() -> Path:
    """Where fetched bundles are kept: `bundle_cache` under DERMRAY_HOME, else the user's cache folder."""
    home = os.environ.get("DERMRAY_HOME")
    return Path(home) / "bundle_cache" if home else Path.home() / ".cache" / "dermray" / "bundles"


def _fetch(uri: str, sha256: str | None, cache_dir: Path) -> Bundle:
    """Copies a remote bundle into the cache, keyed by its digest; a half-fetched one is never visible."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(uri)
    root = root.rstrip("/")
    try:
        data = filesystem.cat_file(f"{root}/{MANIFEST}")
    except FileNotFoundError as error:
        raise ValueError(f"no bundle at {uri}: {MANIFEST} not found") from error
    manifest, digest = _read_manifest(data, uri, sha256)
    target = cache_dir / digest
    if target.exists():
        _verify(target, manifest, str(target))
        return Bundle(directory=target, digest=digest, manifest=manifest)
    cache_dir.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".fetching-", dir=cache_dir))
    try:
        for name in manifest.files:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                filesystem.get_file(f"{root}/{name}", str(partial / name))
            except FileNotFoundError as error:
                raise ValueError(f"bundle {uri}: {name} missing; refused") from error
        (partial / MANIFEST).write_bytes(data)
        _verify(partial, manifest, uri)
        try:
            partial.rename(target)
        except OSError:
            # Another process fetched the same bundle meanwhile.
            if not target.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle(directory=target, digest=digest, manifest=manifest)


def load_bundle(uri: str | Path, sha256: str | None = None, cache_dir: str | Path | None = None) -> Bundle:
    """Opens a bundle after checking the hash of every file, fetching it first when it is not local.

    Args:
        uri: a directory, a file:// URI or any fsspec URL.
        sha256: the expected digest; None accepts whatever consistent bundle is there.
        cache_dir: where a fetched bundle is kept (default: `default_cache_dir()`).

    Raises:
        ValueError: no bundle there, or any file is missing, unlisted or changed.
    """
    text = str(uri)
    if text.startswith("file://"):
        directory = Path(url2pathname(urlsplit(text).path))
    elif "://" in text:
        return _fetch(text, sha256, Path(cache_dir) if cache_dir is not None else default_cache_dir())
    else:
        directory = Path(text)
    try:
        data = (directory / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"no bundle at {text}: {MANIFEST} not found") from error
    manifest, digest = _read_manifest(data, text, sha256)
    _verify(directory, manifest, text)
    return Bundle(directory=directory, digest=digest, manifest=manifest)
