"""apply_chat_template has transformers' arguments and tools, and templates run under limits."""

import enum
import json
import os
import subprocess
import sys
import time
from typing import Any, Literal

import numpy as np
import pytest
from answers import stored
from small_tokenizers import reference

from phi3_jax.errors import UserError
from phi3_jax.tokenizer import Phi3Tokenizer, _worker
from phi3_jax.tokenizer._tools import function_schema

SHORT = [{"role": "user", "content": "the dog"}]
LONG = [
    {"role": "user", "content": "the quick brown fox"},
    {"role": "assistant", "content": "jumps over it"},
]
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}!"
    "{% endgeneration %}{% else %}U: {{ m.content }}{% endif %};{% endfor %}"
)


@pytest.fixture(params=["model", "json"])
def tokenizer(request: pytest.FixtureRequest, piece_folders: Any) -> Phi3Tokenizer:
    return Phi3Tokenizer.from_pretrained(getattr(piece_folders, request.param))


# --- arguments


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"truncation": True, "max_length": 4},
        {"padding": True},
        {"padding": "max_length", "max_length": 60},
        {"padding": True, "return_tensors": "np"},
        {"padding": True, "return_tensors": "np", "return_dict": True},
        {"tokenizer_kwargs": {"pad_to_multiple_of": 16}, "padding": True},
    ],
)
def test_arguments_match_transformers(piece_folders, tokenizer, options):
    conversations = [SHORT, LONG]
    theirs = reference("pieces", piece_folders.json)
    asked = {"return_dict": False, "chat_template": MARKED, **options}
    (expected,) = theirs.ask("apply_chat_template", [conversations], **asked)
    found = tokenizer.apply_chat_template(conversations, chat_template=MARKED, **options)
    if asked["return_dict"]:
        assert {name: array.tolist() for name, array in found.items()} == {
            name: expected[name] for name in ("input_ids", "attention_mask")
        }
    else:
        assert (found.tolist() if "return_tensors" in options else found) == expected
    if "tokenizer_kwargs" not in options:
        (expected,) = theirs.ask("apply_chat_template", [LONG], **asked)
        found = tokenizer.apply_chat_template(LONG, chat_template=MARKED, **options)
        if "return_dict" in options:
            assert found.input_ids.tolist() == expected["input_ids"]
        else:
            assert np.asarray(found).tolist() == expected


def test_mask_of_assistant_tokens_matches_transformers(piece_folders, tokenizer):
    theirs = reference("pieces", piece_folders.json)
    options = {"chat_template": MARKED, "return_dict": True, "return_assistant_tokens_mask": True}
    options |= {"padding": True, "return_tensors": "np"}
    turns = [*LONG, {"role": "user", "content": "and then?"}, {"role": "assistant", "content": "é 😀"}]
    (expected,) = theirs.ask("apply_chat_template", [[LONG, turns]], **options)
    batch = tokenizer.apply_chat_template([LONG, turns], **options)
    assert batch["assistant_masks"].tolist() == expected["assistant_masks"]
    marked = batch.input_ids[1][batch["assistant_masks"][1] == 1]
    assert tokenizer.decode(marked) == "jumps over it!é 😀!"
    short = tokenizer.apply_chat_template(
        turns, truncation=True, max_length=9, **options | {"padding": False}
    )
    assert short["assistant_masks"].sum() < batch["assistant_masks"][1].sum()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"return_assistant_tokens_mask": True}, ValueError, "needs return_dict=True"),
        (
            {"return_assistant_tokens_mask": True, "return_dict": True},
            ValueError,
            r"{% generation %} and {% endgeneration %}, and this one does not",
        ),
        ({"sanitize_control_tokens": True}, ValueError, "sanitize_control_tokens=True is not supported"),
        ({"return_tensors": "pt"}, ValueError, "return_tensors='pt' is not supported; use 'np' or 'jax'"),
        ({"add_generation_promt": True}, TypeError, "did you mean 'add_generation_prompt'"),
        ({"return_tensor": "np"}, TypeError, "did you mean 'return_tensors'"),
        ({"tool": []}, TypeError, "did you mean 'tools'"),
        ({"messages": SHORT}, ValueError, "pass the messages as `conversation`"),
        ({"tokenizer_kwargs": {"stride": 4}}, ValueError, "stride=4 is not supported"),
        ({"truncation": True}, ValueError, "give max_length"),
        ({"chat_template": 3}, ValueError, "must be a template or the name of one, got 3"),
    ],
)
def test_rejects_arguments_that_would_have_no_effect(tokenizer, options, error, says):
    with pytest.raises(error, match=says):
        tokenizer.apply_chat_template(SHORT, **options)


