"""Finds a model by its name: a local directory, a .gguf file, or a repository on the Hub."""

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3_jax.errors import CheckpointError
from phi3_jax.storage.fetch import fetch, fetch_folder, matches
from phi3_jax.storage.urls import is_url, local_part

# Weights only as safetensors: the pickled formats run code when they are opened.
WANTED_FILES = (
    *("*.json", "*.safetensors", "*tokenizer.model", "*.tiktoken", "*.jinja"),
    "*chat_template*.txt",
)

TOKENIZER_FILES = (
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("*.tiktoken", "chat_template.json", "*.jinja"),
)

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which PEFT recognises a directory of adapters."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "config.json")
"""Files of an adapter on the Hub; a config.json says which labels and rope a model has with the adapter."""

HUB_URL = "hf://"
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
    tokenizer_only: bool = False,
) -> Path:
    """Returns the local directory or .gguf file of a model; fetches a model called `org/name` from the Hub.

    `tokenizer_only` fetches only the tokenizer's files. Cache, endpoint, token and offline mode are
    huggingface_hub's own (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched.
    """
    name = os.fspath(name_or_path)
    if is_url(name) and not name.startswith(HUB_URL):
        return _fetch_model(name, tokenizer_only)
    name, revision = _without_protocol(name, revision)
    path = Path(name).expanduser()
    if name and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path
    if name and path.exists():
        raise CheckpointError(f"{name} is neither a model's directory nor a .gguf file")
    if not isinstance(name_or_path, str) or not is_hub_name(name):
        raise CheckpointError(
            f"{name!r} does not exist; give a directory, a .gguf file, or a model on the Hub as org/name"
        )
    folder = _fetch(
        name,
        TOKENIZER_FILES if tokenizer_only else WANTED_FILES,
        revision=revision,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        local_files_only=local_files_only,
    )
    model = _name(name, revision)
    if tokenizer_only and not folder.is_dir():
        raise CheckpointError(f"{model} holds no tokenizer")
    if tokenizer_only:
        return folder
    if (folder / ADAPTER_CONFIG).is_file() and not any(folder.glob("model*.safetensors*")):
        raise CheckpointError(f"{model} holds adapters and no model; give it as the adapter (--adapter)")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{model} holds no config.json: it is not a model in Hugging Face's layout")
    return folder


def _without_protocol(name: str, revision: str | None) -> tuple[str, str | None]:
    """Returns the name and the revision of hf://org/name@revision."""
    if not name.startswith(HUB_URL):
        return name, revision
    repository, _, named = name.removeprefix(HUB_URL).strip("/").partition("@")
    return repository, revision or named or None


def local_model(name_or_path: str | os.PathLike[str]) -> Path:
    """Returns the path of a model: of a URL's the local directory or .gguf file, else as it is.

    Raises:
        CheckpointError, StorageError: the URL names no model, or it cannot be fetched.
    """
    name = os.fspath(name_or_path)
    return resolve(name) if is_url(name) else Path(name)


def _fetch_model(url: str, tokenizer_only: bool = False) -> Path:
    """Returns the local directory or .gguf file of a model in a store; safetensors stay in the store."""
    if url.endswith(".gguf") or local_part(url) is not None:
        return fetch(url)
    files = TOKENIZER_FILES if tokenizer_only else (*WANTED_FILES, ADAPTER_WEIGHTS, "*.gguf")
    try:
        return fetch_folder(
            url,
            wanted=matches(files),
            remote=lambda name: name.endswith(".safetensors") and name != ADAPTER_WEIGHTS,
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"{url} does not exist; give the URL of a model's directory, or of a .gguf file"
        ) from None


