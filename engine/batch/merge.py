"""Joins the outputs of a job's shards into one file, in the order of the input: every row once, or a refusal."""

import contextlib
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
from penstock.engine.batch.in_order import copied
from penstock.engine.batch.job import Job, difference, read_job
from penstock.engine.batch.output_log import OutputLog
from penstock.engine.batch.row_form import RowForm, has_failed, number_of

MOST_PARTS = 1000


def merge(parts: list[str], output: str, say: Callable[[str], None]) -> int:
    """Writes the rows of all shards to `output`. Returns how many of them failed. Raises ValueError, naming the file,
    if the parts are not all shards of one job, if one of them is being written, or if a row is missing or twice
    there."""
    jobs = _check_parts(parts)
    files = [file for part, job in zip(map(Path, parts), jobs) for file in (part, job.errors_beside(part))]
    files = [file for file in files if file is not None and file.exists()]  # one is not there if no row went into it
    if Path(output).absolute() in [file.absolute() for file in files]:
        raise ValueError(f"--output-file {output}: is one of the parts")
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(contextlib.closing(OutputLog("--merge", file))) for file in files]
        for log in logs:
            log.stays = True
        target = stack.enter_context(contextlib.closing(OutputLog("--output-file", output)))
        if target.nbytes:
            raise ValueError(f"--output-file {output}: is there already; give another one")
        numbers, sources, offsets, num_failed = array("I"), array("H"), array("Q"), 0
        for source, log in enumerate(logs):
            for offset, line in log.rows(RowForm(jobs[0].name)):
                numbers.append(number_of(line))
                sources.append(source)
                offsets.append(offset)
                num_failed += has_failed(line)
        _check_rows(jobs[0], parts, numbers)
        streams = [stack.enter_context(open(log.descriptor, "rb", closefd=False)) for log in logs]
        target.rewrite(copied(streams, numbers, sources, offsets))
        say(f"{len(numbers)} rows of {len(parts)} shards are in {output}, {num_failed} of them failed")
    return num_failed


def _check_parts(parts: list[str]) -> list[Job]:
    """The jobs of the parts, in order; all shards of one, each once."""
    if len(parts) > MOST_PARTS:
        raise ValueError(f"--merge: {len(parts)} files, and at most {MOST_PARTS} are taken")
    jobs = [read_job(Path(part)) for part in parts]
    part_of: dict[int, str] = {}
    for part, job in zip(parts, jobs):
        if job.name != jobs[0].name:
            other = difference(jobs[0].facts, job.facts)
            raise ValueError(f"--merge {part}: is of another job than {parts[0]}: {other}")
        if job.num_shards != jobs[0].num_shards:
            raise ValueError(
                f"--merge {part}: is one of {job.num_shards} shards, and {parts[0]} of {jobs[0].num_shards}"
            )
        if job.shard in part_of:
            raise ValueError(f"--merge {part}: is shard {job.shard}/{job.num_shards}, as {part_of[job.shard]} is")
        part_of[job.shard] = part
    missing = [shard for shard in range(jobs[0].num_shards) if shard not in part_of]
    if missing:
        raise ValueError(f"--merge: shard {missing[0]}/{jobs[0].num_shards} is missing ({len(missing)} in all)")
    return jobs


def _check_rows(job: Job, parts: list[str], numbers: array) -> None:
    """Refuses rows that are missing or twice there."""
    there = np.sort(np.frombuffer(numbers, dtype=np.uint32))
    twice = there[1:][there[1:] == there[:-1]]
    if len(twice):
        raise ValueError(f"--merge: the row of line {twice[0]} is there twice")
    if len(there) != job.facts["rows"]:
        raise ValueError(
            f"--merge: {job.facts['rows'] - len(there)} of {job.facts['rows']} rows have not run yet: run the shards"
            f" again, of which {', '.join(parts[:3])} are the outputs"
        )