def test_other_names_are_variables_of_the_template(tokenizer):
    template = "{{ tool }} {{ max_len }} {{ enable_thinking }}"
    values = {"tool": "hammer", "max_len": 3, "enable_thinking": False}
    text = tokenizer.apply_chat_template(SHORT, chat_template=template, tokenize=False, **values)
    assert text == "hammer 3 False"
    tokenizer.apply_chat_template(SHORT, enable_thinking=True)  # as transformers: no effect in this template


def test_returns_jax_arrays(tokenizer):
    import jax

    batch = tokenizer.apply_chat_template(LONG, return_tensors="jax", return_dict=True)
    assert isinstance(batch.input_ids, jax.Array)
    assert batch.tokens(0) == tokenizer.tokenize(tokenizer.apply_chat_template(LONG, tokenize=False))


# --- what messages may be


CALLS = [{"type": "function", "function": {"name": "now", "arguments": {}}}]
TOOLS_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}|{{ m.content is defined }}|{{ m.content }}|"
    "{{ m.tool_calls | tojson if m.tool_calls }}|{{ m.reasoning_content }}|{{ m.thinking }}]{% endfor %}"
    "{{ tools | tojson }}"
)


def test_template_judges_the_content(piece_folders, tokenizer):
    """An answer may consist of tool calls; None is what is absent; reasoning has several names."""
    theirs = reference("pieces", piece_folders.json)
    conversation = [
        *SHORT,
        {"role": "assistant", "tool_calls": CALLS},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": "12:00", "name": None},
        {"role": "assistant", "content": "Noon.", "reasoning": "It is 12."},
        {"role": "user", "content": [{"type": "text", "text": "Thanks"}]},
    ]
    options = {"chat_template": TOOLS_TEMPLATE, "tokenize": False}
    assert [tokenizer.apply_chat_template(conversation, **options)] == theirs.ask(
        "apply_chat_template", [conversation], **options
    )


@pytest.mark.parametrize(
    ("last", "field"),
    [
        ({"role": "assistant", "content": [{"type": "text", "text": "a "}, {"type": "x"}]}, True),
        ({"role": "assistant", "content": "b", "thinking": "so "}, "reasoning_content"),
        ({"role": "assistant", "content": "b", "thinking": "so "}, "thinking"),
    ],
)
def test_continues_other_fields_as_transformers(piece_folders, tokenizer, last, field):
    template = (
        "{% for m in messages %}[{{ m.content if m.content is string else m.content[0].text }}]"
        "{{ m.reasoning_content }}{% endfor %}"
    )
    options = {"chat_template": template, "tokenize": False, "continue_final_message": field}
    theirs = reference("pieces", piece_folders.json).ask("apply_chat_template", [[*SHORT, last]], **options)
    assert [tokenizer.apply_chat_template([*SHORT, last], **options)] == theirs


# --- functions as tools


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


def plain(city: str, days: int = 3) -> str:
    """
    Tells the weather.

    Args:
        city: The city, as
            people call it.
        days: How many days.

    Returns:
        The forecast.
    """
    return city * days


def rich(
    a: list[int],
    b: dict[str, float] | None,
    c: Literal["x", 2, None],
    d: Size,
    e: int | str,
    f: list[str] | int,
    g: tuple[int, str],
    h: Any,
    i: bool = True,
    j: str = "tea",
):
    """Does a lot
    in two lines.

    Args:
        a: numbers
        b: weights: by name
        c: one
        d: size
        e: either

        f: both
        g: pair
        h: anything
        i: flag
        j: drink (choices: ["tea", " coffee "])
    Raises:
        ValueError: never
    """


class Clock:
    def now(self, zone: str) -> object:
        """Tells the time.

        Args:
            zone: the zone
        """
        return zone


TOOLS = {"plain": plain, "rich": rich, "method": Clock().now}


@stored
def their_schema(name: str) -> str:
    from transformers.utils import get_json_schema

    return json.dumps(get_json_schema(TOOLS[name]))


@pytest.mark.parametrize("name", TOOLS)
def test_schemas_of_functions_match_transformers(name):
    assert json.dumps(function_schema(TOOLS[name])) == their_schema(name)


def test_template_gets_schemas_of_functions(tokenizer):
    template = "{{ tools | tojson }}"
    text = tokenizer.apply_chat_template(
        SHORT, tools=[plain, {"name": "f"}], chat_template=template, tokenize=False
    )
    assert json.loads(text) == [function_schema(plain), {"name": "f"}]


