"""API keys: shown once, kept as SHA-256, never deleted; each creation and revocation with its audit entry."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Literal, get_args

import sqlalchemy as sql

from store.database import Store
from store.tables import api_keys, now_us

Role = Literal["caller", "reviewer", "approver", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)

KEY_PREFIX = "drk_"
_KEY_BYTES = 32
# 32 bytes in base64url.
_KEY_TEXT = re.compile(KEY_PREFIX + r"[A-Za-z0-9_-]{43}")
_MAX_TEXT = 255
_NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# What callers of a service without keys are called: a key of this name would own their records.
_RESERVED = "anonymous"


@dataclass(frozen=True)
class ApiKey:
    """A stored key. `key_hash`: hex SHA-256 of its text; times: microseconds since the epoch, UTC."""

    id: str
    name: str
    role: Role
    key_hash: str
    created_at: int
    revoked_at: int | None = None


def hash_key(text: str | bytes) -> str:
    """Hex SHA-256 of a key's text. A slow hash is for passwords: these are 256 random bits, which no one guesses."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def _named(value: str, field: str) -> str:
    text = value.strip()
    if not text or len(text) > _MAX_TEXT or _NOT_PRINTABLE.search(text):
        raise ValueError(f"{field} is {value[:60]!r}; expected 1 to {_MAX_TEXT} printable characters")
    return text


def new_key_text() -> str:
    """A key that nobody has."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def is_key_text(text: str) -> bool:
    """Whether a text is such as `new_key_text` makes."""
    return _KEY_TEXT.fullmatch(text) is not None


def create_api_key(store: Store, name: str, role: str, actor: str, text: str | None = None) -> tuple[ApiKey, str]:
    """Makes a key; returns it and its text, which is kept nowhere.

    Two live keys may have one name, so that a key can be replaced without a gap.

    Args:
        name: who uses the key; the log, the audit trail and idempotency keys know a request by it.
        actor: who makes it.
        text: of `new_key_text`, where it was kept before the key is made; None: a new one.

    Raises:
        ValueError: a name, role or actor that cannot be, or the store has a key of this text.
        StoreUnavailableError: nothing was made.
    """
    name, actor = _named(name, "name"), _named(actor, "actor")
    if name.lower() == _RESERVED:
        raise ValueError(f"name is {name!r}, which stands for callers without a key; expected another")
    if role not in ROLES:
        raise ValueError(f"role is {role!r}; expected one of {', '.join(ROLES)}")
    text = new_key_text() if text is None else text
    key = ApiKey(secrets.token_hex(6), name, role, hash_key(text), now_us())
    with store.writing() as connection:
        same = connection.execute(sql.select(api_keys.c.id).where(api_keys.c.key_hash == key.key_hash)).scalar()
        if same is not None:
            raise ValueError(f"the store has this key already, as {same}")
        connection.execute(sql.insert(api_keys).values(**vars(key)))
        store._append_audit(connection, actor, "create_api_key", f"api_key/{key.id}", {"name": name, "role": role})
    return key, text


def revoke_api_key(store: Store, key_id: str, actor: str) -> tuple[ApiKey, bool]:
    """Ends a key; returns it, and whether it was live until now.

    Raises:
        ValueError: no such key, or an actor that cannot be.
        StoreUnavailableError: nothing was changed.
    """
    actor = _named(actor, "actor")
    live = sql.and_(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
    with store.writing() as connection:
        changed = connection.execute(sql.update(api_keys).where(live).values(revoked_at=now_us())).rowcount == 1
        row = connection.execute(sql.select(api_keys).where(api_keys.c.id == key_id)).mappings().first()
        if row is None:
            raise ValueError(f"id is {key_id!r}; no API key has it")
        key = ApiKey(**row)
        if changed:
            detail = {"name": key.name, "role": key.role}
            store._append_audit(connection, actor, "revoke_api_key", f"api_key/{key.id}", detail)
    return key, changed


def list_api_keys(store: Store, live_only: bool = False) -> list[ApiKey]:
    """All keys, or those not revoked, oldest first.

    Raises:
        StoreUnavailableError: the database does not answer.
    """
    query = sql.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
    if live_only:
        query = query.where(api_keys.c.revoked_at.is_(None))
    with store.reading() as connection:
        return [ApiKey(**row) for row in connection.execute(query).mappings()]
