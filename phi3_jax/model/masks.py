"""Which query may see which key."""

from jaxtyping import Array, Bool, Int


def causal_mask(
    query_slots: Int[Array, "B T"],
    key_slots: Int[Array, "#B S"],
    key_mask: Bool[Array, "B S"],
    sliding_window: int | None,
) -> Bool[Array, "B 1 T S"]:
    """True where a query sees a key: a token, at its own slot or before, within the window.

    Slots count padding, so left padding shifts queries and keys alike. A window of W lets a query see W keys,
    itself included.
    """
    query = query_slots[:, :, None]  # [B, T, 1]
    key = key_slots[:, None, :]  # [B, 1, S]
    visible = key_mask[:, None, :] & (key <= query)
    if sliding_window is not None:
        visible &= key > query - sliding_window
    return visible[:, None]
