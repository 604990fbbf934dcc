"""Tests that every answer of a conversation equals the answer to the whole conversation without a cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import slow
from reference import longrope
from small_checkpoint import PROMPT, write_checkpoint

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.generation import CompiledModel, stream_tokens
from phi3_jax.generation.chat import ChatSession, ContextFullError

QUESTIONS = (PROMPT, "And why?", "Say that again, and then some more of it, please.")
STABLE = "0123456789XYZ"
"""Characters that the tokenizer always encodes as tokens of their own."""

MakeSession = Callable[..., ChatSession]


@pytest.fixture(scope="module")
def session_of(tmp_path_factory: pytest.TempPathFactory) -> MakeSession:
    """Returns `session_of(config={...}, **options)`; it makes each config's model once."""
    models: dict[str, tuple[CompiledModel, Phi3Tokenizer]] = {}

    def make(config: dict[str, Any] | None = None, **options: Any) -> ChatSession:
        key = repr(config)
        if key not in models:
            folder = tmp_path_factory.mktemp("model")
            write_checkpoint(folder, **{"num_hidden_layers": 1} | (config or {}))
            model = Phi3ForCausalLM.from_pretrained(folder)
            models[key] = CompiledModel(model), Phi3Tokenizer.from_pretrained(folder)
        options = {"max_new_tokens": 12, "do_sample": False} | options
        return ChatSession(*models[key], **options)

    return make


@pytest.fixture(scope="module")
def unstable_tokens(session_of: MakeSession) -> list[int]:
    """All tokens but those of `STABLE`; an answer without them is encoded as the tokens it consists of."""
    stable = session_of().tokenizer.encode(STABLE)
    assert len(stable) == len(STABLE)
    return sorted(set(range(300)) - set(stable))


def uncached_reply(session: ChatSession, text: str, **options: Any) -> str:
    """Returns the answer to `text` after the session's messages, without a cache."""
    messages = [*session.messages, {"role": "user", "content": text}]
    ids = session.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": [[1] * len(ids)]} | options
    tokens = list(stream_tokens(session.compiled, ids, tokenizer=session.tokenizer, **options))
    return session.tokenizer.decode(tokens, skip_special_tokens=True)


def converse(session: ChatSession, questions: tuple[str, ...] = QUESTIONS, **options: Any) -> list[int]:
    """Asks questions and compares the answers with uncached ones; returns each answer's cached tokens."""
    cached = []
    for text in questions:
        expected = uncached_reply(session, text, **options)
        assert "".join(session.reply(text)) == expected
        assert session.history[-2:] == [
            {"role": "user", "content": text},
            {"role": "assistant", "content": expected},
        ]
        assert session.last is not None
        cached.append(session.last.cached_tokens)
    return cached


@pytest.mark.slow
def test_a_whole_answer_comes_from_the_cache(session_of: MakeSession, unstable_tokens: list[int]) -> None:
    session = session_of(suppress_tokens=unstable_tokens, system="Be brief.")
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    expected, cached = 0, []
    for text in QUESTIONS:
        assert "".join(session.reply(text)) == session.history[-1]["content"]
        assert session.last is not None
        cached.append((session.last.cached_tokens, expected))
        expected = session.last.prompt_tokens + session.last.new_tokens - 1
    assert cached[0] == (0, 0)
    assert all(tokens == expected > 0 for tokens, expected in cached[1:])
    converse(session_of(suppress_tokens=unstable_tokens, system="Be brief."), suppress_tokens=unstable_tokens)


@pytest.mark.slow
def test_an_answer_that_is_encoded_as_other_tokens(session_of: MakeSession) -> None:
    session = session_of()
    first = converse(session, QUESTIONS[:1])
    assert session.last is not None
    cached = session.last.prompt_tokens + session.last.new_tokens - 1
    prompt = session.last.prompt_tokens
    (second,) = converse(session, QUESTIONS[1:2])
    assert first == [0]
    assert prompt <= second < cached
    assert converse(session, QUESTIONS[2:]) > [second]


@pytest.mark.slow
def test_a_later_turn_feeds_its_own_tokens_only(
    session_of: MakeSession, monkeypatch: pytest.MonkeyPatch, unstable_tokens: list[int]
) -> None:
    widths: list[int] = []
    call = CompiledModel.__call__

    def record_width(self: CompiledModel, step: Any, state: Any, *arguments: Any, **static: Any) -> Any:
        if "width" in static:
            widths.append(static["width"])
        return call(self, step, state, *arguments, **static)

    monkeypatch.setattr(CompiledModel, "__call__", record_width)
    session = session_of(suppress_tokens=unstable_tokens)
    list(session.reply("long " * 60))
    assert widths == [384]
    widths.clear()
    list(session.reply("Hi"))
    assert widths == [16]


