"""A Ray Data source over ISIC-layout HDF5 files: reads byte ranges, decodes, resizes and augments in the read task.

Decoding inside the read task and yielding Arrow tensor blocks streams 2.4 times faster than read -> map_batches,
which runs as two operators and copies every picture between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.data.extensions import ArrowTensorArray

from data_pipelines.augmentation import AugmentationConfig, build_augmentation
from data_pipelines.image_reader import ImageReader, JoinedFiles
from modeling.preprocessing import UndecodableImageError, decode_image, image_quality, resize

# Blocks of 512 pictures at 128 px; larger pictures get fewer, so that a block stays the same size in memory.
BLOCK_BYTES = 24 * 2**20
MAX_BLOCK_ROWS = 512
BLOCKS_PER_TASK = 8
# A task takes at most this share of what is left, so that the last ones are small and end together.
SHARE_OF_REST = 3


@dataclass(frozen=True)
class ImageRows:
    """Which pictures to read: ids str (N,), offset int64 (N,), size int64 (N,), label int64 (N,); -1 = no label."""

    ids: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: np.ndarray) -> ImageRows:
        return ImageRows(self.ids[index], self.offset[index], self.size[index], self.label[index])


@dataclass(frozen=True)
class DecodeRecipe:
    """What happens to a picture between its bytes and the batch.

    Attributes:
        input_size: side of the network's input in pixels.
        augmentation: None for evaluation.
        seed: with the epoch and the task's position, seeds the augmentation.
        with_quality: adds the image-quality columns, measured before resizing.
        mark_errors: an unreadable picture becomes a black row with its reason in the column `error` instead of
            ending the run.
    """

    input_size: int
    augmentation: AugmentationConfig | None = None
    seed: int = 0
    with_quality: bool = False
    mark_errors: bool = False


@dataclass
class _Block:
    images: np.ndarray
    errors: list[str] = field(default_factory=list)
    quality: list[dict[str, float]] = field(default_factory=list)


class LesionImageDatasource(Datasource):
    """Streams `{row, label, epoch, image}` blocks (plus quality and error columns where the recipe asks).

    `image` is a uint8 tensor column (N, S, S, 3); `row` the int64 position in `rows`.

    Args:
        images_path: HDF5 file, a local path or a URL, or two joined ones.
        rows: the rows that may be read.
        recipe: decode recipe.
        order: called once per execution, returns (epoch, int64 positions to read in this order); None reads all
            rows in file order.
    """

    def __init__(
        self,
        images_path: str | JoinedFiles,
        rows: ImageRows,
        recipe: DecodeRecipe,
        order: Callable[[], tuple[int, np.ndarray]] | None = None,
        rows_per_task: int | None = None,
        rows_per_block: int | None = None,
    ):
        super().__init__()
        self._images_path = images_path
        self._rows = rows
        self._recipe = recipe
        self._order = order
        self._num_rows = len(self._plan()[1])
        self.rows_per_block = rows_per_block or _block_rows(self._num_rows, recipe.input_size)
        self._rows_per_task = rows_per_task or BLOCKS_PER_TASK * self.rows_per_block
        self._starts = _task_starts(self._num_rows, self._rows_per_task, self.rows_per_block)

    @property
    def num_tasks(self) -> int:
        """Read tasks of one execution; pass it as `override_num_blocks`, or Ray splits blocks to make more."""
        return max(1, len(self._starts))

    @property
    def row_bytes(self) -> int:
        """Bytes of a picture as the network takes it."""
        return self._recipe.input_size**2 * 3

    def _plan(self) -> tuple[int, np.ndarray]:
        if self._order is not None:
            return self._order()
        return 0, np.argsort(self._rows.offset, kind="stable")

    def estimate_inmemory_data_size(self) -> int:
        return self._num_rows * self.row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context=None
    ) -> list[ReadTask]:
        epoch, index = self._plan()
        tasks = []
        for start, end in itertools.pairwise([*self._starts, len(index)]):
            part = index[start:end]
            rows = self._rows.take(part)
            read = _ReadRows(self._images_path, rows, part, self._recipe, epoch, start, self.rows_per_block)
            metadata = BlockMetadata(
                num_rows=len(part), size_bytes=len(part) * (self.row_bytes + 24), input_files=None, exec_stats=None
            )
            tasks.append(ReadTask(read, metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def _task_starts(num_rows: int, largest: int, block: int) -> list[int]:
    """First rows of the read tasks, whole blocks but for the last: a function of the number of rows alone, because
    a task's start seeds its augmentation."""
    starts, start = [], 0
    while start < num_rows:
        starts.append(start)
        fair = (num_rows - start) // SHARE_OF_REST
        start += min(largest, max(block, fair - fair % block))
    return starts


