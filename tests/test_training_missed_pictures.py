"""The page of missed cancers: the lowest risks first, each with its own picture; none is left out in silence."""

import cv2
import h5py
import numpy as np
import pandas as pd
import pytest

from data_pipelines.hdf5_index import build_index
from data_pipelines.image_dataset import DatasetVersion
from modeling.preprocessing import UndecodableImageError
from tests.tiny_bundle import tiny_task
from training import missed_pictures
from training.missed_pictures import MAX_PICTURES, plot_missed

NUM_LESIONS = MAX_PICTURES + 12


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    folder = tmp_path_factory.mktemp("missed")
    path = folder / "train-image.hdf5"
    with h5py.File(path, "w") as file:
        for number in range(NUM_LESIONS):
            picture = np.full((24, 32, 3), number, np.uint8)
            data = cv2.imencode(".png", picture)[1].tobytes() if number else b"no picture"
            file.create_dataset(f"ISIC_{number:07d}", data=np.void(data))
    index = build_index(str(path))
    lesions = pd.DataFrame({"id": index.ids.astype(str), "offset": index.offset, "size": index.size})
    return DatasetVersion(folder, tiny_task(), "d" * 64, str(path), lesions.sample(frac=1, random_state=0), 3)


def missed(numbers):
    risks = np.linspace(0.001, 0.04, len(numbers))
    return pd.DataFrame({"id": [f"ISIC_{n:07d}" for n in numbers], "class": "malignant", "risk": risks})


@pytest.fixture
def drawn(monkeypatch):
    """Titles and pictures as they are drawn."""
    from matplotlib.axes import Axes

    titles, pictures = [], []
    set_title, imshow = Axes.set_title, Axes.imshow

    def keep_title(axis, text, **options):
        titles.append(text)
        return set_title(axis, text, **options)

    def keep_picture(axis, picture, **options):
        pictures.append(picture)
        return imshow(axis, picture, **options)

    monkeypatch.setattr(Axes, "set_title", keep_title)
    monkeypatch.setattr(Axes, "imshow", keep_picture)
    return titles, pictures


def test_each_cancer_is_drawn_over_its_own_id_and_risk(tmp_path, version, drawn):
    titles, pictures = drawn
    assert plot_missed(tmp_path / "page.png", version, missed([9, 3, 17]), 0.05, "tiny") == 3
    assert [title.split("\n") for title in titles] == [
        ["ISIC_0000009", "malignant, risk 0.001"],
        ["ISIC_0000003", "malignant, risk 0.021"],
        ["ISIC_0000017", "malignant, risk 0.04"],
    ]
    assert [int(picture[0, 0, 0]) for picture in pictures] == [9, 3, 17]
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_only_the_lowest_risks_fit_on_the_page(tmp_path, version, monkeypatch):
    monkeypatch.setattr(missed_pictures, "MAX_PICTURES", 5)
    assert plot_missed(tmp_path / "page.png", version, missed(range(1, 12)), 0.05, "tiny") == 5
    assert plot_missed(tmp_path / "none.png", version, missed([]), 0.05, "tiny") == 0
    assert (tmp_path / "none.png").exists()


def test_a_picture_that_cannot_be_read_is_not_left_out_in_silence(tmp_path, version):
    with pytest.raises(UndecodableImageError):
        plot_missed(tmp_path / "page.png", version, missed([4, 0]), 0.05, "tiny")
