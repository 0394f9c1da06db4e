"""`penstock batch` runs a file of requests and writes a file of answers, each row exactly once, whatever ends it
between; the same command goes on.

Standard output gets one JSON object at the end, standard error all else. Under torchrun rank 0 reads and writes.
"""

import argparse
import json
import re
import sys
import time
from typing import Any

from penstock.engine.batch.checkpoint_digest import checkpoint_digest
from penstock.engine.batch.done_rows import DoneRows
from penstock.engine.batch.estimate import estimate
from penstock.engine.batch.input_lines import InputLines, check_lines
from penstock.engine.batch.job import SEMANTICS, Job, errors_from
from penstock.engine.batch.job_files import JobFiles
from penstock.engine.batch.merge import merge
from penstock.engine.batch.progress import Progress, duration, summary
from penstock.engine.batch.rows import RowReader
from penstock.engine.batch.run import BatchRun
from penstock.engine.batch.stopping import Stopped, Stopping
from penstock.engine.commands.check_model import check_model
from penstock.engine.commands.flags import Groups
from penstock.engine.commands.generate import SAMPLING_FLAGS, add_sampling_arguments
from penstock.engine.commands.plan import plan_of
from penstock.engine.config import EngineConfig
from penstock.engine.server.generation_defaults import read_defaults
from penstock.engine.server.signals import ignore
from penstock.engine.streams import mistake
from penstock.parallel.launch import resolve_launch
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.units import show_time

# exit statuses: all rows ran; some of them failed; the engine did (EX_SOFTWARE); as of a process that SIGTERM ended
DONE, ROWS_FAILED, ENGINE_FAILED, STOPPED = 0, 1, 70, 143
DEFAULTS = tuple(name for name in SAMPLING_FLAGS if name not in ("n", "logprobs"))
# fields of the config that decide tokens; others decide how fast they come
DECIDING = ("dtype", "seed", "max_model_len", "attention_sinks", "attention_window", "load_format")


def add_arguments(groups: Groups) -> None:
    add = groups.everyday.add_argument
    text = "requests: OpenAI's batch lines, or plain prompts, one a line, if the name ends in .txt"
    add("-i", "--input-file", metavar="FILE", help=text)
    add("-o", "--output-file", metavar="FILE", help="answers, a line a request; a job goes on there")
    add("--errors", metavar="FILE", help="where requests that failed go (default: to the others)")
    text = "rows of the output as they end, or sorted once all have (default: done)"
    add("--order", choices=("done", "input"), default="done", help=text)
    add("--retry-errors", action="store_true", help="run the rows again that failed")
    add("--force-new", action="store_true", help="begin anew, and forget what the output has")
    add("--dry-run", action="store_true", help="check the input and predict time and tokens/s; load and write nothing")
    add("--shard", default="0/1", metavar="I/N", help="run every N-th row, from the I-th on, counted from 0")
    add("--merge", nargs="+", metavar="FILE", help="join the outputs of all shards instead")
    text = "names by which requests ask for the model, with commas between them (default: as --model has it)"
    add("--served-model-name", metavar="NAMES", help=text)
    text = "auto takes defaults for sampling from the checkpoint's generation_config.json; none takes the API's own"
    add("--generation-config", choices=("auto", "none"), default="auto", help=text)
    add_sampling_arguments(groups, DEFAULTS)


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    if resolve_launch(config.tensor_parallel_size).rank > 0:
        return DONE if args.merge or args.dry_run else _follow(config)
    try:
        with Stopping() as stopping:
            return _lead(args, config, stopping)
    except Stopped:
        say("stopped: the same command goes on")
        return STOPPED
    except Exception as error:
        if mistake(error) is None:
            error.exit_status = ENGINE_FAILED
        raise


def _follow(config: EngineConfig) -> int:
    """Runs a rank that computes with rank 0. A launcher signals to all ranks, and rank 0 alone decides by that."""
    from penstock.engine.llm import LLM  # with torch, which takes a second

    with LLM(**config.to_dict()) as llm:
        ignore()
        llm.serve()
    return DONE


def _lead(args: argparse.Namespace, config: EngineConfig, stopping: Stopping) -> int:
    """Does what was asked, on rank 0. Returns the exit status."""
    _check_files(args)
    if args.merge:
        return ROWS_FAILED if merge(args.merge, args.output_file, say) else DONE
    shard = _shard(args.shard)
    check_model(config, to_plan=args.dry_run)
    reader = _reader(args, config)
    if args.dry_run:
        return _predict(args, config, reader, shard)
    with JobFiles(args.input_file, args.output_file, args.errors) as files:
        lines = _check(args.input_file, reader)
        job = files.begin(_job(args, config, reader, lines, shard), args.force_new)
        done = files.read(lines, job, args.retry_errors)
        if done.num_done:
            say(f"{done.num_done} of {done.num_rows} rows were done before")
        is_whole = _run_rows(config, reader, done, files, stopping)
        if is_whole and args.order == "input":
            if stopping.is_asked:  # while the last rows ran
                raise Stopped
            files.sort(say)
    if not is_whole:
        say(f"stopped with {done.num_done} of {done.num_rows} rows done: the same command goes on")
        return STOPPED
    return ROWS_FAILED if done.num_failed else DONE


