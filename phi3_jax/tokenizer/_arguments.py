"""Refuses the arguments of transformers' tokenizers that are not supported, unless they have no effect."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from phi3_jax.errors import UserError


class _Unsupported(NamedTuple):
    advice: str
    neutral: tuple[Any, ...] = ()
    """Values that ask for nothing; None does not, either."""


_any = (True, False)
_targets = _Unsupported("call the tokenizer with the targets, and pass its input_ids as labels")
_windows = _Unsupported("cut long texts before the call, or use `finetune`, which packs them", (False, 0))

CALL: dict[str, _Unsupported] = {
    "text_target": _targets,
    "text_pair_target": _targets,
    "stride": _windows,
    "return_overflowing_tokens": _windows,
    "return_token_type_ids": _Unsupported("models of this family have no token types", (False,)),
    "split_special_tokens": _Unsupported(
        "special tokens within a text are always recognised; take them out of texts by strangers", (False,)
    ),
    "verbose": _Unsupported("", _any),
    "tokenizer_kwargs": _Unsupported("pass them as arguments", ({},)),
}
PAD: dict[str, _Unsupported] = {"verbose": CALL["verbose"]}
ENCODE: dict[str, _Unsupported] = {name: CALL[name] for name in ("stride", "split_special_tokens", "verbose")}
CHAT: dict[str, _Unsupported] = {
    "sanitize_control_tokens": _Unsupported(
        "take special tokens out of texts by strangers before the call", (False,)
    ),
    "messages": _Unsupported("pass the messages as `conversation`, the first argument"),
}
DECODE: dict[str, _Unsupported] = {
    "clean_up_tokenization_spaces": _Unsupported("texts are decoded as they are", (False,)),
    "spaces_between_special_tokens": _Unsupported("texts are decoded as they are", (False, True)),
}
LOAD: dict[str, _Unsupported] = {
    "use_fast": _Unsupported("", _any),
    "legacy": _Unsupported("", _any),
    "trust_remote_code": _Unsupported("", _any),
    "force_download": _Unsupported("remove the folder from the Hub's cache", (False,)),
    "proxies": _Unsupported("set HTTPS_PROXY", ({},)),
    "subfolder": _Unsupported("download the repository, and give the subfolder's path", ("",)),
    "add_prefix_space": _Unsupported("the files decide it"),
    "add_bos_token": _Unsupported("the files decide it; put bos_token before the text"),
    "add_eos_token": _Unsupported("the files decide it; put eos_token after the text"),
    "gguf_file": _Unsupported("give the path of the file itself"),
    "tokenizer_file": _Unsupported("give the folder that has it"),
    "vocab_file": _Unsupported("give the folder that has it"),
    **DECODE,
    "split_special_tokens": CALL["split_special_tokens"],
}


def refuse(
    method: str, given: Mapping[str, Any], table: Mapping[str, _Unsupported], supported: Collection[str]
) -> None:
    """Refuses every argument among `given` that would change the result.

    Raises:
        UserError: transformers has the argument, and it is not supported.
        TypeError: there is no such argument.
    """
    for name, value in given.items():
        if name not in table:
            close = difflib.get_close_matches(name, [*supported, *table], n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(supported)}"
            raise TypeError(f"{method} has no argument {name!r}; {hint}")
        if value is not None and not any(value is other or value == other for other in table[name].neutral):
            raise UserError(f"{method}: {name}={value!r:.60} is not supported; {table[name].advice}")
