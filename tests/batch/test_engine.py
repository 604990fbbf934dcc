"""The engine's answers, compared with `generate` on each request alone."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from compilations import compilations
from reference import LONG, SHORT, on_mesh
from small_checkpoint import NEVER, write_checkpoint
from strict_settings import strict_settings

from phi3_jax.batch import engine as module
from phi3_jax.batch.answers import Answer
from phi3_jax.batch.engine import Engine
from phi3_jax.batch.requests import BadRequestError
from phi3_jax.generation import generate
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.pipeline import Pipeline

HELLO = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, num_hidden_layers=1)
    return Pipeline.load(folder, dtype="float32")


def engine_of(pipeline: Pipeline, **options: Any) -> Engine:
    return Engine(
        pipeline.compiled,
        pipeline.tokenizer,
        **{"max_new_tokens": 9, "slots": 3, "max_length": 255} | options,
    )


def run(engine: Engine, *requests: dict[str, Any]) -> dict[Any, Any]:
    numbered = [{"id": number} | one for number, one in enumerate(requests)]
    answers = list(engine.run(numbered))
    assert sorted(one.id for one in answers) == list(range(len(requests)))
    return {one.id: one for one in answers}


def alone(pipeline: Pipeline, ids: list[int], **options: Any) -> list[int]:
    settings: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "attention_mask": [[1] * len(ids)]}
    (row,) = generate(pipeline.compiled, [ids], tokenizer=pipeline.tokenizer, **settings | options)
    return np.asarray(row)[len(ids) :].tolist()


def test_answers_texts_and_conversations(pipeline: Pipeline) -> None:
    answers = run(
        engine_of(pipeline),
        {"prompt": "Hello there, what is the capital of France?"},
        {"messages": HELLO},
        {"prompt": "x", "max_new_tokens": 30},
        {"prompt": "x", "temperature": 0.8, "seed": 4},
    )
    tokenizer = pipeline.tokenizer
    ids = {
        0: tokenizer.encode("Hello there, what is the capital of France?"),
        1: tokenizer.apply_chat_template(HELLO, add_generation_prompt=True),
        2: tokenizer.encode("x"),
        3: tokenizer.encode("x"),
    }
    options: dict[int, Any] = {2: {"max_new_tokens": 30}}
    options[3] = {"do_sample": True, "temperature": 0.8, "top_k": 0, "seed": 4}
    for number, answer in answers.items():
        tokens = alone(pipeline, ids[number], **options.get(number, {}))
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert (answer.prompt_tokens, answer.completion_tokens) == (len(ids[number]), len(tokens))
        assert answer.finish_reason == "length"


@pytest.mark.slow
def test_answers_where_nothing_is_promoted(pipeline: Pipeline) -> None:
    """With 64-bit numbers and JAX's strict promotion; the second and third prompt share a prefix."""
    system = "You answer every question about the capitals of countries in one short word. " * 2
    prompts = [f"{system}{question}" for question in ("France?", "Italy?", "Peru?")]
    options = {"temperature": 0.8, "top_k": 20, "seed": 4, "repetition_penalty": 1.2, "min_new_tokens": 3}
    with strict_settings():
        engine = engine_of(pipeline, slots=1)
        answers = run(engine, *({"prompt": prompt} for prompt in prompts), {"prompt": "x", **options})
    tokenizer = pipeline.tokenizer
    for number, prompt in enumerate([*prompts, "x"]):
        tokens = alone(
            pipeline, tokenizer.encode(prompt), **({"do_sample": True} | options if prompt == "x" else {})
        )
        assert answers[number].text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_stop_strings_end_an_answer(pipeline: Pipeline) -> None:
    whole = run(engine_of(pipeline, max_new_tokens=40), {"prompt": "Hello"})[0].text
    stop = whole[10:13]
    ids = pipeline.tokenizer.encode("Hello")
    expected = pipeline.tokenizer.decode(alone(pipeline, ids, max_new_tokens=40, stop_strings=[stop]))
    body = {"prompt": "Hello", "stop": [stop, "never there"]}
    openai = {"custom_id": "o", "method": "POST", "url": "/v1/completions", "body": body}
    own, other, default = (
        run(engine_of(pipeline, max_new_tokens=40), {"prompt": "Hello", "stop_strings": stop})[0],
        next(engine_of(pipeline, max_new_tokens=40).run([openai])),
        run(engine_of(pipeline, max_new_tokens=40, stop_strings=[stop]), {"prompt": "Hello"})[0],
    )
    assert isinstance(other, Answer)
    assert own.text == default.text == expected
    assert len(expected) < len(whole)
    assert other.text == whole[: whole.index(stop)]  # as that API has it
    assert {own.finish_reason, other.finish_reason, default.finish_reason} == {"stop"}