def _check_files(args: argparse.Namespace) -> None:
    """Raises ValueError for a file that is not named, or is none."""
    needed = {"--input-file": not args.merge, "--output-file": not args.dry_run}
    for flag, is_needed in needed.items():
        file = getattr(args, flag[2:].replace("-", "_"))
        if file is None and is_needed:
            raise ValueError(f"{flag}: is missing{_advice(args) if flag == '--input-file' else ''}")
        if file == "-":
            raise ValueError(f"{flag} -: expected a file, in which a job can find its rows again")


def _advice(args: argparse.Namespace) -> str:
    """Advice for a file that was given without its flag, and so was read as the model."""
    alone = args.model_argument
    return "" if alone is None else f": give -i FILE; {alone!r} was read as the model"


def _run_rows(config: EngineConfig, reader: RowReader, done: DoneRows, files: JobFiles, stopping: Stopping) -> bool:
    """Runs the rows that have not run, and prints the summary. Tells whether all have run."""
    progress, run, is_whole = Progress(done.num_rows, done.num_done), None, done.num_done == done.num_rows
    if not is_whole or _others_wait(config):
        from penstock.engine.llm import LLM

        began_s = time.perf_counter()
        say(f"loading {config.model}")
        with LLM(**config.for_job(_num_sequences(done)).to_dict()) as llm:
            llm.lead()
            if llm.engine.device.type == "cuda":
                llm.measure()  # a second, for predictions and for how far passes are filled
            say(f"ready after {time.perf_counter() - began_s:.1f} s")
            if not is_whole:
                with progress:
                    run = BatchRun(llm, reader, done, files, stopping, progress.show)
                    is_whole = run.run()
    try:
        print(json.dumps(summary(run, progress, done, is_whole)), flush=True)
    except SystemExit as error:  # standard output takes no more; the exit status is about the rows
        print(error, file=sys.stderr)
    return is_whole


def _others_wait(config: EngineConfig) -> bool:
    """Tells whether ranks of torchrun start an engine with this one, and would wait for it in vain."""
    launch = resolve_launch(config.tensor_parallel_size)
    return launch.kind == "torchrun" and launch.tp_size > 1


def _num_sequences(done: DoneRows) -> int:
    return sum(done.lines.num_sequences[index] for index in done.pending())


def _predict(args: argparse.Namespace, config: EngineConfig, reader: RowReader, shard: tuple[int, int]) -> int:
    lines = _check(args.input_file, reader)
    done = DoneRows(lines, Job({}, 0, *shard))  # whatever ran before: it is about the whole
    plan = plan_of(config.for_job(_num_sequences(done)))
    predicted = estimate(config, plan, reader, done).to_dict()
    say(
        f"{predicted['rows']} rows, about {predicted['prompt_tokens']} tokens of prompts and at most"
        f" {predicted['output_tokens']} of outputs: {duration(predicted['seconds'])} at"
        f" {predicted['output_tokens_s']:.1f} output tokens/s, {predicted['num_at_once']} sequences at once, bound by"
        f" {predicted['bound']} ({plan.rates.source})"
    )
    print(json.dumps(predicted))
    return DONE


def _check(file: str, reader: RowReader) -> InputLines:
    began_s = time.perf_counter()
    lines = check_lines(file, reader.read)
    say(f"{file}: {len(lines)} row{'s' * (len(lines) != 1)}, checked in {show_time(time.perf_counter() - began_s)}")
    return lines


def _reader(args: argparse.Namespace, config: EngineConfig) -> RowReader:
    """The reader of the input's rows. Raises ValueError for a default that cannot be meant."""
    defaults = read_defaults(config) if args.generation_config == "auto" and config.load_format != "dummy" else {}
    defaults |= {name: getattr(args, f"sampling_{name}") for name in DEFAULTS if hasattr(args, f"sampling_{name}")}
    defaults |= {name: getattr(args, name) for name in ("stop", "stop_token_ids", "ignore_eos") if getattr(args, name)}
    SamplingParams(**defaults)
    names = tuple(name.strip() for name in (args.served_model_name or config.model).split(","))
    return RowReader(args.input_file, defaults, names, is_text=args.input_file.endswith(".txt"))


def _job(
    args: argparse.Namespace, config: EngineConfig, reader: RowReader, lines: InputLines, shard: tuple[int, int]
) -> Job:
    facts: dict[str, Any] = {
        "input": lines.sha256,
        "rows": len(lines),
        "is_text": reader.is_text,
        "checkpoint": checkpoint_digest(config),
        "model_name": reader.names[0],
        "defaults": dict(reader.defaults),
        "semantics": SEMANTICS,
    }
    facts |= {name: getattr(config, name) for name in DECIDING}
    return Job(facts, int(time.time()), *shard, errors_from(args.output_file, args.errors))


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    shard, num_shards = (int(match[1]), int(match[2])) if match else (0, 0)
    if not shard < num_shards:
        raise ValueError(f"--shard {text}: expected I/N, with I from 0 to N - 1")
    return shard, num_shards


def say(line: str) -> None:
    print(f"penstock batch: {line}", file=sys.stderr, flush=True)
