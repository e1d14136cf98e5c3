"""Writes the sample lesions of the service's page: six synthetic pictures and what a form would say of each.

python -m local.page_samples

They are lesions of a generated sample, each the one that fits its description best: benign and malignant, on light and
darker skin, and one so blurred that a model should abstain. The descriptions name what is seen, never the label.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

OUT = Path(__file__).resolve().parents[1] / "serve" / "web" / "samples"
SEED = 2
NUM_PATIENTS, LESIONS_PER_PATIENT, PREVALENCE = 300, 12.0, 0.2
FIELDS = ("age_approx", "sex", "anatom_site_general", "clin_size_long_diam_mm")
LIGHT, DARKER = (56.0, 72.0), (34.0, 45.0)


@dataclass(frozen=True)
class Wanted:
    """What one of the pictures shows.

    Attributes:
        skin: lightness of the skin around the lesion, from and to.
        diameter_mm: from and to.
        border, colours: 0-1, how irregular the outline is and how many colours there are.
        veil: 0-1, a blue-grey area.
        depth: how much darker than the skin, in units of CIELAB's lightness.
        size: side of the picture in pixels.
        blur: Gaussian sigma in pixels over the finished picture, its grain too: where the camera's noise stays
            sharp, the limit on sharpness does not tell it from a good picture.
    """

    title: str
    malignant: bool
    skin: tuple[float, float]
    diameter_mm: tuple[float, float]
    border: float
    colours: float
    veil: float
    depth: float
    size: int
    blur: float = 0.0


SAMPLES = (
    Wanted("Small, round, even brown", False, LIGHT, (3.5, 5.0), 0.2, 0.2, 0.0, 13.0, 211),
    Wanted("Large, irregular, several colours", True, LIGHT, (6.5, 9.0), 0.9, 0.9, 0.2, 14.0, 229),
    Wanted("Brown, round, on darker skin", False, DARKER, (3.0, 5.0), 0.3, 0.3, 0.0, 12.0, 205),
    Wanted("Blue-grey area, on darker skin", True, DARKER, (5.0, 8.0), 0.6, 0.6, 0.8, 12.0, 223),
    Wanted("Medium, slightly uneven outline", False, LIGHT, (4.5, 6.5), 0.5, 0.4, 0.0, 11.0, 217),
    Wanted("Out of focus", True, LIGHT, (5.0, 8.0), 0.5, 0.5, 0.5, 12.0, 201, blur=6.0),
)


def write_page_samples(out: Path, seed: int = SEED) -> list[dict[str, Any]]:
    """Writes sample_1.jpg to sample_6.jpg and samples.json; the same seed gives the same bytes.

    Returns:
        What samples.json holds: per picture its file, title and metadata.

    Raises:
        ValueError: the seed is negative, or its sample has no lesion for one of the pictures.
    """
    if seed < 0:
        raise ValueError(f"--seed {seed}: expected 0 or more")
    import cv2
    import numpy as np

    from data_pipelines.synthetic_dataset import Shift, Shown
    from data_pipelines.synthetic_lesions import encode_jpeg, render_lesion
    from data_pipelines.synthetic_metadata import build_metadata
    from data_pipelines.synthetic_patients import draw_latents

    rng = np.random.default_rng([seed, NUM_PATIENTS])
    latents = draw_latents(NUM_PATIENTS, LESIONS_PER_PATIENT, PREVALENCE, rng)
    table = build_metadata(latents, rng, f"{seed:04d}")
    shown = Shown(latents, table, Shift())
    complete = table[list(FIELDS)].notna().all(axis=1).to_numpy()
    patients: set[int] = set()
    samples = []
    out.mkdir(parents=True, exist_ok=True)
    for number, wanted in enumerate(SAMPLES, 1):
        # Six people: a visitor who tries several samples sees no one twice.
        row = _best_row(wanted, table, shown, complete & ~np.isin(latents.patient, list(patients)))
        patients.add(int(latents.patient[row]))
        own = np.random.default_rng([seed, row])
        picture = render_lesion(shown.appearance(row, own), own, wanted.size)
        if wanted.blur:
            picture = cv2.GaussianBlur(picture, (0, 0), wanted.blur)
        file = f"sample_{number}.jpg"
        (out / file).write_bytes(encode_jpeg(picture))
        samples.append({"file": file, "title": wanted.title, "metadata": _metadata(table.loc[row, list(FIELDS)])})
    (out / "samples.json").write_text(json.dumps(samples, indent=2) + "\n", encoding="utf-8")
    return samples


def _best_row(wanted: Wanted, table: pd.DataFrame, shown: Any, free: np.ndarray) -> int:
    """The row that comes closest, of those with the wanted label, skin and diameter."""
    import numpy as np

    fits = free & (table["target"] == int(wanted.malignant)).to_numpy()
    fits &= table["tbp_lv_Lext"].between(*wanted.skin).to_numpy()
    fits &= table["clin_size_long_diam_mm"].between(*wanted.diameter_mm).to_numpy()
    if not fits.any():
        raise ValueError(f"no lesion fits {wanted.title!r}; choose another --seed")

    def distance(row: int) -> float:
        seen = shown.appearance(row, np.random.default_rng(0))
        return (
            (seen.irregularity - wanted.border) ** 2
            + (seen.variegation - wanted.colours) ** 2
            + (seen.veil - wanted.veil) ** 2
            # Five units of lightness are as plain to see as the whole way from one colour to several.
            + ((seen.skin_lab[0] - seen.lesion_lab[0] - wanted.depth) / 5.0) ** 2
        )

    return min(np.flatnonzero(fits).tolist(), key=distance)


def _metadata(row: pd.Series) -> dict[str, Any]:
    """As a person would fill them in: whole years, tenths of a millimetre."""
    return {
        "age_approx": round(row["age_approx"]),
        "sex": row["sex"],
        "anatom_site_general": row["anatom_site_general"],
        "clin_size_long_diam_mm": round(float(row["clin_size_long_diam_mm"]), 1),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the pictures and samples.json")
    parser.add_argument("--seed", type=int, default=SEED, help="other seeds, other people")
    options = parser.parse_args(arguments)
    try:
        samples = write_page_samples(options.out, options.seed)
    except (ValueError, OSError) as error:
        print(f"page_samples: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"out": str(options.out), "samples": len(samples)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