@pytest.mark.slow
def test_another_system_message_keeps_the_history(session_of: MakeSession) -> None:
    session = session_of(system="Be brief.")
    converse(session, QUESTIONS[:2])
    session.system = "Be long."
    (cached,) = converse(session, QUESTIONS[2:])
    assert 0 < cached < 8
    session.system = None
    assert converse(session, QUESTIONS[:1]) == [0]
    assert len(session.history) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("original", "questions"),
    [
        (45, QUESTIONS[::2]),  # prompts of 14 and 110 tokens and answers of 12
        *(slow(original, QUESTIONS) for original in (40, 45, 64, 100)),
    ],
)
def test_longrope_switches_in_or_between_answers(
    session_of: MakeSession, original: int, questions: tuple[str, ...]
) -> None:
    changes = longrope() | {"original_max_position_embeddings": original, "max_position_embeddings": 400}
    session = session_of(changes)
    converse(session, questions)
    assert session.last is not None
    assert session.last.prompt_tokens > original
    list(session.reply("more"))
    session.reset()
    converse(session, questions)  # back on the short list


@pytest.mark.slow
def test_a_ring_that_cannot_rewind_starts_over(session_of: MakeSession, unstable_tokens: list[int]) -> None:
    changes = {"sliding_window": 16, "max_position_embeddings": 400}
    options = {"cache_implementation": "sliding_window", "max_new_tokens": 40}
    cached = converse(session_of(changes, **options), **options)
    assert min(cached) == 0
    options["suppress_tokens"] = unstable_tokens
    assert min(converse(session_of(changes, **options), **options)[1:]) > 0


def test_reports_why_answers_end(session_of: MakeSession, unstable_tokens: list[int]) -> None:
    text = "".join(session_of(suppress_tokens=unstable_tokens).reply(PROMPT))
    session = session_of(suppress_tokens=unstable_tokens)
    list(session.reply(PROMPT))
    assert session.last is not None
    assert (session.last.stopped, session.last.new_tokens) == ("max_new_tokens", 12)

    index = next(index for index in range(2, 12) if text[index] not in text[:index])
    end = session.tokenizer.encode(text[index])[0]
    for options in ({"eos_token_id": [end]}, {"stop_strings": [text[index]]}):
        session = session_of(suppress_tokens=unstable_tokens, **options)
        assert "".join(session.reply(PROMPT)) == text[: index + 1]
        assert (session.last and session.last.stopped) == "end"
        converse(session, suppress_tokens=unstable_tokens, **options)
    session = session_of(suppress_tokens=unstable_tokens, eos_token_id=[end], max_new_tokens=index + 1)
    list(session.reply(PROMPT))
    assert (session.last and session.last.stopped) == "end"


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_a_reader_stops_early(session_of: MakeSession, unstable_tokens: list[int], pieces: int) -> None:
    session = session_of(suppress_tokens=unstable_tokens)
    converse(session, QUESTIONS[:1], suppress_tokens=unstable_tokens)
    whole = uncached_reply(session, "Go on.", suppress_tokens=unstable_tokens)
    answer = session.reply("Go on.")
    text = "".join(next(answer) for _ in range(pieces))
    assert session.history[-1] == {"role": "assistant", "content": text}
    answer.close()
    assert whole.startswith(text)
    assert session.history[-2:] == [
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": text},
    ]
    assert session.last is not None
    assert (session.last.stopped, session.last.new_tokens) == ("reader", pieces)
    cached = session.last.prompt_tokens + pieces - 1
    assert converse(session, QUESTIONS[1:2], suppress_tokens=unstable_tokens) == [cached]


def test_an_unread_answer_is_not_in_the_history(session_of: MakeSession) -> None:
    session = session_of()
    converse(session, QUESTIONS[:1])
    session.reply("Hello?").close()
    session.reply("Hello?")
    assert len(session.history) == 2
    assert converse(session, QUESTIONS[1:2])[0] > 0


