"""`make screenshots`: pictures of every page of the running demo's service, for docs/.

Nothing is changed but what a visitor changes: one sample and one patient's lesions are analysed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from local.chromium import launch_options
from local.cluster import LocalCluster
from local.down import CLUSTER_FOLDER, DEMO_HOME
from local.jobs import REPO_ROOT
from local.traffic import read_lesions

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OUT = REPO_ROOT / "docs" / "screenshots"
WIDTHS = {"wide": 1280, "phone": 390}
# Whatever is below is more of the same.
MAX_HEIGHT = 4600
# Shown in the dark scheme too.
DARK = ("result", "monitoring")
_COLOURS = 128
_MANY = 14
_PATIENT_LESIONS = 8


def _analyse(page: Page, _home: Path) -> None:
    page.goto("/")


def _result(page: Page, _home: Path) -> None:
    page.goto("/")
    page.locator(".sample").first.click()
    page.locator("#send").click()
    page.locator("#result-title").wait_for()


def _results(page: Page, home: Path) -> None:
    folder = home / "traffic" / "ordinary"
    patients: dict[str, list[bytes]] = {}
    for lesion in read_lesions(folder / "train-image.hdf5", folder / "train-metadata.csv", set()):
        patients.setdefault(lesion.origin["patient_id"], []).append(lesion.image)
    pictures = next(found for found in patients.values() if _PATIENT_LESIONS <= len(found) <= _MANY)
    page.goto("/")
    page.locator("#images").set_input_files(
        [
            {"name": f"lesion_{number}.jpg", "mimeType": "image/jpeg", "buffer": picture}
            for number, picture in enumerate(pictures, 1)
        ]
    )
    page.locator("#send").click()
    page.locator("#result-title").wait_for()


def _at(path: str) -> Callable[[Page, Path], None]:
    def go(page: Page, _home: Path) -> None:
        page.goto(path)

    return go


# By file name; docs/pages.md shows them, and a test knows that none is missing.
SHOTS: dict[str, Callable[[Page, Path], None]] = {
    "analyse": _analyse,
    "result": _result,
    "results": _results,
    "review": _at("/review"),
    "label-studio": _at("/review/label-studio"),
    "monitoring": _at("/monitoring"),
    "models": _at("/models"),
    "about": _at("/about"),
}


def names() -> list[str]:
    """The files that a run writes."""
    dark = [f"{name}-wide-dark.png" for name in DARK]
    return [f"{name}-{width}.png" for name in SHOTS for width in WIDTHS] + dark


@contextmanager
def _page(browser: Browser, url: str, width: int, dark: bool) -> Iterator[Page]:
    context = browser.new_context(
        base_url=url,
        viewport={"width": width, "height": 900},
        color_scheme="dark" if dark else "light",
        locale="en-GB",
        timezone_id="UTC",
    )
    try:
        yield context.new_page()
    finally:
        context.close()


def _write(page: Page, path: Path) -> None:
    """The page as PNG, with few colours: a third of the bytes."""
    page.evaluate(
        "Promise.all([...document.images].map((image) => { image.loading = 'eager'; return image.decode(); }))"
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.png"
        page.screenshot(path=whole, full_page=True)
        with Image.open(whole) as image:
            cut = image.convert("RGB").crop((0, 0, image.width, min(image.height, MAX_HEIGHT)))
            cut.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def take_screenshots(url: str, home: Path, out: Path) -> list[Path]:
    """Writes a picture of each page at each width.

    Args:
        url: of the demo's service.
        home: the demo's folder, with its lesions.

    Raises:
        ValueError: no browser is installed.
    """
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    written = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        for name, go in SHOTS.items():
            looks = [(f"{name}-{width}.png", pixels, False) for width, pixels in WIDTHS.items()]
            if name in DARK:
                looks.append((f"{name}-wide-dark.png", WIDTHS["wide"], True))
            for file, pixels, dark in looks:
                with _page(browser, url, pixels, dark) as page:
                    go(page, home)
                    _write(page, out / file)
                written.append(out / file)
                print(f"{file}  {(out / file).stat().st_size / 1000:.0f} kB", flush=True)
        browser.close()
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=DEMO_HOME, help="the demo's folder")
    parser.add_argument("--out", type=Path, default=OUT, help="gets the pictures")
    given = parser.parse_args(arguments)
    cluster = LocalCluster.load(given.home.resolve() / CLUSTER_FOLDER)
    if cluster is None or not cluster.is_running():
        print("screenshots: error: no demo is up; `make demo` first", file=sys.stderr)
        return 1
    try:
        take_screenshots(f"http://127.0.0.1:{cluster.http_port}", given.home.resolve(), given.out)
    except ValueError as error:
        print(f"screenshots: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
