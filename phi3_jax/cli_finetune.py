"""`phi3-jax finetune`: a YAML file and, before it, options of the same names."""

import inspect
import signal
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

from phi3_jax import cli_options as options
from phi3_jax.cli_extra import train_extra
from phi3_jax.cli_processes import prepare, tell

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from phi3_jax.training.settings import Settings


def _finetune(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file of settings; default: those below.", dir_okay=False)
    ] = None,
    mesh: options.Mesh = None,
    distributed: options.Distributed = False,
    cache_dir: options.CacheDir = None,
    **given: Any,
) -> None:
    """Train a classifier, a tagger or a language model; go on where the same command was cut off.

    Without a file of rows it learns generated commands, as a demonstration.
    """
    with train_extra("fine-tuning"):
        from phi3_jax.training.finetune import InterruptedRunError, finetune
    from phi3_jax.cli import keep_compiled_programs

    settings = read_settings(config, given)
    where = prepare(mesh, distributed, preemption=True)
    keep_compiled_programs(cache_dir)
    try:
        results = finetune(settings, mesh=where, cache_dir=cache_dir)
    except InterruptedRunError as error:
        tell(f"phi3-jax: {error}")
        raise typer.Exit(128 + signal.Signals(error.signal)) from None
    for split, metrics in results.items():
        print(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(
        f"{settings.output_dir}: model, tokenizer, report.md, metrics.json, curves.png, log.jsonl, "
        "tensorboard"
    )


def read_settings(config: Path | None, given: dict[str, Any]) -> "Settings":
    """The settings of a YAML file, with what was given as options before them.

    Raises:
        ValueError: the libraries for training are absent, or as `Settings.read`.
    """
    with train_extra("fine-tuning"):
        from phi3_jax.training.settings import Settings
    return Settings.read(config, {name: _parsed(value) for name, value in given.items() if value is not None})


def _parsed(value: Any) -> Any:
    """A list or mapping that was written as YAML; anything else as it is."""
    import yaml

    if isinstance(value, str) and value[:1] in ("[", "{"):
        return yaml.safe_load(value)
    return value


def _option(name: str, field: "FieldInfo") -> inspect.Parameter:
    """A field of the settings as an option that is None unless given."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) is UnionType else (field.annotation,)
    plain = [kind for kind in kinds if kind in (bool, int, float, Path)]
    kind = plain[0] if plain else str
    default = field.get_default(call_default_factory=True)
    about = field.description or ""
    if default is not None and "efault" not in about:
        shown = ", ".join(default) if isinstance(default, list) else default
        about = f"{about} [default: {shown}]".strip()
    annotation = Annotated[kind | None, typer.Option(help=about, rich_help_panel="Settings")]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_settings(name: str, command: Callable[..., None]) -> Any:
    """The command, its `**given` replaced by an option for each setting; by none where pydantic is absent."""
    try:
        from phi3_jax.training.settings import Settings
    except ImportError:
        fields: dict[str, Any] = {}
    else:
        fields = Settings.model_fields
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "given"]
    parameters = [*own, *(_option(name, field) for name, field in fields.items())]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__name__ = name
    return command


finetune = with_settings("finetune", _finetune)
