"""Tests the parser of HLO on text written by hand in XLA's syntax: instructions, loops, trip counts."""

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.plan import hlo

LOOPS = """\
HloModule jit_f, is_scheduled=true

%inner_body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%sum
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %y)
}

%inner_condition (p.1: (s32[], f32[4])) -> pred[] {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(7)
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

%outer_body (q: (f32[4])) -> (f32[4]) {
  %q = (f32[4]{0}) parameter(0)
  %z = f32[4]{0} get-tuple-element(%q), index=0
  %one = s32[] constant(1)
  %start = s32[] copy(%one)
  %in = (s32[], f32[4]{0}) tuple(%start, %z)
  %w = (s32[], f32[4]{0}) while(%in), condition=%inner_condition, body=%inner_body
  %out = f32[4]{0} get-tuple-element(%w), index=1
  ROOT %u = (f32[4]{0}) tuple(%out)
}

%outer_condition (q.1: (f32[4])) -> pred[] {
  %q.1 = (f32[4]{0}) parameter(0)
  ROOT %always = pred[] custom-call(%q.1), custom_call_target="Unknown"
}

ENTRY %main (a: f32[4]) -> (f32[4]) {
  %a = f32[4]{0} parameter(0), metadata={op_name="a, with (a \\"paren"}
  %s = (f32[4]{0}) tuple(%a)
  ROOT %l = (f32[4]{0}) while(%s), condition=%outer_condition, body=%outer_body, NOTE
}
"""

LOOPS = LOOPS.replace("NOTE", 'backend_config={"known_trip_count":{"n":"5"}}')


def test_trip_counts_of_nested_loops_multiply() -> None:
    """The outer count is the compiler's note; the inner loop runs for i = 1, 3, 5 below 7."""
    times = {call.computation.name: call.times for call in hlo.parse(LOOPS).calls()}
    assert times == {"main": 1, "outer_body": 5, "inner_body": 15}
    assert all(call.certain for call in hlo.parse(LOOPS).calls())


def test_an_unreadable_loop_counts_once_and_is_uncertain() -> None:
    text = LOOPS.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    calls = {call.computation.name: (call.times, call.certain) for call in hlo.parse(text).calls()}
    assert calls == {"main": (1, True), "outer_body": (1, False), "inner_body": (3, False)}


@pytest.mark.parametrize(
    ("direction", "limit", "step", "expected"),
    [
        ("LT", 7, "add", 3),
        ("LE", 7, "add", 4),
        ("NE", 7, "add", 3),
        ("LT", 1, "add", 0),
        ("GT", -4, "subtract", 3),
        ("GE", -3, "subtract", 3),
        ("GT", 7, "add", 0),
        ("EQ", 7, "add", None),
    ],
)
def test_trip_count_of_a_counter(direction: str, limit: int, step: str, expected: int | None) -> None:
    text = LOOPS.replace("direction=LT", f"direction={direction}").replace(
        "constant(7)", f"constant({limit})"
    )
    module = hlo.parse(text.replace("add(%i", f"{step}(%i"))
    outer = module.computations["outer_body"]
    if expected == 0 and direction == "GT":  # it moves away from the limit, so there is no count
        expected = None
    assert module.trip_count(outer, outer.instructions["w"]) == expected


def test_finds_a_limit_that_the_loop_carries() -> None:
    """XLA hoists constants out of loops; the limit is then a carried value that never changes."""
    text = LOOPS.replace(
        "(s32[], f32[4]{0}) tuple(%start, %z)", "(s32[], f32[4]{0}, s32[]) tuple(%start, %z, %n)"
    )
    text = text.replace("%start = s32[] copy(%one)", "%start = s32[] copy(%one)\n  %n = s32[] constant(9)")
    text = text.replace("%limit = s32[] constant(7)", "%limit = s32[] get-tuple-element(%p.1), index=2")
    text = text.replace("tuple(%next, %y)", "tuple(%next, %y, %n.1)")
    text = text.replace("%two = ", "%n.1 = s32[] get-tuple-element(%p), index=2\n  %two = ")
    module = hlo.parse(text)
    outer = module.computations["outer_body"]
    assert module.trip_count(outer, outer.instructions["w"]) == 4


def test_skips_lines_that_are_not_instructions() -> None:
    text = LOOPS.replace("  %two =", "  // a remark\n  %odd = token[] after-all()\n  garbage = (((\n  %two =")
    assert hlo.parse(text).computations["inner_body"].instructions["odd"].opcode == "after-all"
    assert {call.computation.name: call.times for call in hlo.parse(text).calls()}["inner_body"] == 15


def test_reads_an_instruction_of_several_lines() -> None:
    """Pallas kernels have such instructions, and one of their lines can begin with a brace."""
    kernel = (
        '  %k = f32[4]{0} custom-call(%x), frontend_attributes={kernel_metadata={\n"block": 512\n}}, '
        'metadata={op_name="kernel"}\n  %two ='
    )
    module = hlo.parse(LOOPS.replace("  %two =", kernel))
    body = module.computations["inner_body"]
    assert (body.instructions["k"].op_name, body.root) == ("kernel", "t")
    assert {call.computation.name: call.times for call in module.calls()}["inner_body"] == 15


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("bf16[256,8192]{1,0:T(8,128)(2,1)S(1)}", 256 * 8192 * 2),
        ("(f32[3,5]{1,0}, /*index=1*/pred[7]{0}, u32[]{:S(2)})", 60 + 7 + 4),
        ("s4[3]{0:E(4)}", 2),
        ("f8e4m3fn[6,2]{1,0}", 12),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape: str, expected: int) -> None:
    assert hlo.shape_bytes(shape) == expected


def test_reads_nested_scans_compiled_for_cpu() -> None:
    """The program is a scan of 6 steps in a scan of 4, as the installed XLA writes it."""

    def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ x), None

    def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(inner, x, length=6)[0] + 1, None

    compiled = jax.jit(lambda x: jax.lax.scan(outer, x, length=4)[0]).lower(jnp.ones((32, 32))).compile()
    calls = list(hlo.parse(compiled.as_text()).calls())
    assert max(call.times for call in calls) == 24
    assert all(call.certain for call in calls)
