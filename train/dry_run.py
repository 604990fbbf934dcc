"""Checks a run before its chips are there: the code of `finetune` up to the loading of the model."""

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jax.sharding import AbstractMesh, Mesh

from phi3_jax.costs.chips import GIB
from phi3_jax.costs.work import AbstractStep, Work
from phi3_jax.data.loader import load
from phi3_jax.errors import UserError
from phi3_jax.parallel.sharding import abstract_mesh, parse_mesh
from phi3_jax.plan import Plan, Topology, mesh_sizes, plan
from phi3_jax.plan import topology as topology_named
from phi3_jax.plan.remat import RematChoice
from phi3_jax.trainer.batches import abstract_batch

from .recipe import Recipe, make_recipe, make_trainer, new_shapes
from .remat import choose_on_chips, step_work, sum_bytes
from .run_directory import RunDirectory
from .settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DryRun:
    """What a run would do."""

    recipe: Recipe
    plan: Plan | None
    """Its step on the chips of the topology, if one is given."""
    remat: RematChoice | None
    """What the step keeps on these chips, if their memory decides."""
    state: str
    """What the output directory means for the run."""

    def lines(self) -> Iterator[str]:
        """Yields the summary, line by line."""
        recipe, data = self.recipe, self.recipe.data
        lengths = {"train": data.train.lengths, "validation": data.validation.lengths}
        if data.test is not None:
            lengths["test"] = data.test.lengths
        for split, each in lengths.items():
            cut = data.counts.get(f"{split} examples cut", 0)
            sizes = f"{len(each):,} rows, {int(each.sum()):,} tokens, the longest has {int(each.max()):,}"
            yield f"{split}: {sizes}" + (f"; {cut:,} examples are cut" if cut else "")
        if "bad rows skipped" in data.counts:
            yield f"bad rows: {data.counts['bad rows skipped']:,} are skipped"
        if data.labels is not None:
            head = "a new head" if data.base_rows is None else "the base model's head"
            yield f"labels: {len(data.labels)} ({_some(data.labels.names)}), with {head}"
        rows = recipe.plan.rows * recipe.plan.step_batches
        yield (
            f"steps: {recipe.plan.steps_per_epoch:,} an epoch of {rows} rows each, {recipe.total_steps:,} in "
            f"total, in widths of {', '.join(map(str, recipe.plan.widths))} tokens"
        )
        if self.plan is not None:
            yield _chip_line(recipe, self.plan)
        if self.remat is not None:
            yield str(self.remat)
        yield f"{recipe.settings.output_dir}: {self.state}"


def dry_run(
    settings: Settings, *, mesh: str | None, topology: str | None, distributed: bool, cache_dir: Path | None
) -> DryRun:
    """Checks everything that a run needs but its chips; no parameter is read and nothing is written.

    Args:
        settings: of the run.
        mesh: as the run will have it, such as "fsdp=16".
        topology: the chips of the run, such as "v5e:4x4"; without it, memory and the number of chips are not
            checked.
        distributed: whether the run will have several processes.
        cache_dir: the folder of the default model.

    Raises:
        UserError, OSError: what `finetune` would raise before its first step, or the step does not fit.
    """
    chips = None if topology is None else topology_named(topology)
    shape = _mesh_shape(mesh, chips, distributed)
    recipe = make_recipe(settings, shape, cache_dir)
    directory = RunDirectory(recipe)
    finished = directory.check()
    make_trainer(recipe, new_shapes(recipe, None), None)
    if shape is not None:
        new_shapes(recipe, shape)
    step, remat = (None, None) if chips is None else _plan_step(recipe, chips, shape)
    return DryRun(recipe, step, remat, _state(directory, finished is not None))


