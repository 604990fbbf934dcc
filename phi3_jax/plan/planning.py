"""Plans one step on chips that may be absent, and compiles it where that is possible."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

from phi3_jax.costs.chips import Topology
from phi3_jax.costs.chips import topology as topology_named
from phi3_jax.costs.work import BuildStep, Work
from phi3_jax.errors import UserError
from phi3_jax.parallel.sharding import AXES, make_mesh, parse_mesh
from phi3_jax.plan.absent import absent_devices
from phi3_jax.plan.analytic import Analytic, analyse
from phi3_jax.plan.program import Program, Refusal, bytes_per_chip, compile_step
from phi3_jax.plan.remat import RematChoice, choose_remat
from phi3_jax.plan.roofline import Roofline, roofline
from phi3_jax.plan.search import COMPILED, sensible_meshes
from phi3_jax.plan.steps import abstract_step


@dataclass(frozen=True)
class Plan:
    """The memory and the least time of one step on one mesh; without a `program`, from shapes."""

    work: Work
    topology: Topology
    mesh: dict[str, int]
    analytic: Analytic
    roofline: Roofline
    program: Program | None = None
    refusal: Refusal | None = None
    """Given where the compiler found that the step does not fit."""
    problem: str | None = None
    """The reason why the step could not be built on this mesh."""
    part_bytes: dict[str, int] = field(default_factory=dict)
    """One chip's bytes of the step's arguments, such as parameters, optimizer, cache and batch."""
    remat_choice: RematChoice | None = None
    """The figures that chose `work.remat`, if `plan` did."""
    others: "tuple[Plan, ...]" = ()
    """The plans on the other meshes, best first."""

    @property
    def compiled(self) -> bool:
        """Whether the compiler decided; otherwise memory is an estimate."""
        return self.program is not None or self.refusal is not None

    @property
    def fits(self) -> bool:
        if self.program is not None:
            return True  # otherwise the compiler refuses it
        return self.refusal is None and self.problem is None and self.needed_bytes <= self.usable_bytes

    @property
    def needed_bytes(self) -> int:
        """The bytes that the step needs on each chip."""
        if self.program is not None:
            return self.program.memory.total_bytes
        return self.analytic.total_bytes if self.refusal is None else self.refusal.required_bytes

    @property
    def usable_bytes(self) -> int:
        return self.topology.chip.hbm_bytes if self.refusal is None else self.refusal.available_bytes

    @property
    def mesh_text(self) -> str:
        """The mesh in the form that `--mesh` takes."""
        named = [f"{name}={size}" for name, size in self.mesh.items() if size > 1]
        return ",".join(named) or "data=1"


def plan(
    work: Work,
    topology: Topology | str,
    mesh: str | Mapping[str, int] | None = None,
    *,
    compiled: int = COMPILED,
    auto_remat: bool = False,
    build: BuildStep | None = None,
) -> Plan:
    """Plans one step.

    Args:
        work: the step's task and sizes.
        topology: "v5e:4x4" or "h100:8", for example; for GPUs nothing is compiled.
        mesh: "fsdp=16" or a mapping; None tries all sensible meshes and returns the best, with `others`.
        compiled: the number of meshes that are compiled, best by shapes first, where `mesh` is None.
        auto_remat: choose `work.remat` on each mesh, as `finetune` does; see `choose_remat`.
        build: builds the step in place of `abstract_step`.

    Raises:
        UserError: the topology is unknown; the mesh does not have the topology's number of chips, or does not
            divide the model; libtpu is missing.
    """
    topology = topology_named(topology) if isinstance(topology, str) else topology
    if mesh is not None:
        return _compiled(_from_shapes(work, topology, mesh_sizes(mesh, topology), auto_remat), build)
    meshes = sensible_meshes(work, topology.devices)
    candidates = [_from_shapes(work, topology, sizes, auto_remat) for sizes in meshes]
    candidates.sort(key=_rank)
    if topology.chip.is_tpu:
        tried = [_try_compiled(one, build) for one in candidates[:compiled]]
        candidates = tried + candidates[compiled:]
    best, *others = sorted(candidates, key=_rank)
    if best.problem is not None:
        raise UserError(best.problem)
    return replace(best, others=tuple(others))


def _rank(one: Plan) -> tuple[bool, bool, bool, float, float]:
    """Returns the sort key: what fits first, compiled before estimated, then by bound, then by its terms."""
    bound = one.roofline
    total = bound.compute_seconds + bound.hbm_seconds + bound.link_seconds
    return one.problem is not None, not one.fits, not one.compiled, bound.step_seconds, total


def mesh_sizes(mesh: str | Mapping[str, int], topology: Topology) -> dict[str, int]:
    """Returns the size of every axis of a mesh over all devices of a topology; -1 takes those that are left.

    Raises:
        UserError: the sizes cannot be read, or do not multiply to the number of devices.
    """
    sizes = parse_mesh(mesh) if isinstance(mesh, str) else dict(mesh)
    named = prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and topology.devices % named == 0:
        sizes = {name: topology.devices // named if size == -1 else size for name, size in sizes.items()}
    if prod(sizes.values()) != topology.devices:
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"mesh {text!r} needs {prod(sizes.values())} devices and {topology.name} has {topology.devices}; "
            f"the sizes must multiply to {topology.devices}, as in fsdp={topology.devices}"
        )
    return {name: sizes.get(name, 1) for name in AXES}


def _from_shapes(work: Work, topology: Topology, sizes: dict[str, int], auto_remat: bool) -> Plan:
    choice = None
    if auto_remat and work.task == "finetune":
        choice = choose_remat(work, sizes, topology.chip.hbm_bytes)
        work = replace(work, remat=choice.remat)
    analytic = analyse(work, sizes)
    return Plan(work, topology, sizes, analytic, roofline(work, topology, analytic), remat_choice=choice)


def _try_compiled(estimate: Plan, build: BuildStep | None) -> Plan:
    try:
        return _compiled(estimate, build)
    except UserError as error:
        return replace(estimate, problem=str(error))


def _compiled(estimate: Plan, build: BuildStep | None) -> Plan:
    """Returns the plan with what the compiler says of the step, where it can compile for the chip."""
    work, topology = estimate.work, estimate.topology
    if not topology.chip.is_tpu:
        return estimate
    mesh = make_mesh(estimate.mesh, absent_devices(topology))
    step = (build or abstract_step)(work, mesh)
    parts = {name: bytes_per_chip(tree) for name, tree in step.parts.items()}
    result = compile_step(step, dict(mesh.shape))
    if isinstance(result, Refusal):
        return replace(estimate, refusal=result, part_bytes=parts)
    bound = roofline(work, topology, estimate.analytic, result)
    return replace(estimate, program=result, roofline=bound, part_bytes=parts)
