"""Directories that change as a whole, so that nobody finds half a checkpoint."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.runs.files import PARTIAL, REPLACED

CONFIG = "config.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@contextmanager
def atomic_directory(
    target: Path, *, config: str = CONFIG, weights: re.Pattern[str] = _WEIGHTS
) -> Iterator[Path]:
    """Yields a temporary directory, whose files move into `target` when the block ends without an error.

    Old weights in `target` (files whose names match `weights`) are removed, so that old shards cannot mix
    with new ones; other files stay. After an error `target` is unchanged. A killed process leaves a hidden
    directory, but never a `config` beside other weights than its own.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    exists = target.exists()
    try:
        if exists and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Inside an existing target, which may be another file system, and whose parent may be read-only.
        work = _make_hidden(target, PARTIAL, target if exists else target.parent)
    except OSError as error:
        raise _write_error(target, error) from error
    try:
        yield work
        if exists:
            _exchange(work, target, config, weights)
        else:
            work.chmod(0o777 & ~_umask())
            work.rename(target)
    except OSError as error:
        raise _write_error(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _exchange(work: Path, target: Path, config: str, weights: re.Pattern[str]) -> None:
    """Moves the files of `work` into `target` and the files that they replace out of it; all or none.

    `config` is the first to leave and the last to arrive: in between, the directory is not a checkpoint.
    """
    new = sorted((path.name for path in work.iterdir()), key=lambda name: name == config)
    old = [path.name for path in target.iterdir() if path.name in new or weights.fullmatch(path.name)]
    kept = _make_hidden(target, REPLACED, target)
    moved: list[tuple[Path, Path]] = []

    def move(path: Path, to: Path) -> None:
        os.replace(path, to)
        moved.append((path, to))

    try:
        for name in sorted(old, key=lambda name: name != config):
            move(target / name, kept / name)
        for name in new:
            move(work / name, target / name)
    except BaseException as error:
        try:
            for path, to in reversed(moved):
                os.replace(to, path)
        except OSError as second:
            raise CheckpointError(
                f"{target} cannot be written ({error}), and its old files cannot be put back ({second}); "
                f"they are in {kept}"
            ) from error
        kept.rmdir()
        raise
    shutil.rmtree(kept, ignore_errors=True)


def _make_hidden(target: Path, ending: str, directory: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=ending, dir=directory))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_error(target: Path, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "there is no space left on the disk" if full else str(error.strerror or error)
    return CheckpointError(f"{target} cannot be written: {reason}; nothing was changed")
