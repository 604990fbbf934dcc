"""Threads that make batches of arrays ahead, in the order of a plan; loading can resume from a state."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Int, Shaped

from phi3_jax.data.batches import BatchPlan
from phi3_jax.errors import UserError
from phi3_jax.model.losses import IGNORE_INDEX

PADDING = {"labels": IGNORE_INDEX, "position_ids": 0, "segment_ids": 0}
"""The value of padding positions, except in `input_ids`."""


class BatchSource(Protocol):
    """The rows that batches are made of: `Examples` or `PackedExamples`."""

    @property
    def labels(self) -> Shaped[np.ndarray, "examples ..."] | None:
        """Labels of whole rows, if there are any."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys of `row`."""

    def row(self, index: int) -> dict[str, Int[np.ndarray, "T"]]:
        """Returns the values of a row that have one element per token."""

    def place(self, index: int) -> str:
        """Returns the place of a row, for messages."""


@dataclass(frozen=True)
class Batch:
    """The examples of one batch, padded on the right to its width.

    A row without an example is all padding: its mask is 0 and its labels are -100. Labels of whole examples
    come with `weights`, 1 for an example and 0 for none.
    """

    number: int
    """Counted over all epochs."""
    width: int
    arrays: dict[str, Shaped[np.ndarray, "B ..."]]
    """The model's inputs, for the rows of this process."""
    indices: Int[np.ndarray, "rows"]
    """The examples of the whole batch, -1 for a row without an example."""


class Loader(Iterator[Batch]):
    """Yields batches in order, which its threads make ahead; `load` returns one.

    The threads end after the last batch, after an error, on `close`, and when the loader is garbage.
    """

    def __init__(self, batches: Any, stop: int):
        self._batches = batches
        self._stop = stop

    def __next__(self) -> Batch:
        if self.get_state()["next_index"] >= self._stop:
            self.close()
            raise StopIteration
        try:
            return next(self._batches)
        except BaseException:
            # Grain drops the batch that failed without counting it, so the next ones would be wrong.
            self.close()
            raise

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the next batch, as JSON values in grain's format."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from the state of a loader with the same plan.

        Raises:
            IndexError: the state is after the last batch.
        """
        self._batches.set_state(state)

    def close(self) -> None:
        """Ends each thread after its current batch; the loader yields no more batches."""
        self._batches.close()


def load(
    examples: BatchSource,
    plan: BatchPlan,
    *,
    pad_token_id: int,
    start: int = 0,
    stop: int | None = None,
    local_rows: Int[np.ndarray, "B"] | None = None,
    threads: int = 2,
    prefetch: int = 4,
) -> Loader:
    """Loads the batches of a plan from number `start` up to, but not including, `stop`.

    Args:
        stop: default: never.
        local_rows: the rows of each batch that this process makes; default: all.
        threads: threads that make batches; 0 makes each batch on demand.
        prefetch: number of batches to make ahead.
    """
    stop = sys.maxsize if stop is None else stop
    if not 0 <= start <= stop:
        raise UserError(f"batches from {start} to {stop}; expected 0 <= start <= stop")
    maker = _BatchMaker(examples, plan, pad_token_id, local_rows)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    # The source counts from 0, not from `start`, so that a state means the same batch to every loader.
    batches = iter(grain.MapDataset.source(range(stop)).map(maker).to_iter_dataset(options))
    loader = Loader(batches, stop)
    loader.set_state({"next_index": start})
    return loader


@dataclass(frozen=True)
class _BatchMaker:
    """Makes the batch of a number; threads call it."""

    examples: BatchSource
    plan: BatchPlan
    pad_token_id: int
    local_rows: Int[np.ndarray, "B"] | None

    def __call__(self, number: int) -> Batch:
        width, indices = self.plan.batch(number)
        own = indices if self.local_rows is None else indices[self.local_rows]
        arrays = self._pad_rows(number, width, own)
        if self.examples.labels is not None:
            arrays |= _whole_labels(self.examples.labels, own)
        return Batch(number, width, arrays, indices)

    def _pad_rows(self, number: int, width: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the values per token, padded, and the attention mask."""
        padding = PADDING | {"input_ids": self.pad_token_id}
        shape = len(indices), width
        arrays = {name: np.full(shape, padding[name], np.int32) for name in self.examples.columns}
        mask = arrays["attention_mask"] = np.zeros(shape, np.int32)
        for row, index in enumerate(indices):
            if index < 0:
                continue
            try:
                values = self.examples.row(index)
                length = len(values["input_ids"])
                for name, column in values.items():
                    arrays[name][row, :length] = column
            except Exception as error:
                where = self.examples.place(index)
                raise RuntimeError(
                    f"cannot make row {row} of batch {number} from {where}: {error}"
                ) from error
            mask[row, :length] = 1
        return arrays


def _whole_labels(labels: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
    none = indices < 0
    chosen = labels[indices]
    chosen[none] = 0 if np.issubdtype(labels.dtype, np.floating) else IGNORE_INDEX
    return {"labels": chosen, "weights": (~none).astype(np.float32)}
