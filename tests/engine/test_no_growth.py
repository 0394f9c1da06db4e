"""Requests that have ended leave nothing behind in the process: neither objects of Python nor memory of the host."""

import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from penstock.engine.model.families import read_config
from penstock.engine.output import Sequence
from penstock.engine.planning.find_model import find_model
from penstock.engine.runtime.pass_times import NUM_RECENT, PassTimes
from penstock.scheduler.batching.request import Request

from penstock import LLM, SamplingParams

MAX_MODEL_LEN, NUM_ROWS, VOCAB = 16, 128, 256
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": VOCAB}
OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": MAX_MODEL_LEN, "max_num_seqs": NUM_ROWS}
OPTIONS |= {"load_format": "dummy", "tokenizer": "demo"}
WAYS = {
    "in_turn": {},
    "prepared": {"resident": "none", "debug": {"lookahead": 1}},
    "crowded": {  # pages are shared, moved and taken away
        "page_size": 2,
        "num_pages": 120,
        "kv_host_memory": "256KiB",
        "scheduling_policy": "priority",
    },
}
KINDS = (
    {"temperature": 0, "max_tokens": 1},
    {"temperature": 0.8, "top_p": 0.9, "max_tokens": 2},
    {"temperature": 0, "stop": ["e", "the"], "logprobs": 1, "max_tokens": 2},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "max_tokens": 3},
    {"min_p": 0.1, "stop_token_ids": list(range(0, VOCAB, 2)), "max_tokens": 2},
)
NUM_BLOCKS = 1400  # that Python may hold more: caches that fill late, and no more of them for more requests
RSS_BYTES = 48 * 2**20


def arrivals(llm: LLM, is_crowded: bool) -> Iterator[Sequence]:
    """Requests of all kinds without end; every hundredth can never run. In a crowd they are longer, begin alike, and
    some are urgent."""
    num_more, num_kinds = (8, 16) if is_crowded else (0, VOCAB - 1)
    changes = [{"max_tokens": kind["max_tokens"] + num_more, "priority": index % 2} for index, kind in enumerate(KINDS)]
    params = [SamplingParams(**kind | (changed if is_crowded else {})) for kind, changed in zip(KINDS, changes)]
    for number in itertools.count():
        length = MAX_MODEL_LEN if number % 100 == 99 else 1 + number % 3 + num_more // 4
        prompt = [1 + number % num_kinds] * length
        yield Sequence(Request(number, prompt, params[number % len(params)], seed=number), 0, llm.tokenizer, {})


def serve(llm: LLM, sequences: Iterator[Sequence], num_requests: int) -> int:
    """Keeps twice the rows busy or waiting until so many have come and gone; every seventh is aborted as soon as it
    is there. Returns how many have ended."""
    num_ended, num_there = 0, 0
    while num_ended < num_requests:
        while num_there < min(2 * NUM_ROWS, num_requests - num_ended):
            sequence = next(sequences)
            llm.loop.add(sequence)
            if sequence.request.id % 7 == 6:
                llm.loop.abort(sequence.request.id, "nobody listens")
            num_there += 1
        ends = sum(event.is_last for event in llm.loop.advance())
        num_ended, num_there = num_ended + ends, num_there - ends
    while llm.loop.has_unfinished:  # a pass under way that nobody waits for
        assert llm.loop.advance() == []
    return num_ended


def fill(times: PassTimes) -> None:
    """Gives them as many passes as they keep, up to which they grow."""
    for _ in range(NUM_RECENT):
        times.note(times.last, 1, time.perf_counter())


def held() -> tuple[int, int]:
    """The blocks that Python's allocator has given out, and the bytes of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return sys.getallocatedblocks(), pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The config of a model of the demo's kind whose passes cost little."""
    path = tmp_path_factory.mktemp("small") / "config.json"
    path.write_text(json.dumps(read_config(find_model("demo")) | SMALL))
    return str(path)


@pytest.mark.parametrize("way", [*list(WAYS)[:2], pytest.param("crowded", marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "num_requests", [1500, pytest.param(100_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_requests_that_have_ended_leave_nothing_behind(model, way, num_requests):
    with LLM(model, **OPTIONS | WAYS[way]) as llm:
        sequences = arrivals(llm, way == "crowded")
        serve(llm, sequences, 500)
        fill(llm.engine.times)
        blocks, rss_bytes = held()
        assert serve(llm, sequences, num_requests) == num_requests
        more_blocks, more_rss_bytes = held()
        llm.loop.scheduler.check_integrity()
        counts = llm.loop.scheduler.counts
    is_crowded = [bool(n) for n in (counts.num_preemptions, counts.num_hit_tokens, counts.moves.num_in)]
    assert is_crowded == [way == "crowded"] * 3
    assert more_blocks - blocks < NUM_BLOCKS < num_requests
    assert more_rss_bytes - rss_bytes < RSS_BYTES
