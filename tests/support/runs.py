"""Small fine-tuning runs: a tiny base model and rows that it can learn."""

import json
import os
import signal
from pathlib import Path

from phi3_jax.train import finetune as module
from phi3_jax.train.finetune import finetune
from phi3_jax.train.settings import Settings
from small_checkpoint import write_checkpoint

WORDS = ("lamp", "door", "song", "rain", "clock", "mail")


def write_base(folder: Path, **changes) -> Path:
    folder.mkdir()
    write_checkpoint(folder, initializer_range=0.1, pad_token_id=0, **changes)
    return folder


def write_rows(path: Path, count: int = 48, task: str = "sequence-classification", start: int = 0) -> Path:
    """Writes texts of one to seven words; the first word decides the label."""
    lines = []
    for number in range(start, start + count):
        words = [WORDS[(number * 7 + index * index) % 6] for index in range(1 + number % 7)]
        if task == "sequence-classification":
            row = {"text": " ".join(words), "label": "ab"[WORDS.index(words[0]) % 2]}
        elif task == "token-classification":
            row = {"words": words, "labels": ["B-thing" if "o" in word else "O" for word in words]}
        else:
            turns = [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": words[0]}]
            row = {"messages": turns}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def settings_of(folder: Path, base: Path, **changes) -> Settings:
    given = {
        "model": str(base),
        "output_dir": folder / "run",
        "train_file": str(folder / "train.jsonl"),
        "dtype": "float32",
        "train_batch_size": 8,
        "eval_batch_size": 16,
        "max_steps": 6,
        "eval_steps": 3,
        "max_buckets": 1,
        "learning_rate": 3e-3,
    }
    return Settings(**given | changes)


def run(folder: Path, base: Path, **changes):
    return finetune(settings_of(folder, base, **changes), show=False)


def interrupted_after(monkeypatch, step: int) -> None:
    """Sends SIGTERM to the run after this step."""
    take = module.FinetuneRun._take_step

    def take_step(self):
        take(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module.FinetuneRun, "_take_step", take_step)


def losses(folder: Path) -> list[tuple[int, float]]:
    """Returns each step's number and its exact loss."""
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def files(folder: Path) -> set[str]:
    """Returns the names of the files and folders in a run's directory."""
    return {path.name for path in (folder / "run").iterdir()}
