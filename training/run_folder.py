"""What a training run's folder says: its config and data set in `run.json`, and `<network>.json` for each network that
has finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from training.config import TrainingConfig

RUN_FILE = "run.json"


def network_name(fold: int | None) -> str:
    """The name of a run's network: of the one that did not see `fold`, or of the refit on all folds (None)."""
    return "refit" if fold is None else f"fold_{fold}"


def read_identity(folder: Path) -> tuple[TrainingConfig, str]:
    """Config and data set digest of a run.

    Raises:
        ValueError: not a run's folder, or a config that the code does not know any more.
    """
    file = folder / RUN_FILE
    if not file.exists():
        raise ValueError(f"{folder} is not the folder of a training run: it has no {RUN_FILE}")
    facts = json.loads(file.read_text(encoding="utf-8"))
    try:
        return TrainingConfig.model_validate(facts["config"]), facts["dataset"]
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in reason["loc"])
        raise ValueError(f"{file} holds a config that is not valid any more: {where}: {reason['msg']}") from error


def read_network(folder: Path, name: str) -> dict[str, Any] | None:
    """{"checkpoint": folder, "metrics": ...} of a finished network; None where it has not finished or is gone."""
    record = folder / f"{name}.json"
    if not record.exists():
        return None
    facts = json.loads(record.read_text(encoding="utf-8"))
    return facts if Path(facts["checkpoint"]).exists() else None
