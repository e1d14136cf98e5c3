"""What each choice of the streaming pipeline is worth: the pipeline with one of them undone, alternating.

    python -m benchmarks.streaming_changes --images DIR/train-image.hdf5

First microseconds a picture of the augmentation, beside the same recipe as albumentations' own transforms in a chain,
in one process; then rows/s into `iter_torch_batches` with the light recipe, 40,000 shuffled rows a round.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import albumentations as A
import cv2
import numpy as np
import ray.data

from benchmarks.data_streaming import BATCH, WARM_UP_ROWS, indexed, measure, say, through_ray_data
from data_pipelines import image_dataset
from data_pipelines.augmentation import AugmentationConfig, build_augmentation, recipe_of
from data_pipelines.hdf5_datasource import ImageRows
from data_pipelines.image_reader import ImageReader
from modeling.preprocessing import load_image
from ray_jobs.job import connect_ray


class ReadAndDecode:
    """A `map_batches` function over positions: what one writes without a data source."""

    def __init__(self, path: str, rows: ImageRows, size: int, recipe: str, seed: int):
        self.path, self.rows, self.size, self.recipe, self.seed = path, rows, size, recipe, seed

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        augment = build_augmentation(AugmentationConfig(recipe=self.recipe), self.size, int(batch["item"][0]))
        rows = self.rows.take(batch["item"])
        with ImageReader(self.path) as reader:
            data = reader.read_many(rows.ids, rows.offset, rows.size)
        images = np.stack([augment(load_image(item, self.size)) for item in data])
        return {"row": batch["item"], "label": rows.label, "image": images}


def map_batches(path: str, rows: ImageRows, size: int, recipe: str, seed: int) -> Iterator[int]:
    order = np.random.default_rng(seed).permutation(len(rows))
    dataset = ray.data.from_items(order.tolist()).map_batches(
        ReadAndDecode(path, rows, size, recipe, seed), batch_size=BATCH
    )
    for batch in dataset.iter_torch_batches(batch_size=BATCH, prefetch_batches=2):
        yield len(batch["label"])


def by_key(path: str, rows: ImageRows, size: int, recipe: str, seed: int) -> Iterator[int]:
    """Without byte ranges: the reader falls back to h5py."""
    return through_ray_data(path, dataclasses.replace(rows, offset=np.full(len(rows), -1)), size, recipe, seed)


def undone(name: str, value: Callable) -> contextlib.AbstractContextManager:
    return mock.patch.object(image_dataset, name, value)


def gathered_blocks(source: image_dataset.LesionImageDatasource, original=image_dataset.data_context):
    context = original(source)
    context.target_max_block_size = ray.data.context.DEFAULT_TARGET_MAX_BLOCK_SIZE
    return context


VARIANTS: dict[str, tuple[Callable[..., Iterator[int]], Callable[[], contextlib.AbstractContextManager]]] = {
    "as_it_is": (through_ray_data, contextlib.nullcontext),
    "in_any_order": (through_ray_data, lambda: undone("execution_options", ray.data.ExecutionOptions)),
    "blocks_gathered_to_128_mib": (through_ray_data, lambda: undone("data_context", gathered_blocks)),
    "as_many_read_tasks_as_fit": (through_ray_data, lambda: undone("max_read_tasks", lambda: None)),
    "h5py_by_key": (by_key, contextlib.nullcontext),
    "map_batches": (map_batches, contextlib.nullcontext),
}


def library_chain(size: int) -> A.Compose:
    """The full recipe of albumentations' own transforms, which resample up to three times."""
    recipe = recipe_of(AugmentationConfig(), size)
    reflect = {"border_mode": cv2.BORDER_REFLECT_101}
    limit, hole = recipe.distortion, (recipe.hole, recipe.hole)
    return A.Compose(
        [
            A.D4(p=1.0),
            A.RandomBrightnessContrast(recipe.brightness, recipe.contrast, p=recipe.brightness_p),
            A.OneOf(
                [
                    A.GaussianBlur(blur_limit=recipe.blur_sizes, sigma_limit=recipe.blur_sigma),
                    A.GaussNoise(std_range=recipe.noise_std),
                ],
                p=recipe.blur_or_noise_p,
            ),
            A.OneOf(
                [
                    A.OpticalDistortion(distort_limit=limit, **reflect),
                    A.GridDistortion(num_steps=recipe.grid_steps, distort_limit=limit, **reflect),
                ],
                p=recipe.distortion_p,
            ),
            A.HueSaturationValue(recipe.hue, recipe.saturation, recipe.value, p=recipe.colour_p),
            A.Affine(
                translate_percent=(-recipe.shift, recipe.shift),
                scale=(1 - recipe.scale, 1 + recipe.scale),
                rotate=(-recipe.rotate, recipe.rotate),
                **reflect,
                p=recipe.affine_p,
            ),
            A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=hole, hole_width_range=hole, p=recipe.hole_p),
        ],
        seed=0,
    )


def augmentation_times(path: str, rows: ImageRows, size: int, rounds: int) -> dict[str, float]:
    """Microseconds a picture in this process, medians."""
    with ImageReader(path) as reader:
        data = reader.read_many(rows.ids, rows.offset, rows.size)
    images = [load_image(item, size) for item in data]
    chain = library_chain(size)
    ours = build_augmentation(AugmentationConfig(), size, 0)
    light = build_augmentation(AugmentationConfig(recipe="light"), size, 0)
    ways = {
        "decode_and_resize": None,
        "full": ours,
        "full_library_chain": lambda image: chain(image=image),
        "light": light,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            for image, item in zip(images, data, strict=True):
                way(image) if way is not None else load_image(item, size)
            times[name].append((time.perf_counter() - started) / len(images) * 1e6)
    # The first round warms up.
    return {f"{name}_us": round(statistics.median(values[1:]), 1) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="ISIC-layout HDF5 file")
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=128)
    arguments = parser.parse_args()
    everything, _ = indexed(arguments.images)
    rows = everything.take(np.random.default_rng(0).permutation(len(everything))[: arguments.rows])
    few = rows.take(np.arange(min(WARM_UP_ROWS, len(rows))))

    result: dict[str, object] = augmentation_times(arguments.images, few, arguments.size, arguments.rounds)
    say(json.dumps(result))
    connect_ray()
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    firsts: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_number in range(arguments.rounds + 1):
        for name, (stream, change) in VARIANTS.items():
            # Round 0 warms up.
            of = rows if round_number else few
            with change():
                rate, first = measure(stream(arguments.images, of, arguments.size, "light", round_number))
            if round_number:
                rates[name].append(rate)
                firsts[name].append(first)
                say(f"round {round_number} {name}: {rate:.0f} rows/s, first batch after {first:.1f} s")
    for name in VARIANTS:
        result[name] = {
            "rows_s": round(statistics.median(rates[name]), 1),
            "first_batch_s": round(statistics.median(firsts[name]), 2),
        }
    print(json.dumps({"rows": arguments.rows, "rounds": arguments.rounds, **result}))


if __name__ == "__main__":
    main()
