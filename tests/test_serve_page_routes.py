"""Files that the pages load: open to everyone, from memory, and nothing in them or in the templates but our own."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from starlette.testclient import TestClient

from serve.ingress import build_api
from serve.key_ring import KeyRing
from tests.bundle_factory import backend, served_bundle
from tests.house import REPO_ROOT
from tests.local_service import LocalService

WEB = REPO_ROOT / "serve" / "web"
STYLE = (WEB / "dermray.css").read_text(encoding="utf-8")
TEMPLATES = sorted(path.name for path in WEB.glob("*.html"))
SCRIPTS = sorted(path.name for path in WEB.glob("*.js") if not path.name.endswith(".min.js"))


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Of a service that asks for keys and has none: only what is open is answered."""
    home = tmp_path_factory.mktemp("pages")
    local = LocalService(served_bundle(home / "bundle"), home)
    api = build_api(backend(local.service, local.log, keys=KeyRing(list, 300)))
    with TestClient(api, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_page_loads_is_served_to_everyone_under_a_policy_that_allows_it(client, name):
    html = (WEB / name).read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|link)[^>]* (?:src|href)="(/[^"]+)"', html)
    for path in loaded:
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["Content-Type"].startswith("text/javascript" if path.endswith(".js") else "text/css")
        assert answer.content == (WEB / path.removeprefix("/static/")).read_bytes()
    assert name != "base.html" or len(loaded) == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_has_an_inline_script_style_or_handler_or_anything_from_elsewhere(name):
    html = (WEB / name).read_text(encoding="utf-8")
    assert not re.search(r"<(?:style|iframe|object|base)\b|\s(?:style|on[a-z]+)=|\|\s*safe\b|autoescape", html)
    assert all(
        re.fullmatch(r"<script [^>]*></script>", found) for found in re.findall(r"<script.*?</script>", html, re.S)
    )
    assert "://" not in html
    assert "@import" not in STYLE and "url(" not in STYLE


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_makes_no_html_of_text_and_keeps_nothing(name):
    script = (WEB / name).read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)
    assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB|https?://", script)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_borders_stand_out_as_wcag_aa_asks(scheme):
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.S)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", blocks[scheme == "dark"]))
    grounds = colours["ground"], colours["raised"]
    for name in ("text", "quiet", "accent", "critical"):
        assert min(contrast(colours[name], ground) for ground in grounds) >= 4.5, name
    for name in ("accent", "critical", "warning", "info"):
        assert contrast(colours[name], colours[f"on-{name}"]) >= 4.5, name
    # Of lines and areas in charts, too.
    for name in ("border", "accent", "abstained", "warning", "critical", "fine"):
        assert contrast(colours[name], colours["ground"]) >= 3, name


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/nothing.js",
        "/static/monitoring.html",
        "/static/_plots.html",
        "/static/../ingress.py",
        "/static/..%2fingress.py",
        "/static/%2e%2e/ingress.py",
        "/static/%2e%2e%2f%2e%2e%2fetc/passwd",
        "/static/..%5c..%5cetc%5cpasswd",
        "/static//etc/passwd",
        "/static/monitoring.js%00.css",
        "/static/monitoring.js/",
        "/static/.",
    ],
)
def test_nothing_but_the_pages_files_is_given_out(client, path):
    # httpx would resolve the dots itself; a hostile client sends them as they are.
    url = client.base_url.copy_with(raw_path=path.encode())
    answer = client.get(url)
    assert answer.status_code in (401, 404), answer.text
    assert set(answer.json()) == {"error", "detail"} and "import" not in answer.text


def test_a_browser_asks_each_time_and_gets_a_file_again_only_when_it_changed(client):
    path = "/static/monitoring.js"
    first = client.get(path)
    assert first.headers["Cache-Control"] == "no-cache"
    tag = first.headers["ETag"]
    for known in (tag, f'"other", W/{tag}'):
        again = client.get(path, headers={"If-None-Match": known})
        assert again.status_code == 304 and again.content == b"" and again.headers["ETag"] == tag
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == first.content
    head = client.head(path)
    assert head.status_code == 200 and head.content == b"" and head.headers["ETag"] == tag
    assert client.post(path).status_code == 405


def test_the_files_route_is_tried_last_and_pages_are_no_part_of_the_api(client):
    assert client.app.routes[-1].path == "/static/{name}"
    documented = client.get("/openapi.json").json()["paths"]
    assert {path for path in documented if not path.startswith("/v1/")} == {"/healthz", "/readyz"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_valid(name):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    checked = subprocess.run([node, "--check", WEB / name], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
