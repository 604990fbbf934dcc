"""The program around a run, for `phi3-jax finetune` and `python -m phi3_jax.train`."""

import signal
from pathlib import Path

from phi3_jax.parallel.messages import tell
from phi3_jax.parallel.processes import prepare
from phi3_jax.plan.absent import keep_to_the_compiler
from phi3_jax.runs.cache_folder import keep_compiled_programs
from phi3_jax.storage.targets import names_in

from .dry_run import dry_run
from .finetune import InterruptedRunError, finetune
from .settings import Settings
from .tensorboard import TENSORBOARD


def run_settings(settings: Settings, *, mesh: str | None, distributed: bool, cache_dir: Path | None) -> None:
    """Joins the other processes, runs `finetune` and prints its results.

    Raises:
        SystemExit: a signal interrupted the run; its code is 128 + the signal's number.
    """
    devices = prepare(mesh, distributed, preemption=True)
    keep_compiled_programs(cache_dir)
    try:
        results = finetune(settings, mesh=devices, cache_dir=cache_dir)
    except InterruptedRunError as error:
        tell(f"phi3-jax: {error}")
        raise SystemExit(128 + signal.Signals(error.signal)) from None
    for split, metrics in results.items():
        print(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(
        f"{settings.output_dir}: model, tokenizer, report.md, metrics.json, curves.png, log.jsonl"
        + (", tensorboard" if TENSORBOARD in names_in(settings.output_dir) else "")
    )


def check_settings(
    settings: Settings, *, mesh: str | None, topology: str | None, distributed: bool, cache_dir: Path | None
) -> None:
    """Checks a run as `dry_run` does, on the CPU alone, and prints what it would do."""
    keep_to_the_compiler()
    result = dry_run(settings, mesh=mesh, topology=topology, distributed=distributed, cache_dir=cache_dir)
    print("\n".join(result.lines()))
