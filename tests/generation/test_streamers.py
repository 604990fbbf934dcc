"""Tests that the pieces of streamers add up to the whole text, in transformers' order of calls."""

import queue
import random
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from phi3_jax.generation.streamers import BaseStreamer, TextIteratorStreamer, TextStreamer
from phi3_jax.tokenizer import JsonBackend, Phi3Tokenizer

TEXT = "the quick brown fox\njumps  over 漢字 😀 été, and is done. "


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def pieces() -> Tokenizer:
    """Returns a tokenizer of SentencePiece's kind: `▁` for spaces, bytes for characters without a piece."""
    letters = sorted({letter for letter in TEXT.replace(" ", "▁") if ord(letter) < 0x2600})
    tokens = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], *letters, "▁▁", "▁t"]
    merges = [("▁", "▁"), ("▁", "t")]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<|end|>", "<|user|>"])
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, pieces], ids=["bytes", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Phi3Tokenizer:
    return Phi3Tokenizer(JsonBackend(request.param().to_str()))


class Recorder(TextStreamer):
    """Records the texts, and which one was the last."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.texts: list[tuple[str, bool]] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.texts.append((text, stream_end))


def feed(streamer: BaseStreamer, prompt: list[int], answer: list[int]) -> None:
    """Feeds a streamer as `generate` does."""
    streamer.put(np.array([prompt]))
    for token in answer:
        streamer.put(np.array([token]))
    streamer.end()


def some_ids(tokenizer: Phi3Tokenizer, seed: int) -> tuple[list[int], list[int]]:
    generator = random.Random(seed)
    whole = tokenizer.encode(f"<|user|>{TEXT}<|end|>{TEXT[seed:]}<|end|>", add_special_tokens=False)
    noise = generator.choices(range(len(tokenizer)), k=20)
    cut = generator.randrange(1, len(whole))
    return whole[:cut], whole[cut:] + (noise if seed % 2 else [])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("skip_special_tokens", [None, False, True])
@pytest.mark.parametrize("skip_prompt", [False, True])
def test_pieces_add_up_to_the_whole(
    tokenizer: Phi3Tokenizer, skip_prompt: bool, skip_special_tokens: bool | None, seed: int
) -> None:
    options = {} if skip_special_tokens is None else {"skip_special_tokens": skip_special_tokens}
    streamer = Recorder(tokenizer, skip_prompt, **options)
    for round_seed in (seed, seed + 1):  # a streamer serves more than once
        prompt, answer = some_ids(tokenizer, round_seed)
        feed(streamer, prompt, answer)
        *texts, (last, ended) = streamer.texts
        assert ended
        assert not any(end for _, end in texts)
        assert all(text for text, _ in texts)
        expected = tokenizer.decode(answer if skip_prompt else prompt + answer, **options)
        assert "".join(text for text, _ in texts) + last == expected
        streamer.texts.clear()


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = Phi3Tokenizer(JsonBackend(byte_level().to_str()))
    streamer = Recorder(tokenizer, skip_prompt=True)
    ids = tokenizer.encode("é quick\x80😁")
    streamer.put([[5, 6]])
    pieces = []
    for token in ids:
        streamer.texts.clear()
        streamer.put([token])
        pieces.append("".join(text for text, _ in streamer.texts))
    whole = [tokenizer.decode(ids[: n + 1]).rstrip("\ufffd") for n in range(len(ids))]
    assert ["".join(pieces[: n + 1]) for n in range(len(ids))] == whole
    assert len(set(whole)) > 4


def test_printing(tokenizer: Phi3Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, answer = some_ids(tokenizer, 2)
    for skip_prompt in (False, True):
        feed(TextStreamer(tokenizer, skip_prompt), prompt, answer)
        expected = tokenizer.decode(answer if skip_prompt else prompt + answer)
        assert capsys.readouterr().out == expected + "\n"


def torch_tensor(values: Any) -> Any:
    import torch

    return torch.tensor(values)


@pytest.mark.parametrize(
    "make", [np.array, jnp.array, list, pytest.param(torch_tensor, marks=pytest.mark.live)]
)
def test_takes_any_array(tokenizer: Phi3Tokenizer, make: Any) -> None:
    streamer = Recorder(tokenizer)
    ids = tokenizer.encode("the fox", add_special_tokens=False)
    streamer.put(make([ids[:3]]))
    streamer.put(make(ids[3:5]))
    for token in ids[5:]:
        streamer.put(make([[token]]))
    streamer.end()
    assert "".join(text for text, _ in streamer.texts) == "the fox"


def test_rejects_several_rows(tokenizer: Phi3Tokenizer) -> None:
    for streamer in (TextStreamer(tokenizer), TextIteratorStreamer(tokenizer, skip_prompt=True)):
        with pytest.raises(
            ValueError, match=rf"{type(streamer).__name__} takes one row .*got shape \(2, 3\)"
        ):
            streamer.put(np.zeros((2, 3), int))


def test_another_thread_reads(tokenizer: Phi3Tokenizer) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30.0)
    for seed in (3, 4):
        prompt, answer = some_ids(tokenizer, seed)
        thread = threading.Thread(target=feed, args=(streamer, prompt, answer))
        thread.start()
        texts = list(streamer)
        thread.join()
        assert all(texts)
        assert len(texts) > 5
        assert "".join(texts) == tokenizer.decode(answer)


def test_readers_do_not_wait_forever(tokenizer: Phi3Tokenizer) -> None:
    streamer = TextIteratorStreamer(tokenizer, timeout=0.01)
    with pytest.raises(queue.Empty):
        next(streamer)


def test_rejects_other_options(tokenizer: Phi3Tokenizer) -> None:
    with pytest.raises(
        TypeError, match=r"no option clean_up_tokenization_spaces=True; decoding takes skip_special"
    ):
        TextStreamer(tokenizer, clean_up_tokenization_spaces=True)
    base = BaseStreamer()
    with pytest.raises(NotImplementedError, match=r"needs a method put\(value\)"):
        base.put(np.zeros(1, int))
    with pytest.raises(NotImplementedError, match=r"needs a method end\(\)"):
        base.end()