def test_text_leaves_the_end_token_out(pipeline: Pipeline) -> None:
    tokens = alone(pipeline, pipeline.tokenizer.encode("Hello"))
    model = pipeline.compiled.model
    before = model.generation_config
    model.generation_config = before.replace(eos_token_id=[NEVER, tokens[3]])
    try:
        answer = run(engine_of(pipeline), {"prompt": "Hello"})[0]
    finally:
        model.generation_config = before
    end = tokens.index(tokens[3]) + 1
    assert (answer.completion_tokens, answer.finish_reason) == (end, "stop")


def test_continues_after_invalid_requests(pipeline: Pipeline) -> None:
    invalid: list[tuple[dict[str, Any], str, str]] = [
        ({}, "invalid_request", "give either prompt or messages"),
        ({"prompt": "x", "temperature": -1}, "invalid_option", "temperature=-1"),
        ({"prompt": "x", "max_new_tokens": 0}, "invalid_option", "max_new_tokens=0 must be a whole number"),
        (
            {"prompt": "x", "max_new_tokens": 2.5},
            "invalid_option",
            "max_new_tokens=2.5 must be a whole number",
        ),
        ({"prompt": "x", "temperature": 1e-40}, "invalid_option", "temperature=1e-40 must be 0, or"),
        ({"prompt": "x", "temperature": 10**310}, "invalid_option", "temperature=1000"),
        ({"prompt": "x", "frequency_penalty": 1e300}, "invalid_option", "must be a finite number"),
        ({"prompt": "x", "top_k": 2**31}, "invalid_option", "top_k=2147483648 must be"),
        ({"prompt": "x", "min_new_tokens": 10**30}, "invalid_option", "min_new_tokens=1000"),
        ({"prompt": "x", "stop_strings": [""]}, "invalid_option", "stop_strings holds an empty text"),
        ({"prompt": "x", "stop_strings": [1]}, "invalid_option", "stop_strings holds int"),
        (
            {"prompt": "x" * 300},
            "prompt_too_long",
            "the prompt has 300 tokens; prompt and answer may have 255",
        ),
        ({"prompt": "x", "colour": "red"}, "unknown_option", "there is no option 'colour'"),
    ]
    answers = run(engine_of(pipeline), *(request for request, _, _ in invalid), {"prompt": "x"})
    for number, (_, code, message) in enumerate(invalid):
        error = answers[number]
        assert isinstance(error, BadRequestError)
        assert error.code == code
        assert str(error).startswith(f"line {number + 1}: ")
        assert message in str(error)
    assert answers[len(invalid)].completion_tokens == 9


def test_answers_end_at_max_length(pipeline: Pipeline) -> None:
    (answer,) = run(engine_of(pipeline), {"prompt": "x" * 250, "max_new_tokens": 90}).values()
    assert (answer.prompt_tokens, answer.completion_tokens, answer.finish_reason) == (250, 5, "length")


