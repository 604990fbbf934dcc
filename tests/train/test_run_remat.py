"""Tests what a run's backward pass keeps, by its settings and the memory of devices that are absent."""

from typing import Any

import jax
import numpy as np
import pytest
from phi3_jax.train import remat as run_remat
from phi3_jax.train.settings import Settings

from phi3_jax import Phi3Config
from phi3_jax.data.batches import BatchPlan
from phi3_jax.plan.remat import RematChoice

SETTINGS = {"task": "causal-lm", "packing": True, "max_length": 1024, "train_batch_size": 16}


def find(steps: dict[str, Any] | None = None, **settings: Any) -> tuple[str, RematChoice | None]:
    config = Phi3Config.preset("phi-3-mini-4k-instruct")
    lengths, options = np.array([1024, 512]), {"rows": 16, "widths": (512, 1024)} | (steps or {})
    plan = BatchPlan(lengths, shuffle=False, **options)
    return run_remat.find_remat(Settings(**SETTINGS | settings), config, plan, None)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Lets the run see an accelerator of so many GiB; None: of a size that is not known."""

    def attach(gib: int | None, platform: str = "tpu") -> None:
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(run_remat, "memory_bytes", lambda devices: None if gib is None else gib * 2**30)
        monkeypatch.setattr(run_remat, "supported", lambda dtype, head_dim: True)

    return attach


def needed(**options: Any) -> int:
    choice = find(**options)[1]
    assert choice is not None
    return choice.needed_bytes


def test_the_device_decides(accelerator) -> None:  # type: ignore[no-untyped-def]
    assert find() == ("none", None)  # on CPU
    accelerator(None)
    assert find() == ("full", None)
    accelerator(100)
    remat, choice = find()
    assert choice is not None
    assert remat == choice.remat == "attention"
    accelerator(200)
    assert find()[0] == "dots_and_attention"
    assert find(remat="dots") == ("dots", None)
    assert find(task="sequence-classification", packing=False, trained="head") == ("none", None)


def test_the_estimate_is_of_what_the_run_does(accelerator) -> None:  # type: ignore[no-untyped-def]
    accelerator(10)  # so that all are "full"
    whole = needed()
    assert needed(trained="lora") < whole / 2
    assert needed(trained="lora", quantize="int8") < needed(trained="lora", quantize="none")
    parts = needed(trained="lora", gradient_accumulation_steps=4)
    assert parts < needed(trained="lora")
    sums = 4 * 3821079552  # float32 gradients of all parameters
    assert needed(steps={"step_batches": 2}) == whole + sums
    accelerator(10, "gpu")
    assert needed(packing=False) == whole
    assert needed() - whole == 4 * 16 * 32 * 1024**2 * 4  # XLA attends, because cuDNN takes no segments
