"""Tests whole plans: memory, bounds, the search for a mesh, the report."""

import io
import json
from dataclasses import replace

import jax
import pytest
from jax.sharding import Mesh
from rich.console import Console
from toy_step import FFN, HIDDEN, LAYERS, needs_libtpu, toy_step

from phi3_jax import Phi3Config
from phi3_jax.costs.shapes import lora_parameters
from phi3_jax.errors import UserError
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.plan import AbstractStep, Plan, Work, plan, render, to_dict, topology
from phi3_jax.plan.analytic import analyse
from phi3_jax.plan.collectives import Collective
from phi3_jax.plan.program import Memory, Program, Refusal
from phi3_jax.plan.roofline import roofline
from phi3_jax.plan.search import obstacles, sensible_meshes
from phi3_jax.plan.steps import abstract_step

ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
MINI = Phi3Config.preset("phi-3-mini-4k-instruct")
MEDIUM = Phi3Config.preset("phi-3-medium-4k-instruct")


def rendered(planned: Plan) -> str:
    out = io.StringIO()
    render(planned, Console(file=out, width=160))
    return out.getvalue()


def program(*, asynchronous: bool = True, temporary_bytes: int = 1000) -> Program:
    memory = Memory(5000, 3000, 2500, temporary_bytes, 100)
    gather = Collective(
        "all-gather", 64, 10**9, 9e8, 8, ("fsdp",), asynchronous, ("bf16",), "layer/dot", False
    )
    return Program(memory, (gather,), 1e9, 2e9, 12.5)


def test_roofline_matches_a_bound_by_hand() -> None:
    """A decode step of mini at batch 1 on one h100 reads 7.4 GB of weights at 3.35 TB/s, and little else."""
    work = Work(MINI, "decode", 1, 1)
    analytic = analyse(work, ONE)
    bound = roofline(work, topology("h100"), analytic)
    weights = (analytic.parameters - 32064 * 3072) * 2
    assert bound.limited_by == "HBM"
    assert bound.step_seconds == pytest.approx(weights / 3350e9, rel=0.01)
    assert bound.tokens_per_second == pytest.approx(1 / bound.step_seconds)
    assert bound.intensity == pytest.approx(1, rel=0.02)
    assert bound.compute_seconds == pytest.approx(analytic.flops.model / 989.4e12)
    assert bound.link_seconds == 0


def test_training_is_limited_by_compute() -> None:
    """A parameter and token take 6 FLOPs. Remat repeats 2 for most, not for down_proj and the head."""
    work = Work(MINI, "finetune", 16, 4096)
    bound = roofline(work, topology("h100:8"), analyse(work, {**ONE, "fsdp": 8}))
    assert bound.limited_by == "compute"
    assert bound.flops_share == pytest.approx(0.795, abs=0.005)
    without = Work(MINI, "finetune", 16, 4096, remat="none")
    assert roofline(without, topology("h100:8"), analyse(without, {**ONE, "fsdp": 8})).flops_share == 1


def test_link_seconds_follow_from_the_program() -> None:
    work, chips = Work(MINI, "decode", 8, 4096), topology("v5e:2x4")
    analytic = analyse(work, {**ONE, "fsdp": 8})
    bound = roofline(work, chips, analytic, program())
    assert bound.link_seconds == pytest.approx(64 * 9e8 / 150e9)  # three links of 50 GB/s at each chip
    assert bound.waiting_link_seconds == 0
    assert bound.limited_by == "links"
    assert (
        roofline(work, chips, analytic, program(asynchronous=False)).waiting_link_seconds
        == bound.link_seconds
    )


def test_total_memory_of_a_program_counts_aliases_once() -> None:
    assert program().memory.total_bytes == 5000 + 500 + 1000 + 100


