"""Results of an inspection: arrays, tables for people and programs, and figures."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from phi3_jax.config.rope_argument import trained_length
from phi3_jax.evaluation.run_options import STATE
from phi3_jax.evaluation.scorer import frequencies_for
from phi3_jax.rope_lab.inspection.angles import Angles, critical_pair, text_angles, trained_turns
from phi3_jax.rope_lab.inspection.attention_profiles import distance_bins
from phi3_jax.rope_lab.inspection.figures import Cell, entropies, profiles, unseen_angles
from phi3_jax.rope_lab.inspection.run import Inspection
from phi3_jax.rope_lab.result_files import write_arrays, write_csv, write_figure
from phi3_jax.runs.tables import markdown_table
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, target_in

ATTENTION, ANGLES = "attention.npz", "angles.npz"
HEADS, PAIRS, MARKDOWN = "attention.csv", "angles.csv", "report.md"
ENTROPY, PROFILE, UNSEEN = "entropy.png", "profile.png", "angles.png"
SUMMARY = ("rope", "length", "entropy", "sink", "distance", "pairs with unseen angles", "unseen")

FILES = (ATTENTION, ANGLES, HEADS, PAIRS, MARKDOWN, ENTROPY, PROFILE, UNSEEN, STATE)


def write_inspection(output: Target, inspection: Inspection) -> None:
    """Writes all `FILES` but the state, each as a whole.

    R ropes, M lengths, L layers, N query heads, C bins, P pairs. `attention.npz` has the names `ropes` [R],
    `lengths` [M], the edges `bins` [C + 1], `entropy`, `sink` and `distance` [R, M, L, N], and `mass`
    [R, M, L, N, C], where the bins that a length lacks are 0. `angles.npz` has `ropes`, `lengths`, the
    numbers `trained_length` and `critical_pair`, `trained_turns` [P], and `inv_freq`, `turns` and `unseen`
    [R, M, P]; see `Angles`.
    """
    angles = _angles(inspection)
    write_arrays(target_in(output, ATTENTION), _attention_arrays(inspection))
    write_arrays(target_in(output, ANGLES), _angle_arrays(inspection, angles))
    write_csv(target_in(output, HEADS), _heads(inspection))
    write_csv(target_in(output, PAIRS), _pairs(inspection, angles))
    names, lengths = [rope.name for rope in inspection.ropes], inspection.lengths
    by_cell = inspection.profiles.items()
    figure = entropies(names, lengths, {cell: profile.entropy for cell, profile in by_cell})
    write_figure(target_in(output, ENTROPY), figure)
    shares = {cell: profile.mass.mean(axis=(0, 1)) for cell, profile in by_cell}
    write_figure(target_in(output, PROFILE), profiles(names, lengths, distance_bins(lengths[-1]), shares))
    unseen = {cell: each.unseen for cell, each in angles.items()}
    figure = unseen_angles(names, lengths, critical_pair(inspection.trained), unseen)
    write_figure(target_in(output, UNSEEN), figure)
    write_text(target_in(output, MARKDOWN), "\n".join(_lines(inspection, angles)) + "\n")


def table(inspection: Inspection) -> Table:
    """Returns the means over layers and heads, and the pairs with unseen angles, for a terminal."""
    shown = Table(box=SIMPLE, title="Attention, mean of layers and heads", title_justify="left")
    for number, name in enumerate(SUMMARY):
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in _summary(inspection, _angles(inspection)):
        shown.add_row(row[0].replace("[", r"\["), *row[1:])
    return shown


def _attention_arrays(inspection: Inspection) -> dict[str, np.ndarray]:
    edges, profiles = distance_bins(inspection.lengths[-1]), inspection.profiles
    bins = len(edges) - 1
    masses = {
        cell: np.pad(each.mass, ((0, 0), (0, 0), (0, bins - each.mass.shape[-1])))
        for cell, each in profiles.items()
    }
    return {
        **_axes(inspection),
        "bins": edges,
        "entropy": _grid(inspection, {cell: each.entropy for cell, each in profiles.items()}),
        "sink": _grid(inspection, {cell: each.sink for cell, each in profiles.items()}),
        "distance": _grid(inspection, {cell: each.distance for cell, each in profiles.items()}),
        "mass": _grid(inspection, masses),
    }


def _angle_arrays(inspection: Inspection, angles: Mapping[Cell, Angles]) -> dict[str, np.ndarray]:
    return {
        **_axes(inspection),
        "trained_length": np.array(trained_length(inspection.trained)),
        "critical_pair": np.array(critical_pair(inspection.trained)),
        "trained_turns": trained_turns(inspection.trained),
        "inv_freq": _grid(inspection, _frequencies(inspection)),
        "turns": _grid(inspection, {cell: each.turns for cell, each in angles.items()}),
        "unseen": _grid(inspection, {cell: each.unseen for cell, each in angles.items()}),
    }


def _axes(inspection: Inspection) -> dict[str, np.ndarray]:
    names = [rope.name for rope in inspection.ropes]
    return {"ropes": np.array(names), "lengths": np.array(inspection.lengths)}


def _grid(inspection: Inspection, values: Mapping[Cell, np.ndarray]) -> np.ndarray:
    """Returns values by rope and length, [R, M, ...]."""
    by_rope = [[values[rope.name, length] for length in inspection.lengths] for rope in inspection.ropes]
    return np.array(by_rope)


def _frequencies(inspection: Inspection) -> dict[Cell, np.ndarray]:
    return {
        (rope.name, length): frequencies_for(rope.config, length)[0]
        for rope, length in product(inspection.ropes, inspection.lengths)
    }


def _angles(inspection: Inspection) -> dict[Cell, Angles]:
    return {
        cell: text_angles(inspection.trained, inv_freq, cell[1])
        for cell, inv_freq in _frequencies(inspection).items()
    }


def _heads(inspection: Inspection) -> Iterator[Sequence[object]]:
    yield "rope", "length", "layer", "head", "entropy", "sink", "distance"
    for (rope, length), profile in inspection.profiles.items():
        for layer, head in np.ndindex(profile.entropy.shape):
            at = layer, head
            yield rope, length, layer, head, profile.entropy[at], profile.sink[at], profile.distance[at]


def _pairs(inspection: Inspection, angles: Mapping[Cell, Angles]) -> Iterator[Sequence[object]]:
    yield "rope", "length", "pair", "wavelength", "trained_turns", "turns", "unseen"
    trained, frequencies = trained_turns(inspection.trained), _frequencies(inspection)
    for (rope, length), each in angles.items():
        waves = 2 * np.pi / frequencies[rope, length].astype(np.float64)
        for pair, values in enumerate(zip(waves, trained, each.turns, each.unseen, strict=True)):
            yield rope, length, pair, *values


def _summary(inspection: Inspection, angles: Mapping[Cell, Angles]) -> Iterator[tuple[str, ...]]:
    for cell, profile in inspection.profiles.items():
        unseen = angles[cell].unseen
        yield (
            cell[0],
            f"{cell[1]:,}",
            f"{profile.entropy.mean():.3f}",
            f"{profile.sink.mean():.1%}",
            f"{profile.distance.mean():,.0f}",
            f"{np.count_nonzero(unseen)} of {len(unseen)}",
            f"{unseen.mean():.1%}",
        )


def _lines(inspection: Inspection, angles: Mapping[Cell, Angles]) -> Iterator[str]:
    options, trained = inspection.options, trained_length(inspection.trained)
    pairs, critical = len(trained_turns(inspection.trained)), critical_pair(inspection.trained)
    skipped = options["skip_tokens"]
    yield "# Attention and angles\n"
    yield (
        f"{options['model']}, trained on {trained:,} tokens, in {options['dtype']}; {options['text']}"
        + (f" after its first {skipped:,} tokens" if skipped else "")
        + f". Each length has {options['queries']} queries, the last token of as many equal parts of the "
        "second half of the text.\n"
    )
    yield from markdown_table(SUMMARY, list(_summary(inspection, angles)))
    yield (
        "\nEntropies (in nats), shares and distances are means of queries, layers and heads. The sink is the "
        f"first {options['sink_tokens']} tokens. The distance is from query to the keys after it, weighted "
        f"by attention. {HEADS} has every layer and head."
    )
    yield "\n## Entropy by layer and head\n"
    yield f"![Entropy of attention by layer and head]({ENTROPY})"
    yield "\n## Attention by distance\n"
    yield f"![Share of attention by distance, without the sink]({PROFILE})"
    yield "\n## Angles\n"
    yield (
        f"In a training text, {critical} of {pairs} pairs of dims turn at least once, so that they have seen "
        f"every angle. Pairs from number {critical} on have not. An angle counts as unseen if no distance "
        f"within {trained:,} tokens has it. {PAIRS} has every pair."
        if critical < pairs
        else f"In a training text of {trained:,} tokens every pair of dims turns at least once, so that it "
        "has seen every angle."
    )
    yield f"\n![Distances with unseen angles, by pair of dims]({UNSEEN})"
