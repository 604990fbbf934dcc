"""Tests collectives: their traffic, their forms in TPU programs, and a program compiled for v5e."""

import pytest
from toy_step import FFN, HIDDEN, LAYERS, needs_libtpu, toy_step

from phi3_jax.plan import Work, plan
from phi3_jax.plan.collectives import Collective, collectives, traffic

MESH = {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", 300),  # three quarters of the result of 400
        ("all-reduce", 150),
        ("reduce-scatter", 75),
        ("all-to-all", 75),
        ("collective-permute", 100),
    ],
)
def test_traffic(kind: str, expected: float) -> None:
    assert traffic(kind, 100, 4) == expected
    assert traffic(kind, 100, 1) == 0


def program(body: str, *computations: str) -> str:
    entry = (
        f"ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {{\n  %a = bf16[8,16]{{1,0}} parameter(0)\n{body}\n}}\n"
    )
    return "\n\n".join(("HloModule jit_f", *computations, entry))


def only(text: str) -> Collective:
    (one,) = collectives(text, MESH)
    return one


def test_reads_an_all_reduce_of_several_arrays() -> None:
    one = only(
        program(
            "  %b = f32[4]{0} constant({1, 2, 3, 4})\n"
            "  ROOT %r = (bf16[8,16]{1,0}, f32[4]{0}) all-reduce(%a, %b), channel_id=3,"
            " replica_groups=[1,4]<=[4], to_apply=%sum,"
            ' metadata={op_name="jit(step)/transpose(jvp())/while/body/bf,df->bd/dot_general"}'
        )
    )
    assert (one.kind, one.count, one.payload_bytes, one.traffic_bytes) == (
        "all-reduce",
        1,
        272,
        2 * 272 * 3 / 4,
    )
    assert (one.group_size, one.axes, one.asynchronous) == (4, ("fsdp",), False)
    assert one.dtypes == ("bf16", "f32")
    assert one.source == "backward bf,df->bd/dot_general"


def test_a_start_and_its_done_are_one_collective() -> None:
    one = only(
        program(
            "  %s = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}\n"
            "  ROOT %d = bf16[32,16]{1,0} all-gather-done(%s)"
        )
    )
    assert (one.kind, one.payload_bytes, one.traffic_bytes, one.asynchronous) == (
        "all-gather",
        1024,
        768,
        True,
    )


def test_reads_a_collective_within_async_start() -> None:
    wrapped = (
        "%wrapped (p: bf16[8,16]) -> bf16[2,16] {\n  %p = bf16[8,16]{1,0} parameter(0)\n"
        "  ROOT %rs = bf16[2,16]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%sum\n}"
    )
    body = (
        "  %s = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}) async-start(%a), calls=%wrapped\n"
        "  ROOT %d = bf16[2,16]{1,0} async-done(%s)"
    )
    one = only(program(body, wrapped))
    assert (one.kind, one.payload_bytes, one.traffic_bytes, one.asynchronous) == (
        "reduce-scatter",
        256,
        192,
        True,
    )


def test_an_asynchronous_collective_fusion_counts_once() -> None:
    """On TPU the fusions that start, continue and end a collective contain the same instruction."""

    def part(name: str, target: str) -> str:
        return (
            f"%{name} (p: bf16[8,16]) -> bf16[32,16] {{\n  %p = bf16[8,16]{{1,0}} parameter(0)\n"
            f"  %g = bf16[32,16]{{1,0}} all-gather(%p), channel_id=7, replica_groups=mesh['x'=4] {{'x'}}\n"
            f'  ROOT %c = bf16[32,16]{{1,0}} custom-call(%g), custom_call_target="{target}"\n}}'
        )

    parts = [
        part("first", "AsyncCollectiveStart"),
        part("middle", "Compute"),
        part("last", "AsyncCollectiveDone"),
    ]
    body = "\n".join(
        f"  {root}%{name}.call = bf16[32,16]{{1,0}} fusion(%a), kind=kCustom, calls=%{name}"
        for root, name in (("", "first"), ("", "middle"), ("ROOT ", "last"))
    )
    one = only(program(body, *parts))
    assert (one.kind, one.count, one.payload_bytes, one.asynchronous) == ("all-gather", 1, 1024, True)


def test_an_all_reduce_and_its_slice_are_a_reduce_scatter() -> None:
    fused = (
        "%all-reduce-scatter.1 (p: bf16[8,16]) -> bf16[2,16] {\n  %p = bf16[8,16]{1,0} parameter(0)\n"
        "  %r = bf16[8,16]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%sum\n"
        "  %zero = s32[] constant(0)\n"
        "  ROOT %s = bf16[2,16]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={2,16}\n}"
    )
    body = (
        "  ROOT %f = bf16[2,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1,"
        ' metadata={op_name="jit(f)/psum"}'
    )
    one = only(program(body, fused))
    assert (one.kind, one.traffic_bytes, one.source) == ("reduce-scatter", 192, "jit(f)/psum")


def test_reads_permutes_and_groups_that_follow_no_axis() -> None:
    text = program(
        "  %p = bf16[8,16]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}\n"
        "  ROOT %r = bf16[8,16]{1,0} all-reduce(%p), replica_groups={{0,1},{2},{3}}, to_apply=%sum"
    )
    permute, reduce = sorted(collectives(text, MESH), key=lambda c: c.kind, reverse=True)
    assert (permute.axes, permute.traffic_bytes) == (("fsdp",), 256)
    assert (reduce.axes, reduce.group_size) == (None, 2)


@needs_libtpu
def test_fsdp_gathers_weights_and_reduces_gradients_on_v5e(small) -> None:  # type: ignore[no-untyped-def]
    """Each layer's weights are gathered forward and backward, and their gradients reduced, along fsdp."""
    work = Work(small, "finetune", batch=64, seq=16)
    planned = plan(work, "v5e:2x2", "fsdp=4", build=toy_step)
    program = planned.program
    assert program is not None
    gathered = [c for c in program.collectives if c.kind == "all-gather"]
    weight = HIDDEN * FFN * 2
    assert {c.payload_bytes for c in gathered} == {weight}
    assert sum(c.count for c in gathered) == 2 * 2 * LAYERS
    assert any(c.asynchronous for c in gathered)
    reduced = [
        c
        for c in program.collectives
        if c.kind in ("all-reduce", "reduce-scatter") and c.payload_bytes > 1000
    ]
    assert sum(c.count * c.payload_bytes for c in reduced) == pytest.approx(2 * LAYERS * weight, rel=0.1)
    assert {c.axes for c in program.collectives} == {("fsdp",)}
    assert all(c.certain for c in program.collectives)
    assert program.link_bytes > program.waiting_link_bytes > 0


@needs_libtpu
def test_collectives_follow_their_axes_on_v5e(small) -> None:  # type: ignore[no-untyped-def]
    """With three axes, activations are reduced along tensor and gradients along data."""
    planned = plan(Work(small, "finetune", 64, 16), "v5e:2x4", "data=2,fsdp=2,tensor=2", build=toy_step)
    assert planned.program is not None
    along = {c.axes for c in planned.program.collectives}
    assert {("fsdp",), ("tensor",), ("data",)} <= along
    assert None not in along
    activations = [c for c in planned.program.collectives if c.axes == ("tensor",)]
    assert {c.kind for c in activations} == {"all-reduce"}
    assert {c.payload_bytes for c in activations} == {64 * 16 // 4 * HIDDEN * 2}
    assert sum(c.count for c in activations) == 2 * LAYERS
