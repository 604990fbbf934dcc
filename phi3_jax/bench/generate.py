"""`phi3-jax bench`: generate measured side by side with transformers' on the same weights."""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from phi3_jax.bench.batch import run_batch_bench
from phi3_jax.bench.turns import Sides, Turn, take_turns, take_turns_here
from phi3_jax.checkpoint import resolve
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.generation import CompiledModel
from phi3_jax.generation.generate import Call
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.distributed import process_count
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.runs.allocator import keep_freed_memory
from phi3_jax.tokenizer import Phi3Tokenizer


@dataclass(frozen=True)
class Work:
    """What is measured: one call of generate, the time to its first token and that of the others."""

    model: Path
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    prompt: Path | None = None
    """A text that is answered, up to an end token, instead of random tokens that are continued."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further arguments of generate."""
    mesh: tuple[tuple[str, int], ...] = ()
    """Axes and sizes of a mesh over all devices; default: one device."""

    def ids(self, vocab_size: int) -> np.ndarray:
        if self.prompt is None:
            ids = np.random.default_rng(0).integers(4, vocab_size, (self.batch, self.prompt_tokens))
            return ids.astype(np.int32)
        messages = [{"role": "user", "content": self.prompt.read_text(encoding="utf-8")}]
        tokenizer = Phi3Tokenizer.from_pretrained(self.model)
        one = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return np.array([one] * self.batch, np.int32)


class Times(NamedTuple):
    """Of one run: seconds to the first token, seconds for the rest, and how many steps the rest took."""

    prefill: float
    decode: float
    steps: int


def run_bench(
    model: str | None,
    *,
    layers: int | None,
    prompt: Path | None,
    prompt_lookup: int | None,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    requests: int | None,
    rounds: int,
    dtype: str,
    mesh: Mesh | None = None,
    cache_dir: Path | None,
) -> None:
    """Measures and prints a table; see the command's help for the arguments.

    Raises:
        ValueError: `layers` of a checkpoint; a preset over several processes; requests on a mesh.
    """
    if requests is not None and (mesh is not None or prompt is not None or prompt_lookup is not None):
        raise UserError("--requests has prompts of its own, on one device: leave --mesh and --prompt out")
    several = process_count() > 1
    if several and model in Phi3Config.presets():
        raise UserError(f"{model} is a preset; over several processes give a checkpoint that all can read")
    with tempfile.TemporaryDirectory(prefix="phi3-jax-bench-") as scratch:
        path = _model_path(model, layers, dtype, Path(scratch) / "model", cache_dir)
        if requests is not None:
            run_batch_bench(path, model or path.name, requests=requests, rounds=rounds, dtype=dtype)
            return
        axes = () if mesh is None else tuple(mesh.shape.items())
        work = Work(path, dtype, batch, prompt_tokens, new_tokens, prompt, mesh=axes)
        sides: Sides = {"phi3-jax": (_ours, work)}
        if prompt_lookup is not None:
            lookup = replace(work, options=(("prompt_lookup_num_tokens", prompt_lookup),))
            sides = {f"lookup of {prompt_lookup}": (_ours, lookup), "plain": (_ours, work)}
        elif mesh is None and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            sides["transformers"] = (_theirs, work)
        results = (take_turns_here if several else take_turns)(sides, rounds)
        _print_table(model or path.name, results, work, Phi3Config.from_pretrained(path))


def _model_path(
    model: str | None, layers: int | None, dtype: str, scratch: Path, cache_dir: Path | None
) -> Path:
    """The checkpoint to measure; for a preset, one with random weights is written to `scratch`."""
    if model in Phi3Config.presets():
        config = Phi3Config.preset(model)
        config = config if layers is None else config.replace(num_hidden_layers=layers)
        Phi3ForCausalLM(config, dtype=dtype).save_pretrained(scratch)
        return scratch
    if layers is not None:
        raise UserError(f"--layers cuts a preset; {model or 'the default model'} is a checkpoint")
    return default_model(cache_dir) if model is None else resolve(model)


