"""Brings the schema of an older store up to date with alembic, one revision per schema version.

Loaded only where a store is made or upgraded: alembic takes 0.1 s to load.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import Script, ScriptDirectory
from sqlalchemy.engine import Connection

from store.tables import schema

_FOLDER = Path(__file__).parent / "migrations"
# `alembic.op` is one for the whole process.
_one_upgrade = threading.Lock()


class Migration(NamedTuple):
    """A step of the schema.

    Attributes:
        version: the schema version that it leads to.
        summary: what it brings, in one line.
    """

    version: int
    summary: str


def revision_of(version: int) -> str:
    """Alembic's name of a schema version."""
    return f"{version:04d}"


def migrations_after(version: int) -> list[Migration]:
    """What a store of this schema version lacks, oldest first."""
    return [Migration(int(step.revision), step.doc) for step in _steps(_directory(), version)]


def mark_new(connection: Connection) -> None:
    """Notes in a store that was just made from `store.tables` that it has every revision."""
    _context(connection).stamp(_directory(), "head")


def upgrade(connection: Connection, version: int) -> None:
    """Runs every migration after `version`, in the caller's transaction.

    Raises:
        ValueError: the store's own records of its version contradict each other.
        sqlalchemy.exc.DBAPIError: the database refuses a step.
    """
    directory, context = _directory(), _context(connection)
    noted = context.get_current_revision()
    # Releases before version 4 did not use alembic.
    if noted not in (None, revision_of(version)):
        raise ValueError(f"the store has schema version {version} in schema_version, but {noted} in alembic_version")
    with _one_upgrade, Operations.context(context):
        for step in _steps(directory, version):
            step.module.upgrade()
    context.stamp(directory, "head")


def _directory() -> ScriptDirectory:
    return ScriptDirectory(str(_FOLDER), version_locations=[str(_FOLDER)])


def _context(connection: Connection) -> MigrationContext:
    # The schema's names for keys and constraints.
    return MigrationContext.configure(connection, opts={"target_metadata": schema})


def _steps(directory: ScriptDirectory, version: int) -> list[Script]:
    return list(directory.iterate_revisions("head", revision_of(version)))[::-1]
