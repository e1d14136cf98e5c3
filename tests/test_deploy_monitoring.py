"""The rules and the dashboard in deploy/ ask for figures that exist, and the rules fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from serve.metrics import METRICS
from tests.monitoring_files import DASHBOARD, DEPLOY, RULES, metric_names, panels, queries, rules

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool: Debian's package is `prometheus`")
PARTS = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("",), "gauge": ("",)}
EXPORTED = {metric.exported_name + part: metric for metric in METRICS for part in PARTS[metric.kind]}
ALWAYS = {"le", "instance", "job"}


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_figure_of_ours_that_they_name_is_one_of_the_service():
    ours = {name for name in metric_names() if name.startswith("ray_dermray_")}
    assert ours - set(EXPORTED) == set()
    # And none of the service is forgotten on the dashboard.
    told = {EXPORTED[name].name for name in ours}
    assert {metric.name for metric in METRICS} - told == set()


def test_every_label_that_they_ask_for_is_one_that_the_figure_has():
    for place, expression in queries().items():
        named = [EXPORTED[name] for name in re.findall(r"\bray_dermray_\w+", expression)]
        if not named:
            continue
        for name, selector in re.findall(r"\b(ray_dermray_\w+)\{([^}]*)\}", expression):
            asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert asked <= set(EXPORTED[name].tag_keys), (place, name)
        grouped = {label for by in re.findall(r"\bby \(([^)]*)\)", expression) for label in re.findall(r"\w+", by)}
        assert grouped <= ALWAYS | {label for metric in named for label in metric.tag_keys}, place


def test_the_dashboard_is_one_that_grafana_and_people_can_read():
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"] == "dermray" and dashboard["schemaVersion"] >= 36
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in panels()]
    assert all(titles) and len(titles) == len(set(titles))
    boxes = []
    for panel in panels():
        place = panel["gridPos"]
        assert 0 <= place["x"] and place["x"] + place["w"] <= 24, panel["title"]
        boxes.append((place["x"], place["y"], place["x"] + place["w"], place["y"] + place["h"]))
        if panel["type"] == "row":
            continue
        assert panel["fieldConfig"]["defaults"]["unit"] and panel["description"], panel["title"]
        assert panel["targets"] and all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
    for index, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_every_rule_says_how_urgent_it_is_and_what_to_do():
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) >= 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]


def test_the_scrape_configuration_reads_rays_file_and_loads_the_rules():
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    assert [(DEPLOY / "prometheus" / name).resolve() for name in config["rule_files"]] == [RULES.resolve()]


@needs_promtool
def test_prometheus_takes_rules_configuration_and_every_query_of_the_dashboard(tmp_path):
    promtool("check", "rules", RULES)
    promtool("check", "config", "--syntax-only", DEPLOY / "prometheus" / "prometheus.yml")
    records = [{"record": f"q{index}", "expr": text} for index, text in enumerate(queries().values())]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": records}]}))
    promtool("check", "rules", file)


INFO = 'ray_dermray_model_info{deployment="Ingress",model_version="3",digest="d",replica="r"}'
TRAFFIC = 'ray_dermray_predictions_total{route="/v1/predict",band="low",model_version="3"}'
STAGE = "ray_dermray_stage_seconds"
TOTAL = 'route="/v1/predict",stage="total",replica="r"'
PROBLEMS = 'ray_dermray_problems_total{route="/v1/predict",status="503",error="overloaded"}'
SPOOLING = 'ray_dermray_log_spooling{replica="r"}'
QUEUED = 'ray_dermray_submissions_pending{state="queued"}'
SUBMITTED = 'ray_dermray_predictions_total{route="/v1/submissions",band="low",model_version="3"}'
MISSED = 'ray_dermray_alarms_unacknowledged{kind="missed_cancer",severity="critical"}'
WORSE = 'ray_dermray_alarms_unacknowledged{kind="quality",severity="warning"}'
AGE, DRIFTED = 'ray_dermray_drift_report_age_seconds{model_version="3"}', 'ray_dermray_drift_alarm{model_version="3"}'
ABSTAINED = 'ray_dermray_predictions_total{route="/v1/predict",band="abstained",model_version="3"}'
PENDING = 'ray_dermray_alarm_deliveries{channel="ops",state="pending"}'
GIVEN_UP = 'ray_dermray_alarm_deliveries{channel="ops",state="failed"}'
WELL = {INFO: "1x3000", TRAFFIC: "0+60x3000", AGE: "3600+60x3000", DRIFTED: "0x3000"}
# 99.5 % within 0.1 s, and 90 % within 0.1 s with the rest above 2 s.
FAST = {f'{STAGE}_bucket{{{TOTAL},le="{le}"}}': f"0+{n}x3000" for le, n in (("0.1", 1990), ("5", 2000), ("+Inf", 2000))}
SLOW = {f'{STAGE}_bucket{{{TOTAL},le="{le}"}}': f"0+{n}x3000" for le, n in (("0.1", 1800), ("5", 2000), ("+Inf", 2000))}
COUNT = f"{STAGE}_count{{{TOTAL}}}"


@needs_promtool
@pytest.mark.parametrize(
    ("name", "minutes", "quiet", "firing"),
    [
        ("DermrayDown", 10, {}, {INFO: "0x3000"}),
        ("DermrayErrors", 60, {COUNT: "0+999x3000", PROBLEMS: "0+1x3000"}, {COUNT: "0+90x3000", PROBLEMS: "0+10x3000"}),
        ("DermraySlow", 60, FAST, SLOW),
        ("DermraySpool", 30, {SPOOLING: "0x3000"}, {SPOOLING: "1x3000"}),
        (
            "DermraySubmissionsStuck",
            60,
            {QUEUED: "5x3000", SUBMITTED: "0+3x3000"},
            {QUEUED: "5x3000", SUBMITTED: "9x3000"},
        ),
        ("DermraySubmissionsStuck", 60, {QUEUED: "5x20 0x20 5x3000"}, {QUEUED: "5x3000"}),
        ("DermrayNoPredictions", 600, {}, {TRAFFIC: "0+60x100 6000x3000"}),
        ("DermrayNoPredictions", 600, {}, {TRAFFIC: None}),
        ("DermrayMissedCancer", 10, {MISSED: "0x3000"}, {MISSED: "2x3000"}),
        ("DermrayQuality", 10, {WORSE: "0x3000"}, {WORSE: "1x3000"}),
        ("DermrayDrift", 10, {}, {DRIFTED: "1x3000"}),
        ("DermrayDriftCheckOverdue", 60, {AGE: "97200x3000"}, {AGE: "130000x3000"}),
        ("DermrayDriftNeverChecked", 2900, {}, {AGE: None}),
        ("DermrayAbstains", 240, {ABSTAINED: "0+5x3000"}, {ABSTAINED: "0+30x3000"}),
        ("DermrayAlarmsNotDelivered", 60, {PENDING: "1x3 0x3000", GIVEN_UP: "7x3000"}, {PENDING: "1x3000"}),
        ("DermrayAlarmsNotDelivered", 60, {}, {GIVEN_UP: "0x30 1x3000"}),
    ],
)
def test_a_rule_fires_on_its_trouble_and_not_without_it(name, minutes, quiet, firing, tmp_path):
    (severity,) = {rule["labels"]["severity"] for rule in rules() if rule["alert"] == name}
    tests = []
    for changes, fires in (({}, False), (quiet, False), (firing, True)):
        series = [{"series": key, "values": value} for key, value in {**WELL, **changes}.items() if value is not None]
        expression = (
            f'count(ALERTS{{alertname="{name}",alertstate="firing",severity="{severity}"}}) > bool 0 or vector(0)'
        )
        sample = {"labels": "{}", "value": int(fires)}
        check = {"expr": expression, "eval_time": f"{minutes}m", "exp_samples": [sample]}
        tests.append({"interval": "1m", "input_series": series, "promql_expr_test": [check]})
    # Two days at every minute take promtool ten seconds.
    every = "1m" if minutes < 500 else "10m"
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": every, "tests": tests}))
    promtool("test", "rules", file)
