"""Measures pass key retrieval over lengths and depths, under several ropes, with one model in memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import RopeArgument
from phi3_jax.errors import UserError
from phi3_jax.evaluation.run_options import STATE, model_options
from phi3_jax.evaluation.scorer import frequencies_for, frequencies_key
from phi3_jax.evaluation.texts import read_text, text_digest
from phi3_jax.generation import generate
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.memory import token_bytes, token_capacity
from phi3_jax.generation.prompts import cache_length, padded_length
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.pipeline import Pipeline
from phi3_jax.rope_lab.passkey import FILLER, Case, PasskeyPrompts, has_key
from phi3_jax.runs.progress import FileProgress, time_left
from phi3_jax.storage.journal import Journal
from phi3_jax.storage.targets import Target, target_in
from phi3_jax.tokenizer import Phi3Tokenizer

ROWS, ROWS_ON_CPU = 16, 4
"""The most prompts at a time; a CPU gains little from more."""

RopeCase = tuple[str, Case]
"""The name of a rope, and a prompt."""


@dataclass(frozen=True)
class Trial:
    """The answer of a model to a prompt under a rope."""

    rope: str
    length: int
    depth: float
    trial: int
    key: str
    answer: str
    found: bool


@dataclass(frozen=True)
class PasskeyResult:
    """Trials in the order of the measurement, and the options they depend on."""

    trials: list[Trial]
    options: Mapping[str, Any]
    new: int
    """Trials of this call; the others are of an earlier call."""
    seconds: float


class Ropes:
    """The frequencies of ropes for a batch of prompts of a length, as `generate` takes them.

    Frequencies that depend on the length are those for the whole length, including the answer's tokens.

    Raises:
        UserError: the model cannot have one of the ropes.
    """

    def __init__(self, config: Phi3Config, ropes: Sequence[RopeArgument]):
        self._plain = config.rope_base.inv_freq()
        self._configs = {rope.name: rope.apply(config) for rope in ropes}
        self._initial = {rope.name: rope.initial_tokens for rope in ropes}

    def keys(self, name: str, lengths: Sequence[int]) -> list[str]:
        """Returns the keys of a rope in a journal, one for each length."""
        return [frequencies_key(self._configs[name], length, self._initial[name]) for length in lengths]

    def frequencies(self, names: Sequence[str], length: int) -> dict[str, Float[np.ndarray, "..."]]:
        """Returns `inv_freq` and `attention_scaling` for rows with these ropes.

        They are given by position if a rope keeps initial tokens unscaled; the last position stands for all
        later ones.
        """
        rows = [frequencies_for(self._configs[name], length) for name in names]
        inv_freq = np.stack([each for each, _ in rows])  # [B, P]
        if positions := max(self._initial.values()):
            initial = np.array([self._initial[name] for name in names])
            unscaled = np.arange(positions + 1) < initial[:, None]  # [B, S]
            inv_freq = np.where(unscaled[:, :, None], self._plain, inv_freq[:, None])
        return {"inv_freq": inv_freq, "attention_scaling": np.array([scaling for _, scaling in rows])}


def measure_passkeys(
    model: Path,
    output: Target,
    ropes: Sequence[RopeArgument],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 5,
    max_new_tokens: int = 16,
    raw: bool = False,
    text: Path | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> PasskeyResult:
    """Asks for pass keys with `trials` prompts for each length and depth, the same under all ropes.

    The answers of each batch are written to `output`/state.json; after a kill the same call resumes.

    Args:
        model: a checkpoint; it is loaded once, and all ropes run in the same programs.
        lengths: tokens of prompt and answer together.
        depths: depths of the key, from 0 (start) to 1 (end).
        max_new_tokens: the most tokens of an answer.
        raw: use no chat template and end the prompt with the start of the answer, as without a template.
        text: a file whose lines are the filler; default: lines of our own.
        batch_size: prompts at a time; default: by memory, at most 4 on CPU and 16 elsewhere.
        overwrite: start over if the output was started with other options.

    Raises:
        UserError: an option is wrong, or a prompt does not fit in memory; it is raised before any work.
    """
    grid = _Grid([rope.name for rope in ropes], lengths, depths, trials)
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    frequencies = Ropes(config, ropes)
    content = None if text is None else read_text(text)
    prompts = _prompts(checkpoint.source.tokenizer(), content, max_new_tokens, raw, seed)
    prompts.check(lengths)
    options = model_options(model, dtype, mesh) | _options(grid, frequencies, prompts)
    options |= {"text_digest": content and text_digest(content), "batch_size": batch_size}
    began = monotonic()
    with Journal(target_in(output, STATE), options, overwrite=overwrite) as journal:
        before = len(journal.entries)
        if before < grid.size:
            longest = config.replace(max_position_embeddings=max(*lengths, config.max_position_embeddings))
            load: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "config": longest}
            planned = CompiledModel(load_abstract(Phi3ForCausalLM, checkpoint, **load))
            rows = _rows(journal, planned, lengths, max_new_tokens, batch_size)
            answerer = _Answerer(Pipeline.load(checkpoint, **load).compiled, prompts, frequencies)
            _answer(list(grid.batches(rows)), rows, answerer, journal, show)
        answered = [Trial(**entry) for entry in journal.entries]
    return PasskeyResult(answered, options, len(answered) - before, monotonic() - began)


def _prompts(
    tokenizer: Phi3Tokenizer, content: str | None, max_new_tokens: int, raw: bool, seed: int
) -> PasskeyPrompts:
    return PasskeyPrompts(
        tokenizer,
        max_new_tokens,
        template=not raw and tokenizer.chat_template is not None,
        filler=FILLER if content is None else content.splitlines(),
        seed=seed,
    )


@dataclass(frozen=True)
class _Grid:
    """All prompts under all ropes."""

    ropes: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float]
    trials: int

    def __post_init__(self) -> None:
        for name, values in {"rope": self.ropes, "length": self.lengths, "depth": self.depths}.items():
            for value in values:
                if list(values).count(value) > 1:
                    raise UserError(f"{name} {value} is given twice; give it once")

    @property
    def size(self) -> int:
        return len(self.ropes) * len(self.lengths) * len(self.depths) * self.trials

    def batches(self, rows: Mapping[int, int]) -> Iterator[list[RopeCase]]:
        """Yields batches of one length; `rows` has the most prompts of a batch by length."""
        for length in self.lengths:
            cases = [
                (rope, Case(length, depth, trial))
                for rope, depth, trial in product(self.ropes, self.depths, range(self.trials))
            ]
            for start in range(0, len(cases), rows[length]):
                yield cases[start : start + rows[length]]


def _options(grid: _Grid, ropes: Ropes, prompts: PasskeyPrompts) -> dict[str, Any]:
    return {
        "ropes": {name: ropes.keys(name, grid.lengths) for name in grid.ropes},
        "lengths": list(grid.lengths),
        "depths": list(grid.depths),
        "trials": grid.trials,
        "max_new_tokens": prompts.answer_tokens,
        "template": prompts.template,
        "seed": prompts.seed,
    }


class _Answerer:
    """Answers batches of prompts of one length."""

    def __init__(self, compiled: CompiledModel, prompts: PasskeyPrompts, ropes: Ropes):
        self._compiled, self._prompts, self._ropes = compiled, prompts, ropes

    def answer(self, batch: Sequence[RopeCase], rows: int) -> list[Trial]:
        """Returns the trials of a batch, which is padded to `rows` so that one program serves all."""
        length, most = batch[0][1].length, self._prompts.answer_tokens
        padded = [*batch, *[batch[0]] * (rows - len(batch))]
        prompts = [self._prompts(case) for _, case in padded]
        ids = np.array([prompt.ids for prompt in prompts], np.int32)
        out = generate(
            self._compiled,
            ids,
            np.ones_like(ids),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=most,
            **self._ropes.frequencies([rope for rope, _ in padded], length),
        )
        trials = []
        for (rope, case), prompt, row in zip(batch, prompts, np.asarray(out), strict=False):
            answer = self._prompts.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
            trials.append(Trial(rope, *case, prompt.key, answer, has_key(answer, prompt.key)))
        return trials


def _rows(
    journal: Journal, planned: CompiledModel, lengths: Sequence[int], answer_tokens: int, wanted: int | None
) -> dict[int, int]:
    """Returns the prompts at a time by length; checks the longest first, so that errors come early."""
    return {
        length: journal.decide(f"rows_{length}", partial(_most_rows, planned, length, answer_tokens, wanted))
        for length in sorted(lengths, reverse=True)
    }


def _most_rows(compiled: CompiledModel, length: int, answer_tokens: int, wanted: int | None) -> int:
    """Returns how many prompts of a length, with their answers, fit in memory at a time.

    Raises:
        UserError: not even one, or fewer than are wanted.
    """
    slots = cache_length(padded_length(length - answer_tokens) + answer_tokens + 1)
    room = token_capacity(compiled)
    needed = compiled.rows_for(wanted or 1) * slots
    if needed > room:
        each = token_bytes(compiled)
        texts = (
            f"{wanted} prompts of {length:,} tokens need"
            if wanted
            else f"a prompt of {length:,} tokens needs"
        )
        raise UserError(
            f"{texts} {needed * each / 2**30:.2f} GiB for keys and values, and memory has "
            f"{room * each / 2**30:.2f} GiB for them; choose shorter lengths or a smaller --batch-size"
        )
    if wanted:
        return wanted
    most = ROWS_ON_CPU if compiled.on_cpu else ROWS
    while compiled.rows_for(most) * slots > room and most > 1:
        most //= 2
    return most


def _answer(
    batches: Sequence[Sequence[RopeCase]],
    rows: Mapping[int, int],
    answerer: _Answerer,
    journal: Journal,
    show: bool,
) -> None:
    """Answers the batches that the journal lacks, and writes each before the next starts."""
    began, total = monotonic(), sum(map(len, batches))
    ends = np.cumsum([len(batch) for batch in batches])
    first = int(np.searchsorted(ends, len(journal.entries), side="right"))
    costs = np.array([sum(case.length for _, case in batch) for batch in batches])  # in tokens
    with FileProgress(int(costs.sum()), show) as progress:
        for number in range(first, len(batches)):
            batch = batches[number]
            journal.add(asdict(trial) for trial in answerer.answer(batch, rows[batch[0][1].length]))
            right = sum(entry["found"] for entry in journal.entries)
            text = f"{len(journal.entries):,} of {total:,} prompts, {right:,} keys found"
            left = costs[number + 1 :].sum() / costs[first : number + 1].sum()
            progress.update(text, int(costs[: number + 1].sum()), time_left((monotonic() - began) * left))
