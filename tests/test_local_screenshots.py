"""The pictures of the pages in docs/: all are there, of every page, and shown."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from local.screenshots import MAX_HEIGHT, OUT, SHOTS, WIDTHS, main, names
from serve.access import PAGE_ROLES
from tests.house import REPO_ROOT

PAGE = (REPO_ROOT / "docs" / "pages.md").read_text(encoding="utf-8")
# What shows each page; signing in and out have nothing to look at.
SHOWN_BY = {"": "analyse", "results": "result", "review": "review", "monitoring": "monitoring"}
SHOWN_BY |= {"models": "models", "about": "about", "sign-in": None, "sign-out": None}


def test_every_page_has_its_pictures():
    assert set(SHOWN_BY) == set(PAGE_ROLES)
    assert {name for name in SHOWN_BY.values() if name is not None} <= set(SHOTS)
    assert {path.name for path in OUT.iterdir()} == set(names())


@pytest.mark.parametrize("name", names())
def test_a_picture_is_of_its_width_and_light_enough_to_keep(name):
    path = OUT / name
    with Image.open(path) as image:
        assert image.format == "PNG" and image.height <= MAX_HEIGHT
        assert image.width == WIDTHS[name.removesuffix(".png").removesuffix("-dark").rpartition("-")[2]]
        # No page is of one colour.
        assert len(image.convert("RGB").getcolors(2**24)) > 16
    assert path.stat().st_size < 400_000


def test_the_page_shows_each_and_links_to_nothing_else():
    linked = set(re.findall(r"\(screenshots/([^)]+)\)", PAGE))
    assert {f"{name}-wide.png" for name in SHOTS} <= linked <= set(names())


def test_without_a_demo_it_says_so(tmp_path, capsys):
    assert main(["--home", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "no demo is up; `make demo` first" in capsys.readouterr().err and not (tmp_path / "out").exists()
