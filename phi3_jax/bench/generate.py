"""Measures one call of `generate`, side by side with transformers or llama.cpp on the same weights."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from phi3_jax.bench.models import describe_products, describe_weights, load_llama, load_ours, load_theirs
from phi3_jax.bench.products import ProductSpeed, Speeds
from phi3_jax.bench.turns import Sides, Turn, choose_peer, median_ratio, take_turns, take_turns_here
from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.checkpoint.opening import gguf_file
from phi3_jax.errors import UserError
from phi3_jax.generation.generate import Call
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.abstract import abstract_cache
from phi3_jax.model.loading import load_abstract
from phi3_jax.parallel.distributed import process_count
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.tokenizer import Phi3Tokenizer


@dataclass(frozen=True)
class BenchOptions:
    """The call of `generate` to measure."""

    model: Path
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    prompt: Path | None = None
    """A text to answer, up to an end token; None: random tokens are continued."""
    generate_options: tuple[tuple[str, Any], ...] = ()
    """Further arguments of `generate`."""
    mesh: tuple[tuple[str, int], ...] = ()
    """The axes and sizes of a mesh over all devices; empty: one device."""
    quantization: str | None = None
    """How our weights are quantized, as `Quantization.parse` reads it."""

    def ids(self, vocab_size: int) -> np.ndarray:
        """Returns the tokens of the prompts, [batch, tokens]."""
        if self.prompt is None:
            ids = np.random.default_rng(0).integers(4, vocab_size, (self.batch, self.prompt_tokens))
            return ids.astype(np.int32)
        messages = [{"role": "user", "content": self.prompt.read_text(encoding="utf-8")}]
        tokenizer = Phi3Tokenizer.from_pretrained(self.model)
        row = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return np.array([row] * self.batch, np.int32)


class Times(NamedTuple):
    """The seconds to the first token and of the other steps, and the number of these steps."""

    prefill: float
    decode: float
    steps: int
    speeds: Speeds | None = None
    """Of our products alone and of memory, on one CPU."""


def run_generate_bench(
    options: BenchOptions, label: str, rounds: int, prompt_lookup: int | None, peer: str | None = None
) -> None:
    """Compares with a peer if possible, or prompt lookup with plain decoding; prints a table.

    Raises:
        UserError: the peer is not installed, or cannot do this.
    """
    sides: Sides = {"phi3-jax": (_ours, options)}
    if prompt_lookup is not None:
        lookup = replace(options, generate_options=(("prompt_lookup_num_tokens", prompt_lookup),))
        sides = {f"lookup of {prompt_lookup}": (_ours, lookup), "plain": (_ours, options)}
    elif not options.mesh and (name := choose_peer(peer, options.model)) is not None:
        if name == "llama.cpp":
            _check_llama(options)
        sides[name] = (_llama if name == "llama.cpp" else _theirs, options)
    results = (take_turns if process_count() == 1 else take_turns_here)(sides, rounds)
    print_table(label, results, options)


def _ours(options: BenchOptions) -> Turn:
    mesh = make_mesh(dict(options.mesh)) if options.mesh else None
    compiled = load_ours(options.model, options.dtype, mesh, options.quantization)
    ids = options.ids(compiled.model.config.vocab_size)
    arguments: dict[str, Any] = {"max_new_tokens": options.new_tokens + 1, "do_sample": False}
    arguments |= dict(options.generate_options)
    if options.prompt is None:
        arguments["eos_token_id"] = []
    is_one_cpu = mesh is None and jax.default_backend() == "cpu"
    products = ProductSpeed(compiled.model, options.batch) if is_one_cpu else None

    def turn() -> Times:
        start = time.perf_counter()
        tokens = Call(compiled, ids, np.ones_like(ids), **arguments).run()
        next(tokens)
        first = time.perf_counter()
        steps = sum(1 for _ in tokens)
        end = time.perf_counter()
        return Times(first - start, end - first, steps, None if products is None else products.measure())

    return turn


class _Clock:
    """A streamer for transformers that notes the times of the prompt and of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _theirs(options: BenchOptions) -> Turn:
    import torch

    model = load_theirs(options.model, options.dtype, end_tokens=options.prompt is not None)
    ids = torch.tensor(options.ids(model.config.vocab_size), dtype=torch.long, device=model.device)

    def turn() -> Times:
        clock, start = _Clock(), time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.new_tokens + 1,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        _, first, *_, last = clock.times
        return Times(first - start, last - first, len(clock.times) - 2)

    return turn


