"""Shows a plan as tables for people and as a dict for programs."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from phi3_jax.plan.collectives import Collective
from phi3_jax.plan.planning import Plan
from phi3_jax.plan.roofline import Roofline


def to_dict(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON's types.

    A key ends in its unit; bytes and FLOPs are of one chip unless the key ends in "total". `memory.source` is
    "compiler", or "shapes" for an estimate; its `parts_bytes` add up to `needed_bytes`, and `free_bytes` is
    negative where the step does not fit. `gradient_sum_bytes` is what a training step in several batches, of
    different widths, needs besides. `compiler` and `collectives` are null where nothing was compiled;
    equal collectives share one entry. `others` has the other meshes, best first.
    """
    program = plan.program
    return {
        "work": _work(plan),
        "topology": _topology(plan),
        "mesh": dict(plan.mesh),
        "fits": plan.fits,
        "problem": plan.problem,
        "memory": {
            "source": "compiler" if plan.compiled else "shapes",
            "parts_bytes": dict(_parts(plan)),
            "needed_bytes": plan.needed_bytes,
            "usable_bytes": plan.usable_bytes,
            "free_bytes": plan.usable_bytes - plan.needed_bytes,
            "gradient_sum_bytes": plan.analytic.gradient_sum_bytes,
        },
        "flops": _flops(plan),
        "traffic": {
            "hbm_bytes": plan.analytic.hbm_traffic_bytes,
            "link_bytes": _link_bytes(plan),
            "waiting_link_bytes": None if program is None else program.waiting_link_bytes,
        },
        "roofline": _roofline(plan.roofline),
        "compiler": None
        if program is None
        else {
            "seconds": program.compile_seconds,
            "flops": program.compiler_flops,
            "accessed_bytes": program.compiler_bytes,
            "estimated_cycles": dict(program.cycles),
        },
        "collectives": None if program is None else [_collective(one) for one in program.collectives],
        "others": [_short(other) for other in plan.others],
    }


def _work(plan: Plan) -> dict[str, Any]:
    work = plan.work
    return {
        "model_parameters_total": plan.analytic.parameters,
        "trained_parameters_total": plan.analytic.trained_parameters,
        "layers": work.config.num_hidden_layers,
        "task": work.task,
        "batch_rows": work.batch,
        "seq_tokens": work.seq,
        "dtype": work.dtype,
        "quantization": work.quantization,
        "cache_dtype": work.cache_dtype or work.dtype,
        "optimizer_dtype": work.optimizer_dtype,
        "lora_rank": work.lora,
        "remat": work.remat,
    }


def _topology(plan: Plan) -> dict[str, Any]:
    topology, chip = plan.topology, plan.topology.chip
    return {
        "name": topology.name,
        "chip": chip.title,
        "devices": topology.devices,
        "usable_hbm_bytes": chip.hbm_bytes,
        "peak_flops_per_second": chip.flops_per_s,
        "hbm_bytes_per_second": chip.hbm_bytes_per_s,
        "link_bytes_per_second": topology.link_bytes_per_s,
    }


def _flops(plan: Plan) -> dict[str, Any]:
    flops = plan.analytic.flops
    return {
        "model_total": flops.model,
        "hardware_total": flops.hardware,
        "recomputed_total": flops.recomputed,
        "attention_total": flops.attention,
        "hardware_per_chip": flops.hardware / plan.topology.devices,
    }


def _roofline(bound: Roofline) -> dict[str, Any]:
    return {
        "step_seconds": bound.step_seconds,
        "limited_by": bound.limited_by,
        "compute_seconds": bound.compute_seconds,
        "hbm_seconds": bound.hbm_seconds,
        "link_seconds": bound.link_seconds,
        "waiting_link_seconds": bound.waiting_link_seconds,
        "intensity_flops_per_byte": bound.intensity,
        "ridge_flops_per_byte": bound.ridge,
        "tokens_per_second": bound.tokens_per_second,
        "model_flops_share": bound.flops_share,
    }


