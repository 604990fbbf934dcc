"""`phi3-jax classify` predicts what transformers does; kills, bad rows and full disks lose nothing."""

import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from answers import stored
from marks import slow
from reference import Reference, pair, small_config
from stores import open_store
from their_tokenizer import TheirTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from phi3_jax import (
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    cli,
)
from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.classification import Classifier, classify, classify_file, store_output
from phi3_jax.classification.classifier import row_widths, task_of_model
from phi3_jax.classification.head import Head
from phi3_jax.classification.output import PartialOutput
from phi3_jax.classification.store_output import StoreOutput
from phi3_jax.cli import common
from phi3_jax.data.labels import Labels
from phi3_jax.data.reading import read_items, read_rows
from phi3_jax.data.rows import BadRowError, BadRows
from phi3_jax.data.tasks import SequenceClassification, TokenClassification
from phi3_jax.runs import bucket_mounts, progress
from phi3_jax.storage.urls import list_entries

TOLERANCE = 1e-5
WORDS = [
    "the",
    "old",
    "bridge",
    "is",
    "closed",
    "on",
    "Monday",
    "naïve",
    "café",
    "😀",
    "nobody",
    "knows",
    "why",
    "trains",
    "left",
    "late",
]
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}
KINDS: dict[str, dict[str, Any]] = {
    "single": {"problem_type": "single_label_classification"},
    "multi": {"problem_type": "multi_label_classification"},
    "regression": {"problem_type": "regression", "id2label": {0: "value"}},
    "regressions": {"problem_type": "regression", "id2label": {0: "joy", 1: "fear", 2: "rage"}},
    "tokens": {},
}


