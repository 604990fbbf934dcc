"""A study from the text to the report, to be read from top to bottom."""

from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.evaluation.run_options import check_output
from phi3_jax.lora import find_model
from phi3_jax.parallel.messages import tell
from phi3_jax.rope_lab.study.base import write_new_model
from phi3_jax.rope_lab.study.checks import check_study
from phi3_jax.rope_lab.study.measuring import measure
from phi3_jax.rope_lab.study.plan import FREE, NEW, StudyPlan
from phi3_jax.rope_lab.study.record import RECORD, StudyRecord
from phi3_jax.rope_lab.study.report import FILES, read_results, write_study_report
from phi3_jax.rope_lab.study.results import StudyResults
from phi3_jax.rope_lab.study.ropes import resolve_ropes
from phi3_jax.rope_lab.study.settings import StudySettings
from phi3_jax.rope_lab.study.stages import TEXT, StudyStages
from phi3_jax.rope_lab.study.texts import divide
from phi3_jax.rope_lab.study.training import train_base, train_rope
from phi3_jax.storage.targets import Target


def run_study(
    settings: StudySettings,
    *,
    beside: Sequence[Target] = (),
    overwrite: bool = False,
    mesh: Mesh | None = None,
    cache_dir: Path | None = None,
    show: bool = True,
) -> StudyResults:
    """Trains and measures a model under each rope, and writes a report; after a kill the same call resumes.

    Every stage has a folder in `output_dir`: a model, or measurements. A finished stage is not repeated, and
    an unfinished one resumes by its own record.

    Args:
        beside: directories of finished studies, whose perplexities the report shows too.
        overwrite: start stages over that were started with other options.

    Raises:
        UserError: settings do not fit the text or the model, or a stage was started with other options; it is
            raised before any training.
        InterruptedRunError: a signal came while a model was trained.
    """
    others = [read_results(directory) for directory in beside]
    parts = divide(settings.text, settings.validation_share, settings.test_share)
    given = None
    if settings.base is None:
        given = find_model(settings.model, None, lambda: default_model(cache_dir, progress=tell)).base
        check_output(settings.output_dir, (*FILES, RECORD), model=given, text=settings.text)
    plan = StudyPlan(settings, {"digest": parts.digest}, {} if given is None else fingerprint(given))
    with StudyRecord(settings.output_dir, overwrite=overwrite) as record:
        options = plan.stages()
        record.check(options, free=FREE)
        study = StudyStages(settings, record, options, mesh, cache_dir, show)
        parts.write(study.folder(TEXT))
        if settings.base is not None:
            new = settings.base
            study.run(NEW, "a new model", lambda to: write_new_model(to, parts.train, new, settings.seed))
        check_study(study, given or study.model(NEW))
        base = given or train_base(study)
        ropes = resolve_ropes(study, base)
        for name, trained in plan.runs():
            if trained != "none":
                train_rope(study, ropes[name], trained, base)
        results = measure(study, ropes, plan.runs(), base)
        write_study_report(settings.output_dir, results, others)
    return results
