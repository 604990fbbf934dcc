"""Prompts of retrieval tasks: exact lengths, depths and answers."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from retrieval_reader import right_values
from small_checkpoint import write_checkpoint

from phi3_jax import Phi3Tokenizer
from phi3_jax.rope_lab.retrieval.prompts import Case, RetrievalPrompts, TaskPrompts
from phi3_jax.rope_lab.retrieval.tasks import PassKey, make_tasks
from phi3_jax.rope_lab.retrieval.texts import FILLER

NAMES = ("passkey", "multi-key", "multi-value", "multi-query", "variable-tracking")
INTRODUCTION = f"{PassKey.introduction}\n\n"
LINE = "The pass key is {key}. Remember it: {key} is the pass key.\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Phi3Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return Phi3Tokenizer.from_pretrained(folder)


def passkeys(tokenizer: Phi3Tokenizer, **options: object) -> RetrievalPrompts:
    return RetrievalPrompts(tokenizer, [PassKey()], **{"max_new_tokens": 20} | options)  # type: ignore[arg-type]


def passkey(length: int, depth: float, trial: int) -> Case:
    return Case("passkey", length, depth, trial)


@pytest.mark.parametrize("template", [True, False], ids=["template", "raw"])
@pytest.mark.parametrize("length", [400, 401, 777, 1500])
def test_prompts_have_their_length_and_depth(tokenizer: Phi3Tokenizer, template: bool, length: int) -> None:
    prompts = passkeys(tokenizer, raw=not template)
    depths = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        prompt = prompts(passkey(length, depth, 3))
        assert len(prompt.ids) == length - 20
        text = tokenizer.decode(prompt.ids)
        (key,) = prompt.answers
        line = LINE.format(key=key)
        assert text.count(line) == 1
        assert re.findall(r"\d+", text) == [key] * 2
        begin, end = text.index(INTRODUCTION) + len(INTRODUCTION), text.index("\nWhat is the pass key?")
        room = end - begin - len(line)
        depths.append((text.index(line) - begin) / room)
        before = text[begin : text.index(line)]
        # The first line may be cut from the left; all others are the filler's.
        assert all(part in FILLER for part in before.splitlines()[1:])
        assert before == "" or before.endswith("\n")
        assert text.startswith("<|user|>" + INTRODUCTION if template else INTRODUCTION)
        assert text.endswith("<|assistant|>" if template else "\nThe pass key is")
    longest = max(len(line) + 1 for line in FILLER) / room
    assert depths == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=longest)
    assert (depths[0], depths[-1]) == (0, 1)


def test_prompts_of_the_pass_key_do_not_change(tokenizer: Phi3Tokenizer) -> None:
    """Answers of earlier versions stay comparable."""
    prompt = passkeys(tokenizer)(passkey(777, 0.25, 3))
    assert prompt.answers == ("20178",)
    assert hashlib.sha256(str(prompt.ids).encode()).hexdigest()[:16] == "89dec1483f5904a9"


@pytest.mark.parametrize("raw", [False, True], ids=["template", "raw"])
@pytest.mark.parametrize("name", ["small", "phi-3", "phi-3-mini"])
def test_all_tasks_are_exact_and_can_be_solved(
    tokenizer: Phi3Tokenizer, shared_data: Callable[..., Path], name: str, raw: bool
) -> None:
    if name != "small":
        tokenizer = Phi3Tokenizer.from_pretrained(shared_data("phi3-tokenizer", name))
    for task in make_tasks(NAMES, keys=3, hops=3):
        prompts = RetrievalPrompts(tokenizer, [task], raw=raw)
        shortest = TaskPrompts(task, tokenizer, prompts.filler, prompts.template).shortest
        prompts.check([shortest])
        for length in (shortest, shortest + 1, shortest + 211):
            for trial in range(4):
                case = Case(task.name, length, 0.5 if task.has_depth else None, trial)
                prompt = prompts(case)
                answer_tokens = prompts.size(case).answer_tokens
                assert len(prompt.ids) == length - answer_tokens
                text = tokenizer.decode(prompt.ids)
                assert sorted(right_values(text)) == sorted(prompt.answers)
                answer = tokenizer.encode(prompt.right_answer, add_special_tokens=False)
                assert len(answer) <= answer_tokens
                assert prompts.score(case, prompt.answers, prompt.right_answer) == 1
        with pytest.raises(ValueError, match=f"too short for {task.label}: .* need {shortest}"):
            prompts.check([shortest - 1])


def test_training_texts_continue_the_prompt(tokenizer: Phi3Tokenizer) -> None:
    case = Case("multi-query", 700, None, 0)
    prompts = [
        RetrievalPrompts(tokenizer, make_tasks(["multi-query"]), raw=raw)(case) for raw in (False, True)
    ]
    keys, sentence = r" \d{5}, \d{5}, \d{5} and \d{5}\.", "The pass keys of [a-z, ]+ are"
    assert re.fullmatch(sentence + keys, prompts[0].right_answer)
    assert re.fullmatch(keys, prompts[1].right_answer)
    assert re.search(rf"\n{sentence}$", tokenizer.decode(prompts[1].ids))


def test_cases_differ_and_are_reproducible(tokenizer: Phi3Tokenizer) -> None:
    tasks = make_tasks(NAMES)
    prompts, again = (RetrievalPrompts(tokenizer, tasks) for _ in range(2))
    other = RetrievalPrompts(tokenizer, tasks, seed=1)
    for task in tasks:
        cases = [Case(task.name, 800, None, trial) for trial in range(10)]
        made = [prompts(case) for case in cases]
        assert len({prompt.answers for prompt in made}) == 10
        assert len({tuple(prompt.ids[100:150]) for prompt in made}) > 5
        assert list(map(again, cases)) == made
        assert other(cases[0]).answers != made[0].answers
    cases = [Case(name, 800, None, 0) for name in NAMES[:-1]]
    assert len({prompts(case).answers[0] for case in cases}) == 4  # tasks do not share numbers


def test_cases_have_depths_where_one_line_is_asked_for(tokenizer: Phi3Tokenizer) -> None:
    prompts = RetrievalPrompts(tokenizer, make_tasks(NAMES))
    cases = prompts.cases([700, 800], [0.0, 1.0], 3)
    assert len(cases) == 2 * 3 * (2 + 2 + 1 + 1 + 1)
    assert {case.task for case in cases if case.depth is None} == set(NAMES[2:])


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_the_asked_key_is_outermost(tokenizer: Phi3Tokenizer, depth: float) -> None:
    """The text is so short that distractors are beside it."""
    (task,) = make_tasks(["multi-key"], keys=6)
    prompts = RetrievalPrompts(tokenizer, [task], max_new_tokens=20)
    for trial in range(10):
        prompt = prompts(Case("multi-key", 520, depth, trial))
        hidden = re.findall(r"is (\d{5})\.", tokenizer.decode(prompt.ids))
        assert len(hidden) == 6
        assert hidden[-int(depth)] == prompt.answers[0]


def test_needles_are_spread_over_the_text(tokenizer: Phi3Tokenizer) -> None:
    (task,) = make_tasks(["multi-value"], keys=8)
    prompts = RetrievalPrompts(tokenizer, [task])
    text = tokenizer.decode(prompts(Case("multi-value", 20_000, None, 0)).ids)
    positions = np.array([match.start() for match in re.finditer(r"One pass key", text)]) / len(text)
    assert [int(8 * position) for position in positions] == list(range(8))


def test_uses_the_lines_of_a_text_as_filler(tokenizer: Phi3Tokenizer) -> None:
    prompts = passkeys(tokenizer, raw=True, filler=["one", "", "  two words ", "three"])
    text = tokenizer.decode(prompts(passkey(500, 1.0, 0)).ids)
    assert set(text.split("\n")[3:-4]) == {"one", "two words", "three"}
    with pytest.raises(ValueError, match="the text for the filler is empty"):
        passkeys(tokenizer, filler=["", " "])


def test_rejects_lengths_that_are_too_short(tokenizer: Phi3Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"length 100 is too short for passkey: .* 20 tokens of answer need"):
        passkeys(tokenizer).check([1000, 100])
    with pytest.raises(ValueError, match="length 100 is too short"):
        passkeys(tokenizer)(passkey(100, 0.0, 0))


def test_rejects_a_template_without_the_message(
    tokenizer: Phi3Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "hello")
    with pytest.raises(ValueError, match="leaves out the user's message; use --raw"):
        passkeys(tokenizer).check([500])
