"""The page /monitoring as the server makes it: what it tells, to whom, and what its forms do."""

from __future__ import annotations

import dataclasses
import html
import re
import threading

import numpy as np
import pytest
import sqlalchemy as sql
from starlette.testclient import TestClient

from modeling.tested_risks import TestedRisks
from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.settings import LinkSettings
from store.alarm_deliveries import FAILED, SENT
from store.alarm_records import acknowledge_alarm
from store.api_keys import create_api_key, list_api_keys
from store.errors import StoreUnavailableError
from store.retraining import list_retrainings, request_retraining
from store.tables import alarm_deliveries, now_us
from tests.bundle_factory import backend
from tests.busy_clinic import HOSTILE
from tests.monitored_month import HOUR_US, a_day, a_drift_report, an_alarm, labelled_lesions

PATH = "/monitoring"
FINE = "Nothing is known to be wrong."


class Monitored:
    """A service that asks for keys, and people who have signed in."""

    def __init__(self, local, **options):
        self.local, self.store = local, local.log.store
        people = {"Ada": "reviewer", "Ben": "reviewer", "Grace": "approver", "Hedy": "approver", "app": "caller"}
        keys = {name: create_api_key(self.store, name, role, "test")[1] for name, role in people.items()}
        ring = KeyRing(lambda: list_api_keys(self.store, live_only=True), refresh_s=300)
        self.api = build_api(backend(local.service, local.log, keys=ring, **options))
        self.clients = {name: self.sign_in(key) for name, key in keys.items()}

    def sign_in(self, key: str) -> TestClient:
        client = TestClient(self.api, raise_server_exceptions=False, follow_redirects=False)
        form = {"csrf_token": token_of(client.get("/sign-in").text), "key": key, "next": PATH}
        assert client.post("/sign-in", data=form).headers["location"] == PATH
        return client

    def page(self, query: str = "", name: str = "Ada") -> str:
        answer = self.clients[name].get(PATH + query)
        assert answer.status_code == 200, answer.text
        return answer.text

    def part(self, part: str, name: str = "Ada"):
        return self.clients[name].get(f"{PATH}/{part}", headers={"HX-Request": "true"})

    def post(self, path: str, name: str = "Ada", **fields):
        form = {"csrf_token": token_of(self.clients[name].get("/about").text), **fields}
        return self.clients[name].post(f"{PATH}/{path}", data=form)


@pytest.fixture
def monitored(local):
    return Monitored(local)


def token_of(page: str) -> str:
    return re.search(r'name="csrf_token" value="([^"]+)"', page)[1]


def text_of(page: str, part: str = "main") -> str:
    """What a person reads in a part of the page, by its id."""
    start = page.index(f'id="{part}"')
    tag = re.findall(r"<(\w+)[^<]*$", page[:start])[-1]
    found, depth = page[page.index(">", start) + 1 :], 1
    for edge in re.finditer(rf"<(/?){tag}\b", found):
        depth += -1 if edge[1] else 1
        if depth == 0:
            found = found[: edge.start()]
            break
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", found)).split())


def findings(page: str) -> list[tuple[str, str]]:
    """(level, text) of what is wrong, in order."""
    rows = re.findall(r'<span class="badge (\w+)">\w+</span> <a href="#\w+"><bdi>([^<]*)</bdi>', page)
    return [(level, html.unescape(text)) for level, text in rows]


def alarm_ids(page: str) -> list[int]:
    return [int(found) for found in re.findall(r'<tr id="alarm-(\d+)"', page)]


# ---------------------------------------------------------------- who sees it


def test_a_reviewer_sees_it_a_caller_does_not_and_who_has_no_session_is_sent_to_sign_in(monitored):
    sent = TestClient(monitored.api, follow_redirects=False).get(f"{PATH}?show=all")
    assert (sent.status_code, sent.headers["location"]) == (303, "/sign-in?next=%2Fmonitoring%3Fshow%3Dall")
    refused = monitored.clients["app"].get(PATH)
    assert refused.status_code == 403 and "needs reviewer or higher" in refused.text
    assert "Trainings are asked for, and shown to, approvers" in text_of(monitored.page(), "retraining")


def test_trainings_are_shown_to_approvers_only(monitored):
    request_retraining(monitored.store, "drift", "drift", "drift in brightness", "retrain")
    assert "drift in brightness" in text_of(monitored.page(name="Grace"), "retraining")
    for answer in (monitored.page(), monitored.part("retraining").text):
        assert "drift in brightness" not in answer
    refused = monitored.post("retrain", reason="because")
    assert refused.status_code == 403 and "needs approver" in refused.text
    assert len(list_retrainings(monitored.store, None, 10)) == 1


