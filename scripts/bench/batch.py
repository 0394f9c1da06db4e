"""Measures `penstock batch` as it is used: a process, a file of chats, and the summary that it prints.

The rows are drawn: `--input-len` words, each a token of a tokenizer made for that, in a folder with the model's
config.json (a GGUF file stays where it is); the weights are random, and a job costs the same with others.
`--lengths fixed` gives each row `--output-len` tokens; `unknown` lets a stop end it, at twice that at the latest. With
--text the model is itself, with its weights and tokenizer: rows are stretches of the text, and an answer of unknown
length ends where the model ends it. `--stop-after` ends the job by SIGTERM once that share of its rows is there, and
lets it go on. `--compare vllm` runs the same file in `vllm run-batch` afterwards, whose weights stay on the GPU; its
seconds are those of its progress bar, without the load, as ours are. All other flags are passed on to `penstock batch`.
The last line is one JSON object.

    python -m scripts.bench.batch --model benchmarks/shapes/Llama-3-8B.json --resident none --num-prompts 2400 \\
      --input-len 512 --output-len 256 --compare vllm --vllm /tmp/site
    python -m scripts.bench.batch --model SmolLM2-135M-Instruct.Q4_1.gguf --text docs/log.md --lengths unknown \\
      --num-prompts 200 --input-len 100 --output-len 64
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.engine.planning.find_model import find_model
from penstock.engine.weights.gguf_file import is_gguf
from penstock.parallel.topology import resolve_topology

from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine
from scripts.bench.vllm_batch import run_vllm_batch
from scripts.bench.vllm_side import ROOT, add_vllm_arguments, find_vllm
from scripts.bench.word_model import write_word_model
from scripts.bench.workload import add_text_argument, positive, ratio, read_text, stretch

DONE, STOPPED = 0, 143  # exit statuses of penstock batch
STOPS = 250  # of so many words one ends a row of unknown length
POLL_S = 0.01


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_arguments(parser)
    args, passed_on = parser.parse_known_args()
    if args.text is not None and args.compare:
        raise ValueError(f"--compare {args.compare}: not with --text: it is given random weights")
    if args.compare and is_gguf(args.model):
        raise ValueError(f"--compare {args.compare}: it is given a config.json, and {args.model} is a GGUF file")
    device = device_of(passed_on)
    vllm = find_vllm(args.vllm, args.vllm_options) if args.compare == "vllm" else None
    with tempfile.TemporaryDirectory(prefix="batch-") as folder:
        model, given, output = (Path(folder) / name for name in ("model", "in.jsonl", "out.jsonl"))
        named = str(model if args.text is None and not is_gguf(args.model) else find_model(args.model))
        command = [sys.executable, "-m", "penstock", "batch", "--model", named]
        if args.text is None:
            write_rows(args, write_word_model(args.model, model), given)
            command += ["--tokenizer", str(model), "--load-format", "dummy"]
        else:
            write_rows(args, read_text(args.text).split(), given)
        command += ["-i", str(given), "-o", str(output), *passed_on]
        record = {
            "benchmark": "batch",
            **machine(device),
            "model": Path(args.model).stem,
            "flags": passed_on,
            **{name: getattr(args, name) for name in ("num_prompts", "input_len", "output_len", "lengths")},
            **({} if args.text is None else {"text": args.text.name}),
            "dry_run": run_job([*command, "--device", device.type, "--dry-run"]),
        }
        if args.stop_after:
            record["stopped"] = stop_job(command, output, max(int(args.stop_after * args.num_prompts), 1))
        record |= run_job(command)
        record |= {"lines": check_output(output, args.num_prompts), "predicted": errors_of(record)}
        if vllm is not None:
            record["vllm"] = run_vllm_batch(vllm, model, given, Path(folder) / "vllm.jsonl", args.num_prompts)
            if "output_tokens_s" in record["vllm"]:
                record["speedup"] = record["output_tokens_s"] / record["vllm"]["output_tokens_s"]
    say(record)
    keep(record, args.output_json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a config.json, a folder that has one, or a GGUF file")
    texts = {"--num-prompts": "rows", "--input-len": "words of a row", "--output-len": "tokens of an answer"}
    for flag, text in texts.items():
        parser.add_argument(flag, type=positive, required=True, metavar="N", help=text)
    add_text_argument(parser)
    parser.add_argument("--lengths", choices=("fixed", "unknown"), default="fixed", help="of the answers")
    parser.add_argument("--stop-after", type=ratio, default=0.0, metavar="X", help="share of the rows, before SIGTERM")
    parser.add_argument("--compare", choices=("vllm",), help="run the same file in vllm run-batch as well")
    add_vllm_arguments(parser)
    add_output_argument(parser)


def device_of(flags: Sequence[str]) -> torch.device:
    """The device that a job with these flags of `penstock batch` runs on, for which a dry run alone does not look."""
    engine = Parser(allow_abbrev=False)
    add_config_arguments(add_groups(engine), ("device",))
    asked, _ = engine.parse_known_args(flags)
    return resolve_topology(0, 1, 0, config_from_args(asked).device).device


def write_rows(args: argparse.Namespace, words: Sequence[str], file: Path) -> None:
    """Writes the job's input, of words of a text or of a word model."""
    chosen = random.Random(0)
    with open(file, "w") as stream:
        for number in range(args.num_prompts):
            if args.text is None:
                drawn = [words[chosen.randrange(len(words))] for _ in range(args.input_len)]
            else:
                drawn = stretch(chosen, words, args.input_len)
            body = {"messages": [{"role": "user", "content": " ".join(drawn)}]} | ends_of(args, number, len(words))
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
            stream.write(json.dumps(line) + "\n")


