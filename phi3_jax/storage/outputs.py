"""Files and directories to write, also to stores, where they appear when they are complete."""

import glob
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from phi3_jax.runs import exchange, files
from phi3_jax.runs.cache_folder import cache_folder
from phi3_jax.storage.objects import IN_FLIGHT
from phi3_jax.storage.targets import Target, local_target
from phi3_jax.storage.urls import StorageError, clear_errors, find_entry, list_entries, split_url, store_of

TRIAL = ".phi3-jax-trial"
"""The name of an empty file by which it is seen whether a store can be written."""


@contextmanager
def replacing(target: Target) -> Iterator[Path]:
    """Yields a temporary path, whose file gets the name of `target` when the block ends without an error.

    A store is tried before the block, so that its work is not done in vain.

    Raises:
        StorageError: the store cannot be written.
        OSError: as `phi3_jax.runs.files.replacing`.
    """
    if (path := local_target(target)) is not None:
        with files.replacing(path) as work:
            yield work
        return
    url = os.fspath(target)
    check_store_writable(url.rstrip("/").rpartition("/")[0])
    with temporary_folder() as folder:
        work = folder / "file"
        yield work
        put([work], [url])


def write_text(target: Target, text: str) -> None:
    """Writes a file of text as `replacing` does; bytes of file names that are not UTF-8 are escaped."""
    with replacing(target) as work:
        work.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_bytes(url: str, content: bytes) -> None:
    """Writes a file of a store, which appears whole.

    Raises:
        StorageError: the store cannot be written.
    """
    with clear_errors(url):
        store_of(url).pipe_file(split_url(url)[1], content)


@contextmanager
def exchanging(target: Target, *, config: str, replaced: re.Pattern[str]) -> Iterator[Path]:
    """Yields a temporary directory, whose files go to `target` when the block ends without an error.

    Of a local target see `phi3_jax.runs.exchange.exchanging`. A store has no rename: there, `config` leaves
    first, then the files whose names match `replaced` and are not among the new ones; `config` arrives last.
    After a kill in between there is none, so that no reader takes a mixture, and the same command mends it.

    Raises:
        StorageError: the store cannot be written; it is tried before the block.
        CheckpointError: as `phi3_jax.runs.exchange.exchanging`.
    """
    if (path := local_target(target)) is not None:
        with exchange.exchanging(path, config=config, replaced=replaced) as work:
            yield work
        return
    url = os.fspath(target).rstrip("/")
    check_store_writable(url)
    with temporary_folder() as folder:
        yield folder
        new = sorted(each for each in folder.iterdir() if each.is_file())
        names = {each.name for each in new}
        old = [entry.name for entry in list_entries(url)]
        _remove(url, [name for name in old if name == config])
        _remove(url, [name for name in old if name not in names and replaced.fullmatch(name)])
        for last in (False, True):
            batch = [each for each in new if (each.name == config) == last]
            put(batch, [f"{url}/{each.name}" for each in batch])


def check_store_writable(folder: str) -> None:
    """Checks that files can be written in a folder of a store, by writing one and deleting it.

    Raises:
        StorageError: they cannot.
    """
    url = f"{folder}/{TRIAL}"
    store = store_of(url)
    path = split_url(url)[1]
    try:
        with clear_errors(folder):
            store.pipe_file(path, b"")
            store.rm_file(path)
    except FileNotFoundError as error:  # of a bucket
        raise StorageError(f"{folder}: there is no such bucket") from error


def put(paths: Sequence[Path], urls: Sequence[str]) -> None:
    """Writes local files to a store, several at a time; each appears whole.

    Raises:
        StorageError: the store cannot be written, or has not all that was written.
    """

    def put_one(path: Path, url: str) -> None:
        with clear_errors(url):
            store_of(url).put_file(str(path), split_url(url)[1])
        entry = find_entry(url)
        if entry is None or entry.size != path.stat().st_size:
            raise StorageError(f"{url}: the store does not have all that was written; try again")

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(put_one, paths, urls))


def _remove(url: str, names: Sequence[str]) -> None:
    store = store_of(url)
    for name in names:
        with clear_errors(f"{url}/{name}"):
            store.rm_file(f"{split_url(url)[1]}/{name}")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a folder in the cache folder, which has room for models; it is deleted at the end.

    Those that killed processes of this machine left are deleted first.
    """
    import psutil  # local outputs do without it

    place, machine = cache_folder() / "outputs", platform.node()
    place.mkdir(parents=True, exist_ok=True)
    for folder in place.glob(f"{glob.escape(machine)}-*-*"):
        process = folder.name.removeprefix(f"{machine}-").partition("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
    prefix = f"{machine}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as made:
        yield Path(made)
