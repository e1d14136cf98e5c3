"""`make down`: ends what `make demo` left running, and nothing else on the host. The demo's files stay."""

from __future__ import annotations

import argparse
from pathlib import Path

from local.cluster import LocalCluster
from local.jobs import REPO_ROOT

DEMO_HOME = REPO_ROOT / "var" / "demo"
CLUSTER_FOLDER = "cluster"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=DEMO_HOME, help="the demo's folder")
    home = parser.parse_args(arguments).home.resolve()
    cluster = LocalCluster.load(home / CLUSTER_FOLDER)
    if cluster is None:
        print(f"no demo of {home} is running")
        return 0
    ended = cluster.stop()
    print(f"ended the demo: {ended} processes; its files stay in {home}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
