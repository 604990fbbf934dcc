"""The settings of a study: a YAML file, whose unknown names and wrong values are errors before any work."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.errors import UserError
from phi3_jax.rope_lab.objectives.needles import NEEDLES
from phi3_jax.rope_lab.objectives.options import Kind, ObjectiveOptions
from phi3_jax.rope_lab.retrieval.tasks import Task, make_tasks
from phi3_jax.rope_lab.search.cobyqa import Cobyqa
from phi3_jax.storage.urls import is_url
from phi3_jax.train.settings import Settings, describe_fault, read_settings_file

Trained = Literal["none", "lora", "full"]
"""The parameters that are trained under a rope; none: the base model is measured as it is."""

OF_STUDY = frozenset(
    {
        *("task", "model", "adapter", "rope", "output_dir", "overwrite_output_dir"),
        *("train_file", "validation_file", "test_file", "file_format", "dataset", "dataset_splits"),
        *("text_column", "messages_column", "input_ids_column", "max_length", "packing", "trained"),
        *("num_train_epochs", "seed"),
    }
)
"""Settings of `finetune` that follow from the study."""

OF_CONFIG = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""Fields of a new model's config that follow from the study."""


def _training(values: dict[str, Any]) -> dict[str, Any]:
    """Checks settings of `finetune`, of which a study needs the number of steps."""
    if taken := sorted(values.keys() & OF_STUDY):
        raise UserError(f"{taken[0]} follows from the study; leave it out")
    for name in values.keys() - Settings.model_fields.keys():
        raise UserError(f"there is no setting {name}{_nearest(name, Settings.model_fields)}")
    try:
        settings = Settings(task="causal-lm", **values)
    except ValidationError as error:
        raise UserError("; ".join(map(describe_fault, error.errors()))) from None
    if settings.max_steps is None:
        raise UserError("max_steps must be given: it says how many windows the study writes")
    return values


def _lengths(values: list[int]) -> list[int]:
    if sorted(set(values)) != values or values[0] < 2:
        raise UserError(f"{values} must be lengths from 2 tokens on, in ascending order")
    return values


