"""Ray Tune's own state of a search: read, or refused. A search is drawn anew only where there is none."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from typing import Any

# One per run of the search, named by the time it began; Ray Tune reads the newest.
_STATE_FILES = "experiment_state-*.json"


def restored_tuner(
    tune_path: str, trainable: Any, param_space: dict[str, Any], say: Callable[[str], None]
) -> Any | None:
    """Ray Tune's search as it was left, or None where it left no trial.

    Without its state the search starts from trial 1. The same seed proposes the same trials, and their finished folds
    are there: nothing is trained again where one trial runs at a time.

    Args:
        tune_path: folder or URL of Ray Tune's experiment.

    Raises:
        RuntimeError: there is a state, but it cannot be read. Taken for none, it would cost the finished trials.
    """
    from ray import tune

    if not _num_trials(tune_path):
        return None
    try:
        tuner = tune.Tuner.restore(tune_path, trainable, resume_errored=True, param_space=param_space)
        # Left to `fit`, Ray Tune would log an unreadable state and start a new search beside the old one.
        known = len(tuner.get_results())
    except Exception as error:
        raise RuntimeError(_unreadable(tune_path, error)) from error
    say(f"{known} trials are known; those that were cut off or failed go on")
    return tuner


def _num_trials(tune_path: str) -> int:
    """Trials in the newest state file, 0 where there is no such file."""
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(tune_path)
        names = files.ls(path, detail=False) if files.exists(path) else []
    except Exception as error:
        raise RuntimeError(_unreadable(tune_path, error)) from error
    found = fnmatch.filter(names, f"*/{_STATE_FILES}")
    if not found:
        return 0
    newest = max(found)
    try:
        return len(json.loads(files.cat_file(newest))["trial_data"])
    except Exception as error:
        raise RuntimeError(_unreadable(newest, error)) from error


def _unreadable(what: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return f"Ray Tune's state {what} cannot be read ({reason}); nothing was changed, resume again once it can be"
