"""The page /monitoring in a real browser on the real routes: what an operator sees and does there, and what the store
then holds."""

from __future__ import annotations

import math

import pytest
import sqlalchemy as sql

import serve.records
from store.alarm_deliveries import FAILED, SENT
from store.api_keys import create_api_key
from store.candidates import list_candidates, note_origin, record_candidate
from store.database import StoreUnavailableError
from store.labels import NewLabel, add_label
from store.retraining import request_retraining
from store.retraining_queue import begin_stage, claim_retraining, finish_retraining, finish_stage
from store.tables import alarm_deliveries, now_us
from tests.browser import chromium, needs_chromium
from tests.bundle_factory import LocalFusion, LocalScorer, served_bundle
from tests.http_server import http_server
from tests.local_service import LocalService
from tests.log_rows import prediction_row

pytestmark = [pytest.mark.browser, needs_chromium]

HOUR_US = 3_600_000_000
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\u202e'
OPEN_ROWS = "document.querySelectorAll('#alarm-rows tr')"
# The page's own clock, which a test sets off: the one timer that runs for half a minute.
TIMERS = """
    window.ticks = [];
    const real = window.setTimeout;
    window.setTimeout = (call, ms) => (ms === 30000 ? window.ticks.push(call) : real(call, ms));
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("browser") / "bundle", version="3")


@pytest.fixture(scope="module")
def nodes(reference):
    return LocalScorer(reference), LocalFusion(reference)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


class Monitored:
    """A service that asks for keys, its store, a key of each role, and a browser to look at it."""

    def __init__(self, local, browser):
        self.store = local.log.store
        self.browser = browser
        self.url = ""
        roles = {"caller": "app", "reviewer": "Ada", "approver": "Grace"}
        self.keys = {role: create_api_key(self.store, name, role, "root")[1] for role, name in roles.items()}

    def alarm(self, number: int, **values) -> int:
        """Raises an alarm about a topic of its own; returns its id."""
        base = {"kind": "drift", "severity": "warning", "model_version": "3", "message": f"drift {number}"}
        row = {"dedupe_key": f"test:{number}", "detail": {"drifted": ["age"]}, "raised_at": now_us(), **base, **values}
        assert self.store.raise_alarm(row)
        return next(found["id"] for found in self.store.alarms() if found["dedupe_key"] == row["dedupe_key"])

    def stored(self, alarm_id: int) -> dict:
        return next(row for row in self.store.alarms() if row["id"] == alarm_id)

    def open(self, role: str | None = "reviewer", width: int = 1280):
        tab = self.browser.new_tab()
        tab.resize(width, 900)
        tab.send("Page.addScriptToEvaluateOnNewDocument", source=TIMERS)
        tab.open(f"{self.url}/monitoring")
        if role is not None:
            sign_in(tab, self.keys[role])
            tab.wait_for("!document.getElementById('main').hidden")
        return tab


@pytest.fixture
def monitored(reference, nodes, browser, dermray_home):
    local = LocalService(reference, dermray_home, nodes=nodes)
    service = Monitored(local, browser)
    with http_server(local, require_keys=True) as service.url:
        yield service


def sign_in(tab, key: str) -> None:
    tab.wait_for("!document.getElementById('sign-in').hidden")
    tab.type(key, "#key")
    tab.press("Enter", 13, "\r")


def row(alarm_id: int) -> str:
    return f'#alarm-rows tr[data-key="{alarm_id}"]'


def shown(alarm_id: int) -> str:
    return f"document.querySelector('{row(alarm_id)}')"


def test_an_alarm_is_seen_and_acknowledged_by_a_click_with_name_and_comment(monitored):
    first = monitored.alarm(1, topic="drift:3", message="drift on 2026-11-22: age_approx (412 predictions of model 3)")
    repeat = monitored.alarm(2, topic="drift:3", message="the same on the day after")
    other = monitored.alarm(3, severity="critical", kind="missed_cancer", message="missed cancer: prediction 6f1c")
    with monitored.store.writing() as connection:
        for channel, state in (("oncall", SENT), ("chat", FAILED)):
            values = {"alarm_id": first, "channel": channel, "state": state, "attempts": 1, "next_attempt_at": 0}
            connection.execute(sql.insert(alarm_deliveries).values(**values))
    tab = monitored.open()
    tab.wait_for(f"{OPEN_ROWS}.length === 2")
    # Newest first; what repeats an earlier one is named there, and not listed.
    assert tab.evaluate(f"[...{OPEN_ROWS}].map((row) => row.dataset.key)") == [str(other), str(first)]
    text = tab.text(row(first))
    for part in ("warning", "drift", "age_approx (412 predictions", f"#{repeat}", "chat: failed", "oncall: sent", "3"):
        assert part in text, (part, text)
    tab.wait_for("document.getElementById('alarm-counts').innerText.startsWith('2 open alarms')")
    assert tab.evaluate("document.title").startswith("(2)")
    tab.type("seen, calling the clinic", f"{row(first)} input")
    tab.click(f"{row(first)} button")
    seen = tab.wait_for(f"{shown(first)}.querySelector('.seen').innerText")
    assert seen.startswith("Ada, ") and seen.endswith(": seen, calling the clinic")
    assert tab.evaluate(f"{shown(first)}.querySelector('form').hidden")
    stored = monitored.stored(first)
    assert stored["acknowledged_by"] == "Ada" and stored["acknowledged_at"] is not None
    assert stored["detail"]["acknowledgement"] == "seen, calling the clinic"
    assert monitored.stored(repeat)["acknowledged_by"] == "Ada"
    assert monitored.stored(other)["acknowledged_at"] is None
    # The row stays where it was, and the count follows.
    tab.wait_for("document.getElementById('alarm-counts').textContent.startsWith('1 open alarm:')")
    assert tab.evaluate(f"[...{OPEN_ROWS}].map((row) => row.dataset.key)") == [str(other), str(first)]
    assert tab.problems == []


def test_whatever_a_message_holds_stays_text(monitored):
    alarm = monitored.alarm(1, message=HOSTILE, kind="<b>x</b>", model_version=HOSTILE[:64], detail={"a": HOSTILE})
    request_retraining(monitored.store, "manual", "manual", HOSTILE, "<i>someone</i>")
    record_candidate(monitored.store, "4", "d" * 64, {"<u>none</u>": {"auc": {"value": "<b>1</b>"}}})
    tab = monitored.open("approver")
    tab.wait_for(f"{OPEN_ROWS}.length === 1 && document.querySelectorAll('#candidate-rows tr').length === 1")
    assert tab.evaluate(f"{shown(alarm)}.querySelector('.message').textContent") == HOSTILE
    tab.type("<img src=x onerror=hacked=1>", f"{row(alarm)} input")
    tab.click(f"{row(alarm)} button")
    seen = tab.wait_for(f"{shown(alarm)}.querySelector('.seen').innerText")
    assert seen.endswith("<img src=x onerror=hacked=1>")
    tab.wait_for("document.getElementById('retraining-rows').textContent.includes('<script>window.hacked=1</script>')")
    assert "<u>none</u>: auc <b>1</b>" in tab.text("#candidate-rows")
    assert tab.evaluate("document.querySelectorAll('main img, main script, main b, main i, main u').length") == 0
    assert tab.evaluate("window.hacked === undefined")
    assert tab.problems == []
    # And the browser itself would refuse the page's script another way.
    refused = tab.evaluate("(() => { try { document.body.innerHTML = '<b>x</b>'; } catch (e) { return e.name; } })()")
    assert refused == "TypeError"


def test_a_wrong_key_is_told_and_a_right_one_is_kept_in_this_tab_only(monitored):
    monitored.alarm(1)
    tab = monitored.open(role=None)
    tab.wait_for("!document.getElementById('sign-in').hidden")
    # No one has given a key so far: nothing to blame them for.
    assert tab.text("#key-problem") == ""
    for wrong, told in (("wrong", "it is wrong or was revoked"), ("ключ", "without blanks or accents")):
        tab.evaluate("document.getElementById('key').value = ''")
        tab.type(wrong, "#key")
        tab.press("Enter", 13, "\r")
        tab.wait_for(f"document.getElementById('key-problem').innerText.includes('{told}')")
        assert tab.evaluate("document.getElementById('main').hidden && sessionStorage.length === 0")
    tab.evaluate("document.getElementById('key').value = ''")
    sign_in(tab, monitored.keys["reviewer"])
    tab.wait_for(f"{OPEN_ROWS}.length === 1")
    places = tab.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie, location.href]")
    assert places == [[monitored.keys["reviewer"]], 0, "", f"{monitored.url}/monitoring"]
    # It outlives a reload of the tab; another tab asks again.
    tab.send("Page.reload")
    tab.wait_for(f"document.readyState === 'complete' && {OPEN_ROWS}.length === 1")
    monitored.open(role=None).wait_for("!document.getElementById('sign-in').hidden")
    tab.click("#forget-key")
    tab.wait_for(f"!document.getElementById('sign-in').hidden && {OPEN_ROWS}.length === 0")
    assert tab.evaluate("sessionStorage.length") == 0


def test_it_refreshes_by_itself_and_leaves_what_is_being_typed(monitored):
    alarm = monitored.alarm(1)
    tab = monitored.open()
    tab.wait_for(f"{OPEN_ROWS}.length === 1")
    tab.type("half a sent", f"{row(alarm)} input")
    newer = monitored.alarm(2)
    tab.wait_for("window.ticks.length > 0")
    tab.evaluate("window.ticks.pop()()")
    tab.wait_for(f"{OPEN_ROWS}.length === 2")
    assert tab.evaluate(f"[...{OPEN_ROWS}].map((row) => row.dataset.key)") == [str(newer), str(alarm)]
    assert "2 open alarms now" in tab.wait_for("document.getElementById('announcer').textContent")
    # The rest goes where the beginning went, and the keyboard is enough.
    tab.type("ence")
    tab.press("Enter", 13, "\r")
    assert tab.wait_for(f"{shown(alarm)}.querySelector('.seen').innerText").endswith(": half a sentence")
    assert tab.evaluate(f"document.activeElement === {shown(alarm)}.querySelector('.seen')")
    # Another person is faster: what was typed stays readable, and whose word counts is said.
    tab.type("mine", f"{row(newer)} input")
    serve.records.acknowledge_alarm(monitored.store, newer, "Grace", "hers")
    tab.wait_for("window.ticks.length > 0")
    tab.evaluate("window.ticks.pop()()")
    tab.wait_for(f"{shown(newer)}.innerText.includes('acknowledged elsewhere')")
    assert tab.evaluate(f"{shown(newer)}.querySelector('input').value") == "mine"
    tab.press("Enter", 13, "\r")
    seen = tab.wait_for(f"{shown(newer)}.querySelector('.seen').innerText")
    assert seen.startswith("Grace, ") and ": hers" in seen and "comment was not kept" in seen
    assert monitored.stored(newer)["detail"]["acknowledgement"] == "hers"
    assert tab.problems == []


def test_it_says_since_when_the_service_does_not_answer_and_when_it_answers_again(monitored, monkeypatch):
    alarm = monitored.alarm(1)
    tab = monitored.open()
    tab.wait_for(f"{OPEN_ROWS}.length === 1")
    tab.send("Network.enable")
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    tab.send("Network.emulateNetworkConditions", offline=True, **network)
    tab.type("kept", f"{row(alarm)} input")
    tab.click(f"{row(alarm)} button")
    tab.wait_for(f"{shown(alarm)}.innerText.includes('Not done: no connection')")
    tab.click("#refresh")
    said = tab.wait_for("document.getElementById('outage').innerText")
    assert said.startswith("The service has not answered since ") and "What is shown is of " in said
    # Still shown, and the same time is said after the next try.
    tab.wait_for("window.ticks.length > 0")
    tab.evaluate("window.ticks.pop()()")
    tab.wait_for("window.ticks.length > 0")
    assert tab.text("#outage") == said and tab.evaluate(f"{OPEN_ROWS}.length") == 1
    tab.send("Network.emulateNetworkConditions", offline=False, **network)
    tab.evaluate("window.ticks.pop()()")
    tab.wait_for("document.getElementById('outage').hidden")
    assert tab.evaluate(f"{shown(alarm)}.querySelector('input').value") == "kept"

    def down(*_):
        raise StoreUnavailableError("the database is away")

    # A part that fails is named; the others go on.
    monkeypatch.setattr(serve.records, "monitoring_summary", down)
    monitored.alarm(2)
    tab.click("#refresh")
    tab.wait_for(f"{OPEN_ROWS}.length === 2 && !document.getElementById('outage').hidden")
    assert tab.text("#outage").startswith("A part of the service (predictions and labels) has not answered since ")
    monkeypatch.undo()
    tab.click("#refresh")
    tab.wait_for("document.getElementById('outage').hidden")
    assert tab.problems == []


def a_retrained_candidate(store, version: str, requested_by: str, passed: bool) -> str:
    """A retraining that is done, and its candidate; returns the digest."""
    digest = version * 64
    request_retraining(store, f"key {version}", "drift", f"drift in age, model {version}", requested_by)
    claim = claim_retraining(store, lease_us=60_000_000, max_attempts=1)
    begin_stage(store, claim, "train")
    metrics = {"none": {"auc": {"value": 0.9112, "low": 0.8801, "high": 0.9402}, "pauc": {"value": 0.151}}}
    record_candidate(store, version, digest, metrics)
    note_origin(store, version, digest, "f" * 64, requested_by, claim.id)
    claim = finish_stage(store, claim, "train", {"model_version": version, "digest": digest}, version)
    auc = {"rule": "min_auc", "context": "none", "value": 0.9112, "limit": "at least 0.8", "detail": ""}
    pauc = {"rule": "min_pauc", "context": "none", "value": 0.151, "limit": "at least 0.1", "detail": ""}
    results = [auc | {"passed": True}, pauc | {"passed": passed}]
    gate = {"passed": passed, "bundle_digest": digest, "results": results}
    finish_retraining(store, finish_stage(store, claim, "gate", gate))
    return digest


def test_each_part_says_which_role_it_needs_and_an_approver_approves_anothers_candidate(monitored):
    a_retrained_candidate(monitored.store, "4", "Ada", passed=False)
    a_retrained_candidate(monitored.store, "5", "grace", passed=True)
    tab = monitored.open("reviewer")
    for part in ("retrainings", "candidates"):
        tab.wait_for(f"document.getElementById('{part}-problem').innerText.includes('needs approver or higher')")
        assert tab.evaluate(f"document.getElementById('{part}-content').hidden")
    assert tab.evaluate("document.getElementById('outage').hidden && !document.getElementById('alarms-content').hidden")
    tab = monitored.open("caller")
    tab.wait_for("document.getElementById('alarms-problem').innerText.includes('needs reviewer or higher')")

    tab = monitored.open("approver")
    tab.wait_for("document.querySelectorAll('#candidate-rows tr').length === 2")
    tab.wait_for("document.getElementById('candidate-rows').innerText.includes('refused by 1 of 2 rules')")
    other, own = '#candidate-rows tr[data-key^="4/"]', '#candidate-rows tr[data-key^="5/"]'
    assert "auc 0.9112 (0.8801 to 0.9402)" in tab.text(other)
    assert "min_pauc (none): 0.151, expected at least 0.1" in tab.text(other) and "passed, 2 rules" in tab.text(own)
    assert "drift in age, model 4" in tab.text("#retraining-rows")
    # Without a reason nothing is sent.
    tab.click(f"{other} button")
    assert monitored.store.approvals() == []
    tab.type("fewer missed melanomas", f"{other} input")
    tab.click(f"{other} button")
    tab.wait_for(f"document.querySelector('{other} li')?.innerText === 'Grace: fewer missed melanomas'")
    # Who asked for a training is refused, in the row, and keeps the words.
    tab.type("mine", f"{own} input")
    tab.click(f"{own} button")
    tab.wait_for(f"document.querySelector('{own}').innerText.includes('another person')")
    assert tab.evaluate(f"document.querySelector('{own} input').value") == "mine"
    approved = {row["model_version"]: row["approvals"] for row in list_candidates(monitored.store, 10)}
    assert [(row["approver"], row["reason"]) for row in approved["4"]] == [("Grace", "fewer missed melanomas")]
    assert approved["5"] == []
    assert tab.problems == []


def test_alarms_are_filtered_and_paged(monitored):
    now = now_us()
    ids = [monitored.alarm(number, raised_at=now - number * HOUR_US) for number in range(30)]
    quiet = monitored.alarm(100, topic="t", raised_at=now - 100 * HOUR_US)
    repeat = monitored.alarm(101, topic="t", raised_at=now - 99 * HOUR_US)
    serve.records.acknowledge_alarm(monitored.store, ids[0], "Grace", None)
    tab = monitored.open()
    keys = f"[...{OPEN_ROWS}].map((row) => Number(row.dataset.key))"
    tab.wait_for(f"{OPEN_ROWS}.length === 25")
    assert tab.evaluate(keys) == ids[1:26]
    tab.click("#older-alarms")
    tab.wait_for(f"{OPEN_ROWS}.length === 5")
    assert tab.evaluate(keys) == [*ids[26:], quiet]
    assert tab.evaluate("document.getElementById('older-alarms').disabled")
    tab.click("#newer-alarms")
    tab.wait_for(f"{OPEN_ROWS}.length === 25")
    tab.click("#filter-quieted")
    tab.wait_for(f"{OPEN_ROWS}.length === 1")
    assert tab.evaluate(keys) == [repeat] and f"repeats #{quiet}" in tab.text(row(repeat))
    tab.click("#filter-all")
    tab.wait_for(f"{OPEN_ROWS}.length === 25")
    assert tab.evaluate(keys) == ids[:25]
    assert tab.text(f"{row(ids[0])} .seen").startswith("Grace, ")


def a_day(store) -> None:
    """Predictions of the last 24 hours, labels, a missed cancer, a shadow model, drift."""
    now = now_us()
    rows = []
    for hour in range(24):
        for number in range(3 + round(9 * (1 + math.sin(hour / 4)))):
            at = now - hour * HOUR_US - (number + 1) * 60_000_000
            abstained = number % 7 == 6
            values = {"abstained": True, "reasons": ["blurred"]} if abstained else {"band": "low", "risk": 0.004}
            values |= {"threshold": 0.0105, "stage_ms": {"total": 14.0 + number}, "model_version": "3"}
            rows.append(prediction_row(f"p{hour}-{number}", received_at=at, **values))
    store.insert_predictions(rows)
    add_label(store, NewLabel("p1-0", "malignant", True, "Dr Weber"), "Dr Weber")
    add_label(store, NewLabel("p1-1", "benign", False, "Dr Weber"), "Dr Weber")
    values = {"num_rows": 412, "num_groups": 130, "statistics": {}, "input_digest": "a" * 64, "report": None}
    for version, status, drifted in (("2", "ok", []), ("3", "drift", ["age_approx", "brightness", "embedding"])):
        window = {"window_start": now - 48 * HOUR_US, "window_end": now - 24 * HOUR_US, "label_watermark": 0}
        verdict = {"status": status, "alarm": status == "drift", "drifted": drifted}
        key = {"model_version": version, "reference": "b" * 64}
        store.upsert_drift_report({**window, **verdict, **key, **values})


@pytest.mark.parametrize("width", [360, 1280])
def test_the_figures_are_there_and_fit_the_screen(monitored, width):
    a_day(monitored.store)
    a_retrained_candidate(monitored.store, "4", "Ada", passed=False)
    monitored.alarm(1, message="x" * 3000, topic="y" * 200, detail={"drifted": ["z" * 500]})
    tab = monitored.open("approver", width=width)
    tab.wait_for("document.querySelectorAll('#candidate-rows tr').length === 1")
    summary = tab.wait_for("document.getElementById('figures').innerText")
    figures = dict(zip(*[iter(part for part in summary.split("\n") if part)] * 2, strict=True))
    assert figures["Missed cancers"] == "1" and figures["Labels"] == "2"
    counted = monitored.store.predictions_between(0, 2**62)
    assert figures["Predictions"] == f"{len(list(counted)):,}"
    assert figures["Reasons to abstain"].startswith("blurred ")
    drift = tab.text("#drift-rows")
    assert "age_approx, brightness, embedding" in drift and "ok" in drift
    # One bar an hour; the highest fills the chart, the abstained part on top of the answered one.
    bars = tab.evaluate(
        "[...document.querySelectorAll('#chart g')].map((bar) => [...bar.querySelectorAll('rect')]"
        ".map((part) => [Number(part.getAttribute('y')), Number(part.getAttribute('height'))]))"
    )
    assert len(bars) == 24
    assert max(answered[1] + abstained[1] for answered, abstained in bars) == pytest.approx(100)
    assert all(abstained[0] + abstained[1] == pytest.approx(answered[0]) for answered, abstained in bars)
    tab.evaluate("document.querySelectorAll('details').forEach((found) => { found.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # Every field and button is within the screen and can be reached by the keyboard.
    outside = (
        "[...document.querySelectorAll('main input, main button, main select, main td')].filter((field) => {"
        "const box = field.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth; }).length"
    )
    assert tab.evaluate(outside) == 0
    assert tab.evaluate("[...document.querySelectorAll('[tabindex]')].every((found) => found.tabIndex < 1)")
    assert tab.problems == []


def test_a_service_that_asks_for_no_keys_is_not_asked_with_one(reference, nodes, browser, dermray_home):
    local = LocalService(reference, dermray_home, nodes=nodes)
    with http_server(local) as url:
        tab = browser.new_tab()
        tab.open(f"{url}/monitoring")
        tab.wait_for("document.getElementById('updated').textContent.startsWith('As of')")
        assert tab.evaluate("document.getElementById('sign-in').hidden && document.getElementById('forget-key').hidden")
        assert tab.wait_for("document.getElementById('no-alarms').innerText") == "No open alarm."
        assert "Not a medical device" in tab.text("#notice") and "synthetic data" in tab.text("#notice")
