"""What an output directory tells of a run that was started in it, before this one's recipe is made."""

from contextlib import suppress

from phi3_jax.runs.json_values import RUN
from phi3_jax.runs.text import parse_json
from phi3_jax.storage.targets import Target, read_bytes, target_in


def started_step_ranges(directory: Target) -> int | None:
    """Returns the ranges of widths of each step (see `BatchPlan`); None if no run was started there.

    They follow from the devices on which a run is started, and stay when it is resumed on others, so that
    each step has the same examples.
    """
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # `RunDirectory` says what is wrong
        values = parse_json(read_bytes(target_in(directory, RUN)), RUN)
        if isinstance(values, dict) and isinstance(ranges := values.get("step_ranges"), int) and ranges > 0:
            return ranges
    return None
