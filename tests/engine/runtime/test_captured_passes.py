"""The passes that are graphs, all of which a start captures; on a CPU, where what was captured is run step by step."""

import random
from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from penstock.engine.compute.sampler import EVERYTHING, Asked
from penstock.engine.runtime import pass_runner
from penstock.engine.runtime.bucket import Bucket
from penstock.engine.runtime.bucket_sizes import BucketSize
from penstock.engine.runtime.pass_runner import PassRunner
from penstock.scheduler.batching.batch import is_decode

from penstock import LLM, SamplingParams
from tests.support.gguf_models import FLOATS_BESIDE, write_model
from tests.support.launches import Launches
from tests.support.oracle.checkpoints import write_checkpoint
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
def test_graphs_are_what_a_start_captures(monkeypatch, resident):
    """Prompts of any length, which come as rows end, and chunks that continue are graphs where nothing streams. What
    rows ask for makes no graph that is not there; nor do eager passes run other stages of the sampler."""
    rng = random.Random(1)
    prompts = [rng.choices(range(1, 1000), k=rng.randint(1, 30)) for _ in range(16)] + [[3] * 80]
    most = [rng.randint(2, 6) for _ in range(16)] + [9]
    params = [SamplingParams(max_tokens=n, ignore_eos=True, **ASKED[i % 4]) for i, n in enumerate(most)]
    with LLM("demo", resident=resident, **OPTIONS) as llm:
        runner, batches = llm.engine.worker.runner, []
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        runner.graphs = graphs = Stepwise()
        ran, run = [], runner.executor.run
        monkeypatch.setattr(runner.executor, "run", lambda inputs, *asked: (ran.append(asked[0]), run(inputs, *asked)))
        with llm.engine.watched_by(BeginPass(batches.append)):
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
        assert graphs.passes.keys() < set(runner.all_graphs)
        assert {asked for size, asked in graphs.passes if not size.num_chunks} == {EVERYTHING, Asked()}
    assert len(ran) == len(batches) and set(ran) == {EVERYTHING, Asked()}
    with_chunks = [batch for batch in batches if not is_decode(batch)]
    assert 3 < sum(not batch.num_continuing for batch in with_chunks) < len(with_chunks) < len(batches)
    num_captured = len(with_chunks) if resident == "all" else 0
    assert sum(size.num_chunks > 0 for size, _ in graphs.replayed) == num_captured
    assert len(graphs.replayed) == len(batches) - len(with_chunks) + num_captured


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Those of which layers differ: in their windows, or in which weights are stored."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "qwen2_windows", "qwen2_windows")
    write_model(folder / "mixed.gguf", "llama", sizes=FLOATS_BESIDE)
    return folder


@pytest.mark.parametrize("resident", ["all", "none"])
@pytest.mark.parametrize("dtype, compression", [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "lossless")])
@pytest.mark.parametrize("model", ["qwen2_windows", "mixed.gguf"])
def test_a_capture_launches_nothing_that_a_warm_up_has_not(monkeypatch, models, model, dtype, compression, resident):
    """A first launch compiles a kernel or makes a library begin, which capture forbids. Weights are decompressed by one
    kernel, whatever their sizes, which is compiled as they are loaded."""
    options = OPTIONS | {"dtype": dtype, "resident": resident, "weights_compression": compression, "max_num_seqs": 40}
    monkeypatch.setattr(pass_runner, "takes_padding", lambda dtype, device: dtype != torch.float32)
    with LLM(str(models / model), **options) as llm, torch.inference_mode():
        runner = llm.engine.worker.runner
        runner.executor.fill_ring()
        monkeypatch.setattr(runner.mailbox, "send", lambda output: None)  # a few numbers, by torch's own kernels
        warm_ups = launches(runner.warmed, runner, runner._warm_up)
        captures = launches(runner.all_graphs, runner, runner._run_bucket)
    assert {"aten.mm.out", "linear", "decode_attention", "draw"} <= {name for name, *_ in captures}
    assert not {each for each in captures - warm_ups if each[0] != "decompress_weights"}


def launches(passes: list[tuple[BucketSize, Asked]], runner: PassRunner, run: Callable[[Bucket, Asked], None]) -> set:
    with pytest.MonkeyPatch.context() as patch, Launches(patch) as noted:
        for size, asked in passes:
            run(runner._bucket(size), asked)
    return noted.found
