"""Which steps a run saves, and runs that get another number of steps."""

import json
import logging
import os
import signal

import numpy as np
import pytest
from phi3_jax.train import finetune as module
from phi3_jax.train import saving
from phi3_jax.train.finetune import InterruptedRunError
from phi3_jax.train.saving import SaveClock, SavePlan
from phi3_jax.train.settings import parse_yaml
from runs import files, interrupted_after, losses, run, settings_of, write_rows
from safetensors.numpy import load_file

WILD = {"learning_rate": 0.03, "lr_scheduler_type": "constant", "warmup_ratio": 0.2, "eval_steps": 1}
"""The rate is so high that the third of eight evaluations is the best, and the first was better than none."""

LEVEL = {"lr_scheduler_type": "constant", "warmup_steps": 1}
"""A learning rate that does not depend on the length of the run."""


def checkpoints(folder):
    """Returns the steps of the checkpoints."""
    path = folder / "run" / "checkpoints"
    return sorted(int(each.name) for each in path.iterdir()) if path.exists() else []


def report(folder):
    return json.loads((folder / "run" / "metrics.json").read_text())


def log(folder, kind):
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def weights(folder):
    return load_file(folder / "run" / "model.safetensors")


def same_weights(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("strategy", "options", "saved"),
    [
        ("steps", {}, [3, 4, 6, 9, 10]),
        ("steps", {"save_steps": 5}, [3, 4, 5, 6, 9, 10]),
        ("epoch", {}, [3, 4, 8, 10]),
        ("best", {}, [3, 4]),
        ("no", {}, []),
    ],
)
def test_a_plan_saves_by_its_strategy(folder, base, strategy, options, saved):
    """An epoch has 4 steps and evaluations come every 3; the best is after step 3, then an interruption."""
    settings = settings_of(folder, base, save_strategy=strategy, **options)
    plan = SavePlan.from_settings(settings, epoch=4, total=10)

    def saves(step):
        evaluated = step % 3 == 0 or step == 10
        return plan.saves(step, evaluated=evaluated, best=step == 3, interrupted=step == 4)

    assert [step for step in range(1, 11) if saves(step)] == saved


@pytest.mark.slow
def test_keeps_as_many_checkpoints_as_the_settings_say(folder, base):
    """The best of the four steps is the last one or the one before; the limit may change later."""
    run(folder, base, max_steps=4, eval_steps=4, save_steps=1, save_total_limit=3)
    assert checkpoints(folder) == [2, 3, 4]
    run(folder, base, max_steps=5, eval_steps=4, save_steps=1, save_total_limit=1)
    assert checkpoints(folder) in ([4, 5], [5])


class FakeClock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def test_a_clock_saves_when_minutes_have_passed():
    time = FakeClock()
    clock = SaveClock(2.0, time)
    due = []
    for step in range(1, 21):  # a step takes 15 seconds
        time.seconds += 15
        if clock.is_over(step):
            due.append(step)
            clock.restart()
    assert due == [8, 16]
    assert not SaveClock(None, time).is_over(1)


def test_processes_ask_the_first_about_every_ten_seconds(monkeypatch):
    time, asked = FakeClock(), []

    def from_primary(work):
        asked.append(int(time.seconds))
        return work()

    monkeypatch.setattr(saving.distributed, "process_count", lambda: 2)
    monkeypatch.setattr(saving.distributed, "from_primary", from_primary)
    clock = SaveClock(0.5, time)
    due = []
    for step in range(1, 41):  # a step takes 2 seconds
        time.seconds += 2
        if clock.is_over(step):
            due.append(step)
            clock.restart()
    assert asked == [2, 4, *range(14, 80, 10)]
    assert due == [17, 32]


def test_rejects_save_minutes_that_nothing_reads(folder, base):
    with pytest.raises(
        ValueError, match=r"save_minutes=1\.0 is for save_strategy=steps or epoch, not for no"
    ):
        settings_of(folder, base, save_strategy="no", save_minutes=1)


def test_saves_by_time_between_evaluations(folder, base, monkeypatch):
    monkeypatch.setattr(saving.SaveClock, "is_over", lambda self, step: step == 2)
    run(folder, base, max_steps=4, eval_steps=4, save_minutes=1)
    assert checkpoints(folder) == [2, 4]


def test_reads_no_from_yaml_and_rejects_save_steps_that_nothing_reads(folder, base):
    given = parse_yaml("save_strategy: no")
    assert settings_of(folder, base, **given).save_strategy == "no"
    with pytest.raises(ValueError, match="save_steps=2 is for save_strategy=steps, not for best; leave one"):
        settings_of(folder, base, save_strategy="best", save_steps=2)


