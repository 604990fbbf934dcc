"""The directory of a run: `run.json`, which says what the run does, and the files for users."""

import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.config.model_config import CONFIG_NAME
from phi3_jax.errors import UserError
from phi3_jax.lora import save_adapters, save_merged
from phi3_jax.lora.adapted import base_name, saved_modules
from phi3_jax.parallel import distributed
from phi3_jax.runs.bucket_mounts import check_no_bucket_mount
from phi3_jax.runs.exchange import restore
from phi3_jax.runs.files import check_writable, remove_leftovers
from phi3_jax.runs.json_values import ADAPTER, RUN
from phi3_jax.storage.fetch import display_name
from phi3_jax.storage.outputs import check_store_writable, temporary_folder, write_text
from phi3_jax.storage.resume import RunFile, differences
from phi3_jax.storage.targets import (
    Target,
    exists,
    local_target,
    names_in,
    read_bytes,
    remove,
    remove_folder,
    target_in,
)

from .checkpoints import remove_checkpoints, saved_steps
from .logs import LOG, read_log
from .recipe import Recipe
from .report import FIGURES, Results, write_report
from .settings import FREE, LENGTH
from .tensorboard import TENSORBOARD
from .trackers import RUNS
from .uploads import Uploads

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints."""

_WRITTEN = (
    *(CHECKPOINTS, ADAPTER, TENSORBOARD, LOG, "report.md", "metrics.json"),
    *("config.json", "model.safetensors", "tokenizer.json"),
)
"""Files and folders by which a directory is taken for somebody's, if it has no `run.json`."""

ADVICE = "choose another --output-dir, or give --overwrite-output-dir to start over"

SplitMetrics = dict[str, dict[str, float]]
"""Metrics by split and name."""


