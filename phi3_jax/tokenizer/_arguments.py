"""The arguments of transformers' tokenizers that are not supported."""

from phi3_jax.runs.arguments import UnsupportedArgument

_any = (True, False)
_targets = UnsupportedArgument("call the tokenizer with the targets, and pass its input_ids as labels")
_windows = UnsupportedArgument(
    "cut long texts before the call, or use `finetune`, which packs them", (False, 0)
)

CALL: dict[str, UnsupportedArgument] = {
    "text_target": _targets,
    "text_pair_target": _targets,
    "stride": _windows,
    "return_overflowing_tokens": _windows,
    "return_token_type_ids": UnsupportedArgument("models of this family have no token types", (False,)),
    "verbose": UnsupportedArgument("", _any),
    "tokenizer_kwargs": UnsupportedArgument("pass them as arguments", ({},)),
}
PAD: dict[str, UnsupportedArgument] = {"verbose": CALL["verbose"]}
ENCODE: dict[str, UnsupportedArgument] = {name: CALL[name] for name in ("stride", "verbose")}
CHAT: dict[str, UnsupportedArgument] = {
    "sanitize_control_tokens": UnsupportedArgument(
        "encode texts by strangers with split_special_tokens=True", (False,)
    ),
    "messages": UnsupportedArgument("pass the messages as `conversation`, the first argument"),
}
DECODE: dict[str, UnsupportedArgument] = {
    "clean_up_tokenization_spaces": UnsupportedArgument("texts are decoded as they are", (False,)),
    "spaces_between_special_tokens": UnsupportedArgument("texts are decoded as they are", (False, True)),
}
LOAD: dict[str, UnsupportedArgument] = {
    "use_fast": UnsupportedArgument("", _any),
    "legacy": UnsupportedArgument("", _any),
    "trust_remote_code": UnsupportedArgument("", _any),
    "force_download": UnsupportedArgument("remove the folder from the Hub's cache", (False,)),
    "proxies": UnsupportedArgument("set HTTPS_PROXY", ({},)),
    "subfolder": UnsupportedArgument("download the repository, and give the subfolder's path", ("",)),
    "add_prefix_space": UnsupportedArgument("the files decide it"),
    "add_bos_token": UnsupportedArgument("the files decide it; put bos_token before the text"),
    "add_eos_token": UnsupportedArgument("the files decide it; put eos_token after the text"),
    "gguf_file": UnsupportedArgument("give the path of the file itself"),
    "tokenizer_file": UnsupportedArgument("give the folder that has it"),
    "vocab_file": UnsupportedArgument("give the folder that has it"),
    **DECODE,
    "split_special_tokens": UnsupportedArgument("pass it in each call", (False,)),
}
