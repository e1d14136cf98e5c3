"""Synthetic patients and lesions in the exact ISIC 2024 format: HDF5 pictures and 55-column metadata.

Malignancy follows latents of which the picture shows some, the metadata others and both the rest, plus an offset per
patient that only comparison with the patient's other lesions removes. The official data's traps are kept: all
positives have a lesion_id, a missing body site means benign, prevalence depends on the site.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from data_pipelines.dataset_version import SYNTHETIC_ATTRIBUTION
from data_pipelines.synthetic_lesions import LesionAppearance, encode_jpeg, random_size, render_lesion

SITES = ("posterior torso", "lower extremity", "anterior torso", "upper extremity", "head/neck")
SITE_SHARE = np.array([0.31, 0.27, 0.21, 0.18, 0.03])
# log odds of malignancy by site: sun-exposed skin carries more.
SITE_EFFECT = np.array([-0.1, -0.2, 0.0, 0.2, 0.9])
LOCATIONS = ("Torso Back", "Left Leg", "Torso Front", "Right Arm", "Head & Neck")
LOCATION_DETAIL = (
    "Torso Back Top Third",
    "Left Leg - Lower",
    "Torso Front Top Half",
    "Right Arm - Upper",
    "Head & Neck",
)
TEST_COLUMNS = tuple(
    """isic_id patient_id age_approx sex anatom_site_general clin_size_long_diam_mm image_type tbp_tile_type tbp_lv_A
    tbp_lv_Aext tbp_lv_B tbp_lv_Bext tbp_lv_C tbp_lv_Cext tbp_lv_H tbp_lv_Hext tbp_lv_L tbp_lv_Lext tbp_lv_areaMM2
    tbp_lv_area_perim_ratio tbp_lv_color_std_mean tbp_lv_deltaA tbp_lv_deltaB tbp_lv_deltaL tbp_lv_deltaLB
    tbp_lv_deltaLBnorm tbp_lv_eccentricity tbp_lv_location tbp_lv_location_simple tbp_lv_minorAxisMM
    tbp_lv_nevi_confidence tbp_lv_norm_border tbp_lv_norm_color tbp_lv_perimeterMM tbp_lv_radial_color_std_max
    tbp_lv_stdL tbp_lv_stdLExt tbp_lv_symm_2axis tbp_lv_symm_2axis_angle tbp_lv_x tbp_lv_y tbp_lv_z attribution
    copyright_license""".split()
)
TRAIN_ONLY = (
    "lesion_id", "iddx_full", "iddx_1", "iddx_2", "iddx_3", "iddx_4", "iddx_5", "mel_mitotic_index", "mel_thick_mm",
    "tbp_lv_dnn_lesion_confidence",
)  # fmt: skip
TRAIN_COLUMNS = ("isic_id", "target", *TEST_COLUMNS[1:], *TRAIN_ONLY)
PROGRESS_ROWS = 500


@dataclass(frozen=True)
class Shift:
    """How a day differs from the data the model was trained on.

    Attributes:
        tint: gains of red, green and blue.
        blur: added Gaussian sigma, pixels of a 128-pixel tile.
        age_years: added to every patient's age.
    """

    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    blur: float = 0.0
    age_years: float = 0.0


SHIFTS = {"none": Shift(), "camera": Shift(tint=(0.86, 0.98, 1.18), blur=1.6, age_years=18.0)}


@dataclass
class _Latents:
    """Per lesion float64 (N,), except patient (int) and site (index into SITES)."""

    patient: np.ndarray
    site: np.ndarray
    size: np.ndarray
    border: np.ndarray
    colour: np.ndarray
    veil: np.ndarray
    history: np.ndarray
    offset: np.ndarray
    age: np.ndarray
    target: np.ndarray


def draw_latents(
    num_patients: int, lesions_per_patient: float, prevalence: float, rng: np.random.Generator
) -> _Latents:
    """Draws patients, lesions and labels; `prevalence` is the expected share of malignant lesions."""
    counts = 2 + rng.poisson(max(lesions_per_patient - 2.0, 0.0), num_patients)
    patient = np.repeat(np.arange(num_patients), counts)
    total = len(patient)
    # The patient's own normal: everything they have is larger, darker or more irregular than another's.
    offset = rng.normal(0.0, 1.1, num_patients)[patient]
    age = np.clip(np.round(rng.normal(57.0, 13.0, num_patients) / 5.0) * 5.0, 15.0, 85.0)[patient]
    site = rng.choice(len(SITES), total, p=SITE_SHARE)
    size, border, colour, veil, history = rng.standard_normal((5, total))
    score = 1.0 * size + 0.9 * border + 0.9 * colour + 1.5 * veil + 1.2 * history
    score += SITE_EFFECT[site] + 0.02 * (age - 57.0)
    # Rare positives: the intercept that gives the wanted prevalence, by bisection.
    low, high = -40.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(1 / (1 + np.exp(-(1.6 * score + middle)))) < prevalence else (low, middle)
    target = rng.random(total) < 1 / (1 + np.exp(-(1.6 * score + low)))
    return _Latents(patient, site, size, border, colour, veil, history, offset, age, target.astype(np.int64))


def build_metadata(latents: _Latents, rng: np.random.Generator, prefix: str, shift: Shift) -> pd.DataFrame:
    """The 55 official columns; what the cameras measure carries the patient's offset and noise."""
    total = len(latents.target)

    def noise(scale: float) -> np.ndarray:
        return rng.normal(0.0, scale, total)

    apparent = latents.offset
    diameter = np.clip(np.exp(1.25 + 0.28 * latents.size + 0.3 * apparent + noise(0.05)), 1.0, 28.0)
    axis = np.clip(0.78 - 0.08 * latents.border + noise(0.05), 0.3, 0.99)
    lightness = np.clip(
        58.0 + 9.0 * rng.standard_normal(latents.patient.max() + 1)[latents.patient] + noise(2.0), 25, 80
    )
    contrast = -(8.5 + 1.8 * latents.colour + 1.8 * apparent + noise(0.8)).clip(1.0, 35.0)
    a_ext, b_ext = 14.9 + noise(1.5), 26.9 + noise(2.0)
    delta_a, delta_b = 5.0 + 0.6 * latents.colour + noise(0.8), 1.4 + noise(1.2)
    area = np.pi / 4 * diameter**2 * axis
    ragged = 1.0 + 0.06 * np.clip(latents.border + 0.6 * apparent + noise(0.4), -2, 5)
    perimeter = np.pi * diameter * (1 + axis) / 2 * ragged
    sex = rng.choice(["male", "female"], latents.patient.max() + 1)[latents.patient].astype(object)
    # History is what the picture cannot show; its best witness among the columns is the nevus confidence.
    nevi = 100.0 / (1.0 + np.exp(-(0.3 - 1.5 * latents.history + noise(0.6))))
    colour_spread = np.clip(1.0 + 0.35 * latents.colour + 0.35 * apparent + noise(0.25), 0.0, None)
    border_score = np.clip(3.4 + 1.1 * latents.border + 1.0 * apparent + noise(0.6), 0.6, 10.0)
    a, b, l_inside = a_ext + delta_a, b_ext + delta_b, lightness + contrast
    positive = latents.target == 1
    frame = {
        "isic_id": [f"ISIC_{prefix}{number:06d}" for number in range(total)],
        "target": latents.target,
        "patient_id": [f"IP_{prefix}{number:05d}" for number in latents.patient],
        "age_approx": np.clip(latents.age + shift.age_years, 5.0, 85.0),
        "sex": sex,
        "anatom_site_general": np.array(SITES, dtype=object)[latents.site],
        "clin_size_long_diam_mm": diameter,
        "image_type": "TBP tile: close-up",
        "tbp_tile_type": np.where(rng.random(total) < 0.72, "3D: XP", "3D: white"),
        "tbp_lv_A": a,
        "tbp_lv_Aext": a_ext,
        "tbp_lv_B": b,
        "tbp_lv_Bext": b_ext,
        "tbp_lv_C": np.hypot(a, b),
        "tbp_lv_Cext": np.hypot(a_ext, b_ext),
        "tbp_lv_H": np.degrees(np.arctan2(b, a)),
        "tbp_lv_Hext": np.degrees(np.arctan2(b_ext, a_ext)),
        "tbp_lv_L": l_inside,
        "tbp_lv_Lext": lightness,
        "tbp_lv_areaMM2": area,
        "tbp_lv_area_perim_ratio": perimeter**2 / area,
        "tbp_lv_color_std_mean": colour_spread,
        "tbp_lv_deltaA": delta_a,
        "tbp_lv_deltaB": delta_b,
        "tbp_lv_deltaL": contrast,
        "tbp_lv_deltaLB": np.hypot(contrast, delta_b),
        "tbp_lv_deltaLBnorm": np.hypot(contrast, delta_b) / lightness * 40.0,
        "tbp_lv_eccentricity": np.sqrt(1 - axis**2),
        "tbp_lv_location": np.array(LOCATION_DETAIL, dtype=object)[latents.site],
        "tbp_lv_location_simple": np.array(LOCATIONS, dtype=object)[latents.site],
        "tbp_lv_minorAxisMM": diameter * axis,
        "tbp_lv_nevi_confidence": nevi,
        "tbp_lv_norm_border": border_score,
        "tbp_lv_norm_color": np.clip(3.0 + 1.0 * latents.colour + 0.9 * apparent + noise(0.8), 0.0, 10.0),
        "tbp_lv_perimeterMM": perimeter,
        "tbp_lv_radial_color_std_max": colour_spread * np.exp(noise(0.15)),
        "tbp_lv_stdL": np.clip(2.6 + 0.7 * latents.colour + noise(0.5), 0.3, None),
        "tbp_lv_stdLExt": np.clip(2.2 + noise(0.4), 0.7, None),
        "tbp_lv_symm_2axis": np.clip(0.3 + 0.05 * latents.border + noise(0.06), 0.05, 0.98),
        "tbp_lv_symm_2axis_angle": rng.integers(0, 36, total) * 5,
        "tbp_lv_x": noise(190.0),
        "tbp_lv_y": 1040.0 + noise(330.0),
        "tbp_lv_z": 55.0 + noise(85.0),
        "attribution": SYNTHETIC_ATTRIBUTION,
        "copyright_license": "CC-0",
        "lesion_id": np.where(positive | (rng.random(total) < 0.05), "IL_", "").astype(object),
        "iddx_full": np.where(positive, "Malignant::Synthetic", "Benign").astype(object),
        "iddx_1": np.where(positive, "Malignant", "Benign").astype(object),
        "iddx_2": np.where(positive, "Synthetic", None),
        "iddx_3": None,
        "iddx_4": None,
        "iddx_5": None,
        "mel_mitotic_index": None,
        "mel_thick_mm": None,
        "tbp_lv_dnn_lesion_confidence": np.clip(100.0 - rng.exponential(2.5, total), 0.0, 100.0),
    }
    table = pd.DataFrame(frame)
    marked = table["lesion_id"] == "IL_"
    table["lesion_id"] = np.where(marked, "IL_" + prefix + table.index.astype(str).str.zfill(6), None)
    # The official data's missingness: a site is missing only in benign rows; sex and age by patient.
    table.loc[(latents.target == 0) & (rng.random(total) < 0.015), "anatom_site_general"] = None
    lost_sex = rng.random(latents.patient.max() + 1) < 0.03
    lost_age = rng.random(latents.patient.max() + 1) < 0.007
    table.loc[lost_sex[latents.patient], "sex"] = None
    table.loc[lost_age[latents.patient], "age_approx"] = None
    numbers = table.select_dtypes("float").columns
    table[numbers] = table[numbers].round(6)
    return table[list(TRAIN_COLUMNS)]


