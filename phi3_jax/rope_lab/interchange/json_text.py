"""JSON text of ropes, whose lists of factors stay in one line."""

import json
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, indent: str = "") -> str:
    """Returns JSON with a line for each key; lists take one line, whatever their length."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value)
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(key)}: {json_text(each, inner)}" for key, each in value.items()]
    return "\n".join(["{", ",\n".join(lines), indent + "}"])
