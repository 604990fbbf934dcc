"""Lists the collectives of a compiled program: how often each runs, its bytes, and its mesh axes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
    """One collective, or several equal ones. Bytes are of one chip and one run."""

    kind: str
    count: int
    """The runs in one step."""
    payload_bytes: int
    """The bytes of the whole array that is gathered, reduced or sent."""
    traffic_bytes: float
    """The least that a chip must send."""
    group_size: int
    axes: tuple[str, ...] | None
    """The mesh axes along which it runs; None if it follows none of them."""
    asynchronous: bool
    """Whether computation continues meanwhile."""
    dtypes: tuple[str, ...]
    source: str
    """The operation of the user's program that it comes from."""
    certain: bool = True
    """False in a loop whose trip count could not be read and counts as one."""


def traffic(kind: str, operand_bytes: float, group_size: int) -> float:
    """Returns the bytes that each of `group_size` chips must send for one collective.

    `operand_bytes` is the operand of one chip. The counts are those of the bandwidth-optimal algorithms (Chan
    et al. 2007, "Collective communication: theory, practice, and experience"): all-gather (n - 1) x operand,
    which is (n - 1) / n of the result; reduce-scatter and all-to-all (n - 1) / n x operand; all-reduce twice
    that. A permute or broadcast sends its operand once.
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
    """Returns the collectives of a program, as `compiled.as_text()` prints it, with equal ones merged.

    `mesh` has the axes in the order in which they number the devices.
    """
    merged: dict[tuple[object, ...], Collective] = {}
    for one in _collectives(hlo.parse(text), mesh):
        key = (
            one.kind,
            one.payload_bytes,
            one.group_size,
            one.axes,
            one.asynchronous,
            one.dtypes,
            one.source,
        )
        count = one.count + (merged[key].count if key in merged else 0)
        merged[key] = replace(one, count=count)
    return sorted(merged.values(), key=lambda c: -c.count * c.traffic_bytes)


def _collectives(module: hlo.Module, mesh: Mapping[str, int]) -> Iterator[Collective]:
    # In TPU's asynchronous collective fusions one fusion starts a collective, others continue it beside their
    # own computation, and a last one ends it. Each contains the instruction, under one channel; only the
    # start counts.
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
    for call in module.calls():
        name = call.computation.name
        for instruction in call.computation.instructions.values():
            if instruction.opcode.removesuffix("-start") not in KINDS or call.times == 0:
                continue
            if _channel(instruction) in channels and name not in starts:
                continue
            asynchronous = instruction.opcode.endswith("-start") or name in starts or name in wrapped
            yield _collective(call, instruction, asynchronous, mesh)


def _channel(instruction: hlo.Instruction) -> str | None:
    if instruction.opcode.removesuffix("-start") not in KINDS:
        return None
    return instruction.attribute("channel_id")


def _collective(
    call: hlo.Call, instruction: hlo.Instruction, asynchronous: bool, mesh: Mapping[str, int]
) -> Collective:
    computation, kind = call.computation, instruction.opcode.removesuffix("-start")
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
        members = groups.replica_groups(instruction.attributes, prod(mesh.values()))
        size = max(map(len, members)) if members else prod(mesh.values())
        axes = groups.mesh_axes(members, mesh) if members else None
    if kind == "all-reduce" and _is_reduce_scatter(computation, instruction):
        kind = "reduce-scatter"
    return Collective(
        kind=kind,
        count=call.times,
        payload_bytes=operand_bytes * size if kind == "all-gather" else operand_bytes,
        traffic_bytes=traffic(kind, operand_bytes, size),
        group_size=size,
        axes=axes,
        asynchronous=asynchronous,
        dtypes=tuple(dict.fromkeys(kind for shape in shapes for kind in hlo.element_types(shape))),
        source=_source(instruction.op_name or (call.caller.op_name if call.caller else "")),
        certain=call.certain,
    )


def _is_reduce_scatter(computation: hlo.Computation, reduce: hlo.Instruction) -> bool:
    """Recognises a reduce-scatter, which TPU writes as a fusion of an all-reduce and a slice of it."""
    users = [i for i in computation.instructions.values() if reduce.name in i.operands]
    return "all-reduce-scatter" in computation.name or (
        computation.root != reduce.name and bool(users) and all(i.opcode == "dynamic-slice" for i in users)
    )


def _source(op_name: str) -> str:
    """Shortens a path such as jit(step)/transpose(jvp())/while/body/bf,df->bd/dot_general."""
    common = ("while", "body", "closed_call", "checkpoint", "rematted_computation", "cond")
    parts = [part for part in op_name.split("/") if part not in common]
    backward = "backward " if any(part.startswith("transpose(") for part in parts) else ""
    return backward + "/".join(parts[-2:])
