"""Builds the steps that are planned, the ones that users run, with shapes in place of arrays."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from phi3_jax.cache import KVCache
from phi3_jax.costs.work import AbstractStep, Work
from phi3_jax.errors import UserError
from phi3_jax.lora import add_lora
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.abstract import abstract_cache, abstract_model, with_shardings
from phi3_jax.model.quantizing import quantize_model
from phi3_jax.parallel.sharding import replicate, sharding
from phi3_jax.trainer import Trainer


def abstract_step(work: Work, mesh: Mesh) -> AbstractStep:
    """Builds the step of `work` on `mesh`, ready to be lowered.

    Raises:
        UserError: the mesh does not divide a size; the message names the sizes that it divides.
    """
    return {"finetune": _finetune, "prefill": _prefill, "decode": _decode}[work.task](work, mesh)


def _model(work: Work, mesh: Mesh) -> Phi3ForCausalLM:
    model = abstract_model(Phi3ForCausalLM, work.config, dtype=work.dtype, mesh=mesh)
    return model if work.quantization is None else quantize_model(model, work.quantization)


def _finetune(work: Work, mesh: Mesh) -> AbstractStep:
    model = _model(work, mesh)
    wrt = nnx.Param
    if (rank := work.lora) is not None:
        model = with_shardings(nnx.eval_shape(lambda model: add_lora(model, rank), model), mesh)
        wrt = nnx.LoRAParam
    trainer = Trainer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4)),
        wrt=wrt,
        master_dtype=work.optimizer_dtype or jnp.float32,
        compute_dtype=work.dtype,
        remat=work.remat,
    )
    state = trainer.state_shapes
    ids = _ids(work.batch, work.seq, mesh)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    parts = {"parameters": (state.trained, state.frozen), "optimizer": state.optimizer, "batch": batch}
    return AbstractStep(trainer.step, (state, batch), parts)


def _prefill(work: Work, mesh: Mesh) -> AbstractStep:
    if work.cache_dtype not in (None, work.dtype):
        raise UserError(
            f"cache_dtype={work.cache_dtype} is for decode; prefill keeps keys and values in --dtype"
        )
    model = _model(work, mesh)

    def prefill(
        model: Phi3ForCausalLM, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"]
    ) -> tuple[Int[Array, " B"], KVCache]:
        out = model(input_ids, attention_mask, use_cache=True, logits_to_keep=1)
        assert out.past_key_values is not None
        return jnp.argmax(replicate(out.logits[:, -1], mesh), axis=-1), out.past_key_values

    ids = _ids(work.batch, work.seq, mesh)
    _, cache = jax.eval_shape(prefill, model, ids, ids)
    cache = abstract_cache(model, work.batch, cache.max_length)
    parts = {"parameters": model, "cache": cache, "batch": ids}
    return AbstractStep(jax.jit(prefill), (model, ids, ids), parts)


def _decode(work: Work, mesh: Mesh) -> AbstractStep:
    model = _model(work, mesh)
    cache = abstract_cache(model, work.batch, work.seq, work.cache_dtype)

    def decode(
        model: Phi3ForCausalLM, token: Int[Array, "B 1"], cache: KVCache
    ) -> tuple[Int[Array, " B"], KVCache]:
        out = model(token, past_key_values=cache, logits_to_keep=1)
        assert out.past_key_values is not None
        return jnp.argmax(replicate(out.logits[:, -1], mesh), axis=-1), out.past_key_values

    token = jax.ShapeDtypeStruct((work.batch, 1), jnp.int32, sharding=sharding(mesh, ()))
    parts = {"parameters": model, "cache": cache, "batch": token}
    return AbstractStep(jax.jit(decode, donate_argnames="cache"), (model, token, cache), parts)


def _ids(batch: int, length: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding(mesh, ("batch", "length")))
