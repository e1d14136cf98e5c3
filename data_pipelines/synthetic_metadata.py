"""The metadata of synthetic lesions: the 55 columns of ISIC 2024's train-metadata.csv, with the real table's traps.

All positives have a lesion_id, a missing body site means benign, prevalence depends on the site, and the diagnosis
columns give the label away.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from data_pipelines.dataset_version import SYNTHETIC_ATTRIBUTION
from data_pipelines.synthetic_patients import SITES, Latents

# The cameras' names of each of SITES, left and right, and the parts they tell apart.
LOCATIONS = (
    ("Torso Back", "Torso Back"),
    ("Left Leg", "Right Leg"),
    ("Torso Front", "Torso Front"),
    ("Left Arm", "Right Arm"),
    ("Head & Neck", "Head & Neck"),
)
LOCATION_PARTS = (
    (" Top Third", " Middle Third", " Bottom Third"),
    (" - Lower", " - Upper", " - Lower"),
    (" Top Half", " Bottom Half", " Top Half"),
    (" - Upper", " - Lower", " - Upper"),
    ("", "", ""),
)
# Height of each site in the camera's coordinates, in mm from the ground.
SITE_HEIGHT = np.array([1250.0, 520.0, 1230.0, 1080.0, 1540.0])
# Share, and the levels of iddx_2 to iddx_4, of what the malignant lesions are called.
_BCC = "Malignant adnexal epithelial proliferations - Follicular"
_MELANOMA = "Malignant melanocytic proliferations (Melanoma)"
_SCC = "Malignant epidermal proliferations"
DIAGNOSES = (
    (0.26, _BCC, "Basal cell carcinoma", "Basal cell carcinoma, Nodular"),
    (0.15, _BCC, "Basal cell carcinoma", "Basal cell carcinoma, Superficial"),
    (0.21, _MELANOMA, "Melanoma in situ", None),
    (0.15, _MELANOMA, "Melanoma Invasive", "Melanoma Invasive, Superficial spreading"),
    (0.16, _SCC, "Squamous cell carcinoma in situ", None),
    (0.07, _SCC, "Squamous cell carcinoma, Invasive", None),
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
TRAIN_ONLY = tuple(
    """lesion_id iddx_full iddx_1 iddx_2 iddx_3 iddx_4 iddx_5 mel_mitotic_index mel_thick_mm
    tbp_lv_dnn_lesion_confidence""".split()
)
TRAIN_COLUMNS = ("isic_id", "target", *TEST_COLUMNS[1:], *TRAIN_ONLY)


def build_metadata(latents: Latents, rng: np.random.Generator, prefix: str, age_shift: float = 0.0) -> pd.DataFrame:
    """The 55 official columns in order; what the cameras measure carries the patient's offset and noise.

    Args:
        prefix: digits that start every id; other digits, other patients.
        age_shift: years added to every patient's age.
    """
    total = len(latents.target)

    def noise(scale: float) -> np.ndarray:
        return rng.normal(0.0, scale, total)

    apparent = latents.offset
    diameter = np.clip(np.exp(1.25 + 0.28 * latents.size + 0.3 * apparent + noise(0.05)), 1.0, 28.0)
    axis = np.clip(0.78 - 0.08 * latents.border + noise(0.05), 0.3, 0.99)
    skin = 9.0 * rng.standard_normal(latents.num_patients)[latents.patient]
    lightness = np.clip(58.0 + skin + noise(2.0), 25, 80)
    contrast = -(8.5 + 1.8 * latents.colour + 1.8 * apparent + noise(0.8)).clip(1.0, 35.0)
    a_ext, b_ext = 14.9 + noise(1.5), 26.9 + noise(2.0)
    delta_a, delta_b = 5.0 + 0.6 * latents.colour + noise(0.8), 1.4 + noise(1.2)
    area = np.pi / 4 * diameter**2 * axis
    ragged = 1.0 + 0.06 * np.clip(latents.border + 0.6 * apparent + noise(0.4), -2, 5)
    perimeter = np.pi * diameter * (1 + axis) / 2 * ragged
    sex = rng.choice(["male", "female"], latents.num_patients)[latents.patient].astype(object)
    # History is what the picture cannot show; its best witness among the columns is the nevus confidence.
    nevi = 100.0 / (1.0 + np.exp(-(0.3 - 1.5 * latents.history + noise(0.6))))
    colour_spread = np.clip(1.0 + 0.35 * latents.colour + 0.35 * apparent + noise(0.25), 0.0, None)
    border_score = np.clip(3.4 + 1.1 * latents.border + 1.0 * apparent + noise(0.6), 0.6, 10.0)
    a, b, inside = a_ext + delta_a, b_ext + delta_b, lightness + contrast
    frame = {
        "isic_id": [f"ISIC_{prefix}{number:06d}" for number in range(total)],
        "target": latents.target,
        "patient_id": [f"IP_{prefix}{number:05d}" for number in latents.patient],
        "age_approx": np.clip(latents.age + age_shift, 5.0, 85.0),
        "sex": sex,
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
        "tbp_lv_L": inside,
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
        "tbp_lv_y": SITE_HEIGHT[latents.site] + noise(120.0),
        "tbp_lv_z": 55.0 + noise(85.0),
        "attribution": SYNTHETIC_ATTRIBUTION,
        "copyright_license": "CC-0",
    }
    table = pd.DataFrame(frame | _sites(latents, rng) | _diagnoses(latents, rng, prefix))
    _drop_by_patient(table, "sex", 0.03, latents, rng)
    _drop_by_patient(table, "age_approx", 0.007, latents, rng)
    numbers = table.select_dtypes("float").columns
    table[numbers] = table[numbers].round(6)
    return table[list(TRAIN_COLUMNS)]


def _sites(latents: Latents, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Body site and the cameras' own name of it; a site is missing only in benign lesions."""
    total = len(latents.target)
    side, part = rng.integers(0, 2, total), rng.integers(0, 3, total)
    simple = np.array(LOCATIONS, dtype=object)[latents.site, side]
    detail = simple + np.array(LOCATION_PARTS, dtype=object)[latents.site, part]
    missing = (latents.target == 0) & (rng.random(total) < 0.015)
    return {
        "anatom_site_general": np.where(missing, None, np.array(SITES, dtype=object)[latents.site]),
        "tbp_lv_location": np.where(missing, "Unknown", detail),
        "tbp_lv_location_simple": np.where(missing, "Unknown", simple),
    }


