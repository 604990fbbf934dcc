"""Findings of the papers, and whether a study confirms them, by rules with stated thresholds."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from phi3_jax.rope_lab.study.results import StudyResults
from phi3_jax.rope_lab.study.ropes import LINEAR, NTK, PLAIN, SEARCHED, YARN

FAILS = 1.5
"""A perplexity of so many times that of the base within its length is a failure."""

CLEARLY = 0.005
"""The relative difference from which one perplexity is lower than another."""

KEPT = 1.02
"""The most that a perplexity may rise for the short context to be kept."""

Verdict = Literal["confirmed", "contradicted", "not measured"]


class Finding(NamedTuple):
    """A claim of a paper, with the verdict of a study."""

    claim: str
    source: str
    rule: str
    """When the claim is confirmed."""
    verdict: Verdict
    numbers: str
    """What the verdict rests on; or what is missing."""


def findings(results: StudyResults) -> list[Finding]:
    """Returns the verdicts on all claims."""
    return [each(results) for each in FINDINGS]


def linear_fails_untrained(results: StudyResults) -> Finding:
    claim = "Linear interpolation fails without training"
    source = "YaRN, arXiv:2309.00071, section 3.1; LongRoPE, arXiv:2402.13753, section 2"
    rule = (
        f"At every length up to {results.length:,}, its perplexity without training is at least {FAILS} "
        f"times that of the base within {results.original:,} tokens."
    )
    reference = results.reference()
    values = {
        length: value
        for name in results.of_kind(LINEAR, mixed=False)
        for length in results.lengths
        if length <= results.length and (value := results.perplexity(name, "none", length)) is not None
    }
    if reference is None or not values:
        return Finding(claim, source, rule, "not measured", _missing("an untrained linear rope", reference))
    least = min(values, key=lambda length: values[length])
    numbers = (
        f"lowest {values[least]:,.2f}, at {least:,}; base {reference:,.2f}: "
        f"{values[least] / reference:.2f} times"
    )
    return Finding(claim, source, rule, _verdict(values[least] >= FAILS * reference), numbers)


def ntk_works_untrained(results: StudyResults) -> Finding:
    claim = "NTK-aware scaling works without training"
    source = "YaRN, arXiv:2309.00071, section 3"
    rule = (
        f"At {results.length:,} tokens, its perplexity without training is below {FAILS} times that of the "
        f"base within {results.original:,} tokens, and below that of plain rope."
    )
    reference = results.reference()
    best = results.best(results.of_kind(NTK), "none", results.length)
    plain = results.best(results.of_kind(PLAIN), "none", results.length)
    if reference is None or best is None or plain is None:
        return Finding(
            claim, source, rule, "not measured", _missing("untrained NTK and plain ropes", reference)
        )
    works = best[1] < min(FAILS * reference, plain[1])
    numbers = (
        f"{best[0]} {best[1]:,.2f}, plain {plain[1]:,.2f}; base {reference:,.2f}: "
        f"{best[1] / reference:.2f} times"
    )
    return Finding(claim, source, rule, _verdict(works), numbers)


def yarn_is_best_after_training(results: StudyResults) -> Finding:
    claim = "After a short training, YaRN is the best of the formulas"
    source = "YaRN, arXiv:2309.00071, section 4"
    rule = (
        f"At {results.length:,} tokens, no plain, linear or NTK-aware rope with the same training has a "
        f"perplexity that is more than {CLEARLY:.1%} lower than that of the best YaRN."
    )
    trained = _training(results)
    yarn = results.best(results.of_kind(YARN), trained, results.length)
    others = [name for kind in (PLAIN, LINEAR, NTK) for name in results.of_kind(kind)]
    other = results.best(others, trained, results.length)
    if yarn is None or other is None or trained == "none":
        return Finding(claim, source, rule, "not measured", "needs trained YaRN and another trained formula")
    numbers = f"{yarn[0]} {yarn[1]:,.3f}, best of the others {other[0]} {other[1]:,.3f}"
    return Finding(claim, source, rule, _verdict(other[1] >= yarn[1] * (1 - CLEARLY)), numbers)


def searched_is_better_than_yarn(results: StudyResults) -> Finding:
    claim = "Searched factors are better than YaRN's"
    source = "LongRoPE, arXiv:2402.13753, sections 2 and 4; LongRoPE2, arXiv:2502.20082, section 4"
    rule = (
        f"At {results.length:,} tokens, their perplexity is more than {CLEARLY:.1%} lower than that of the "
        "best YaRN, with the same training, and also without any if that was measured."
    )
    pairs = {}
    for trained in dict.fromkeys(("none", _training(results))):
        searched = results.best(results.of_kind(SEARCHED), trained, results.length)
        yarn = results.best(results.of_kind(YARN), trained, results.length)
        if searched is not None and yarn is not None:
            pairs[trained] = searched, yarn
    if not pairs:
        return Finding(claim, source, rule, "not measured", "needs a searched rope and YaRN, trained alike")
    numbers = "; ".join(
        f"{'untrained' if trained == 'none' else trained}: "
        f"{searched[0]} {searched[1]:,.3f}, {yarn[0]} {yarn[1]:,.3f}"
        for trained, (searched, yarn) in pairs.items()
    )
    better = all(searched[1] < yarn[1] * (1 - CLEARLY) for searched, yarn in pairs.values())
    return Finding(claim, source, rule, _verdict(better), numbers)


def short_list_keeps_the_short_context(results: StudyResults) -> Finding:
    claim = "The short list keeps the short context"
    source = "LongRoPE2, arXiv:2502.20082, section 3.3; LongRoPE, arXiv:2402.13753, section 3.3"
    rule = (
        f"At every length up to {results.original:,}, the perplexity of each trained rope whose short list "
        f"is plain is at most {KEPT} times that of plain rope with the same training, or of the base where "
        "plain rope was not trained."
    )
    trained = _training(results)
    ratios: dict[tuple[str, int], float] = {}
    for rope in results.ropes:
        for length in results.lengths:
            value = results.perplexity(rope.name, trained, length)
            plain = results.best(results.of_kind(PLAIN), trained, length) or results.best(
                results.of_kind(PLAIN), "none", length
            )
            if rope.mixed and length <= results.original and value is not None and plain is not None:
                ratios[rope.name, length] = value / plain[1]
    if not ratios or trained == "none":
        return Finding(
            claim, source, rule, "not measured", "needs a trained rope with two lists, and plain rope"
        )
    (name, length), worst = max(ratios.items(), key=lambda item: item[1])
    numbers = f"worst {name} at {length:,}: {worst:.3f} times plain rope"
    uniform = _worst_uniform(results, trained, length)
    if uniform is not None:
        numbers += f"; of those with one list the worst there is {uniform[0]}: {uniform[1]:.3f} times"
    return Finding(claim, source, rule, _verdict(worst <= KEPT), numbers)


FINDINGS: tuple[Callable[[StudyResults], Finding], ...] = (
    linear_fails_untrained,
    ntk_works_untrained,
    yarn_is_best_after_training,
    searched_is_better_than_yarn,
    short_list_keeps_the_short_context,
)


def _worst_uniform(results: StudyResults, trained: str, length: int) -> tuple[str, float] | None:
    """Returns the trained scaling with one list whose perplexity is the highest, relative to plain rope's."""
    plain = results.best(results.of_kind(PLAIN), trained, length) or results.best(
        results.of_kind(PLAIN), "none", length
    )
    names = (rope.name for rope in results.ropes if not rope.mixed and rope.kind != PLAIN)
    values = {
        name: value for name in names if (value := results.perplexity(name, trained, length)) is not None
    }
    if plain is None or not values:
        return None
    worst = max(values, key=lambda name: values[name])
    return worst, values[worst] / plain[1]


def _training(results: StudyResults) -> str:
    """Returns the training that findings are about: of all parameters if there is one."""
    return next((each for each in ("full", "lora") if each in results.trained), "none")


def _verdict(holds: bool) -> Verdict:
    return "confirmed" if holds else "contradicted"


def _missing(what: str, reference: float | None) -> str:
    base = ", and untrained plain rope within the original length" if reference is None else ""
    return f"needs {what}{base}"