def ends_of(args: argparse.Namespace, number: int, vocab_size: int) -> dict[str, Any]:
    """Fields that say when a row's answer ends."""
    if args.lengths == "fixed":
        return {"max_tokens": args.output_len, "ignore_eos": True}
    if args.text is not None:
        return {"max_tokens": 2 * args.output_len}
    stops = [*range(number % STOPS, vocab_size, STOPS)]
    return {"max_tokens": 2 * args.output_len, "ignore_eos": True, "stop_token_ids": stops[:1024]}


def run_job(command: list[str]) -> dict[str, Any]:
    """Runs a job to its end: what it says as JSON. Raises RuntimeError, with its last words, if it does not get
    there."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != DONE:
        raise RuntimeError(f"penstock batch ended with status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def stop_job(command: list[str], output: Path, num_rows: int) -> dict[str, Any]:
    """Ends a job by SIGTERM once it has written so many rows: its summary, and the seconds from the signal to the end
    of the process. Raises RuntimeError if it ended otherwise."""
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while job.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") >= num_rows):
        time.sleep(POLL_S)
    began_s = time.perf_counter()
    job.send_signal(signal.SIGTERM)
    said, messages = job.communicate()
    stop_s = time.perf_counter() - began_s
    if job.returncode != STOPPED:
        raise RuntimeError(f"penstock batch ended with status {job.returncode} after SIGTERM: {messages[-2000:]}")
    summary = json.loads(said.splitlines()[-1])
    return {name: summary[name] for name in ("done", "seconds", "passes", "passes_s")} | {"stop_s": stop_s}


def check_output(output: Path, num_rows: int) -> int:
    """The rows of an output. Raises RuntimeError unless each is there once, without an error."""
    with open(output) as stream:
        rows = [json.loads(line) for line in stream]
    ids, failed = {row["custom_id"] for row in rows}, [row for row in rows if row["error"] is not None]
    if len(rows) != num_rows or len(ids) != num_rows or failed:
        raise RuntimeError(f"{len(rows)} lines of {len(ids)} rows, {num_rows} were asked; {len(failed)} failed")
    return len(rows)


def errors_of(summary: dict[str, Any]) -> list[dict[str, float]]:
    """The predictions on the way, each with how far it was off, as a share of the seconds."""
    return [one | {"error": one["seconds"] / summary["seconds"] - 1} for one in summary["predicted"]]


def say(record: dict[str, Any]) -> None:
    """Prints the record's main figures."""
    steady = record["steady_output_tokens_s"]
    print(f"{record['output_tokens_s']:.0f} output tokens/s, {steady or 0:.0f} between ramp and drain")
    print(f"{record['share_of_bound']:.3f} of the {record['bound']} bound, {record['seconds']:.1f} s")
    for one in record["predicted"]:
        print(f"after {one['share']:.1%} of the rows: {one['seconds']:.1f} s predicted, {one['error']:+.1%}")
    print(f"dry run: {record['dry_run']['seconds']:.1f} s, {record['dry_run']['output_tokens_s']:.0f} tokens/s")
    for name in ("stopped", "vllm", "speedup"):
        if name in record:
            print(f"{name}: {record[name]}")


if __name__ == "__main__":
    sys.exit(run_script(main))
