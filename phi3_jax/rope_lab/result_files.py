"""The files that measurements write beside their state, in a directory or a folder of a store."""

import csv
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from phi3_jax.runs import plots
from phi3_jax.storage.outputs import replacing
from phi3_jax.storage.targets import Target


def write_csv(target: Target, rows: Iterable[Sequence[object]]) -> None:
    """Writes rows of values, as a whole."""
    with replacing(target) as work, work.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_arrays(target: Target, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a compressed .npz, as a whole."""
    with replacing(target) as work, work.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def write_figure(target: Target, figure: Figure) -> None:
    """Writes a PNG, as a whole."""
    with replacing(target) as work:
        plots.draw(figure, work)
