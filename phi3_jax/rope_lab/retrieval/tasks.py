"""Tasks that hide lines in a long text and ask for what they hold.

The pass key is that of Mohtashami and Jaggi (arXiv:2305.16300). The others are after RULER
(arXiv:2404.06654, section 3: multi-keys, multi-values and multi-queries NIAH, and variable tracking), with
texts of our own.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.retrieval.texts import NUMBERS, VARIABLES, WORDS

_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)|\d+")
_VARIABLE = re.compile(r"\b[A-Z]{3}\b")

Draws = np.random.Generator


class Problem(NamedTuple):
    """What a prompt hides and asks."""

    needles: Sequence[tuple[float, str]]
    """The hidden lines, each with the share of the filler before it."""
    question: str
    answer_start: str
    """The text before the answers in a full sentence."""
    answers: tuple[str, ...]

    @property
    def rest_of_answer(self) -> str:
        """The text that completes a right answer after `answer_start`."""
        return f" {_listed(self.answers)}."


@dataclass(frozen=True)
class Task(ABC):
    """A kind of problem.

    Raises:
        UserError: a count is too small, or there are not enough names for it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """What is hidden and asked, for reports."""
    introduction: ClassVar[str] = (
        "Some lines of the text below hold pass keys. Read the text and remember the pass keys."
    )
    has_depth: ClassVar[bool] = False
    """Whether one line is asked for, which has a depth in the text."""
    pool: ClassVar[Sequence[str]] = WORDS

    def __post_init__(self) -> None:
        for what, needed, there in (
            ("names", self.names, len(self.pool)),
            ("numbers", self.numbers, NUMBERS[1] - NUMBERS[0]),
        ):
            if needed > there:
                raise UserError(f"{self.label} needs {needed} {what}, and there are {there}; choose fewer")

    @property
    def label(self) -> str:
        """The name with the parameters."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in vars(self).items())])

    @property
    @abstractmethod
    def names(self) -> int:
        """How many names of `pool` a problem has."""

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How many numbers a problem has."""

    @abstractmethod
    def problem(self, names: Sequence[str], numbers: Sequence[str], depth: float, draws: Draws) -> Problem:
        """Returns the problem with these names and numbers; `depth` has no effect without `has_depth`."""

    @abstractmethod
    def candidates(self, text: str) -> Sequence[str]:
        """Returns what may be an answer in a model's text, in its order."""

    def draw(self, depth: float, draws: Draws) -> Problem:
        """Returns a problem with random names and numbers, all of them different."""
        numbers: dict[str, None] = {}
        while len(numbers) < self.numbers:
            numbers[str(draws.integers(*NUMBERS))] = None
        names = draws.permutation(len(self.pool))[: self.names] if self.names else ()
        return self.problem([self.pool[name] for name in names], list(numbers), depth, draws)

    def score(self, answers: Sequence[str], text: str) -> float:
        """Returns the share of the answers that are in a model's text.

        As many different candidates of the text count as there are answers, the first ones, so that naming
        everything is no way to a high score. RULER's recall (section 4) counts all.
        """
        first = list(dict.fromkeys(self.candidates(text)))[: len(answers)]
        return len(set(first) & set(answers)) / len(answers)


@dataclass(frozen=True)
class PassKey(Task):
    """One number is hidden and asked for."""

    name = "passkey"
    summary = "the text hides one number, which is asked for"
    introduction = "One line of the text below holds a pass key. Read the text and remember the pass key."
    has_depth = True
    names, numbers = 0, 1

    def problem(self, names: Sequence[str], numbers: Sequence[str], depth: float, draws: Draws) -> Problem:
        (key,) = numbers
        line = f"The pass key is {key}. Remember it: {key} is the pass key."
        return Problem([(depth, line)], "What is the pass key?", "The pass key is", (key,))

    def candidates(self, text: str) -> Sequence[str]:
        return _numbers(text)


@dataclass(frozen=True)
class KeysTask(Task):
    """Several words have a number each."""

    keys: int = 4

    def __post_init__(self) -> None:
        _check_least("keys", self.keys, 2)
        super().__post_init__()

    @property
    def names(self) -> int:
        return self.keys

    @property
    def numbers(self) -> int:
        return self.keys


@dataclass(frozen=True)
class MultiKey(KeysTask):
    """Words have a number each; that of one word is asked for."""

    name = "multi-key"
    summary = "several words have a number each, and that of one word is asked for"
    has_depth = True

    def problem(self, names: Sequence[str], numbers: Sequence[str], depth: float, draws: Draws) -> Problem:
        depths = [depth, *_spread(self.keys - 1, draws)]
        return Problem(
            list(zip(depths, map(_key_line, names, numbers), strict=True)),
            f"What is the pass key of {names[0]}?",
            f"The pass key of {names[0]} is",
            (numbers[0],),
        )

    def candidates(self, text: str) -> Sequence[str]:
        return _numbers(text)


