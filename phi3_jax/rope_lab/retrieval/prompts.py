"""Prompts of retrieval tasks: a long text with hidden lines, and a question about them.

Prompts have an exact number of tokens and are the same for every rope.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.retrieval.tasks import PassKey, Problem, Task
from phi3_jax.rope_lab.retrieval.texts import FILLER
from phi3_jax.sizes import round_up
from phi3_jax.tokenizer import Phi3Tokenizer

_TEXT, _QUESTION = "\ue000text\ue000", "\ue000question\ue000"
"""Mark the places of the text and the question in a rendered conversation, in characters for private use."""

_LONG_NUMBERS = ("10000", "99999", "77777")
"""Numbers among which those that have the most tokens are likely to be."""


class Case(NamedTuple):
    """A prompt and answer of `length` tokens.

    The line that is asked for is at `depth` (0: first line, 1: last line); None for tasks without a depth.
    """

    task: str
    length: int
    depth: float | None
    trial: int


class PromptSize(NamedTuple):
    """Tokens of prompt and answer together, and the most of the answer."""

    length: int
    answer_tokens: int


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a right answer has."""

    ids: list[int]
    answers: tuple[str, ...]
    right_answer: str
    """The text of a right answer, to train on."""


class FillerText:
    """Lines of text that repeat as often as needed.

    Raises:
        UserError: the text is empty.
    """

    def __init__(self, tokenizer: Phi3Tokenizer, lines: Sequence[str]):
        stripped = (line.strip() for line in lines)
        self.lines = tokenizer.encode_batch([line + "\n" for line in stripped if line])
        if not self.lines:
            raise UserError("the text for the filler is empty")

    def tokens(self, first: int, room: int) -> tuple[list[int], Int[np.ndarray, " lines"]]:
        """Returns `room` tokens of lines that start after line `first`, and where each line ends.

        The first line is cut from the left.
        """
        text: list[int] = []
        ends: list[int] = []
        while len(text) < room:
            text += self.lines[(first + len(ends)) % len(self.lines)]
            ends.append(len(text))
        excess = len(text) - room
        return text[excess:], np.array([end - excess for end in ends if end > excess])


@dataclass(frozen=True)
class TaskPrompts:
    """Makes the prompts of a task for a tokenizer.

    Args:
        filler: the text around the hidden lines; it starts from a line drawn for each case.
        template: put the task into a user's message of the chat template; otherwise the prompt ends with the
            start of the answer.
        seed: seed of everything that is drawn.
        max_new_tokens: tokens of the answer, which count as part of a case's length; default: as many as a
            right answer needs, and some more.
    """

    task: Task
    tokenizer: Phi3Tokenizer
    filler: FillerText
    template: bool
    seed: int = 0
    max_new_tokens: int | None = None

    @cached_property
    def answer_tokens(self) -> int:
        """The most tokens of an answer, which by default have room for a full sentence and a quarter more."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        sentence = self._largest.answer_start + self._largest.rest_of_answer
        return round_up(5 * len(self._encode(sentence)) // 4, 16)

    @cached_property
    def shortest(self) -> int:
        """The least length with room for question, hidden lines, answer and some filler."""
        largest = self._largest
        needles = sum(len(self._encode(line + "\n")) for _, line in largest.needles)
        return len(self._before) + needles + len(self._after(largest)) + 1 + self.answer_tokens

    def check(self, length: int) -> None:
        """Checks that prompts of a length can be made.

        Raises:
            UserError: it has no room for question, hidden lines and answer.
        """
        if length < self.shortest:
            raise UserError(
                f"length {length} is too short for {self.task.label}: question, hidden lines and "
                f"{self.answer_tokens} tokens of answer need {self.shortest}"
            )

    def __call__(self, case: Case) -> Prompt:
        """Returns the prompt of a case: `case.length` tokens without those of the answer.

        Raises:
            UserError: the length is too short.
        """
        self.check(case.length)
        depth = case.depth or 0.0
        # Prompts of the pass key are those of earlier versions.
        stream = () if self.task.name == PassKey.name else self.task.name.encode()
        draws = np.random.default_rng([self.seed, case.length, round(1e6 * depth), case.trial, *stream])
        problem = self.task.draw(depth, draws)
        first = int(draws.integers(len(self.filler.lines)))
        after = self._after(problem)
        needles = sorted(problem.needles, key=lambda needle: needle[0])
        lines = [self._encode(line + "\n") for _, line in needles]
        room = case.length - self.answer_tokens - len(self._before) - sum(map(len, lines)) - len(after)
        filler, ends = self.filler.tokens(first, room)
        ids, start = [*self._before], 0
        for line, at in zip(lines, _nearest(ends, np.array([share for share, _ in needles])), strict=True):
            ids += filler[start:at]
            ids += line
            start = at
        ids += filler[start:]
        ids += after
        answer = problem.rest_of_answer
        return Prompt(ids, problem.answers, problem.answer_start + answer if self.template else answer)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _after(self, problem: Problem) -> list[int]:
        """Returns the ids after the text."""
        between, end = self._frame
        start = "" if self.template else f"\n{problem.answer_start}"
        return self._encode(between + problem.question + start + end)

    @cached_property
    def _before(self) -> list[int]:
        """The ids before the text."""
        introduction = f"{self.task.introduction}\n\n"
        if not self.template:
            return self.tokenizer.encode(introduction)
        return self._encode(self._rendered.partition(_TEXT)[0])

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What is between text and question, and after the question."""
        if not self.template:
            return "\n", ""
        between, _, end = self._rendered.partition(_TEXT)[2].partition(_QUESTION)
        return between, end

    @cached_property
    def _rendered(self) -> str:
        """The conversation, with marks in the places of text and question."""
        content = f"{self.task.introduction}\n\n{_TEXT}\n{_QUESTION}"
        conversation = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        if _QUESTION not in text.partition(_TEXT)[2]:
            raise UserError("the chat template leaves out the user's message; use --raw")
        return text

    @cached_property
    def _largest(self) -> Problem:
        """A problem whose names and numbers have the most tokens, at the start of a line or after a space."""

        def size(text: str) -> int:
            return len(self._encode(f"{text} {text}"))

        number = max(_LONG_NUMBERS, key=size)
        names = [max(self.task.pool, key=size)] * self.task.names if self.task.names else []
        return self.task.problem(names, [number] * self.task.numbers, 0.0, np.random.default_rng(0))