def _collective(one: Collective) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "count_per_step": one.count,
        "payload_bytes": one.payload_bytes,
        "traffic_bytes_per_step": one.count * one.traffic_bytes,
        "group_size": one.group_size,
        "mesh_axes": None if one.axes is None else list(one.axes),
        "asynchronous": one.asynchronous,
        "dtypes": list(one.dtypes),
        "source": one.source,
        "count_is_certain": one.certain,
    }


def _short(plan: Plan) -> dict[str, Any]:
    return {
        "mesh": dict(plan.mesh),
        "fits": plan.fits,
        "compiled": plan.compiled,
        "needed_bytes": plan.needed_bytes,
        "step_seconds": plan.roofline.step_seconds,
        "limited_by": plan.roofline.limited_by,
        "tokens_per_second": plan.roofline.tokens_per_second,
        "problem": plan.problem,
    }


def _parts(plan: Plan) -> Iterator[tuple[str, int]]:
    """Yields one chip's bytes by purpose; those of a compiled program add up to all that it needs."""
    analytic, program = plan.analytic, plan.program
    shapes = {
        "parameters": analytic.parameter_bytes,
        "optimizer": analytic.optimizer_bytes,
        "cache": analytic.cache_bytes,
        "batch": analytic.batch_bytes,
    }
    known = {name: size for name, size in (plan.part_bytes or shapes).items() if size}
    yield from known.items()
    if program is None:
        # Only the sum is known of a refused program; what the arguments leave of it are temporaries.
        rest = plan.needed_bytes - sum(known.values()) if plan.refusal else analytic.temporary_bytes
        yield "temporaries", max(0, rest)
        return
    memory = program.memory
    kept = memory.argument_bytes + memory.output_bytes - memory.alias_bytes
    yield "other arguments, outputs, padding", kept - sum(known.values())
    yield "code", memory.code_bytes
    yield "temporaries", memory.temporary_bytes


def render(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    console.print(_title(plan), highlight=False)
    console.print(_memory_table(plan))
    console.print(_bound_table(plan))
    if plan.program is not None:
        if plan.program.cycles:
            console.print(_cycle_table(plan.program.cycles))
        if plan.program.collectives:
            console.print(_collective_table(plan))
        else:
            console.print("No collectives.")
    if plan.others:
        console.print(_mesh_table(plan))
    for line in _notes(plan):
        console.print(line, highlight=False)


def _title(plan: Plan) -> str:
    work, free = plan.work, plan.usable_bytes - plan.needed_bytes
    verdict = f"fits, {_bytes(free)} free a chip" if plan.fits else f"does not fit, by {_bytes(-free)} a chip"
    if plan.problem is not None:
        verdict = plan.problem
    lora = f", LoRA rank {work.lora}" if work.lora else ""
    weights = f", weights {work.quantization}" if work.quantization else ""
    what = f"{work.task} of {work.batch} x {work.seq:,} tokens{lora}{weights}"
    return f"{what} on {plan.topology.name}, mesh {plan.mesh_text}: {verdict}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("", "what", "mesh", "axes", "kind", "from") else "right"
        )
    return table


def _memory_table(plan: Plan) -> Table:
    table = _table("Memory of one chip" + ("" if plan.compiled else ", from shapes"), "what", "GiB", "%")
    for name, size in _parts(plan):
        table.add_row(name, _gib(size), f"{100 * size / plan.usable_bytes:.1f}")
    table.add_section()
    table.add_row("needed", _gib(plan.needed_bytes), f"{100 * plan.needed_bytes / plan.usable_bytes:.1f}")
    table.add_row("usable", _gib(plan.usable_bytes), "100.0")
    return table


