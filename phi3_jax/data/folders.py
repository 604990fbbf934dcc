"""Finds the files of rows in a folder, and the split that each belongs to."""

import re
from collections.abc import Iterable
from pathlib import Path

from phi3_jax.data.arrow_rows import is_saved
from phi3_jax.data.reading import format_of
from phi3_jax.errors import UserError

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?")
"""The stem of one of the files that `datasets` writes for a split: train-00000-of-00003."""

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The split of a file whose stem is this word, or begins with it and a hyphen, underscore or full stop."""


def files_of(path: Path, *, split: str, file_format: str | None = None) -> list[Path]:
    """Returns the files of a folder, sorted by name; a file, or a folder of `save_to_disk`, is itself.

    Hidden files, files of unknown formats and folders are left out. If names of files begin with a split, as
    in train-00000-of-00003.parquet or test.csv, only those of `split` are returned.

    Args:
        split: "train", "validation" or "test".
        file_format: returns the files of this format only; default: all must have the same one.

    Raises:
        UserError: there are no such files, they have several formats, the name of one has no split while
            that of another has, or a part of the split is missing.
    """
    if not path.is_dir() or is_saved(path):
        return [path]
    formats = {
        each: found
        for each in sorted(path.iterdir())
        if not each.name.startswith(".") and each.is_file() and (found := format_of(each)) is not None
    }
    kept = [each for each, found in formats.items() if file_format in (None, found)]
    if not kept:
        kind = "a known format" if file_format is None else f"the format {file_format}"
        raise UserError(
            f"no data at {path}: none of the files in this folder has the suffix of {kind}, and save_to_disk "
            "of datasets did not write it"
        )
    examples = {formats[each]: each.name for each in reversed(kept)}
    if len(examples) > 1:
        raise UserError(
            f"{path} has files of several formats, {' and '.join(sorted(examples.values()))}; give "
            f"file_format, one of {', '.join(sorted(examples))}, or name the files"
        )
    return _of_split(path, kept, split)


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    splits = {each: _split_of(each) for each in files}
    named = {each: found for each, found in splits.items() if found is not None}
    if not named:
        return files
    if without := [each.name for each, found in splits.items() if found is None]:
        raise UserError(
            f"{folder}: the name of {without[0]} has no split, and that of {next(iter(named)).name} has; "
            "name the files"
        )
    kept = [each for each, found in named.items() if found == split]
    if not kept:
        others = ", ".join(sorted(set(named.values())))
        raise UserError(f"{folder} has files of the splits {others}, and none of {split}; name the files")
    _check_parts(folder, kept)
    return kept


def _split_of(path: Path) -> str | None:
    stem = path.name.removesuffix(".gz").rpartition(".")[0]
    if match := _SHARD.fullmatch(stem):
        return _SPLITS.get(match["split"], match["split"])
    return _SPLITS.get(re.split(r"[-_.]", stem.lower(), maxsplit=1)[0])


def _check_parts(folder: Path, files: Iterable[Path]) -> None:
    """Checks that all files are there of a split of which one says how many there are."""
    parts: dict[tuple[str, int], set[int]] = {}
    for each in files:
        if match := _SHARD.fullmatch(each.name.removesuffix(".gz").rpartition(".")[0]):
            parts.setdefault((match["split"], int(match["count"])), set()).add(int(match["number"]))
    for (split, count), numbers in parts.items():
        missing = next((number for number in range(count) if number not in numbers), None)
        if missing is not None:
            raise UserError(f"{folder} lacks the file {split}-{missing:05}-of-{count:05}")
