"""`phi3-jax finetune --dry-run` finds what would end the run, with its message, and writes nothing."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from filelock import FileLock
from phi3_jax.train import dry_run as module
from phi3_jax.train import recipe as recipe_module
from phi3_jax.train.dry_run import DryRun, dry_run
from phi3_jax.train.finetune import finetune
from phi3_jax.train.settings import Settings
from runs import run, settings_of, write_base, write_rows
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from phi3_jax import Phi3ForSequenceClassification
from phi3_jax.cli.finetune import app
from phi3_jax.costs.chips import topology
from phi3_jax.errors import UserError
from phi3_jax.lora import add_lora, save_adapters
from phi3_jax.parallel.sharding import make_mesh


def check(
    settings: Settings, *, mesh: str | None = None, topology: str | None = None, distributed: bool = False
) -> DryRun:
    return dry_run(settings, mesh=mesh, topology=topology, distributed=distributed, cache_dir=None)


def append(path: Path, **row: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def no_change(folder: Path) -> dict[str, Any]:
    return {}


def bad_row(folder: Path) -> dict[str, Any]:
    append(folder / "train.jsonl", text="", label="a")
    return {}


def bad_test_row(folder: Path) -> dict[str, Any]:
    append(write_rows(folder / "test.jsonl", 3), text=7, label="a")
    return {"test_file": str(folder / "test.jsonl")}


def bad_conversation(folder: Path) -> dict[str, Any]:
    write_rows(folder / "train.jsonl", task="causal-lm")
    append(folder / "train.jsonl", messages=[{"role": "user"}])
    return {"task": "causal-lm", "messages_column": "messages"}


def numbers(folder: Path) -> dict[str, Any]:
    (folder / "train.jsonl").unlink()
    for number in range(20):
        append(folder / "train.jsonl", text="lamp door", label=number)
    return {"problem_type": "regression"}


def one_label(folder: Path) -> dict[str, Any]:
    (folder / "train.jsonl").write_text(json.dumps({"text": "lamp", "label": "a"}) + "\n")
    return {}


def missing_tensor(folder: Path) -> dict[str, Any]:
    base = write_base(folder / "damaged")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, base / "model.safetensors")
    return {"model": str(base)}


def wrong_shape(folder: Path) -> dict[str, Any]:
    base = write_base(folder / "damaged")
    config = json.loads((base / "config.json").read_text())
    config["intermediate_size"] *= 2
    (base / "config.json").write_text(json.dumps(config))
    return {"model": str(base)}


def short_file(folder: Path) -> dict[str, Any]:
    weights = write_base(folder / "damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {"model": str(weights.parent)}


def no_tokenizer(folder: Path) -> dict[str, Any]:
    base = write_base(folder / "damaged")
    for path in base.glob("tokenizer*"):
        path.unlink()
    return {"model": str(base)}


def other_rank(folder: Path) -> dict[str, Any]:
    base = write_base(folder / "base")
    model = Phi3ForSequenceClassification.from_pretrained(base, num_labels=2)
    save_adapters(add_lora(model, 2), folder / "adapter", base_model=str(base))
    return {"model": str(base), "adapter": str(folder / "adapter"), "lora_rank": 4}


def absent_library(folder: Path) -> dict[str, Any]:
    return {"train_file": None, "dataset": "imdb"}


def other_settings(folder: Path) -> dict[str, Any]:
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text(json.dumps({"settings": {"learning_rate": 1.0}, "steps": 6}))
    return {}


def foreign_files(folder: Path) -> dict[str, Any]:
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{}")
    return {}


def file_above(folder: Path) -> dict[str, Any]:
    (folder / "file").touch()
    return {"output_dir": folder / "file" / "run"}


class Catch(NamedTuple):
    """A mistake, and what the message says of it."""

    make: Callable[[Path], dict[str, Any]]
    message: str
    settings: dict[str, Any] = {}  # noqa: RUF012  # it is not changed
    mesh: str | None = None


CATCHES = {
    "bad row": Catch(bad_row, r"train\.jsonl, line 49: 'text' is empty"),
    "bad row of the test data": Catch(bad_test_row, r"test\.jsonl, line 4: "),
    "bad conversation": Catch(bad_conversation, r"train\.jsonl, line 49: "),
    "no such column": Catch(no_change, "'headline'", {"text_column": "headline"}),
    "no such file": Catch(no_change, "absent.csv", {"test_file": "absent.csv"}),
    "one label": Catch(one_label, "expected at least two classes"),
    "class weights": Catch(no_change, "class_weights must name each label", {"class_weights": {"a": 1.0}}),
    "labels": Catch(no_change, "at least two classes", {"labels": ["a"]}),
    "metric": Catch(no_change, "rouge", {"metric_for_best_model": "rouge"}),
    "missing tensor": Catch(missing_tensor, r"missing: model\.layers\.0\.mlp\.down_proj\.weight"),
    "wrong shape": Catch(wrong_shape, "has shape"),
    "short file": Catch(short_file, r"model\.safetensors"),
    "no tokenizer": Catch(no_tokenizer, "tokenizer"),
    "quantization": Catch(no_change, "group_size", {"trained": "lora", "quantize": "int4:group_size=40"}),
    "adapter": Catch(other_rank, "lora_rank=4"),
    "targets": Catch(no_change, "q_proj", {"trained": "lora", "lora_targets": ["q_proj"]}),
    "rope": Catch(no_change, "factor", {"rope": "linear:factor=0.5"}),
    "loss": Catch(numbers, "label_smoothing is for classes", {"label_smoothing": 0.1}),
    "batch and mesh": Catch(
        no_change, "train_batch_size=6 does not divide", {"train_batch_size": 6}, "fsdp=8"
    ),
    "model and mesh": Catch(no_change, "num_key_value_heads", {}, "tensor=8"),
    "absent library": Catch(absent_library, "datasets"),
    "other settings": Catch(other_settings, "was started with other options"),
    "foreign files": Catch(foreign_files, "which no run of finetune wrote"),
    "file above": Catch(file_above, "Not a directory"),
}


@pytest.mark.parametrize("name", CATCHES)
def test_finds_what_would_end_the_run_with_its_message(folder, base, monkeypatch, name):
    catch = CATCHES[name]
    monkeypatch.setitem(sys.modules, "datasets", None)
    settings = settings_of(folder, base, **catch.settings | catch.make(folder))
    before = sorted(folder.rglob("*"))
    with pytest.raises((UserError, OSError), match=catch.message) as found:
        check(settings, mesh=catch.mesh)
    assert sorted(folder.rglob("*")) == before
    devices = None if catch.mesh is None else make_mesh(catch.mesh)
    with pytest.raises((UserError, OSError), match=catch.message) as raised:
        finetune(settings, mesh=devices, show=False)
    if name != "file above":  # the system's message has the path that each of them tries
        assert str(found.value) == str(raised.value)


def test_finds_another_process(folder, base):
    (folder / "run").mkdir()
    with (
        FileLock(folder / "run" / ".run.json.lock", is_singleton=False),
        pytest.raises(UserError, match="another process"),
    ):
        check(settings_of(folder, base))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mesh": "fsdp=8", "topology": "v5e:4x4"}, "needs 8 devices and v5e:4x4 has 16"),
        ({"mesh": "fsdp=4", "topology": "v5e:3x3"}, "v5e"),
        ({"topology": "h100:8"}, "needs --mesh"),
        ({"distributed": True}, "needs --mesh"),
        ({"mesh": "fsdp=4,model=2"}, "is not a mesh axis"),
    ],
)
def test_finds_a_mesh_that_does_not_fit_the_chips(folder, base, given, message):
    with pytest.raises(UserError, match=message):
        check(settings_of(folder, base), **given)


def test_finds_that_memory_does_not_suffice(folder, base, monkeypatch):
    small = topology("h100")
    monkeypatch.setattr(
        module, "topology_named", lambda name: replace(small, chip=replace(small.chip, hbm_bytes=10_000))
    )
    with pytest.raises(UserError, match=r"a step of 8 x 40 tokens needs .* GiB of each chip of h100:1, mesh"):
        check(settings_of(folder, base), topology="h100")


def test_warns_of_an_axis_whose_size_is_not_known(folder, base, caplog):
    with caplog.at_level(logging.WARNING):
        check(settings_of(folder, base), mesh="fsdp=-1")
    assert "give --topology" in caplog.text


def test_neither_reads_parameters_nor_writes(folder, base, monkeypatch):
    monkeypatch.setattr(recipe_module, "load_model", None)
    before = sorted(folder.rglob("*"))
    arrays = {id(array) for array in jax.live_arrays()}
    result = check(settings_of(folder, base, trained="lora", quantize="int8"), mesh="fsdp=2,tensor=2")
    assert sorted(folder.rglob("*")) == before
    assert sum(array.size for array in jax.live_arrays() if id(array) not in arrays) < 100
    assert result.state == "model, report, log and checkpoints"


def test_says_what_the_run_does(folder, base):
    write_rows(folder / "test.jsonl", 12, start=100)
    settings = settings_of(
        folder, base, test_file=str(folder / "test.jsonl"), max_steps=None, num_train_epochs=0.5, max_length=9
    )
    lines = list(check(settings).lines())
    run(
        folder,
        base,
        **settings.model_dump(include={"test_file", "max_steps", "num_train_epochs", "max_length"}),
    )
    data = json.loads((folder / "run" / "metrics.json").read_text())["data"]
    steps = len(
        [line for line in (folder / "run" / "log.jsonl").read_text().splitlines() if '"train"' in line]
    )
    for split in ("train", "validation", "test"):
        (line,) = [line for line in lines if line.startswith(f"{split}: ")]
        assert line.startswith(f"{split}: {data[f'{split} examples']} rows, ")
        assert "the longest has 9" in line
    assert "labels: 2 (a, b), with a new head" in lines
    (line,) = [line for line in lines if line.startswith("steps: ")]
    assert line == f"steps: 6 an epoch of 8 rows each, {steps} in total, in widths of 16 tokens"
    assert list(check(settings).lines())[-1].endswith("run: the run is finished, and nothing is left to do")


@pytest.mark.slow
def test_plans_the_own_step_for_absent_chips(folder, base):
    pytest.importorskip("libtpu")
    result = check(settings_of(folder, base, train_batch_size=32), mesh="fsdp=16", topology="v5e:4x4")
    assert result.plan is not None
    assert result.plan.compiled
    (line,) = [line for line in result.lines() if line.startswith("v5e:4x4, mesh fsdp=16: ")]
    assert "GiB a chip (by the compiler)" in line


def test_command_prints_the_summary_or_one_line(folder, base):
    options = ["--model", str(base), "--train-file", str(folder / "train.jsonl"), "--dry-run"]
    options += ["--output-dir", str(folder / "run")]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"{folder / 'run'}: model, report, log and checkpoints"
    result = CliRunner().invoke(app, [*options[:-3], "--topology", "v5e:4x4"])
    assert isinstance(result.exception, UserError)
    assert "is for --dry-run" in str(result.exception)