def undocumented(x: int): ...


def without_hint(x):
    """A.

    Args:
        x: b
    """


def without_text(x: int):
    """A."""


def with_a_class(x: Clock):
    """A.

    Args:
        x: b
    """


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([undocumented], "undocumented has no docstring"),
        ([without_hint], "without_hint: its argument x has no type hint"),
        ([without_text], "without_text: its docstring does not describe x"),
        ([with_a_class], "with_a_class: x has the type .*, which has no JSON schema"),
        ([3], r"tools\[0\] must be a schema \(dict\) or a function, got int"),
        (plain, "tools must be a list"),
    ],
)
def test_rejects_tools_that_cannot_be_described(tokenizer, tools, says):
    with pytest.raises(UserError, match=says):
        tokenizer.apply_chat_template(SHORT, tools=tools)


# --- limits


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Limits templates to a fifth of a second and 200 MB, in a process of their own."""
    monkeypatch.setattr(_worker, "SECONDS", 0.2)
    monkeypatch.setattr(_worker, "MEMORY", 200 << 20)
    renderer = _worker.Renderer()
    yield renderer
    renderer.close()


DOUBLES = (
    "{% set ns = namespace(x='ab') %}{% for _ in range(60) %}{% set ns.x = ns.x OPERATION ns.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "runs for more than",
        ),
        (
            "{% macro f(n) %}{% if n %}{% set _ = f(n - 1) ~ f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
            "runs for more than",
        ),
        (
            "{% set ns = namespace(x=[1]) %}{% for _ in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
            "{{ ns.x == ns.x | list }}{{ [ns.x] | tojson | length }}",
            "runs for more than|too much memory",
        ),
        ("{{ 9 ** (9 ** 9) }}", "runs for more than"),
        (DOUBLES.replace("OPERATION", "~"), "too much memory"),
        (DOUBLES.replace("OPERATION", "+"), "too much memory"),
        ("{{ 'a' * 10**10 }}", "too much memory"),
        ("{{ 'a'.ljust(10**10) | length }}", "too much memory"),
        ("{{ '%9999999999d' % 1 }}", "chat template failed"),
        ("{{ lipsum(n=10**7) }}", "runs for more than|too much memory"),
        ("{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "its text is longer than 16,777,216"),
        ("{{ '(' * 9999 }}{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "chat template"),
    ],
)
def test_stops_templates_without_bound(limited, monkeypatch, template, says):
    if "runs for more than" not in says:  # where another limit is to stop it, however slow the machine is
        monkeypatch.setattr(_worker, "SECONDS", 6)
    begin = time.monotonic()
    with pytest.raises(UserError, match=says):
        limited.render(template, [], {})
    assert time.monotonic() - begin < 60  # without a limit, hours
    assert limited.render("fine", [], {}) == ("fine", [])


IGNORES = """
import signal
from phi3_jax.tokenizer import _worker
signal.signal(signal.SIGPROF, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
_worker.SECONDS = 0.2
_worker.Renderer().render("{{ 9 ** (9 ** 9) }}", [], {})
"""


def test_stops_templates_where_the_signal_for_it_is_ignored() -> None:
    """A library in the process that asks, such as a profiler, may ignore or block the signal."""
    done = subprocess.run([sys.executable, "-c", IGNORES], capture_output=True, text=True, timeout=60)
    assert "it runs for more than 0.2 seconds" in done.stderr


def test_long_messages_are_within_the_limits(limited):
    text = "a long text " * 2**20
    assert limited.render("{{ messages[0] }}{{ messages[0] }}", [text], {})[0] == text * 2


def test_forked_process_has_a_renderer_of_its_own(limited):
    """Both would read from one pipe otherwise."""
    limited.render("parent", [], {})
    renderer = limited._process
    limited._owner = os.getppid()  # as in a child
    assert limited.render("child", [], {}) == ("child", [])
    assert limited._process is not renderer
    renderer.kill()
    renderer.wait()
    renderer.stdin.close()
    renderer.stdout.close()


def test_interrupt_leaves_no_reply_of_an_earlier_template(limited, monkeypatch):
    def interrupted(process: Any, request: bytes) -> None:
        process.stdin.write(len(request).to_bytes(8, "little") + request)
        process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(_worker, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            limited.render("first", [], {})
    assert limited.render("second", [], {}) == ("second", [])


def test_reports_a_python_that_cannot_be_started(monkeypatch):
    monkeypatch.setattr("sys.executable", "/no/python")
    with pytest.raises(UserError, match="cannot be started with /no/python"):
        _worker.Renderer().render("", [], {})
