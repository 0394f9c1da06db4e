"""A folder with a package that looks like vLLM: every request gets its number of tokens, one a step or, in a batch of
rows and from its server, at once. Its process has a clock of its own, on which a step takes STEP_S, whatever the
machine does, and nothing else but sleeping any time."""

import json
from pathlib import Path

VERSION, STEP_S = "0.0.99", 1e-3
SOURCE = """
import json, os, time
from types import SimpleNamespace
__version__ = "VERSION"
now_s = 100.0
time.perf_counter = lambda: now_s


def take(seconds):
    global now_s
    now_s += seconds


time.sleep = lambda seconds: take(seconds + 1e-6)  # more than a rounding of the sum


def log(what, said):
    with open(os.environ["FAKE_VLLM_LOG"], "a") as file:
        file.write(json.dumps([what, said]) + "\\n")


class SamplingParams:
    def __init__(self, **said):
        self.max_tokens, self.said = said["max_tokens"], said


class LLM:
    def __init__(self, **options):
        if os.environ.get("FAKE_VLLM_FAILS"):
            raise RuntimeError("no kernel image")
        log("options", options | {"is_there": os.path.exists(options["model"] + "/config.json")})
        if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":  # as in 0.23
            from vllm.model_executor.offloader import counted
            counted.cpu_offload_bytes = options.get("cpu_offload_gb", 0) * 1000
            counted.total_offloaded_bytes = options.get("offload_group_size", 0) * 1000
        self.llm_engine, self.alive, self.is_cached = self, {}, False

    def reset_prefix_cache(self):
        self.is_cached = False

    def generate(self, prompts, params, use_tqdm):
        assert not self.is_cached
        self.is_cached = True
        log("generate", [[one["prompt_token_ids"], other.said] for one, other in zip(prompts, params)])
        take(STEP_S * max(one.max_tokens for one in params))
        return [self.output(index, one.max_tokens) for index, one in enumerate(params)]

    def output(self, index, num_tokens):
        return SimpleNamespace(request_id=str(index), outputs=[SimpleNamespace(token_ids=[0] * num_tokens)])

    def add_request(self, request_id, prompt, params):
        assert not self.is_cached
        log("add", [prompt["prompt_token_ids"], params.said])
        self.alive[request_id] = [0, params.max_tokens]

    def has_unfinished_requests(self):
        return bool(self.alive)

    def step(self):
        take(STEP_S)
        for counts in self.alive.values():
            counts[0] += 1
        news = [self.output(index, counts[0]) for index, counts in self.alive.items()]
        self.alive = {index: counts for index, counts in self.alive.items() if counts[0] < counts[1]}
        return news
"""

OFFLOADER = """
from types import SimpleNamespace
counted = SimpleNamespace()


def get_offloader():
    return counted
"""

RUN_BATCH = """
import argparse, json, os, sys
from vllm import log

parser = argparse.ArgumentParser()
for flag in ("-i", "-o", "--model"):
    parser.add_argument(flag)
args, flags = parser.parse_known_args()
if os.environ.get("FAKE_VLLM_FAILS"):
    raise RuntimeError("no kernel image")
rows = [json.loads(line) for line in open(args.i)]
is_there = [os.path.exists(f"{args.model}/{name}") for name in ("config.json", "tokenizer.json")]
log("run_batch", {"flags": flags, "is_there": is_there, "prompts": len({str(row["body"]["messages"]) for row in rows})})
print("Running batch:   0% Completed | 0/?", file=sys.stderr, flush=True)
with open(args.o, "w") as output:
    for row in rows:
        body = {"usage": {"completion_tokens": row["body"]["max_tokens"]}}
        response = {"status_code": 200, "request_id": "x", "body": body}
        answer = {"id": "x", "custom_id": row["custom_id"], "response": response, "error": None}
        output.write(json.dumps(answer) + "\\n")
print("Running batch: 100% Completed", file=sys.stderr, flush=True)
"""

API_SERVER = """
import argparse, json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from vllm import log

parser = argparse.ArgumentParser()
for flag in ("--host", "--port", "--model"):
    parser.add_argument(flag)
args, flags = parser.parse_known_args()
fails = os.environ.get("FAKE_VLLM_FAILS")
if fails == "start":
    raise RuntimeError("no kernel image")
if fails == "never ready":
    threading.Event().wait()
own_process = "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
is_there = os.path.exists(f"{args.model}/config.json")
log("served", {"flags": flags, "is_there": is_there, "own_process": own_process})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        log("get", self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        log("post", [self.path, asked])
        log("connection", self.client_address[1])
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fails == "answer":
            self.say({"error": {"message": "no page is free"}})
            print("EngineDeadError", file=sys.stderr, flush=True)
            self.send("")
            return
        for _ in range(asked["max_tokens"]):
            self.say({"choices": [{"index": 0, "text": ""}]})
        self.say({"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}})
        self.send("data: [DONE]\\n\\n")
        self.send("")

    def say(self, event):
        self.send("data: " + json.dumps(event, separators=(",", ":")) + "\\n\\n")

    def send(self, chunk):
        self.wfile.write(f"{len(chunk):x}\\r\\n{chunk}\\r\\n".encode())

    def log_message(self, *said):
        pass


ThreadingHTTPServer((args.host, int(args.port)), Handler).serve_forever()
"""


class FakeVllm:
    """The package in `folder`, and what was asked of it."""

    def __init__(self, folder: Path, monkeypatch):
        self.site, self.log = folder / "site", folder / "log"
        (self.site / "vllm/model_executor").mkdir(parents=True)
        (self.site / "vllm/model_executor/offloader.py").write_text(OFFLOADER)
        (self.site / "vllm/entrypoints/openai").mkdir(parents=True)
        (self.site / "vllm/entrypoints/openai/run_batch.py").write_text(RUN_BATCH)
        (self.site / "vllm/entrypoints/openai/api_server.py").write_text(API_SERVER)
        (self.site / "vllm/__init__.py").write_text(SOURCE.replace("VERSION", VERSION).replace("STEP_S", str(STEP_S)))
        info = self.site / f"vllm-{VERSION}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
        monkeypatch.setenv("FAKE_VLLM_LOG", str(self.log))

    def asked(self, what: str) -> list:
        """All that was said of this kind, in order."""
        lines = map(json.loads, self.log.read_text().splitlines())
        return [said for kind, said in lines if kind == what]