# ---------------------------------------------------------------- what is wrong


def test_an_empty_service_says_that_nothing_is_known_to_be_wrong_and_shows_what_there_is_not(monitored):
    page = monitored.page()
    assert text_of(page, "now").startswith(FINE) and findings(page) == []
    assert re.search(r'As of <time datetime="20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ">', page)
    for name, words in {
        "no-alarms": "No open alarm.",
        "no-drift": "No drift report of model 3 so far.",
        "no-labels": "No answer of this model has a label so far.",
        "no-shadow": "No shadow model scored lesions in this window.",
    }.items():
        assert text_of(page, name).startswith(words)
    assert "gave no risk in this window" in text_of(page, "risks")
    assert "No one has asked for a training." in text_of(monitored.page(name="Grace"), "retraining")


def test_what_is_wrong_is_listed_with_the_most_urgent_first(monitored):
    an_alarm(monitored.store, 1)
    an_alarm(monitored.store, 2, kind="missed_cancer", severity="critical")
    an_alarm(monitored.store, 3, severity="info")
    a_drift_report(monitored.store, 1, ("brightness",))
    monitored.local.log.spool.append([{"id": "x"}], {})
    page = monitored.page()
    assert findings(page) == [
        ("critical", "1 critical alarm is open: missed cancer."),
        ("warning", "1 batch of predictions waits on this replica's disk."),
        ("warning", "1 warning is open: drift."),
        ("warning", findings(page)[3][1]),
    ]
    assert findings(page)[3][1].endswith("found drift: brightness.")
    assert text_of(page, "now").startswith("Something is wrong, and needs someone now.")
    assert "<title>(3) Monitoring" in page and "1 critical, 1 warning, 1 info" in text_of(page, "service")


def test_an_overdue_check_is_wrong_and_one_of_yesterday_is_not(monitored):
    a_drift_report(monitored.store, 4)
    assert "The drift check is overdue" in findings(monitored.page())[0][1]
    a_drift_report(monitored.store, 1)
    assert findings(monitored.page()) == []


def test_while_the_store_does_not_answer_the_page_says_so_and_parts_leave_what_was_shown(monitored, monkeypatch):
    an_alarm(monitored.store, 1)

    def down(*_):
        raise StoreUnavailableError("the database is away")

    for name in ("open_alarms", "alarms_page", "monitoring_summary", "list_retrainings"):
        monkeypatch.setattr(f"serve.monitoring_data.{name}", down)
    page = monitored.page(name="Grace")
    assert findings(page) == [
        ("critical", "The store does not answer: alarms, drift, labels and figures are not known now.")
    ]
    for part in ("alarms", "traffic", "retraining"):
        assert "The store does not answer" in text_of(page, part)
    assert monitored.part("now").status_code == 200
    for part in ("alarms", "figures"):
        assert monitored.part(part).status_code == 503
    assert monitored.part("retraining", "Grace").status_code == 503 and monitored.part("retraining").status_code == 200


def test_a_store_that_hangs_is_given_up_and_the_page_comes(local, monkeypatch):
    monkeypatch.setattr("serve.monitoring_data._TIMEOUT_S", 0.2)
    let_go = threading.Event()
    monkeypatch.setattr("serve.monitoring_data.open_alarms", lambda _store: let_go.wait(60))
    try:
        assert findings(Monitored(local).page())[0][1].startswith("The store does not answer")
    finally:
        let_go.set()


def test_a_node_that_does_not_answer_is_wrong(monitored, monkeypatch):
    async def readiness():
        return {"image_scorer": "no answer", "metadata_fusion": "ok", "log": "spooling"}

    monkeypatch.setattr(monitored.local.service, "readiness", readiness)
    page = monitored.page()
    assert [level for level, _ in findings(page)] == ["critical", "critical"]
    assert "the image scorer says: no answer" in findings(page)[0][1]
    assert "do not reach the store" in findings(page)[1][1]


# ---------------------------------------------------------------- alarms


def test_whatever_a_message_holds_stays_text(monitored):
    alarm = an_alarm(
        monitored.store, 1, message=HOSTILE, kind="<b>x</b>", model_version=HOSTILE[:64], detail={"a": HOSTILE}
    )
    request_retraining(monitored.store, "manual", "manual", HOSTILE, "<i>someone</i>")
    a_drift_report(monitored.store, 1, (HOSTILE,))
    assert monitored.post(f"alarms/{alarm}/acknowledge", comment=HOSTILE).status_code == 303
    page = monitored.page("?show=all", "Grace")
    assert not re.search(r"<(img|b|i)\b|<script>", page) and page.count("window.hacked") > 5
    assert HOSTILE in html.unescape(page)


