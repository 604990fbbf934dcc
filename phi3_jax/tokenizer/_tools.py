"""Describes Python functions for chat templates, as JSON schemas of their arguments."""

import enum
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from phi3_jax.errors import UserError

_BASIC: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SCALARS = (int, float, str, bool, type(None))
_SECTIONS = ("Args:", "Returns:", "Raises:")
_ENTRY = re.compile(r"(\s*)(\w+)(?: *\([^)]*\))?:(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schemas(tools: Any) -> list[dict[str, Any]] | None:
    """Returns the tools with a schema in place of each function.

    Raises:
        UserError: a tool is neither a dict nor a function, or a function cannot be described.
    """
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise UserError(f"tools must be a list of schemas (dict) or functions, got {type(tools).__name__}")
    return [_schema(number, tool) for number, tool in enumerate(tools)]


def _schema(number: int, tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        return dict(tool)
    if not (inspect.isfunction(tool) or inspect.ismethod(tool)):
        raise UserError(f"tools[{number}] must be a schema (dict) or a function, got {type(tool).__name__}")
    return function_schema(tool)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the schema of a function: its type hints, and the texts of its docstring in Google's style.

    It is transformers' `get_json_schema`. A text that ends in `(choices: ["a", "b"])` lists all values.

    Raises:
        UserError: a hint or a text is missing, or a hint has no JSON type.
    """
    name = getattr(function, "__name__", "operation")
    text = (inspect.getdoc(function) or "").strip()
    if not text:
        raise UserError(
            f"the tool {name} has no docstring; write what it does, and each argument under Args:"
        )
    sections = _sections(text)
    texts = _entries(sections.get("Args:", []))
    hints = get_type_hints(function)
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters.values()), None)
    if first is not None and first.name in ("self", "cls") and first.annotation is inspect.Parameter.empty:
        del parameters[first.name]
    properties: dict[str, Any] = {}
    for parameter in parameters.values():
        if parameter.annotation is inspect.Parameter.empty:
            raise UserError(f"the tool {name}: its argument {parameter.name} has no type hint")
        if parameter.name not in texts:
            raise UserError(f"the tool {name}: its docstring does not describe {parameter.name} under Args:")
        schema = _type_schema(hints[parameter.name], f"the tool {name}: {parameter.name}")
        description = texts[parameter.name]
        if choices := _CHOICES.search(description):
            schema["enum"] = _choices(choices[1], f"the tool {name}: {parameter.name}")
            description = description[: choices.start()].strip()
        properties[parameter.name] = schema | {"description": description}
    arguments: dict[str, Any] = {"type": "object", "properties": properties}
    empty = inspect.Parameter.empty
    if required := [parameter.name for parameter in parameters.values() if parameter.default is empty]:
        arguments["required"] = required
    tool = {"name": name, "description": sections[""], "parameters": arguments}
    if (result := _result_schema(hints, sections)) is not None:
        tool["return"] = result
    return {"type": "function", "function": tool}


def _result_schema(hints: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the schema of what the function returns, which most templates ignore, or None."""
    if "return" not in hints:
        return None
    try:
        schema = _type_schema(hints["return"], "")
    except UserError:
        return None
    if "Returns:" in sections:
        schema["description"] = "\n".join(sections["Returns:"]).strip()
    return schema


def _sections(text: str) -> dict[str, Any]:
    """Returns the docstring's lines by section, and its first part as a text under ""."""
    sections: dict[str, Any] = {"": []}
    lines = sections[""]
    for line in text.split("\n"):
        if line.strip() in _SECTIONS:
            lines = sections.setdefault(line.strip(), [])
        else:
            lines.append(line)
    return sections | {"": "\n".join(sections[""]).strip()}


def _entries(lines: list[str]) -> dict[str, str]:
    """Returns the text of each argument; deeper lines continue the one above."""
    entries: dict[str, str] = {}
    name, depth = "", None
    for line in filter(str.strip, lines):
        entry = _ENTRY.fullmatch(line)
        if entry and (depth is None or len(entry[1]) <= depth):
            depth, name = len(entry[1]), entry[2]
            entries[name] = entry[3].strip()
        elif name:
            entries[name] = f"{entries[name]} {line.strip()}".strip()
    return entries


def _choices(text: str, where: str) -> list[Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: its choices {text!r:.80} are not a list in JSON: {error}") from error
    return [value.strip() if isinstance(value, str) else value for value in values]


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    """Returns the JSON schema of a type hint."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is None and isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _values_schema([member.value for member in hint], where)
    if origin is None:
        for kind, schema in _BASIC.items():
            if hint is kind:
                return dict(schema)
    elif origin is Literal:
        return _values_schema(list(inner), where)
    elif origin in (Union, types.UnionType):
        return _union_schema(inner, where)
    elif origin is list:
        return {"type": "array", "items": _type_schema(inner[0], where)}
    elif origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(inner[1], where)}
    elif origin is tuple and len(inner) > 1 and ... not in inner:
        return {"type": "array", "prefixItems": [_type_schema(each, where) for each in inner]}
    raise UserError(
        f"{where} has the type {hint!r}, which has no JSON schema; use int, float, str, bool, an Enum, "
        "Literal, list, dict, a tuple of several types or a union of them, or pass a schema (dict)"
    )


def _union_schema(inner: tuple[Any, ...], where: str) -> dict[str, Any]:
    schemas = [_type_schema(each, where) for each in inner if each is not type(None)]
    if len(schemas) == 1:
        schema = schemas[0]
    elif all(set(each) == {"type"} and isinstance(each["type"], str) for each in schemas):
        names = sorted({each["type"] for each in schemas})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": schemas}
    return schema | ({"nullable": True} if type(None) in inner else {})


def _values_schema(values: list[Any], where: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise UserError(
            f"{where} has the values {values!r:.80}; expected texts, numbers, True, False or None"
        )
    kinds = list(dict.fromkeys(_BASIC[type(value)]["type"] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}
