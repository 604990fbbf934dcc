"""Chooses the number and length of slots from the memory and the first requests, in plain Python."""

from collections.abc import Sequence

from phi3_jax.batch.scheduler import PoolSize
from phi3_jax.errors import UserError
from phi3_jax.sizes import ceil_div, power_of_two, round_up

MIN_LENGTH = 256
"""The length of the shortest slots that are worth a pool."""

LENGTH_MULTIPLE = 128
"""Slot lengths are multiples of this where possible, which suits kernels."""


def choose_pools(
    needs: Sequence[tuple[int, int]],
    *,
    slots: int,
    length: int,
    capacity: int,
    multiple: int = 1,
    complete: bool = False,
) -> list[PoolSize]:
    """Returns pools of slots for requests like the first ones.

    A decode step reads the whole length of every slot, so slots that are much too long cost time as well as
    memory. It also reads all weights, so a step over few slots is inefficient. Lengths double from pool to
    pool. Each pool gets slots in proportion to the new tokens of its requests, and at least one. If there are
    no other requests and slots for all, each request gets one, up to a power of two, so that few slots are
    idle and few sizes are compiled.

    Args:
        needs: (slot length, new tokens) of the first requests.
        slots: the most slots in all pools, but `multiple` in each pool at least.
        length: the length of the longest slots.
        capacity: the tokens that memory can hold in all slots.
        multiple: the number of slots in a pool is a multiple of this.
        complete: `needs` has all requests.

    Raises:
        UserError: memory does not hold `multiple` slots of that length.
    """
    slots, capacity = max(1, slots // multiple), capacity // multiple
    if length > capacity:
        raise UserError(
            f"memory holds the keys and values of {capacity * multiple} tokens, and the longest requests may "
            f"need {length * multiple}; choose a smaller max_length"
        )
    lengths = [length]
    while needs and lengths[0] >= 2 * MIN_LENGTH and len(lengths) < slots:
        lengths.insert(0, round_up(ceil_div(lengths[0], 2), LENGTH_MULTIPLE))
    tokens, requests = [0] * len(lengths), [0] * len(lengths)
    for need, new in needs:
        index = next((index for index, each in enumerate(lengths) if need <= each), -1)
        tokens[index] += new
        requests[index] += 1
    # Drop lengths that hardly any request needs; those requests use longer slots.
    total = max(sum(tokens), 1)
    for index in range(len(lengths) - 1):
        if tokens[index] * slots < total:
            for amounts in (tokens, requests):
                amounts[index + 1] += amounts[index]
                amounts[index] = 0
    shares = {each: share for each, share in zip(lengths, tokens, strict=True) if share}
    shares.setdefault(length, 0)
    counts = {
        each: max(1, round(slots * share / total)) if needs else slots for each, share in shares.items()
    }
    if complete:
        numbers = dict(zip(lengths, requests, strict=True))
        all_at_once = {each: power_of_two(max(1, ceil_div(numbers[each], multiple))) for each in counts}
        if sum(all_at_once.values()) <= slots:
            counts = all_at_once
    while sum(counts.values()) > slots or sum(each * count for each, count in counts.items()) > capacity:
        # The pool that takes the most memory loses a slot.
        reducible = [each for each in counts if counts[each] > 1]
        if not reducible:
            return [PoolSize(multiple * max(1, min(slots, capacity // length)), length)]
        counts[max(reducible, key=lambda each: each * counts[each])] -= 1
    return [PoolSize(multiple * count, each) for each, count in sorted(counts.items())]


def holds(pools: Sequence[PoolSize], wanted: Sequence[PoolSize]) -> bool:
    """Whether `pools` have a slot that is long enough for each slot of `wanted`, all at the same time."""

    def slots(of: Sequence[PoolSize], least: int) -> int:
        return sum(pool.slots for pool in of if pool.length >= least)

    return all(slots(pools, each.length) >= slots(wanted, each.length) for each in wanted)
