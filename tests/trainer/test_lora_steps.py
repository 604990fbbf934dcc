"""LoRA steps against PEFT and PyTorch: losses, adapters and head."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from answers import stored
from flax import nnx
from marks import slow
from reference import distance, padding_mask, pair, small_config
from safetensors.numpy import load_file, save_file

from phi3_jax import Phi3ForCausalLM
from phi3_jax.lora import add_lora, load_adapters, save_adapters
from phi3_jax.lora.adapters import TARGETS
from phi3_jax.trainer import Trainer

STEPS = 20
EPS = 1e-6
"""Greater than the rounding errors of most gradients, which Adam would otherwise scale to full steps."""

TASKS = {"causal": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
SLOW = {kind: slow(kind) for kind in ("causal", "token")}


def batch_of(kind, step):
    rng = np.random.default_rng(step)
    mask = padding_mask(8, 24, "right")
    mask[:, :2] = 1
    ids = np.where(mask, rng.integers(4, 96, mask.shape), 3)
    labels = {
        "causal": np.where(mask, ids, -100),
        "sequence": rng.integers(0, 3, 8),
        "token": np.where(mask, ids % 3, -100),
    }[kind]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@stored(whole=True)
def train(theirs, task, settings, batches):
    """Trains PEFT's adapters from random ones; returns their config, tensors before and after, and losses.

    It trains in float64: in float32 its result differs from this by up to 2e-4, more than ours does.
    """
    import peft
    import torch

    lora = peft.LoraConfig(r=3, lora_alpha=7, target_modules=list(TARGETS), task_type=task, **settings)
    torch.manual_seed(1)
    model = peft.get_peft_model(theirs.model, lora)

    def tensors():
        return {name: x.detach().clone() for name, x in peft.get_peft_model_state_dict(model).items()}

    settings = lora.to_dict() | {"target_modules": sorted(TARGETS), "base_model_name_or_path": None}
    start, losses = tensors(), []
    model = model.double()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, eps=EPS, weight_decay=0.01)
    for batch in batches:
        loss = model(**{name: torch.tensor(x) for name, x in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {
        "config": json.loads(json.dumps(settings, default=str)),
        "start": start,
        "losses": losses,
        "end": tensors(),
    }


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("variant", ["dora", *(slow(each) for each in (None, "rslora"))])
@pytest.mark.parametrize("kind", [SLOW["causal"], "sequence", SLOW["token"]])
def test_twenty_steps_match_peft(kind, variant, tmp_path):
    config = small_config(num_labels=3, classifier_dropout=0.0)
    base, theirs = pair(kind, config, tmp_path / "base")
    batches = [batch_of(kind, step) for step in range(STEPS)]
    ref = train(theirs, TASKS[kind], {f"use_{variant}": True} if variant else {}, batches)
    start = tmp_path / "start"
    start.mkdir()
    save_file(ref["start"], start / "adapter_model.safetensors")
    (start / "adapter_config.json").write_text(json.dumps(ref["config"]))
    ours = load_adapters(base, tmp_path / "start")
    trainer = Trainer(
        ours,
        optax.adamw(3e-3, eps=EPS, weight_decay=0.01),
        wrt=nnx.Any(nnx.LoRAParam, nnx.PathContains("score")),
    )
    state = trainer.start(ours)
    losses = []
    for batch in batches:
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses, ref["losses"], rtol=1e-5)

    save_adapters(trainer.model(state), tmp_path / "ours", base_model=str(tmp_path / "base"))
    ours_saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours_saved.keys() == ref["end"].keys()
    for name, tensor in ref["end"].items():
        assert distance(ours_saved[name], tensor) <= 1e-4, name
        assert distance(ref["start"][name], tensor) > 1e-2, name  # it was trained at all


def test_a_step_keeps_the_magnitudes_of_dora_in_float32():
    """16 bits would change every output by up to 0.4 % before the first step."""
    model = add_lora(Phi3ForCausalLM(small_config(), dtype="bfloat16"), 2, dora=True)
    trainer = Trainer(model, optax.adamw(1e-3), wrt=nnx.LoRAParam)
    adapter = jax.eval_shape(trainer.computing, trainer.state_shapes).model.layers.layer.mlp.down_proj.adapter
    assert (adapter.a.dtype, adapter.magnitude.dtype) == (jnp.bfloat16, jnp.float32)
