"""Measures continuous batching of many prompts, side by side with transformers' best static batches."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from phi3_jax.batch.continuous import ContinuousBatch, Prompt, slot_length
from phi3_jax.batch.engine import default_slots
from phi3_jax.batch.pools import choose_pools
from phi3_jax.bench.models import describe_products, describe_weights, load_ours, load_theirs
from phi3_jax.bench.turns import Sides, Turn, choose_peer, median_ratio, take_turns
from phi3_jax.generation.memory import token_capacity

LONGEST_PROMPT, LONGEST_ANSWER, SHORTEST_ANSWER = 2000, 256, 4
"""Tokens; the logarithms of the lengths are uniform between these limits, with prompts from 1."""

STATIC_BATCHES = (4, 8, 16, 32)
"""The batch sizes that transformers tries; the fastest is used for all prompts."""

SAMPLE = 8
"""The first turn, which compiles, takes one of this many prompts."""

Prompts = list[tuple[list[int], int]]
"""The tokens of each prompt, and the number of new tokens."""


@dataclass(frozen=True)
class BatchBenchOptions:
    """Random prompts to continue, each with the length of its answer."""

    model: Path
    dtype: str
    requests: int
    quantization: str | None = None
    """How our weights are quantized, as `Quantization.parse` reads it."""

    def lengths(self) -> list[tuple[int, int]]:
        """Returns the lengths of each prompt and its answer."""
        draws = np.random.default_rng(0)
        prompts = 2 ** draws.uniform(0, np.log2(LONGEST_PROMPT + 1), self.requests)
        answers = 2 ** draws.uniform(np.log2(SHORTEST_ANSWER), np.log2(LONGEST_ANSWER), self.requests)
        return [
            (min(int(prompt), LONGEST_PROMPT), round(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def prompts(self, vocab_size: int) -> Prompts:
        draws = np.random.default_rng(1)
        return [(draws.integers(4, vocab_size, prompt).tolist(), answer) for prompt, answer in self.lengths()]


class BatchTime(NamedTuple):
    """The seconds for all prompts, and a description of the batches."""

    seconds: float
    batches: str


def run_batch_bench(options: BatchBenchOptions, label: str, rounds: int) -> None:
    """Compares with transformers if possible, and prints a table."""
    sides: Sides = {"phi3-jax": (_ours, options)}
    if choose_peer(None, options.model) is not None:
        sides["transformers"] = (_theirs, options)
    results: dict[str, list[BatchTime]] = take_turns(sides, rounds)
    prompts, answers = map(sum, zip(*options.lengths(), strict=True))
    weights = describe_weights(options.model, options.dtype, options.quantization)
    table = Table(
        title=f"{label}, {weights}: {options.requests} prompts of {prompts:,} tokens, "
        f"{answers:,} tokens made, median of {rounds}",
        caption=describe_products(options.model, options.dtype, options.quantization),
    )
    for name in ("", "how", "seconds", "tokens/s in", "tokens/s out", "ratio"):
        table.add_column(name, justify="left" if name in ("", "how") else "right")
    seconds = {name: [turn.seconds for turn in turns] for name, turns in results.items()}
    for name, turns in results.items():
        median = statistics.median(seconds[name])
        is_ratio = name == "phi3-jax" and len(results) > 1
        ratio = median_ratio(seconds[name], seconds["transformers"]) if is_ratio else ""
        cells = (f"{median:,.1f}", f"{prompts / median:,.0f}", f"{answers / median:,.1f}")
        table.add_row(name, turns[0].batches, *cells, ratio)
    Console().print(table)


def _ours(options: BatchBenchOptions) -> Turn:
    compiled = load_ours(options.model, options.dtype, quantization=options.quantization)
    prompts = options.prompts(compiled.model.config.vocab_size)
    needs = [(slot_length(len(ids), new), new) for ids, new in prompts]
    longest = max(length for length, _ in needs)
    pools = choose_pools(needs, slots=default_slots(), length=longest, capacity=token_capacity(compiled))
    batch = ContinuousBatch(compiled, pools, end_tokens=[])
    batches = " + ".join(f"{pool.slots} slots of {pool.length}" for pool in pools)
    warm = False

    def turn() -> BatchTime:
        nonlocal warm
        given = prompts if warm else [(ids, min(new, 9)) for ids, new in prompts[::SAMPLE]]
        warm = True
        start = time.perf_counter()
        results = batch.run(Prompt(None, ids, new) for ids, new in given)
        count = sum(len(result.tokens) for result in results)
        assert count == sum(new for _, new in given)
        return BatchTime(time.perf_counter() - start, batches)

    return turn


def _theirs(options: BatchBenchOptions) -> Turn:
    model = load_theirs(options.model, options.dtype, end_tokens=False)
    # Sorted by length, so that batches have little padding.
    prompts = sorted(options.prompts(model.config.vocab_size), key=lambda prompt: -len(prompt[0]))

    def seconds(some: Prompts, size: int) -> float:
        start = time.perf_counter()
        for first in range(0, len(some), size):
            generate_static_batch(model, some[first : first + size])
        return time.perf_counter() - start

    best: int | None = None

    def turn() -> BatchTime:
        nonlocal best
        if best is None:
            seconds([(ids, 3) for ids, _ in prompts[:: 4 * SAMPLE]], 4)
            # Blocks of neighbours, as in the real batches: gaps in length would slow large batches down.
            block = max(STATIC_BATCHES)
            some = [prompt for number, prompt in enumerate(prompts) if number // block % 4 == 1] or prompts
            best = min(STATIC_BATCHES, key=lambda size: seconds(some, size))
            return BatchTime(0.0, "")
        return BatchTime(seconds(prompts, best), f"sorted, batches of {best}")

    return turn


def generate_static_batch(model: Any, prompts: Prompts) -> None:
    """Runs one static batch of transformers; each row ends at its own length."""
    import torch
    import transformers

    width = max(len(ids) for ids, _ in prompts)
    tensor_options = {"dtype": torch.long, "device": model.device}
    ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in prompts], **tensor_options)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in prompts], **tensor_options)
    lengths = torch.tensor([new for _, new in prompts], **tensor_options)

    def is_finished(input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids.shape[1] - width >= lengths

    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=int(lengths.max()),
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([is_finished]),
    )
