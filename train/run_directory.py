"""The directory of a run: `run.json`, which says what the run does, and the files for users."""

import shlex
import sys
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.config.model_config import CONFIG_NAME
from phi3_jax.errors import UserError
from phi3_jax.lora import save_adapters, save_merged
from phi3_jax.lora.adapted import base_name, saved_modules
from phi3_jax.parallel import distributed
from phi3_jax.runs.exchange import restore
from phi3_jax.runs.files import check_local, check_writable, remove_leftovers, write_text
from phi3_jax.runs.json_values import ADAPTER, RUN
from phi3_jax.storage.resume import RunFile, differences

from .checkpoints import remove_checkpoints, saved_steps
from .logs import LOG, read_log
from .recipe import Recipe
from .report import Results, write_report
from .settings import FREE, LENGTH
from .tensorboard import TENSORBOARD

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
    """The directory that a recipe's run writes."""

    def __init__(self, recipe: Recipe):
        settings = recipe.settings
        self.path = settings.output_dir
        check_local(self.path)
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
            self.path / RUN,
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
        self.path.mkdir(parents=True, exist_ok=True)
        self._file.lock()
        restore(self.path)
        if overwrite:
            self._file.remove()
        results = self._check_content()
        if self.started:
            remove_leftovers(self.path)
            return results
        remove_checkpoints(self.path / CHECKPOINTS)
        remove_leftovers(self.path)
        self.begin()
        return None

    def check(self) -> SplitMetrics | None:
        """Checks what `open` does, and that the directory can be written; changes nothing.

        Raises:
            UserError: as `open`.
            OSError: the directory cannot be made or written.
        """
        self._check_inputs()
        check_writable(self.path)
        if not self.path.exists():
            return None
        self._file.check_lock()
        return None if self._recipe.settings.overwrite_output_dir else self._check_content()

    def _check_content(self) -> SplitMetrics | None:
        """Checks that the directory holds this very run or nothing; returns a finished run's results."""
        if self._file.exists():
            results = self._file.read(self._check_state)
            self.started = True
            return results
        found = [name for name in _WRITTEN if (self.path / name).exists()]
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
        """Checks that the run would not write over the model or the adapter that it starts from."""
        base, adapter = self._recipe.paths
        if self.path.exists() and self.path.samefile(base):
            raise UserError(f"{self.path} is the base model itself; choose another --output-dir")
        if adapter is None:
            return
        adapter, own = adapter.resolve(), self.path.resolve()
        written = own, (own / ADAPTER).resolve()
        if adapter in written or own / CHECKPOINTS in adapter.parents:
            raise UserError(f"{self.path} would write over --adapter {adapter}; choose another --output-dir")

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
        saved, steps = saved_steps(self.path / CHECKPOINTS), self._state["steps"]
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
                self.path / ADAPTER,
                base_model=base or str(self._recipe.paths.base),
                modules_to_save=saved,
            )
        save_merged(model, self.path, settings.dtype)
        if not distributed.is_primary():
            return
        self._recipe.tokenizer.save_pretrained(self.path)
        if settings.trained == "lora":
            # Labels and rope, which PEFT's files do not have.
            text = (self.path / CONFIG_NAME).read_text(encoding="utf-8")
            write_text(self.path / ADAPTER / CONFIG_NAME, text)

    def report(self, results: Results) -> None:
        """Writes the report; only process 0 does."""
        if not distributed.is_primary():
            return
        recipe = self._recipe
        labels = recipe.data.all_labels
        write_report(
            self.path,
            task=recipe.kind,
            settings={"command": _command()} | recipe.settings.model_dump(mode="json"),
            data=recipe.data.counts,
            log=read_log(self.path / LOG),
            results=results,
            names=() if labels is None else labels.names,
        )


def _command() -> str:
    """Returns the command that started this process."""
    program = ["phi3-jax"]
    if Path(sys.argv[0]).name == "__main__.py":
        program = ["python", "-m", "phi3_jax.train"]
    return shlex.join([*program, *sys.argv[1:]])
