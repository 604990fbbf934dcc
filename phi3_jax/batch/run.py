"""A file of requests answered: read, divided among processes, gone on with after a kill, and summed up."""

import gzip
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import jax

from phi3_jax import distributed
from phi3_jax.batch.answers import Answer, AnswerFile, Ids, line_of
from phi3_jax.batch.engine import Engine
from phi3_jax.batch.requests import BadRequestError, Request, read_requests
from phi3_jax.config import Phi3Config
from phi3_jax.files import differences, remove_leftovers, replacing
from phi3_jax.plan.chips import peak_flops
from phi3_jax.plan.flops import step_flops
from phi3_jax.plan.work import Work
from phi3_jax.progress import FileProgress, time_left

logger = logging.getLogger(__name__)

STANDARD = Path("-")
"""Standard input or output."""

STATS_SECONDS = 10
"""Between two writings of the statistics."""

POLL_SECONDS = 0.5
"""Between two looks at what other processes have done."""


@dataclass(frozen=True)
class Summary:
    """What came of a file; speeds are of what this process did."""

    done: int
    """Lines with an answer or an error, those of an earlier run included."""
    total: int | None
    """Lines of the input; None: not known yet."""
    errors: int
    resumed: int
    """Lines that an earlier run did."""
    seconds: float
    prompt_tokens: int
    """Of the answered requests."""
    computed_prompt_tokens: int
    """Without what prompts share, which is computed once."""
    completion_tokens: int
    busy: int
    """Slots that have a prompt."""
    slots: int
    flops: float
    """Of the model, for what was computed."""
    peak_flops_per_second: float | None
    """Of the devices; None: not known."""

    @property
    def input_rate(self) -> float:
        """Tokens of prompts a second."""
        return self.prompt_tokens / max(self.seconds, 1e-9)

    @property
    def output_rate(self) -> float:
        """Tokens made a second."""
        return self.completion_tokens / max(self.seconds, 1e-9)

    @property
    def share_of_peak(self) -> float | None:
        peak = self.peak_flops_per_second
        return None if peak is None else self.flops / max(self.seconds, 1e-9) / peak

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields and what follows from them."""
        rates = {
            "prompt_tokens_per_second": self.input_rate,
            "completion_tokens_per_second": self.output_rate,
        }
        return asdict(self) | rates | {"share_of_peak": self.share_of_peak}


class _Output(Protocol):
    """Where answers go."""

    count: int
    errors: int

    def has(self, request: Request | BadRequestError) -> bool: ...

    def add(self, answers: list[Answer | BadRequestError]) -> None: ...

    def close(self) -> None: ...


class _StandardOutput:
    """Answers as they come; nothing is known of earlier ones."""

    def __init__(self) -> None:
        self.count = self.errors = 0

    def has(self, request: Request | BadRequestError) -> bool:
        return False

    def add(self, answers: list[Answer | BadRequestError]) -> None:
        sys.stdout.buffer.write(b"".join(map(line_of, answers)))
        sys.stdout.buffer.flush()
        self.count += len(answers)
        self.errors += sum(isinstance(answer, BadRequestError) for answer in answers)

    def close(self) -> None:
        pass


def batch_file(
    make_engine: Callable[[], Engine],
    source: Path,
    output: Path,
    *,
    asked: dict[str, Any],
    overwrite: bool = False,
    stats: Path | None = None,
    show: bool = True,
) -> Summary:
    """Writes an answer or an error for each line of requests, in the order in which they finish.

    After a kill the same call goes on with what is missing. Several processes all call this with the same
    arguments; each takes its share of the lines, and process 0 puts the answers
    together.

    Args:
        make_engine: gives what answers them; not called where nothing is left to do.
        source: lines as `read_requests` takes them, packed if the name ends with .gz; "-": standard input.
        output: one answer a line; "-": standard output, which cannot be gone on with.
        asked: what else the answers follow from, for JSON; an output that follows from something else is
            not gone on with.
        overwrite: begin anew, whatever the output holds.
        stats: a JSON file for what `Summary` tells, kept up to date.
        show: progress on standard error, in process 0.

    Raises:
        ValueError: the output is there and is something else; standard output for several processes.
        OSError: files that cannot be read or written.
    """
    processes, index = distributed.process_count(), distributed.process_index()
    if processes > 1 and STANDARD in (source, output):
        raise ValueError("several processes need files that all of them can open for input and output")
    asked = {"input": "-" if source == STANDARD else str(source.resolve())} | asked
    if source != STANDARD:
        about = source.stat()
        asked |= {"input_size": about.st_size, "input_modified": about.st_mtime_ns}
    record = _Record(output)
    if output != STANDARD:
        finished = distributed.from_primary(lambda: record.open(asked, processes, overwrite))
        if finished is not None:
            logger.warning("%s is finished; nothing is left to do", output)
            return Summary(**finished)
    part = output if processes == 1 else _part(output, index, processes)
    total = None
    if source != STANDARD and source.suffix != ".gz":
        with source.open("rb") as lines:
            total = sum(
                number % processes == index and not line.isspace() for number, line in enumerate(lines, 1)
            )
    with ExitStack() as stack:
        to: _Output = _StandardOutput() if output == STANDARD else AnswerFile(part)
        stack.callback(to.close)
        if output != STANDARD and index == 0:
            remove_leftovers(output.parent, output.name)
        resumed = to.count
        if resumed:
            logger.warning("going on: %d lines of %s are done", resumed, source)
        requests = _left(read_requests(stack.enter_context(_opened(source))), to, processes, index)
        engine = make_engine()
        work = _Progress(engine, to, total, show and distributed.is_primary(), stats if index == 0 else None)
        with work:
            for answer in engine.run(work.watched(requests)):
                to.add([answer])
                work.after(answer)
    summary = work.summary()
    if output != STANDARD:
        summary = _together(record, part, summary, processes, index)
    work.write(summary)
    return summary


def _left(
    requests: Iterable[Request | BadRequestError], output: _Output, processes: int, index: int
) -> Iterator[Request | BadRequestError]:
    """Those of this process that are not answered yet; an id that was there before is a fault."""
    seen = Ids()
    try:
        for request in requests:
            if isinstance(request, Request) and not seen.add(request.id):
                message = f"line {request.line}: the id {request.id!r} is that of an earlier line"
                request = BadRequestError(
                    request.line, "duplicate_id", message, openai=request.openai is not None
                )
            if request.line % processes == index and not output.has(request):
                yield request
    finally:
        seen.close()


@contextmanager
def _opened(source: Path) -> Iterator[BinaryIO]:
    if source == STANDARD:
        yield sys.stdin.buffer
    elif source.suffix == ".gz":
        with gzip.open(source) as packed:
            yield packed  # type: ignore[misc]  # a BinaryIO in all but name
    else:
        with source.open("rb") as file:
            yield file


def _part(output: Path, index: int, processes: int) -> Path:
    """Where a process has its answers until all are put together."""
    return output.with_name(f"{output.name}.part-{index}-of-{processes}")


class _Record:
    """OUTPUT.run.json: what the output follows from, and the summary once it is finished."""

    def __init__(self, output: Path):
        self.output = output
        self._path = output.with_name(f"{output.name}.run.json")

    def open(self, asked: dict[str, Any], processes: int, overwrite: bool) -> dict[str, Any] | None:
        """Begins, or finds what was begun; the summary if that is finished."""
        parts = list(self.output.parent.glob(f"{self.output.name}.part-*"))
        if overwrite:
            for path in (self._path, self.output, *parts):
                path.unlink(missing_ok=True)
            parts = []
        if not self._path.exists() or not (self.output.exists() or parts):
            if self.output.exists() and self.output.stat().st_size:
                raise ValueError(
                    f"{self.output} is there already, and no {self._path.name} says what it is; choose "
                    "another output, or give --overwrite"
                )
            if not self.output.parent.is_dir():
                raise FileNotFoundError(
                    f"there is no folder {self.output.parent} to write {self.output.name} to"
                )
            self._write({"asked": asked, "processes": processes})
            return None
        before = self._read()
        if changed := differences(before["asked"], asked):
            raise ValueError(
                f"{self.output} was begun with something else, and cannot be gone on with: "
                f"{'; '.join(changed)}. Choose another output, or give --overwrite to begin anew"
            )
        if "finished" not in before and before["processes"] != processes:
            raise ValueError(
                f"{self.output} was begun by {before['processes']} processes and can be gone on with by as "
                f"many, not by {processes}; give --overwrite to begin anew"
            )
        if "finished" in before:
            for path in parts:  # of a process that was killed when all was done
                path.unlink()
        return before.get("finished")

    def finish(self, summary: Summary) -> None:
        self._write(self._read() | {"finished": asdict(summary)})

    @property
    def finished(self) -> dict[str, Any] | None:
        return self._read().get("finished")

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            found["asked"], found["processes"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path} is broken ({error!r}); give --overwrite to begin anew") from error
        return found

    def _write(self, values: dict[str, Any]) -> None:
        with replacing(self._path) as work:
            work.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _together(record: _Record, part: Path, summary: Summary, processes: int, index: int) -> Summary:
    """The summary of all, once every process is done and the output is whole; it is told by files.

    A collective operation would time out where one process has much more to do than another.
    """
    if processes == 1:
        record.finish(summary)
        return summary
    output = record.output
    with replacing(_done(part)) as work:
        work.write_text(json.dumps(asdict(summary)), encoding="utf-8")
    if index > 0:
        while (finished := record.finished) is None:
            time.sleep(POLL_SECONDS)
        return Summary(**finished)
    parts = [_part(output, other, processes) for other in range(processes)]
    while not all(_done(each).exists() for each in parts):
        time.sleep(POLL_SECONDS)
    with replacing(output) as work, work.open("wb") as file:
        for each in parts:
            with each.open("rb") as lines:
                while block := lines.read(1 << 20):
                    file.write(block)
        file.flush()
        os.fsync(file.fileno())
    whole = _sum([Summary(**json.loads(_done(each).read_text(encoding="utf-8"))) for each in parts])
    record.finish(whole)
    for each in parts:
        for path in (each, _done(each)):
            path.unlink(missing_ok=True)
    return whole


def _done(part: Path) -> Path:
    return part.with_name(f"{part.name}.done")


def _sum(parts: list[Summary]) -> Summary:
    """Of processes that worked beside each other."""
    added = (
        "done",
        "errors",
        "resumed",
        "prompt_tokens",
        "computed_prompt_tokens",
        "completion_tokens",
        "busy",
        "slots",
        "flops",
    )
    totals: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in added}
    peaks = [part.peak_flops_per_second for part in parts if part.peak_flops_per_second is not None]
    return replace(
        parts[0],
        **totals,
        total=totals["done"],
        seconds=max(part.seconds for part in parts),
        peak_flops_per_second=sum(peaks) if len(peaks) == len(parts) else None,
    )


class _Progress:
    """Counts, and tells of it."""

    def __init__(self, engine: Engine, output: _Output, total: int | None, show: bool, stats: Path | None):
        self._engine, self._output, self._total, self._stats = engine, output, total, stats
        self._resumed = output.count
        self._began: float | None = None
        self._bar = FileProgress(total, show)
        self._prompt_tokens = self._completion_tokens = 0
        self._flops = 0.0
        self._written = time.monotonic()
        mesh = engine.compiled.mesh
        self._peak = peak_flops(jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat))

    def __enter__(self) -> "_Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def watched(self, requests: Iterable[Any]) -> Iterator[Any]:
        """The requests; the clock starts with the first."""
        for request in requests:
            self._began = self._began or time.monotonic()
            yield request

    def after(self, answer: Answer | BadRequestError) -> None:
        if isinstance(answer, Answer):
            self._prompt_tokens += answer.prompt_tokens
            self._completion_tokens += answer.completion_tokens
            self._flops += _flops(self._engine.compiled.model.config, answer)
        summary = self.summary()
        done = f"{summary.done:,}"
        if self._total is not None:
            done += f"/{self._total:,}"
        told = (
            f"{done} lines, {summary.input_rate:,.0f} tokens/s in, {summary.output_rate:,.1f} out, "
            f"{summary.busy} of {summary.slots} slots"
        )
        left = ""
        fresh = summary.done - summary.resumed
        if self._total is not None and fresh:
            left = time_left((self._total - summary.done) * summary.seconds / fresh)
        self._bar.update(told, summary.done, left)
        if time.monotonic() - self._written >= STATS_SECONDS:
            self.write(summary)

    def summary(self) -> Summary:
        load = self._engine.load
        return Summary(
            done=self._output.count,
            total=self._total,
            errors=self._output.errors,
            resumed=self._resumed,
            seconds=0.0 if self._began is None else time.monotonic() - self._began,
            prompt_tokens=self._prompt_tokens,
            computed_prompt_tokens=load.prompt_tokens,
            completion_tokens=self._completion_tokens,
            busy=load.busy,
            slots=load.slots,
            flops=self._flops,
            peak_flops_per_second=self._peak,
        )

    def write(self, summary: Summary) -> None:
        """Puts the summary where the user wants it."""
        self._written = time.monotonic()
        if self._stats is None:
            return
        with replacing(self._stats) as work:
            work.write_text(json.dumps(summary.to_dict(), indent=2) + "\n", encoding="utf-8")


def _flops(config: Phi3Config, answer: Answer) -> float:
    """Of one answer: each token once through the layers, those of the answer through the head as well."""
    tokens = answer.prompt_tokens + answer.completion_tokens
    flops = step_flops(Work(config, "prefill", 1, tokens))
    return flops.layers + flops.attention + answer.completion_tokens * flops.head
