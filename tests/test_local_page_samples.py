"""The page's sample lesions are what their command writes, and the figure names body sites that the models know."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from data_pipelines.synthetic_patients import SITES
from local.page_samples import FIELDS, OUT, main
from modeling.preprocessing import decode_image, image_quality

FIGURE = OUT.parent / "_body_figure.html"
# The values of `anatom_site_general` that the synthetic patients do not use.
OTHER_ISIC_SITES = {"palms/soles", "oral/genital"}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_the_command_writes_the_samples_of_the_page_again(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "samples")]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 6
    assert digests(tmp_path / "samples") == digests(OUT)


def test_another_seed_shows_other_lesions(tmp_path):
    assert main(["--out", str(tmp_path / "samples"), "--seed", "3"]) == 0
    assert not set(digests(tmp_path / "samples").values()) & set(digests(OUT).values())


def test_every_sample_is_a_picture_with_a_form_filled_in():
    samples = json.loads((OUT / "samples.json").read_text(encoding="utf-8"))
    sharpness = []
    for sample in samples:
        data = (OUT / sample["file"]).read_bytes()
        picture = decode_image(data)
        assert 200 <= picture.shape[0] == picture.shape[1] < 240
        assert len(data) < 20_000
        assert tuple(sample["metadata"]) == FIELDS
        assert sample["metadata"]["anatom_site_general"] in SITES
        assert not re.search("malignant|benign|cancer|melanoma|carcinoma", sample["title"].lower())
        sharpness.append(image_quality(picture)["blur"])
    # The least sharp of a few hundred pictures of the generator has 1.0.
    assert [value < 0.5 for value in sharpness] == [False] * 5 + [True]


def test_the_figure_has_every_body_site_and_nothing_that_runs():
    figure = FIGURE.read_text(encoding="utf-8")
    assert set(re.findall(r'data-site="([^"]*)"', figure)) == {*SITES, *OTHER_ISIC_SITES}
    sites = re.findall(r"<(?:g|path)\b[^>]*data-site=[^>]*>(<title>[^<]+</title>)?", figure)
    assert sites and all(sites)
    assert not re.search(r"<script|\son\w+=|\sstyle=|\sid=", figure)
    assert len(figure.encode()) < 12 * 1024