def write_tokenizer(folder: Path) -> None:
    """Writes a byte-level tokenizer that puts a text between <s> and </s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def config(**changes: Any) -> Phi3Config:
    sizes = {"vocab_size": 300, "max_position_embeddings": 256, "original_max_position_embeddings": 256}
    return small_config(**{"num_hidden_layers": 1, "id2label": LABELS, **sizes, **changes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """`checkpoint(kind)` returns a folder, and the model of transformers that it holds."""
    checkpoints: dict[str, tuple[Path, Any]] = {}

    def get(kind: str) -> tuple[Path, Any]:
        if kind not in checkpoints:
            folder = tmp_path_factory.mktemp(kind)
            head = "token" if kind == "tokens" else "sequence"
            _, theirs = pair(head, config(**KINDS[kind]), folder, seed=5)
            write_tokenizer(folder)
            checkpoints[kind] = folder, theirs
        return checkpoints[kind]

    return get


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Any) -> Any:
    """`run("single", input, output, *options)` runs the command; returns its exit code, output and errors."""
    monkeypatch.setattr(common, "keep_compiled_programs", lambda cache_dir: None)

    def call(model: str | Path, source: Path, output: Path, *options: object) -> tuple[int, str, str]:
        folder = checkpoint(model)[0] if isinstance(model, str) else model
        arguments = ["--model", folder, "--input", source, "--output", output, "--dtype", "float32", *options]
        monkeypatch.setattr(sys, "argv", ["phi3-jax", "classify", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return code if isinstance(code, int) else 0, *capsys.readouterr()

    return call


def texts(count: int, seed: int = 0) -> list[str]:
    """Returns different texts of 1 to 6 words and a number."""
    draws = np.random.default_rng(seed)
    return [" ".join(draws.choice(WORDS, 1 + 5 * n % 6)) + f" {n}" for n in range(count)]


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Writes CSV or JSONL whose texts contain newlines, quotes and carriage returns."""
    rows = [
        {
            "id": str(n),
            "text": f'{text}\n"q", {n}' + "\r" * (n % 3 == 0),
            "note": "" if n % 2 else "x\ry",
        }
        for n, text in enumerate(texts(count, seed))
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def values(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(path, bad=BadRows(skip=False))]


def partial_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


@stored(whole=True)
def their_logits(theirs: Reference, rows: list[list[int]]) -> list[Any]:
    """Returns the logits of each text alone; for a token classifier, those of each token."""
    import torch

    with torch.no_grad():
        return [theirs.model(torch.tensor([ids]), use_cache=False).logits[0].double() for ids in rows]


# Predictions


@pytest.mark.parametrize(
    ("kind", "pairs", "batch_size"),
    [
        ("single", False, 2),
        ("single", True, 2),
        ("single", False, 5),
        ("multi", False, 2),
        ("multi", True, 2),
        ("regression", False, 2),
        ("regressions", True, 2),
    ],
)
def test_matches_transformers_on_texts(checkpoint: Any, kind: str, pairs: bool, batch_size: int) -> None:
    folder, theirs = checkpoint(kind)
    classifier = Classifier.from_pretrained(
        folder, dtype="float32", batch_size=batch_size, text_pair_column="second" if pairs else None
    )
    items = list(zip(texts(11), texts(11, seed=1), strict=True)) if pairs else texts(11)
    encodings = TheirTokenizer("words", folder).ask("__call__", items)
    predictions = classifier.predict(items, all_scores=not kind.startswith("regression"))
    assert len(predictions) == 11
    all_logits = their_logits(theirs, [encoding["input_ids"] for encoding in encodings])
    for logits, prediction in zip(all_logits, predictions, strict=True):
        names = list(KINDS[kind].get("id2label", LABELS).values())
        if kind == "single":
            scores = np.exp(logits) / np.exp(logits).sum()
            assert prediction["predicted_label"] == names[scores.argmax()]
            assert prediction["score"] == pytest.approx(scores.max(), abs=TOLERANCE)
        elif kind == "multi":
            scores = 1 / (1 + np.exp(-logits))
            assert prediction["predicted_labels"] == [names[i] for i in np.flatnonzero(scores > 0.5)]
            assert prediction["scores"] == pytest.approx(scores[scores > 0.5], abs=TOLERANCE)
        else:
            columns = ["predicted"] if kind == "regression" else [f"predicted_{name}" for name in names]
            assert prediction == pytest.approx(dict(zip(columns, logits, strict=True)), abs=TOLERANCE)
            continue
        assert [prediction[f"score_{name}"] for name in names] == pytest.approx(scores, abs=TOLERANCE)


def test_matches_transformers_on_words(checkpoint: Any) -> None:
    folder, theirs = checkpoint("tokens")
    classifier = Classifier.from_pretrained(folder, dtype="float32", batch_size=2)
    sentences = [text.split() for text in texts(11)]
    spaced = [" " + word if index else word for words in sentences for index, word in enumerate(words)]
    encoded = iter(TheirTokenizer("words", folder).ask("encode", spaced, add_special_tokens=False))
    all_pieces = [[next(encoded) for _ in words] for words in sentences]
    rows = [[1, *(token for piece in pieces for token in piece), 2] for pieces in all_pieces]
    all_logits = their_logits(theirs, rows)
    seen = set()
    predictions = classifier.predict(sentences)
    for pieces, logits, prediction in zip(all_pieces, all_logits, predictions, strict=True):
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        first = 1 + np.cumsum([0, *map(len, pieces[:-1])])
        assert prediction["predicted_labels"] == [LABELS[tag] for tag in logits[first].argmax(axis=1)]
        assert prediction["scores"] == pytest.approx(probabilities[first].max(axis=1), abs=TOLERANCE)
        seen |= set(prediction["predicted_labels"])
    assert len(seen) > 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncated_words_have_no_tag(checkpoint: Any, side: str) -> None:
    classifier = Classifier.from_pretrained(
        checkpoint("tokens")[0], dtype="float32", batch_size=2, max_length=12
    )
    classifier.tokenizer.truncation_side = side
    (prediction,) = classifier.predict([WORDS])
    tags, scores = prediction["predicted_labels"], prediction["scores"]
    assert len(tags) == len(scores) == len(WORDS)
    kept = [index for index, tag in enumerate(tags) if tag is not None]
    assert 0 < len(kept) < 12
    part = slice(len(kept)) if side == "right" else slice(-len(kept), None)
    assert kept == list(range(len(WORDS)))[part]
    assert [index for index, score in enumerate(scores) if score is not None] == kept


def test_names_rows_that_cannot_be_predicted(checkpoint: Any) -> None:
    classifier = Classifier.from_pretrained(checkpoint("regression")[0], dtype="float32")
    with pytest.raises(BadRowError, match="the input, row 2: 'text' is empty"):
        classifier.predict(["a", " "])
    with pytest.raises(ValueError, match=r"all_scores is for classes of whole texts.*regression"):
        classifier.predict(["a"], all_scores=True)
    assert classifier.predict([]) == []
    model = classifier._compiled.model
    with pytest.raises(ValueError, match="needs a SequenceClassification as task, got TokenClassification"):
        Classifier(model, classifier.tokenizer, task=classify.TokenClassification(labels=None))
    model.score.weight.set_value(model.score.weight[...] * np.nan)
    broken = Classifier(model, classifier.tokenizer, task=SequenceClassification(label=None))
    with pytest.raises(ValueError, match="the input, row 1: the model's numbers are not finite"):
        broken.predict(["a"])


def test_few_widths_hold_the_longest_row() -> None:
    assert row_widths(100, 8) == (16, 24, 32, 48, 64, 96, 104)
    assert row_widths(64, 8) == (16, 24, 32, 48, 64)
    assert row_widths(5, 8) == (8,)
    assert row_widths(60, 24) == (24, 48, 72)
    assert len(row_widths(131072, 8)) == 27


# The file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_rows_keep_their_order_and_columns(run: Any, checkpoint: Any, tmp_path: Path, suffix: str) -> None:
    source, output = write_rows(tmp_path / "new.csv", 150), tmp_path / f"labelled{suffix}"
    code, out, err = run("single", source, output, "--batch-size", 2, "--all-scores")
    assert code == 0, err
    assert out.startswith(f"{output}: 150 rows; 150 in ")
    assert [path.name for path in sorted(tmp_path.iterdir())] == [output.name, "new.csv"]
    classifier = Classifier.from_pretrained(checkpoint("single")[0], dtype="float32", batch_size=2)
    rows, given = values(output), values(source)
    predictions = classifier.predict(given, all_scores=True)
    for row, before, prediction in zip(rows, given, predictions, strict=True):
        assert list(row) == [*before, *prediction]
        assert {name: row[name] for name in before} == before
        assert row["predicted_label"] == prediction["predicted_label"]
        numbers = {name: float(x) for name, x in row.items() if name.startswith("score")}
        assert numbers == pytest.approx({name: prediction[name] for name in numbers}, abs=TOLERANCE)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_lists_are_joined_only_in_csv(run: Any, tmp_path: Path, suffix: str) -> None:
    source = write_rows(tmp_path / "new.csv", 12)
    output = tmp_path / f"many{suffix}"
    assert run("multi", source, output, "--batch-size", 2)[0] == 0
    many = [row["predicted_labels"] for row in values(output)]
    if suffix == ".csv":
        many = [text.split("|") if text else [] for text in many]
    assert {len(labels) for labels in many} > {1}
    assert set().union(*many) <= set(LABELS.values())

    sentences = tmp_path / "new.conll"
    sentences.write_text("\n".join(f"{word} O\n" * (word == "is") or f"{word} O" for word in WORDS) + "\n")
    output = tmp_path / f"tags{suffix}"
    code, _, err = run("tokens", sentences, output, "--max-length", 14, "--batch-size", 2)
    assert code == 0
    first, second = values(output)
    if suffix == ".csv":
        assert json.loads(second["words"]) == WORDS[4:]
        tags, scores = (second[name].split(" ") for name in ("predicted_labels", "scores"))
        empty = ""
    else:
        assert second["words"] == WORDS[4:]
        tags, scores, empty = second["predicted_labels"], second["scores"], None
        assert len(first["predicted_labels"]) == 4
    assert len(tags) == len(scores) == len(WORDS) - 4
    missing = tags.count(empty)
    assert missing == scores.count(empty) > 0
    assert f"1 rows are longer than the maximum length and were cut, and {missing} words have no label" in err


def test_reads_all_columns_of_parquet(run: Any, tmp_path: Path) -> None:
    table = pyarrow.table({"text": texts(3), "when": [1.5, None, 2.0], "list": [[1], [], [2, 3]]})
    pyarrow.parquet.write_table(table, tmp_path / "new.parquet")
    assert run("single", tmp_path / "new.parquet", tmp_path / "labelled.csv", "--batch-size", 2)[0] == 0
    rows = values(tmp_path / "labelled.csv")
    assert [(row["when"], row["list"]) for row in rows] == [("1.5", "[1]"), ("", "[]"), ("2.0", "[2, 3]")]


def test_reads_and_writes_conll(run: Any, tmp_path: Path) -> None:
    (tmp_path / "new.conll").write_text("# a comment of words\nthe\nold\nbridge\n\nthe O\nbridge X\n")
    assert run("tokens", tmp_path / "new.conll", tmp_path / "new.jsonl")[0] == 0
    assert run("tokens", tmp_path / "new.conll", tmp_path / "tagged.conll")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    first, second = (row["predicted_labels"] for row in rows)
    expected = [f"{word}\t{tag}" for word, tag in zip(("the", "old", "bridge"), first, strict=True)]
    expected += ["", f"the\tO\t{second[0]}", f"bridge\tX\t{second[1]}", ""]
    assert (tmp_path / "tagged.conll").read_text().splitlines() == expected
    assert run("tokens", tmp_path / "new.conll", tmp_path / "cut.conll", "--max-length", 3)[0] == 0
    assert (tmp_path / "cut.conll").read_text().splitlines()[2] == "bridge\t_"
    code, _, err = run("single", tmp_path / "new.jsonl", tmp_path / "one.conll")
    assert (code, "one.conll is for tags of words" in err) == (1, True)
    (tmp_path / "odd.jsonl").write_text('{"words": ["a\\tb"]}\n')
    code, _, err = run("tokens", tmp_path / "odd.jsonl", tmp_path / "odd.conll")
    assert (code, "line 1: the word 'a\\tb' cannot be written to a line; write .jsonl" in err) == (1, True)


def test_a_threshold_chooses_among_several_labels(run: Any, checkpoint: Any, tmp_path: Path) -> None:
    head = Head(Phi3ForSequenceClassification, "multi_label_classification", ("a", "b", "c"))
    logits = np.array([-1.0, 0.5, 3.0], np.float32)  # probabilities of 0.27, 0.62 and 0.95
    for threshold, labels in ((None, ["b", "c"]), (0.2, ["a", "b", "c"]), (0.7, ["c"]), (1.0, [])):
        assert head.predict_text(logits, False, threshold)["predicted_labels"] == labels
    (tmp_path / "new.csv").write_text("text\nthe old bridge\n")
    assert run("multi", tmp_path / "new.csv", tmp_path / "all.csv", "--threshold", 0)[0] == 0
    names = Labels.from_config(open_checkpoint(checkpoint("multi")[0]).config).names
    assert values(tmp_path / "all.csv")[0]["predicted_labels"] == "|".join(names)
    code, _, err = run("single", tmp_path / "new.csv", tmp_path / "one.csv", "--threshold", 0.3)
    assert (code, "threshold is for several labels of a text" in err) == (1, True)
    with pytest.raises(ValueError, match=r"threshold=1\.5; expected a probability"):
        head.check_threshold(1.5)


def test_reads_a_raw_file(run: Any, tmp_path: Path) -> None:
    (tmp_path / "new.tsv").write_bytes('1\tThe "caf\xe9\n2\t"old bridge\n'.encode("iso-8859-1"))
    options = ("--encoding", "iso-8859-1", "--no-quoting", "--column-names", "id,text")
    assert run("single", tmp_path / "new.tsv", tmp_path / "labelled.csv", *options)[0] == 0
    rows = values(tmp_path / "labelled.csv")
    assert [(row["id"], row["text"]) for row in rows] == [("1", 'The "café'), ("2", '"old bridge')]


def test_columns_and_length_default_to_those_of_training(checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for file in checkpoint("single")[0].iterdir():
        (folder / file.name).symlink_to(file)
    settings = {"text_column": "query", "text_pair_column": "reply", "max_length": 24, "label_separator": ";"}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    task = Classifier.from_pretrained(folder).task
    expected = SequenceClassification("query", "reply", None, label_separator=";", max_length=24)
    assert task == expected
    given = Classifier.from_pretrained(folder, text_column="text", max_length=30).task
    assert given == SequenceClassification("text", "reply", None, label_separator=";", max_length=30)
    (folder / "run.json").write_text(json.dumps({"settings": {"prefix_space": False}}))
    tagger = Head(Phi3ForTokenClassification, "token-classification", ("O",))
    words = task_of_model(folder, open_checkpoint(folder).config, tagger)
    assert words == TokenClassification(labels=None, prefix_space=False, max_length=256)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is broken"):
        Classifier.from_pretrained(folder)
    (folder / "run.json").unlink()
    assert Classifier.from_pretrained(folder).task == SequenceClassification(label=None, max_length=256)
    with pytest.raises(ValueError, match="words_column='w' is not for single_label_classification"):
        Classifier.from_pretrained(folder, words_column="w")


def test_matches_one_device_on_a_mesh(run: Any, tmp_path: Path) -> None:
    source = tmp_path / "new.csv"
    source.write_text("text\n" + "\n".join(WORDS[:5]) + "\n")
    assert run("single", source, tmp_path / "one.jsonl", "--batch-size", 2)[0] == 0
    mesh = ("--mesh", "data=2,tensor=2,context=2", "--batch-size", 2)
    assert run("single", source, tmp_path / "eight.jsonl", *mesh)[0] == 0
    for one, eight in zip(values(tmp_path / "one.jsonl"), values(tmp_path / "eight.jsonl"), strict=True):
        assert eight == one | {"score": pytest.approx(one["score"], abs=TOLERANCE)}
    code, _, err = run("single", source, tmp_path / "odd.jsonl", "--mesh", "data=8", "--batch-size", 12)
    assert code == 1
    assert "batch_size=12 does not divide over 8" in err


def test_parses_the_input_once(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = []
    reader = csv.reader

    def count(*arguments: Any, **options: Any) -> Any:
        readers.append(reader(*arguments, **options))
        return readers[-1]

    monkeypatch.setattr(csv, "reader", count)
    source, folder = write_rows(tmp_path / "new.csv", 70), str(checkpoint("single")[0])
    done = classify_file(folder, source, tmp_path / "out.jsonl", batch_size=2, dtype="float32")
    assert done.rows == 70
    assert len(readers) == 1


def test_reads_one_chunk_ahead_and_writes_one_after(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, ahead = 0, []

    def count_rows(*arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal read
        for item in read_items(*arguments, **options):
            read += 1
            yield item

    add = PartialOutput.add

    def watch(self: PartialOutput, *arguments: Any) -> None:
        ahead.append(read - self.state.written)
        add(self, *arguments)

    monkeypatch.setattr(classify, "read_items", count_rows)
    monkeypatch.setattr(PartialOutput, "add", watch)
    source = write_rows(tmp_path / "new.csv", 400)
    classify_file(str(checkpoint("single")[0]), source, tmp_path / "out.csv", batch_size=2, dtype="float32")
    assert len(ahead) == 7
    # One is written, one classified, one read.
    assert max(ahead) <= 3 * 64 + 2


def test_writes_a_chunk_while_the_next_is_classified(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second, overlapped, calls = threading.Event(), [], 0
    predict, add = Classifier.predict_encoded, PartialOutput.add

    def count(self: Classifier, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            second.set()
        return predict(self, *arguments, **options)

    def wait(self: PartialOutput, *arguments: Any) -> None:
        overlapped.append(second.wait(timeout=20))
        add(self, *arguments)

    monkeypatch.setattr(Classifier, "predict_encoded", count)
    monkeypatch.setattr(PartialOutput, "add", wait)
    source = write_rows(tmp_path / "new.csv", 100)
    classify_file(str(checkpoint("single")[0]), source, tmp_path / "out.csv", batch_size=2, dtype="float32")
    assert overlapped == [True, True]


def test_counts_the_time_that_the_device_waits(
    run: Any, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = classify._Chunks.next

    def read_slowly(self: Any) -> Any:
        time.sleep(0.3)
        return read(self)

    folder, source = str(checkpoint("single")[0]), write_rows(tmp_path / "new.csv", 100)
    done = classify_file(folder, source, tmp_path / "fast.csv", batch_size=2, dtype="float32")
    assert 0 < done.waited < done.seconds
    monkeypatch.setattr(classify._Chunks, "next", read_slowly)
    slow = classify_file(folder, source, tmp_path / "slow.csv", batch_size=2, dtype="float32")
    assert done.waited + 0.3 < slow.waited < slow.seconds
    _, out, _ = run("single", source, tmp_path / "out.csv", "--batch-size", 2)
    assert re.search(r" tokens/s, \d\d?% of the time waiting for the host$", out.strip())


@pytest.mark.parametrize("terminal", [False, True])
def test_shows_progress(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    source = tmp_path / "new.csv"
    source.write_text("text\n" + "\n".join(texts(100)) + "\n")
    _, out, err = run("single", source, tmp_path / "out.csv", "--batch-size", 2)
    assert out.startswith(f"{tmp_path / 'out.csv'}: 100 rows; 100 in ")
    for part in ("100 rows, ", " rows/s, 100%"):
        assert part in err
    assert ("elapsed" in err) == terminal
    if not terminal:
        shares = [int(line.split(", ")[-1][:-1]) for line in err.splitlines()]
        assert shares == sorted(shares)
        assert len(set(shares)) > 30


# Bad rows, kills and other faults


def test_keeps_a_line_for_each_bad_row(run: Any, tmp_path: Path) -> None:
    """The line has what could be read, and what is wrong; good rows are as without bad ones."""
    lines = [f"{n},{text}" for n, text in enumerate(texts(300))]
    good = tmp_path / "good.csv"
    good.write_text("\n".join(["id,text", *lines]) + "\n")
    assert run("single", good, tmp_path / "good.jsonl", "--batch-size", 2)[0] == 0
    lines[0] = "0"  # cannot be read
    lines[20] = '20,"x"y'
    lines[100] = "100, "  # nothing to classify
    source = tmp_path / "new.csv"
    source.write_text("\n".join(["id,text", *lines]) + "\n")
    for name in ("out.csv", "out.jsonl"):
        code, out, err = run("single", source, tmp_path / name, "--batch-size", 2, "--keep-bad-rows")
        assert code == 0
        assert "300 rows; 300 in" in out
        assert f"3 bad rows have no prediction; among them: {source}, line 2: 1 fields, but" in err
        rows = values(tmp_path / name)
        assert [n for n, row in enumerate(rows) if row["error"]] == [0, 20, 100]
        absent = None if name.endswith("jsonl") else ""
        expected = {"id": "100", "text": " ", "predicted_label": absent, "score": absent}
        assert rows[100] == expected | {"error": "line 102: 'text' is empty"}
        assert rows[0].get("id", "") == ""
        assert rows[20]["error"].startswith("line 22: ")
        for row, one in zip(rows, values(tmp_path / "good.jsonl"), strict=True):
            if not row["error"]:
                assert {**row, "score": float(row["score"])} == one | {
                    "error": absent,
                    "score": pytest.approx(one["score"], abs=TOLERANCE),
                }
    assert list(values(tmp_path / "good.jsonl")[0]) == ["id", "text", "predicted_label", "score"]


def test_a_run_with_bad_rows_resumes(run: Any, tmp_path: Path) -> None:
    """In three parts: up to the first bad row, then past it, then after a chunk with a bad row."""
    rows = [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts(300))]
    rows[100], rows[150] = '{"id": 100, "text": ""}', '{"id": 150'
    source, output = tmp_path / "new.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(rows) + "\n")
    keep = ("--batch-size", 2, "--keep-bad-rows")
    assert run("single", source, tmp_path / "whole.jsonl", *keep)[0] == 0
    code, _, err = run("single", source, output, "--batch-size", 2)
    assert code == 1
    assert f"{source}, line 101: 'text' is empty. --keep-bad-rows writes such rows without" in err
    done = json.loads(partial_of(output).with_name("out.jsonl.partial.json").read_text())["done"]
    assert done["written"] == 64
    assert len(values_of_partial(output)) == 64
    add = PartialOutput.add

    def interrupt(self: PartialOutput, data: bytes, state: Any) -> None:
        if state.written > 200:
            raise KeyboardInterrupt
        add(self, data, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialOutput, "add", interrupt)
        assert run("single", source, output, *keep)[0] == 130
    code, out, err = run("single", source, output, *keep)
    assert code == 0
    assert "300 rows; 108 in" in out
    assert "2 bad rows have no prediction\n" in err
    ours, whole = values(output), values(tmp_path / "whole.jsonl")
    assert [row.pop("error", None) for row in ours[:64]] == [None] * 64  # written without the option
    assert [row for row in ours[64:] if row["error"]] == [row for row in whole if row["error"]]
    assert len(ours) == len(whole) == 300
    assert run("single", source, tmp_path / "o.csv", "--batch-size", 2)[0] == 1
    changed = run("single", source, tmp_path / "o.csv", *keep)[2]  # the header lacks the column
    assert "keep_bad_rows: False -> True. Choose another output, or give --overwrite" in changed


@pytest.mark.parametrize("kind", ["memory", slow("gs"), slow("s3")])
def test_writes_to_a_store(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """An interrupted run resumes, as on another machine."""
    source, whole = write_rows(tmp_path / "new.csv", 300), tmp_path / "whole.csv"
    options = ("--batch-size", 2, "--all-scores")
    assert run("single", source, whole, *options)[0] == 0
    monkeypatch.setattr(store_output, "PART_SECONDS", 0)
    add = StoreOutput.add

    def interrupt(self: StoreOutput, data: bytes, state: Any) -> None:
        if state.written > 200:
            raise KeyboardInterrupt
        add(self, data, state)

    with open_store(kind) as bucket:
        store = bucket.empty_folder()
        url = f"{store.url}/out.csv"
        with monkeypatch.context() as patch:
            patch.setattr(StoreOutput, "add", interrupt)
            assert run("single", source, url, *options)[0] == 130
        assert run("single", source, url, *options, "--batch-size", 4)[0] == 1
        code, out, err = run("single", source, url, *options)
        assert code == 0, err
        assert out.startswith(f"{url}: 300 rows; 108 in ")
        assert store.get("out.csv") == whole.read_bytes()
        assert [entry.name for entry in list_entries(store.url)] == ["out.csv"]
        assert f"{url} already exists; choose another output" in run("single", source, url, *options)[2]
        url = store.put("in.csv", source.read_bytes())
        assert "is also the input; choose another" in run("single", url, url, *options)[2]


def test_refuses_a_mounted_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mounts"
    table.write_text(f"bucket {tmp_path} fuse.gcsfuse rw 0 0\n")
    monkeypatch.setattr(bucket_mounts, "MOUNTS", table)
    with pytest.raises(ValueError, match=r"out\.csv is in a bucket that gcsfuse mounts at"):
        PartialOutput(tmp_path / "out.csv", {}, False)
    assert [path.name for path in tmp_path.iterdir()] == ["mounts"]


def test_a_bad_sentence_keeps_its_words(run: Any, tmp_path: Path) -> None:
    """CoNLL has no place for what is wrong; a sentence without readable words is one `_`."""
    source, output = tmp_path / "new.conll", tmp_path / "out.conll"
    source.write_bytes(b"the\tO\n\nold\tO\nbridge\n\ncaf\xe9\tO\nis\tO\n\nlate\tO\n\n")
    code, _, err = run("tokens", source, output, "--batch-size", 2, "--keep-bad-rows")
    assert code == 0
    assert "2 bad rows have no prediction" in err
    sentences = [
        [line.split("\t") for line in sentence.splitlines()]
        for sentence in output.read_text().removesuffix("\n\n").split("\n\n")
    ]
    assert [[line[0] for line in one] for one in sentences] == [
        ["the"],
        ["old", "bridge"],
        ["_", "is"],
        ["late"],
    ]
    assert [line[-1] for line in sentences[1] + sentences[2]] == ["_"] * 4
    assert sentences[3][0][-1] in LABELS.values()
    rows = tmp_path / "new.jsonl"
    rows.write_text('{"words": ["a"]}\n{"words": ["a\\tb", "c"]}\n{"words": []}\n{"text": 1}\n')
    assert run("tokens", rows, tmp_path / "rows.conll", "--batch-size", 2, "--keep-bad-rows")[0] == 0
    kept = (tmp_path / "rows.conll").read_text().split("\n\n")
    assert kept[1:] == ["_\t_\nc\t_", "_\t_", "_\t_", ""]


def values_of_partial(output: Path) -> list[dict[str, Any]]:
    path = partial_of(output)
    return [row.values for row in read_rows(path, file_format=output.suffix[1:], bad=BadRows(skip=False))]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_resumes_to_the_same_bytes(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    source, output = write_rows(tmp_path / f"new{suffix}", 300), tmp_path / f"out{suffix}"
    assert run("single", source, tmp_path / f"whole{suffix}", "--batch-size", 2)[0] == 0
    add, write = PartialOutput.add, PartialOutput._write_state
    chunks = 0

    def interrupt_within_a_row(self: PartialOutput, data: bytes, state: Any) -> None:
        nonlocal chunks
        add(self, data, state)
        if (chunks := chunks + 1) % 2 == 0:
            self._file.write(data[: len(data) // 3])
            raise KeyboardInterrupt

    def interrupt_after_a_chunk(self: PartialOutput, state: Any) -> None:
        if state.written == 256:
            raise KeyboardInterrupt
        write(self, state)

    monkeypatch.setattr(PartialOutput, "add", interrupt_within_a_row)
    assert run("single", source, output, "--batch-size", 2)[0] == 130
    monkeypatch.setattr(PartialOutput, "add", add)
    monkeypatch.setattr(PartialOutput, "_write_state", interrupt_after_a_chunk)
    assert run("single", source, output, "--batch-size", 2)[0] == 130
    monkeypatch.setattr(PartialOutput, "_write_state", write)
    assert not output.exists()
    code, out, _ = run("single", source, output, "--batch-size", 2)
    assert code == 0
    assert "300 rows; 108 in" in out
    assert output.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_rejects_a_partial_output_of_other_options(
    run: Any, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_rows(tmp_path / "new.csv", 100), tmp_path / "out.csv"
    options = ("--batch-size", 2)
    assert run("single", source, tmp_path / "whole.csv", *options)[0] == 0
    add = PartialOutput.add

    def stop(self: PartialOutput, *arguments: Any) -> None:
        add(self, *arguments)
        raise KeyboardInterrupt

    def write_one_chunk() -> None:
        monkeypatch.setattr(PartialOutput, "add", stop)
        assert run("single", source, output, *options, "--overwrite")[0] == 130
        monkeypatch.setattr(PartialOutput, "add", add)

    write_one_chunk()
    part, about = partial_of(output), partial_of(output).with_name("out.csv.partial.json")
    before = part.read_bytes()
    cases: list[tuple[str, tuple[object, ...], str]] = [
        ("single", (*options, "--max-length", 20), "max_length: 256 -> 20"),
        ("single", (*options, "--all-scores"), "all_scores: False -> True"),
        ("single", ("--batch-size", 4), "batch_size: 2 -> 4"),
        ("multi", options, "model: "),
    ]
    for model, other, message in cases:
        code, _, err = run(model, source, output, *other)
        assert code == 1
        assert message in err
        assert "--overwrite" in err
        assert part.read_bytes() == before
    stamp = source.stat()
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert "input_modified: " in run("single", source, output, *options)[2]
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    folder = checkpoint("single")[0]
    for name in ("model.safetensors", "config.json"):
        content = (folder / name).read_bytes()
        other = content + b" " if name == "config.json" else content[:-1] + bytes([content[-1] ^ 1])
        (folder / name).write_bytes(other)
        assert f"model_files.{name}: " in run("single", source, output, *options)[2]
        (folder / name).write_bytes(content)
    part.write_bytes(before[:-9])
    assert f"has {len(before) - 9} bytes" in run("single", source, output, *options)[2]
    about.write_text(about.read_text()[:20])
    assert "out.csv.partial.json is broken" in run("single", source, output, *options)[2]

    write_one_chunk()  # --overwrite replaces the broken one
    assert part.read_bytes() == before
    code, out, _ = run("single", source, output, *options, "--overwrite")
    assert code == 0
    assert "100 rows; 36 in" in out, "--overwrite resumes a valid partial output"
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert f"{output} already exists" in run("single", source, output, *options)[2]
    assert run("single", source, output, *options, "--overwrite", "--all-scores")[0] == 0
    assert "score_O" in values(output)[0]


def test_resumes_after_a_full_disk(run: Any, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "new.csv", 200), tmp_path / "out.csv"
    assert run("single", source, tmp_path / "whole.csv", "--batch-size", 2)[0] == 0
    whole = (tmp_path / "whole.csv").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        code, _, err = run("single", source, output, "--batch-size", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "64 rows are complete and kept; free some space, and run the same command to resume" in err
    assert partial_of(output).stat().st_size == len(whole) // 2
    code, out, _ = run("single", source, output, "--batch-size", 2)
    assert code == 0
    assert "200 rows; 136 in" in out
    assert output.read_bytes() == whole


def test_rejects_a_second_process(tmp_path: Path) -> None:
    first = PartialOutput(tmp_path / "out.csv", {}, False)
    with pytest.raises(ValueError, match=r"another process is writing .*out\.csv\.partial"):
        PartialOutput(tmp_path / "out.csv", {}, True)
    first.close()
    PartialOutput(tmp_path / "out.csv", {}, False).close()


def check_refused(result: tuple[int, str, str], message: str, folder: Path) -> None:
    code, _, err = result
    assert code == 1
    assert message in err
    assert not list(folder.glob("*.partial*"))


def test_rejects_bad_arguments_before_writing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "new.csv", 3)
    for name in ("out.parquet", "out"):
        check_refused(run("single", source, tmp_path / name), "use .csv, .tsv or .jsonl", tmp_path)
    check_refused(run("single", tmp_path / "no.csv", tmp_path / "out.csv"), "no such file", tmp_path)
    check_refused(run("single", source, tmp_path / "no" / "out.csv"), "there is no folder", tmp_path)
    check_refused(run("single", source, source), "is also the input; choose another", tmp_path)
    check_refused(
        run("single", source, tmp_path / "out.csv", "--text-column", "body"),
        "has no column 'body'; its columns are 'id', 'text', 'note'",
        tmp_path,
    )
    taken = tmp_path / "taken.csv"
    taken.write_text("text,score\na,1\n")
    check_refused(run("single", taken, tmp_path / "out.csv"), "already has a column 'score'", tmp_path)
    assert run("multi", taken, tmp_path / "fine.csv", "--batch-size", 2)[0] == 0
    check_refused(
        run("tokens", source, tmp_path / "out.csv", "--all-scores"),
        "all_scores is for classes of whole texts",
        tmp_path,
    )
    broken = tmp_path / "broken.csv"
    broken.write_text('text,id\n"open')
    check_refused(run("single", broken, tmp_path / "out.csv"), "broken.csv, line 2: unexpected end", tmp_path)
    kept = run("single", broken, tmp_path / "out.csv", "--keep-bad-rows")
    check_refused(kept, "broken.csv has no row that can be read: ", tmp_path)
    causal = tmp_path / "causal"
    Phi3ForCausalLM(config()).save_pretrained(causal)
    check_refused(run(causal, source, tmp_path / "out.csv"), "architectures=['Phi3ForCausalLM']", tmp_path)
    about = json.loads((causal / "config.json").read_text())
    about["architectures"] = ["Phi3ForSequenceClassification"]
    (causal / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"has no score\.weight"):
        Classifier.from_pretrained(causal)


def test_names_the_extra_of_absent_libraries(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'grain'", name="grain")

    monkeypatch.setattr("phi3_jax.cli.lazy.import_module", fail)
    source = tmp_path / "new.csv"
    source.write_text("text\na\n")
    check_refused(run("single", source, tmp_path / "out.csv"), "pip install 'phi3-jax[train]'", tmp_path)


def test_rejects_rows_that_cannot_be_written(run: Any, tmp_path: Path) -> None:
    source, two = tmp_path / "new.jsonl", ("--batch-size", 2)
    rows = [{"text": "a"}, {"text": "b", "more": 1}, {"text": "c", "score": 1}, {"text": "d"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"text": "\\ud800"}\n')
    refusals = {"out.csv": "line 2: has a column 'more'", "out.jsonl": "line 3: already has a column 'score'"}
    for name, message in refusals.items():
        code, _, err = run("single", source, tmp_path / name, *two)
        assert code == 1
        assert message in err
    for name, bad in (("kept.jsonl", [2, 4]), ("kept.csv", [1, 2, 4])):
        code, _, err = run("single", source, tmp_path / name, *two, "--keep-bad-rows")
        assert code == 0
        assert f"{len(bad)} bad rows have no prediction" in err
        assert "half of a surrogate pair" in err
        kept = values(tmp_path / name)
        assert [row.get("text") or "" for row in kept] == ["a", "b", "c", "d", ""]
        assert [number for number, row in enumerate(kept) if not row["predicted_label"]] == bad


def test_rejects_a_label_with_the_separator(run: Any, checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint("multi")[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    about = json.loads((folder / "config.json").read_text())
    about |= {"id2label": {"0": "a|b", "1": "c", "2": "d", "3": "e"}, "label2id": None}
    (folder / "config.json").write_text(json.dumps(about))
    source = write_rows(tmp_path / "new.csv", 3)
    assert "the label 'a|b' contains '|'" in run(folder, source, tmp_path / "out.csv")[2]
    assert run(folder, source, tmp_path / "out.jsonl", "--batch-size", 2)[0] == 0


@pytest.mark.slow
def test_resumes_after_several_kills(checkpoint: Any, tmp_path: Path) -> None:
    """SIGKILL at any time; in bfloat16, the default."""
    source = write_rows(tmp_path / "new.csv", 3000)
    folder = checkpoint("single")[0]

    def start(output: Path) -> subprocess.Popen[bytes]:
        arguments = ["--model", folder, "--input", source, "--output", output, "--batch-size", "2"]
        return subprocess.Popen(
            [sys.executable, "-c", "from phi3_jax.cli import main; main()", "classify", *map(str, arguments)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PHI3_JAX_CACHE": str(tmp_path / "cache")},
            stderr=subprocess.PIPE,
        )

    with start(tmp_path / "whole.csv") as whole:
        _, err = whole.communicate(timeout=300)
        assert whole.returncode == 0, err.decode()
    kills, output = 0, tmp_path / "out.csv"
    part, size = partial_of(output), 0
    while kills < 4:
        with start(output) as process:
            while process.poll() is None:
                if part.exists() and part.stat().st_size > size + 20_000 * (kills + 1):
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.003)
            _, err = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), err.decode()
        assert not size or b"resuming after row" in err
        kills += process.returncode != 0
        size = part.stat().st_size if part.exists() else 0
        if process.returncode == 0:  # before its kill
            assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
            output = output.with_name(f"{output.stem}-.csv")
            part = partial_of(output)
    with start(output) as process:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
