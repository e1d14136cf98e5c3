"""Writes a data set of the size and format of ISIC 2024 in minutes: every tile is a new crop of a few painted ones.

    python -m benchmarks.large_sample --out DIR [--rows 401059] [--patients 1042]

For load tests: sizes, bytes and metadata are as in `make_sample`, but the pictures no longer show their labels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from data_pipelines.progress import Progress
from data_pipelines.synthetic_dataset import MARK, write_images
from data_pipelines.synthetic_lesions import LesionAppearance, encode_jpeg, random_size, render_lesion
from data_pipelines.synthetic_metadata import build_metadata
from data_pipelines.synthetic_patients import draw_latents

PAINTED = 512
PAINTED_SIZE = 240
ISIC_2024_ROWS, ISIC_2024_PATIENTS = 401_059, 1_042


def painted_tiles(seed: int) -> list[np.ndarray]:
    """uint8 RGB tiles of varied skin and lesions."""
    tiles = []
    for number in range(PAINTED):
        rng = np.random.default_rng([seed, number, 1])
        looks = LesionAppearance(
            diameter_mm=float(rng.uniform(1.5, 9)),
            irregularity=float(rng.uniform()),
            variegation=float(rng.uniform()),
            veil=float(rng.uniform(0, 0.6)),
            skin_lab=(float(rng.uniform(45, 75)), float(rng.uniform(8, 18)), float(rng.uniform(14, 28))),
            num_hairs=int(rng.poisson(2.5)),
            angle_deg=float(rng.uniform(0, 180)),
        )
        tiles.append(render_lesion(looks, rng, PAINTED_SIZE))
    return tiles


def new_crop(tiles: list[np.ndarray], rng: np.random.Generator, size: int) -> bytes:
    """JPEG bytes of a random square of a random tile, turned, tinted and resized."""
    tile = tiles[rng.integers(len(tiles))]
    side = int(rng.integers(PAINTED_SIZE * 3 // 5, PAINTED_SIZE))
    top, left = rng.integers(0, PAINTED_SIZE - side, 2)
    crop = cv2.resize(tile[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)
    turned = np.rot90(crop[::-1] if rng.integers(2) else crop, int(rng.integers(4)))
    return encode_jpeg(cv2.convertScaleAbs(np.ascontiguousarray(turned), alpha=float(rng.uniform(0.85, 1.1))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=ISIC_2024_ROWS)
    parser.add_argument("--patients", type=int, default=ISIC_2024_PATIENTS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    rng = np.random.default_rng([arguments.seed, arguments.patients])
    # Poisson counts scatter: some lesions too many are drawn, and cut off.
    per_patient = 1.02 * arguments.rows / arguments.patients + 2
    latents = draw_latents(arguments.patients, per_patient, 0.001, rng)
    table = build_metadata(latents, rng, f"{arguments.seed:04d}", 0.0)
    # In random order, or the patients who are cut off would be the last ones.
    table = table.iloc[np.sort(rng.permutation(len(table))[: arguments.rows])].reset_index(drop=True)
    sizes = random_size(rng, len(table))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / MARK).write_text("Synthetic pictures and metadata for load tests. They show no real person.\n")
    say(f"painting {PAINTED} tiles")
    tiles = painted_tiles(arguments.seed)

    def picture(row: int) -> bytes:
        return new_crop(tiles, np.random.default_rng([arguments.seed, row]), int(sizes[row]))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, Progress("tiles", say) as progress:
        images = arguments.out / "train-image.hdf5"
        write_images(images, table["isic_id"], np.arange(len(table)), picture, pool, progress)
    table.to_csv(arguments.out / "train-metadata.csv", index=False)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"rows": len(table), "images": str(images), "bytes": images.stat().st_size, "seconds": seconds}))


if __name__ == "__main__":
    main()