def _check_llama(options: BenchOptions) -> None:
    """Raises UserError unless llama.cpp can do this."""
    if not options.model.is_file() and gguf_file(options.model) is None:
        raise UserError("llama.cpp reads GGUF files; name one with --model")
    if options.batch > 1 or options.prompt is not None:
        raise UserError("llama.cpp continues one row of random tokens here; leave out --batch and --prompt")


def _llama(options: BenchOptions) -> Turn:
    model = load_llama(options.model, options.prompt_tokens + options.new_tokens + 1)
    (ids,) = options.ids(model.n_vocab()).tolist()

    def turn() -> Times:
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        token = model.sample(temp=0.0)
        first = time.perf_counter()
        for _ in range(options.new_tokens):
            model.eval([token])
            token = model.sample(temp=0.0)
        return Times(first - start, time.perf_counter() - first, options.new_tokens)

    return turn


def print_table(label: str, results: dict[str, list[Times]], options: BenchOptions) -> None:
    """Prints the medians of all turns and, for two sides, the medians of their ratios."""
    config = open_checkpoint(options.model).config
    length = options.ids(config.vocab_size).shape[1]
    rounds = len(next(iter(results.values())))
    # In half precision, a near tie can end the answer of one side before the other's.
    steps = " and ".join(str(count) for count in dict.fromkeys(times[0].steps for times in results.values()))
    weights = describe_weights(options.model, options.dtype, options.quantization)
    table = Table(
        title=f"{label}, {config.num_hidden_layers} layers, {weights}, batch {options.batch}, "
        f"{length}-token prompt, {steps} steps, median of {rounds}",
        caption=describe_products(
            options.model, options.dtype, options.quantization, divided=bool(options.mesh)
        ),
    )
    table.add_column("")
    for name in (*results, *(["ratio"] if len(results) == 2 else [])):
        table.add_column(name, justify="right")

    def add_row(
        name: str, seconds: list[list[float]], show: Callable[[float], str], *, ratio: bool = False
    ) -> None:
        cells = [show(statistics.median(each)) for each in seconds]
        table.add_row(name, *cells, *([median_ratio(*seconds)] if ratio and len(seconds) == 2 else []))

    tokens, size = options.batch * length, bytes_per_step(options, length)
    prefill = [[times.prefill for times in turns] for turns in results.values()]
    decode = [[times.decode / times.steps for times in turns] for turns in results.values()]
    add_row("prefill, tokens/s", prefill, lambda seconds: f"{tokens / seconds:,.0f}", ratio=True)
    add_row("decode, tokens/s", decode, lambda seconds: f"{options.batch / seconds:,.1f}", ratio=True)
    add_row("decode, ms a token", decode, lambda seconds: f"{1e3 * seconds:,.1f}")
    add_row("decode, GB/s read", decode, lambda seconds: f"{size / seconds / 1e9:,.1f}")
    for index, name in enumerate(("its products alone, GB/s", "memory that is only read, GB/s")):
        speeds = [[times.speeds[index] for times in turns if times.speeds] for turns in results.values()]
        if any(speeds):
            table.add_row(name, *(f"{statistics.median(each) / 1e9:,.1f}" if each else "" for each in speeds))
    Console().print(table)


def bytes_per_step(options: BenchOptions, prompt_tokens: int) -> int:
    """Returns the bytes that a decode step reads: the weights, and the cache halfway through the answer."""
    model = load_abstract(
        Phi3ForCausalLM, options.model, dtype=options.dtype, quantization=options.quantization
    )
    weights = sum(map(_bytes, jax.tree.leaves(model)))
    if not model.config.tie_word_embeddings:  # a step reads only a few rows
        weights -= sum(map(_bytes, jax.tree.leaves(model.model.embed_tokens)))
    cache = abstract_cache(model, options.batch, prompt_tokens + options.new_tokens // 2, options.dtype)
    return round(weights + sum(map(_bytes, jax.tree.leaves((cache.keys, cache.values)))))


def _bytes(leaf: jax.ShapeDtypeStruct) -> float:
    return leaf.size * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize)
