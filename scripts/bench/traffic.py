"""Measures rows of real traffic on one engine: first tokens, tokens of batches, and jobs of many requests, each against
its bound, its prediction, and, with `--compare vllm`, an installed vLLM in the same run.

scripts/bench/traffic_rows.py has the rows; --rows picks some of them, else all that fit the engine run. Times are those
of whole calls, taken alike on both sides: the shortest of some repeats, after a warm-up. The bound and the prediction
of a first token and of a job are sums over all their passes; those of a token are the mean over the batch's decode
passes. What a call takes beside passes that follow each other, `call_s`, is measured by one prompt of one token, and is
part of the prediction of a first token, which waits for it. Rates are measured once, in the same run, after the first
row's warm-up. All engine flags work. Run it plainly, or by torchrun over several ranks; the last line is one JSON
object, with a row each in `rows`.

    python -m scripts.bench.traffic --model benchmarks/shapes/Llama-3-8B.json --load-format dummy --compare vllm \\
      --rows first-token-128 uneven --output-json traffic.json
"""

import argparse
import statistics
import sys
from typing import Any

from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.engine.llm import LLM
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.units import gb_s, ms

from scripts.bench.bound import against_bound, by_kind, host_fields
from scripts.bench.call_time import call_s
from scripts.bench.comparison import add_compare_arguments, check_compare, free_memory
from scripts.bench.engine_record import describe, say_machine
from scripts.bench.entry import run_script
from scripts.bench.full_engine import measure_limit, warm_up_row
from scripts.bench.job_run import run, timed_passes, warm_up
from scripts.bench.record import add_output_argument, keep
from scripts.bench.traffic_rows import FIRST_TOKEN, JOB, REPEATS, ROWS, SHORT_OUTPUT, TOKEN, Row
from scripts.bench.vllm_side import Vllm, add_vllm_arguments, find_vllm, run_of, run_vllm
from scripts.bench.workload import Job