def _diagnoses(latents: Latents, rng: np.random.Generator, prefix: str) -> dict[str, object]:
    """The train-only columns. All positives and some negatives were biopsied, so they have a lesion_id."""
    total = len(latents.target)
    positive = latents.target == 1
    biopsied = positive | (rng.random(total) < 0.05)
    share = np.array([diagnosis[0] for diagnosis in DIAGNOSES])
    kind = rng.choice(len(DIAGNOSES), total, p=share / share.sum())
    levels = np.array([diagnosis[1:] for diagnosis in DIAGNOSES], dtype=object)[kind]
    levels[~positive] = None
    first = np.where(positive, "Malignant", "Benign").astype(object)
    full = ["::".join([name, *(level for level in row if level)]) for name, row in zip(first, levels, strict=True)]
    invasive = levels[:, 1] == "Melanoma Invasive"
    mitoses = np.array(["<1/mm^2", "0/mm^2", "1/mm^2", ">4/mm^2"], dtype=object)[rng.integers(0, 4, total)]
    return {
        "lesion_id": [f"IL_{prefix}{number:06d}" if known else None for number, known in enumerate(biopsied)],
        "iddx_full": full,
        "iddx_1": first,
        "iddx_2": levels[:, 0],
        "iddx_3": levels[:, 1],
        "iddx_4": levels[:, 2],
        "iddx_5": None,
        "mel_mitotic_index": np.where(invasive, mitoses, None),
        "mel_thick_mm": np.where(invasive, np.round(0.2 + rng.exponential(0.4, total), 1), np.nan),
        "tbp_lv_dnn_lesion_confidence": np.clip(100.0 - rng.exponential(2.5, total), 0.0, 100.0),
    }


def _drop_by_patient(
    table: pd.DataFrame, column: str, share: float, latents: Latents, rng: np.random.Generator
) -> None:
    lost = rng.random(latents.num_patients) < share
    table.loc[lost[latents.patient], column] = None
