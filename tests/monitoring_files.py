"""The PromQL of deploy/: alert rules and the dashboard's queries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "dermray_rules.yml"
DASHBOARD = DEPLOY / "grafana" / "dermray.json"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """All panels of the dashboard, rows too."""
    top = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for one in top for panel in (one, *one.get("panels", []))]


def queries() -> dict[str, str]:
    """Every expression, by where it stands; Grafana's interval filled in."""
    found = {f"rule {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in panels():
        for target in panel.get("targets", []):
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "5m")
    return found


def metric_names() -> set[str]:
    """All figures of Ray and of the service that an expression names."""
    return {name for expression in queries().values() for name in re.findall(r"\bray_\w+", expression)}