class RetrievalPrompts:
    """Makes the prompts of several tasks for a tokenizer.

    Args:
        raw: use no chat template and end the prompt with the start of the answer, as without a template.
        filler: lines of text.
        seed: seed of everything that is drawn.
        max_new_tokens: tokens of an answer; default: by the task.

    Raises:
        UserError: the filler is empty, or two tasks have the same name.
    """

    def __init__(
        self,
        tokenizer: Phi3Tokenizer,
        tasks: Sequence[Task],
        *,
        raw: bool = False,
        filler: Sequence[str] = FILLER,
        seed: int = 0,
        max_new_tokens: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.template = not raw and tokenizer.chat_template is not None
        self.filler = FillerText(tokenizer, filler)
        names = [task.name for task in tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"task {twice[0]} is given twice; give it once")
        self._prompts = {
            task.name: TaskPrompts(task, tokenizer, self.filler, self.template, seed, max_new_tokens)
            for task in tasks
        }

    @property
    def tasks(self) -> list[Task]:
        return [prompts.task for prompts in self._prompts.values()]

    @property
    def shortest(self) -> int:
        """The least length with which each task can be made."""
        return max(prompts.shortest for prompts in self._prompts.values())

    def task(self, name: str) -> Task:
        return self._prompts[name].task

    def size(self, case: Case) -> PromptSize:
        """Returns the tokens of a case and of its answer."""
        return PromptSize(case.length, self._prompts[case.task].answer_tokens)

    def check(self, lengths: Sequence[int]) -> None:
        """Checks that prompts of these lengths can be made for all tasks.

        Raises:
            UserError: a length has no room for question, hidden lines and answer.
        """
        for prompts, length in product(self._prompts.values(), lengths):
            prompts.check(length)

    def cases(self, lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Case]:
        """Returns all cases, by task, length, depth and trial; tasks without a depth have no depths."""
        return [
            Case(task.name, length, depth, trial)
            for task in self.tasks
            for length, depth, trial in product(lengths, depths if task.has_depth else [None], range(trials))
        ]

    def __call__(self, case: Case) -> Prompt:
        """Returns the prompt of a case, without the tokens of its answer.

        Raises:
            UserError: the length is too short.
        """
        return self._prompts[case.task](case)

    def score(self, case: Case, answers: Sequence[str], text: str) -> float:
        """Returns the share of the answers that a model's text has."""
        return self.task(case.task).score(answers, text)


def _nearest(ends: Int[np.ndarray, " lines"], shares: Float[np.ndarray, " needles"]) -> list[int]:
    """Returns the start of the text or the end of a line that is nearest to each share of the text."""
    breaks = np.concatenate([[0], ends])
    wanted = shares * breaks[-1]
    after = np.searchsorted(breaks, wanted).clip(1)
    earlier = wanted - breaks[after - 1] <= breaks[after] - wanted
    return np.where(earlier, breaks[after - 1], breaks[after]).tolist()
