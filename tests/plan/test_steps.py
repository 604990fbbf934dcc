"""Tests the collectives and the memory of the library's own steps, compiled for absent TPUs."""

import math

import pytest

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.plan import Work, plan
from phi3_jax.plan.analytic import analyse
from phi3_jax.plan.program import Program

pytest.importorskip("libtpu", reason="the compiler for TPUs (extra: tpu) is not installed")


def compiled(name, layers, topology, mesh, **work) -> Program:
    config = Phi3Config.preset(name).replace(num_hidden_layers=layers)
    program = plan(Work(config, **work), topology, mesh).program
    assert isinstance(program, Program)
    return program


def counts_of_collectives(program, least=0):
    """Returns how often each (kind, axes) runs, for collectives of at least `least` bytes."""
    counts = {}
    for one in program.collectives:
        assert one.certain
        if one.payload_bytes >= least:
            counts[one.kind, one.axes] = counts.get((one.kind, one.axes), 0) + one.count
    return counts


def test_a_decode_step_has_two_all_reduces_a_layer_and_gathers_the_logits():
    program = compiled("phi-3-mini-4k-instruct", 3, "v5e:2x4", "tensor=8", task="decode", batch=8, seq=4096)
    assert counts_of_collectives(program) == {("all-reduce", ("tensor",)): 6, ("all-gather", ("tensor",)): 1}
    assert program.memory.temporary_bytes < 0.05 * program.memory.argument_bytes


@pytest.mark.slow
def test_a_tied_embedding_takes_one_more_all_reduce():
    program = compiled("phi-4-mini-instruct", 2, "v5e:2x4", "tensor=8", task="decode", batch=8, seq=4096)
    assert counts_of_collectives(program)["all-reduce", ("tensor",)] == 5


@pytest.mark.slow
def test_temporaries_of_a_long_prefill_grow_with_its_length():
    """Twice the tokens take twice the temporaries; with a T x T mask of bytes it would be 2.3 times."""

    def temporaries(length):
        program = compiled(
            "phi-3.5-mini-instruct", 2, "v5e:1x1", "tensor=1", task="prefill", batch=1, seq=length
        )
        assert program.collectives == ()
        return program.memory.temporary_bytes

    assert temporaries(32768) < 2.1 * temporaries(16384)


@pytest.mark.slow
def test_context_parallelism_gathers_keys_and_values_once_a_layer():
    length = 131072
    program = compiled(
        "phi-3.5-mini-instruct", 2, "v5e:2x4", "context=8", task="prefill", batch=1, seq=length
    )
    keys = length * 3072 * 2  # bytes of one layer's keys or values
    # The last layer has a single query: its keys stay in place, and the partial results are summed.
    assert counts_of_collectives(program, keys) == {("all-gather", ("context",)): 2}
    assert program.memory.temporary_bytes < length * length


@pytest.mark.slow
def test_a_training_step_gathers_each_parameter_once_forward_and_once_backward():
    layers, config = 3, Phi3Config.preset("phi-3-mini-4k-instruct")
    program = compiled(
        "phi-3-mini-4k-instruct", layers, "v5e:4x4", "fsdp=16", task="finetune", batch=16, seq=1024
    )
    hidden, mlp = config.hidden_size, config.intermediate_size
    weights = {3 * hidden * hidden, hidden * hidden, 2 * mlp * hidden, mlp * hidden}
    gathered = {}
    for one in program.collectives:
        if one.kind == "all-gather" and one.payload_bytes // 2 in weights:
            gathered[one.payload_bytes // 2] = gathered.get(one.payload_bytes // 2, 0) + one.count
            if one.payload_bytes // 2 in (2 * mlp * hidden, mlp * hidden):
                assert one.asynchronous
    assert gathered == dict.fromkeys(weights, 2 * layers)
    # No all-reduce has the size of a parameter.
    summed = [one for one in program.collectives if one.kind == "all-reduce"]
    assert all(one.payload_bytes < math.prod((hidden, 16)) for one in summed)
    permuted = [one for one in program.collectives if one.kind == "collective-permute"]
    assert all(one.asynchronous for one in permuted)


@pytest.mark.slow
def test_adapters_take_less_memory_than_all_parameters():
    lora = compiled(
        "phi-3-mini-4k-instruct", 2, "v5e:2x4", "fsdp=8", lora=16, task="finetune", batch=8, seq=128
    )
    config = Phi3Config.preset("phi-3-mini-4k-instruct").replace(num_hidden_layers=2)
    full = analyse(Work(config, "finetune", batch=8, seq=128), {"fsdp": 8})
    assert lora.memory.argument_bytes < 0.3 * (full.parameter_bytes + full.optimizer_bytes)