def test_reports_errors_of_the_template(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ raise_exception('roles must take turns') }}"
    monkeypatch.setattr(pipeline.tokenizer, "chat_template", template)
    (error,) = run(engine_of(pipeline), {"messages": HELLO}).values()
    assert (error.code, "roles must take turns" in str(error)) == ("invalid_messages", True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots=0 must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number"),
        ({"max_length": 5000}, "max_length=5000 must be from 2 to the model's context of 4096"),
        ({"temprature": 1}, "there is no option 'temprature'; use temperature, "),
        ({"top_p": 7}, "top_p=7"),
        ({"stop_strings": [""]}, "stop_strings holds an empty text"),
    ],
)
def test_rejects_invalid_options(pipeline: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(pipeline, **options)


def test_memory_limits_the_length(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "token_capacity", lambda compiled: 300)
    with pytest.raises(ValueError, match="max_length=400: memory holds the keys and values of 300 tokens"):
        engine_of(pipeline, max_length=400)
    engine = engine_of(pipeline, max_length=None, slots=7)
    assert engine.max_length == 75
    run(engine, *[{"prompt": "x" * 50}] * 20)
    assert sum(pool.slots * pool.length for pool in engine.pools) <= 300


def test_takes_requests_as_slots_become_free(pipeline: Pipeline) -> None:
    taken = 0

    def take() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for number in range(600):
            taken = number
            yield {"id": number, "prompt": "x", "max_new_tokens": 1}

    engine = engine_of(pipeline)
    for done, _ in enumerate(engine.run(take())):
        assert taken <= max(module.SAMPLE, done + 9)
    assert taken == 599


def test_one_engine_serves_several_runs(pipeline: Pipeline) -> None:
    engine = engine_of(pipeline, max_length=None)
    short = run(engine, {"prompt": "Hello"})[0].text
    assert [(pool.slots, pool.length) for pool in engine.pools] == [(1, 128)]
    long = {"prompt": "Hello" * 30, "max_new_tokens": 3}
    assert run(engine, long)[0].prompt_tokens == len(pipeline.tokenizer.encode("Hello" * 30))
    assert list(engine.run([])) == []
    closed_early = engine.run([{"id": n, "prompt": "Hello"} for n in range(20)])
    next(closed_early)
    closed_early.close()
    assert engine.load.busy == 0
    assert run(engine, *[{"prompt": "Hello"}] * 5)[3].text == short
    pools = engine.pools
    assert sum(pool.slots for pool in pools) > 1
    run(engine, {"prompt": "Hello"})
    assert engine.pools is pools


@pytest.mark.slow
def test_slots_for_few_requests_are_as_long_as_they_need(pipeline: Pipeline) -> None:
    short, long = {"prompt": "x"}, {"prompt": "x" * 700}
    engine = engine_of(pipeline, max_length=None)
    run(engine, short, long)
    assert [pool.slots for pool in engine.pools] == [1, 1]
    run(engine, long, long)
    assert engine.pools[-1].slots == 2


@pytest.mark.slow
def test_answers_on_a_mesh(pipeline: Pipeline) -> None:
    draws = random.Random(2)
    requests = [{"prompt": "abcdefgh"[: draws.randrange(1, 9)] * draws.randrange(1, 20)} for _ in range(12)]
    system = {"role": "system", "content": "Speak of rain, and of nothing else. " * 2}
    requests += [{"messages": [system, {"role": "user", "content": letter}]} for letter in "abc"]
    mesh = make_mesh("data=2,tensor=2", jax.devices()[:4])
    divided = engine_of(
        Pipeline(type(pipeline.compiled)(on_mesh(pipeline.compiled.model, mesh)), pipeline.tokenizer)
    )
    answers, expected = run(divided, *requests), run(engine_of(pipeline), *requests)
    assert {key: one.text for key, one in answers.items()} == {key: one.text for key, one in expected.items()}
    assert divided.pools[0].slots == 2
    assert divided.load.prompt_tokens < sum(one.prompt_tokens for one in answers.values()) - 50  # shared


@pytest.mark.slow
@pytest.mark.optimized
def test_mixed_prompts(tmp_path: Path) -> None:
    """Prompts have 1 to 2,000 tokens, before, across and after longrope's switch; any number of slots."""
    write_checkpoint(
        tmp_path,
        original_max_position_embeddings=1024,
        rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    )
    pipeline = Pipeline.load(tmp_path, dtype="float32")
    draws = random.Random(7)
    requests: list[dict[str, Any]] = []
    for number in range(60):
        length, new = min(int(2 ** draws.uniform(0, 11)), 2000), int(2 ** draws.uniform(0, 6))
        if number % 6 == 0:
            length, new = draws.randrange(1000, 1024), draws.randrange(60, 70)
        text = "".join(draws.choices("abcdefghijklmnopqrstuvwxyz .", k=length))
        requests.append({"prompt": text, "max_new_tokens": new})
    expected, crossed = [], 0
    for request in requests:
        ids = pipeline.tokenizer.encode(request["prompt"])
        tokens = alone(pipeline, ids, max_new_tokens=request["max_new_tokens"])
        expected.append((pipeline.tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)))
        crossed += len(ids) <= 1024 < len(ids) + len(tokens)
    assert crossed > 5
    for slots in (1, 7, 48):
        answers = run(Engine(pipeline.compiled, pipeline.tokenizer, slots=slots), *requests)
        assert [(answers[number].text, answers[number].completion_tokens) for number in range(60)] == expected


@pytest.mark.slow
@pytest.mark.optimized
def test_a_thousand_prompts_reuse_the_programs_of_three_hundred(pipeline: Pipeline) -> None:
    """Prompts of all lengths, with and without system prompts, greedy and sampled."""
    draws = random.Random(5)
    systems = ["".join(draws.choices("abc .", k=draws.randrange(30, 1500))) for _ in range(40)]

    def request() -> dict[str, Any]:
        text = "".join(draws.choices("abcdefgh .", k=min(int(2 ** draws.uniform(0, 11)), 1900)))
        options: dict[str, Any] = {"max_new_tokens": int(2 ** draws.uniform(0, 5))}
        if draws.random() < 0.1:
            options |= {"temperature": draws.uniform(0.5, 1.5), "seed": draws.randrange(100)}
        if draws.random() < 0.5:
            return {"prompt": text} | options
        system = {"role": "system", "content": draws.choice(systems)}
        return {"messages": [system, {"role": "user", "content": text[:100]}]} | options

    engine = engine_of(pipeline, slots=24, max_length=2047)
    run(engine, *[request() for _ in range(300)])
    with compilations() as counted:
        answers = run(engine, *[request() for _ in range(1000)])
    assert counted == []
    assert all(isinstance(one, Answer) for one in answers.values())
