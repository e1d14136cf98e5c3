"""Makes, lists and revokes the keys that callers of the HTTP service send as X-API-Key.

`--action create --name N --role R --actor WHO` prints the key once, in the last line; the store keeps its SHA-256 only.
With `--key-file` it is written there first, and a run that was cut off before the store had it is finished by the same
command. Without, every run makes another key: one whose text was never seen is found by `--action list`, and revoked.
To replace a key, make a second one of the same name, hand it over, then `--action revoke --id ID --actor WHO`.
"""

from __future__ import annotations

import errno
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from modeling.locations import SUBMITTED
from ray_jobs.job import JobConfig, Location, run_job
from store.api_keys import ROLES, ApiKey, create_api_key, is_key_text, list_api_keys, new_key_text, revoke_api_key
from store.database import Store, StoreUnavailableError, open_store
from store.synced_files import replacing


class ManageApiKeysConfig(JobConfig):
    action: Literal["create", "revoke", "list"] = "list"
    name: str | None = Field(None, description="create: who will use the key")
    role: str | None = Field(None, description=f"create: one of {', '.join(ROLES)}; each may do what those before may")
    id: str | None = Field(None, description="revoke: the key's id, as list shows it")
    actor: str | None = Field(None, description="create, revoke: name of the person who does it")
    key_file: Location | None = Field(
        None, description="create: a new file for the key, readable by its owner only, instead of the last line"
    )
    store_url: Location = "sqlite:///store.db"


_MAX_KEY_FILE_BYTES = 200
_FLAGS = {"create": ("name", "role", "actor"), "revoke": ("id", "actor"), "list": ()}


def _check(config: ManageApiKeysConfig) -> None:
    needed = _FLAGS[config.action]
    for flag in ("name", "role", "id", "actor"):
        value = getattr(config, flag)
        # A flag without a value arrives as "true".
        if flag in needed and (value is None or value == "true"):
            raise ValueError(f"--{flag} is missing; action {config.action} needs {', '.join(f'--{n}' for n in needed)}")
        if flag not in needed and value is not None:
            raise ValueError(f"--{flag} {value}: action {config.action} takes no --{flag}")
    if config.key_file is not None and config.action != "create":
        raise ValueError(f"--key-file {config.key_file}: action {config.action} takes no --key-file")
    if config.action == "create" and config.key_file is None and os.environ.get(SUBMITTED):
        raise ValueError("--key-file is missing; Ray keeps what a submitted job prints, and the key would be in it")


def _shown(key: ApiKey) -> dict[str, Any]:
    def time(microseconds: int | None) -> str | None:
        return microseconds and datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="seconds")

    return {
        "id": key.id,
        "name": key.name,
        "role": key.role,
        "created_at": time(key.created_at),
        "revoked_at": time(key.revoked_at),
    }


def _create(config: ManageApiKeysConfig, store: Store) -> dict[str, Any]:
    if config.key_file is None:
        key, text = create_api_key(store, config.name, config.role, config.actor)
        return {**_shown(key), "key": text}
    path = Path(config.key_file)
    try:
        # On disk before the store has the key, which would otherwise live without anyone who has it.
        path.parent.mkdir(parents=True, exist_ok=True)
        left = _left_key(path)
        text = left or _write_key(path)
    except OSError as error:
        raise ValueError(f"key_file {path}: {error.strerror}") from error
    try:
        key, _ = create_api_key(store, config.name, config.role, config.actor, text)
    except ValueError as error:
        if left is not None:
            raise ValueError(f"key_file {path}: File exists; {error}") from error
        path.unlink()
        raise
    return {**_shown(key), "key_file": str(path)}


def _left_key(path: Path) -> str | None:
    """The key in a file that perhaps a run left which was cut off before the store had it; None where there is no file.

    Raises:
        OSError: the file is none that such a run leaves, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        facts = os.fstat(descriptor)
        # What others can write or read is no secret of ours.
        ours = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077
        text = os.read(descriptor, _MAX_KEY_FILE_BYTES).decode("ascii", "replace") if ours else ""
    finally:
        os.close(descriptor)
    if not is_key_text(text.removesuffix("\n")):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    return text.removesuffix("\n")


def _write_key(path: Path) -> str:
    """Writes a new key to a new file, readable by its owner only; returns the key."""
    text = new_key_text()
    with replacing(path) as temporary:
        # Under the folder's lock: no other run's file is replaced.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text + "\n")
    return text


def run(config: ManageApiKeysConfig) -> dict[str, Any]:
    """Does one action; returns the key it was about, or the list."""
    _check(config)
    try:
        # Only the first key may come before the service that makes the store.
        store = open_store(config.store_url, create=config.action == "create")
        if config.action == "create":
            return {"action": "create", **_create(config, store)}
        if config.action == "revoke":
            key, changed = revoke_api_key(store, config.id, config.actor)
            return {"action": "revoke", **_shown(key), "changed": changed}
        return {"action": "list", "keys": [_shown(key) for key in list_api_keys(store)]}
    except StoreUnavailableError as error:
        raise ValueError(f"store_url: {error}") from error


if __name__ == "__main__":
    run_job("manage_api_keys", ManageApiKeysConfig, run, __doc__)
