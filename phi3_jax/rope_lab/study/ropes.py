"""The ropes of a study: their kinds, the files of mixed lists, and the search of factors."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import RopeArgument, parse_rope
from phi3_jax.errors import UserError
from phi3_jax.evaluation.scorer import frequencies_for
from phi3_jax.rope_lab.search.results import FACTORS
from phi3_jax.rope_lab.search.run import search_ropes
from phi3_jax.rope_lab.search.search import Stages
from phi3_jax.rope_lab.study.stages import StudyStages
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, target_in

PLAIN, LINEAR, NTK, YARN, SEARCHED, OTHER = "plain", "linear", "ntk", "yarn", "searched", "other"
"""Kinds of ropes, by which findings compare them."""


@dataclass(frozen=True)
class ResolvedRope:
    """A rope that can be measured and trained."""

    name: str
    text: str
    """The value of `--rope`."""

    @property
    def argument(self) -> RopeArgument:
        """The rope under the name that it has in the study."""
        return replace(parse_rope(self.text), name=self.name)

    def config(self, base: Phi3Config) -> Phi3Config:
        """Returns the base model's config with the rope."""
        return self.argument.config_to_save(base)


def kind_of(text: str | None) -> str:
    """Returns the kind of a rope by the value of `--rope`; None stands for a search.

    Plain rope with another theta is NTK-aware scaling, whose theta follows from the stretch.
    """
    if text is None:
        return SEARCHED
    argument = parse_rope(text)
    rope_type = argument.scaling.rope_type
    if rope_type == "default":
        return NTK if "rope_theta" in dict(argument.fields) else PLAIN
    return {"linear": LINEAR, "dynamic": NTK, "ntk": NTK, "yarn": YARN}.get(rope_type, OTHER)


def is_packable(config: Phi3Config, length: int) -> bool:
    """Whether a row of `length` tokens may have several examples: their frequencies are those of one list."""
    if config.rope_scaling.switches_at(config.rope_base) is not None:
        return True
    short, long = frequencies_for(config, 1), frequencies_for(config, length)
    return short[1] == long[1] and np.array_equal(short[0], long[0])


def with_context(text: str, config: Phi3Config, length: int) -> str:
    """Returns a value of `--rope` with a context of `length` tokens, which plain rope does not imply.

    Raises:
        UserError: another rope's own parameters give it a shorter context.
    """
    argument = parse_rope(text)
    context = argument.config_to_save(config).context_length
    if context >= length:
        return text
    if argument.scaling.rope_type == "default":
        return f"{text}{',' if ':' in text else ':'}max_position_embeddings={length}"
    raise UserError(
        f"rope {text!r} stretches the model to {context:,} tokens only; the study needs {length:,}"
    )


def factors_at(config: Phi3Config, length: int) -> tuple[list[float], float]:
    """Returns the factors on plain rope's wavelengths at a length, by pair, and the attention factor."""
    inv_freq, attention = frequencies_for(config, length)
    return (config.rope_base.inv_freq().astype(np.float64) / inv_freq).tolist(), attention


def write_lists(output: Target, base: Phi3Config, scaled: Phi3Config, length: int, *, mixed: bool) -> None:
    """Writes a rope as longrope for `longrope:@FILE`, with its factors at `length` as the long list.

    Args:
        base: the config of the base model.
        scaled: the config with the rope.
        mixed: whether the short list is plain rope, with an attention factor of 1; else it is the long list.
    """
    long_factor, attention = factors_at(scaled, length)
    plain = [1.0] * len(long_factor)
    content = {
        "rope_type": "longrope",
        "short_factor": plain if mixed else long_factor,
        "long_factor": long_factor,
        "short_mscale": 1.0 if mixed else attention,
        "long_mscale": attention,
        "original_max_position_embeddings": base.max_position_embeddings,
        "max_position_embeddings": length,
    }
    write_text(output, json.dumps(content, indent=2) + "\n")


def resolve_ropes(study: StudyStages, base: Path) -> dict[str, ResolvedRope]:
    """Searches factors and writes mixed lists; returns the ropes by name."""
    settings, config = study.settings, open_checkpoint(base).config
    resolved = {}
    for name, rope in settings.ropes.items():
        text = rope.rope if rope.search is None else _searched(study, name, base)
        assert text is not None
        text = with_context(text, config, settings.length)
        if rope.is_mixed or rope.search is not None:
            lists = target_in(study.folder("ropes"), f"{name}.json")
            scaled = ResolvedRope(name, text).config(config)
            write_lists(lists, config, scaled, settings.length, mixed=rope.is_mixed)
            text = f"longrope:@{lists}"
        resolved[name] = ResolvedRope(name, text)
    return resolved


def _searched(study: StudyStages, name: str, base: Path) -> str:
    """Searches factors for the study's length; returns the best ones as a value of `--rope`."""
    settings = study.settings
    search = settings.ropes[name].search
    assert search is not None

    def work(output: Target) -> None:
        search_ropes(
            base,
            study.part("validation"),
            output,
            objective=search.asked(settings.length),
            method=search.method(),
            stages=Stages(finalists=search.finalists),
            dtype=settings.dtype,
            mesh=study.mesh,
            show=study.show,
        )

    study.run(f"search/{name}", f"search the factors of {name}", work)
    return f"longrope:@{target_in(study.folder(f'search/{name}'), FACTORS)}"
