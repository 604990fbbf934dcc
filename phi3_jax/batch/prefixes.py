"""Which beginnings prompts have in common, in plain Python: such a beginning is computed once."""

from collections import deque
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

LEAST = 32
"""Tokens that must be shared; fewer are computed again as fast as they are copied."""

KEPT = 4
"""Beginnings that are remembered, and as many that are computed; those longest unused go."""

RECENT = 16
"""Prompts that a new one is compared with."""


class Prefixes:
    """Watches prompts go by, and says of each how much of it is worth to be computed for others too.

    Computing a beginning for all takes no more than computing it for the prompt alone, so one other prompt
    that shares it is enough.
    """

    def __init__(self, *, least: int = LEAST, kept: int = KEPT, recent: int = RECENT):
        self._least, self._kept = least, kept
        self._recent: deque[Int[np.ndarray, " n"]] = deque(maxlen=recent)
        self._known: list[Int[np.ndarray, " n"]] = []
        """Those that were shared, the last used one last."""

    def shared(self, ids: Sequence[int]) -> int:
        """How many of a new prompt's first tokens are shared; never the last token, which makes the next."""
        new = np.asarray(ids, np.int64)[:-1]
        own = [known for known in self._known if len(known) <= len(new) and _common(known, new) == len(known)]
        best = max(map(len, own), default=0)
        common = max((_common(other, new) for other in self._recent), default=0)
        self._recent.append(new)
        if common >= best + self._least:
            own.append(new[:common])
            best = common
        # All that are beginnings of this prompt stay young, the short ones for the sake of other prompts.
        used = {id(known) for known in own}
        self._known = ([known for known in self._known if id(known) not in used] + own)[-self._kept :]
        return best


def _common(one: Int[np.ndarray, " n"], other: Int[np.ndarray, " m"]) -> int:
    """Tokens that both begin with."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if different.size else length
