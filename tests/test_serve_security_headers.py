"""Every answer tells browsers to keep, frame and guess nothing; the documentation page still works."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from serve.ingress import build_api
from serve.security_headers import SecurityHeaders
from tests.bundle_factory import backend, lesion_image, served_bundle, storage
from tests.test_serve_access import Guarded

EXPECTED = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("headers") / "bundle")


@pytest.fixture
def guarded(reference, dermray_home):
    service = Guarded(reference, storage(dermray_home))
    with service.client:
        yield service


def directives(response) -> dict[str, list[str]]:
    policy = response.headers["Content-Security-Policy"]
    return {name: sources for name, *sources in (part.split() for part in policy.split(";"))}


def test_every_answer_has_the_headers_also_refusals_and_failures(guarded, monkeypatch):
    answers = {
        200: guarded.predict(guarded.keys["caller"]),
        401: guarded.predict(),
        403: guarded.send("GET", "/v1/candidates", guarded.keys["caller"]),
        404: guarded.send("GET", "/v1/nothing", guarded.keys["admin"]),
        413: guarded.client.post(
            "/v1/predict", content=b"x", headers={"X-API-Key": guarded.keys["caller"], "Content-Length": "999999999999"}
        ),
        422: guarded.send(key=guarded.keys["caller"]),
    }

    async def fail(images):
        raise RuntimeError

    monkeypatch.setattr(guarded.service.scoring.scorer, "score", fail)
    answers[500] = guarded.predict(guarded.keys["caller"])
    for status, response in answers.items():
        assert response.status_code == status
        for name, value in EXPECTED.items():
            assert response.headers.get_list(name) == [value], (status, name)
        assert directives(response)["default-src"] == ["'none'"]
        assert directives(response)["frame-ancestors"] == ["'none'"]
        assert "server" not in response.headers


def test_the_documentation_page_may_run_its_own_two_scripts_of_known_content_and_no_others(guarded):
    page = guarded.client.get("/docs")
    sources = directives(page)["script-src"]
    (inline,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    loaded = re.findall(
        r'<(?:script src|link rel="stylesheet" href)="([^"]+)" integrity="sha384-[\w+/]{64}"', page.text
    )
    assert len(loaded) == page.text.count("https://") == 2
    assert set(sources) == {loaded[1], f"'sha256-{digest}'"}
    assert loaded[0] in directives(page)["style-src"]
    assert directives(page)["connect-src"] == ["'self'"]
    # A version, not a range: the hashes hold for one.
    assert all(re.search(r"@\d+\.\d+\.\d+/", url) for url in loaded)


def test_pages_load_from_this_service_only():
    async def page(scope, receive, send):
        await PlainTextResponse("page")(scope, receive, send)

    client = TestClient(SecurityHeaders(page))
    for path in ("/", "/about", "/results/x"):
        assert directives(client.get(path))["script-src"] == ["'self'"]
        assert directives(client.get(path))["frame-ancestors"] == ["'none'"]


def test_an_answers_own_header_stays():
    async def file(scope, receive, send):
        await PlainTextResponse("x", headers={"Cache-Control": "max-age=60"})(scope, receive, send)

    response = TestClient(SecurityHeaders(file)).get("/static/x.js")
    assert response.headers.get_list("Cache-Control") == ["max-age=60"]
    assert response.headers["X-Frame-Options"] == "DENY"


def test_an_open_service_has_them_too(guarded):
    response = TestClient(build_api(backend(guarded.service, guarded.log))).post(
        "/v1/predict", files={"image": ("x", lesion_image())}
    )
    assert response.status_code == 200
    assert response.headers["X-Content-Type-Options"] == "nosniff"
