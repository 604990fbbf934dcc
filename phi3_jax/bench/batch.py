"""`phi3-jax bench --requests`: a file's worth of prompts, against transformers' best static batches."""

import importlib.util
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
from phi3_jax.bench.turns import take_turns
from phi3_jax.generation import CompiledModel
from phi3_jax.generation.memory import token_capacity
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.runs.allocator import keep_freed_memory

LONGEST_PROMPT, LONGEST_ANSWER, SHORTEST_ANSWER = 2000, 256, 4
"""Tokens; lengths between 1 or the shortest and these are as likely in every octave."""

STATIC_BATCHES = (4, 8, 16, 32)
"""Sizes that transformers tries; the best one does all requests."""

SAMPLE = 8
"""One of so many requests is run ahead of the measured turns, to compile."""


@dataclass(frozen=True)
class Load:
    """Random prompts with the lengths that their answers shall have."""

    model: Path
    dtype: str
    requests: int

    def lengths(self) -> list[tuple[int, int]]:
        """Of each prompt and its answer."""
        draws = np.random.default_rng(0)
        prompts = 2 ** draws.uniform(0, np.log2(LONGEST_PROMPT + 1), self.requests)
        answers = 2 ** draws.uniform(np.log2(SHORTEST_ANSWER), np.log2(LONGEST_ANSWER), self.requests)
        return [
            (min(int(prompt), LONGEST_PROMPT), round(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def prompts(self, vocab_size: int) -> list[tuple[list[int], int]]:
        """Each prompt's tokens, and how many it shall get."""
        draws = np.random.default_rng(1)
        return [(draws.integers(4, vocab_size, prompt).tolist(), answer) for prompt, answer in self.lengths()]


class Run(NamedTuple):
    """One pass over all requests."""

    seconds: float
    how: str


def run_batch_bench(model: Path, label: str, *, requests: int, rounds: int, dtype: str) -> None:
    """Measures and prints a table; each side is warmed up before."""
    load = Load(model, dtype, requests)
    sides: dict[str, Any] = {"phi3-jax": (_ours, load)}
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        sides["transformers"] = (_theirs, load)
    results: dict[str, list[Run]] = take_turns(sides, rounds)
    prompts, answers = map(sum, zip(*load.lengths(), strict=True))
    table = Table(
        title=f"{label}, {dtype}: {requests} prompts of {prompts:,} tokens, {answers:,} tokens made, "
        f"median of {rounds}"
    )
    for name in ("", "how", "seconds", "tokens/s in", "tokens/s out", "ratio"):
        table.add_column(name, justify="left" if name in ("", "how") else "right")
    for name, runs in results.items():
        seconds = statistics.median(run.seconds for run in runs)
        ratios = [
            theirs.seconds / run.seconds for run, theirs in zip(runs, list(results.values())[-1], strict=True)
        ]
        ratio = f"{statistics.median(ratios):.2f}" if name == "phi3-jax" and len(results) > 1 else ""
        cells = (f"{seconds:,.1f}", f"{prompts / seconds:,.0f}", f"{answers / seconds:,.1f}")
        table.add_row(name, runs[0].how, *cells, ratio)
    Console().print(table)


def _ours(load: Load) -> Any:
    keep_freed_memory()  # as the commands do
    compiled = CompiledModel(Phi3ForCausalLM.from_pretrained(load.model, dtype=load.dtype))
    prompts = load.prompts(compiled.model.config.vocab_size)
    needs = [(slot_length(len(ids), new), new) for ids, new in prompts]
    pools = choose_pools(
        needs,
        slots=default_slots(),
        length=max(length for length, _ in needs),
        capacity=token_capacity(compiled),
    )
    batch = ContinuousBatch(compiled, pools, end_tokens=[])
    how = " + ".join(f"{pool.slots} slots of {pool.length}" for pool in pools)
    warm = False

    def turn() -> Run:
        nonlocal warm
        given = prompts if warm else [(ids, min(new, 9)) for ids, new in prompts[::SAMPLE]]
        warm = True
        begin = time.perf_counter()
        made = sum(len(one.tokens) for one in batch.run(Prompt(None, ids, new) for ids, new in given))
        assert made == sum(new for _, new in given)
        return Run(time.perf_counter() - begin, how)

    return turn


def _theirs(load: Load) -> Any:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    dtype = getattr(torch, load.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(load.model, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    if torch.cuda.is_available():
        model = model.cuda()
    # By length, so that a batch has next to no padding.
    prompts = sorted(load.prompts(model.config.vocab_size), key=lambda prompt: -len(prompt[0]))

    def seconds(some: list[tuple[list[int], int]], size: int) -> float:
        begin = time.perf_counter()
        for first in range(0, len(some), size):
            _generate(torch, transformers, model, some[first : first + size])
        return time.perf_counter() - begin

    best: int | None = None

    def turn() -> Run:
        nonlocal best
        if best is None:
            seconds([(ids, 3) for ids, _ in prompts[:: 4 * SAMPLE]], 4)
            # Neighbours in length, as all batches have them: gaps would count against large ones.
            block = max(STATIC_BATCHES)
            some = [prompt for number, prompt in enumerate(prompts) if number // block % 4 == 1] or prompts
            best = min(STATIC_BATCHES, key=lambda size: seconds(some, size))
            return Run(0.0, "")
        return Run(seconds(prompts, best), f"sorted, batches of {best}")

    return turn


def _generate(torch: Any, transformers: Any, model: Any, prompts: list[tuple[list[int], int]]) -> None:
    """One static batch, in which each row ends with its own length."""
    width = max(len(ids) for ids, _ in prompts)
    options = {"dtype": torch.long, "device": model.device}
    ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in prompts], **options)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in prompts], **options)
    lengths = torch.tensor([new for _, new in prompts], **options)

    def ended(input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids.shape[1] - width >= lengths

    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=int(lengths.max()),
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([ended]),
    )
