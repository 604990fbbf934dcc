"""Finds what a run's backward pass keeps: what the settings say, or what fits into the devices' memory."""

import jax
from jax.sharding import Mesh

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.costs.chips import memory_bytes
from phi3_jax.costs.work import Work
from phi3_jax.data.batches import BatchPlan
from phi3_jax.model.kernels.cudnn import supported
from phi3_jax.model.kernels.dispatch import LEAST_QUERIES
from phi3_jax.model.remat import Remat
from phi3_jax.parallel import distributed
from phi3_jax.plan.analytic import analyse, score_bytes
from phi3_jax.plan.remat import AUTO, RematChoice, choose_remat
from phi3_jax.quantization import FLOATS

from .settings import Settings


def find_remat(
    settings: Settings, config: Phi3Config, plan: BatchPlan, mesh: Mesh | None
) -> tuple[Remat, RematChoice | None]:
    """Returns what the backward pass keeps, and the figures that decided if the settings leave it open.

    A step of the widest batch decides, before anything is allocated, and in all processes the same.
    """
    if settings.remat != AUTO:
        return settings.remat, None
    if jax.default_backend() == "cpu" or settings.trained == "head":  # the layers have no gradients
        return "none", None
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    usable = distributed.from_primary(lambda: memory_bytes(devices))
    if usable is None:
        return "full", None
    micro_batches = settings.gradient_accumulation_steps if plan.step_batches == 1 else 1
    work = Work(
        config,
        "finetune",
        plan.rows // micro_batches,
        max(plan.widths),
        dtype=settings.dtype,
        lora=settings.lora_rank if settings.trained == "lora" else None,
        quantization=None if settings.quantize == FLOATS else settings.quantize,
    )
    sizes = {} if mesh is None else dict(mesh.shape)
    more = 0
    if plan.step_batches > 1 or micro_batches > 1:
        more += analyse(work, sizes).gradient_sum_bytes
    window = config.sliding_window or work.seq
    by_cudnn = supported(work.dtype, config.head_dim) and window >= work.seq and not settings.packing
    if jax.default_backend() == "gpu" and work.seq >= LEAST_QUERIES and not by_cudnn:
        more += score_bytes(work, sizes)
    choice = choose_remat(work, sizes, usable, more)
    return choice.remat, choice
