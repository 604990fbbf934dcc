"""Tokenizers are saved and read; broken and hostile files are errors that name the file."""

import base64
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
from small_tokenizers import reference
from their_tokenizer import TheirTokenizer
from tokenizers import Tokenizer, processors

from phi3_jax.errors import CheckpointError
from phi3_jax.tokenizer import (
    JsonBackend,
    Phi3Tokenizer,
    SentencePieceBackend,
    _growth,
)


def test_save_writes_the_files_that_were_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "from")
    (tmp_path / "from" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path / "from")
    shutil.rmtree(tmp_path / "from" / "nothing", ignore_errors=True)
    paths = tokenizer.save_pretrained(tmp_path / "to" / "here")
    saved = {Path(path).name for path in paths}
    assert saved == {path.name for path in (tmp_path / "to" / "here").iterdir()}
    assert saved == {path.name for path in (tmp_path / "from").iterdir()}
    for name in saved:
        assert (tmp_path / "to" / "here" / name).read_bytes() == (tmp_path / "from" / name).read_bytes()
    if "tokenizer.json" in saved:
        theirs = reference(f"saved {folder.name[:4]}", tmp_path / "to" / "here")
        assert theirs.ask("encode", ["the dog"])[0] == tokenizer.encode("the dog")


def test_save_keeps_changed_attributes(folder, tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    tokenizer = Phi3Tokenizer.from_pretrained(folder, truncation_side="left", model_max_length=77)
    tokenizer.padding_side = "right"
    tokenizer.chat_template = "{{ 'mine' }}"
    tokenizer.save_pretrained(tmp_path)
    again = Phi3Tokenizer.from_pretrained(tmp_path)
    assert (again.padding_side, again.truncation_side, again.model_max_length) == ("right", "left", 77)
    assert again.apply_chat_template(chat, tokenize=False) == "mine"
    assert again.encode("<|end|> the <tool>") == tokenizer.encode("<|end|> the <tool>")
    again.chat_template = {"default": "one", "other": "two"}
    again.save_pretrained(tmp_path / "named")
    named = Phi3Tokenizer.from_pretrained(tmp_path / "named")
    assert named.apply_chat_template(chat, tokenize=False, chat_template="other") == "two"


def test_saved_model_alone_loads_in_transformers(shared_data, tmp_path):
    ours = Phi3Tokenizer.from_pretrained(shared_data("phi3-tokenizer", "sentencepiece"))
    ours.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model", "tokenizer_config.json"]
    theirs = TheirTokenizer("saved model", tmp_path)
    text = "Hello<|end|>\n<|user|>"
    assert theirs.ask("encode", [text])[0] == ours.encode(text) == [15043, 32007, 32010]
    assert theirs.attributes("eos_token_id")["eos_token_id"] == ours.eos_token_id == 32000


def test_saved_json_alone_loads_in_transformers(byte_level_folder, tmp_path):
    Phi3Tokenizer(JsonBackend((byte_level_folder / "tokenizer.json").read_bytes())).save_pretrained(tmp_path)
    ids = Phi3Tokenizer.from_pretrained(byte_level_folder).encode("the dog")
    assert TheirTokenizer("saved json", tmp_path).ask("encode", ["the dog"])[0] == ids


def test_failed_save_leaves_the_old_file(piece_folders, tmp_path, monkeypatch):
    tokenizer = Phi3Tokenizer.from_pretrained(piece_folders.json)
    tokenizer.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokenizer.padding_side = "right"

    replace, refused = os.replace, list[Path]()

    def refuse(source: Path, target: Path) -> None:
        if target == tmp_path / "tokenizer_config.json" and not refused:
            refused.append(target)
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="disk full; nothing was changed"):
        tokenizer.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rejects_missing_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError,
        match=r"looked for tokenizer.json and tokenizer.model and cl100k_base.tiktoken, found config.json",
    ):
        Phi3Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        Phi3Tokenizer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b'{"model":\n  {,}}', r"tokenizer.json is not valid JSON: .* at line 2 column 4"),
        ("tokenizer.json", b"{}", "tokenizer.json is JSON, but not a tokenizer"),
        (
            "tokenizer_config.json",
            b'{"bos_token": "<s>"',
            r"tokenizer_config.json is not valid JSON: .* at line 1 column 20",
        ),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json must hold a JSON object, got list"),
        ("special_tokens_map.json", b"", "special_tokens_map.json is not valid JSON"),
        ("tokenizer_config.json", b'{"a": "\xff\xfe"}', "tokenizer_config.json is not valid UTF-8"),
    ],
)
def test_rejects_broken_json(piece_folders, tmp_path, name, content, says):
    shutil.copytree(piece_folders.json, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        Phi3Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_rejects_a_broken_model(piece_folders, tmp_path, damage):
    content = (piece_folders.model / "tokenizer.model").read_bytes()
    broken = {"cut": content[: len(content) // 2], "empty": b"", "text": b"version https://git-lfs"}[damage]
    (tmp_path / "tokenizer.model").write_bytes(broken)
    with pytest.raises(ValueError, match=r"tokenizer\.model is"):
        Phi3Tokenizer.from_pretrained(tmp_path)


def test_rejects_a_model_with_a_broken_piece(piece_folders):
    content = (piece_folders.model / "tokenizer.model").read_bytes()
    with pytest.raises(ValueError, match=r"here holds a piece that is not valid UTF-8"):
        SentencePieceBackend(content.replace("▁the".encode(), b"\xff" * 6), "here")


def test_rejects_an_added_token_without_text(piece_folders):
    content = (piece_folders.json / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match=r"added_tokens_decoder\['500'\] must have a text"):
        Phi3Tokenizer(JsonBackend(content), {"added_tokens_decoder": {"500": {"special": True}}})


def test_rejects_an_added_token_with_a_pieces_id(piece_folders):
    model = (piece_folders.model / "tokenizer.model").read_bytes()
    config = {"added_tokens_decoder": {"300": {"content": "<|user|>"}}}
    with pytest.raises(ValueError, match=r"'<\|user\|>' has id 300, which is the piece"):
        Phi3Tokenizer(SentencePieceBackend(model), config)


def sequence(*steps: dict[str, object], kind: str = "normalizers") -> dict[str, object]:
    return {"type": "Sequence", kind: list(steps)}


def replace_step(old: object, new: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": old, "content": new}


@pytest.mark.parametrize(
    ("section", "steps", "says"),
    [
        (
            "normalizer",
            replace_step({"String": "a"}, "a" * 10**6),
            "its normalizer may make 1,000,000 charact",
        ),
        (
            "normalizer",
            sequence(*[replace_step({"String": "a"}, "aa")] * 30),
            "may make 128 characters of one",
        ),
        ("normalizer", replace_step({"Regex": "(?=.)"}, "b" * 64), "may make 65 characters"),
        ("normalizer", replace_step({"Regex": "x*"}, "b" * 64), "may make 65 characters"),
        ("normalizer", {"type": "Prepend", "prepend": "c" * 999}, "may make 1,000 characters"),
        (
            "decoder",
            sequence(replace_step({"String": "a"}, "b" * 99), {"type": "Fuse"}, kind="decoders"),
            "its decoder may make 99",
        ),
    ],
)
def test_rejects_files_that_multiply_texts(piece_folders, section, steps, says):
    content = json.loads((piece_folders.json / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=rf"here\.json: .*{says}"):
        JsonBackend(json.dumps(content | {section: steps}), "here.json")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("model", "vocab", "▁the"), 2**31, "the token '▁the' has the id 2147483648; ids below 10,000,000"),
        (("added_tokens", 0, "id"), 2**32 - 1, "the token '<unk>' has the id 4294967295"),
        (
            ("post_processor", "special_tokens", "<s>", "ids"),
            [2**31],
            "adds the id 2147483648, which is no token",
        ),
        (
            ("post_processor", "single", 0, "SpecialToken", "id"),
            "x",
            "breaks the library `tokenizers`: no entry",
        ),
    ],
)
def test_rejects_ids_and_panics_of_hostile_files(piece_folders, path, value, says):
    """The library makes room for every id up to the largest, and ends the process if there is none."""
    raw = Tokenizer.from_file(str(piece_folders.json / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    content = entry = json.loads(raw.to_str())
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    with pytest.raises(ValueError, match=rf"here\.json.*{says}"):
        Phi3Tokenizer(JsonBackend(json.dumps(content), "here.json"))


def test_large_numbers_in_texts_are_no_ids(piece_folders):
    content = json.loads((piece_folders.json / "tokenizer.json").read_bytes())
    content["added_tokens"].append(dict(content["added_tokens"][0], id=400, content='x": 123456789'))
    assert JsonBackend(json.dumps(content), "here.json").token_to_id('x": 123456789') == 400


def test_rejects_a_map_of_characters_that_multiplies_texts(piece_folders, tmp_path):
    """SentencePiece compiles such a map into its model; a tokenizer.json has the same one."""
    (tmp_path / "rules.tsv").write_text("78\t" + " ".join(["63"] * 99) + "\n")  # x becomes 99 times c
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=6,
        normalization_rule_tsv=str(tmp_path / "rules.tsv"),
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="here: its map of characters may make 99 characters of one"):
        SentencePieceBackend(model.getvalue(), "here")
    spec = next(spec for number, spec in _growth._fields(model.getvalue()) if number == 3)
    charsmap = next(content for number, content in _growth._fields(spec) if number == 2)
    step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    content = json.loads((piece_folders.json / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="here: its normalizer may make 99 characters"):
        JsonBackend(json.dumps(content | {"normalizer": step}), "here")


def test_accepts_files_that_lengthen_texts_a_little(piece_folders):
    content = json.loads((piece_folders.json / "tokenizer.json").read_bytes())
    steps = sequence(
        {"type": "NFKC"}, replace_step({"Regex": " {2,}"}, "▁"), replace_step({"String": "``"}, '"')
    )
    backend = JsonBackend(json.dumps(content | {"normalizer": steps}), "here.json")
    assert backend.encode("a")
