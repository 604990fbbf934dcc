"""URLs of files: which texts are URLs, what their store says of them, and its errors in plain words."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from phi3_jax.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://(?P<path>.*)", re.DOTALL)
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
"""The optional dependencies of this package, by protocol."""

_LOCAL = ("file", "local")
_VERSIONS = ("generation", "etag", "ETag", "md5Hash", "blob_id", "created", "mtime", "LastModified")
"""What stores call the value that changes with a file; the first that a store has counts."""


class StorageError(UserError):
    """A file in a store that cannot be read or written; the message names its URL and what to do."""


class ChangedError(StorageError):
    """A file in a store that changed while it was read."""


class RemoteEntry(NamedTuple):
    """What a store says of a file."""

    url: str
    size: int
    """Its bytes."""
    version: str
    """A value that changes whenever the file does."""

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]


def is_url(text: object) -> bool:
    """Whether a text is a URL and not a path, such as gs://bucket/model."""
    return isinstance(text, str) and _URL.fullmatch(text) is not None


def local_part(url: str) -> str | None:
    """Returns the path of a file:// URL; None for all others."""
    match = _URL.fullmatch(url)
    return match["path"] if match and match["protocol"].lower() in _LOCAL else None


def split_url(url: str) -> tuple[str, str]:
    """Returns the protocol and the path of a URL, without slashes at the end."""
    match = _URL.fullmatch(url)
    assert match is not None, url
    return match["protocol"].lower(), match["path"].rstrip("/")


def store_of(url: str) -> "AbstractFileSystem":
    """Returns the file system of a URL, which keeps no listings: other machines change its files.

    Raises:
        StorageError: no installed library opens such URLs, or the URL names no file.
    """
    import fsspec  # not needed for local files

    protocol, path = split_url(url)
    if not path:
        raise StorageError(f"{url} names no file; write {protocol}://BUCKET/PATH")
    if protocol not in fsspec.available_protocols():
        raise StorageError(f"{url}: no library opens {protocol}:// URLs; use gs://, s3:// or a path")
    with clear_errors(url):
        try:
            files: AbstractFileSystem = fsspec.filesystem(protocol, use_listings_cache=False)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            advice = f"pip install 'phi3-jax[{extra}]'" if extra else str(error)
            raise StorageError(f"{url}: {protocol}:// URLs need another library: {advice}") from error
        return files


def find_entry(url: str) -> RemoteEntry | None:
    """Returns what a store says of a file; None if there is no file with this URL, but perhaps a folder.

    Raises:
        StorageError: the store cannot be asked.
    """
    files = store_of(url)
    with clear_errors(url):
        try:
            info = files.info(split_url(url)[1])
        except FileNotFoundError:
            return None
    return _entry(url, info) if info["type"] == "file" else None


def list_entries(url: str) -> list[RemoteEntry]:
    """Returns the files of a folder, sorted by name, without those of its folders; empty if there is none.

    Raises:
        StorageError: the store cannot be asked.
    """
    files = store_of(url)
    path = split_url(url)[1]
    with clear_errors(url):
        try:
            infos = files.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    base = url.rstrip("/")
    found = [
        _entry(f"{base}/{name}", info)
        for info in infos
        if info["type"] == "file" and (name := str(info["name"]).rstrip("/").rpartition("/")[2])
    ]
    # A store may list a file as the folder of its own name, and keep empty files as marks of folders.
    return sorted(each for each in found if not path.endswith(f"/{each.name}") or len(found) > 1)


def match_entries(pattern: str) -> list[RemoteEntry]:
    """Returns the files whose URLs match a pattern with *, ?, [...] or **, sorted by name.

    Raises:
        StorageError: the store cannot be asked.
    """
    protocol, path = split_url(pattern)
    with clear_errors(pattern):
        try:
            infos = store_of(pattern).glob(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(
        _entry(f"{protocol}://{name.lstrip('/')}", info)
        for name, info in infos.items()
        if info["type"] == "file"
    )


def _entry(url: str, info: Mapping[str, Any]) -> RemoteEntry:
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    if isinstance(version, datetime):  # which another answer of the same store gives as a number
        version = version.timestamp()
    return RemoteEntry(url, int(info["size"] or 0), str(version).strip('"'))


@contextmanager
def clear_errors(url: str) -> Iterator[None]:
    """Turns the errors of a store's libraries into a `StorageError` of one line.

    Those of files that do not exist stay as they are.
    """
    try:
        yield
    except (UserError, FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:  # each library has its own errors
        raise StorageError(f"{url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Returns what is wrong and what to do about it."""
    text = " ".join(str(error).split())[:200]
    kind = type(error).__name__
    denied = isinstance(error, PermissionError) or re.search(r"\b(401|403)\b|Forbidden|denied", text)
    if denied or "Credentials" in kind or "DefaultCredentials" in text:
        return (
            f"the store refuses access ({text or kind}); check the credentials (for gs:// `gcloud auth "
            "application-default login` or GOOGLE_APPLICATION_CREDENTIALS, for s3:// AWS_PROFILE or "
            "AWS_ACCESS_KEY_ID) and their rights to this path"
        )
    return f"the store gives no answer ({kind}: {text}); try again"
