"""Conversations: every answer is what the whole conversation gives without a cache, whatever came before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import longrope
from small_checkpoint import PROMPT, write_checkpoint

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.generation import CompiledModel, stream_tokens
from phi3_jax.generation.chat import ChatSession, ContextFullError

QUESTIONS = (PROMPT, "And why?", "Say that again, and then some more of it, please.")
LEGIBLE = "0123456789XYZ"
"""Characters that the tokenizer has as tokens of their own and never joins to others."""

MakeSession = Callable[..., ChatSession]


@pytest.fixture(scope="module")
def session_of(tmp_path_factory: pytest.TempPathFactory) -> MakeSession:
    """`session_of(config={...}, **options)`: a session with a model of that config, made once."""
    made: dict[str, tuple[CompiledModel, Phi3Tokenizer]] = {}

    def make(config: dict[str, Any] | None = None, **options: Any) -> ChatSession:
        key = repr(config)
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            write_checkpoint(folder, **{"num_hidden_layers": 1} | (config or {}))
            model = Phi3ForCausalLM.from_pretrained(folder)
            made[key] = CompiledModel(model), Phi3Tokenizer.from_pretrained(folder)
        options = {"max_new_tokens": 12, "do_sample": False} | options
        return ChatSession(*made[key], **options)

    return make


@pytest.fixture(scope="module")
def illegible(session_of: MakeSession) -> list[int]:
    """All tokens but those of `LEGIBLE`; without them an answer is read back as the tokens it was made of."""
    kept = session_of().tokenizer.encode(LEGIBLE)
    assert len(kept) == len(LEGIBLE)
    return sorted(set(range(300)) - set(kept))


def fresh(session: ChatSession, text: str, **options: Any) -> str:
    """The answer to `text` after the session's messages, from nothing."""
    messages = [*session.messages, {"role": "user", "content": text}]
    ids = session.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": [[1] * len(ids)]} | options
    tokens = list(stream_tokens(session.compiled, ids, tokenizer=session.tokenizer, **options))
    return session.tokenizer.decode(tokens, skip_special_tokens=True)


def converse(session: ChatSession, questions: tuple[str, ...] = QUESTIONS, **options: Any) -> list[int]:
    """Asks, compares each answer with a fresh one; gives how many tokens each took from the cache."""
    cached = []
    for text in questions:
        expected = fresh(session, text, **options)
        assert "".join(session.reply(text)) == expected
        assert session.history[-2:] == [
            {"role": "user", "content": text},
            {"role": "assistant", "content": expected},
        ]
        assert session.last is not None
        cached.append(session.last.cached_tokens)
    return cached


def test_the_whole_of_an_answer_is_taken_from_the_cache(
    session_of: MakeSession, illegible: list[int]
) -> None:
    session = session_of(suppress_tokens=illegible, system="Be brief.")
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    held, cached = 0, []
    for text in QUESTIONS:
        assert "".join(session.reply(text)) == session.history[-1]["content"]
        assert session.last is not None
        cached.append((session.last.cached_tokens, held))
        held = session.last.prompt_tokens + session.last.new_tokens - 1
    assert cached[0] == (0, 0)
    assert all(known == held > 0 for known, held in cached[1:])
    converse(session_of(suppress_tokens=illegible, system="Be brief."), suppress_tokens=illegible)


def test_an_answer_that_reads_back_as_other_tokens(session_of: MakeSession) -> None:
    session = session_of()
    first = converse(session, QUESTIONS[:1])
    assert session.last is not None
    held = session.last.prompt_tokens + session.last.new_tokens - 1
    prompt = session.last.prompt_tokens
    (second,) = converse(session, QUESTIONS[1:2])
    assert first == [0]
    assert prompt <= second < held
    assert converse(session, QUESTIONS[2:]) > [second]


def test_a_later_turn_feeds_its_own_tokens_only(
    session_of: MakeSession, monkeypatch: pytest.MonkeyPatch, illegible: list[int]
) -> None:
    widths: list[int] = []
    call = CompiledModel.__call__

    def counted(self: CompiledModel, step: Any, state: Any, *arguments: Any, **static: Any) -> Any:
        if "width" in static:
            widths.append(static["width"])
        return call(self, step, state, *arguments, **static)

    monkeypatch.setattr(CompiledModel, "__call__", counted)
    session = session_of(suppress_tokens=illegible)
    list(session.reply("long " * 60))
    assert widths == [384]
    widths.clear()
    list(session.reply("Hi"))
    assert widths == [16]