def _ours(work: Work) -> Turn:
    keep_freed_memory()  # as the commands do
    mesh = make_mesh(dict(work.mesh)) if work.mesh else None
    compiled = CompiledModel(Phi3ForCausalLM.from_pretrained(work.model, dtype=work.dtype, mesh=mesh))
    ids = work.ids(compiled.model.config.vocab_size)
    options: dict[str, Any] = {"max_new_tokens": work.new_tokens + 1, "do_sample": False}
    options |= dict(work.options)
    if work.prompt is None:
        options["eos_token_id"] = []

    def turn() -> Times:
        start = time.perf_counter()
        tokens = Call(compiled, ids, np.ones_like(ids), **options).run()
        next(tokens)
        middle = time.perf_counter()
        steps = sum(1 for _ in tokens)
        return Times(middle - start, time.perf_counter() - middle, steps)

    return turn


class _Clock:
    """A streamer for transformers that notes when tokens come; first comes the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _theirs(work: Work) -> Turn:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    dtype = getattr(torch, work.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    ids = torch.tensor(work.ids(model.config.vocab_size), dtype=torch.long, device=model.device)
    if work.prompt is None:
        model.generation_config.eos_token_id = None

    def turn() -> Times:
        clock, start = _Clock(), time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=work.new_tokens + 1,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        _, first, *_, last = clock.times
        return Times(first - start, last - first, len(clock.times) - 2)

    return turn


def _print_table(label: str, results: dict[str, list[Times]], work: Work, config: Phi3Config) -> None:
    length = work.ids(config.vocab_size).shape[1]
    ours = next(iter(results.values()))
    # In half precision a near tie may end one side's answer before the other's.
    steps = " and ".join(str(count) for count in dict.fromkeys(runs[0].steps for runs in results.values()))
    table = Table(
        title=f"{label}, {config.num_hidden_layers} layers, {work.dtype}, batch {work.batch}, "
        f"{length}-token prompt, {steps} steps, median of {len(ours)}"
    )
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    if len(results) == 2:
        table.add_column("ratio", justify="right")

    prompt = work.batch * length
    prefill = {name: [run.prefill for run in runs] for name, runs in results.items()}
    decode = {name: [run.decode / run.steps for run in runs] for name, runs in results.items()}
    moved = _bytes_a_step(config, work, length)
    _add_row(table, "prefill, tokens/s", prefill, lambda seconds: f"{prompt / seconds:,.0f}", ratio=True)
    _add_row(table, "decode, tokens/s", decode, lambda seconds: f"{work.batch / seconds:,.1f}", ratio=True)
    _add_row(table, "decode, ms a token", decode, lambda seconds: f"{1e3 * seconds:,.1f}")
    _add_row(table, "decode, GB/s read", decode, lambda seconds: f"{moved / seconds / 1e9:,.1f}")
    Console().print(table)


def _add_row(
    table: Table,
    label: str,
    seconds: dict[str, list[float]],
    show: Callable[[float], str],
    *,
    ratio: bool = False,
) -> None:
    """A row of medians and, with two sides, the median of the turns' ratios: above 1 ours is faster."""
    cells = [show(statistics.median(times)) for times in seconds.values()]
    if len(seconds) == 2:
        ours, theirs = seconds.values()
        turns = [other / mine for mine, other in zip(ours, theirs, strict=True)]
        cells.append(f"{statistics.median(turns):.2f}" if ratio else "")
    table.add_row(label, *cells)


def _bytes_a_step(config: Phi3Config, work: Work, prompt_tokens: int) -> float:
    """Weights that a decode step reads, and the cached keys and values at the middle of the run."""
    width = 4 if work.dtype == "float32" else 2
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = (heads + config.num_attention_heads) * config.head_dim * config.hidden_size
    layer = attention + 3 * config.intermediate_size * config.hidden_size
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    cached = work.batch * (prompt_tokens + work.new_tokens / 2) * config.num_hidden_layers
    return width * (weights + cached * 2 * config.num_key_value_heads * config.head_dim)
