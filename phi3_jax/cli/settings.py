"""Turns the settings of a fine-tuning run into options, one for each field."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic.fields import FieldInfo

from phi3_jax.cli.options import output_directory
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
    """Parses a list or mapping, in YAML or as in a,b and a=1,b=2; returns any other value as it is."""
    if not isinstance(value, str):
        return value
    kinds = [get_origin(kind) or kind for kind in _kinds(Settings.model_fields[name])]
    try:
        if value[:1] in ("[", "{"):
            return parse_yaml(value)
        parts = [part.strip() for part in value.split(",")]
        if dict in kinds and all("=" in part for part in parts):
            pairs = [part.split("=", 1) for part in parts]
            if len({key for key, _ in pairs}) < len(pairs):
                raise UserError(f"{name}={value!r} has a key twice")
            return {key: parse_yaml(text) for key, text in pairs}
    except yaml.YAMLError as error:
        raise UserError(f"{name}={value!r} is not valid YAML: {' '.join(str(error).split())}") from error
    return parts if list in kinds and (len(parts) > 1 or str not in kinds) else value


def _kinds(field: FieldInfo) -> list[Any]:
    """Returns the types of a setting's values, without None."""
    union = get_origin(field.annotation) in (Union, UnionType)
    kinds = get_args(field.annotation) if union else (field.annotation,)
    return [kind for kind in kinds if kind is not type(None)]


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """Returns a field of the settings as an option whose default is None."""
    kinds = _kinds(field)
    plain = [kind for kind in kinds if kind in (bool, int, float, Path)]
    kind = plain[0] if plain else str
    how: dict[str, Any] = {"parser": output_directory, "metavar": "DIRECTORY"} if kind is Path else {}
    annotation = Annotated[kind | None, typer.Option(help=_help(field), rich_help_panel="Settings", **how)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: FieldInfo) -> str:
    """Returns the description of a setting with its choices, the form of its value, and its default."""
    kinds, sentences = _kinds(field), [field.description] if field.description else []
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    forms = {list: "a,b,c", dict: "a=1,b=2"}
    shown = [f"as in {forms[origin]}" for kind in kinds if (origin := get_origin(kind)) in forms]
    if choices or shown:
        words = " or ".join([*([", ".join(choices)] if choices else []), *shown])
        sentences.append(f"{words[0].upper() if not choices else words[0]}{words[1:]}.")
    default = field.get_default(call_default_factory=True)
    if default is not None and "efault" not in " ".join(sentences):
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif isinstance(default, list | dict):
            items = (
                [f"{key}={value}" for key, value in default.items()] if isinstance(default, dict) else default
            )
            default = ",".join(items)
        sentences.append(f"Default: {default}.")
    return " ".join(sentences)


def with_settings(name: str, command: Callable[..., None]) -> Any:
    """Replaces the command's `**given` by an option for each setting."""
    fields = Settings.model_fields
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "given"]
    parameters = [*own, *(_option(name, field) for name, field in fields.items())]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__name__ = name
    return command
