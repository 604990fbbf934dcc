"""Finds what a run's backward pass keeps: what the settings say, or what fits into the devices' memory."""

from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, Mesh

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
    settings: Settings, config: Phi3Config, plan: BatchPlan, mesh: Mesh | AbstractMesh | None
) -> tuple[Remat, RematChoice | None]:
    """Returns what the backward pass keeps, and the figures that decided if the settings leave it open.

    A step of the widest batch decides, before anything is allocated, and in all processes the same.
    """
    if settings.remat != AUTO:
        return settings.remat, None
    platform = jax.default_backend()
    if platform == "cpu" or settings.trained == "head":  # the layers have no gradients
        return "none", None
    devices = jax.local_devices()[:1] if isinstance(mesh, AbstractMesh | None) else list(mesh.local_devices)
    usable = distributed.from_primary(lambda: memory_bytes(devices))
    if usable is None:
        return "full", None
    sizes = {} if mesh is None else dict(mesh.shape)
    return choose_on_chips(settings, config, plan, sizes, usable, on_gpu=platform == "gpu")


def choose_on_chips(
    settings: Settings,
    config: Phi3Config,
    plan: BatchPlan,
    sizes: Mapping[str, int],
    usable: int,
    *,
    on_gpu: bool,
) -> tuple[Remat, RematChoice | None]:
    """Returns what the backward pass keeps on chips with `usable` bytes each, as `find_remat`."""
    if settings.remat != AUTO:
        return settings.remat, None
    if settings.trained == "head":
        return "none", None
    work = step_work(settings, config, plan)
    more = sum_bytes(settings, plan, work, sizes)
    window = config.sliding_window or work.seq
    by_cudnn = supported(work.dtype, config.head_dim) and window >= work.seq and not settings.packing
    if on_gpu and work.seq >= LEAST_QUERIES and not by_cudnn:
        more += score_bytes(work, sizes)
    choice = choose_remat(work, sizes, usable, more)
    return choice.remat, choice


def step_work(settings: Settings, config: Phi3Config, plan: BatchPlan) -> Work:
    """Returns the work of a micro-batch of the widest rows."""
    return Work(
        config,
        "finetune",
        plan.rows // _micro_batches(settings, plan),
        max(plan.widths),
        dtype=settings.dtype,
        # A head alone is about as small as adapters of rank 1.
        lora={"full": None, "lora": settings.lora_rank, "head": 1}[settings.trained],
        quantization=None if settings.quantize == FLOATS else settings.quantize,
    )


def sum_bytes(settings: Settings, plan: BatchPlan, work: Work, sizes: Mapping[str, int]) -> int:
    """Returns one chip's bytes of the gradients that several batches of a step add up in."""
    several = plan.step_batches > 1 or _micro_batches(settings, plan) > 1
    return analyse(work, sizes).gradient_sum_bytes if several else 0


def _micro_batches(settings: Settings, plan: BatchPlan) -> int:
    return settings.gradient_accumulation_steps if plan.step_batches == 1 else 1
