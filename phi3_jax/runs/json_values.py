"""The name of a run's file, and values that JSON cannot express."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

RUN = "run.json"
"""The file beside a fine-tuned model: settings, data, and results once the run is finished."""

ADAPTER = "adapter"
"""The folder of adapters beside the merged model of a run."""


def json_value(value: Any) -> Any:
    """Returns the value in JSON's types.

    NaN and infinities become text that `float` can read, and objects of other types their `str`.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): json_value(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(one) for one in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