def test_acknowledging_puts_name_and_comment_to_the_alarm_and_covers_what_it_quiets(monitored):
    first = an_alarm(monitored.store, 1, topic="drift:3")
    repeat = an_alarm(monitored.store, 2, topic="drift:3")
    other = an_alarm(monitored.store, 3)
    with monitored.store.writing() as connection:
        for channel, state in (("oncall", SENT), ("chat", FAILED)):
            values = {"alarm_id": first, "channel": channel, "state": state, "attempts": 1, "next_attempt_at": 0}
            connection.execute(sql.insert(alarm_deliveries).values(**values))
    page = monitored.page()
    assert alarm_ids(page) == [other, first]
    row = text_of(page, f"alarm-{first}")
    assert "quiets 1 later one" in row and "chat : failed" in row and "oncall : sent" in row
    assert ("warning", "Channel chat did not take 1 open alarm.") in findings(page)
    answer = monitored.post(f"alarms/{first}/acknowledge", comment=" seen, calling the clinic ")
    assert (answer.status_code, answer.headers["location"]) == (303, f"{PATH}?acknowledged={first}#alarms")
    stored = {row["id"]: row for row in monitored.store.alarms()}
    assert stored[first]["acknowledged_by"] == stored[repeat]["acknowledged_by"] == "Ada"
    assert stored[first]["detail"]["acknowledgement"] == "seen, calling the clinic"
    assert stored[other]["acknowledged_at"] is None
    page = monitored.page(answer.headers["location"].removeprefix(PATH).partition("#")[0])
    assert f"Alarm {first} is acknowledged." in text_of(page, "alarms") and alarm_ids(page) == [other]
    assert "Ada , 20" in text_of(monitored.page("?show=all"), f"alarm-{first}")


def test_who_comes_second_is_told_who_was_first_and_keeps_the_filter(monitored):
    alarm = an_alarm(monitored.store, 1)
    monitored.post(f"alarms/{alarm}/acknowledge")
    answer = monitored.post(f"alarms/{alarm}/acknowledge?show=all&hours=72", "Ben", comment="me too")
    assert answer.headers["location"] == f"{PATH}?hours=72&show=all&acknowledged={alarm}#alarms"
    told = text_of(monitored.page(f"?show=all&acknowledged={alarm}", "Ben"), "alarms")
    assert f"Ada was first to acknowledge alarm {alarm}" in told and "what you wrote was not kept" in told
    assert "acknowledgement" not in monitored.store.alarms()[0]["detail"]


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("alarms/99/acknowledge", {}, 404),
        ("alarms/x/acknowledge", {}, 404),
        (f"alarms/{2**63}/acknowledge", {}, 404),
        ("alarms/1/acknowledge", {"comment": "x" * 2001}, 422),
        ("alarms/1/acknowledge", {"comment": "a\x00b"}, 422),
        ("retrain", {"reason": " "}, 422),
        ("retrain", {"reason": "x" * 1001}, 422),
    ],
)
def test_a_form_that_is_wrong_changes_nothing_and_says_why(monitored, path, fields, status):
    an_alarm(monitored.store, 1)
    answer = monitored.post(path, "Grace", **fields)
    assert answer.status_code == status and 'class="problem"' in answer.text
    assert monitored.store.alarms()[0]["acknowledged_at"] is None
    assert list_retrainings(monitored.store, None, 10) == []


def test_a_form_without_the_session_s_token_is_refused(monitored):
    alarm = an_alarm(monitored.store, 1)
    others = token_of(monitored.clients["Ben"].get("/about").text)
    for token in ("", others):
        for path in (f"alarms/{alarm}/acknowledge", "retrain"):
            form = {"csrf_token": token, "reason": "x"}
            assert monitored.clients["Grace"].post(f"{PATH}/{path}", data=form).status_code == 403
    assert monitored.store.alarms()[0]["acknowledged_at"] is None