def find_file(
    name_or_path: str | os.PathLike[str],
    file: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns the path of a file in a model's directory, which may be absent; fetches only it from the Hub.

    Any other path than a directory is returned as it is.

    Raises:
        CheckpointError: there is no such repository or file on the Hub, or it cannot be fetched.
    """
    name = os.fspath(name_or_path)
    if is_url(name) and not name.startswith(HUB_URL):
        if (local := local_part(name)) is not None:
            name = local
        else:
            return fetch(name if name.endswith(_FILE_SUFFIXES) else f"{name.rstrip('/')}/{file}")
    name, revision = _without_protocol(name, revision)
    path = Path(name).expanduser()
    if path.exists() or not isinstance(name_or_path, str) or not is_hub_name(name):
        return path / file if path.is_dir() else path
    folder = _fetch(
        name,
        (file,),
        revision=revision,
        token=token,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        local_files_only=local_files_only,
    )
    if not (folder / file).is_file():
        raise CheckpointError(f"{_name(name, revision)} holds no {file}")
    return folder / file


def resolve_adapter(name_or_path: str | os.PathLike[str]) -> Path:
    """Returns the local directory of an adapter; fetches one called `owner/name` from the Hub.

    Raises:
        CheckpointError: there is no such directory or repository, or it cannot be fetched.
    """
    name = os.fspath(name_or_path)
    if is_url(name) and not name.startswith(HUB_URL):
        return _fetch_model(name)
    name, revision = _without_protocol(name, None)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.exists() or not isinstance(name_or_path, str) or not is_hub_name(name):
        problem = "is a file" if path.is_file() else "does not exist"
        raise CheckpointError(
            f"the adapter {name!r} {problem}; give a directory that PEFT wrote, or an adapter on the Hub as "
            "owner/name"
        )
    return _fetch(name, ADAPTER_FILES, revision=revision, local_files_only=False)


def is_hub_name(name: str) -> bool:
    """Whether this may be the name of a repository on the Hub, and not of a file."""
    return not name.endswith(_FILE_SUFFIXES) and _HUB_NAME.fullmatch(name) is not None


def _name(model: str, revision: str | None) -> str:
    return model if revision is None else f"{model} at revision {revision}"


def _fetch(
    name: str, files: Sequence[str], *, revision: str | None, local_files_only: bool, **options: Any
) -> Path:
    from huggingface_hub import errors, snapshot_download  # not needed for local models

    model = _name(name, revision)
    options |= {"revision": revision, "local_files_only": local_files_only}
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), **options))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its conditions on its page on the Hub, then {_TOKEN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a local directory nor a public repository on the Hub: check the spelling, "
            f"or {_TOKEN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r}; leave it out for the latest") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(_cache_miss_message(model, error, local_files_only)) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{name} is neither a local directory nor a valid name on the Hub: {error}"
        ) from error
    except Exception as error:
        # Network errors come from whichever HTTP library this version of huggingface_hub is built on.
        raise CheckpointError(_failure_message(model, error)) from error


def _cache_miss_message(model: str, error: Exception, local_files_only: bool) -> str:
    from huggingface_hub import constants

    advice = f"on a machine with a network run `hf download {model.split()[0]}` and copy the cache (HF_HOME)"
    cause: BaseException | None = error
    while cause is not None:
        if (status := _status(cause)) is not None:
            return (
                f"{model} is not complete in the cache, and the Hub answered with status {status}; try again"
            )
        cause = cause.__cause__
    if local_files_only or constants.HF_HUB_OFFLINE:
        return f"{model} is not complete in the cache and this run is offline: go online once, or {advice}"
    return (
        f"{model} is neither a local directory nor complete in the cache, and the Hub cannot be reached; "
        f"check the network (HF_ENDPOINT, HTTPS_PROXY), or {advice}"
    )


def _failure_message(model: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left for {model}; make room, or move the cache with HF_HOME"
    if (status := _status(error)) in (401, 403):
        return f"the Hub refuses {model} (status {status}): the token is wrong, or lacks the right to read it"
    if status is not None:
        return f"the Hub answered with status {status} for {model}; try again"
    return (
        f"{model} could not be fetched ({type(error).__name__}: {error}); run again, complete files are kept"
    )


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status of an error of the Hub."""
    from huggingface_hub.errors import HfHubHTTPError

    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return getattr(response, "status_code", None)
