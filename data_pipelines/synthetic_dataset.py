"""Writes a synthetic data set in the exact ISIC 2024 format: HDF5 pictures and metadata of the same made-up lesions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from data_pipelines.progress import Progress
from data_pipelines.synthetic_lesions import LesionAppearance, encode_jpeg, random_size, render_lesion
from data_pipelines.synthetic_metadata import TEST_COLUMNS, build_metadata
from data_pipelines.synthetic_patients import Latents, draw_latents
from store.synced_files import replacing

MARK = "SYNTHETIC.txt"
PROGRESS_ROWS = 500
# Ids hold the patient in five digits and the lesion in six.
MAX_PATIENTS, MAX_LESIONS = 100_000, 1_000_000

Gain = Field(1.0, ge=0.5, le=2.0)


class Shift(BaseModel):
    """How a day differs from the data that a model was trained on.

    Attributes:
        red, green, blue: gains of the camera's colours, 1 = unchanged.
        blur: added Gaussian sigma, in pixels of a 128-pixel tile.
        age_years: added to every patient's age (which stays within 5-85).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    red: float = Gain
    green: float = Gain
    blue: float = Gain
    blur: float = Field(0.0, ge=0.0, le=20.0)
    age_years: float = Field(0.0, ge=-80.0, le=80.0)


SHIFTS = {"none": Shift(), "camera": Shift(red=0.86, green=0.98, blue=1.18, blur=1.6, age_years=18.0)}


def write_sample(
    out: Path,
    num_patients: int,
    lesions_per_patient: float,
    prevalence: float,
    seed: int,
    shift: Shift,
    say: Callable[[str], None],
    num_test_patients: int = 0,
) -> pd.DataFrame:
    """Writes train-image.hdf5, train-metadata.csv (55 columns) and SYNTHETIC.txt.

    With `num_test_patients`, also test-image.hdf5 and test-metadata.csv (44 columns) of that many further patients.
    The same arguments give the same bytes; ids of different seeds never meet.

    Returns:
        The training table, 55 columns.

    Raises:
        ValueError: the folder holds pictures that this function did not make, or too many patients or lesions.
    """
    if (out / "train-image.hdf5").exists() and not (out / MARK).exists():
        raise ValueError(f"folder {out} holds images that are not a synthetic sample; choose another --out")
    if num_patients + num_test_patients > MAX_PATIENTS:
        raise ValueError(f"{num_patients + num_test_patients} patients; ids have room for {MAX_PATIENTS}")
    rng = np.random.default_rng([seed, num_patients])
    latents = draw_latents(num_patients + num_test_patients, lesions_per_patient, prevalence, rng)
    if len(latents.target) > MAX_LESIONS:
        raise ValueError(f"{len(latents.target)} lesions; ids have room for {MAX_LESIONS}")
    table = build_metadata(latents, rng, f"{seed:04d}", shift.age_years)
    sizes = random_size(rng, len(table))
    shown = Shown(latents, table, shift)

    def picture(row: int) -> bytes:
        # A generator per row: the picture does not depend on which thread paints it, or after which other.
        own = np.random.default_rng([seed, row])
        return encode_jpeg(render_lesion(shown.appearance(row, own), own, int(sizes[row])))

    out.mkdir(parents=True, exist_ok=True)
    about = {"num_patients": num_patients, "seed": seed, "prevalence": prevalence, "shift": shift.model_dump()}
    (out / MARK).write_text(
        "Synthetic pictures and metadata made by dermray's make_sample. They show no real person and have no clinical\n"
        f"meaning. {json.dumps(about)}\n",
        encoding="utf-8",
    )
    held_out = latents.patient >= num_patients
    # Painting and encoding release the interpreter lock most of the time.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        files = {"train-image.hdf5": ~held_out} | ({"test-image.hdf5": held_out} if num_test_patients else {})
        for name, chosen in files.items():
            with Progress(f"{name}, lesions", say) as progress:
                write_images(out / name, table["isic_id"], np.flatnonzero(chosen), picture, pool, progress)
    train = table[~held_out].reset_index(drop=True)
    with replacing(out / "train-metadata.csv") as temporary:
        train.to_csv(temporary, index=False)
    if num_test_patients:
        with replacing(out / "test-metadata.csv") as temporary:
            table.loc[held_out, list(TEST_COLUMNS)].to_csv(temporary, index=False)
    return train


def write_images(
    path: Path,
    ids: pd.Series,
    rows: np.ndarray,
    picture: Callable[[int], bytes],
    pool: ThreadPoolExecutor,
    on_progress: Callable[[int, int], None],
) -> None:
    """One scalar dataset `S<n>` per id at the root, as in the competition; whole or absent.

    Args:
        rows: positions in `ids` to write.
        picture: row -> JPEG bytes; called in the pool's threads.
        on_progress: called with (written, to write).
    """
    names = ids.to_numpy(str)
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        for start in range(0, len(rows), PROGRESS_ROWS):
            part = rows[start : start + PROGRESS_ROWS].tolist()
            for row, data in zip(part, pool.map(picture, part), strict=True):
                file.create_dataset(names[row], data=np.bytes_(data))
            on_progress(start + len(part), len(rows))


class Shown:
    """What the pictures show: the veil above all, and what the columns measure, less exactly."""

    def __init__(self, latents: Latents, table: pd.DataFrame, shift: Shift):
        self._latents, self._shift = latents, shift
        names = {
            "diameter": "clin_size_long_diam_mm",
            "minor": "tbp_lv_minorAxisMM",
            "skin_l": "tbp_lv_Lext",
            "skin_a": "tbp_lv_Aext",
            "skin_b": "tbp_lv_Bext",
            "contrast": "tbp_lv_deltaL",
            "a": "tbp_lv_A",
            "b": "tbp_lv_B",
        }
        self._columns = {name: table[column].to_numpy(float) for name, column in names.items()}
        self._cross_polarised = (table["tbp_tile_type"] == "3D: XP").to_numpy()

    def appearance(self, row: int, rng: np.random.Generator) -> LesionAppearance:
        """The picture's content of one row."""
        latents, shift = self._latents, self._shift
        value: dict[str, Any] = {name: float(column[row]) for name, column in self._columns.items()}
        apparent = 0.5 * latents.offset[row]
        return LesionAppearance(
            diameter_mm=value["diameter"],
            axis_ratio=min(max(value["minor"] / value["diameter"], 0.3), 1.0),
            angle_deg=float(rng.uniform(0.0, 180.0)),
            irregularity=float(np.clip(0.35 + 0.22 * (latents.border[row] + apparent), 0.0, 1.0)),
            variegation=float(np.clip(0.35 + 0.22 * (latents.colour[row] + apparent), 0.0, 1.0)),
            veil=float(np.clip(0.5 * latents.veil[row] - 0.1, 0.0, 1.0)),
            skin_lab=(value["skin_l"], value["skin_a"], value["skin_b"]),
            lesion_lab=(value["skin_l"] - min(max(-value["contrast"], 4.0), 30.0), value["a"], value["b"]),
            num_hairs=int(rng.poisson(2.5)),
            cross_polarised=bool(self._cross_polarised[row]),
            tint=(shift.red, shift.green, shift.blue),
            blur=float(rng.uniform(0.2, 0.7)) + shift.blur,
        )