def test_best_saves_only_better_evaluations(folder, base, monkeypatch):
    """After each evaluation there is one checkpoint; the model is the one that metrics.json names."""
    seen, save = [], module.Checkpoints.save

    def noted(self, step, *rest):
        save(self, step, *rest)
        self.wait()
        seen.append(checkpoints(folder))

    monkeypatch.setattr(module.Checkpoints, "save", noted)
    options = {"metric_for_best_model": "loss", "max_steps": 8, **WILD}
    results = run(folder, base, save_strategy="best", **options)
    scores = [record["loss"] for record in log(folder, "validation")]
    better = [step for step in range(1, 9) if scores[step - 1] == min(scores[:step])]
    assert 1 < len(better) < 8
    assert seen == [[step] for step in better]
    assert checkpoints(folder) == better[-1:] == [report(folder)["best_step"]]
    assert results["validation"]["loss"] == min(scores)


@pytest.mark.slow
def test_best_resumes_from_the_interruption_and_from_the_best(folder, base, monkeypatch, caplog):
    options = {"metric_for_best_model": "loss", "max_steps": 8, "save_strategy": "best", **WILD}
    run(folder, base, output_dir=folder / "whole" / "run", **options)
    best = report(folder / "whole")["best_step"]
    with monkeypatch.context() as patch:
        interrupted_after(patch, 7)
        with pytest.raises(InterruptedRunError, match="interrupted after step 7, which is saved"):
            run(folder, base, **options)
    assert checkpoints(folder) == [best, 7]
    with monkeypatch.context() as patch:  # as if killed
        patch.setattr(module.FinetuneRun, "restore_best", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(folder, base, **options)
    assert checkpoints(folder) == [best]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(folder, base, **options)
    assert f"resuming after step {best} of 8" in caplog.text
    assert losses(folder) == losses(folder / "whole")
    assert same_weights(weights(folder), weights(folder / "whole"))
    assert checkpoints(folder) == [best]


def stopped_in_evaluation(patch, number):
    """Sends SIGTERM to the run after the first batch of this evaluation."""
    known, begun = module.Evaluator._with_known_labels, []

    def noted(self, arrays):
        if len(begun) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return known(self, arrays)

    call = module.Evaluator.__call__

    def counted(self, *arguments):
        begun.append(self)
        return call(self, *arguments)

    patch.setattr(module.Evaluator, "_with_known_labels", noted)
    patch.setattr(module.Evaluator, "__call__", counted)


@pytest.mark.parametrize("strategy", ["steps", pytest.param("best", marks=pytest.mark.slow)])
def test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_up_for(folder, base, monkeypatch, strategy):
    """The evaluation is the third, which is the best; then it is the last one, of the finished training."""
    options = {"metric_for_best_model": "loss", "max_steps": 8, "eval_batch_size": 4, **WILD}
    options["save_strategy"] = strategy
    run(folder, base, output_dir=folder / "whole" / "run", **options)
    best = report(folder / "whole")["best_step"]
    with monkeypatch.context() as patch:
        stopped_in_evaluation(patch, best)
        with pytest.raises(InterruptedRunError, match=f"interrupted after step {best}, which is saved"):
            run(folder, base, **options)
    assert [record["step"] for record in log(folder, "validation")] == list(range(1, best))
    assert best in checkpoints(folder)
    with monkeypatch.context() as patch:
        stopped_in_evaluation(patch, 1)  # again, before the evaluation is made up for
        with pytest.raises(InterruptedRunError, match=f"interrupted after step {best}, which is saved"):
            run(folder, base, **options)
    with monkeypatch.context() as patch:  # as if killed there
        patch.setattr(module.Evaluator, "_with_known_labels", lambda self, arrays: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(folder, base, **options)
    assert best in checkpoints(folder)
    with monkeypatch.context() as patch:
        stopped_in_evaluation(patch, 8 - best + 2)
        with pytest.raises(InterruptedRunError, match=f"interrupted after step {best}, which is saved"):
            run(folder, base, **options)
    run(folder, base, **options)
    assert losses(folder) == losses(folder / "whole")
    assert log(folder, "validation") == log(folder / "whole", "validation")
    assert report(folder)["best_step"] == best
    assert same_weights(weights(folder), weights(folder / "whole"))


def test_no_saves_nothing_and_starts_over(folder, base, monkeypatch, caplog):
    options = {"metric_for_best_model": "loss", "max_steps": 8, "save_strategy": "no", **WILD}
    with monkeypatch.context() as patch:
        interrupted_after(patch, 3)
        with pytest.raises(
            InterruptedRunError,
            match="after step 3, and save_strategy=no saved nothing; the same command starts",
        ):
            run(folder, base, **options)
    assert "checkpoints" not in files(folder)
    with caplog.at_level(logging.WARNING):
        results = run(folder, base, **options)
    assert "no step of the run before was saved: starting over" in caplog.text
    scores = {record["step"]: record["loss"] for record in log(folder, "validation")}
    best = min(scores, key=scores.get)
    assert (
        f"the model is that of the last step, 8; step {best} was better (loss {scores[best]:.4f}"
        in caplog.text
    )
    assert "checkpoints" not in files(folder)
    assert report(folder)["best_step"] is None
    assert results["validation"]["loss"] == scores[8] != scores[best]
    assert "those of the last step, 8" in (folder / "run" / "report.md").read_text()
    with pytest.raises(
        ValueError, match=r"no checkpoint .* continued to step 9 \(save_strategy=no writes none\)"
    ):
        run(folder, base, **options | {"max_steps": 9})


@pytest.mark.slow
def test_a_finished_run_takes_more_steps(folder, base):
    """Batches and losses are those of the longer run from its start; so are model, report and record."""
    write_rows(folder / "test.jsonl", 12, start=100)
    options = {"test_file": str(folder / "test.jsonl"), "task": "sequence-classification", **LEVEL}
    run(folder, base, output_dir=folder / "whole" / "run", max_steps=12, **options)
    run(folder, base, max_steps=6, **options)
    results = run(folder, base, max_steps=12, **options)
    assert losses(folder) == losses(folder / "whole")
    assert same_weights(weights(folder), weights(folder / "whole"))
    ours, expected = report(folder), report(folder / "whole")
    assert ours["metrics"] == expected["metrics"]
    assert ours["best_step"] == expected["best_step"]
    assert ours["settings"]["max_steps"] == 12
    assert len(log(folder, "test")) == 1
    record = json.loads((folder / "run" / "run.json").read_text())
    assert (record["steps"], record["settings"]["max_steps"], record["finished"]) == (12, 12, results)
    assert run(folder, base, max_steps=12, **options) == results
    with pytest.raises(ValueError, match=r"run has done 12 steps, and cannot end after step 9; give more"):
        run(folder, base, max_steps=9, **options)


@pytest.mark.slow
def test_more_steps_have_the_rates_of_the_longer_run(folder, base):
    """As in transformers, whose schedule is made anew for the new number of steps."""
    run(folder, base, max_steps=4)
    rates = [record["learning_rate"] for record in log(folder, "train")]
    run(folder, base, max_steps=None, num_train_epochs=2.0)  # 12 steps
    schedule = module.make_recipe(settings_of(folder, base, max_steps=12), None, None).schedule
    now = [record["learning_rate"] for record in log(folder, "train")]
    assert now[:4] == rates
    assert now[4:] == pytest.approx([float(schedule(step)) for step in range(4, 12)])
    assert rates[3] < now[4]


@pytest.mark.slow
def test_an_unfinished_run_gets_another_number_of_steps(folder, base, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        interrupted_after(patch, 4)
        with pytest.raises(InterruptedRunError):
            run(folder, base, max_steps=9, **LEVEL)
    with pytest.raises(ValueError, match="run has done 4 steps, and cannot end after step 3"):
        run(folder, base, max_steps=3, **LEVEL)
    with caplog.at_level(logging.WARNING):
        results = run(folder, base, max_steps=4, **LEVEL)
    assert "resuming after step 4 of 4" in caplog.text
    assert [record["step"] for record in log(folder, "validation")] == [3, 4]
    run(folder, base, output_dir=folder / "whole" / "run", max_steps=4, **LEVEL)
    assert results == report(folder / "whole")["metrics"]
    assert same_weights(weights(folder), weights(folder / "whole"))


def test_rejects_more_steps_of_runs_that_cannot_be_continued(folder, base):
    run(folder, base, max_steps=2, keep_checkpoints=False)
    kept = {path: path.read_bytes() for path in (folder / "run").iterdir() if path.is_file()}
    with pytest.raises(
        ValueError, match=r"finished after step 2 and has no .*=False removed them\)\. .* give it as --model"
    ):
        run(folder, base, max_steps=4)
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.slow
def test_rejects_more_steps_of_a_run_that_stopped_early(folder, base):
    options = {"metric_for_best_model": "loss", "early_stopping_patience": 1, **WILD}
    run(folder, base, max_steps=8, **options)
    done = losses(folder)[-1][0]
    assert done < 8
    with pytest.raises(
        ValueError, match=rf"stopped early after step {done}, and would again with more steps"
    ):
        run(folder, base, max_steps=20, **options)
    assert run(folder, base, max_steps=8, **options)
