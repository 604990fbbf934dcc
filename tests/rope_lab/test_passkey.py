"""Prompts that hide a pass key: exact lengths, depths and answers."""

import re

import pytest
from small_checkpoint import write_checkpoint

from phi3_jax import Phi3Tokenizer
from phi3_jax.rope_lab.passkey import FILLER, KEY, QUESTION, TASK, Case, PasskeyPrompts, has_key


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Phi3Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return Phi3Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", [True, False], ids=["template", "raw"])
@pytest.mark.parametrize("length", [400, 401, 777, 1500])
def test_prompts_have_their_length_and_depth(tokenizer: Phi3Tokenizer, template: bool, length: int) -> None:
    prompts = PasskeyPrompts(tokenizer, 20, template)
    depths = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        prompt = prompts(Case(length, depth, 3))
        assert len(prompt.ids) == length - 20
        text = tokenizer.decode(prompt.ids)
        line = KEY.format(key=prompt.key)
        assert text.count(line) == 1
        assert re.findall(r"\d+", text) == [prompt.key] * 2
        begin, end = text.index(TASK) + len(TASK), text.index(QUESTION)
        room = end - begin - len(line)
        depths.append((text.index(line) - begin) / room)
        before = text[begin : text.index(line)]
        # The first line may be cut from the left; all others are the filler's.
        assert all(part in FILLER for part in before.splitlines()[1:])
        assert before == "" or before.endswith("\n")
        assert text.startswith("<|user|>" + TASK if template else TASK)
        assert text.endswith("<|assistant|>" if template else "\nThe pass key is")
    longest = max(len(line) + 1 for line in FILLER) / room
    assert depths == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=longest)
    assert (depths[0], depths[-1]) == (0, 1)


def test_cases_differ_and_are_reproducible(tokenizer: Phi3Tokenizer) -> None:
    prompts = PasskeyPrompts(tokenizer, 20, template=True)
    cases = [prompts(Case(500, 0.5, trial)) for trial in range(20)]
    assert len({prompt.key for prompt in cases}) == 20
    assert len({tuple(prompt.ids[100:150]) for prompt in cases}) > 5
    again = PasskeyPrompts(tokenizer, 20, template=True)
    assert [again(Case(500, 0.5, trial)) for trial in range(20)] == cases
    other = PasskeyPrompts(tokenizer, 20, template=True, seed=1)
    assert other(Case(500, 0.5, 0)).key != cases[0].key


def test_uses_the_lines_of_a_text_as_filler(tokenizer: Phi3Tokenizer) -> None:
    prompts = PasskeyPrompts(tokenizer, 20, template=False, filler=["one", "", "  two words ", "three"])
    text = tokenizer.decode(prompts(Case(500, 1.0, 0)).ids)
    assert set(text.split("\n")[3:-4]) == {"one", "two words", "three"}
    with pytest.raises(ValueError, match="the text for the filler is empty"):
        PasskeyPrompts(tokenizer, 20, template=False, filler=["", " "])(Case(500, 1.0, 0))


def test_rejects_lengths_that_are_too_short(tokenizer: Phi3Tokenizer) -> None:
    prompts = PasskeyPrompts(tokenizer, 20, template=True)
    prompts.check([prompts.shortest])
    for trial in range(20):
        assert len(prompts(Case(prompts.shortest, 0.5, trial)).ids) == prompts.shortest - 20
    with pytest.raises(
        ValueError, match=f"length 100 is too short.*20 tokens of answer need {prompts.shortest}"
    ):
        prompts.check([1000, 100])


def test_rejects_a_template_without_the_message(
    tokenizer: Phi3Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "hello")
    with pytest.raises(ValueError, match="leaves out the user's message; use --raw"):
        PasskeyPrompts(tokenizer, 20, template=True).check([500])


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
def test_finds_the_key_in_answers(answer: str, right: bool) -> None:
    assert has_key(answer, "71432") is right


def test_the_filler_says_nothing() -> None:
    assert len(set(FILLER)) == len(FILLER)
    assert not any(re.search(r"\d|key|pass\b", line) for line in FILLER)
