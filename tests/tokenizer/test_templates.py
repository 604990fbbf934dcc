"""Chat templates give transformers' prompts, and errors of templates are named."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from small_tokenizers import reference, write_json
from tokenizers import Tokenizer, models

from phi3_jax.tokenizer import (
    JsonBackend,
    Phi3Tokenizer,
    _chat,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <there>"},
    {"role": "assistant", "content": "Hello "},
    {"role": "user", "content": "1 < 2?"},
]
MINI = "<|system|>\nBe brief.<|end|>\n<|user|>\nHi <there><|end|>\n"
MINI += "<|assistant|>\nHello <|end|>\n<|user|>\n1 < 2?<|end|>\n"


def with_tokens(folder: Path, *contents: str) -> Phi3Tokenizer:
    """Returns the small byte-level vocabulary with more tokens, no template, and an eos token."""
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.add_special_tokens(list(contents))
    return Phi3Tokenizer(JsonBackend(raw.to_str()), {"eos_token": "<|endoftext|>"})


def test_renders_phi3_minis_template(piece_folders):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == MINI + "</s>"
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompt == MINI + "<|assistant|>\n"
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert ids == tokenizer.encode(prompt, add_special_tokens=False)


def test_recognises_phi4_mini_by_its_large_vocabulary(byte_level_folder):
    tokens = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    small = with_tokens(byte_level_folder, *tokens)
    assert small.apply_chat_template(CHAT, tokenize=False) == MINI + "<|endoftext|>"
    raw = Tokenizer(models.WordLevel({f"w{n}": n for n in range(200_000)}, unk_token="w0"))
    raw.add_special_tokens([*tokens, "<|endoftext|>"])
    large = Phi3Tokenizer(JsonBackend(raw.to_str()), {"eos_token": "<|endoftext|>"})
    expected = MINI.replace("\n", "")
    assert large.apply_chat_template(CHAT, tokenize=False) == expected + "<|endoftext|>"
    prompt = large.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|assistant|>"


def test_renders_phi4s_template(byte_level_folder):
    tokenizer = with_tokens(byte_level_folder, "<|im_sep|>")
    text = tokenizer.apply_chat_template(CHAT[1:3], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user<|im_sep|>Hi <there><|im_end|><|im_start|>assistant<|im_sep|>Hello <|im_end|>"
        "<|im_start|>assistant<|im_sep|>"
    )


@pytest.mark.parametrize(
    ("member", "default"),
    [
        ("phi-3-mini-4k-instruct", _chat.PHI3_MINI_TEMPLATE),
        ("phi-3-small-8k-instruct", _chat.PHI3_SMALL_TEMPLATE),
        ("phi-4-mini-instruct", _chat.PHI4_MINI_TEMPLATE),
        ("phi-4", _chat.PHI4_TEMPLATE),
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_default_templates_match_the_members_own(shared_data, piece_folders, member, default, prompt):
    own = shared_data("phi3-configs", member, "chat_template.txt").read_text(encoding="utf-8")
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    options = {"tokenize": False, "add_generation_prompt": prompt}
    expected = tokenizer.apply_chat_template(CHAT, chat_template=own, **options)
    assert tokenizer.apply_chat_template(CHAT, chat_template=default, **options) == expected


def test_every_members_template_matches_transformers(shared_data, piece_folders):
    theirs = reference("pieces", piece_folders.json)
    ours = Phi3Tokenizer.from_pretrained(piece_folders.json)
    templates = sorted(shared_data("phi3-configs").glob("*/chat_template*.txt"))
    assert len(templates) >= 8
    for path in templates:
        for prompt in (True, False):
            options = {
                "chat_template": path.read_text(encoding="utf-8"),
                "add_generation_prompt": prompt,
                "tokenize": False,
            }
            (expected,) = theirs.ask("apply_chat_template", [CHAT], **options)
            assert ours.apply_chat_template(CHAT, **options) == expected, path


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
        "{% for m in messages %}\n  {% if loop.last %}{% break %}{% endif %}\n  {{ m.role }}\n{% endfor %}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ sep_token }}{{ documents is none }}",
        "{{ strftime_now('%Y') | length }} {{ name | default('nobody') }} {{ tools | tojson }}",
        "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}!",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_names_and_filters_of_templates_match_transformers(piece_folders, template):
    theirs = reference("pieces", piece_folders.json)
    ours = Phi3Tokenizer.from_pretrained(piece_folders.json)
    options = {"chat_template": template, "tokenize": False, "name": "Ada", "tools": [{"name": "<f> é"}]}
    assert [ours.apply_chat_template(CHAT, **options)] == theirs.ask("apply_chat_template", [CHAT], **options)


def test_templates_know_the_date(piece_folders):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    template, pattern = "{{ strftime_now('%Y-%m-%d %H') }}", "%Y-%m-%d %H"
    before = datetime.now().strftime(pattern)
    rendered = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert rendered in (before, datetime.now().strftime(pattern))


def test_continue_final_message_matches_transformers(piece_folders):
    theirs = reference("pieces", piece_folders.json)
    ours = Phi3Tokenizer.from_pretrained(piece_folders.json)
    plain = ours.chat_template
    for template in (plain, plain.replace("message['content']", "(message['content'] | trim)")):
        options = {"chat_template": template, "tokenize": False, "continue_final_message": True}
        expected = theirs.ask("apply_chat_template", [CHAT[:3]], **options)
        assert [ours.apply_chat_template(CHAT[:3], **options)] == expected
    text = ours.apply_chat_template(CHAT[:3], tokenize=False, continue_final_message=True)
    assert text.endswith("<|assistant|>\nHello ")
    with pytest.raises(ValueError, match="exclude each other"):
        ours.apply_chat_template(CHAT, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ValueError, match="leaves out the final message"):
        ours.apply_chat_template(CHAT, continue_final_message=True, chat_template="nothing")


def test_later_template_sources_override_earlier_ones(piece_folders, tmp_path):
    shutil.copytree(piece_folders.json, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def render(**options: object) -> str:
        tokenizer = Phi3Tokenizer.from_pretrained(tmp_path)
        return tokenizer.apply_chat_template(CHAT, tokenize=False, **options)

    assert render().startswith("<|system|>\n")
    several = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "tools"}]
    write_json(tmp_path / "tokenizer_config.json", {**config, "chat_template": several})
    assert (render(), render(tools=[]), render(chat_template="tool_use")) == ("one", "tools", "tools")
    write_json(tmp_path / "tokenizer_config.json", {**config, "chat_template": several[1:]})
    with pytest.raises(ValueError, match=r"one of \['tool_use'\]"):
        render()
    write_json(tmp_path / "tokenizer_config.json", {**config, "chat_template": "two"})
    assert render() == "two"
    write_json(tmp_path / "chat_template.json", {"chat_template": "three"})
    assert render() == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert render() == "four"
    assert render(chat_template="five") == "five"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template failed: roles must alternate"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|__mro__|undefined"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% for m in messages %}\n{{ m }", "line 2"),
    ],
)
def test_reports_failing_templates(piece_folders, template, says):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    with pytest.raises(ValueError, match=says):
        tokenizer.apply_chat_template(CHAT, chat_template=template)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages is empty"),
        ("Hi", "must be a list of dicts, got str"),
        ({"role": "user", "content": "Hi"}, "must be a list of dicts, got dict"),
        (["Hi"], r"messages\[0\] must be a dict, got str"),
        ([CHAT[0], {"role": "user"}], r"messages\[1\] has no content"),
        ([{}], r"messages\[0\] has no role and no content"),
        ([{"role": 1, "content": "Hi"}], "must be a str, got 1"),
        ([{"role": "user", "contents": "Hi"}], r"messages\[0\] has no content; its keys"),
        ([{"role": "user", "content": object()}], "must consist of JSON values"),
        ([{"role": "owner", "content": "Hi"}], "role 'owner' is not system, user or assistant"),
    ],
)
def test_rejects_messages_that_are_not_a_conversation(piece_folders, messages, says):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    with pytest.raises(ValueError, match=says):
        tokenizer.apply_chat_template(messages)


def test_rejects_chats_without_a_template(byte_level_folder):
    tokenizer = Phi3Tokenizer.from_pretrained(byte_level_folder)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(CHAT)
    assert tokenizer.apply_chat_template(CHAT, chat_template="x", tokenize=False) == "x"