def test_alarms_are_filtered_and_paged_by_plain_links(monitored):
    now = now_us()
    ids = [an_alarm(monitored.store, number, raised_at=now - number * HOUR_US) for number in range(30)]
    quiet = an_alarm(monitored.store, 100, topic="t", raised_at=now - 100 * HOUR_US)
    repeat = an_alarm(monitored.store, 101, topic="t", raised_at=now - 99 * HOUR_US)
    acknowledge_alarm(monitored.store, ids[0], "Grace", None)
    page = monitored.page()
    assert alarm_ids(page) == ids[1:26]
    older = html.unescape(re.search(r'href="/monitoring([^"]+)#alarms" id="older"', page)[1])
    page = monitored.page(older)
    assert alarm_ids(page) == [*ids[26:], quiet] and 'id="older"' not in page and 'id="newest"' in page
    page = monitored.page("?show=quieted")
    assert alarm_ids(page) == [repeat] and f"repeats # {quiet}" in text_of(page, "alarms").replace("#", "# ")
    assert alarm_ids(monitored.page("?show=all")) == ids[:25]
    assert monitored.clients["Ada"].get(f"{PATH}?after=damaged").status_code == 422
    # What is not among the choices is the first one.
    assert alarm_ids(monitored.page("?show=%3Cscript%3E&hours=1e9")) == ids[1:26]


# ---------------------------------------------------------------- figures


def test_traffic_is_counted_and_drawn_and_the_table_says_the_same(monitored):
    number = a_day(monitored.store)
    page = monitored.page()
    counts = text_of(page, "counts")
    assert f"Predictions {number:,}" in counts and "p99" in counts and "blurred" in counts
    assert f"{number:,} predictions in 24 hours" in page
    rows = re.findall(r'<td class="number">([\d,]+)</td><td class="number">([\d,]+)</td></tr>', page)
    assert sum(int(found[0]) for found in rows[:24]) == number
    assert page.count('<rect class="answered"') > 24 and '<rect class="abstained"' in page
    assert "in 168 hours" in monitored.page("?hours=168")


def test_refusals_of_this_replica_are_counted_since_it_began(monitored):
    assert "None of the replica that answers here" in text_of(monitored.page(), "traffic")
    client = TestClient(monitored.api)
    for _ in range(3):
        assert client.get("/v1/alarms").status_code == 401
    shown = text_of(monitored.page(), "traffic")
    assert "401 unauthorized 3" in shown and "ray_dermray_problems_total" in shown


def test_the_risks_stand_beside_those_of_the_gate_split_and_the_page_says_what_that_is(local):
    risks = 1 / (1 + np.exp(-np.random.default_rng(1).normal(-5, 2, 500)))
    tested = {"none": TestedRisks(risks, np.arange(500) < 20)}
    local.service.use_model(dataclasses.replace(local.service.model, tested=tested, average_risk=0.01))
    monitored = Monitored(local)
    a_day(monitored.store)
    page = monitored.page()
    shown = text_of(page, "risks")
    assert "500 lesions that trained nothing" in shown and "4 % of them were cancer" in shown
    assert "risks are for where 1 % are" in shown and '<path class="reference"' in page
    local.service.use_model(dataclasses.replace(local.service.model, tested={}))
    page = monitored.page()
    assert "has no risks of its gate split: there is nothing to compare with" in text_of(page, "risks")
    assert '<path class="reference"' not in page and "risk-plot-none" in page


def test_few_risks_make_no_histogram(monitored):
    labelled_lesions(monitored.store, 2, 3)
    page = monitored.page("?hours=72")
    assert "5 answers; a histogram needs 30." in text_of(page, "risks") and "risk-plot" not in page


def test_drift_is_drawn_per_feature_with_what_alarmed_marked_by_shape(monitored):
    for days_ago in range(30, 0, -1):
        a_drift_report(monitored.store, days_ago, ("brightness",) if days_ago in (1, 2) else ())
    a_drift_report(monitored.store, 20, status="insufficient", statistics={}, label_watermark=1)
    page = monitored.page()
    captions = re.findall(r"<figcaption><bdi>(\w+)</bdi>", page)
    assert sorted(captions) == ["age_approx", "brightness", "risk_none", "sex"] and captions[0] == "brightness"
    assert "1.30 in the newest window, at or above 1 in 2 of 29 windows" in page
    drift = page[page.index('id="drift"') :]
    assert drift.count('<path class="alarm"') == 2
    # A line breaks where a day was not judged.
    series = re.search(r'<path class="series" d="([^"]+)"', drift)[1]
    assert series.count("M") == 2 and series.count("L") == 29 - 2
    table = text_of(page, "drift-history-rows")
    assert table.count("▲") == 3 and "brightness ▲\u00a01.30" in table.replace("▲ ", "▲\u00a0")