@pytest.mark.parametrize("devices", [1, 2, 8, 16, 32])
@pytest.mark.parametrize("task", ["finetune", "decode"])
def test_meshes_of_the_search_divide_the_work(devices: int, task: str) -> None:
    meshes = sensible_meshes(Work(MEDIUM, task, 32, 4096), devices)  # type: ignore[arg-type]
    assert meshes
    for mesh in meshes:
        assert mesh["data"] * mesh["fsdp"] * mesh["context"] * mesh["tensor"] == devices
        assert mesh["tensor"] in (1, 2)  # there are 10 key/value heads
        assert 32 % (mesh["data"] * mesh["fsdp"]) == 0
        assert mesh["context"] == 1


def test_obstacles_name_the_sizes_that_do_not_divide() -> None:
    assert obstacles(Work(MEDIUM, "decode", 3, 4096), {**ONE, "tensor": 4, "data": 2}) == [
        "num_key_value_heads",
        "batch",
    ]
    long = Work(Phi3Config.preset("phi-3.5-mini-instruct"), "prefill", 1, 131072)
    assert any(mesh["context"] == 16 for mesh in sensible_meshes(long, 16))
    with pytest.raises(UserError, match=r"tensor can be 1, 2, and data x fsdp must divide the batch"):
        sensible_meshes(Work(MEDIUM, "decode", 1, 4096), 8)


def test_gpus_are_planned_from_shapes() -> None:
    planned = plan(Work(MINI, "finetune", 16, 4096), "h100:8")
    assert planned.program is None
    assert not planned.compiled
    assert planned.fits
    assert len(planned.others) >= 5
    assert [one.fits for one in planned.others] == sorted((one.fits for one in planned.others), reverse=True)
    assert "Not compiled" in rendered(planned)
    assert not plan(Work(MEDIUM, "finetune", 16, 4096), "l4", "data=1").fits


def test_rejects_a_mesh_of_another_number_of_chips() -> None:
    work = Work(MINI, "decode", 8, 128)
    with pytest.raises(UserError, match=r"needs 8 devices and h100:4 has 4; .* multiply to 4, as in fsdp=4"):
        plan(work, "h100:4", "fsdp=4,tensor=2")
    assert plan(work, "h100:4", "fsdp=-1,tensor=2").mesh == {"data": 1, "fsdp": 2, "context": 1, "tensor": 2}
    with pytest.raises(UserError, match="axis"):
        plan(work, "h100:4", "model=4")


def plan_by_hand(**changes: object) -> Plan:
    work, chips = Work(MINI, "decode", 8, 4096), topology("v5e:2x4")
    mesh = {**ONE, "tensor": 8}
    analytic = analyse(work, mesh)
    parts = {"parameters": 4000, "cache": 700}
    values = {
        "program": program(),
        "part_bytes": parts,
        "roofline": roofline(work, chips, analytic),
    } | changes
    return Plan(work, chips, mesh, analytic, **values)  # type: ignore[arg-type]


def test_json_and_tables_agree() -> None:
    planned = plan_by_hand(others=(plan_by_hand(problem="no such step"),))
    report = to_dict(planned)
    assert json.loads(json.dumps(report)) == report
    assert report["fits"]
    memory = report["memory"]
    assert memory["parts_bytes"] == {
        "parameters": 4000,
        "cache": 700,
        "other arguments, outputs, padding": 800,
        "code": 100,
        "temporaries": 1000,
    }
    assert memory["needed_bytes"] == 6600
    assert memory["usable_bytes"] == int(15.75 * 2**30)
    assert memory["free_bytes"] == int(15.75 * 2**30) - 6600
    (gather,) = report["collectives"]
    assert (gather["count_per_step"], gather["traffic_bytes_per_step"]) == (64, 64 * 9e8)
    assert report["compiler"]["seconds"] == 12.5
    assert report["others"][0]["problem"] == "no such step"
    text = rendered(planned)
    for words in ("fits", "all-gather", "fsdp", "64+", "no such step", "Compiled in 12.5 s", "counted once"):
        assert words in text


def test_a_refusal_is_a_plan() -> None:
    refusal = Refusal(24 * 2**30, int(15.75 * 2**30), 3.0, "RESOURCE_EXHAUSTED: too big")
    planned = plan_by_hand(program=None, refusal=refusal)
    assert not planned.fits
    assert planned.compiled
    report = to_dict(planned)
    assert report["memory"]["free_bytes"] == -8.25 * 2**30
    assert report["memory"]["source"] == "compiler"
    assert report["collectives"] is None
    assert "does not fit, by 8.25 GiB a chip" in rendered(planned)


