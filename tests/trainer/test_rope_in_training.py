"""Fine-tuning with another rope scaling, and saving it for transformers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import distance, small_config
from reference import run as logits_of
from runs import losses, run, write_base, write_rows

from phi3_jax import Phi3Config, Phi3ForCausalLM
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.trainer import Trainer

SIZES = {"max_position_embeddings": 64, "original_max_position_embeddings": 64}
TASK = {"task": "causal-lm", "messages_column": "messages", "max_steps": 2, "eval_steps": 2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_rows(tmp_path / "train.jsonl", 24, "causal-lm")
    return write_base(tmp_path / "base", **SIZES)


@pytest.mark.live
def test_transformers_loads_the_scaling(tmp_path: Path, base: Path) -> None:
    import torch
    import transformers

    run(tmp_path, base, rope="yarn:factor=4", **TASK)
    ids = np.arange(5, 45)[None]
    ours = Phi3ForCausalLM.from_pretrained(tmp_path / "run", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), use_cache=False).logits
    assert distance(logits_of(ours, input_ids=ids).logits, expected) <= 1e-5


def test_saves_the_scaling(tmp_path: Path, base: Path) -> None:
    run(tmp_path, base, rope="yarn:factor=4", **TASK)
    config = Phi3Config.from_pretrained(tmp_path / "run")
    assert (config.max_position_embeddings, config.original_max_position_embeddings) == (256, 64)
    wanted = parse_rope("yarn:factor=4").apply(Phi3Config.from_pretrained(base))
    for got, expected in zip(
        config.rope_scaling.frequencies(config.rope_base, jnp.array([30])),
        wanted.rope_scaling.frequencies(wanted.rope_base, jnp.array([30])),
        strict=True,
    ):
        np.testing.assert_allclose(np.ravel(got), np.ravel(expected), rtol=1e-6)


SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def gradient_of(rows: slice, width: int, short: list[float], long: list[float]) -> np.ndarray:
    """Returns the gradient of the sum of losses of some rows, of which the first has 16 tokens."""
    lists = {"type": "longrope", "short_factor": short, "long_factor": long}
    lengths = {"max_position_embeddings": 32, "original_max_position_embeddings": 16}
    model = Phi3ForCausalLM(small_config(rope_scaling=lists, **lengths), rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(4, 96, (2, 24)).astype(np.int32)
    mask = np.arange(24) < np.array([[16], [24]])
    labels = np.where(mask, ids, -100)
    batch = {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": labels}
    trainer = Trainer(model, optax.sgd(1.0))  # a step subtracts the gradient of the mean
    after, _ = trainer.step(trainer.start(model), {name: x[rows, :width] for name, x in batch.items()})
    before = trainer.start(model)
    change = jax.tree.map(lambda a, b: np.ravel(a - b), before.trained, after.trained)
    return np.concatenate(jax.tree.leaves(change)) * np.sum(labels[rows, 1:width] != -100)


def test_each_row_of_a_batch_has_the_list_of_its_length() -> None:
    """The gradient of a short and a long row together is the sum of those of each under its own list."""
    together = gradient_of(slice(0, 2), 24, SHORT, LONG)
    long_row = gradient_of(slice(1, 2), 24, LONG, LONG)
    assert distance(together, gradient_of(slice(0, 1), 16, SHORT, SHORT) + long_row) <= 1e-5
    assert distance(together, gradient_of(slice(0, 1), 16, LONG, LONG) + long_row) > 1e-2


@pytest.mark.slow
def test_another_scaling_changes_the_losses_and_cannot_be_resumed(tmp_path: Path, base: Path) -> None:
    run(tmp_path, base, **TASK)
    plain = losses(tmp_path)
    with pytest.raises(ValueError, match="rope: None -> 'linear:factor=4'"):
        run(tmp_path, base, rope="linear:factor=4", **TASK)
    run(tmp_path, base, rope="linear:factor=4", overwrite_output_dir=True, **TASK)
    assert losses(tmp_path) != plain
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["rope_scaling"]["type"] == "longrope"


@pytest.mark.slow
def test_warns_of_a_scaling_that_transformers_lacks(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, base, rope="dynamic:factor=4", **TASK)
    assert "transformers has no dynamic rope for Phi-3" in caplog.text
    assert Phi3Config.from_pretrained(tmp_path / "run").context_length == 256
    with pytest.raises(ValueError, match="rope 'linear': rope type 'linear' needs factor"):
        run(tmp_path, base, rope="linear", overwrite_output_dir=True, **TASK)
