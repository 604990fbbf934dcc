"""Tests plans of quantized weights: bytes from shapes, and the compiler's estimate of cycles."""

import re
from math import prod

import pytest

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.costs.chips import topology
from phi3_jax.errors import UserError
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.plan import Work, hlo
from phi3_jax.plan.absent import absent_devices
from phi3_jax.plan.analytic import analyse
from phi3_jax.plan.cycles import PRODUCTS, estimated_cycles
from phi3_jax.plan.roofline import roofline
from phi3_jax.plan.steps import abstract_step

MINI = Phi3Config.preset("phi-3-mini-4k-instruct").replace(num_hidden_layers=1)


PROJECTIONS = 3072 * (9216 + 3072 + 16384 + 8192)
"""The elements of a layer's weights."""


def work(quantization, **changes):
    return Work(MINI, **{"task": "decode", "batch": 8, "seq": 256, "quantization": quantization} | changes)


@pytest.mark.parametrize(
    ("quantization", "share"),
    [
        ("int8", 0.5),
        ("int4:group_size=128", 0.25 * 1.0625),
        ("int4:group_size=128,symmetric=false", 0.25 * 1.125),
    ],
)
def test_bytes_of_projections(quantization, share):
    def projections(quantization):
        whole = analyse(work(quantization), {}).parameter_bytes
        rest = (2 * MINI.vocab_size + 3) * MINI.hidden_size * 2
        return whole - rest

    assert projections(quantization) / projections(None) == pytest.approx(share, rel=2e-3)


def test_adapters_on_quantized_weights_train_alone():
    tuned = analyse(work("int8", task="finetune", lora=8), {})
    assert tuned.trained_parameters == analyse(work(None, task="finetune", lora=8), {}).trained_parameters
    saved = analyse(work(None), {}).parameter_bytes - analyse(work("int8"), {}).parameter_bytes
    floats = analyse(work(None, task="finetune", lora=8), {}).parameter_bytes
    assert floats - tuned.parameter_bytes == saved > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "finetune"}, "integers are not trained; add adapters"),
        ({"quantization": "int5"}, "'int5' is not known"),
    ],
)
def test_rejects_work(changes, message):
    with pytest.raises(UserError, match=message):
        work(**{"quantization": "int8"} | changes)


@pytest.mark.parametrize(
    ("changes", "sizes", "repeated"),
    [
        ({}, PROJECTIONS, 0),
        ({"quantization": "int8:activations=int8,skip=o_proj+lm_head"}, PROJECTIONS - 3072 * 3072, 0),
        ({"task": "finetune", "lora": 8}, PROJECTIONS, PROJECTIONS - 3072 * 8192),
        ({"task": "finetune", "lora": 8, "remat": "attention"}, PROJECTIONS, 3072 * 16384),
        ({"task": "finetune", "lora": 8, "remat": "none"}, PROJECTIONS, 0),
    ],
)
def test_int8_activations_halve_the_time_of_forward_products(changes, sizes, repeated):
    """On chips that multiply int8 twice as fast; gradients are products of bfloat16."""
    changes = {"task": "prefill", "quantization": "int8:activations=int8"} | changes
    rounded = analyse(work(**changes), {}).flops
    plain = analyse(work(**changes | {"quantization": None}), {}).flops
    found = {speed: rounded.seconds(1, speed, recomputed=True) for speed in (1, 2)}
    assert found[1] == plain.seconds(1, 2, recomputed=True) == plain.hardware
    assert found[1] - found[2] == 8 * 256 * (sizes + repeated)
    assert rounded.model - rounded.seconds(1, 2, recomputed=False) == 8 * 256 * sizes


def test_a_rounded_head_multiplies_int8():
    heads = [f"int8:activations=int8,skip={skip}" for skip in ("none", "lm_head")]
    with_head, without = (analyse(work(text, task="prefill"), {}).flops.int8 for text in heads)
    assert with_head - without == 2 * 8 * 3072 * MINI.vocab_size


def test_bounds_use_the_rate_of_int8():
    def seconds(quantization, chips):
        one = work(quantization, task="prefill", seq=2048)
        return roofline(one, topology(chips), analyse(one, {})).compute_seconds

    assert seconds("int8:activations=int8", "v5e:1x1") < 0.6 * seconds("int8", "v5e:1x1")
    assert seconds("int8:activations=int8", "v4:1x1x1") == seconds("int8", "v4:1x1x1")


TEXT = """
HloModule m
%fused (p: bf16[8,8]) -> f32[8,8] {
  %p = bf16[8,8] parameter(0)
  ROOT %c = f32[8,8] convolution(%p, %p), backend_config={"estimated_cycles":"7"}
}
ENTRY %main (x: bf16[8,8]) -> f32[8,8] {
  %x = bf16[8,8] parameter(0)
  %a = f32[8,8] fusion(%x), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"100","x":1}
  %b = f32[8,8] copy(%a), backend_config={"estimated_cycles":"30"}
  ROOT %r = f32[8,8] add(%b, %b), backend_config={"estimated_cycles":"5"}
}
"""


def test_sums_cycles_by_kind_of_operation():
    assert estimated_cycles(TEXT) == {PRODUCTS: 100, "copies": 30, "all else": 5}


def compile_step(quantization, task="decode", batch=8, seq=256):
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = MINI.replace(num_hidden_layers=4, vocab_size=1024, **tokens)
    mesh = make_mesh("tensor=1", absent_devices(topology("v5e:1x1")))
    step = abstract_step(Work(config, task, batch, seq, quantization=quantization), mesh)
    return step.function.lower(*step.arguments).compile()


@pytest.fixture(scope="module")
def cycles_of_floats():
    """Returns the estimated cycles of a decode step's products in bfloat16."""
    pytest.importorskip("libtpu", reason="the compiler for TPUs (extra: tpu) is not installed")
    return estimated_cycles(compile_step(None).as_text())[PRODUCTS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "share"),
    [
        ("int8", 0.45),
        ("int8:activations=int8", 0.40),
        ("int4:group_size=none", 0.35),
        ("int4:group_size=128", 0.40),
    ],
)
def test_products_of_a_decode_step_take_less_on_v5e(cycles_of_floats, quantization, share):
    """The compiler widens integers within the products, and never writes a wider weight to memory.

    With more layers the shares are smaller: the first products wait for their weights.
    """
    small = compile_step(quantization)
    assert estimated_cycles(small.as_text())[PRODUCTS] <= share * cycles_of_floats
    memory = small.memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * memory.argument_size_in_bytes
    module = hlo.parse(small.as_text())
    floats_of_entry = [
        (one.name, sizes)
        for one in module.computations[module.entry].instructions.values()
        for sizes in re.findall(r"\b(?:bf16|f32)\[([\d,]+)\]", one.shape)
    ]
    smallest = 3072 * 3072  # the elements of o_proj
    assert [one for one in floats_of_entry if prod(map(int, one[1].split(","))) >= smallest] == []


@pytest.mark.slow
@pytest.mark.usefixtures("cycles_of_floats")  # which needs the compiler
def test_products_of_a_prefill_with_int8_activations_take_half_on_v5e():
    """The compiler multiplies int8 by int8, and applies the scales within the product."""
    prefills = (compile_step(text, "prefill", 1, 2048) for text in ("int8:activations=int8", "int8"))
    rounded, plain = (estimated_cycles(step.as_text())[PRODUCTS] for step in prefills)
    assert rounded < 0.55 * plain
