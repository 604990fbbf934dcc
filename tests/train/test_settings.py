"""Settings from files and options, and errors in them."""

import pytest
from phi3_jax.train.settings import FREE, Settings
from typer.main import get_command

from phi3_jax.cli.finetune import app
from phi3_jax.cli.settings import read_settings
from phi3_jax.storage.resume import differences


def test_options_take_precedence_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nseed: 3\nlora_targets: [qkv_proj]\n")
    settings = Settings.read(path, {"seed": 5, "optim": "lion"})
    assert (settings.learning_rate, settings.seed, settings.optim) == (1e-4, 5, "lion")
    assert settings.lora_targets == ["qkv_proj"]
    assert Settings.read(None, {}) == Settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", "there is no setting learning_rat"),
        ("learning_rate: fast\nseed: x", "learning_rate='fast': .*; seed='x': "),
        ("optim: sgd", "optim='sgd': Input should be 'adamw', 'adafactor' or 'lion'"),
        ("- seed", "holds list; expected settings"),
        ("seed: [1", r"cannot be read: .*line 1, column 7: .*expected"),
        ("train_batch_size: 8\ngradient_accumulation_steps: 3", "train_batch_size=8 does not divide into"),
        ("packing: true", "packing is for causal-lm, not for sequence-classification"),
        ("trained: head\ntask: causal-lm", "trained=head is for classification"),
        ("dataset: ag_news\ntrain_file: a.csv", "give dataset or train_file, not both"),
        ("test_file: a.csv", "need a train_file beside them"),
        ("dataset: ag_news\ndataset_splits: {test: test}", "must name a split for"),
        ("seed: 1\noptim: lion\nseed: 2", r"the key 'seed' is there twice .*line 1, column 1"),
        ("class_weights: {a: 1, b: 2, a: 3}", "the key 'a' is there twice"),
        ("learning_rate: .inf", "learning_rate=inf: Input should be a finite number"),
        ("weight_decay: .nan", "weight_decay=nan: "),
        ("learning_rate: 1.0e-50", "learning_rate=1e-50 is outside float32's range"),
        ("weight_decay: 1.0e+300", "weight_decay=1e\\+300 is outside float32's range"),
        ("class_weights: {a: 1.0e-50}", r"class_weights\['a'\]=1e-50 is outside float32's range"),
        ('output_dir: "a\\0b"', r"output_dir='a\\x00b' has a character that no text can have"),
        ('train_file: [a.csv, "\\uD800"]', r"train_file='\\ud800' has a character"),
        ("lora_alpha: -1", "lora_alpha=-1: Input should be greater than 0"),
        ("seed: -1", "seed=-1: Input should be greater than or equal to 0"),
        (f"max_steps: {2**31}", r"max_steps=2147483648 must be below 2\*\*31"),
        (f"max_length: {10**30}", r"max_length=1000000000000000000000000000000 must be below 2\*\*31"),
    ],
)
def test_names_errors_in_settings(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        Settings.read(path, {})


def test_reads_merged_mappings(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("class_weights: &own {a: 1, b: 2}\n<<: {seed: 3}\n")
    settings = Settings.read(path, {})
    assert (settings.seed, settings.class_weights) == (3, {"a": 1.0, "b": 2.0})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{a: 1, a: 2}", "class_weights='{a: 1, a: 2}' is not valid YAML: the key 'a' is there twice"),
        ("{a", "is not valid YAML"),
    ],
)
def test_names_errors_in_options(value, words):
    with pytest.raises(ValueError, match=words):
        read_settings(None, {"class_weights": value})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("label_column", "a,b, c", ["a", "b", "c"]),
        ("label_column", "a", "a"),
        ("label_column", '["a,b"]', ["a,b"]),
        ("labels", "ham,spam", ["ham", "spam"]),
        ("lora_targets", "qkv_proj", ["qkv_proj"]),
        ("class_weights", "ham=1,spam=4.5", {"ham": 1.0, "spam": 4.5}),
        ("class_weights", "balanced", "balanced"),
        ("class_weights", "{a: 1, b: 2}", {"a": 1.0, "b": 2.0}),
        ("dataset_splits", "train=train,test=dev", {"train": "train", "test": "dev"}),
        ("text_column", "a,b", "a,b"),
    ],
)
def test_options_take_lists_and_mappings(name, value, expected):
    assert getattr(read_settings(None, {name: value}), name) == expected


def test_rejects_a_mapping_with_a_key_twice():
    with pytest.raises(ValueError, match="class_weights='a=1,a=2' has a key twice"):
        read_settings(None, {"class_weights": "a=1,a=2"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optim", "adamw, adafactor, lion. Default: adamw."),
        ("lora_targets", "As in a,b,c. Default: qkv_proj,o_proj,gate_up_proj,down_proj."),
        ("class_weights", "By label; balanced: rarer classes count more. balanced or as in a=1,b=2."),
        ("dataset_splits", "As in a=1,b=2. Default: train=train."),
        ("skip_bad_rows", "Count invalid rows instead of stopping. Default: off."),
        ("learning_rate", "Default: 0.0001."),
        ("metric_for_best_model", "Default: accuracy, f1 or loss, by the task."),
    ],
)
def test_the_help_shows_choices_forms_and_defaults(name, words):
    options = {option.name: option for option in get_command(app).params}
    assert options[name].help.endswith(words)
    assert "[" not in options[name].help  # the help would leave it out


def test_rejects_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*no\.yaml"):
        Settings.read(tmp_path / "no.yaml", {})


def test_differences_leave_out_settings_that_may_change():
    before = Settings().model_dump(mode="json")
    now = Settings(seed=1, output_dir="elsewhere", logging_steps=7).model_dump(mode="json")
    assert differences(before, now, free=FREE) == ["seed: 0 -> 1"]