def test_a_drift_report_is_handed_out_whole_to_reviewers(monitored):
    a_drift_report(monitored.store, 1, ("sex",), report="/srv/drift/<b>")
    page = monitored.page()
    (path,) = re.findall(r'href="(/monitoring/drift/\d+\.json)"', page)
    answer = monitored.clients["Ada"].get(path)
    assert (
        answer.headers["content-type"] == "application/json" and "attachment" in answer.headers["content-disposition"]
    )
    assert answer.json()["statistics"]["features"][1]["name"] == "sex"
    assert "drift/<b>" in html.unescape(page) and "/srv" not in page and "<b>" not in page
    for wrong in ("/monitoring/drift/99.json", "/monitoring/drift/x", f"/monitoring/drift/{2**63}.json"):
        assert monitored.clients["Ada"].get(wrong).status_code == 404
    assert monitored.clients["app"].get(path).status_code == 403


def test_nothing_is_called_quality_while_labels_are_few_and_the_page_says_how_many_lack(monitored):
    labelled_lesions(monitored.store, malignant=4, benign=30)
    shown = text_of(monitored.page(), "quality")
    assert "34 labelled lesions, 4 of them cancer" in shown
    assert "labelled cancers of 6 more patients." in shown
    assert not re.search(r"AUC|Sensitivity|Specificity", shown) and "roc-plot" not in monitored.page()


def test_quality_is_that_of_the_labels_beside_the_last_check_and_the_gate_split(monitored):
    labelled_lesions(monitored.store, malignant=20, benign=60, missed=5)
    rate = {"value": 0.9, "low": 0.8, "high": 0.95}
    figures = {"n": 50, "n_malignant": 12, "missed": 1, "sensitivity": rate, "specificity": rate, "auc": rate}
    figures |= {"corrected": {"sensitivity": {**rate, "value": 0.42}}, "not_corrected": None}
    quality = {"trailing": {"contexts": {"none": figures}}, "trailing_days": 30, "problems": ["AUC (none) fell"]}
    a_drift_report(monitored.store, 1, statistics={"features": [], "embedding": None, "quality": quality})
    page = monitored.page()
    shown = text_of(page, "quality")
    assert "Labels as of now 80 20 5 0.750" in shown
    assert "50 12 1 0.900 (0.800 to 0.950)" in shown and "corrected for who is labelled – – – 0.420" in shown
    assert "Gate split, before it was released 400 60 – 0.950" in shown
    assert "finds 75 % of the labelled cancers" in page and "calibration-plot-none" in page
    assert findings(page)[0][1] == "On experts' labels the model is worse than it was: AUC (none) fell."


# ---------------------------------------------------------------- trainings and tools


def test_a_training_is_asked_for_once_and_who_comes_second_is_told(monitored):
    answer = monitored.post("retrain", "Grace", reason="new camera at site 4")
    (row,) = list_retrainings(monitored.store, None, 10)
    assert (row["reason"], row["requested_by"], row["trigger"]) == ("new camera at site 4", "Grace", "manual")
    assert answer.headers["location"] == f"{PATH}?asked={row['id']}#retraining"
    assert "is requested" in text_of(monitored.page(f"?asked={row['id']}", "Grace"), "retraining")
    again = monitored.post("retrain", "Hedy", reason="drift")
    assert again.headers["location"] == answer.headers["location"]
    told = text_of(monitored.page(f"?asked={row['id']}", "Hedy"), "retraining")
    assert "Grace asked before you" in told and "yours was not added" in told


def test_tools_are_linked_where_their_address_is_set_and_else_the_page_says_how_to_start_them(local):
    monitored = Monitored(local, links=LinkSettings(ray_dashboard="http://ray.example:8265"))
    page = monitored.page()
    tools = page[page.index('id="tools"') :]
    assert re.findall(r'href="(https?:[^"]+)"', tools) == ["http://ray.example:8265"]
    assert "mlflow ui --backend-store-uri" in tools and "evidently ui --workspace" in tools


@pytest.mark.parametrize(
    "value", ["javascript:alert(1)", "ray:8265", "http://", "https://a:b@c/", "http://a b/", "//x"]
)
def test_an_address_that_is_no_page_s_is_refused(value):
    with pytest.raises(ValueError, match="expected an http or https address"):
        LinkSettings(mlflow=value)


def test_parts_are_of_the_page_and_alone_they_lead_to_it(monitored):
    for part in ("now", "alarms", "figures", "retraining"):
        answer = monitored.part(part)
        assert answer.status_code == 200 and "<html" not in answer.text
        assert f'hx-get="/monitoring/{part}"' in answer.text and 'hx-trigger="every 30s' in answer.text
        alone = monitored.clients["Ada"].get(f"{PATH}/{part}?hours=72")
        assert (alone.status_code, alone.headers["location"]) == (303, f"{PATH}?hours=72#{part}")
    assert monitored.part("nothing").status_code == 404