def _mesh_shape(mesh: str | None, chips: Topology | None, distributed: bool) -> AbstractMesh | None:
    if mesh is None:
        devices = 1 if chips is None else chips.devices
        if distributed or devices > 1:
            what = "--distributed" if chips is None else f"--topology {chips.name} has {devices} devices, and"
            raise UserError(
                f"{what} needs --mesh to say how they divide the model, as in --mesh fsdp={max(devices, 16)}"
            )
        return None
    if chips is not None:
        return abstract_mesh(mesh_sizes(mesh, chips))
    sizes = parse_mesh(mesh)
    if -1 in sizes.values():
        logger.warning(
            "mesh %r has all remaining devices in one axis: give --topology to check that axis", mesh
        )
    return abstract_mesh({name: max(size, 1) for name, size in sizes.items()})


def _plan_step(
    recipe: Recipe, chips: Topology, shape: AbstractMesh | None
) -> tuple[Plan, RematChoice | None]:
    """Returns the plan of the run's own step on a batch of its widest rows, and what it keeps.

    Raises:
        UserError: the step does not fit.
    """
    settings, usable = recipe.settings, chips.chip.hbm_bytes
    sizes = {"data": 1} if shape is None else dict(shape.shape)
    remat, choice = choose_on_chips(
        settings, recipe.config, recipe.plan, sizes, usable, on_gpu=not chips.chip.is_tpu
    )
    recipe = replace(recipe, remat=remat)
    work = replace(step_work(settings, recipe.config, recipe.plan), remat=remat)
    result = plan(work, chips, sizes, build=partial(_abstract_step, recipe))
    needed = _needed_bytes(recipe, result)
    if not result.fits or needed > result.usable_bytes:
        raise UserError(
            f"a step of {recipe.plan.rows} x {recipe.plan.widths[-1]} tokens needs {needed / GIB:.2f} GiB of "
            f"the {result.usable_bytes / GIB:.2f} GiB of each chip of {chips.name}, mesh {result.mesh_text}; "
            "use more chips, a smaller train_batch_size or max_length, trained=lora, or quantize"
        )
    return result, choice


def _needed_bytes(recipe: Recipe, result: Plan) -> int:
    """Returns one chip's bytes, with the gradients that several batches of a step add up in."""
    # Micro-batches of one batch add up within the program that the compiler saw.
    several = recipe.plan.step_batches > 1 or not result.compiled
    more = sum_bytes(recipe.settings, recipe.plan, result.work, result.mesh) if several else 0
    return result.needed_bytes + more


def _abstract_step(recipe: Recipe, work: Work, mesh: Mesh) -> AbstractStep:
    """Returns the run's step on absent chips, with one batch of the widest rows."""
    trainer = make_trainer(recipe, new_shapes(recipe, mesh), mesh)
    examples, pad = recipe.data.train, recipe.pad_token_id
    with closing(load(examples, recipe.plan, pad_token_id=pad, stop=1, threads=0)) as batches:
        batch = abstract_batch(next(batches).arrays, recipe.plan.widths[-1], mesh)
    state = trainer.state_shapes
    parts = {"parameters": (state.trained, state.frozen), "optimizer": state.optimizer, "batch": batch}
    return AbstractStep(trainer.step, (state, batch), parts)


def _chip_line(recipe: Recipe, result: Plan) -> str:
    source = "by the compiler" if result.compiled else "estimated from shapes"
    needed, usable = _needed_bytes(recipe, result) / GIB, result.usable_bytes / GIB
    bound = result.roofline
    where = f"{result.topology.name}, mesh {result.mesh_text}"
    return (
        f"{where}: {needed:.2f} of {usable:.2f} GiB a chip ({source}); "
        f"{result.work.batch} x {result.work.seq:,} tokens take at least {1000 * bound.step_seconds:.3g} ms, "
        f"limited by {bound.limited_by}"
    )


def _state(directory: RunDirectory, finished: bool) -> str:
    if finished:
        return "the run is finished, and nothing is left to do"
    return "an earlier run, which is resumed" if directory.started else "model, report, log and checkpoints"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
