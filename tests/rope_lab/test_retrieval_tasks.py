"""Retrieval tasks: what they hide and ask, and the scores of answers."""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.retrieval.tasks import (
    MultiKey,
    MultiQuery,
    MultiValue,
    PassKey,
    Problem,
    VariableTracking,
    make_tasks,
)
from phi3_jax.rope_lab.retrieval.texts import FILLER, VARIABLES, WORDS

NAMES = ("passkey", "multi-key", "multi-value", "multi-query", "variable-tracking")


def draw(task: MultiKey | MultiQuery | MultiValue | VariableTracking, depth: float = 0.0) -> Problem:
    return task.draw(depth, np.random.default_rng(7))


def lines(problem: Problem) -> list[str]:
    return [line for _, line in sorted(problem.needles, key=lambda needle: needle[0])]


def test_multi_key_asks_for_the_line_at_the_depth() -> None:
    problem = draw(MultiKey(5), depth=0.6)
    (number,) = problem.answers
    asked = problem.question.split()[-1].rstrip("?")
    assert (0.6, f"The pass key of {asked} is {number}.") in problem.needles
    shares = [share for share, _ in problem.needles[1:]]
    assert [int(4 * share) for share in shares] == [0, 1, 2, 3]  # a distractor in each quarter
    assert len({line.split()[4] for line in lines(problem)}) == 5
    assert len({line.split()[-1] for line in lines(problem)}) == 5


def test_multi_value_hides_values_of_one_word() -> None:
    problem = draw(MultiValue(6))
    assert len({line.split()[4] for line in lines(problem)}) == 1
    assert [line.split()[-1].rstrip(".") for line in lines(problem)] == list(problem.answers)
    assert [int(6 * share) for share, _ in problem.needles] == list(range(6))


def test_multi_query_asks_in_another_order() -> None:
    problem = draw(MultiQuery(6))
    hidden = dict(re.findall(r"of (\w+) is (\d+)", " ".join(lines(problem))))
    asked = [word for word in re.findall(r"\w+", problem.question) if word in hidden]
    assert [hidden[word] for word in asked] == list(problem.answers)
    assert asked != list(hidden)
    assert sorted(asked) == sorted(hidden)


@pytest.mark.parametrize(("hops", "chains"), [(1, 1), (4, 2), (3, 5)])
def test_variables_get_their_values_in_order(hops: int, chains: int) -> None:
    problem = draw(VariableTracking(hops, chains))
    values: dict[str, str] = {}
    for line in lines(problem):
        name, value = line.split(" = ")
        assert name not in values
        values[name] = value if value.isdigit() else values[value]
    assert len(values) == chains * (hops + 1)
    asked = re.search(r"(\d+) variables have the value (\d+)", problem.question)
    assert asked is not None
    assert int(asked[1]) == hops + 1
    assert [name for name, value in values.items() if value == asked[2]] == list(problem.answers)
    assert len(set(values.values())) == chains
    if chains > 1:  # the chains are mixed
        order = [values[line.split(" = ")[0]] for line in lines(problem)]
        assert sum(one != other for one, other in pairwise(order)) >= chains


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 71432.", True),
        ("The pass key is 71432. Remember it", True),
        ("71,432", True),
        ("The key: **71432**", True),
        ("", False),
        ("The pass key is", False),
        ("714321", False),
        ("7143", False),
        ("12345, no: 71432", False),
        ("7 1 4 3 2", False),
    ],
)
def test_the_first_number_counts_where_one_is_asked_for(answer: str, right: bool) -> None:
    assert PassKey().score(["71432"], answer) == MultiKey().score(["71432"], answer) == float(right)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" 11111, 22222 and 33333.", 1),
        ("33333,11111,22222", 1),
        ("The 3 pass keys are:\n1. 22,222\n2. 11111\n3. 33333", 1),
        ("11111, 11111, 11111, 22222", 2 / 3),
        ("11111 22222 44444 33333", 2 / 3),
        ("44444 55555 66666 11111 22222 33333", 0),
        ("111112222233333", 0),
        ("", 0),
    ],
)
def test_as_many_numbers_count_as_are_asked_for(answer: str, score: float) -> None:
    for task in (MultiValue(3), MultiQuery(3)):
        assert task.score(["11111", "22222", "33333"], answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" BAK, TEL and DIM.", 1),
        ("THE variables are DIM = 12345, TEL, BAK", 1),
        ("BAK, BAK, TEL", 2 / 3),
        ("KOT, BAK, TEL, DIM", 2 / 3),
        ("bak, BAKE, TELS", 0),
    ],
)
def test_as_many_variables_count_as_are_asked_for(answer: str, score: float) -> None:
    task = VariableTracking(hops=2)
    assert task.score(["BAK", "TEL", "DIM"], answer) == pytest.approx(score)


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_scores_one(name: str) -> None:
    (task,) = make_tasks([name], keys=7, hops=6, chains=3)
    for trial in range(20):
        problem = task.draw(0.5, np.random.default_rng(trial))
        assert task.score(problem.answers, problem.answer_start + problem.rest_of_answer) == 1
        assert task.score(problem.answers, problem.rest_of_answer) == 1
        assert task.score(problem.answers, problem.answer_start) == 0


def test_labels_have_the_parameters() -> None:
    labels = [task.label for task in make_tasks(NAMES, keys=3, hops=2, chains=1)]
    assert labels == [
        "passkey",
        "multi-key keys=3",
        "multi-value keys=3",
        "multi-query keys=3",
        "variable-tracking hops=2 chains=1",
    ]


@pytest.mark.parametrize(
    ("names", "counts", "message"),
    [
        (["pass"], {}, "'pass' is not a task; choose from passkey, multi-key, multi-value"),
        (["multi-value"], {"keys": 1}, "keys=1 must be at least 2"),
        (["multi-key"], {"keys": 500}, "multi-key keys=500 needs 500 names, and there are"),
        (["variable-tracking"], {"hops": 0}, "hops=0 must be at least 1"),
        (["variable-tracking"], {"chains": 0}, "chains=0 must be at least 1"),
        (["variable-tracking"], {"chains": 200}, "needs 1000 names, and there are 500; choose fewer"),
        (["multi-value"], {"keys": 90_001}, "needs 90001 numbers, and there are 90000"),
    ],
)
def test_rejects_wrong_tasks(names: Sequence[str], counts: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_tasks(names, **counts)


def test_texts_give_nothing_away() -> None:
    assert len(set(FILLER)) == len(FILLER)
    assert len(set(WORDS)) == len(WORDS)
    assert not any(re.search(r"\d|key|pass\b|[A-Z]{3}", line) for line in FILLER)
    assert not {word for line in FILLER for word in re.findall("[a-z]+", line)} & set(WORDS)
    assert len(set(VARIABLES)) == len(VARIABLES) == 500
