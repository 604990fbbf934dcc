"""`phi3-jax bench`: prefill and decode measured side by side with transformers on the same weights.

Each side runs in a process of its own and they take turns, so that neither's idle threads slow the other and
both see the same noise; ratios are taken turn by turn.
"""

import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from phi3_jax.config import Phi3Config

PAUSE = 0.5
"""Seconds before a turn, in which the other side's OpenMP threads stop spinning."""


@dataclass(frozen=True)
class Work:
    """What is measured."""

    model: Path
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int

    def prompt(self, vocab_size: int) -> np.ndarray:
        ids = np.random.default_rng(0).integers(4, vocab_size, (self.batch, self.prompt_tokens))
        return ids.astype(np.int32)


Turn = Callable[[], tuple[float, float]]
"""Runs once and gives the seconds of the prefill and of all decode steps."""


def run_bench(
    model: str | None,
    *,
    layers: int | None,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    rounds: int,
    dtype: str,
    cache_dir: Path | None,
) -> None:
    """Measures and prints a table; see the command's help for the arguments."""
    with tempfile.TemporaryDirectory(prefix="phi3-jax-bench-") as scratch:
        path = _model_path(model, layers, dtype, Path(scratch) / "model", cache_dir)
        work = Work(path, dtype, batch, prompt_tokens, new_tokens)
        sides: dict[str, Callable[[Work], Turn]] = {"phi3-jax": _ours}
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            sides["transformers"] = _theirs
        results = _take_turns(sides, work, rounds)
        _print_table(model or path.name, results, work, Phi3Config.from_pretrained(path))


def _model_path(
    model: str | None, layers: int | None, dtype: str, scratch: Path, cache_dir: Path | None
) -> Path:
    """The checkpoint to measure; for a preset, one with random weights is written to `scratch`."""
    from phi3_jax.checkpoint import default_model, resolve
    from phi3_jax.model import Phi3ForCausalLM

    if model in Phi3Config.presets():
        config = Phi3Config.preset(model)
        config = config if layers is None else config.replace(num_hidden_layers=layers)
        Phi3ForCausalLM(config, dtype=dtype).save_pretrained(scratch)
        return scratch
    if layers is not None:
        raise ValueError(f"--layers cuts a preset; {model or 'the default model'} is a checkpoint")
    return default_model(cache_dir) if model is None else resolve(model)


def _take_turns(
    sides: dict[str, Callable[[Work], Turn]], work: Work, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    try:
        for name, side in sides.items():
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, side, work), daemon=True)
            process.start()
            there.close()
            workers[name] = (process, here)
            _ask(name, here)  # loaded, compiled and warm before the next one starts
        for _ in range(rounds):
            for name, (_, connection) in workers.items():
                time.sleep(PAUSE)
                connection.send("run")
                results[name].append(_ask(name, connection))
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join(timeout=10)
            process.terminate()
    return results


def _ask(name: str, connection: Connection) -> Any:
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures {name} died; is there enough memory?") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(connection: Connection, side: Callable[[Work], Turn], work: Work) -> None:
    """In a worker: gets ready, runs once to warm up, then once for each message."""
    try:
        turn = side(work)
        turn()
        connection.send("ready")
        while True:
            connection.recv()
            connection.send(turn())
    except EOFError:
        return
    except Exception as error:  # handed to the parent, which raises it
        connection.send(error)


def _ours(work: Work) -> Turn:
    import jax

    from phi3_jax.generation import CompiledModel, Sampling
    from phi3_jax.generation.step import cache_length
    from phi3_jax.model import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(work.model, dtype=work.dtype)
    compiled = CompiledModel(model)
    ids = work.prompt(model.config.vocab_size)
    slots = cache_length(work.prompt_tokens + work.new_tokens)
    rope_length = np.full((work.batch,), work.prompt_tokens, np.int32)
    one = np.ones((work.batch, 1), np.int32)

    def turn() -> tuple[float, float]:
        cache = jax.block_until_ready(model.init_cache(work.batch, slots))
        start = time.perf_counter()
        token, cache = compiled.step(ids, np.ones_like(ids), cache, rope_length, None, Sampling())
        token.block_until_ready()
        middle = time.perf_counter()
        for _ in range(work.new_tokens):
            token, cache = compiled.step(token[:, None], one, cache, rope_length, None, Sampling())
        token.block_until_ready()
        return middle - start, time.perf_counter() - middle

    return turn


def _theirs(work: Work) -> Turn:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, work.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    ids = torch.tensor(work.prompt(model.config.vocab_size), dtype=torch.long, device=model.device)

    def turn() -> tuple[float, float]:
        with torch.inference_mode():
            start = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            token.cpu()
            middle = time.perf_counter()
            for _ in range(work.new_tokens):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            token.cpu()
            return middle - start, time.perf_counter() - middle

    return turn


def _print_table(
    label: str, results: dict[str, list[tuple[float, float]]], work: Work, config: Phi3Config
) -> None:
    table = Table(
        title=f"{label}, {config.num_hidden_layers} layers, {work.dtype}, batch {work.batch}, "
        f"{work.prompt_tokens}-token prompt, {work.new_tokens} steps, median of {len(results['phi3-jax'])}"
    )
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    if len(results) == 2:
        table.add_column("ratio", justify="right")

    prefill, decode = [
        {name: [run[part] for run in runs] for name, runs in results.items()} for part in (0, 1)
    ]
    prompt = work.batch * work.prompt_tokens
    made = work.batch * work.new_tokens
    moved = work.new_tokens * _bytes_a_step(config, work)
    _add_row(table, "prefill, tokens/s", prefill, lambda seconds: f"{prompt / seconds:,.0f}", ratio=True)
    _add_row(table, "decode, tokens/s", decode, lambda seconds: f"{made / seconds:,.1f}", ratio=True)
    _add_row(table, "decode, ms a step", decode, lambda seconds: f"{1e3 * seconds / work.new_tokens:,.1f}")
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


def _bytes_a_step(config: Phi3Config, work: Work) -> float:
    """Weights that a decode step reads, and the cached keys and values at the middle of the run."""
    width = 4 if work.dtype == "float32" else 2
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = (heads + config.num_attention_heads) * config.head_dim * config.hidden_size
    layer = attention + 3 * config.intermediate_size * config.hidden_size
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    cached = work.batch * (work.prompt_tokens + work.new_tokens / 2) * config.num_hidden_layers
    return width * (weights + cached * 2 * config.num_key_value_heads * config.head_dim)
