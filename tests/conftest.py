"""Fixtures that every test may use: a home of its own, and one real Ray cluster for the whole run.

`make test` may run while a demo is up, or twice at once: nothing here uses a fixed port or folder.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.cluster import LocalCluster
from local.head_environment import LOOPBACK_ONLY
from tests.page_fixtures import _browser, browser, local, nodes, reference
from tests.postgres_server import any_store_url, postgres_server, postgres_url

__all__ = ["_browser", "any_store_url", "browser", "local", "nodes", "postgres_server", "postgres_url", "reference"]

REPO_ROOT = Path(__file__).resolve().parents[1]
SERVER_MARKS = ("ray", "browser", "slow", "postgres")
_forbidden_skips: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--forbid-server-skips",
        action="store_true",
        help=f"fail when a test marked {', '.join(SERVER_MARKS)} is skipped (what CI does)",
    )


def _end_like_an_interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt("terminated")


def pytest_configure(config: pytest.Config) -> None:
    # By default SIGTERM ends pytest without running finalizers, and the cluster would stay.
    signal.signal(signal.SIGTERM, _end_like_an_interrupt)
    _forbidden_skips.clear()
    # Ray reads these when it is imported, which test modules may do before any fixture runs.
    os.environ.update(LOOPBACK_ONLY | {"RAY_AUTH_MODE": "token"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Those without the mark run in several processes, and a host has room for one cluster.
        if "ray_cluster" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("ray"):
            raise pytest.UsageError(f"{item.nodeid} uses the fixture ray_cluster without the mark `ray`")
    if Path("/dev/nvidia0").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Also where other processes run the tests: their reports come here with the tests' marks among the keywords.
    marked = any(mark in report.keywords for mark in SERVER_MARKS) and "gpu" not in report.keywords
    if report.skipped and marked and not hasattr(report, "wasxfail"):
        _forbidden_skips.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    # `importorskip` at the top of a module: its tests were never collected, so their marks are in the source only.
    if report.skipped and report.fspath.endswith(".py"):
        source = (REPO_ROOT / report.fspath).read_text(encoding="utf-8")
        if re.search(rf"mark\.({'|'.join(SERVER_MARKS)})\b", source):
            _forbidden_skips.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("forbid_server_skips") and _forbidden_skips:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("forbid_server_skips") and _forbidden_skips:
        terminalreporter.section("server tests must not be skipped")
        for nodeid in _forbidden_skips:
            terminalreporter.line(f"FAILED {nodeid} - skipped")


@pytest.fixture(autouse=True)
def dermray_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DERMRAY_HOME of this test: an empty folder under its tmp_path."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("DERMRAY_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """One Ray head for the whole run, with dashboard and token; ended, with everything it started, at the end."""
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster"), num_cpus=4)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def _driver(ray_cluster: LocalCluster) -> Iterator[None]:
    """This process as a driver of `ray_cluster`, connected once.

    Every connection after the first leaves a native thread behind (measured: 3, 4 and 5 unnamed ones after one, two
    and three connections), most likely Ray's metrics exporter. A run that had connected twice, all its tests green,
    ended in a segmentation fault on an unnamed thread.
    """
    import ray
    from ray._raylet import AuthenticationTokenLoader

    search_path = os.pathsep.join(filter(None, [str(REPO_ROOT), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_cluster.client_environment().items():
            patch.setenv(name, value)
        # Importing ray.serve, which test modules do, looks for a token and remembers that there was none.
        AuthenticationTokenLoader.instance().reset_cache()
        ray.init(
            address=ray_cluster.address,
            runtime_env={"env_vars": {"PYTHONPATH": search_path}},
            logging_level="warning",
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_connected(ray_cluster: LocalCluster, _driver: None) -> Iterator[LocalCluster]:
    """The cluster that this process is connected to; workers import the packages of this checkout."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_cluster.client_environment().items():
            patch.setenv(name, value)
        yield ray_cluster


@pytest.fixture
def many_classes():
    """A task of three classes, two of them malignant."""
    from modeling.schema import TaskSpec

    return TaskSpec(
        name="spots",
        fold_group="lesion_id",
        label_column="dx",
        classes=["nv", "mel", "bcc"],
        malignant=["mel", "bcc"],
    )
