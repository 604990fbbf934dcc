"""Turns the settings of a fine-tuning run into options, one for each field."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import typer
import yaml
from pydantic.fields import FieldInfo

from phi3_jax.cli.options import directory
from phi3_jax.errors import UserError
from phi3_jax.train.settings import Settings, parse_yaml


def read_settings(config: Path | None, given: dict[str, Any]) -> Settings:
    """Reads the settings of a YAML file; the options in `given` override them.

    Raises:
        UserError: as in `Settings.read`.
    """
    return Settings.read(
        config, {name: _parse(name, value) for name, value in given.items() if value is not None}
    )


def _parse(name: str, value: Any) -> Any:
    """Parses a list or mapping in YAML; returns any other value as it is."""
    if not (isinstance(value, str) and value[:1] in ("[", "{")):
        return value
    try:
        return parse_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"{name}={value!r} is not valid YAML: {' '.join(str(error).split())}") from error


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """Returns a field of the settings as an option whose default is None."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) is UnionType else (field.annotation,)
    plain = [kind for kind in kinds if kind in (bool, int, float, Path)]
    kind = plain[0] if plain else str
    default = field.get_default(call_default_factory=True)
    text = field.description or ""
    if default is not None and "efault" not in text:
        shown = ", ".join(default) if isinstance(default, list) else default
        text = f"{text} [default: {shown}]".strip()
    how: dict[str, Any] = {"parser": directory, "metavar": "DIRECTORY"} if kind is Path else {}
    annotation = Annotated[kind | None, typer.Option(help=text, rich_help_panel="Settings", **how)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_settings(name: str, command: Callable[..., None]) -> Any:
    """Replaces the command's `**given` by an option for each setting."""
    fields = Settings.model_fields
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "given"]
    parameters = [*own, *(_option(name, field) for name, field in fields.items())]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__name__ = name
    return command
