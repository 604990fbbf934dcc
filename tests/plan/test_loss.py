"""Tests the loss of a large vocabulary, compiled for absent TPUs: its memory and its collectives."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from phi3_jax import Phi3Config, Phi3ForCausalLM
from phi3_jax.costs.chips import topology
from phi3_jax.costs.work import AbstractStep
from phi3_jax.model.abstract import abstract_model
from phi3_jax.parallel.sharding import make_mesh, sharding
from phi3_jax.plan.absent import absent_devices
from phi3_jax.plan.program import Program, compile_step

pytest.importorskip("libtpu", reason="the compiler for TPUs (extra: tpu) is not installed")

VOCABULARY, HIDDEN, ROWS, LENGTH = 200_064, 512, 8, 2048


def compiled_gradient(sizes: str, trained: object) -> Program:
    """Compiles the loss of a head with a large vocabulary and a small hidden size, and its gradients."""
    config = Phi3Config.preset("phi-3-mini-4k-instruct").replace(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    mesh = make_mesh(sizes, absent_devices(topology("v5e:2x4")))
    model = abstract_model(Phi3ForCausalLM, config, dtype="bfloat16", mesh=mesh)
    structure, parameters, rest = nnx.split(model, trained, ...)

    @partial(jax.value_and_grad, argnums=(0, 1))
    def loss(parameters, hidden, rest, labels):  # type: ignore[no-untyped-def]
        return nnx.merge(structure, parameters, rest).cross_entropy_sum(hidden, labels)

    def abstract(dtype, *axes):  # type: ignore[no-untyped-def]
        shape = (ROWS, LENGTH, HIDDEN)[: len(axes)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes))

    hidden = abstract(jnp.bfloat16, "batch", "length", None)
    arguments = parameters, hidden, rest, abstract(jnp.int32, "batch", "length")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments[:2])
    everywhere = sharding(mesh, ())
    step = AbstractStep(jax.jit(loss, out_shardings=(everywhere, shardings)), arguments)
    program = compile_step(step, dict(mesh.shape))
    assert isinstance(program, Program)
    return program


@pytest.mark.slow
def test_the_weight_is_gathered_once_and_its_gradient_summed_once() -> None:
    program = compiled_gradient("fsdp=2,context=2,tensor=2", nnx.Param)
    sent: dict[tuple[str, tuple[str, ...] | None], int] = {}
    for one in program.collectives:
        key = one.kind, one.axes
        sent[key] = sent.get(key, 0) + one.count * one.payload_bytes
    weight = VOCABULARY // 2 * HIDDEN
    assert sent["all-gather", ("fsdp",)] == pytest.approx(2 * weight, rel=0.01)
    summed = sum(sent.get((kind, ("fsdp",)), 0) for kind in ("all-reduce", "reduce-scatter"))
    assert summed == pytest.approx(4 * weight, rel=0.01)
    assert sent["all-reduce", ("context",)] == pytest.approx(4 * weight / 2, rel=0.01)
    # The gradient of the hidden states, and three numbers for each position.
    assert sent["all-reduce", ("tensor",)] == pytest.approx(2 * ROWS * LENGTH // 4 * HIDDEN, rel=0.05)
    # One block's logits, the gathered weight and its gradient.
    assert program.memory.temporary_bytes < 1.2 * (1024 * VOCABULARY // 2 * 4 + 6 * weight)


@pytest.mark.slow
def test_a_frozen_head_needs_the_logits_of_512_positions() -> None:
    program = compiled_gradient("data=8", nnx.LoRAParam)
    assert all(one.payload_bytes < 1000 for one in program.collectives)
    assert program.memory.temporary_bytes < 1.1 * 512 * VOCABULARY * 4
