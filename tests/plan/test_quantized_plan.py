"""Tests plans of quantized weights: bytes from shapes, and the compiler's estimate of cycles."""

import pytest

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.plan import Work
from phi3_jax.plan.analytic import analyse
from phi3_jax.plan.cycles import PRODUCTS, estimated_cycles

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
