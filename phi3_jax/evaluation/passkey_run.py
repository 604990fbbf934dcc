"""Retrieval of pass keys over a grid of lengths and depths, under several ropes, with one model in memory."""

import hashlib
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
from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import RopeArgument
from phi3_jax.errors import UserError
from phi3_jax.evaluation.passkey import FILLER, Case, PasskeyPrompts, found
from phi3_jax.evaluation.scorer import frequencies_for, frequencies_key
from phi3_jax.evaluation.texts import read_text
from phi3_jax.generation import generate
from phi3_jax.generation.compiled import CompiledModel
from phi3_jax.generation.memory import token_bytes, token_capacity
from phi3_jax.generation.prompts import cache_length, padded_length
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.pipeline import Pipeline
from phi3_jax.runs.journal import Journal
from phi3_jax.runs.progress import FileProgress, time_left

ROWS, ROWS_ON_CPU = 16, 4
"""Prompts at a time, at most; a CPU has little to gain from more."""


@dataclass(frozen=True)
class Trial:
    """What a model made of one prompt under one rope."""

    rope: str
    length: int
    depth: float
    trial: int
    key: str
    answer: str
    found: bool


@dataclass(frozen=True)
class PasskeyResult:
    """Trials in the order in which they were made, and what they follow from."""

    trials: list[Trial]
    asked: Mapping[str, Any]
    fresh: int
    """That this call made; the others were known from before."""
    seconds: float


class Ropes:
    """The frequencies of ropes for prompts of a length, as `generate` takes them for a batch.

    Longrope's list and dynamic NTK's base are those of the whole length, the answer's room included.

    Raises:
        ValueError: a rope that the model cannot have.
    """

    def __init__(self, config: Phi3Config, ropes: Sequence[RopeArgument]):
        self._plain = config.rope_base.inv_freq()
        self._configs = {rope.name: rope.apply(config) for rope in ropes}
        self._initial = {rope.name: rope.initial_tokens for rope in ropes}

    def keys(self, name: str, lengths: Sequence[int]) -> list[str]:
        """By which a journal knows a rope again."""
        return [frequencies_key(self._configs[name], length, self._initial[name]) for length in lengths]

    def frequencies(self, names: Sequence[str], length: int) -> dict[str, Float[np.ndarray, "..."]]:
        """`inv_freq` and `attention_scaling` for rows of these ropes.

        By position where any rope keeps initial tokens unscaled: as many positions, and one that stands for
        all behind them.
        """
        found = [frequencies_for(self._configs[name], length) for name in names]
        inv_freq = np.stack([each for each, _ in found])  # [B, P]
        if positions := max(self._initial.values()):
            initial = np.array([self._initial[name] for name in names])
            unscaled = np.arange(positions + 1) < initial[:, None]  # [B, S]
            inv_freq = np.where(unscaled[:, :, None], self._plain, inv_freq[:, None])
        return {"inv_freq": inv_freq, "attention_scaling": np.array([scaling for _, scaling in found])}


