"""The parts of a study: its text and examples, mixed lists, a new model, and the record of stages."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import small_config
from small_checkpoint import write_checkpoint

from phi3_jax import Phi3Config, Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.errors import UserError
from phi3_jax.evaluation.scorer import frequencies_for
from phi3_jax.rope_lab.retrieval.tasks import make_tasks
from phi3_jax.rope_lab.study.base import write_new_model
from phi3_jax.rope_lab.study.record import StudyRecord
from phi3_jax.rope_lab.study.retrieval import TrainingPrompts
from phi3_jax.rope_lab.study.ropes import ResolvedRope, is_packable, kind_of, with_context, write_lists
from phi3_jax.rope_lab.study.settings import BaseSettings
from phi3_jax.rope_lab.study.texts import Mixture, divide, windows

SIZES = {"max_position_embeddings": 64, "original_max_position_embeddings": 64}


def test_divides_a_text_at_lines(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "text.txt").write_text(text)
    parts = divide(tmp_path / "text.txt", 0.1, 0.2)
    assert parts.train + parts.validation + parts.test == text
    assert (parts.validation.split("\n")[0], parts.test.split("\n")[0]) == ("line 70", "line 80")
    assert divide(tmp_path / "text.txt", 0.1, 0.3).digest != parts.digest
    (tmp_path / "text.txt").write_text("one line")
    with pytest.raises(UserError, match=r"text.txt has too few lines for its parts"):
        divide(tmp_path / "text.txt", 0.1, 0.2)


def test_windows_of_passes_differ() -> None:
    found = list(islice(windows(range(100), 30, np.random.default_rng(0)), 12))
    assert {len(window) for window in found} == {30}
    assert all(window == list(range(window[0], window[0] + 30)) for window in found)
    starts = [window[0] for window in found]
    assert starts[:2] == [starts[0], starts[0] + 30]
    assert len({start % 30 for start in starts}) > 2
    assert list(islice(windows(range(30), 30, np.random.default_rng(0)), 2)) == [list(range(30))] * 2


def test_examples_have_their_shares_of_the_tokens(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path)
    prompts = TrainingPrompts(tokenizer, make_tasks(["passkey", "multi-query"]))
    lengths = (prompts.shortest, prompts.shortest + 100)
    mixture = Mixture(20_000, 100, 20, short_share=0.3, retrieval_share=0.2, retrieval_lengths=lengths)
    examples = list(mixture.examples(list(range(1000)), prompts, np.random.default_rng(0)))
    sizes = [len(example) for example in examples]
    assert sizes[:100] == [100] * 100
    assert sizes[100:400] == [20] * 300
    tasks = examples[400:]
    assert 4000 <= sum(sizes[400:]) < 4000 + lengths[1]
    assert all(len(task) <= lengths[1] for task in tasks)
    texts = [tokenizer.decode(task) for task in tasks]
    for text in texts[::2]:
        key = text.partition("Remember it: ")[2][:5]
        assert text.endswith(f"The pass key is {key}.<|end|>")
    for text in texts[1::2]:
        asked = text.rpartition(" are ")[2].removesuffix(".<|end|>").replace(" and ", ", ").split(", ")
        assert len(asked) == 4
        assert all(f"is {number}.\n" in text for number in asked)
    assert len({text[-16:] for text in texts}) == len(texts)


def test_repetitions_fill_a_window(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    prompts = TrainingPrompts(Phi3Tokenizer.from_pretrained(tmp_path), make_tasks(["passkey"]))
    mixture = Mixture(10_000, 100, repetition_share=0.2, vocab_size=50)
    examples = list(mixture.examples(range(1000, 2000), prompts, np.random.default_rng(0)))
    assert len(examples) == 100
    for example in examples[80:]:
        assert len(example) == 100
        assert 1 <= min(example) < max(example) < 50
    periods = [next(n for n in range(1, 100) if each[n:] == each[:-n]) for each in examples[80:]]
    assert 4 <= min(periods) < 10 < max(periods) <= 50


def test_mixed_lists_are_plain_rope_and_the_scaling(tmp_path: Path) -> None:
    base = small_config(**SIZES)
    scaled = ResolvedRope("yarn", "yarn:factor=4").config(base)
    for mixed in (True, False):
        write_lists(tmp_path / "lists.json", base, scaled, 256, mixed=mixed)
        config = ResolvedRope("mixed", f"longrope:@{tmp_path}/lists.json").config(base)
        assert (config.max_position_embeddings, config.original_max_position_embeddings) == (256, 64)
        for length, expected in ((64, base if mixed else scaled), (65, scaled)):
            for got, wanted in zip(
                frequencies_for(config, length), frequencies_for(expected, length), strict=True
            ):
                np.testing.assert_allclose(got, wanted, rtol=1e-6)
        assert is_packable(config, 256)


def test_kinds_and_contexts_of_ropes() -> None:
    base = small_config(**SIZES)
    texts = ("none", "none:rope_theta=80000", "dynamic:factor=4", "linear:factor=4", "llama3:factor=4", None)
    assert [kind_of(text) for text in texts] == ["plain", "ntk", "ntk", "linear", "other", "searched"]
    assert with_context("none", base, 256) == "none:max_position_embeddings=256"
    assert (
        with_context("none:rope_theta=80000", base, 256)
        == "none:rope_theta=80000,max_position_embeddings=256"
    )
    assert with_context("dynamic:factor=4", base, 256) == "dynamic:factor=4"
    with pytest.raises(
        UserError, match=r"'linear:factor=2' stretches the model to 128 tokens only; .* needs 256"
    ):
        with_context("linear:factor=2", base, 256)
    assert not is_packable(ResolvedRope("", "dynamic:factor=4").config(base), 256)
    assert is_packable(ResolvedRope("", "linear:factor=4").config(base), 256)


def test_a_new_model_copies_digits(tmp_path: Path) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    settings = BaseSettings(config=config, vocab_size=300, length=64, train={"max_steps": 1})
    text = "In 1812 the year was 1812, and in 1812 so it was, which everybody remembered in Moscow. " * 20
    write_new_model(tmp_path, text, settings, seed=1)
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("in 1812 it was, Ÿ😀")
    assert tokenizer.decode(ids) == "in 1812 it was, Ÿ😀"
    assert [tokenizer.decode(each) for each in ids if tokenizer.decode(each).isdigit()] == [
        "1",
        "8",
        "1",
        "2",
    ]
    model = Phi3ForCausalLM.from_pretrained(tmp_path)
    assert model.config == Phi3Config.from_pretrained(tmp_path)
    assert (tokenizer.eos_token_id, model.config.eos_token_id, model.config.vocab_size) == (0, 0, 300)
    assert float(np.std(model.model.embed_tokens.weight[...])) == pytest.approx(0.02, rel=0.1)
    with pytest.raises(UserError, match=r"yields \d+ tokens only; give base.vocab_size="):
        write_new_model(tmp_path, text, settings.model_copy(update={"vocab_size": 4096}), seed=1)


def worked(record: StudyRecord, name: str, options: dict[str, Any], result: Any) -> None:
    with record.working(name, options) as clock:
        clock.result = result


def test_a_record_keeps_finished_stages(tmp_path: Path) -> None:
    options = {"rope": "yarn", "lengths": [64]}
    with StudyRecord(tmp_path) as record:
        record.check({"compare/yarn": options})
        worked(record, "compare/yarn", options, [1, float("inf")])
        with pytest.raises(KeyboardInterrupt), record.working("search/x", {"length": 3}):
            raise KeyboardInterrupt
    with StudyRecord(tmp_path) as record:
        record.check({"compare/yarn": options | {"lengths": [64, 128]}}, free=frozenset({"lengths"}))
        assert record.result("compare/yarn", options) == [1, "inf"]
        assert record.result("compare/yarn", options | {"lengths": [64, 128]}) is None
        assert record.result("search/x", {"length": 3}) is None
        assert record.seconds("compare/yarn") >= 0
        with pytest.raises(UserError, match="another process is writing"):
            StudyRecord(tmp_path).__enter__()


def test_a_record_refuses_other_options(tmp_path: Path) -> None:
    stages = {"a": {"model": "one", "length": 1}, "b": {"model": "two"}}
    with StudyRecord(tmp_path) as record:
        for name, options in stages.items():
            worked(record, name, options, name)
            (tmp_path / name).mkdir()
    changed = stages | {"a": {"model": "one", "length": 2}}
    with (
        StudyRecord(tmp_path) as record,
        pytest.raises(UserError, match=r"a was started with other options: length: 1 -> 2\. Choose another"),
    ):
        record.check(changed)
    with StudyRecord(tmp_path, overwrite=True) as record:
        record.check(changed)
        assert record.result("a", stages["a"]) is None
        assert record.result("b", stages["b"]) == "b"
    assert [(tmp_path / name).exists() for name in stages] == [False, True]
    assert json.loads((tmp_path / "study.json").read_text())["stages"].keys() == {"b"}
