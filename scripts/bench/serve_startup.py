"""Times `penstock serve` from the start of its process to the first 200 of GET /health, beside what `penstock generate`
needs from the start of its own to the first token, in turn and each in a fresh process.

The server is held to `allowed_s`: MOST_OVER_GENERATE x the median to that token, and the median import of fastapi and
uvicorn by a process that has imported the engine. `rows` has every time. All engine flags work, -tp N too; the last
line is one JSON object.

    python -m scripts.bench.serve_startup --model /path/to/Llama-3-8B-Instruct
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.parallel.topology import resolve_topology

from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine
from scripts.bench.workload import natural, positive

ROOT = Path(__file__).resolve().parents[2]
MOST_OVER_GENERATE = 1.3
START_S = 600.0  # for a server to be ready
PAUSE_S = 0.05  # between two looks at it, which take their time from it
PROMPT = json.dumps({"prompt_token_ids": [5] * 32})
IMPORT = "import time, penstock.engine.llm; start = time.perf_counter(); import fastapi, uvicorn"
KINDS = ("generate", "serve", "import")


def main() -> None:
    own, engine = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter), Parser()
    add_arguments(own)
    add_config_arguments(add_groups(engine))
    args, flags = own.parse_known_args()
    config = config_from_args(engine.parse_args(flags))
    device = resolve_topology(0, 1, 0, config.device).device
    ways: dict[str, Callable[[Sequence[str]], float]] = dict(zip(KINDS, (first_token_s, healthy_s, import_s)))
    for _ in range(args.num_iters_warmup):
        for way in ways.values():
            way(flags)
    rows = [{kind: way(flags) for kind, way in ways.items()} for _ in range(args.num_iters)]
    record = {"benchmark": "serve_startup", **machine(device, config.tensor_parallel_size or 1)}
    record |= {"model": Path(config.model).stem, "load_format": config.load_format, "resident": str(config.resident)}
    record |= summarise(rows) | {"rows": rows}
    say(record)
    keep(record, args.output_json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    text = "starts of each before those, which are not counted (default: 1)"
    group.add_argument("--num-iters-warmup", type=natural, default=1, metavar="N", help=text)
    text = "starts of each (default: 3)"
    group.add_argument("--num-iters", type=positive, default=3, metavar="N", help=text)
    add_output_argument(group)


def first_token_s(flags: Sequence[str]) -> float:
    """The seconds until `penstock generate` has shown its only token."""
    command = [sys.executable, "-m", "penstock", "generate", *flags, "--prompts-file", "-", "--max-tokens", "1"]
    with tempfile.TemporaryFile("w+") as log:
        start_s = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        process.stdin.write(PROMPT.encode())
        process.stdin.close()
        is_there = process.stdout.read(1)
        took_s = time.perf_counter() - start_s
        process.stdout.read()
        if process.wait() or not is_there:
            raise RuntimeError(f"penstock generate failed: {tail(log)}")
    return took_s


def healthy_s(flags: Sequence[str]) -> float:
    """The seconds until `penstock serve` answers /health with 200."""
    command = [sys.executable, "-m", "penstock", "serve", *flags, "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        start_s = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while not is_healthy(log):
                if process.poll() is not None or time.perf_counter() - start_s > START_S:
                    raise RuntimeError(f"penstock serve is not ready: {tail(log)}")
                time.sleep(PAUSE_S)
            return time.perf_counter() - start_s
        finally:
            process.terminate()
            process.wait()


def is_healthy(log) -> bool:
    """Asks the server whose address stands in what it has said."""
    log.seek(0)
    address = log.read().partition("http://")[2].partition(",")
    if not address[1]:
        return False
    connection = http.client.HTTPConnection(address[0], timeout=START_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:  # it ends, and says why
        return False
    finally:
        connection.close()


def import_s(_: Sequence[str]) -> float:
    """The seconds that a server's libraries take a process that has the engine's."""
    command = [sys.executable, "-c", f"{IMPORT}; print(time.perf_counter() - start)"]
    return float(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)


def tail(log) -> str:
    log.seek(0)
    return log.read()[-2000:]


def summarise(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The medians, in seconds, and what the server's is held to."""
    medians = {kind: statistics.median(row[kind] for row in rows) for kind in KINDS}
    allowed_s = MOST_OVER_GENERATE * medians["generate"] + medians["import"]
    named = {
        "first_token_s": medians["generate"],
        "import_s": medians["import"],
        "healthy_s": medians["serve"],
        "allowed_s": allowed_s,
    }
    return named | {"is_within": medians["serve"] <= allowed_s}


def say(record: dict[str, Any]) -> None:
    print("penstock generate, to its first token: {first_token_s:.2f} s".format(**record))
    print("import of fastapi and uvicorn:         {import_s:.2f} s".format(**record))
    print("penstock serve, to /health 200:        {healthy_s:.2f} s, of {allowed_s:.2f} s".format(**record))


if __name__ == "__main__":
    sys.exit(run_script(main))
