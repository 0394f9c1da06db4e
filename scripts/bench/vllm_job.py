"""Runs jobs in vLLM, in a process of its own whose interpreter has vLLM: scripts/bench/vllm_side.py starts it, and
writes what it is to do."""

import json
import os
import sys
import time
from pathlib import Path

import vllm
from vllm import LLM, SamplingParams

from scripts.bench.arrivals import serve


def main(job_file: str, result_file: str) -> None:
    """Loads the engine with the job's `options`, and measures its `runs` one after another."""
    job, start = json.loads(Path(job_file).read_text()), time.perf_counter()
    llm = LLM(**job["options"])
    result = {"version": vllm.__version__, "load_s": time.perf_counter() - start}
    if job["offloads"]:
        result["offloaded_bytes"] = offloaded_bytes()
    result["runs"] = [measure(llm, run) for run in job["runs"]]
    Path(result_file).write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # its threads and processes need not end in order


def offloaded_bytes() -> int:
    """Bytes of the weights that lie in host memory, each of which a pass reads over the link at least once, as the
    offloader of this process counted them. Raises RuntimeError if there are none: not every runner of vLLM's
    offloads."""
    from vllm.model_executor.offloader import get_offloader  # older ones have it elsewhere, and may not be asked

    offloader = get_offloader()
    count = getattr(offloader, "total_offloaded_bytes", 0) or getattr(offloader, "cpu_offload_bytes", 0)
    if not count:
        raise RuntimeError(f"vLLM left no weights in host memory ({type(offloader).__name__})")
    return count


def measure(llm: LLM, run: dict) -> dict:
    """Runs the first requests as a warm-up, then all of them, several times. Returns the shortest time, or the times at
    which tokens came, if requests have times at which they arrive."""
    requests, arrivals = run["requests"], run["arrivals"]
    together(llm, requests[: run["num_warm_up"]])
    if arrivals is not None:
        llm.reset_prefix_cache()
        return {"token_times": one_by_one(llm, requests, arrivals)}
    return {"elapsed_s": min(together(llm, requests) for _ in range(run["repeats"]))}


def together(llm: LLM, requests: list[dict]) -> float:
    """Seconds of all requests at once, of whose prompts nothing is cached from a run before. Raises RuntimeError if one
    got fewer tokens than it asked for."""
    llm.reset_prefix_cache()
    prompts, params = [{"prompt_token_ids": one["prompt"]} for one in requests], [params_of(one) for one in requests]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed_s = time.perf_counter() - start
    for request, output in zip(requests, outputs):
        if len(output.outputs[0].token_ids) != request["params"]["max_tokens"]:
            raise RuntimeError(f"vLLM gave {len(output.outputs[0].token_ids)} tokens, asked: {request['params']}")
    return elapsed_s


def one_by_one(llm: LLM, requests: list[dict], arrivals: list[float]) -> list[list[float]]:
    """Seconds at which the tokens of requests came that arrive at their times."""
    engine = llm.llm_engine

    def add(index: int) -> None:
        request = requests[index]
        engine.add_request(str(index), {"prompt_token_ids": request["prompt"]}, params_of(request))

    def step() -> list[tuple[int, int]]:
        news = engine.step()  # some versions append to the id that they were given, behind a hyphen
        return [(int(one.request_id.partition("-")[0]), len(one.outputs[0].token_ids)) for one in news]

    return serve(arrivals, add, engine.has_unfinished_requests, step)


def params_of(request: dict) -> SamplingParams:
    return SamplingParams(**request["params"], detokenize=False)