def _block_rows(num_rows: int, input_size: int) -> int:
    """A multiple of 32 where it can be, so that batches seldom span two blocks, which would be copied together."""
    full = min(BLOCK_BYTES // (input_size**2 * 3), MAX_BLOCK_ROWS)
    # Small sets get small blocks, or the first batch would wait for the whole epoch to be decoded.
    rows = int(np.clip(num_rows // 8, 64, full)) if full >= 64 else full
    return max(1, rows - rows % 32 if rows >= 32 else rows)


class _ReadRows:
    """The body of one read task; picklable and free of the data source's other rows."""

    __name__ = "read_lesion_images"

    def __init__(
        self,
        path: str | JoinedFiles,
        rows: ImageRows,
        positions: np.ndarray,
        recipe: DecodeRecipe,
        epoch: int,
        start: int,
        block: int,
    ):
        self.path, self.rows, self.positions, self.recipe = path, rows, positions, recipe
        self.epoch, self.start, self.block = epoch, start, block

    def __call__(self) -> Iterator[pa.Table]:
        recipe = self.recipe
        augment = None
        if recipe.augmentation is not None:
            seed = int(np.random.SeedSequence([recipe.seed, self.epoch, self.start]).generate_state(1)[0])
            augment = build_augmentation(recipe.augmentation, recipe.input_size, seed)
        rows = self.rows
        with ImageReader(self.path) as reader:
            windows = reader.windows(rows.ids, rows.offset, rows.size, self.block)
            encoded = (item for first, items in windows for item in enumerate(items, first))
            for start in range(0, len(rows), self.block):
                count = min(self.block, len(rows) - start)
                block = self._decode(itertools.islice(encoded, count), count, augment)
                yield self._table(np.arange(start, start + count), block)

    def _decode(
        self,
        encoded: Iterator[tuple[int, bytes | Exception]],
        count: int,
        augment: Callable[[np.ndarray], np.ndarray] | None,
    ) -> _Block:
        size = self.recipe.input_size
        block = _Block(np.empty((count, size, size, 3), np.uint8))
        for position, (row, data) in enumerate(encoded):
            error = ""
            quality: dict[str, float] = {}
            try:
                if isinstance(data, Exception):
                    raise data
                decoded = decode_image(data)
                if self.recipe.with_quality:
                    quality = image_quality(decoded)
                image = resize(decoded, size)
                block.images[position] = image if augment is None else augment(image)
            except (UndecodableImageError, OSError, KeyError) as failure:
                error = str(failure)
                block.images[position] = 0
                if not self.recipe.mark_errors:
                    advice = "run prepare_dataset again to quarantine it"
                    raise ValueError(f"image {self.rows.ids[row]} of {self.path}: {error}; {advice}") from failure
            block.errors.append(error)
            block.quality.append(quality)
        return block

    def _table(self, index: np.ndarray, block: _Block) -> pa.Table:
        columns: dict[str, pa.Array] = {
            "row": pa.array(self.positions[index].astype(np.int64)),
            "label": pa.array(self.rows.label[index].astype(np.int64)),
            "epoch": pa.array(np.full(len(index), self.epoch, np.int64)),
            "image": ArrowTensorArray.from_numpy(block.images),
        }
        if self.recipe.mark_errors:
            columns["error"] = pa.array(block.errors, pa.string())
        if self.recipe.with_quality:
            for name in ("brightness", "contrast", "blur", "red", "green", "blue"):
                columns[name] = pa.array([row.get(name, float("nan")) for row in block.quality], pa.float64())
        return pa.table(columns)