TrainSettings = Annotated[dict[str, Any], AfterValidator(_training)]
Lengths = Annotated[list[int], Field(min_length=1), AfterValidator(_lengths)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseSettings(_Strict):
    """A model that is trained from scratch, on the training part of the text."""

    config: dict[str, Any]
    """Fields of `Phi3Config`, but for those of `OF_CONFIG`."""
    vocab_size: int = Field(4096, ge=300)
    length: int = Field(512, ge=16)
    retrieval_share: Share = 0.1
    """Share of the tokens that are retrieval tasks with their answers."""
    repetition_share: Share = 0.1
    """Share of the tokens that are repeated random sequences, from which a small model learns to copy."""
    train: TrainSettings

    @model_validator(mode="after")
    def _leaves_text(self) -> "BaseSettings":
        if self.retrieval_share + self.repetition_share >= 1:
            raise UserError(
                "retrieval_share and repetition_share leave no windows of the text; their sum must be below 1"
            )
        return self

    @model_validator(mode="after")
    def _has_a_config(self) -> "BaseSettings":
        for name in OF_CONFIG:
            if name in self.config:
                raise UserError(f"config: {name} follows from the study; leave it out")
        for name in self.config.keys() - Phi3Config.__dataclass_fields__.keys():
            raise UserError(
                f"config: there is no field {name}{_nearest(name, Phi3Config.__dataclass_fields__)}"
            )
        self.phi3_config()
        return self

    def phi3_config(self) -> Phi3Config:
        """Returns the config of the model, whose tokenizer has one special token, of id 0."""
        lengths = {"max_position_embeddings": self.length, "original_max_position_embeddings": self.length}
        tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
        return Phi3Config(**self.config | lengths | tokens, vocab_size=self.vocab_size)


class SearchSettings(_Strict):
    """A search of factors on the validation part of the text, by COBYQA; see `phi3-jax rope search`."""

    objective: Kind = "perplexity"
    samples: int = Field(1, ge=1)
    held_out: int = Field(1, ge=1)
    finalists: int = Field(3, ge=1)
    needles: int = Field(NEEDLES, ge=1)
    iterations: int = Field(40, ge=0)
    knots: int = Field(6, ge=2)
    seed: int = Field(0, ge=0)

    def method(self) -> Cobyqa:
        return Cobyqa(self.iterations, self.knots)

    def asked(self, length: int) -> ObjectiveOptions:
        """Returns the objective at a length."""
        needles = (self.needles, self.seed) if self.objective == "needle" else (0, 0)
        return ObjectiveOptions(
            self.objective, (length,), None, self.samples, *needles, held_out=self.held_out
        )


class RopeSettings(_Strict):
    """A rope under study: the value of `--rope`, or a search of it."""

    rope: str | None = None
    search: SearchSettings | None = None
    mixed: bool | None = None
    """Whether the scaling is the long list, and the short list is plain rope; default: if it is searched."""
    trained: list[Trained] | None = None
    """Default: those of the study."""

    @model_validator(mode="before")
    @classmethod
    def _only_a_rope(cls, values: Any) -> Any:
        return {"rope": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _names_one(self) -> "RopeSettings":
        if (self.rope is None) == (self.search is None):
            raise UserError("give either rope or search")
        if self.rope is not None and parse_rope(self.rope).initial_tokens:
            raise UserError(f"rope {self.rope!r}: no config can express initial_tokens")
        return self

    @property
    def is_mixed(self) -> bool:
        return self.search is not None if self.mixed is None else self.mixed


class FinetuneSettings(_Strict):
    """The training of the base model under each rope, on windows of both lengths (LongRoPE2, section 3.3)."""

    short_share: Share = 0.5
    """Share of the tokens that are in windows of the original length."""
    retrieval_share: Share = 0.0
    """Share of the tokens that are retrieval tasks beyond the original length."""
    validation_windows: int = Field(4, ge=1)
    train: TrainSettings

    @model_validator(mode="after")
    def _leaves_long_windows(self) -> "FinetuneSettings":
        if self.short_share + self.retrieval_share >= 1:
            raise UserError(
                "short_share and retrieval_share leave no long windows; their sum must be below 1"
            )
        return self


class CompareSettings(_Strict):
    """The perplexity of the test part by length; see `phi3-jax rope compare`."""

    lengths: Lengths
    max_tokens: int | None = Field(None, ge=2)
    stride: int | None = Field(None, ge=1)


class RetrieveSettings(_Strict):
    """Retrieval by length and depth; see `phi3-jax rope retrieve`."""

    tasks: list[str] = Field(["passkey"], min_length=1)
    keys: int = 4
    hops: int = 4
    chains: int = 2
    lengths: Lengths
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    trials: int = Field(5, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)
    raw: bool = False
    seed: int = Field(0, ge=0)

    def make_tasks(self) -> list[Task]:
        return make_tasks(self.tasks, keys=self.keys, hops=self.hops, chains=self.chains)

    @model_validator(mode="after")
    def _has_tasks(self) -> "RetrieveSettings":
        self.make_tasks()
        return self


class StudySettings(_Strict):
    """The settings of `phi3-jax rope study`."""

    output_dir: Path | str
    text: Path
    """A text whose last parts are for the search and for the test, and are never trained on."""
    validation_share: float = Field(0.05, gt=0, lt=0.5)
    test_share: float = Field(0.05, gt=0, lt=0.5)
    model: str | None = None
    """The base model; default: SmolLM2-135M-Instruct, unless `base` has one trained."""
    base: BaseSettings | None = None
    length: int = Field(ge=2)
    """The tokens that the ropes stretch the model to."""
    ropes: dict[str, RopeSettings] = Field(min_length=1)
    trained: list[Trained] = Field(["none", "full"], min_length=1)
    finetune: FinetuneSettings | None = None
    compare: CompareSettings
    retrieve: RetrieveSettings | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The dtype of all measurements; that of training is a setting of `train`."""
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _path_or_url(cls, values: Any) -> Any:
        output = values.get("output_dir")
        return (
            values | {"output_dir": Path(output)}
            if isinstance(output, str) and not is_url(output)
            else values
        )

    @model_validator(mode="after")
    def _fits(self) -> "StudySettings":
        if self.model is not None and self.base is not None:
            raise UserError("give either model or base, not both")
        for name in self.ropes:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
                raise UserError(f"ropes: {name!r} names a directory; use letters, digits, -, _ and .")
        if self.finetune is None and any(
            each != "none" for name in self.ropes for each in self.trained_of(name)
        ):
            raise UserError("trained asks for fine-tuning; give finetune, or trained: [none]")
        return self

    def training_tasks(self) -> list[Task]:
        """Returns the retrieval tasks to train on: those that are measured."""
        return make_tasks(["passkey"]) if self.retrieve is None else self.retrieve.make_tasks()

    def trained_of(self, name: str) -> list[Trained]:
        """Returns how a rope is trained."""
        own = self.ropes[name].trained
        return self.trained if own is None else own

    @classmethod
    def read(cls, path: Path) -> "StudySettings":
        """Returns the settings of a YAML file.

        Raises:
            UserError: the file is not a YAML mapping, or settings are unknown or wrong; it names them all.
        """
        try:
            return cls(**{str(name): value for name, value in read_settings_file(path).items()})
        except ValidationError as error:
            raise UserError(f"{path}: " + "; ".join(map(_fault, error.errors()))) from None


def _fault(error: Any) -> str:
    """Returns a line about an error, with the nearest name of an unknown one."""
    if error["type"] != "extra_forbidden":
        return f"{'.'.join(map(str, error['loc']))}: {error['msg'].removeprefix('Value error, ')}"
    *place, name = map(str, error["loc"])
    section: type[_Strict] = SECTIONS.get(place[0], StudySettings) if place else StudySettings
    if place and place[-1] == "search":
        section = SearchSettings
    return f"there is no setting {'.'.join([*place, name])}{_nearest(name, section.model_fields)}"


SECTIONS: dict[str, type[_Strict]] = {
    "base": BaseSettings,
    "ropes": RopeSettings,
    "finetune": FinetuneSettings,
    "compare": CompareSettings,
    "retrieve": RetrieveSettings,
}


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
