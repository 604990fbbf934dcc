"""Tests the arguments that cuDNN is given, and that programs lower for GPUs; none runs on one."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    HEADS,
    SCALE,
    assert_close,
    cache_mask,
    dense_attention,
    prefill_mask,
    random_arrays,
)

from phi3_jax.model.kernels import cudnn
from phi3_jax.model.masks import CausalMask


@pytest.mark.usefixtures("cudnn_is_installed")
def test_supports_half_precision_and_narrow_heads() -> None:
    assert cudnn.supported(jnp.bfloat16, 96)
    assert cudnn.supported(jnp.float16, 128)
    assert not cudnn.supported(jnp.float32, 96)
    assert not cudnn.supported(jnp.bfloat16, 160)
    assert not cudnn.supported(jnp.bfloat16, 100)


def test_supports_nothing_if_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", None)
    cudnn._installed.cache_clear()
    assert not cudnn.supported(jnp.bfloat16, 96)
    cudnn._installed.cache_clear()


@pytest.mark.usefixtures("cudnn_is_installed")
@pytest.mark.parametrize("case", ["prefill", "window", "cache"])
def test_lowers_for_cuda(case: str) -> None:
    if case == "cache":
        length, mask = 1, cache_mask("left", 2, 640, 600, 1, None)
    else:
        length, mask = 101, prefill_mask("left", 2, 101, 40 if case == "window" else None)
    arrays = [
        x.astype(jnp.bfloat16) for x in random_arrays(2, length, mask.key_mask.shape[1], HEADS["gqa"], 96)
    ]
    run = jax.jit(partial(cudnn.cudnn_attention, scale=SCALE))
    text = run.trace(*arrays, mask).lower(lowering_platforms=("cuda",)).as_text()
    kind = "Softmax" if case == "prefill" else "ScaleBiasSoftmax"
    assert f"__cudnn$fmha{kind}(" in text


@pytest.mark.usefixtures("xla_for_cudnn")
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("window", [None, 40, 500])
def test_arguments_describe_this_attention(window: int | None, holes: bool) -> None:
    @jax.jit
    def both(arrays: list, mask: CausalMask) -> tuple[jax.Array, jax.Array]:
        return cudnn.cudnn_attention(*arrays, mask, scale=SCALE), dense_attention(mask, *arrays)

    for padding in ("none", "left", "right"):
        mask = prefill_mask(padding, 3, 101, window)
        if holes:
            mask = dataclasses.replace(mask, key_mask=mask.key_mask & (np.arange(101) % 7 != 3))
        arrays = random_arrays(3, 101, 101, HEADS["gqa"], 64)
        out, expected = jax.tree.map(np.asarray, both(arrays, mask))
        assert_close(out[mask.key_mask], expected[mask.key_mask])
        assert np.isfinite(out).all()