@pytest.mark.slow
def test_an_interrupt_within_a_step(session_of: MakeSession) -> None:
    """An interrupt loses the cache; the history stays."""
    calls = 0

    def processor(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return scores

    session = session_of(logits_processor=[processor])
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        pieces.extend(session.reply(PROMPT))
    assert [message["content"] for message in session.history] == [PROMPT, "".join(pieces)]
    assert (session.last and session.last.new_tokens) == 4
    assert converse(session, QUESTIONS[1:])[0] == 0
    calls = 4
    before = session.history.copy()
    with pytest.raises(KeyboardInterrupt):
        list(session.reply(PROMPT))
    assert session.history == before


def test_an_answer_still_runs_after_reset(session_of: MakeSession) -> None:
    session = session_of()
    old = session.reply(PROMPT)
    next(old)
    session.reset()
    list(old)
    assert session.history == []
    assert converse(session)[0] > 0


@pytest.mark.slow
def test_a_conversation_fills_the_context(session_of: MakeSession) -> None:
    session = session_of({"max_position_embeddings": 128, "original_max_position_embeddings": 128})
    converse(session, QUESTIONS[:1])
    messages = [*session.messages, {"role": "user", "content": ""}]
    used = len(session.tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    answer = "".join(session.reply("7" * (128 - 5 - used)))
    assert session.last is not None
    assert (session.last.stopped, session.last.new_tokens) == ("context", 5)
    assert session.last.prompt_tokens + session.last.new_tokens == 128
    before = session.messages
    assert before[-1]["content"] == answer
    with pytest.raises(ContextFullError, match=r"has 1[3-9]\d tokens.* context of 128 .*/reset"):
        session.reply("And now?")
    assert session.messages == before
    session.reset()
    converse(session, QUESTIONS[:1])


@pytest.mark.slow
@pytest.mark.parametrize("draft", [{}, {"prompt_lookup_num_tokens": 3}])
def test_drafts_and_draws(session_of: MakeSession, draft: dict[str, int]) -> None:
    if draft:
        converse(session_of(**draft))
    drawn = {"do_sample": True, "temperature": 1.5} | draft

    def answers(seed: int | None) -> list[str]:
        session = session_of(seed=seed, **drawn)
        texts = ["".join(session.reply(text)) for text in QUESTIONS]
        session.reset()
        return [*texts, "".join(session.reply(QUESTIONS[0]))]

    first = answers(5)
    assert first == answers(5)
    assert first[0] != first[-1], "the same question again, in another turn"
    assert first[0] != answers(6)[0]
    assert answers(-5)[0] != first[0]
    assert answers(None) != answers(None)


def test_saves_and_loads(session_of: MakeSession, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    session = session_of(system="Be brief.")
    converse(session, QUESTIONS[:2])
    session.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": session.messages}

    other = session_of(system="Be long.")
    converse(other, QUESTIONS[2:])
    other.load(file)
    assert other.messages == session.messages
    assert "".join(other.reply(QUESTIONS[2])) == "".join(session.reply(QUESTIONS[2]))

    session_of().save(file)
    other.load(file)
    assert other.messages == []
    converse(other, QUESTIONS[:1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "talk.json is not valid JSON: Expecting"),
        ("[]", 'expected {"messages": '),
        ('{"messages": {}}', 'expected {"messages": '),
        ('{"messages": ["Hi"]}', "message 0 is 'Hi'; expected role and content"),
        ('{"messages": [{"role": "user"}]}', "message 0 is"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "its roles are user; expected user and"),
        ('{"messages": [{"role": "tool", "content": "Hi"}]}', "its roles are tool;"),
        (b"\xff\xfe\x00", "talk.json is not valid UTF-8"),
    ],
)
def test_rejects_a_broken_file(
    session_of: MakeSession, tmp_path: Path, content: str | bytes, message: str
) -> None:
    file = tmp_path / "talk.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    session = session_of(system="Be brief.")
    session.history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = session.messages
    with pytest.raises(ValueError, match="is not ") as error:
        session.load(file)
    assert message in str(error.value)
    assert session.messages == before
    with pytest.raises(FileNotFoundError, match="absent"):
        session.load(tmp_path / "absent.json")
    with pytest.raises(OSError, match="absent"):
        session.save(tmp_path / "absent" / "talk.json")


def test_options_that_cannot_be_streamed_change_nothing(session_of: MakeSession) -> None:
    session = session_of(num_beams=2)
    with pytest.raises(ValueError, match="num_beams=2"):
        session.reply("Hi")
    assert session.history == []
