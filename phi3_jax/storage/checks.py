"""Checks of what a command writes, local or in a store, before it begins."""

import os
from collections.abc import Mapping
from pathlib import Path

from phi3_jax.errors import UserError
from phi3_jax.runs import files
from phi3_jax.storage.fetch import display_name, remote_files
from phi3_jax.storage.targets import Target, local_target


def check_outputs(outputs: Mapping[str, Target | None], inputs: Mapping[str, Path | None]) -> None:
    """Checks that a command would not write over what it reads, nor two of its outputs into one file.

    Args:
        outputs: the paths or URLs of the files to write, by the names of their options; None is skipped.
        inputs: the files and directories that are read, or their copies, by name.

    Raises:
        UserError: as `phi3_jax.runs.files.check_outputs`; of URLs, two are one file.
    """
    paths = {name: None if each is None else local_target(each) for name, each in outputs.items()}
    files.check_outputs(paths, inputs)
    taken = {
        url: text for name, path in inputs.items() if path is not None for url, text in _urls(name, path)
    }
    for name, output in outputs.items():
        if output is None or paths[name] is not None:
            continue
        url = os.fspath(output).rstrip("/")
        if url in taken:
            raise UserError(f"{name} {url} is {taken[url]}; choose another {name}")
        taken[url] = f"also {name}"


def _urls(name: str, path: Path) -> list[tuple[str, str]]:
    """Returns the URLs that a copy is of, and those of a directory's files, with where they occur."""
    url = display_name(path)
    if not path.is_dir():
        return [(url, f"also {name}")]
    names = {each.name for each in path.iterdir()} | remote_files(path).keys()
    return [(url, f"also {name}"), *((f"{url}/{each}", f"in {name}") for each in names)]