def appearance(
    latents: _Latents, table: pd.DataFrame, row: int, rng: np.random.Generator, shift: Shift
) -> LesionAppearance:
    """What the picture of one lesion shows: the veil above all, and what the columns measure, less exactly."""
    lightness = float(table["tbp_lv_Lext"].iloc[row])
    depth = float(np.clip(-table["tbp_lv_deltaL"].iloc[row], 4.0, 30.0))
    return LesionAppearance(
        diameter_mm=float(table["clin_size_long_diam_mm"].iloc[row]),
        axis_ratio=float(
            np.clip(table["tbp_lv_minorAxisMM"].iloc[row] / table["clin_size_long_diam_mm"].iloc[row], 0.3, 1)
        ),
        angle_deg=float(rng.uniform(0.0, 180.0)),
        irregularity=float(np.clip(0.35 + 0.22 * (latents.border[row] + 0.5 * latents.offset[row]), 0.0, 1.0)),
        variegation=float(np.clip(0.35 + 0.22 * (latents.colour[row] + 0.5 * latents.offset[row]), 0.0, 1.0)),
        veil=float(np.clip(0.28 + 0.36 * latents.veil[row], 0.0, 1.0)),
        skin_lab=(lightness, float(table["tbp_lv_Aext"].iloc[row]), float(table["tbp_lv_Bext"].iloc[row])),
        lesion_lab=(lightness - depth, float(table["tbp_lv_A"].iloc[row]), float(table["tbp_lv_B"].iloc[row])),
        num_hairs=int(rng.poisson(2.5)),
        cross_polarised=table["tbp_tile_type"].iloc[row] == "3D: XP",
        tint=shift.tint,
        blur=float(rng.uniform(0.2, 0.7)) + shift.blur,
    )


