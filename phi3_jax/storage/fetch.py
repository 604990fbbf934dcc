"""Copies of remote files in the cache folder, which are fetched again when the store has others."""

import glob
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from phi3_jax.runs.cache_folder import cache_folder
from phi3_jax.runs.files import replacing, write_text
from phi3_jax.storage.objects import CHUNK, IN_FLIGHT, RemoteFile
from phi3_jax.storage.targets import local_target
from phi3_jax.storage.urls import (
    ChangedError,
    RemoteEntry,
    find_entry,
    is_url,
    list_entries,
    local_part,
    match_entries,
    split_url,
)

ORIGIN = ".phi3-jax-url.json"
"""The ending of the hidden file beside a copy that has its URL and version; it belongs to the cache only."""

ATTEMPTS = 3
"""How often a file is fetched that changes meanwhile."""


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """Returns the path of a file or folder; those of a URL are copied to the cache folder first.

    A path stays as it is. Of a folder its files are copied, not its folders.

    Raises:
        FileNotFoundError: the URL names nothing.
        StorageError: it cannot be fetched.
    """
    if not is_url(name):
        return Path(name)
    if (path := local_part(name)) is not None:
        return Path(path)
    if (entry := find_entry(name)) is not None:
        return _fetch_entry(entry, cache_dir)
    return fetch_folder(name, cache_dir=cache_dir)


def fetch_folder(
    url: str,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    remote: Callable[[str], bool] = lambda name: False,
    cache_dir: str | Path | None = None,
) -> Path:
    """Returns the folder in the cache with the files of a remote one; those it no longer has are deleted.

    Args:
        wanted: tells by the name which files are copied.
        remote: tells by the name which files stay in the store, where `remote_files` finds them.

    Raises:
        FileNotFoundError: there is no such folder.
        StorageError: it cannot be fetched.
    """
    entries = [entry for entry in list_entries(url) if not entry.name.endswith(ORIGIN)]
    if not entries:
        raise FileNotFoundError(f"there is nothing at {url}")
    folder = cached_path(url, cache_dir)
    if folder.is_file():  # what was a file is a folder now
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    copied = [
        entry
        for entry in entries
        if wanted(entry.name) and not remote(entry.name) and not entry.name.endswith(ORIGIN)
    ]
    kept = {entry.name for entry in copied}
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith(".") and wanted(path.name) and path.name not in kept:
            path.unlink()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(lambda entry: _fetch_entry(entry, cache_dir), copied))
    _write_origin(folder, url, {entry.name: entry for entry in entries if remote(entry.name)})
    return folder


def fetch_files(
    name: str, *, wanted: Callable[[str], bool], cache_dir: str | Path | None = None
) -> list[Path]:
    """Returns the paths of the files that a path or URL names, sorted by name; those of a URL are fetched.

    Args:
        name: a file; a folder, which stands for its files whose names are `wanted`; or a pattern of names
            with *, ?, [...] or **.

    Raises:
        FileNotFoundError: there are none.
        StorageError: they cannot be fetched.
    """
    local = local_target(name)
    if local is not None:
        paths = _local_files(local, wanted)
    else:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            paths = list(pool.map(lambda entry: _fetch_entry(entry, cache_dir), _entries(name, wanted)))
    if not paths:
        raise FileNotFoundError(f"there is no file {name}")
    return paths


def _local_files(path: Path, wanted: Callable[[str], bool]) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(each for each in path.iterdir() if each.is_file() and wanted(each.name))
    return sorted(each for each in map(Path, glob.glob(str(path), recursive=True)) if each.is_file())


def _entries(url: str, wanted: Callable[[str], bool]) -> list[RemoteEntry]:
    if (entry := find_entry(url)) is not None:  # its name may have brackets
        return [entry]
    if glob.has_magic(url):
        return match_entries(url)
    return [entry for entry in list_entries(url) if wanted(entry.name)]


def remote_files(folder: Path) -> dict[str, RemoteFile]:
    """Returns the files that stayed in the store when `folder` was fetched, by name."""
    files = _origin(folder).get("files", {})
    return {name: RemoteFile(RemoteEntry(*entry)) for name, entry in files.items()}


def display_name(path: Path) -> str:
    """Returns the URL that a file or folder was fetched from; of others the absolute path."""
    return str(_origin(path).get("url") or path.resolve())


def input_record(path: Path) -> dict[str, Any]:
    """Returns values that change when an input file does, which a copy has on every machine."""
    status = path.stat()
    entry = _origin(path).get("entry")
    return {
        "input": display_name(path),
        "input_size": status.st_size,
        "input_modified": status.st_mtime_ns if entry is None else RemoteEntry(*entry).version,
    }


def cached_path(url: str, cache_dir: str | Path | None = None) -> Path:
    """Returns the path of the copy of a URL: gs://bucket/model is objects/gs/bucket/model."""
    protocol, path = split_url(url)
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return cache_folder(cache_dir).joinpath("objects", protocol, *parts)


def matches(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Returns a function that tells whether a name matches one of the patterns."""
    return lambda name: any(fnmatch(name, pattern) for pattern in patterns)


def download(file: RemoteFile, path: Path) -> None:
    """Writes a new file with the contents of a remote one.

    Raises:
        StorageError: it cannot be read, or changed meanwhile.
        OSError: the file exists, or cannot be written.
    """
    with path.open("xb") as copy:
        for start in range(0, file.size, CHUNK * IN_FLIGHT):
            block = bytearray(min(CHUNK * IN_FLIGHT, file.size - start))
            file.read([(start, memoryview(block))])
            copy.write(block)
    file.check()


def _fetch_entry(entry: RemoteEntry, cache_dir: str | Path | None) -> Path:
    path = cached_path(entry.url, cache_dir)
    for attempt in range(1, ATTEMPTS + 1):
        if path.is_file() and _origin(path).get("entry") == list(entry):
            return path
        try:
            _copy(entry, path)
            return path
        except ChangedError:
            newer = find_entry(entry.url)
            if newer is None or attempt == ATTEMPTS:
                raise
            entry = newer
    raise AssertionError("unreachable")


def _copy(entry: RemoteEntry, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = _origin_path(path)
    origin.unlink(missing_ok=True)
    with replacing(path) as work:
        download(RemoteFile(entry), work)
    write_text(origin, json.dumps({"url": entry.url, "entry": list(entry)}) + "\n")


def _write_origin(folder: Path, url: str, files: dict[str, RemoteEntry]) -> None:
    content = {"url": url, "files": {name: list(entry) for name, entry in files.items()}}
    write_text(_origin_path(folder), json.dumps(content) + "\n")


def _origin(path: Path) -> dict[str, Any]:
    """Returns what is known of the URL of a copy; empty for what is no copy."""
    file = _origin_path(path)
    if not file.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError:  # of another machine, cut off: the copy is made again
        return {}
    return values


def _origin_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{ORIGIN}")
