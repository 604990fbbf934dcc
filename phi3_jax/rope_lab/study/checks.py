"""Checks of a study before any training: memory, lengths, ropes and the parts of the text."""

from pathlib import Path

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.config.rope_argument import trained_length
from phi3_jax.errors import UserError
from phi3_jax.evaluation.scorer import Scorer
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.rope_lab.study.retrieval import TrainingPrompts
from phi3_jax.rope_lab.study.ropes import with_context
from phi3_jax.rope_lab.study.stages import StudyStages
from phi3_jax.rope_lab.study.texts import check_tokens
from phi3_jax.tokenizer import Phi3Tokenizer


def check_study(study: StudyStages, model: Path) -> None:
    """Checks that a study can be done with a base model, which may not be trained yet.

    Raises:
        UserError: something does not fit.
    """
    settings, checkpoint = study.settings, open_checkpoint(model)
    original = trained_length(checkpoint.config)
    if settings.length <= original:
        raise UserError(
            f"length={settings.length} must be more than the {original:,} tokens that the base is trained on"
        )
    for rope in settings.ropes.values():
        if rope.rope is not None:
            with_context(rope.rope, checkpoint.config, settings.length)
    lengths = [settings.compare.lengths[-1], *(settings.retrieve.lengths if settings.retrieve else ())]
    shapes = load_abstract(Phi3ForCausalLM, checkpoint, dtype=settings.dtype, mesh=study.mesh)
    Scorer(shapes).check_memory(max(lengths))
    tokenizer = Phi3Tokenizer.from_pretrained(model)
    _check_text(study, tokenizer)
    base, shortest = settings.base, TrainingPrompts(tokenizer, settings.training_tasks()).shortest
    if base is not None and base.retrieval_share and base.length < shortest:
        raise UserError(
            f"base.length={base.length} is too short for retrieval tasks, which need {shortest} tokens; give "
            "a longer one, or base.retrieval_share: 0"
        )


def _check_text(study: StudyStages, tokenizer: Phi3Tokenizer) -> None:
    settings = study.settings
    sizes = {name: len(study.ids(name, tokenizer)) for name in ("train", "validation", "test")}
    check_tokens("test", sizes["test"], max(settings.compare.lengths[-1], settings.compare.max_tokens or 0))
    for rope in settings.ropes.values():
        if rope.search is not None:
            samples = rope.search.samples + rope.search.held_out
            check_tokens("validation", sizes["validation"], settings.length, samples)
    if settings.finetune is not None:
        check_tokens("train", sizes["train"], settings.length)
        check_tokens("validation", sizes["validation"], settings.length, settings.finetune.validation_windows)
    elif settings.base is not None:
        for name in ("train", "validation"):
            check_tokens(name, sizes[name], settings.base.length)