@dataclass(frozen=True)
class MultiValue(KeysTask):
    """One word has several numbers, in a line each; all are asked for."""

    name = "multi-value"
    summary = "one word has several numbers, in a line each, and all are asked for"
    names = 1

    def problem(self, names: Sequence[str], numbers: Sequence[str], depth: float, draws: Draws) -> Problem:
        lines = [f"One pass key of {names[0]} is {number}." for number in numbers]
        return Problem(
            list(zip(_spread(self.keys, draws), lines, strict=True)),
            f"What are the {self.keys} pass keys of {names[0]}?",
            f"The pass keys of {names[0]} are",
            tuple(numbers),
        )

    def candidates(self, text: str) -> Sequence[str]:
        return _keys(text)


@dataclass(frozen=True)
class MultiQuery(KeysTask):
    """Words have a number each; all are asked for at once."""

    name = "multi-query"
    summary = "several words have a number each, and all are asked for at once"

    def problem(self, names: Sequence[str], numbers: Sequence[str], depth: float, draws: Draws) -> Problem:
        order = draws.permutation(self.keys)
        asked = _listed([names[each] for each in order])
        return Problem(
            list(zip(_spread(self.keys, draws), map(_key_line, names, numbers), strict=True)),
            f"What are the pass keys of {asked}?",
            f"The pass keys of {asked} are",
            tuple(numbers[each] for each in order),
        )

    def candidates(self, text: str) -> Sequence[str]:
        return _keys(text)


@dataclass(frozen=True)
class VariableTracking(Task):
    """Variables get a number, or the value of another variable; all that have one number are asked for."""

    hops: int = 4
    chains: int = 2

    name = "variable-tracking"
    summary = (
        "variables get a number or the value of an earlier one, and all that have a number are asked for"
    )
    introduction = (
        "Some lines of the text below give a variable a number, or the value of another variable. Read the "
        "text and remember the variables."
    )
    pool = VARIABLES

    def __post_init__(self) -> None:
        _check_least("hops", self.hops, 1)
        _check_least("chains", self.chains, 1)
        super().__post_init__()

    @property
    def names(self) -> int:
        return self.chains * (self.hops + 1)

    @property
    def numbers(self) -> int:
        return self.chains

    def problem(self, names: Sequence[str], numbers: Sequence[str], depth: float, draws: Draws) -> Problem:
        chains = np.reshape(names, (self.chains, -1)).tolist()
        lines = [
            [f"{name} = {value}" for name, value in zip(chain, [number, *chain], strict=False)]
            for chain, number in zip(chains, numbers, strict=True)
        ]
        # The lines of a chain keep their order, between those of the others.
        turns = draws.permutation(np.repeat(np.arange(self.chains), self.hops + 1))
        following = [iter(chain) for chain in lines]
        mixed = [next(following[turn]) for turn in turns]
        return Problem(
            list(zip(_spread(len(mixed), draws), mixed, strict=True)),
            f"Which {self.hops + 1} variables have the value {numbers[0]}?",
            f"The variables with the value {numbers[0]} are",
            tuple(chains[0]),
        )

    def candidates(self, text: str) -> Sequence[str]:
        return [name for name in _VARIABLE.findall(text) if name in VARIABLES]


def make_tasks(names: Sequence[str], *, keys: int = 4, hops: int = 4, chains: int = 2) -> list[Task]:
    """Returns tasks by their names.

    Args:
        keys: numbers that are hidden for multi-key, multi-value and multi-query.
        hops: variables of a chain that have their value from another one.
        chains: chains of variables, of which one is asked for.

    Raises:
        UserError: a name is unknown, or a count is too small or too large.
    """
    make: dict[str, Callable[[], Task]] = {
        PassKey.name: PassKey,
        MultiKey.name: partial(MultiKey, keys),
        MultiValue.name: partial(MultiValue, keys),
        MultiQuery.name: partial(MultiQuery, keys),
        VariableTracking.name: partial(VariableTracking, hops, chains),
    }
    for name in names:
        if name not in make:
            raise UserError(f"{name!r} is not a task; choose from {', '.join(make)}")
    return [make[name]() for name in names]


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name}={value} must be at least {least}")


def _key_line(word: str, number: str) -> str:
    return f"The pass key of {word} is {number}."


def _listed(items: Sequence[str]) -> str:
    """Returns "a, b and c"."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _spread(count: int, draws: Draws) -> list[float]:
    """Returns ascending shares: one drawn from each of as many equal parts of the text."""
    return ((np.arange(count) + draws.random(count)) / count).tolist()


def _numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in _NUMBER.findall(text)]


def _keys(text: str) -> list[str]:
    """Returns the numbers of five digits; other numbers of a text count or mark the items of a list."""
    return [number for number in _numbers(text) if len(number) == len(str(NUMBERS[0]))]
