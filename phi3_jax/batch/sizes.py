"""How many slots there are and how long: from memory and from the first requests, in plain Python."""

from collections.abc import Sequence

from phi3_jax.batch.scheduler import PoolSize
from phi3_jax.errors import UserError

SHORTEST = 256
"""Columns of the shortest slots that are worth a pool."""


def choose_pools(
    needs: Sequence[tuple[int, int]], *, slots: int, columns: int, room: int, multiple: int = 1
) -> list[PoolSize]:
    """Pools for requests like these.

    A step reads all columns of a pool, so slots much longer than what is in them cost time as well as memory;
    and it reads all weights, so that few slots waste them. Lengths double from pool to pool, up to the
    longest; each has its share of the slots by the tokens that its requests may make, and at least one.

    Args:
        needs: (columns, new tokens) of the first requests, and of all where they are few.
        slots: at most, of all pools together, but `multiple` in each pool.
        columns: of the longest slots.
        room: columns that memory has for all slots together.
        multiple: by which the slots of a pool must divide.

    Raises:
        ValueError: not even `multiple` slots of that length fit.
    """
    slots, room = max(1, slots // multiple), room // multiple
    if columns > room:
        raise UserError(
            f"memory holds the keys and values of {room * multiple} tokens, and the longest requests may "
            f"need {columns * multiple}; choose a smaller max_length"
        )
    lengths = [columns]
    while lengths[0] >= 2 * SHORTEST and len(lengths) < slots:
        lengths.insert(0, -(-lengths[0] // 2 // 128) * 128)
    if not needs:
        lengths = lengths[-1:]
    tokens = [0] * len(lengths)
    for need, new in needs:
        tokens[next((index for index, length in enumerate(lengths) if need <= length), -1)] += new
    # A length that next to nobody needs is left out: those requests take longer slots.
    total = max(sum(tokens), 1)
    for index in range(len(lengths) - 1):
        if tokens[index] * slots < total:
            tokens[index + 1] += tokens[index]
            tokens[index] = 0
    shares = {length: share for length, share in zip(lengths, tokens, strict=True) if share}
    shares.setdefault(columns, 0)
    counts = {
        length: max(1, round(slots * share / total)) if needs else slots for length, share in shares.items()
    }
    while sum(counts.values()) > slots or sum(length * count for length, count in counts.items()) > room:
        # The one with the most columns in all gives a slot away.
        length = max(
            (each for each in counts if counts[each] > 1), key=lambda each: each * counts[each], default=0
        )
        if not length:
            return [PoolSize(multiple * max(1, min(slots, room // columns)), columns)]
        counts[length] -= 1
    return [PoolSize(multiple * count, length) for length, count in sorted(counts.items())]
