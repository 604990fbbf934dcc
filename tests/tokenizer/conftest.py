"""Small vocabularies: pieces as tokenizer.model and as tokenizer.json, and bytes as tokenizer.json."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from small_tokenizers import SENTENCES, config_of, train_pieces, write_json
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from phi3_jax.tokenizer import Phi3Tokenizer


@pytest.fixture(scope="session")
def piece_folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small Llama-like vocabulary as tokenizer.model and as tokenizer.json, with the same config."""
    model = train_pieces(SENTENCES, 400, split_digits=True)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    same = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    same.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    same.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    same.add_special_tokens(["<unk>", "<s>", "</s>"])
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    config = config_of(len(pieces), padding_side="left", **roles)
    folders = SimpleNamespace(
        model=tmp_path_factory.mktemp("model"), json=tmp_path_factory.mktemp("json"), pieces=pieces
    )
    (folders.model / "tokenizer.model").write_bytes(model)
    (folders.json / "tokenizer.json").write_text(same.to_str(), encoding="utf-8")
    for folder in (folders.model, folders.json):
        write_json(folder / "tokenizer_config.json", config)
    return folders


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2-like vocabulary that separates digits, then splits into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    spaced = {"content": "<a b>é", "special": False, "normalized": False}
    added = {str(tokenizer.get_vocab_size()): spaced}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added, **roles},
    )
    return folder


@pytest.fixture(params=["model", "json", "bytes"])
def folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "bytes":
        return request.getfixturevalue("byte_level_folder")
    return getattr(request.getfixturevalue("piece_folders"), request.param)


@pytest.fixture
def tokenizer(folder: Path) -> Phi3Tokenizer:
    return Phi3Tokenizer.from_pretrained(folder)
