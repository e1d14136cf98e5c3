"""Rows/s of the Ray Data pipeline beside plain torch DataLoaders and an inline loop, on the same pictures and recipe.

    python -m benchmarks.data_streaming --images FILE.hdf5 [--rows 20000] [--rounds 3] [--size 128]

Every variant delivers shuffled uint8 batches of 128 with labels; the time counts from asking for the first batch to
having the last, worker start-up included. Rounds alternate; the medians are the result, printed as one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import h5py
import numpy as np

from data_pipelines.augmentation import AugmentationConfig, build_augmentation
from data_pipelines.hdf5_datasource import DecodeRecipe, ImageRows, LesionImageDatasource
from data_pipelines.hdf5_index import ImageReader, build_index
from data_pipelines.image_dataset import read_images
from modeling.preprocessing import load_image
from ray_jobs.job import connect_ray

BATCH = 128
LOADER_WORKERS = 2


class TileDataset:
    """A torch map-style dataset; `by_range` reads byte ranges, else h5py by key as most published loaders do."""

    def __init__(self, path: str, rows: ImageRows, size: int, recipe: str, by_range: bool):
        self.path, self.rows, self.size, self.recipe, self.by_range = path, rows, size, recipe, by_range
        self.reader = self.file = self.augment = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if self.augment is None:
            self.augment = build_augmentation(AugmentationConfig(recipe=self.recipe), self.size, index)
        image_id = str(self.rows.ids[index])
        if self.by_range:
            self.reader = self.reader or ImageReader(self.path)
            data = self.reader.read(image_id, int(self.rows.offset[index]), int(self.rows.size[index]))
        else:
            self.file = self.file or h5py.File(self.path, "r")
            data = self.file[image_id][()]
        return self.augment(load_image(bytes(data), self.size)), int(self.rows.label[index])


def through_ray_data(path: str, rows: ImageRows, size: int, recipe: str, seed: int) -> Iterator[int]:
    order = np.random.default_rng(seed).permutation(len(rows))
    decode = DecodeRecipe(size, AugmentationConfig(recipe=recipe), seed)
    dataset = read_images(LesionImageDatasource(path, rows, decode, order=lambda: (0, order)))
    for batch in dataset.iter_torch_batches(batch_size=BATCH, prefetch_batches=2):
        yield len(batch["label"])


def through_loader(path: str, rows: ImageRows, size: int, recipe: str, seed: int, by_range: bool) -> Iterator[int]:
    import torch

    dataset = TileDataset(path, rows, size, recipe, by_range)
    generator = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=LOADER_WORKERS, generator=generator, prefetch_factor=4
    )
    for _, labels in loader:
        yield len(labels)


def inline(path: str, rows: ImageRows, size: int, recipe: str, seed: int) -> Iterator[int]:
    dataset = TileDataset(path, rows, size, recipe, by_range=True)
    order = np.random.default_rng(seed).permutation(len(rows))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        np.stack([dataset[int(index)][0] for index in part])
        yield len(part)


def rate(batches: Iterator[int]) -> float:
    started = time.monotonic()
    return sum(batches) / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="ISIC-layout HDF5 file")
    parser.add_argument("--rows", type=int, default=20_000, help="rows a round; a smaller file is read repeatedly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=128)
    arguments = parser.parse_args()

    started = time.monotonic()
    index = build_index(arguments.images)
    index_seconds = time.monotonic() - started
    positions = np.arange(arguments.rows) % len(index.ids)
    rows = ImageRows(index.ids, index.offset, index.size, np.zeros(len(index.ids), np.int64)).take(positions)
    connect_ray()
    result: dict[str, object] = {"rows": arguments.rows, "rounds": arguments.rounds, "size": arguments.size}
    for recipe in ("light", "full"):
        common = (arguments.images, rows, arguments.size, recipe)
        variants: dict[str, Callable[[int], Iterator[int]]] = {
            "ray_data_rows_s": lambda seed, c=common: through_ray_data(*c, seed),
            "dataloader_h5py_rows_s": lambda seed, c=common: through_loader(*c, seed, by_range=False),
            "dataloader_pread_rows_s": lambda seed, c=common: through_loader(*c, seed, by_range=True),
            "inline_rows_s": lambda seed, c=common: inline(*c, seed),
        }
        measured: dict[str, list[float]] = {name: [] for name in variants}
        for round_number in range(arguments.rounds):
            for name, variant in variants.items():
                measured[name].append(rate(variant(round_number)))
                print(
                    f"{recipe} round {round_number + 1} {name}: {measured[name][-1]:.0f}", file=sys.stderr, flush=True
                )
        result[recipe] = {name: round(statistics.median(values), 1) for name, values in measured.items()}
    result[f"index_s_{len(index.ids)}"] = round(index_seconds, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