@needs_libtpu
def test_memory_of_a_step_compiled_for_v5e(small: Phi3Config) -> None:
    """Donated weights are no new outputs, and the parts follow from the shardings."""
    planned = plan(Work(small, "finetune", 64, 16), "v5e:2x2", "fsdp=4", build=toy_step)
    assert planned.fits
    assert planned.program is not None
    assert planned.part_bytes == {
        "parameters": 2 * LAYERS * HIDDEN * FFN * 2 // 4,
        "batch": 64 * 16 // 4 * HIDDEN * 2,
    }
    memory = planned.program.memory
    assert memory.alias_bytes == planned.part_bytes["parameters"]
    assert memory.argument_bytes == sum(planned.part_bytes.values())
    assert memory.total_bytes < sum(planned.part_bytes.values()) + 2**28
    assert to_dict(planned)["memory"]["source"] == "compiler"
    assert "all-gather" in rendered(planned)


@needs_libtpu
@pytest.mark.filterwarnings("error")
def test_compiling_again_reads_no_compilation_cache(small: Phi3Config) -> None:
    """JAX cannot read a program for an absent device, and warns when it tries."""
    assert jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # set at run time
    work = Work(small, "finetune", 64, 16)
    first, second = (plan(work, "v5e:2x2", "fsdp=4", build=toy_step).program for _ in range(2))
    assert first is not None
    assert second is not None
    assert replace(first, compile_seconds=0.0) == replace(second, compile_seconds=0.0)


@needs_libtpu
def test_a_step_that_is_too_big_for_v5e_is_refused(small: Phi3Config) -> None:
    planned = plan(Work(small, "finetune", 2**17, 128), "v5e:1x1", "data=1", build=toy_step)
    assert planned.refusal is not None
    assert not planned.fits
    assert planned.needed_bytes > planned.usable_bytes
    assert "does not fit, by" in rendered(planned)


@pytest.mark.slow
@needs_libtpu
def test_the_search_compiles_the_best_meshes_and_ranks_all(small: Phi3Config) -> None:
    """Three meshes of four chips are compiled; a mesh that the step rejects comes last, with the reason."""
    tried = []

    def build(work: Work, mesh: Mesh) -> AbstractStep:
        tried.append(mesh)
        if len(tried) == 1:
            raise UserError("not on this mesh")
        return toy_step(work, mesh)

    planned = plan(Work(small, "finetune", 64, 16), "v5e:2x2", compiled=3, build=build)
    assert planned.program is not None
    everything = (planned, *planned.others)
    assert [one.problem for one in everything[:-1]] == [None] * (len(everything) - 1)
    assert everything[-1].problem == "not on this mesh"
    assert [one.program is not None for one in everything[:3]] == [True, True, False]
    compiled = [one.roofline.step_seconds for one in everything if one.program is not None]
    assert compiled == sorted(compiled)
    assert "Meshes, best first" in rendered(planned)


def test_a_step_with_adapters_trains_only_them(small: Phi3Config) -> None:
    work, mesh = Work(small, "finetune", 2, 16, lora=4), make_mesh("fsdp=2", jax.devices()[:2])
    moments = jax.tree.leaves(abstract_step(work, mesh).parts["optimizer"])
    sizes = sum(leaf.size for leaf in moments if leaf.ndim > 0)
    assert sizes == 2 * lora_parameters(small, 4)


def test_an_error_of_the_step_reaches_the_caller(small: Phi3Config) -> None:
    pytest.importorskip("libtpu")

    def build(work: Work, mesh: Mesh) -> AbstractStep:
        raise UserError("num_key_value_heads=2 does not divide over tensor=4")

    with pytest.raises(UserError, match="does not divide"):
        plan(Work(small, "finetune", 64, 16), "v5e:2x2", "tensor=4", build=build)
