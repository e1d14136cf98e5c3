"""Who sees which page, and whose forms are taken."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

from serve.access import PAGE_ROLES, page_of
from serve.ingress import build_api
from serve.key_ring import KeyRing
from serve.rate_limit import TokenBuckets
from serve.sessions import COOKIE
from store.api_keys import create_api_key, list_api_keys, revoke_api_key
from tests.bundle_factory import backend, lesion_image
from tests.local_service import LocalService


class Guarded:
    """A service that asks for keys, and a browser's client of it."""

    def __init__(self, local: LocalService):
        store = local.log.store
        self.store = store
        self.keys = {
            role: create_api_key(store, f"a {role}", role, "test") for role in ("caller", "reviewer", "approver")
        }
        self.ring = KeyRing(lambda: list_api_keys(store, live_only=True), refresh_s=0.02)
        self.backend = backend(local.service, local.log, keys=self.ring)
        self.client = TestClient(build_api(self.backend), raise_server_exceptions=False, follow_redirects=False)

    def sign_in(self, role: str, target: str = "/"):
        page = self.client.get("/sign-in", params={"next": target})
        form = {"csrf_token": token_of(page.text), "next": target, "key": self.keys[role][1]}
        return self.client.post("/sign-in", data=form)


@pytest.fixture
def guarded(local):
    guarded = Guarded(local)
    with guarded.client:
        yield guarded


def token_of(html: str) -> str:
    return re.search(r'name="csrf_token" value="([^"]+)"', html)[1]


def test_who_has_no_session_is_sent_to_sign_in_and_back(guarded):
    sent = guarded.client.get("/results/page-x?n=3")
    assert (sent.status_code, sent.headers["location"]) == (303, "/sign-in?next=%2Fresults%2Fpage-x%3Fn%3D3")
    answer = guarded.sign_in("caller", "/")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    page = guarded.client.get("/")
    assert page.status_code == 200 and "a caller" in page.text


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites_and_holds_no_key(guarded):
    cookie = guarded.sign_in("caller").headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Lax", "Path=/", "Max-Age=43200"} <= set(cookie.split("; ")) and "Secure" not in cookie
    key, text = guarded.keys["caller"]
    assert text not in cookie and key.key_hash not in cookie
    behind_tls = guarded.client.get("/about", headers={"X-Forwarded-Proto": "https", "Cookie": ""})
    assert behind_tls.headers["set-cookie"].endswith("; Secure")


def test_a_wrong_key_stays_on_the_page_and_begins_no_session(guarded):
    page = guarded.client.get("/sign-in")
    form = {"csrf_token": token_of(page.text), "next": "/", "key": "drk_" + "x" * 43}
    answer = guarded.client.post("/sign-in", data=form)
    assert answer.status_code == 401 and "no live key" in answer.text and "set-cookie" not in answer.headers
    assert "xxxx" not in answer.text
    assert guarded.client.get("/").status_code == 303


@pytest.mark.parametrize(
    "target", ["//evil.example/", "https://evil.example/", "/\\evil.example", "/v1/model", "x", ""]
)
def test_nobody_is_sent_anywhere_else_after_signing_in(guarded, target):
    assert guarded.sign_in("caller", target).headers["location"] == "/"


def test_a_session_ends_with_its_key_and_its_form_is_refused(guarded):
    guarded.sign_in("caller")
    page = guarded.client.get("/")
    revoke_api_key(guarded.store, guarded.keys["caller"][0].id, "test")
    # The ring reads the keys again by itself while the service answers.
    while guarded.ring.get(guarded.keys["caller"][0].id) is not None:
        guarded.client.get("/about")
    assert guarded.client.get("/").status_code == 303
    form = {"csrf_token": token_of(page.text), "key": "page-" + "x" * 22}
    files = {"images": ("a.jpg", lesion_image(1), "image/jpeg")}
    answer = guarded.client.post("/", data=form, files=files)
    assert (
        answer.status_code == 401
        and "sign in" in answer.text
        and answer.headers["content-type"].startswith("text/html")
    )


def test_signing_out_ends_the_session_of_this_browser(guarded):
    guarded.sign_in("caller")
    token = token_of(guarded.client.get("/").text)
    assert guarded.client.post("/sign-out", data={"csrf_token": token}).headers["location"] == "/sign-in"
    assert guarded.client.get("/").status_code == 303


def test_a_cookie_opens_no_route_of_the_programming_interface(guarded):
    guarded.sign_in("reviewer")
    assert guarded.client.get("/").status_code == 200
    assert guarded.client.get("/v1/predictions").status_code == 401


