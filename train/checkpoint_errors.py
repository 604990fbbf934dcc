"""What is wrong when Orbax cannot read or write: its errors are of many types, and long."""

import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

_OF_STORES = re.compile(
    r"payload|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED|"
    r"Forbidden|\b50[0-4]\b"
)
"""What texts of errors have in them if the store, and not the checkpoint, is at fault."""


def is_of_store(error: Exception) -> bool:
    """Returns whether a store failed, so that the error says nothing about the checkpoint."""
    return _OF_STORES.search(" ".join(map(str, _chain(error)))) is not None


def reason_of(error: Exception) -> str:
    """Returns why a checkpoint could not be written to a disk, in a few words."""
    causes = list(_chain(error))
    texts = [str(each) for each in causes]
    full = any("No space left" in text or "RESOURCE_EXHAUSTED" in text or "quota" in text for text in texts)
    reason = texts[0].strip().splitlines()[0][:200]
    if system := re.search(r": ([^:]+) \[os_error_code=", " ".join(texts)):  # at the end of a long text
        reason = system[1]
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror:
            reason = cause.strerror
    if full:
        reason = "there is no space left on the disk"
    return reason


@cache
def silence_writes_after_a_failed_one() -> None:
    """Drops the tracebacks of writes that end after another one has failed, whose error is raised."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is not RuntimeError or str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