WARM_UP = 64  # requests of a job that vLLM runs first


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    rows = chosen(args.rows)
    config = config_from_args(args).for_job(max(row.num for row in rows) if all(row.num for row in rows) else 0)
    check_compare(args.compare, config, allowed=("vllm",))
    vllm = find_vllm(args.vllm, args.vllm_options) if args.compare else None
    with LLM(**config.to_dict()) as llm:
        rows = fitting(llm, rows, must=bool(args.rows))
        drawn = [runs_of(llm, row) if row.is_usual else [] for row in rows]
        planned = llm.engine.rates
        measured = measure_rows(llm, rows, drawn)
        if llm.engine.topology.rank > 0:
            return
        report = describe(llm, "traffic") | {"predicted_by": planned.source, "rows": measured}
    if vllm is not None:
        free_memory()
        compare_rows(report, rows, drawn, vllm, run_vllm(vllm, config, report, their_runs(rows, drawn)))
    say_machine(report)
    say(report)
    keep(report, args.output_json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    text = f"some of {', '.join(row.name for row in ROWS)} (default: all that fit the engine, of the usual ones)"
    group.add_argument("--rows", nargs="+", default=[], metavar="NAME", help=text)
    add_compare_arguments(group)
    add_vllm_arguments(group)
    add_output_argument(group)
    add_config_arguments(add_groups(parser))


def chosen(names: list[str]) -> list[Row]:
    """The rows of these names, all usual ones if there are none. Raises ValueError for a name that no row has."""
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            raise ValueError(f"--rows {name}: expected some of {', '.join(known)}")
    return [known[name] for name in names] or [row for row in ROWS if row.is_usual]


def fitting(llm: LLM, rows: list[Row], must: bool) -> list[Row]:
    """The rows that this engine can run. Raises ValueError for one that it cannot, if it `must`, or if none
    is left."""
    most_seqs, longest, fit = llm.engine.plan.max_num_seqs, llm.engine.plan.residency.max_model_len, []
    for row in rows:
        wrong = ""
        if row.longest > longest:
            wrong = f"it has {row.longest} tokens in a sequence, more than max_model_len {longest}"
        elif row.measures == TOKEN and row.num > most_seqs:
            wrong = f"it decodes {row.num} sequences at once, more than max_num_seqs {most_seqs}"
        if not wrong:
            fit.append(row)
        elif must:
            raise ValueError(f"--rows {row.name}: {wrong}")
        elif llm.engine.topology.rank == 0:
            print(f"left out: {row.name}: {wrong}")
    if not fit:
        raise ValueError("--rows: none of them fits this engine")
    return fit


def runs_of(llm: LLM, row: Row) -> list[list[Job]]:
    """The requests of each run that the row needs; its bound is the last one's."""
    lengths = [SHORT_OUTPUT, SHORT_OUTPUT + row.output_len] if row.measures == TOKEN else [row.output_len]
    plan = llm.engine.plan
    return [row.jobs(one, plan.spec.vocab_size, llm.config.seed, plan.residency.max_model_len) for one in lengths]


def measure_rows(llm: LLM, rows: list[Row], drawn: list[list[list[Job]]]) -> list[dict[str, Any]]:
    """A row of the record for each; those of other ranks than 0 mean nothing."""
    planned, measured, beside_s = llm.engine.rates, [], None
    for row, runs in zip(rows, drawn):
        if not row.is_usual:
            warm_up_row(llm, row)
        elif row.measures == JOB:
            warm_up(llm, runs[-1])
        else:
            run(llm, runs[-1], row.params(runs[-1]))
        if not measured and llm.engine.topology.rank == 0:
            llm.measure(llm.engine.work.streamed_bytes)
        beside_s = call_s(llm) if beside_s is None else beside_s
        row_of = measure_row(llm, row, runs, planned, beside_s) if row.is_usual else measure_limit(llm, row, planned)
        measured.append(row_of)
    return measured


def measure_row(llm: LLM, row: Row, runs: list[list[Job]], planned: Rates, beside_s: float) -> dict[str, Any]:
    """The row of the record: its time, bound and prediction; or an `error`. `beside_s` is what a call takes beside its
    passes."""
    times, passes = [], []
    for jobs in runs:
        repeats = []
        for _ in range(REPEATS[row.measures]):
            elapsed_s, _ = run(llm, jobs, row.params(jobs))
            repeats.append((elapsed_s, timed_passes(llm)))
        shortest_s, passes = min(repeats, key=lambda one: one[0])
        times.append(shortest_s)
    if llm.engine.topology.rank > 0:
        return {}
    work, rates, timed = llm.engine.work, llm.engine.rates, time_fields(row, runs, times)
    if "error" in timed:
        return {"row": row.name} | timed
    fields = {"row": row.name, "measures": row.measures, "num_requests": row.num} | timed
    if row.measures != TOKEN:
        # Of a job it is little, and much of it is hidden by passes.
        beside = {"call_s": beside_s} if row.measures == FIRST_TOKEN else {}
        shapes = [one.shape for one in passes]
        bound = against_bound(work, shapes, fields["measured_s"], rates, planned, sum(beside.values()))
        return fields | bound | beside | {"num_passes": len(passes), "by_kind": by_kind(work, passes, rates, planned)}
    decodes = [one for one in passes if one.shape.is_decode and one.shape.num_rows == row.num]
    if not decodes:
        return {"row": row.name, "error": f"the KV cache is too small for its {row.num} sequences at once"}
    shapes = [one.shape for one in decodes]
    bound = against_bound(work, shapes, fields["measured_s"] * len(decodes), rates, planned)
    bound |= {name: bound[name] / len(decodes) for name in ("bound_s", "predicted_s")}
    return (
        fields
        | bound
        | {
            "num_passes": len(decodes),
            "decode_pass_s": statistics.median(one.measured_s for one in decodes),
            **host_fields(decodes),
        }
    )


def time_fields(row: Row, runs: list[list[Job]], times: list[float]) -> dict[str, Any]:
    """The figures from the shortest times of the runs: `measured_s`, and the rate of a job or of a batch. `error` where
    a batch took no longer for its tokens than without them, which other work on the machine may do."""
    if row.measures == TOKEN:
        token_s = (times[1] - times[0]) / row.output_len
        if token_s <= 0:
            return {"error": f"its run of {row.output_len} more tokens took no longer than the one without them"}
        return {"measured_s": token_s, "tokens_per_second": row.num / token_s}
    num_tokens = sum(len(job.prompt) + job.output_len for job in runs[-1])
    return {"measured_s": times[-1], "tokens_per_second": num_tokens / times[-1]}


def their_runs(rows: list[Row], drawn: list[list[list[Job]]]) -> list[dict[str, Any]]:
    """The same runs, for vLLM."""
    return [
        run_of(
            jobs, row.params(jobs), min(len(jobs), WARM_UP) if row.measures == JOB else len(jobs), REPEATS[row.measures]
        )
        for row, runs in zip(rows, drawn)
        for jobs in runs
    ]


def compare_rows(report: dict, rows: list[Row], drawn: list[list[list[Job]]], vllm: Vllm, result: dict) -> None:
    """Adds vLLM's version and options to the record, and its figures to each row of it: seconds, how many times ours,
    and the rate at which offloaded weights were read if each pass read them once; or what ended it."""
    said = {name: result[name] for name in ("version", "error", "load_s", "offloaded_bytes") if name in result}
    report["vllm"] = {"options": vllm.options} | said
    offloaded_bytes = said.get("offloaded_bytes", 0)
    theirs = iter(result.get("runs", ()))
    for row, runs, fields in zip(rows, drawn, report["rows"]) if "runs" in result else ():
        if not runs:
            continue
        times = time_fields(row, runs, [next(theirs)["elapsed_s"] for _ in runs])
        fields |= {f"vllm_{name}": value for name, value in times.items()}
        if row.measures == TOKEN and offloaded_bytes and "measured_s" in times:
            fields["vllm_link_gb_s"] = gb_s(offloaded_bytes, times["measured_s"])
        if "measured_s" in fields and "measured_s" in times:
            fields["speedup"] = times["measured_s"] / fields["measured_s"]


def say(report: dict) -> None:
    print(f"{'row':28}{'ms':>12}{'bound':>12}{'predicted':>12}{'tokens/s':>12}{'vLLM ms':>12}{'speedup':>9}")
    for row in report["rows"]:
        if "error" in row:
            print(f"{row['row']:28}{row['error']}")
            continue
        figures = [ms(row[name]) for name in ("measured_s", "bound_s", "predicted_s")] + [row["tokens_per_second"]]
        theirs = f"{ms(row['vllm_measured_s']):>12.2f}{row['speedup']:>9.3f}" if "speedup" in row else ""
        print(f"{row['row']:28}" + "".join(f"{one:>12.2f}" for one in figures) + theirs)
    if "vllm" in report:
        print("vLLM", *report["vllm"].values())


if __name__ == "__main__":
    sys.exit(run_script(main))