def posts(api) -> list[str]:
    """Pages that take forms."""
    return [
        route.path
        for route in api.routes
        if "POST" in (getattr(route, "methods", None) or ()) and page_of(route.path) is not None
    ]


@pytest.mark.parametrize(
    ("role", "hidden"), [("caller", {"/review", "/models"}), ("reviewer", {"/models"}), ("approver", set())]
)
def test_nobody_is_led_to_a_page_that_the_role_is_not_enough_for(guarded, role, hidden):
    targets = {"/", "/review", "/models", "/about"}
    signed_out = guarded.client.get("/about").text
    assert all(f'<a href="{target}"' in signed_out for target in targets)
    guarded.sign_in(role)
    html = guarded.client.get("/about").text
    assert {target for target in targets if f'<a href="{target}"' not in html} == hidden
    assert {guarded.client.get(target).status_code for target in hidden} <= {403}


def test_every_form_of_the_pages_needs_its_session_s_token(guarded, local):
    guarded.sign_in("approver")
    own = token_of(guarded.client.get("/").text)
    other = token_of(TestClient(local.api).get("/").text)
    paths = posts(build_api(guarded.backend))
    assert {"/", "/sign-in", "/sign-out"} <= set(paths)
    for path in paths:
        for token in ("", other, own[:-1]):
            answer = guarded.client.post(path, data={"csrf_token": token})
            assert answer.status_code == 403 and "csrf_token" in answer.text, path
        assert guarded.client.post(path).status_code == 403


def test_a_service_without_keys_still_takes_no_forms_of_other_sites(local):
    """Whatever page the operator visits could send a form to a service on loopback."""
    local.client.get("/")
    files = {"images": ("a.jpg", lesion_image(1), "image/jpeg")}
    key = {"key": "page-" + "x" * 22}
    assert local.client.post("/", data=key, files=files).status_code == 403
    foreign = TestClient(local.api).post(
        "/", data=key | {"csrf_token": token_of(local.client.get("/").text)}, files=files
    )
    assert foreign.status_code == 403 and not local.rows()


def test_every_page_with_a_session_has_a_role_and_no_other_path_is_a_page(local):
    for path in ("/", "/results/x", "/monitoring", "/monitoring/alarms/1/acknowledge", "/about", "/sign-in"):
        assert page_of(path) in PAGE_ROLES
    for path in (
        "/v1/predict",
        "/v1/monitoring/summary",
        "/static/x.css",
        "//",
        "/resultsx",
        "/v1/../about",
        "//about",
    ):
        assert page_of(path) is None, path


@pytest.mark.parametrize("other", ['prefs={"a":1}', "foo[1]=2", "a b=c", 'theme="dark mode', "=", "\xe9=1"])
def test_cookies_of_other_services_of_the_host_do_not_end_a_session(guarded, other):
    own = guarded.sign_in("caller").headers["set-cookie"].partition(";")[0]
    guarded.client.cookies.clear()
    for cookies in (f"{other}; {own}", f"{own}; {other}"):
        assert guarded.client.get("/", headers={"Cookie": cookies.encode("latin-1")}).status_code == 200


def test_a_page_s_pictures_do_not_use_up_its_reader_s_rate(local, nodes):
    guarded = Guarded(local)
    limited = backend(local.service, local.log, keys=guarded.ring, buckets=TokenBuckets(0.001, 3))
    guarded.client = TestClient(build_api(limited), follow_redirects=False)
    with guarded.client:
        guarded.sign_in("caller")
        codes = [guarded.client.get(f"/results/{'0' * 32}/picture.jpg").status_code for _ in range(20)]
        assert set(codes) == {404}
        assert [guarded.client.get("/").status_code for _ in range(4)] == [200, 200, 200, 429]
        assert guarded.client.get("/about").status_code == 200


@pytest.mark.parametrize("path", ["/about%0A", "/%0A", "/sign-in%0A", "/results/x%0A"])
def test_a_path_with_a_line_break_is_guarded_as_the_page_that_answers_it(guarded, local, path):
    assert local.client.get(path, follow_redirects=False).status_code in (200, 303, 404)
    assert guarded.client.get(path).status_code == (200 if "about" in path or "sign" in path else 303)


def test_a_damaged_cookie_is_as_good_as_none(local):
    answer = local.client.get("/", headers={"Cookie": f'{COOKIE}="\\777; =; {COOKIE}=a.b.c.d'})
    assert answer.status_code == 200 and COOKIE in answer.headers["set-cookie"]
