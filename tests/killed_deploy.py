"""`deploy_service` in a process that is killed around a call of its own: of the n-th one, before it or after it.

    python -m tests.killed_deploy after ray_jobs.deploy_service:check_room 1 [--without MODULE:NAME] --bundle ...

Only this process is changed: what it has asked the cluster for, the cluster does or does not do.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
from typing import Any


def kill_around(when: str, place: str, number: int) -> None:
    """Has this process killed at the n-th call of `module:name` or `module:Class.method`.

    Args:
        when: `before` the call, or `after` it, when it has returned.
    """
    assert when in ("before", "after"), when
    owner, name = _place(place)
    whole, calls = getattr(owner, name), itertools.count(1)

    def killing(*arguments: Any, **options: Any) -> Any:
        here = next(calls) == number
        if here and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = whole(*arguments, **options)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, killing)


def leave_out(place: str) -> None:
    """Has calls of `module:name` do nothing."""
    owner, name = _place(place)
    setattr(owner, name, lambda *_: None)


def _place(place: str) -> tuple[Any, str]:
    """The module or class that holds `module:name` or `module:Class.method`, and the name."""
    module, _, dotted = place.partition(":")
    *path, name = dotted.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def main() -> None:
    when, place, number = sys.argv[1:4]
    del sys.argv[1:4]
    kill_around(when, place, int(number))
    while sys.argv[1] == "--without":
        leave_out(sys.argv[2])
        del sys.argv[1:3]
    # Only now, since it may be `run` itself.
    from ray_jobs.deploy_service import DeployServiceConfig, run
    from ray_jobs.job import run_job

    run_job("deploy_service", DeployServiceConfig, run)


if __name__ == "__main__":
    main()