def _bound_table(plan: Plan) -> Table:
    bound, analytic = plan.roofline, plan.analytic
    table = _table("Least time of a step", "what", "one chip's", "ms", "% of bound")
    flops = analytic.flops.hardware / plan.topology.devices
    rows = (
        ("arithmetic", f"{flops / 1e12:,.3f} TFLOP", bound.compute_seconds),
        ("HBM", f"{analytic.hbm_traffic_bytes / 1e9:,.3f} GB", bound.hbm_seconds),
        ("links", f"{_link_bytes(plan) / 1e9:,.3f} GB", bound.link_seconds),
    )
    for name, amount, seconds in rows:
        table.add_row(name, amount, _ms(seconds), f"{100 * bound.share(seconds):.1f}")
    table.add_section()
    table.add_row(f"bound, by {bound.limited_by}", "", _ms(bound.step_seconds), "")
    if bound.waiting_link_seconds:
        table.add_row("links while nothing else runs", "", _ms(bound.waiting_link_seconds), "")
    table.add_row("intensity, FLOP a byte", f"{bound.intensity:,.1f} of {bound.ridge:,.0f}", "", "")
    table.add_row("tokens a second, all chips", f"{bound.tokens_per_second:,.0f}", "", "")
    table.add_row("model FLOPs utilisation at the bound", f"{100 * bound.flops_share:.1f} %", "", "")
    return table


def _cycle_table(cycles: Mapping[str, int]) -> Table:
    table = _table("Estimated cycles of one chip", "kind", "thousands", "%")
    total = sum(cycles.values())
    for kind, count in cycles.items():
        table.add_row(kind, f"{count / 1e3:,.0f}", f"{100 * count / total:.1f}")
    return table


def _collective_table(plan: Plan) -> Table:
    assert plan.program is not None
    table = _table("Collectives of a step", "kind", "axes", "runs", "MB each", "MB sent", "async", "from")
    for one in plan.program.collectives:
        axes = "?" if one.axes is None else ",".join(one.axes) or "none"
        runs = f"{one.count:,}" + ("" if one.certain else "+")
        sent = one.count * one.traffic_bytes / 1e6
        asynchronous = "yes" if one.asynchronous else "no"
        table.add_row(
            one.kind, axes, runs, f"{one.payload_bytes / 1e6:,.3f}", f"{sent:,.1f}", asynchronous, one.source
        )
    return table


def _mesh_table(plan: Plan) -> Table:
    table = _table(
        "Meshes, best first", "mesh", "fits", "needed GiB", "bound ms", "by", "tokens/s", "compiled"
    )
    for one in (plan, *plan.others):
        fits = "-" if one.problem else "yes" if one.fits else "no"
        numbers = (_gib(one.needed_bytes), _ms(one.roofline.step_seconds), one.roofline.limited_by)
        tokens = f"{one.roofline.tokens_per_second:,.0f}"
        seconds = f"{one.program.compile_seconds:.0f} s" if one.program else None
        compiled = one.problem or seconds or ("refused" if one.refusal else "no")
        table.add_row(one.mesh_text, fits, *numbers, tokens, compiled)
    return table


def _link_bytes(plan: Plan) -> float:
    return plan.analytic.link_bytes if plan.program is None else plan.program.link_bytes


def _notes(plan: Plan) -> Iterator[str]:
    if plan.remat_choice is not None:
        yield f"{plan.remat_choice}."
    if plan.program is not None:
        yield f"Compiled in {plan.program.compile_seconds:.1f} s."
        if any(not one.certain for one in plan.program.collectives):
            yield "+: in a loop whose trip count could not be read, and counted once."
    if plan.refusal is not None:
        yield f"The compiler refused after {plan.refusal.compile_seconds:.1f} s: {plan.refusal.message}"
    if not plan.compiled:
        yield "Not compiled: parameters, optimizer and cache are exact, temporaries and traffic estimates."
    if plan.analytic.gradient_sum_bytes:
        sums = _bytes(plan.analytic.gradient_sum_bytes)
        yield f"Training on rows of several widths holds the sums of gradients besides: {sums} a chip."
    if plan.topology.chip.devices_per_chip > 1:
        yield f"Numbers of a chip are those of one of its {plan.topology.chip.devices_per_chip} JAX devices."


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"