def write_sample(
    out: Path,
    num_patients: int,
    lesions_per_patient: float,
    prevalence: float,
    seed: int,
    shift: Shift,
    say: Callable[[str], None],
) -> pd.DataFrame:
    """Writes train-image.hdf5, train-metadata.csv, the label-free test-* pair of the same lesions, and SYNTHETIC.txt.

    The same arguments give the same bytes of metadata and pictures; ids of different seeds never meet.
    """
    rng = np.random.default_rng([seed, num_patients])
    latents = draw_latents(num_patients, lesions_per_patient, prevalence, rng)
    prefix = f"{seed % 10_000:04d}"
    table = build_metadata(latents, rng, prefix, shift)
    sizes = random_size(rng, len(table))
    out.mkdir(parents=True, exist_ok=True)
    (out / "SYNTHETIC.txt").write_text(
        "Synthetic pictures and metadata made by dermray's make_sample. They show no real person and have no clinical\n"
        f"meaning. {json.dumps({'num_patients': num_patients, 'seed': seed, 'prevalence': prevalence})}\n",
        encoding="utf-8",
    )
    with h5py.File(out / "train-image.hdf5", "w") as images:
        for row, image_id in enumerate(table["isic_id"]):
            picture = np.random.default_rng([seed, row])
            tile = render_lesion(appearance(latents, table, row, picture, shift), picture, int(sizes[row]))
            images.create_dataset(image_id, data=np.bytes_(encode_jpeg(tile)))
            if (row + 1) % PROGRESS_ROWS == 0:
                say(f"rendered {row + 1}/{len(table)} lesions")
    table.to_csv(out / "train-metadata.csv", index=False)
    table[list(TEST_COLUMNS)].to_csv(out / "test-metadata.csv", index=False)
    return table
