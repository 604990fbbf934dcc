"""The settings of a run: one flat list, named as in transformers' TrainingArguments."""

import os
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from phi3_jax.config.rope_types import is_positive
from phi3_jax.data.tasks import ProblemType
from phi3_jax.errors import UserError
from phi3_jax.quantization import FLOATS, Quantization
from phi3_jax.storage.urls import is_url

TaskName = Literal["sequence-classification", "token-classification", "causal-lm"]


class Settings(BaseModel):
    """The settings of `phi3-jax finetune`. Each field is a key of the YAML file and an option."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task: TaskName = Field("sequence-classification", description="What the model learns.")
    model: str | None = Field(
        None, description="A directory, a .gguf file or a hub name; default: SmolLM2-135M-Instruct."
    )
    adapter: str | None = Field(
        None,
        description="LoRA adapters in PEFT's format to train further, a directory or a hub name. They have "
        "their own rank, alpha and targets, and name the model if none is given.",
    )
    rope: str | None = Field(
        None,
        description="Replaces the model's rope scaling, and is saved with it: linear:factor=4, "
        "yarn:factor=4, longrope:@factors.json and so on.",
    )
    output_dir: Path | str = Field(
        Path("runs/demo"), description="For the model, checkpoints, logs and report; a directory, or its URL."
    )
    overwrite_output_dir: bool = Field(False, description="Start over where a run already exists.")

    train_file: str | list[str] | None = Field(
        None,
        description="CSV, TSV, JSONL, Parquet or CoNLL, one file or several, or a folder of them; default: "
        "generated commands, as a demonstration.",
    )
    validation_file: str | list[str] | None = Field(None, description="Default: a part of the training rows.")
    test_file: str | list[str] | None = Field(None, description="Scored at the end.")
    file_format: Literal["csv", "tsv", "jsonl", "parquet", "conll"] | None = Field(
        None, description="Format of the files; default: by their names."
    )
    encoding: str = Field("utf-8", description="Of text files.")
    quoting: bool = Field(True, description="Quotes enclose fields of CSV and TSV; off: they are text.")
    column_names: list[str] | None = Field(
        None, description="The columns of a CSV or TSV file without a header; default: its first line."
    )
    dataset: str | None = Field(None, description="A name in `datasets`, in place of files.")
    dataset_splits: dict[Literal["train", "validation", "test"], str] = Field(
        {"train": "train"}, description="The data set's names of the splits to use."
    )
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of the training rows, without a validation_file."
    )
    skip_bad_rows: bool = Field(False, description="Count invalid rows instead of stopping.")

    text_column: str = Field("text", description="For sequence classification and raw text.")
    text_pair_column: str | None = Field(None, description="A second text.")
    label_column: str | list[str] = Field("label", description="Several: numbers, or 0 and 1 for each label.")
    labels: list[Annotated[str, Field(coerce_numbers_to_str=True)]] | None = Field(
        None,
        description="The classes in the order of their ids; default: the base model's order if the rows have "
        "its labels, else sorted.",
    )
    words_column: str = Field("words", description="For token classification.")
    tags_column: str = Field("labels", description="For token classification: a label for each word.")
    messages_column: str | None = Field(
        None,
        description="Conversations, for chat; default: messages or conversations if there is no text.",
    )
    input_ids_column: str | None = Field(
        None,
        description="Token ids in place of texts, for causal-lm; they are used as they are, without an end "
        "token.",
    )
    problem_type: ProblemType = Field(
        "single_label_classification", description="For sequence classification."
    )
    label_separator: str = Field("|", description="Separates several labels of a row.")
    label_all_pieces: bool = Field(False, description="Label every piece of a word, not just its first.")
    prefix_space: bool = Field(
        True,
        description="A space before every word but the first, as in a text; false: words as transformers "
        "reads them with is_split_into_words.",
    )
    max_length: int = Field(512, ge=2, description="Tokens of an example; longer ones are cut.")
    packing: bool = Field(False, description="Several examples in one row of max_length tokens (causal-lm).")

    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Of parameters and activations.")
    quantize: str | None = Field(
        None,
        description="Round the base model's projections, which lora and head do not train: int8, int4, "
        "int4:group_size=32, or none for floats; default: as the checkpoint has them, but floats if full "
        "or use_dora trains them.",
    )
    trained: Literal["full", "lora", "head"] = Field("full", description="Which parameters are trained.")
    lora_rank: int = Field(16, ge=1)
    lora_alpha: float | None = Field(None, gt=0, description="Default: twice the rank.")
    use_rslora: bool = Field(
        False, description="Scale adapters by alpha / sqrt(rank), not by alpha / rank (rsLoRA)."
    )
    use_dora: bool = Field(
        False,
        description="Train the lengths of the adapted weights' rows apart from their directions (DoRA).",
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the inputs of adapters.")
    lora_targets: list[str] = Field(
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], description="Projections with adapters."
    )
    remat: Literal["auto", "full", "attention_dots", "attention", "dots", "dots_and_attention", "none"] = (
        Field(
            "auto",
            description="What a layer keeps for the backward pass, from its input (full) to everything "
            "(none); auto: the fastest that fits into memory, and none on CPU.",
        )
    )
    dropout: bool = Field(
        True, description="Apply the dropout rates of the model's config, and lora_dropout."
    )

    num_train_epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="Replaces num_train_epochs.")
    train_batch_size: int = Field(32, ge=1, description="Rows of a step, over all devices and micro-batches.")
    eval_batch_size: int = Field(64, ge=1)
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Micro-batches that a step is divided into."
    )
    max_buckets: int = Field(6, ge=1, description="Row widths, each compiled once.")

    optim: Literal["adamw", "adafactor", "lion"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="Share of the steps.")
    warmup_steps: int | None = Field(None, ge=0, description="Replaces warmup_ratio.")
    weight_decay: float = Field(0.01, ge=0, description="Not applied to norms and biases.")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: dict[str, float] | Literal["balanced"] | None = Field(
        None, description="By label; balanced: rarer classes count more."
    )
    seed: int = Field(0, ge=0, lt=2**32)

    logging_steps: int = Field(1, ge=1)
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "all", "none"]] = Field(
        ["tensorboard"],
        description="What gets the numbers of log.jsonl, too: tensorboard, wandb, mlflow, all that are "
        "installed, or none.",
    )
    eval_steps: int | None = Field(None, ge=1, description="Default: once an epoch.")
    save_strategy: Literal["steps", "epoch", "best", "no"] = Field(
        "steps",
        description="When to write checkpoints; best: after an evaluation better than all before; no: never, "
        "so that a killed run starts over and the last parameters are the model.",
    )
    save_steps: int | None = Field(
        None, ge=1, description="For save_strategy=steps; default: with each evaluation."
    )
    save_minutes: float | None = Field(
        None, gt=0, description="Also write a checkpoint when so many minutes have passed since the last one."
    )
    save_total_limit: int = Field(
        2, ge=1, description="How many checkpoints are kept beside the best, the last ones."
    )
    keep_checkpoints: bool = Field(
        True, description="Keep checkpoints of a finished run; off: only the model stays."
    )
    metric_for_best_model: str | None = Field(None, description="Default: accuracy, f1 or loss, by the task.")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many evaluations without a better one."
    )

    @field_validator("output_dir", mode="before")
    @classmethod
    def _path_or_url(cls, value: Any) -> Any:
        return Path(value) if isinstance(value, str) and not is_url(value) else value

    @field_validator("save_strategy", mode="before")
    @classmethod
    def _no_in_yaml(cls, value: Any) -> Any:
        """Reads a bare `no` of YAML, which is false there, as the word."""
        return "no" if value is False else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_library(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("report_to")
    @classmethod
    def _all_or_none_alone(cls, value: list[str]) -> list[str]:
        if len(value) > 1 and {"all", "none"} & set(value):
            raise UserError(f"report_to={','.join(value)}: give all or none alone")
        return value

    @model_validator(mode="before")
    @classmethod
    def _trains_the_adapter(cls, values: Any) -> Any:
        return {"trained": "lora"} | values if values.get("adapter") is not None else values

    @model_validator(mode="after")
    def _fits_the_device(self) -> "Settings":
        for name, value in self._numbers():
            if isinstance(value, int) and name != "seed" and value >= 2**31:
                raise UserError(f"{name}={value} must be below 2**31")
            if value != 0 and not is_positive(abs(value)):
                raise UserError(f"{name}={value} is outside float32's range of 1.2e-38 to 3.4e38")
        return self

    def _numbers(self) -> Iterator[tuple[str, int | float]]:
        for name in type(self).model_fields:
            value = getattr(self, name)
            for key, each in value.items() if isinstance(value, dict) else [(None, value)]:
                if isinstance(each, int | float) and not isinstance(each, bool):
                    yield name if key is None else f"{name}[{key!r}]", each

    @model_validator(mode="after")
    def _are_texts(self) -> "Settings":
        """Refuses what YAML can express and no file can have as its name, or as text."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, str | Path) and not _is_text(str(each)):
                    raise UserError(f"{name}={str(each)!r} has a character that no text can have")
        return self

    @model_validator(mode="after")
    def _fits(self) -> "Settings":
        if self.train_batch_size % self.gradient_accumulation_steps:
            raise UserError(
                f"train_batch_size={self.train_batch_size} does not divide into "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        if self.packing and self.task != "causal-lm":
            raise UserError(f"packing is for causal-lm, not for {self.task}")
        if self.input_ids_column is not None and (
            self.task != "causal-lm" or self.messages_column is not None
        ):
            raise UserError("input_ids_column is for causal-lm without messages_column")
        if self.trained == "head" and self.task == "causal-lm":
            raise UserError("trained=head is for classification: a language model's head is not new")
        if self.quantize not in (None, FLOATS):
            Quantization.parse(self.quantize)
            if self.trained == "full":
                raise UserError(
                    f"quantize={self.quantize} needs trained=lora or head: integers are not trained"
                )
        if self.adapter is not None and self.trained != "lora":
            raise UserError(f"adapter needs trained=lora, and trained={self.trained}")
        if self.dataset is not None and self.train_file is not None:
            raise UserError("give dataset or train_file, not both")
        if self.save_steps is not None and self.save_strategy != "steps":
            raise UserError(
                f"save_steps={self.save_steps} is for save_strategy=steps, not for "
                f"{self.save_strategy}; leave one of the two out"
            )
        if self.save_minutes is not None and self.save_strategy not in ("steps", "epoch"):
            raise UserError(
                f"save_minutes={self.save_minutes} is for save_strategy=steps or epoch, not for "
                f"{self.save_strategy}; leave one of the two out"
            )
        if self.train_file is None and (self.validation_file or self.test_file):
            raise UserError("validation_file and test_file need a train_file beside them")
        if self.dataset is not None and "train" not in self.dataset_splits:
            raise UserError('dataset_splits must name a split for "train"')
        return self

    @property
    def generated(self) -> bool:
        """Whether the rows are the package's generated ones."""
        return self.train_file is None and self.dataset is None

    @classmethod
    def read(cls, path: Path | None, overrides: dict[str, Any]) -> "Settings":
        """Returns the settings of a YAML file; `overrides`, from the command line, take precedence.

        Raises:
            UserError: the file is not a YAML mapping, or settings are unknown or wrong; it names them all.
        """
        given = {} if path is None else read_settings_file(path)
        try:
            return cls(**{str(name): value for name, value in given.items()} | overrides)
        except ValidationError as error:
            faults = "; ".join(map(describe_fault, error.errors()))
            raise UserError(f"{path or 'settings'}: {faults}") from None


def read_settings_file(path: Path) -> dict[Any, Any]:
    """Returns the mapping of a YAML file.

    Raises:
        UserError: the file is missing, is not valid YAML, or holds something else.
    """
    try:
        given = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # YAML's has several lines
        raise UserError(f"{path} cannot be read: {reason}") from error
    if not isinstance(given, dict):
        raise UserError(f"{path} holds {type(given).__name__}; expected settings, one `name: value` a line")
    return given


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # `<<` is no key
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for key, value in zip(nodes, keys, strict=True):
            if keys.count(value) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {value!r} is there twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str) -> Any:
    """Returns the value of a text in YAML.

    Raises:
        yaml.YAMLError: the text is not valid YAML, has a key twice, or is nested too deeply.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _is_text(value: str) -> bool:
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def describe_fault(error: Any) -> str:
    """Returns a line about one of the errors that pydantic found."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no setting {name}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}={error['input']!r}: {message}" if name else message


FREE = frozenset(
    {
        *("overwrite_output_dir", "output_dir", "logging_steps", "keep_checkpoints", "remat", "report_to"),
        *("save_minutes", "save_total_limit"),
    }
)
"""Settings that may change when a run is resumed: no result depends on them, but for rounding."""

LENGTH = frozenset({"max_steps", "num_train_epochs"})
"""Settings that may change when a run is resumed, as long as it has not done more steps already."""
