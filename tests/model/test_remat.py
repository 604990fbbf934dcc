"""Tests what the policies of `Trainer` keep of attention kernels; tests of operations are in tests/plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from marks import slow
from reference import small_config

from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.abstract import abstract_model
from phi3_jax.model.remat import REMAT_POLICIES, Remat
from phi3_jax.parallel.sharding import make_mesh

IDS = np.ones((3, 256), np.int32)


@pytest.mark.usefixtures("cudnn_is_installed")
@pytest.mark.parametrize(
    ("implementation", "on_mesh", "logsumexp"),
    [
        (None, False, "f32[3,2,2,256]"),
        ("cudnn", False, "f32[3,4,256]"),
        slow("pallas", True, "f32[3,2,2,256]"),
    ],
)
@pytest.mark.parametrize("remat", ["dots", "dots_and_attention", slow("full"), slow("attention")])
def test_policies_keep_the_results_of_attention(
    capsys: pytest.CaptureFixture[str],
    implementation: str | None,
    on_mesh: bool,
    logsumexp: str,
    remat: Remat,
) -> None:
    """A kernel's backward pass needs the logsumexp of its scores, which nothing but the kernel computes."""
    mesh = make_mesh({}, jax.devices()[:1]) if on_mesh else None
    config = small_config(num_hidden_layers=1, head_dim=16, max_position_embeddings=256)
    model = abstract_model(Phi3ForCausalLM, config, dtype=jnp.bfloat16, mesh=mesh)
    model.set_attn_implementation(implementation)
    model.decoder.remat_policy = REMAT_POLICIES[remat]
    print_saved_residuals(lambda model: model(IDS, labels=IDS).loss, model)
    kept = capsys.readouterr().out
    assert (logsumexp in kept) == (remat in ("attention", "dots_and_attention"))
