"""Runs that are resumed on other devices: the same state to the last bit, and the same examples."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from phi3_jax.train import finetune as module
from phi3_jax.train.finetune import InterruptedRunError, finetune
from runs import interrupted_after, losses, settings_of, write_base, write_rows

from phi3_jax.parallel.sharding import make_mesh, parse_mesh

OPTIONS = {"max_steps": 8, "eval_steps": 4, "train_batch_size": 16, "max_buckets": 2}
"""An epoch has five steps of two widths."""

PAIRS = [
    ("fsdp=8", "fsdp=4"),
    ("data=2,fsdp=4", "fsdp=8"),
    ("fsdp=2,tensor=2", "data=4"),
    (None, "fsdp=2,tensor=2"),
    ("data=4,tensor=2", None),
    ("fsdp=4", "fsdp=4"),
]


def train(folder, base, mesh: str | None, **changes: Any):
    devices = None
    if mesh is not None:
        count = math.prod(parse_mesh(mesh).values())
        devices = make_mesh(mesh, jax.devices()[:count])
    return finetune(settings_of(folder, base, **OPTIONS | changes), mesh=devices, show=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    return write_base(folder, num_attention_heads=8, num_key_value_heads=4, head_dim=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 88)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, data):
    """Returns the losses of a run that one device does from start to end."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, base, None, train_file=str(data))
    return losses(folder)


def gathered(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_resumes_on_other_devices(tmp_path, base, data, whole, monkeypatch, first, second):
    saved, restored = [], []
    save, open_run = module.FinetuneRun._save, module.FinetuneRun.open

    def noted_save(self, *arguments, **options):
        saved.append(gathered(self._trainer.to_save(self._state)))
        save(self, *arguments, **options)

    def noted_open(self, *arguments):
        open_run(self, *arguments)
        restored.append((self.step, gathered(self._trainer.to_save(self._state))))

    with monkeypatch.context() as patch:
        interrupted_after(patch, 3)
        patch.setattr(module.FinetuneRun, "_save", noted_save)
        with pytest.raises(InterruptedRunError, match="after step 3, which is saved"):
            train(tmp_path, base, first, train_file=str(data))
    with monkeypatch.context() as patch:
        patch.setattr(module.FinetuneRun, "open", noted_open)
        train(tmp_path, base, second, train_file=str(data))
    ((step, state),) = restored
    assert step == 3
    assert len(state) == len(saved[-1]) > 20
    for mine, theirs in zip(state, saved[-1], strict=True):
        np.testing.assert_array_equal(mine, theirs, strict=True)
    steps, ours = zip(*losses(tmp_path), strict=True)
    assert steps == (1, 2, 3, 4, 5, 6, 7, 8)
    np.testing.assert_allclose(ours, [loss for _, loss in whole], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("fsdp=4", "fsdp=8"), ("fsdp=8", "fsdp=4")])
def test_steps_keep_their_examples_where_the_devices_would_choose_others(
    tmp_path, base, data, monkeypatch, first, second
):
    """With eight rows a step, four devices take two batches of different widths, and eight take one."""
    given = {"train_file": str(data), "train_batch_size": 8}
    train(tmp_path, base, first, output_dir=tmp_path / "whole" / "run", **given)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 3)
        with pytest.raises(InterruptedRunError):
            train(tmp_path, base, first, **given)
    train(tmp_path, base, second, **given)
    ours, expected = (np.asarray(losses(each)) for each in (tmp_path, tmp_path / "whole"))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    other = tmp_path / "other"
    train(tmp_path, base, second, output_dir=other / "run", **given)
    assert not np.allclose(losses(other), expected, rtol=1e-3)


@pytest.mark.slow
def test_on_the_same_mesh_the_resumed_run_is_the_same_to_the_last_bit(tmp_path, base, data, monkeypatch):
    given = {"train_file": str(data), "save_steps": 3}
    train(tmp_path, base, "data=2,fsdp=4", output_dir=tmp_path / "whole" / "run", **given)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 6)
        with pytest.raises(InterruptedRunError):
            train(tmp_path, base, "data=2,fsdp=4", **given)
    train(tmp_path, base, "data=2,fsdp=4", **given)
    assert losses(tmp_path) == losses(tmp_path / "whole")
    weights = [where / "run" / "model.safetensors" for where in (tmp_path, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
