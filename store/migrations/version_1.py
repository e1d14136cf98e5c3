"""The tables of the first release.

Never run: a store is at this version or beyond, or is made whole from `store.tables`.
"""

revision = "0001"
down_revision = None


def upgrade() -> None:
    raise AssertionError("a store begins at version 1")
