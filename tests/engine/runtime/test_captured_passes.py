"""The passes that are graphs, all of which a start captures; on a CPU, where what was captured is run step by step."""

import random
from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import pytest
from penstock.engine.compute.sampler import EVERYTHING, Asked
from penstock.scheduler.batching.batch import is_decode

from penstock import LLM, SamplingParams
from tests.support.watches import BeginPass

OPTIONS = {"device": "cpu", "dtype": "float32", "page_size": 4, "max_model_len": 96, "max_num_seqs": 6}
OPTIONS |= {"max_num_batched_tokens": 70, "enable_prefix_caching": False, "debug": {"as_on_gpu": True}}
ASKED = ({"temperature": 0}, {"seed": 1}, {"temperature": 0, "logprobs": 2}, {"temperature": 0, "presence_penalty": 1})


class Stepwise:
    """Graphs that note which of them are captured, and which are replayed: step by step."""

    def __init__(self):
        self.passes: dict[Hashable, Callable[[], None]] = {}
        self.replayed: list[Hashable] = []

    def capture(self, key: Hashable, warm_up: Callable[[], None], run: Callable[[], None], counts: list) -> None:
        warm_up()
        self.passes[key] = run

    def next_take(self, key: Hashable) -> Any:
        self.replayed.append(key)
        return SimpleNamespace(graph=SimpleNamespace(replay=self.passes[key]), note_replay=lambda watches: None)

    def close(self) -> None:
        self.passes.clear()


@pytest.mark.parametrize("resident", ["all", "none"])
def test_graphs_are_what_a_start_captures(resident):
    """Prompts of any length, which come as rows end, are graphs where nothing streams; but for those with a chunk that
    continues. What rows ask for makes no graph that is not there."""
    rng = random.Random(1)
    prompts = [rng.choices(range(1, 1000), k=rng.randint(1, 30)) for _ in range(16)] + [[3] * 80]
    most = [rng.randint(2, 6) for _ in range(16)] + [9]
    params = [SamplingParams(max_tokens=n, ignore_eos=True, **ASKED[i % 4]) for i, n in enumerate(most)]
    with LLM("demo", resident=resident, **OPTIONS) as llm:
        runner, batches = llm.engine.worker.runner, []
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        runner.graphs = graphs = Stepwise()
        with llm.engine.watched_by(BeginPass(batches.append)):
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
        assert graphs.passes.keys() < set(runner.all_graphs)
        assert {asked for size, asked in graphs.passes if not size.num_starting} == {EVERYTHING, Asked()}
    with_prompts = [batch for batch in batches if not is_decode(batch)]
    num_short = sum(not batch.num_continuing for batch in with_prompts)
    assert 3 < num_short < len(with_prompts) < len(batches)
    num_captured = num_short if resident == "all" else 0
    assert sum(size.num_starting > 0 for size, _ in graphs.replayed) == num_captured
    assert len(graphs.replayed) == len(batches) - len(with_prompts) + num_captured
