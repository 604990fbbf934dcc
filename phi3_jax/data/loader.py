"""Batches of arrays made ahead by threads, in the order of a plan; a state tells where to go on."""

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
"""What stands where no token is, but for `input_ids`."""


class Rows(Protocol):
    """What batches are made of: `Examples` or `PackedExamples`."""

    @property
    def labels(self) -> Shaped[np.ndarray, "examples ..."] | None:
        """Of whole rows, where those are what is labelled."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of what `row` gives."""

    def row(self, index: int) -> dict[str, Int[np.ndarray, "T"]]:
        """What a batch holds for every token of a row."""

    def place(self, index: int) -> str:
        """Where a row comes from, for a message."""


@dataclass(frozen=True)
class Batch:
    """One step's examples, padded on the right to the step's width.

    A row without an example is all padding: its mask is 0 throughout and its labels are -100; those of whole
    examples come with `weights`, 1 for an example and 0 for none.
    """

    step: int
    width: int
    arrays: dict[str, Shaped[np.ndarray, "B ..."]]
    """What the model takes, of this process's rows."""
    indices: Int[np.ndarray, "rows"]
    """The examples of the whole batch, -1 for a row without one."""


class Loader(Iterator[Batch]):
    """Batches in order, made ahead while they are waited for; `load` makes one.

    Its threads end with the last batch, an error, `close`, or when nothing refers to the loader any more.
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
            # Grain has let go of the batch that failed without counting it, so nothing right could follow.
            self.close()
            raise

    def get_state(self) -> dict[str, Any]:
        """Where the next batch comes from, of grain's own form; JSON can hold it."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where a loader with the same plan stood.

        Raises:
            IndexError: the state lies behind the last batch.
        """
        self._batches.set_state(state)

    def close(self) -> None:
        """Ends the threads, each after the batch in its hands; no more batches come."""
        self._batches.close()


def load(
    examples: Rows,
    plan: BatchPlan,
    *,
    pad_token_id: int,
    start: int = 0,
    stop: int | None = None,
    local_rows: Int[np.ndarray, "B"] | None = None,
    threads: int = 2,
    prefetch: int = 4,
) -> Loader:
    """The batches of a plan from step `start` up to `stop`, which is not among them.

    Args:
        stop: default: never.
        local_rows: the rows of each batch that this process makes; default: all.
        threads: that make batches; 0: they are made when they are asked for.
        prefetch: batches made ahead.
    """
    stop = sys.maxsize if stop is None else stop
    if not 0 <= start <= stop:
        raise UserError(f"batches from step {start} to {stop}; expected 0 <= start <= stop")
    maker = _Maker(examples, plan, pad_token_id, local_rows)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    # The source counts from 0 whatever `start` is, so that a state means the same step to every loader.
    batches = iter(grain.MapDataset.source(range(stop)).map(maker).to_iter_dataset(options))
    loader = Loader(batches, stop)
    loader.set_state({"next_index": start})
    return loader


@dataclass(frozen=True)
class _Maker:
    """Makes the batch of a step; threads call it."""

    examples: Rows
    plan: BatchPlan
    pad_token_id: int
    local_rows: Int[np.ndarray, "B"] | None

    def __call__(self, step: int) -> Batch:
        width, indices = self.plan.step(step)
        own = indices if self.local_rows is None else indices[self.local_rows]
        arrays = self._tokens(step, width, own)
        if self.examples.labels is not None:
            arrays |= _whole_labels(self.examples.labels, own)
        return Batch(step, width, arrays, indices)

    def _tokens(self, step: int, width: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """What there is for every token, padded, and the mask of tokens."""
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
                raise RuntimeError(f"cannot make row {row} of step {step} from {where}: {error}") from error
            mask[row, :length] = 1
        return arrays


def _whole_labels(labels: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
    none = indices < 0
    chosen = labels[indices]
    chosen[none] = 0 if np.issubdtype(labels.dtype, np.floating) else IGNORE_INDEX
    return {"labels": chosen, "weights": (~none).astype(np.float32)}