class RunDirectory:
    """The directory that a recipe's run writes, local or in a store.

    Stores append to no file. The files that grow, and the report, are therefore written to a local folder,
    from where `Uploads` copies them; checkpoints contain the log.
    """

    def __init__(self, recipe: Recipe):
        settings = recipe.settings
        self._local = local_target(settings.output_dir)
        self.path: Target = self._local or os.fspath(settings.output_dir).rstrip("/")
        self.is_local = self._local is not None
        self.checkpoints = target_in(self.path, CHECKPOINTS)
        """The folder of checkpoints, or its URL."""
        self._work: Path | None = self._local
        self._uploads: Uploads | None = None
        self.started = False
        """Whether the directory holds this run, started by an earlier process."""
        self.finished_steps: int | None = None
        """How many steps the run had when it was finished, before it was asked for more."""
        self._recipe = recipe
        self._state: dict[str, Any] = {
            "data": recipe.data.fingerprint(),
            "steps": recipe.total_steps,
            "step_ranges": recipe.plan.step_ranges,
            "base": recipe.config.to_dict(),
            "base_files": fingerprint(recipe.paths.base) if distributed.is_primary() else {},
        } | (recipe.paths.adapter_record if distributed.is_primary() else {})
        self._file = RunFile(
            target_in(self.path, RUN),
            self.path,
            settings.model_dump(mode="json"),
            key="settings",
            free=FREE | LENGTH,
            advice=ADVICE,
        )

    def open(self) -> SplitMetrics | None:
        """Makes the directory, or checks that it holds this very run; returns the results of a finished one.

        A run may get another number of steps; `begin` records it. Until `release`, no other run can open it.

        Raises:
            UserError: the directory holds something else, a run with other settings or data, or one that has
                done more steps or cannot be continued; another run has it.
        """
        overwrite = self._recipe.settings.overwrite_output_dir
        self._check_inputs()
        if self._local is not None:
            self._local.mkdir(parents=True, exist_ok=True)
        self._file.lock()
        if self._local is not None:
            restore(self._local)
        if overwrite:
            self._file.remove()
        results = self._check_content()
        if not self.started:
            remove_checkpoints(self.checkpoints)
        if self._local is not None:
            remove_leftovers(self._local)
        if not self.started:
            self.begin()
        return results

    def check_claim(self) -> None:
        """Checks that no other process has taken a directory in a store over.

        Raises:
            TakenOverError: one has.
            StorageError: the store cannot be read.
        """
        self._file.check_claim()

    def open_work(self, stack: ExitStack, log: str | None) -> Path:
        """Returns the local folder for log and report, of which `stack` closes what copies it to a store.

        Args:
            stack: closes it after what it gets later.
            log: from the last checkpoint; None: the log is the one of the directory.
        """
        if self._work is None:
            name = os.fspath(self.path).rpartition("/")[2]
            self._work = stack.enter_context(temporary_folder()) / name
            self._work.mkdir()
            for file in (LOG, RUNS):
                url = target_in(self.path, file)
                if self.started and exists(url):
                    (self._work / file).write_bytes(read_bytes(url))
            remove_folder(target_in(self.path, TENSORBOARD))  # written again from the log
            self._uploads = stack.enter_context(Uploads(self._work, os.fspath(self.path), self.check_claim))
        if log is not None:
            write_text(self._work / LOG, log)
        return self._work

    def check(self) -> SplitMetrics | None:
        """Checks what `open` does, and that the directory can be written; changes nothing.

        Raises:
            UserError: as `open`.
            OSError: the directory cannot be made or written; `StorageError` in a store.
        """
        self._check_inputs()
        if self._local is None:
            check_store_writable(os.fspath(self.path))
        else:
            check_writable(self._local)
            if not self._local.exists():
                return None
        self._file.check_lock()
        return None if self._recipe.settings.overwrite_output_dir else self._check_content()

    def _check_content(self) -> SplitMetrics | None:
        """Checks that the directory holds this very run or nothing; returns a finished run's results."""
        if self._file.exists():
            results = self._file.read(self._check_state)
            self.started = True
            return results
        there = names_in(self.path)
        found = [name for name in _WRITTEN if name in there]
        if found and not self._recipe.settings.overwrite_output_dir:
            raise UserError(
                f"{self.path} holds {' and '.join(found)}, which no run of finetune wrote; choose another "
                "--output-dir, or give --overwrite-output-dir"
            )
        return None

    def begin(self) -> None:
        """Writes what the run does, and that it is not finished."""
        self._file.write(**self._state)

    def _check_inputs(self) -> None:
        """Checks that the run would not write over what it starts from, nor to where a kill loses data."""
        if self._local is not None:
            check_no_bucket_mount(self._local)
        base, adapter = self._recipe.paths
        if _is_same(self.path, base):
            raise UserError(f"{self.path} is the base model itself; choose another --output-dir")
        if adapter is None:
            return
        inside = self._local is not None and self._local.resolve() / CHECKPOINTS in adapter.resolve().parents
        if inside or _is_same(self.path, adapter) or _is_same(target_in(self.path, ADAPTER), adapter):
            raise UserError(
                f"{self.path} would write over --adapter {display_name(adapter)}; choose another --output-dir"
            )

    def release(self) -> None:
        """Lets other runs open the directory."""
        self._file.release()

    def _check_state(self, before: dict[str, Any]) -> SplitMetrics | None:
        if before.get("data") != self._state["data"]:
            raise self._file.mismatch("the data are not the same")
        known = {"base", "base_files", "adapter", "adapter_files"}
        if changed := differences(before, self._state, free=(before.keys() | self._state.keys()) - known):
            raise self._file.mismatch(*changed)
        if before["steps"] == self._state["steps"]:
            return before.get("finished")
        self._check_steps(before["steps"], "finished" in before)
        return None

    def _check_steps(self, before: int, finished: bool) -> None:
        """Checks that the run can end after another number of steps than `before`.

        Raises:
            UserError: it has done more, or is finished and has no checkpoint to continue from.
        """
        saved, steps = saved_steps(self.checkpoints), self._state["steps"]
        done = before if finished else max(saved, default=0)
        if done > steps:
            raise UserError(
                f"{self.path} has done {done} steps, and cannot end after step {steps}; give more steps, "
                f"{ADVICE}"
            )
        if finished and not saved:
            reason = "keep_checkpoints=False removed them"
            if self._recipe.settings.save_strategy == "no":
                reason = "save_strategy=no writes none"
            raise UserError(
                f"{self.path} is finished after step {before} and has no checkpoint from which it could be "
                f"continued to step {steps} ({reason}). To train its model further as a new run, give it as "
                "--model beside another --output-dir; --overwrite-output-dir starts over"
            )
        if finished:
            self.finished_steps = before

    def finish(self, results: SplitMetrics) -> None:
        """Writes that the run is finished, and its results."""
        self._file.write(**self._state, finished=results)

    def export(self, model: Any) -> None:
        """Writes the model as transformers reads it, with its tokenizer; adapters also by themselves.

        All processes call this.
        """
        settings = self._recipe.settings
        if settings.trained == "lora":
            adapter, base = self._recipe.adapter, settings.model
            if base is None and adapter is not None:
                base = base_name(adapter.fields)
            saved = None if adapter is None else saved_modules(adapter, model)
            save_adapters(
                model,
                target_in(self.path, ADAPTER),
                base_model=base or str(self._recipe.paths.base),
                modules_to_save=saved,
            )
        save_merged(model, self.path, settings.dtype)
        if not distributed.is_primary():
            return
        self._recipe.tokenizer.save_pretrained(self.path)
        if settings.trained == "lora":
            # Labels and rope, which PEFT's files do not have.
            text = read_bytes(target_in(self.path, CONFIG_NAME)).decode()
            write_text(target_in(target_in(self.path, ADAPTER), CONFIG_NAME), text)

    def report(self, results: Results) -> None:
        """Writes the report; only process 0 does.

        Raises:
            StorageError: the store cannot be written.
            TakenOverError: another process writes there.
        """
        if not distributed.is_primary():
            return
        recipe = self._recipe
        labels = recipe.data.all_labels
        assert self._work is not None
        write_report(
            self._work,
            task=recipe.kind,
            settings={"command": _command()} | recipe.settings.model_dump(mode="json"),
            data=recipe.data.counts,
            log=read_log(self._work / LOG),
            results=results,
            names=() if labels is None else labels.names,
        )
        if self._uploads is not None:
            self._uploads.flush()
            for name in FIGURES:
                if not (self._work / name).exists():  # of an earlier report
                    remove(target_in(self.path, name))


def _is_same(target: Target, path: Path) -> bool:
    """Returns whether a target is an existing file or folder, or the URL that this is a copy of."""
    if (local := local_target(target)) is not None:
        return local.exists() and local.samefile(path)
    return os.fspath(target) == display_name(path).rstrip("/")


def _command() -> str:
    """Returns the command that started this process."""
    program = ["phi3-jax"]
    if Path(sys.argv[0]).name == "__main__.py":
        program = ["python", "-m", "phi3_jax.train"]
    return shlex.join([*program, *sys.argv[1:]])
