"""The operator's page and its files: open to everyone, from memory, and nothing in them but our own."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serve import access, page_routes
from serve.ingress import build_api
from serve.key_ring import KeyRing
from tests.bundle_factory import backend, served_bundle
from tests.house import REPO_ROOT
from tests.local_service import LocalService

WEB = REPO_ROOT / "serve" / "web"
HTML = (WEB / "monitoring.html").read_text(encoding="utf-8")
SCRIPT = (WEB / "monitoring.js").read_text(encoding="utf-8")
STYLE = (WEB / "dermray.css").read_text(encoding="utf-8")


class Page(HTMLParser):
    """All elements of a page, in order: (tag, attributes)."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


PAGE = Page(HTML)
IDS = [attributes["id"] for _, attributes in PAGE.elements if "id" in attributes]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Of a service that asks for keys and has none: only what is open is answered."""
    home = tmp_path_factory.mktemp("pages")
    local = LocalService(served_bundle(home / "bundle"), home)
    api = build_api(backend(local.service, local.log, keys=KeyRing(list, 300)))
    with TestClient(api, raise_server_exceptions=False) as client:
        yield client


def test_the_page_is_served_without_a_key_and_loads_only_files_that_are_served_too(client):
    page = client.get("/monitoring")
    assert page.status_code == 200 and page.text == HTML
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "medical device" in page.headers["X-Dermray-Notice"] and "Not a medical device." in page.text
    loaded = {attributes["src"]: "text/javascript" for attributes in PAGE.all("script")}
    loaded |= {attributes["href"]: "text/css" for attributes in PAGE.all("link") if attributes["rel"] == "stylesheet"}
    assert len(loaded) == 2
    for path, media_type in loaded.items():
        # Relative: the page also works behind a prefix.
        answer = client.get(f"/{path}")
        assert answer.status_code == 200, path
        assert answer.headers["Content-Type"] == f"{media_type}; charset=utf-8"
        assert answer.text == (WEB / Path(path).name).read_text(encoding="utf-8")
    assert client.get("/v1/alarms").status_code == 401


def test_the_browser_runs_and_sends_nothing_but_our_own(client):
    policy = client.get("/monitoring").headers.get_list("Content-Security-Policy")
    assert len(policy) == 1
    directives = {name: sources for name, *sources in (part.split() for part in policy[0].split(";"))}
    assert directives["default-src"] == ["'none'"]
    for name in ("script-src", "style-src", "connect-src"):
        assert directives[name] == ["'self'"], name
    assert directives["frame-ancestors"] == directives["base-uri"] == ["'none'"]
    assert directives["require-trusted-types-for"] == ["'script'"] and directives["trusted-types"] == ["'none'"]
    assert "unsafe" not in policy[0]


def test_the_page_has_no_inline_script_style_or_handler_and_nothing_from_elsewhere():
    for tag, attributes in PAGE.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
    assert all(
        re.fullmatch(r"<script [^>]*></script>", found) for found in re.findall(r"<script.*?</script>", HTML, re.S)
    )
    assert not PAGE.all("style", "iframe", "object", "base")
    assert "//" not in HTML.replace("<!DOCTYPE", "") and "@import" not in STYLE and "url(" not in STYLE
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", SCRIPT)
    assert set(re.findall(r"https?://[^\"'\s]+", SCRIPT)) == {"http://www.w3.org/2000/svg"}
    # Nothing that outlives the tab holds the key.
    assert not re.search(r"localStorage|document\.cookie|indexedDB", SCRIPT)


def test_every_id_that_the_script_looks_up_is_in_the_page_once():
    used = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    assert len(used) > 30 and "getElementById" in SCRIPT and SCRIPT.count("getElementById") == 1
    assert used <= set(IDS)
    assert len(IDS) == len(set(IDS))


def test_a_screen_reader_finds_its_way():
    labelled = {attributes["for"] for attributes in PAGE.all("label") if "for" in attributes}
    wrapped = re.findall(r"<label><input [^>]*id=\"([\w-]+)\"", HTML)
    for attributes in PAGE.all("input", "select", "textarea"):
        assert attributes["id"] in labelled | set(wrapped), attributes
    assert len(PAGE.all("table")) == len(re.findall(r"<caption[^>]*>[^<]", HTML)) > 0
    assert all(attributes.get("scope") == "col" for attributes in PAGE.all("th"))
    for attributes in PAGE.all("section"):
        assert attributes["aria-labelledby"] in IDS
    levels = [int(tag[1]) for tag, _ in PAGE.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert PAGE.all("html")[0]["lang"] == "en"
    assert [attributes["aria-live"] for _, attributes in PAGE.elements if "aria-live" in attributes] == ["polite"]


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
    for name in ("border", "accent", "abstained"):
        assert contrast(colours[name], colours["ground"]) >= 3, name


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/nothing.js",
        "/static/monitoring.html",
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
    for path in ("/monitoring", "/static/monitoring.js"):
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


def test_the_pages_routes_are_tried_last_and_are_no_part_of_the_api(client):
    paths = [route.path for route in client.app.routes]
    assert paths[-2:] == ["/monitoring", "/static/{name}"]
    documented = client.get("/openapi.json").json()["paths"]
    assert not [path for path in documented if "monitoring" in path and not path.startswith("/v1/")]
    assert access.is_open("/monitoring") and page_routes.MONITORING_PATH in access.OPEN_PATHS


def test_the_script_is_valid():
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    checked = subprocess.run([node, "--check", WEB / "monitoring.js"], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
