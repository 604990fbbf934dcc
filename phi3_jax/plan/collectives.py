"""Every collective of a compiled program: how often, how much, along which axes, and what links carry."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from phi3_jax.plan import groups, hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One collective, or several alike. Bytes are of one chip and one run."""

    kind: str
    count: int
    """Runs a step."""
    payload_bytes: int
    """The whole array's: what was gathered, reduced, or sent."""
    traffic_bytes: float
    """What a chip must send at least."""
    group_size: int
    axes: tuple[str, ...] | None
    """The mesh axes it goes along; None: it follows none of them."""
    asynchronous: bool
    """Computation goes on meanwhile."""
    dtypes: tuple[str, ...]
    source: str
    """The operation of the user's program that it comes from."""
    certain: bool = True
    """False: it runs in a loop whose trip count could not be read, and counts as one trip."""


def traffic(kind: str, operand_bytes: float, group_size: int) -> float:
    """Bytes that each of `group_size` chips must send for one collective on operands of `operand_bytes` a
    chip.

    The bandwidth-optimal algorithms' (Chan et al. 2007, "Collective communication: theory, practice, and
    experience"): all-gather (n - 1) x operand, which is (n - 1) / n of the result; reduce-scatter and
    all-to-all (n - 1) / n x operand; all-reduce twice that. A permute or broadcast sends its operand once.
    """
    n = group_size
    if n <= 1:
        return 0.0
    factors = {
        "all-gather": n - 1,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "ragged-all-to-all": (n - 1) / n,
    }
    return factors.get(kind, 1.0) * operand_bytes


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """What a program, as `compiled.as_text()` prints it, moves between the chips of `mesh`; those alike
    together.

    `mesh` has the axes in the order in which they number the devices.
    """
    together: dict[tuple[object, ...], Collective] = {}
    for one in _each(hlo.parse(text), mesh):
        key = (
            one.kind,
            one.payload_bytes,
            one.group_size,
            one.axes,
            one.asynchronous,
            one.dtypes,
            one.source,
        )
        count = one.count + (together[key].count if key in together else 0)
        together[key] = Collective(**{**vars(one), "count": count})
    return sorted(together.values(), key=lambda c: -c.count * c.traffic_bytes)


def _each(module: hlo.Module, mesh: Mapping[str, int]) -> Iterator[Collective]:
    # TPU's asynchronous collective fusions: one fusion starts a collective, others carry on with it beside
    # their own computation, a last one ends it. Each holds the instruction, under one channel; the start
    # stands for all.
    starts = {name for name, c in module.computations.items() if c.has_custom_call("AsyncCollectiveStart")}
    channels = {
        c for name in starts for i in module.computations[name].instructions.values() if (c := _channel(i))
    }
    wrapped = {
        name
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "async-start"
        for _, name in instruction.called
    }
    for run in module.runs():
        name = run.computation.name
        for instruction in run.computation.instructions.values():
            if instruction.opcode.removesuffix("-start") not in KINDS or run.times == 0:
                continue
            if _channel(instruction) in channels and name not in starts:
                continue
            asynchronous = instruction.opcode.endswith("-start") or name in starts or name in wrapped
            yield _collective(run, instruction, asynchronous, mesh)


def _channel(instruction: hlo.Instruction) -> str | None:
    if instruction.opcode.removesuffix("-start") not in KINDS:
        return None
    return instruction.attribute("channel_id")


def _collective(
    run: hlo.Run, instruction: hlo.Instruction, asynchronous: bool, mesh: Mapping[str, int]
) -> Collective:
    computation, kind = run.computation, instruction.opcode.removesuffix("-start")
    shapes = [
        computation.instructions[name].shape
        for name in instruction.operands
        if name in computation.instructions
    ]
    operand_bytes = sum(map(hlo.shape_bytes, shapes))
    axes: tuple[str, ...] | None = None
    if kind in ("collective-permute", "collective-broadcast"):
        pairs = groups.permuted_pairs(instruction.attributes)
        size, axes = 2, groups.pair_axes(pairs, mesh) if pairs else None
    else:
        found = groups.replica_groups(instruction.attributes, prod(mesh.values()))
        size = max(map(len, found)) if found else prod(mesh.values())
        axes = groups.mesh_axes(found, mesh) if found else None
    if kind == "all-reduce" and _scatters(computation, instruction):
        kind = "reduce-scatter"
    return Collective(
        kind=kind,
        count=run.times,
        payload_bytes=operand_bytes * size if kind == "all-gather" else operand_bytes,
        traffic_bytes=traffic(kind, operand_bytes, size),
        group_size=size,
        axes=axes,
        asynchronous=asynchronous,
        dtypes=tuple(dict.fromkeys(kind for shape in shapes for kind in hlo.element_types(shape))),
        source=_source(instruction.op_name or (run.caller.op_name if run.caller else "")),
        certain=run.certain,
    )


def _scatters(computation: hlo.Computation, reduce: hlo.Instruction) -> bool:
    """TPU writes a reduce-scatter as a fusion of an all-reduce and the slice that is left of it."""
    users = [i for i in computation.instructions.values() if reduce.name in i.operands]
    return "all-reduce-scatter" in computation.name or (
        computation.root != reduce.name and bool(users) and all(i.opcode == "dynamic-slice" for i in users)
    )


def _source(op_name: str) -> str:
    """The last parts of a path such as jit(step)/transpose(jvp())/while/body/bf,df->bd/dot_general."""
    common = ("while", "body", "closed_call", "checkpoint", "rematted_computation", "cond")
    parts = [part for part in op_name.split("/") if part not in common]
    backward = "backward " if any(part.startswith("transpose(") for part in parts) else ""
    return backward + "/".join(parts[-2:])
