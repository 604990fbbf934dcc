"""Reads rows of Parquet files, folders of `datasets` and data sets of the Hub, with their class names."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from phi3_jax.data.rows import Columns, Place, Row, check_columns
from phi3_jax.errors import UserError
from phi3_jax.runs.text import read_json

_BATCH = 1024


def read_dataset(name: str, split: str) -> Iterator[Row]:
    """Streams the rows of a data set of the Hugging Face hub, with class names instead of class numbers.

    Raises:
        UserError: `datasets` is not installed, or the data set or its split cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"the data set {name!r} needs the library datasets; pip install datasets, or give a file"
        ) from error
    try:
        data = datasets.load_dataset(name, split=split, streaming=True)
        features = {} if data.features is None else data.features.to_dict()
        named = {column: names for column, each in features.items() if (names := _names_of(each))}
        for number, values in enumerate(data, 1):
            yield Row(_with_names(values, named), Place(f"{name}, {split}", number, "row"))
    except Exception as error:  # of the library, of networks and of every format that it reads
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the data set {name!r} cannot be read (split {split!r}): {reason:.300}") from error


def _names_of(feature: Any) -> list[str] | None:
    """Returns the class names in a feature of `datasets`, as it writes it; None if it has no classes."""
    if isinstance(feature, list):  # an old spelling of a list
        feature = {"feature": feature[0]} if feature else {}
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        return feature.get("names")
    # The feature of a list, such as token labels, contains the feature of its items.
    return _names_of(feature.get("feature"))


def _with_names(values: dict[str, Any], named: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    for column in named.keys() & values.keys():
        values[column] = _class_names(values[column], named[column])
    return values


def _class_names(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_class_names(one, names) for one in value]
    # -1 means that the label is not published.
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def read_parquet(path: Path, columns: Columns) -> Iterator[Row]:
    """Yields the rows of a Parquet file.

    Raises:
        UserError: it is broken, or has not the columns.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            check_columns(path, schema.names, columns.required)
            batches = file.iter_batches(_BATCH, columns=columns.of(schema.names))
            yield from _read_batches(path, batches, _schema_names(schema))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file, or is truncated: {error}") from error


def _read_batches(
    path: Path, batches: Iterable[pyarrow.RecordBatch], named: Mapping[str, Sequence[str]]
) -> Iterator[Row]:
    done = 0
    for batch in batches:
        for number, values in enumerate(batch.to_pylist(), done + 1):
            yield Row(_with_names(values, named), Place(str(path), number, "row"))
        done += len(batch)


def _schema_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Returns the class names by column that `datasets` wrote to a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {column: names for column, feature in features.items() if (names := _names_of(feature))}


def is_saved(path: Path) -> bool:
    """Returns whether `save_to_disk` wrote this folder: one split, or several."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def check_saved(path: Path) -> None:
    """Checks that a folder is one split that `save_to_disk` wrote.

    Raises:
        FileNotFoundError: it is not; UserError: it has several splits.
    """
    if (path / "dataset_dict.json").is_file():
        splits = " or ".join(str(path / name) for name in read_json(path / "dataset_dict.json")["splits"])
        raise UserError(f"{path} holds several splits; name one of them: {splits}")
    if not (path / "state.json").is_file():
        raise FileNotFoundError(
            f"no data at {path}: it is a folder, and none that save_to_disk of datasets wrote"
        )


def read_saved(path: Path, columns: Columns) -> Iterator[Row]:
    """Yields the rows of a folder that `save_to_disk` wrote."""
    state = read_json(path / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(f"{path} was saved with indices; call flatten_indices() and save it again")

    def batches() -> Iterator[pyarrow.RecordBatch]:
        for each in state["_data_files"]:
            with pyarrow.OSFile(str(path / each["filename"])) as file:
                for batch in pyarrow.ipc.open_stream(file):
                    names = columns.of(batch.schema.names)
                    for start in range(0, len(batch), _BATCH):
                        yield batch.select(names).slice(start, _BATCH)

    try:
        first = path / state["_data_files"][0]["filename"]
        with pyarrow.OSFile(str(first)) as file:
            schema = pyarrow.ipc.open_stream(file).schema
        check_columns(path, schema.names, columns.required)
        yield from _read_batches(path, batches(), _schema_names(schema))
    except (pyarrow.ArrowException, OSError, LookupError) as error:
        raise UserError(f"{path} is not a data set that save_to_disk wrote, or is broken: {error}") from error
