"""What tests of pages share: a small served model, its nodes, and a browser; made once in a process.

Imported before the tests are: what brings Ray or a browser along is loaded by the fixtures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serve.settings import ModelReference
    from tests.browser import Chromium
    from tests.bundle_factory import LocalFusion, LocalScorer
    from tests.local_service import LocalService


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ModelReference:
    """Version 3 of a model that learned nothing."""
    from tests.bundle_factory import served_bundle

    return served_bundle(tmp_path_factory.mktemp("pages") / "bundle", version="3")


@pytest.fixture(scope="session")
def nodes(reference: ModelReference) -> tuple[LocalScorer, LocalFusion]:
    """Scorer and fusion, which several services share: loading a bundle takes its time."""
    from tests.bundle_factory import LocalFusion, LocalScorer

    return LocalScorer(reference), LocalFusion(reference)


@pytest.fixture
def local(reference: ModelReference, nodes: tuple[LocalScorer, LocalFusion], dermray_home: Path) -> LocalService:
    """A service with a store of its own."""
    from tests.local_service import LocalService

    return LocalService(reference, dermray_home, nodes=nodes)


# Not of the session: Playwright keeps an event loop running in this thread, and other modules call `asyncio.run`.
@pytest.fixture(scope="module")
def _browser() -> Iterator[Chromium]:
    from tests.browser import chromium

    with chromium() as running:
        yield running


@pytest.fixture
def browser(_browser: Chromium) -> Iterator[Chromium]:
    """A browser without tabs."""
    yield _browser
    _browser.close_tabs()
