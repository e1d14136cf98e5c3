"""Rows/s of the Ray Data pipeline beside plain torch DataLoaders and an inline loop, on the same pictures and recipe.

    python -m benchmarks.large_sample --out DIR            # 401,059 rows; and --rows 20000 --out DIR20K
    python -m benchmarks.data_streaming --images DIR/train-image.hdf5 --small DIR20K/train-image.hdf5

Every variant delivers shuffled uint8 batches of 128 with labels; the time counts from asking for the first batch to
having the last, worker start-up included. Rounds alternate; the medians are the result, printed as one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import h5py
import numpy as np

from benchmarks.process_memory import PeakMemory
from benchmarks.train_workers import rows_per_second
from data_pipelines.augmentation import AugmentationConfig, build_augmentation
from data_pipelines.hdf5_datasource import DecodeRecipe, ImageRows, LesionImageDatasource
from data_pipelines.hdf5_index import build_index
from data_pipelines.image_dataset import read_images
from data_pipelines.image_reader import ImageReader
from modeling.preprocessing import load_image
from ray_jobs.job import connect_ray

BATCH = 128
LOADER_WORKERS = 2
WARM_UP_ROWS = 8192


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
        dataset,
        batch_size=BATCH,
        shuffle=True,
        num_workers=LOADER_WORKERS,
        generator=generator,
        prefetch_factor=4,
        # The default on Linux, but not in a process that was spawned itself; starting such a worker takes six seconds.
        multiprocessing_context="fork",
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


VARIANTS: dict[str, Callable[..., Iterator[int]]] = {
    "ray_data": through_ray_data,
    "dataloader_h5py": partial(through_loader, by_range=False),
    "dataloader_pread": partial(through_loader, by_range=True),
    "inline": inline,
}


def measure(batches: Iterator[int]) -> tuple[float, float]:
    """Rows/s over all batches, and seconds to the first one."""
    started = time.monotonic()
    rows = next(batches)
    first = time.monotonic() - started
    rows += sum(batches)
    return rows / (time.monotonic() - started), first


class Peers:
    """Runs the variants without Ray in a process of their own: DataLoader workers that are forked from a process with
    Ray's threads in it may deadlock."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve_peers, args=(theirs,))
        self._process.start()

    def measure(self, name: str, *settings: object) -> tuple[float, float]:
        self._pipe.send((name, *settings))
        while not self._pipe.poll(1.0):
            if not self._process.is_alive():
                raise RuntimeError(f"{name} ended with exit code {self._process.exitcode}")
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve_peers(pipe: multiprocessing.connection.Connection) -> None:
    # Imports albumentations here, so that forked DataLoader workers need not: it takes six seconds on two cores.
    build_augmentation(AugmentationConfig(), 128, 0)
    while (request := pipe.recv()) is not None:
        name, *settings = request
        pipe.send(measure(VARIANTS[name](*settings)))


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def compare(recipe: str, path: str, rows: ImageRows, size: int, rounds: int, peers: Peers) -> dict[str, float]:
    """One recipe's medians: <variant>_rows_s and <variant>_first_batch_s, warm and, of the very first use, cold."""
    result: dict[str, float] = {}
    few = rows.take(np.arange(min(WARM_UP_ROWS, len(rows))))

    def run(name: str, of: ImageRows, seed: int) -> tuple[float, float]:
        settings = (path, of, size, recipe, seed)
        return measure(through_ray_data(*settings)) if name == "ray_data" else peers.measure(name, *settings)

    for name in VARIANTS:
        result[f"{name}_first_batch_cold_s"] = round(run(name, few, 0)[1], 2)
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    firsts: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_number in range(rounds):
        for name in VARIANTS:
            rate, first = run(name, rows, round_number)
            rates[name].append(rate)
            firsts[name].append(first)
            say(f"{recipe} round {round_number + 1} {name}: {rate:.0f} rows/s, first batch after {first:.1f} s")
    for name in VARIANTS:
        result[f"{name}_rows_s"] = round(statistics.median(rates[name]), 1)
        result[f"{name}_first_batch_s"] = round(statistics.median(firsts[name]), 2)
    for peer in ("dataloader_h5py", "dataloader_pread"):
        result[f"ratio_to_{peer}"] = round(result["ray_data_rows_s"] / result[f"{peer}_rows_s"], 3)
    return result


def compare_workers(path: str, rows: ImageRows, size: int, rounds: int) -> dict[str, float]:
    """Rows/s that one and two train workers take together from the same pipeline, light recipe."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for round_number in range(rounds):
        for count in rates:
            rates[count].append(rows_per_second(path, rows, size, count, round_number))
            say(f"round {round_number + 1}, {count} train workers: {rates[count][-1]:.0f} rows/s")
    one, two = (statistics.median(values) for values in rates.values())
    return {"one_rows_s": round(one, 1), "two_rows_s": round(two, 1), "ratio": round(two / one, 3)}


def peak_memory(path: str, rows: ImageRows, size: int) -> float:
    """Peak of all processes and the object store while every row streams once, in 10**6 bytes."""
    with PeakMemory() as memory:
        rate, _ = measure(through_ray_data(path, rows, size, "light", 0))
    say(f"{len(rows)} rows once: {rate:.0f} rows/s, peak {memory.peak_mb:.0f} MB")
    return round(memory.peak_mb, 1)


def indexed(path: str) -> tuple[ImageRows, float]:
    """All rows of a file, and the seconds that its index took."""
    started = time.monotonic()
    index = build_index(path)
    seconds = time.monotonic() - started
    return ImageRows(index.ids, index.offset, index.size, np.zeros(len(index.ids), np.int64)), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="ISIC-layout HDF5 file")
    parser.add_argument("--small", help="a smaller one, to compare peak memory with")
    parser.add_argument("--rows", type=int, default=100_000, help="rows a round; a smaller file is read repeatedly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--parts", default="memory,workers,light,full", help="what to measure")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")

    everything, index_seconds = indexed(arguments.images)
    rows = everything.take(np.arange(arguments.rows) % len(everything))
    peers = Peers()
    connect_ray()
    result: dict[str, object] = {"rows": arguments.rows, "rounds": arguments.rounds, "size": arguments.size}
    result[f"index_s_{len(everything) // 1000}k"] = round(index_seconds, 2)
    if "memory" in parts and arguments.small:
        for path in (arguments.small, arguments.images):
            of_file, _ = indexed(path)
            result[f"peak_memory_mb_{len(of_file) // 1000}k"] = peak_memory(path, of_file, arguments.size)
    if "workers" in parts:
        result["train_workers"] = compare_workers(arguments.images, rows, arguments.size, arguments.rounds)
    for recipe in ("light", "full"):
        if recipe in parts:
            result[recipe] = compare(recipe, arguments.images, rows, arguments.size, arguments.rounds, peers)
    peers.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
