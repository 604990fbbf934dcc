"""Finds the prefixes that prompts share, in plain Python; a shared prefix is computed once."""

from collections import deque
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from phi3_jax.generation.sequences import common_prefix_length

MIN_LENGTH = 32
"""The tokens of the shortest shared prefix; fewer are computed again as fast as they are copied."""

CAPACITY = 4
"""The number of prefixes that are remembered, and that are kept computed."""

RECENT = 16
"""The number of earlier prompts that a new one is compared with."""


class PrefixFinder:
    """Sees all prompts and finds the prefix of each that is worth computing for other prompts too.

    Computing a prefix for all prompts costs no more than computing it for one, so one other prompt that
    shares it is enough. Of the prefixes found, the most recently used are remembered.
    """

    def __init__(self, *, min_length: int = MIN_LENGTH, capacity: int = CAPACITY, recent: int = RECENT):
        self._min_length, self._capacity = min_length, capacity
        self._recent: deque[Int[np.ndarray, " n"]] = deque(maxlen=recent)
        self._prefixes: list[Int[np.ndarray, " n"]] = []
        """The prefixes found; the last used is the last."""

    def shared_length(self, ids: Sequence[int]) -> int:
        """Returns the length of a new prompt's shared prefix, which never includes the last token."""
        prompt = np.asarray(ids, np.int64)[:-1]
        own = [prefix for prefix in self._prefixes if common_prefix_length(prefix, prompt) == len(prefix)]
        longest = max(map(len, own), default=0)
        common = max((common_prefix_length(other, prompt) for other in self._recent), default=0)
        self._recent.append(prompt)
        if common >= longest + self._min_length:
            own.append(prompt[:common])
            longest = common
        # All prefixes of this prompt count as used, the short ones for other prompts.
        used = {id(prefix) for prefix in own}
        unused = [prefix for prefix in self._prefixes if id(prefix) not in used]
        self._prefixes = (unused + own)[-self._capacity :]
        return longest
