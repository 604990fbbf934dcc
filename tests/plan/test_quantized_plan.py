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
from phi3_jax.plan.steps import abstract_step

MINI = Phi3Config.preset("phi-3-mini-4k-instruct").replace(num_hidden_layers=1)


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


def compile_decode(quantization):
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = MINI.replace(num_hidden_layers=4, vocab_size=1024, **tokens)
    mesh = make_mesh("tensor=1", absent_devices(topology("v5e:1x1")))
    step = abstract_step(Work(config, "decode", 8, 256, quantization=quantization), mesh)
    return step.function.lower(*step.arguments).compile()


@pytest.fixture(scope="module")
def cycles_of_floats():
    """Returns the estimated cycles of a decode step's products in bfloat16."""
    pytest.importorskip("libtpu", reason="the compiler for TPUs (extra: tpu) is not installed")
    return estimated_cycles(compile_decode(None).as_text())[PRODUCTS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "share"), [("int8", 0.45), ("int4:group_size=none", 0.35), ("int4:group_size=128", 0.40)]
)
def test_products_of_a_decode_step_take_less_on_v5e(cycles_of_floats, quantization, share):
    """The compiler widens integers within the products, and never writes a wider weight to memory.

    With more layers the shares are smaller: the first products wait for their weights.
    """
    small = compile_decode(quantization)
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
