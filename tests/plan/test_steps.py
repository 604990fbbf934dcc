"""The project's own steps, compiled for TPUs that are not here: what they move and what they keep."""

import math

import pytest

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.plan import Work, plan
from phi3_jax.plan.program import Program

pytest.importorskip("libtpu", reason="the compiler for TPUs (extra: tpu) is not installed")


def compiled(name, layers, topology, mesh, **work) -> Program:
    config = Phi3Config.preset(name).replace(num_hidden_layers=layers)
    made = plan(Work(config, **work), topology, mesh)
    assert isinstance(made.program, Program)
    return made.program


def moved(program, least=0):
    """(kind, axes) -> how often, of the collectives that bring at least so many bytes."""
    counts = {}
    for one in program.collectives:
        assert one.certain
        if one.payload_bytes >= least:
            counts[one.kind, one.axes] = counts.get((one.kind, one.axes), 0) + one.count
    return counts


def test_a_decode_step_moves_two_sums_a_layer_and_the_logits():
    program = compiled("phi-3-mini-4k-instruct", 3, "v5e:2x4", "tensor=8", task="decode", batch=8, seq=4096)
    assert moved(program) == {("all-reduce", ("tensor",)): 6, ("all-gather", ("tensor",)): 1}
    assert program.memory.temporary_bytes < 0.05 * program.memory.argument_bytes


@pytest.mark.slow
def test_a_tied_embedding_costs_one_more_sum():
    program = compiled("phi-4-mini-instruct", 2, "v5e:2x4", "tensor=8", task="decode", batch=8, seq=4096)
    assert moved(program)["all-reduce", ("tensor",)] == 5


@pytest.mark.slow
def test_a_long_prefill_keeps_nothing_of_tokens_times_tokens():
    """Twice the tokens take twice the temporaries; with a T x T mask, a byte each, it would be 2.3 times."""

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
    keys = length * 3072 * 2  # bytes of one layer's keys, or values
    # The last layer has a single query: its keys stay where they are, and what was found in them is summed.
    assert moved(program, keys) == {("all-gather", ("context",)): 2}
    assert program.memory.temporary_bytes < length * length


@pytest.mark.slow
def test_a_training_step_gathers_each_parameter_once_forward_and_once_backward():
    layers, config = 3, Phi3Config.preset("phi-3-mini-4k-instruct")
    program = compiled(
        "phi-3-mini-4k-instruct", layers, "v5e:4x4", "fsdp=16", task="finetune", batch=16, seq=4096
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
    # Nothing of a parameter's size is summed whole on every chip.
    summed = [one for one in program.collectives if one.kind == "all-reduce"]
    assert all(one.payload_bytes < math.prod((hidden, 16)) for one in summed)
    permuted = [one for one in program.collectives if one.kind == "collective-permute"]
    assert all(one.asynchronous for one in permuted)


@pytest.mark.slow
def test_adapters_fit_where_all_parameters_would_not():
    work = {"task": "finetune", "batch": 8, "seq": 1024}
    lora = compiled("phi-3-mini-4k-instruct", 2, "v5e:2x4", "fsdp=8", lora=16, **work)
    full = compiled("phi-3-mini-4k-instruct", 2, "v5e:2x4", "fsdp=8", **work)
    assert lora.memory.argument_bytes < 0.3 * full.memory.argument_bytes