def test_another_system_message_keeps_the_history(session_of: MakeSession) -> None:
    session = session_of(system="Be brief.")
    converse(session, QUESTIONS[:2])
    session.system = "Be long."
    (cached,) = converse(session, QUESTIONS[2:])
    assert 0 < cached < 8
    session.system = None
    assert converse(session, QUESTIONS[:1]) == [0]
    assert len(session.history) == 8


@pytest.mark.parametrize(
    ("original", "questions"),
    [
        (45, QUESTIONS),  # prompts of 14, 44 and 110 tokens and answers of 12
        (45, QUESTIONS[::2]),
        *(pytest.param(original, QUESTIONS, marks=pytest.mark.slow) for original in (40, 64, 100)),
    ],
)
def test_longrope_that_crosses_in_or_between_answers(
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
def test_a_ring_that_cannot_go_back_starts_afresh(session_of: MakeSession, illegible: list[int]) -> None:
    changes = {"sliding_window": 16, "max_position_embeddings": 400}
    options = {"cache_implementation": "sliding_window", "max_new_tokens": 40}
    cached = converse(session_of(changes, **options), **options)
    assert min(cached) == 0
    options["suppress_tokens"] = illegible
    assert min(converse(session_of(changes, **options), **options)[1:]) > 0


def test_why_answers_end(session_of: MakeSession, illegible: list[int]) -> None:
    text = "".join(session_of(suppress_tokens=illegible).reply(PROMPT))
    session = session_of(suppress_tokens=illegible)
    list(session.reply(PROMPT))
    assert session.last is not None
    assert (session.last.stopped, session.last.new_tokens) == ("max_new_tokens", 12)

    place = next(at for at in range(2, 12) if text[at] not in text[:at])
    end = session.tokenizer.encode(text[place])[0]
    for options in ({"eos_token_id": [end]}, {"stop_strings": [text[place]]}):
        session = session_of(suppress_tokens=illegible, **options)
        assert "".join(session.reply(PROMPT)) == text[: place + 1]
        assert (session.last and session.last.stopped) == "end"
        converse(session, suppress_tokens=illegible, **options)
    session = session_of(suppress_tokens=illegible, eos_token_id=[end], max_new_tokens=place + 1)
    list(session.reply(PROMPT))
    assert (session.last and session.last.stopped) == "end"


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_a_reader_who_has_seen_enough(session_of: MakeSession, illegible: list[int], pieces: int) -> None:
    session = session_of(suppress_tokens=illegible)
    converse(session, QUESTIONS[:1], suppress_tokens=illegible)
    whole = fresh(session, "Go on.", suppress_tokens=illegible)
    answer = session.reply("Go on.")
    said = "".join(next(answer) for _ in range(pieces))
    assert session.history[-1] == {"role": "assistant", "content": said}
    answer.close()
    assert whole.startswith(said)
    assert session.history[-2:] == [
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": said},
    ]
    assert session.last is not None
    assert (session.last.stopped, session.last.new_tokens) == ("reader", pieces)
    held = session.last.prompt_tokens + pieces - 1
    assert converse(session, QUESTIONS[1:2], suppress_tokens=illegible) == [held]


def test_an_answer_that_nobody_reads_is_not_in_the_history(session_of: MakeSession) -> None:
    session = session_of()
    converse(session, QUESTIONS[:1])
    session.reply("Hello?").close()
    session.reply("Hello?")
    assert len(session.history) == 2
    assert converse(session, QUESTIONS[1:2])[0] > 0


def test_an_interrupt_in_the_middle_of_a_step(session_of: MakeSession) -> None:
    """It costs the cache; what was said stays."""
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


def test_an_answer_that_outlives_its_conversation(session_of: MakeSession) -> None:
    session = session_of()
    old = session.reply(PROMPT)
    next(old)
    session.reset()
    list(old)
    assert session.history == []
    assert converse(session)[0] > 0


@pytest.mark.slow
def test_a_conversation_that_outgrows_the_context(session_of: MakeSession) -> None:
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
        said = ["".join(session.reply(text)) for text in QUESTIONS]
        session.reset()
        return [*said, "".join(session.reply(QUESTIONS[0]))]

    first = answers(5)
    assert first == answers(5)
    assert first[0] != first[-1], "the same question again, in another turn"
    assert first[0] != answers(6)[0]
    assert answers(-5)[0] != first[0]
    assert answers(None) != answers(None)


def test_saved_and_loaded(session_of: MakeSession, tmp_path: Path) -> None:
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
def test_a_broken_file(session_of: MakeSession, tmp_path: Path, content: str | bytes, message: str) -> None:
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


def test_what_cannot_be_streamed_changes_nothing(session_of: MakeSession) -> None:
    session = session_of(num_beams=2)
    with pytest.raises(ValueError, match="num_beams=2"):
        session.reply("Hi")
    assert session.history == []
