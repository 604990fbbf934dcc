"""From a model's name to its path: a local directory, a .gguf file, or a repository on the Hub."""

import errno
import os
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from phi3_jax.checkpoint.source import CheckpointError

# Weights only as safetensors: the pickled formats run code when they are opened.
WANTED_FILES = ("*.json", "*.safetensors", "*tokenizer.model", "*.jinja", "*chat_template*.txt")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKEN = "pass a token that may read it (HF_TOKEN, or `hf auth login`)"
_FILE_SUFFIXES = (".gguf", ".safetensors", ".json", ".bin", ".pth")


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local directory or .gguf file of a model, fetched from the Hub first where the name is `org/name`.

    Cache, endpoint, token and offline mode are huggingface_hub's own (HF_HOME, HF_ENDPOINT, HF_TOKEN,
    HF_HUB_OFFLINE). Raises CheckpointError.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path
    if name and path.exists():
        raise CheckpointError(f"{name} is neither a model's directory nor a .gguf file")
    if not isinstance(name_or_path, str) or name.endswith(_FILE_SUFFIXES) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"{name!r} does not exist; give a directory, a .gguf file, or a model on the Hub as org/name"
        )
    return _fetch(name, revision, token, cache_dir, local_files_only)


def _fetch(
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    what = name if revision is None else f"{name} at revision {revision}"
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=list(WANTED_FILES),
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its conditions on its page on the Hub, then {_TOKEN}"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is no directory here and no repository on the Hub, or a private one: "
            f"check the spelling, or {_TOKEN}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r}; leave it out for the latest") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(_not_here(what, error, local_files_only)) from error
    except HFValidationError as error:
        raise CheckpointError(
            f"{name} is no directory here and no name the Hub could have: {error}"
        ) from error
    except Exception as error:
        # Network errors come from whichever HTTP library this version of huggingface_hub is built on.
        raise CheckpointError(_failed(what, error)) from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{what} holds no config.json: it is not a model in Hugging Face's layout")
    return folder


def _not_here(what: str, error: Exception, local_files_only: bool) -> str:
    get_it = f"on a machine with a network run `hf download {what.split()[0]}` and copy the cache (HF_HOME)"
    cause: BaseException | None = error
    while cause is not None:
        if (status := _status(cause)) is not None:
            return (
                f"{what} is not complete in the cache, and the Hub answered with status {status}; try again"
            )
        cause = cause.__cause__
    if local_files_only or constants.HF_HUB_OFFLINE:
        return f"{what} is not complete in the cache and this run is offline: go online once, or {get_it}"
    return (
        f"{what} is no directory here and not complete in the cache, and the Hub cannot be reached; "
        f"check the network (HF_ENDPOINT, HTTPS_PROXY), or {get_it}"
    )


def _failed(what: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left for {what}; make room, or move the cache with HF_HOME"
    if (status := _status(error)) in (401, 403):
        return f"the Hub refuses {what} (status {status}): the token is wrong, or lacks the right to read it"
    if status is not None:
        return f"the Hub answered with status {status} for {what}; try again"
    return (
        f"{what} could not be fetched ({type(error).__name__}: {error}); run again, what is complete is kept"
    )


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return getattr(response, "status_code", None)