def measure_passkeys(
    model: Path,
    output: Path,
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
    """Asks for pass keys: for each length and depth `trials` prompts, which are the same under all ropes.

    After each batch of prompts the answers are on the disk, in `output`/state.json: after a kill the same
    call goes on with them.

    Args:
        model: a checkpoint. It is loaded once, and all ropes run in the same programs.
        lengths: tokens of prompt and answer together.
        depths: where the key stands, 0 for the beginning and 1 for the end.
        max_new_tokens: of an answer.
        raw: leave out the chat template, and begin the answer; so it is done where there is none.
        text: whose lines are the filler; default: lines of our own.
        batch_size: prompts at a time; default: by memory, at most 4 on CPU and 16 elsewhere.
        overwrite: begin anew where the output holds something else.

    Raises:
        ValueError: what was asked cannot be done, before any work.
    """
    for name, values in (("rope", [each.name for each in ropes]), ("length", lengths), ("depth", depths)):
        if twice := next((value for value in values if list(values).count(value) > 1), None):
            raise UserError(f"{name} {twice} is given twice; give it once")
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    frequencies = Ropes(config, ropes)
    tokenizer = checkpoint.source.tokenizer()
    content = None if text is None else read_text(text)
    prompts = PasskeyPrompts(
        tokenizer,
        max_new_tokens,
        template=not raw and tokenizer.chat_template is not None,
        filler=FILLER if content is None else content.splitlines(),
        seed=seed,
    )
    prompts.check(lengths)
    asked = {
        "model": str(model.resolve()),
        "model_files": fingerprint(model),
        "ropes": {rope.name: frequencies.keys(rope.name, lengths) for rope in ropes},
        "lengths": list(lengths),
        "depths": list(depths),
        "trials": trials,
        "max_new_tokens": max_new_tokens,
        "template": prompts.template,
        "text_digest": content and hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
        "mesh": None if mesh is None else dict(mesh.shape),
    }
    total = len(ropes) * len(lengths) * len(depths) * trials
    began = monotonic()
    with Journal(output / "state.json", asked, overwrite=overwrite) as journal:
        before = len(journal.entries)
        if before < total:
            longest = config.replace(max_position_embeddings=max(*lengths, config.max_position_embeddings))
            planned = CompiledModel(
                load_abstract(Phi3ForCausalLM, checkpoint, dtype=dtype, mesh=mesh, config=longest)
            )
            rows = _rows(journal, planned, lengths, prompts.answer_tokens, batch_size)
            pipeline = Pipeline.load(checkpoint, dtype=dtype, mesh=mesh, config=longest)
            runner = _Runner(pipeline, prompts, frequencies)
            batches = list(_batches([rope.name for rope in ropes], lengths, depths, trials, rows))
            _run(batches, rows, runner, journal, show)
        made = [Trial(**entry) for entry in journal.entries]
    return PasskeyResult(made, asked, len(made) - before, monotonic() - began)


Row = tuple[str, Case]
"""A rope's name and a prompt."""


class _Runner:
    """Answers batches of prompts of one length."""

    def __init__(self, pipeline: Pipeline, prompts: PasskeyPrompts, ropes: Ropes):
        self._pipeline, self._prompts, self._ropes = pipeline, prompts, ropes

    def answer(self, batch: Sequence[Row], rows: int) -> list[Trial]:
        """The trials of a batch, which is filled up to `rows`, so that one program serves all."""
        length, most = batch[0][1].length, self._prompts.answer_tokens
        filled = [*batch, *[batch[0]] * (rows - len(batch))]
        made = [self._prompts(case) for _, case in filled]
        ids = np.array([prompt.ids for prompt in made], np.int32)
        out = generate(
            self._pipeline.compiled,
            ids,
            np.ones_like(ids),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=most,
            **self._ropes.frequencies([rope for rope, _ in filled], length),
        )
        trials = []
        for (rope, case), prompt, row in zip(batch, made, np.asarray(out), strict=False):
            answer = self._prompts.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
            trials.append(Trial(rope, *case, prompt.key, answer, found(answer, prompt.key)))
        return trials


def _rows(
    journal: Journal, planned: CompiledModel, lengths: Sequence[int], answer_tokens: int, wanted: int | None
) -> dict[int, int]:
    """Prompts at a time by length; the longest is seen first, so that what cannot be is said at once."""
    found = {}
    for length in sorted(lengths, reverse=True):
        most = partial(_most_rows, planned, length, answer_tokens, wanted)
        found[length] = journal.decide(f"rows_{length}", most)
    return found


def _most_rows(compiled: CompiledModel, length: int, answer_tokens: int, wanted: int | None) -> int:
    """Prompts of a length, the answer's tokens included, that memory holds at a time.

    Raises:
        ValueError: not one; not as many as are wanted.
    """
    columns = cache_length(padded_length(length - answer_tokens) + answer_tokens + 1)
    room = token_capacity(compiled)
    least = compiled.rows_for(wanted or 1)
    if least * columns > room:
        each = token_bytes(compiled)
        texts = f"{wanted} prompts of {length:,} tokens" if wanted else f"a prompt of {length:,} tokens"
        raise UserError(
            f"{texts} needs {least * columns * each / 2**30:.2f} GiB for keys and values, and memory has "
            f"{room * each / 2**30:.2f} GiB for them; choose shorter lengths or a smaller --batch-size"
        )
    if wanted:
        return wanted
    most = ROWS_ON_CPU if compiled.on_cpu else ROWS
    while compiled.rows_for(most) * columns > room and most > 1:
        most //= 2
    return most


def _batches(
    ropes: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    rows: Mapping[int, int],
) -> Iterator[list[Row]]:
    for length in lengths:
        cases = [
            (rope, Case(length, depth, trial)) for rope, depth, trial in product(ropes, depths, range(trials))
        ]
        for start in range(0, len(cases), rows[length]):
            yield cases[start : start + rows[length]]


def _run(
    batches: Sequence[Sequence[Row]], rows: Mapping[int, int], runner: _Runner, journal: Journal, show: bool
) -> None:
    """Answers what is not answered yet; each batch is safe before the next."""
    began, total = monotonic(), sum(map(len, batches))
    ends = np.cumsum([len(batch) for batch in batches])
    first = int(np.searchsorted(ends, len(journal.entries), side="right"))
    costs = np.array([sum(case.length for _, case in batch) for batch in batches])  # in tokens
    with FileProgress(int(costs.sum()), show) as progress:
        for number in range(first, len(batches)):
            batch = batches[number]
            journal.add(asdict(trial) for trial in runner.answer(batch, rows[batch[0][1].length]))
            right = sum(entry["found"] for entry in journal.entries)
            told = f"{len(journal.entries):,} of {total:,} prompts, {right:,} keys found"
            left = costs[number + 1 :].sum() / costs[first : number + 1].sum()
            progress.update(told, int(costs[: number + 1].sum()), time_left((monotonic() - began) * left))
