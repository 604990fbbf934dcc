"""Directories whose files change together: after an error, a kill or a power cut, all are old or all new."""

import errno
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from phi3_jax.errors import CheckpointError
from phi3_jax.runs.files import PARTIAL, REPLACED, check_local, sync

_JOURNAL = "exchange.json"
"""In the directory of files moved away: the names that leave and arrive, until the exchange is done."""

_INSIDE = "exchange"
"""The name of hidden files in a directory that exists already."""

_WAIT_SECONDS = 60.0
"""The time that a reader waits for an exchange by a live process, which takes milliseconds."""


@contextmanager
def exchanging(target: Path, *, config: str, replaced: re.Pattern[str]) -> Iterator[Path]:
    """Yields a temporary directory, whose files move into `target` when the block ends without an error.

    Files of `target` that the new ones do not replace are removed if `replaced` matches their names, so that
    old and new files cannot mix; others stay. After an error `target` is unchanged. After a kill or a power
    cut it is unchanged, new, or in between without a `config`; from there `restore` puts the old files back,
    as the next call does.

    Args:
        target: made if it does not exist.
        config: the file by which a directory is read; the first to leave and the last to arrive.
        replaced: names of files that belong to the old contents.

    Raises:
        UserError: `target` is a URL.
        CheckpointError: the disk is full, the folder cannot be written, or another process is writing it.
    """
    check_local(target)
    exists = target.exists()
    try:
        if exists and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Inside an existing target, which may be another file system, and whose parent may be read-only.
        place, name = (target, _INSIDE) if exists else (target.parent, target.name)
        with _locked(target, place, name, timeout=0):
            _clean(place, name)
            work = _make_hidden(place, name, PARTIAL)
            try:
                yield work
                _sync_all(work)
                if exists:
                    _exchange(work, target, config, replaced)
                else:
                    work.chmod(0o777 & ~_umask())
                    work.rename(target)
                    sync(target.parent)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise _write_error(target, error) from error


def restore(directory: Path) -> None:
    """Puts the old files of `directory` back if a process was killed while it exchanged them.

    Raises:
        CheckpointError: they cannot be put back, or another process is writing the directory.
    """
    if not any(directory.glob(f".{_INSIDE}.*{REPLACED}/{_JOURNAL}")):
        return
    try:
        with _locked(directory, directory, _INSIDE, timeout=_WAIT_SECONDS):
            _clean(directory, _INSIDE)
    except OSError as error:
        raise CheckpointError(
            f"{directory} holds half of a checkpoint, since a process was killed while it wrote it, and the "
            f"files before it cannot be put back: {error.strerror or error}"
        ) from error


def _exchange(work: Path, target: Path, config: str, replaced: re.Pattern[str]) -> None:
    """Moves the files of `work` into `target` and the files that they replace out of it; all or none."""
    new = sorted((path.name for path in work.iterdir()), key=lambda name: name == config)
    old = [path.name for path in target.iterdir() if path.name in new or replaced.fullmatch(path.name)]
    old.sort(key=lambda name: name != config)
    kept = _make_hidden(target, _INSIDE, REPLACED)
    try:
        # In its place by one rename, so that half a journal is none.
        draft = kept / f"{_JOURNAL}{PARTIAL}"
        draft.write_text(json.dumps({"config": config, "new": new, "old": old}), encoding="utf-8")
        sync(draft)
        draft.rename(kept / _JOURNAL)
        sync(kept)
        sync(target)
        for name in old:
            os.replace(target / name, kept / name)
        for name in new:
            os.replace(work / name, target / name)
        sync(kept)
        sync(target)
        (kept / _JOURNAL).unlink()  # from here on the new files count
    except BaseException as error:
        try:
            _put_back(target, kept)
        except OSError as second:
            raise CheckpointError(
                f"{target} cannot be written ({error}), and its old files cannot be put back ({second}); "
                f"they are in {kept}, and the next command that opens {target} tries again"
            ) from error
        raise
    try:
        sync(kept)
    except OSError as error:  # the old files stay beside the new: after a power cut the journal may be back
        raise CheckpointError(
            f"{target} has its new files, but the disk does not confirm that it keeps them: "
            f"{error.strerror or error}"
        ) from error
    shutil.rmtree(kept, ignore_errors=True)


def _clean(directory: Path, name: str) -> None:
    """Undoes what killed processes began, and deletes their hidden directories."""
    hidden = f".{glob.escape(name)}.????????"  # as `_make_hidden` names them
    _remove(directory.glob(f"{hidden}{PARTIAL}/"))
    for kept in directory.glob(f"{hidden}{REPLACED}/"):
        _put_back(directory, kept)


def _put_back(target: Path, kept: Path) -> None:
    """Undoes an unfinished exchange, wherever it ended, and deletes `kept`."""
    journal = kept / _JOURNAL
    if journal.exists():
        names = json.loads(journal.read_bytes())
        config, new, old = names["config"], names["new"], names["old"]
        away = {name for name in old if os.path.lexists(kept / name)}
        # What arrived is deleted before anything returns: a new config never sees old weights.
        arrived = [name for name in new if name in away or name not in old]
        _remove(target / name for name in sorted(arrived, key=lambda name: name != config))
        for name in sorted(away, key=lambda name: name == config):
            os.replace(kept / name, target / name)
        sync(target)
        sync(kept)
        journal.unlink()
        sync(kept)
    shutil.rmtree(kept, ignore_errors=True)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sync_all(directory: Path) -> None:
    """Waits until the files of a directory are on the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


@contextmanager
def _locked(target: Path, place: Path, name: str, timeout: float) -> Iterator[None]:
    """Keeps other processes from writing `target`; the system frees the lock of a killed one."""
    path = place / f".{name}.phi3-jax-lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        if not path.exists():  # the library takes some errors of file systems for a lock of others
            raise OSError(errno.EACCES, "no file can be made in it") from None
        raise CheckpointError(f"another process is writing {target}; try again when it has ended") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: who waits for it sees that it is gone
        lock.release()


def _make_hidden(directory: Path, name: str, ending: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=ending, dir=directory))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_error(target: Path, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "there is no space left on the disk" if full else str(error.strerror or error)
    return CheckpointError(f"{target} cannot be written: {reason}; nothing was changed")
