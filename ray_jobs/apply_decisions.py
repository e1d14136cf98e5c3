"""Does what people decided at the service: goes back from a champion where someone asked for it, else promotes what
was approved, and swaps the running service.

It asks for nobody's name: the one who decided stands in the history, and the gate has its say as always. With
`--watch-s` it looks again every few seconds, so that a decision is done soon. Running it again changes nothing.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Any

from pydantic import Field

from modeling.registry import CHAMPION, Registry
from ray_jobs import promote_model
from ray_jobs.job import REPO_ROOT, JobConfig, Location, parse_config, run_job, say
from ray_jobs.promote_model import PromoteModelConfig
from store.champions import ROLLBACK_REFUSED, open_approvals, open_rollback, unfinished
from store.database import Store, StoreUnavailableError, open_store
from store.refusals import record_refusal

# Those of the newest candidates are looked at.
_MAX_CANDIDATES = 100


class ApplyDecisionsConfig(JobConfig):
    promote_config: Location | None = Field(None, description="of promote_model; null: configs/promote_model.yaml")
    deploy: bool = Field(True, description="swap the running service afterwards, as promote_model --deploy does")
    watch_s: float = Field(0, ge=0, le=86_400, description="go on looking for so long, seconds; 0: look once")
    poll_s: float = Field(5, ge=0.1, le=3_600, description="time between two looks, seconds")


def _promotion(config: ApplyDecisionsConfig) -> PromoteModelConfig:
    """How promotions are made here.

    Raises:
        ValueError: the config decides something itself.
    """
    file = Path(config.promote_config or REPO_ROOT / "configs" / "promote_model.yaml")
    promotion = parse_config(PromoteModelConfig, [], file)
    for name in ("approver", "model", "rollback", "auto"):
        if getattr(promotion, name):
            raise ValueError(f"promote_config: {file} sets {name}; expected what people decide at the service to do so")
    return promotion.model_copy(update={"deploy": config.deploy})


def _next(store: Store, tried: set[int]) -> tuple[int, str, dict[str, Any]] | None:
    """The next decision to do: its number, what it is, and fields of the promotion; None: all is done."""
    order = open_rollback(store)
    if order is not None and order["id"] not in tried:
        version = order["model_version"]
        fields = {"rollback": True, "model": version, "approver": order["approver"], "reason": order["reason"]}
        return order["id"], f"{order['approver']} asked to go back from version {version}", fields
    for row in open_approvals(store, _MAX_CANDIDATES):
        if row["id"] not in tried:
            version = row["model_version"]
            return row["id"], f"{row['approver']} approved version {version}", {"model": version}
    row = unfinished(store)
    if row is not None and row["id"] not in tried:
        # Promoting the champion changes nothing, and does what its own promotion was cut off before.
        fields = {"model": CHAMPION, "approver": row["approver"]}
        return row["id"], f"version {row['model_version']} became the champion, and the rest was cut off", fields
    return None


def _check_on_record(promotion: PromoteModelConfig) -> None:
    """That the champion is one by a decision: of an alias that was set by other means nothing was cut off, and whoever
    set it may have deployed it, or something else, as well."""
    registry = Registry(promotion.tracking_uri, promotion.model_name, promotion.artifact_root)
    champion, last = registry.resolve(CHAMPION), (registry.history() or [{}])[-1]
    if last.get("version") != champion.version:
        raise ValueError(
            f"version {champion.version} is the champion by no decision on record; deploy_service swaps it in"
        )


def _do(promotion: PromoteModelConfig, fields: dict[str, Any]) -> dict[str, Any]:
    if fields["model"] == CHAMPION:
        _check_on_record(promotion)
    return promote_model.run(PromoteModelConfig.model_validate({**promotion.model_dump(), **fields}))


def apply_next(promotion: PromoteModelConfig, store: Store, tried: set[int]) -> dict[str, Any] | None:
    """Does the next decision; returns what came of it, or None where there is none.

    Args:
        tried: numbers of decisions that are left alone; the one that is done, or refused, comes to them.

    Raises:
        StoreUnavailableError: the decision may be tried again.
    """
    found = _next(store, tried)
    if found is None:
        return None
    number, words, fields = found
    say(words)
    try:
        done = _do(promotion, fields)
    except StoreUnavailableError:
        raise
    except Exception as error:  # the registry's, Ray's and object storage's share no base; others wait behind this one
        expected = isinstance(error, (ValueError, FileNotFoundError))
        why = str(error) if expected else f"{type(error).__name__}: {error}"
        say(f"not done: {why}" if expected else traceback.format_exc())
        order = open_rollback(store)
        if order is not None and order["id"] == number:
            # Whoever asked looks at the page, not at this job's log.
            detail = {"order": number, "reason": why}
            record_refusal(store, order["approver"], ROLLBACK_REFUSED, f"model/{order['model_version']}", detail)
        tried.add(number)
        return {"decision": words, "refused": why}
    tried.add(number)
    shown = ("action", "champion", "previous", "changed", "approver")
    return {"decision": words} | {name: done[name] for name in shown}


def run(config: ApplyDecisionsConfig) -> dict[str, Any]:
    """Returns `done` and `refused`, in the order of what was decided."""
    promotion = _promotion(config)
    store = open_store(promotion.store_url)
    end = time.monotonic() + config.watch_s
    outcomes: list[dict[str, Any]] = []
    tried: set[int] = set()
    while True:
        try:
            outcome = apply_next(promotion, store, tried)
        except StoreUnavailableError as error:
            if config.watch_s == 0:
                raise
            say(str(error))
            outcome = None
        if outcome is not None:
            outcomes.append(outcome)
            continue
        left = end - time.monotonic()
        if left <= 0:
            break
        time.sleep(min(config.poll_s, left))
    return {
        "done": [outcome for outcome in outcomes if "refused" not in outcome],
        "refused": [outcome for outcome in outcomes if "refused" in outcome],
    }


if __name__ == "__main__":
    run_job("apply_decisions", ApplyDecisionsConfig, run, __doc__)
