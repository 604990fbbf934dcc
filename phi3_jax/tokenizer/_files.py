"""Reads a tokenizer's files, with errors that name them, and writes them whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from phi3_jax.errors import UserError
from phi3_jax.runs.files import replacing
from phi3_jax.runs.text import parse_json

from ._backends import Backend, JsonBackend, SentencePieceBackend

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model")
_CONFIGS = (CONFIG, "special_tokens_map.json", "added_tokens.json")
TEMPLATES = (TEMPLATE, "chat_template.json")

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_PHI3_PIECES = 32000


def read_folder(directory: Path) -> tuple[Backend, dict[str, Any], dict[str, bytes]]:
    """Returns the vocabulary, the merged configuration of all files, and the bytes of all files.

    Raises:
        FileNotFoundError: there is no such folder, or no vocabulary in it. UserError: a file is broken.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no tokenizer at {directory}: there is no such folder")
    names = (*_VOCABULARIES, *_CONFIGS, *TEMPLATES)
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
    backend: Backend
    if "tokenizer.json" in files:
        backend = JsonBackend(files["tokenizer.json"], str(directory / "tokenizer.json"))
    elif "tokenizer.model" in files:
        backend = SentencePieceBackend(files["tokenizer.model"], str(directory / "tokenizer.model"))
    else:
        found = ", ".join(sorted(path.name for path in directory.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"no tokenizer in {directory}: looked for tokenizer.json and tokenizer.model, found {found}"
        )
    texts = {
        name: _json_object(files[name], directory / name)
        for name in (*_CONFIGS, TEMPLATES[1])
        if name in files
    }
    config = _merge(texts)
    if isinstance(backend, SentencePieceBackend):
        if not any(name in files for name in _CONFIGS):
            config |= phi3_config() if backend.vocab_size == _PHI3_PIECES else {}
        config = backend.named_tokens | config
    if TEMPLATE in files:
        config["chat_template"] = files[TEMPLATE].decode("utf-8")
    return backend, config, files


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes each file whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with replacing(directory / name) as work, work.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def phi3_config() -> dict[str, Any]:
    """Returns Phi-3-mini's configuration (July 2024), for a folder with only tokenizer.model."""
    names = ["endoftext", "assistant", "placeholder1", "placeholder2", "placeholder3", "placeholder4"]
    names += ["system", "end", "placeholder5", "placeholder6", "user"]
    added = {
        # All but the end of text remove the white space after them.
        str(_PHI3_PIECES + n): _flags(f"<|{name}|>", rstrip=name != "endoftext", special=True)
        for n, name in enumerate(names)
    }
    added["2"] = _flags("</s>", rstrip=True, special=False)
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }


def added_tokens(config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Returns the tokens of `added_tokens_decoder`, by id."""
    tokens = {}
    for token_id, entry in (config.get("added_tokens_decoder") or {}).items():
        entry = _flags(entry, special=True) if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise UserError(
                f"added_tokens_decoder[{token_id!r}] must have a text under 'content', got {entry!r:.80}"
            )
        flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
        tokens[int(token_id)] = AddedToken(entry["content"], **({"normalized": False} | flags))
    return tokens


def token_entry(token: AddedToken) -> dict[str, Any]:
    """Returns an entry of `added_tokens_decoder`."""
    return {"content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}


def token_text(entry: str | Mapping[str, Any] | None) -> str | None:
    """Returns the text of a token, which the configs write as such or as a dict with `content`."""
    return entry["content"] if isinstance(entry, Mapping) else entry


def extra_special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Returns the special tokens without a role, under the old name and the new."""
    entries = list(config.get("additional_special_tokens") or [])
    extra = config.get("extra_special_tokens") or []
    entries += extra.values() if isinstance(extra, Mapping) else extra
    return [text for entry in entries if (text := token_text(entry)) is not None]


def chat_templates(entry: Any) -> str | dict[str, str] | None:
    """Returns the templates of a `chat_template` entry: one, or several by name."""
    if entry is None or isinstance(entry, str):
        return entry
    if isinstance(entry, Mapping):
        return dict(entry)
    try:
        return {named["name"]: named["template"] for named in entry}
    except (TypeError, KeyError) as error:
        raise UserError(
            f"chat_template must be a template or a list of dicts with name and template, got {entry!r:.80}"
        ) from error


def _merge(texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    special_map = texts.get("special_tokens_map.json", {})
    config = {**special_map, **texts.get(CONFIG, {})}
    named = {token_text(special_map.get(name)) for name in NAMED_TOKENS}
    dicts = [entry for entry in special_map.values() if isinstance(entry, Mapping)]
    dicts += [
        entry for entry in special_map.get("additional_special_tokens", []) if isinstance(entry, Mapping)
    ]
    flags = {entry["content"]: entry for entry in dicts if "content" in entry}
    specials = (
        named | set(extra_special_tokens(special_map)) | {token_text(config.get(n)) for n in NAMED_TOKENS}
    )
    added = {
        str(token_id): {**_flags(content, special=content in specials), **flags.get(content, {})}
        for content, token_id in texts.get("added_tokens.json", {}).items()
    }
    if added or config.get("added_tokens_decoder"):
        config["added_tokens_decoder"] = added | (config.get("added_tokens_decoder") or {})
    if "chat_template" in texts.get("chat_template.json", {}):
        config["chat_template"] = texts["chat_template.json"]["chat_template"]
    return config


def _flags(content: str, *, rstrip: bool = False, special: bool) -> dict[str, Any]:
    flags: dict[str, Any] = dict.fromkeys(_FLAGS, False)
    return {"content": content, **flags, "rstrip": rstrip, "special": special}


def _json_object(content: bytes, path: Path) -> dict[str, Any]:
    value = parse_json(content, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
