"""Options for the settings of a fine-tuning run, one for each field."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import typer
import yaml
from pydantic.fields import FieldInfo

from phi3_jax.train.settings import Settings


def read_settings(config: Path | None, given: dict[str, Any]) -> Settings:
    """The settings of a YAML file, with what was given as options before them.

    Raises:
        UserError: as `Settings.read`.
    """
    return Settings.read(config, {name: _parsed(value) for name, value in given.items() if value is not None})


def _parsed(value: Any) -> Any:
    """A list or mapping that was written as YAML; anything else as it is."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        return yaml.safe_load(value)
    return value


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """A field of the settings as an option that is None unless given."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) is UnionType else (field.annotation,)
    plain = [kind for kind in kinds if kind in (bool, int, float, Path)]
    kind = plain[0] if plain else str
    default = field.get_default(call_default_factory=True)
    about = field.description or ""
    if default is not None and "efault" not in about:
        shown = ", ".join(default) if isinstance(default, list) else default
        about = f"{about} [default: {shown}]".strip()
    annotation = Annotated[kind | None, typer.Option(help=about, rich_help_panel=Settings)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_settings(name: str, command: Callable[..., None]) -> Any:
    """The command, its `**given` replaced by an option for each setting."""
    fields = Settings.model_fields
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "given"]
    parameters = [*own, *(_option(name, field) for name, field in fields.items())]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__name__ = name
    return command
