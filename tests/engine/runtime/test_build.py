"""Parts of a worker that a CPU never builds as a GPU does."""

import json
from types import SimpleNamespace

import pytest
import torch
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.runtime import build
from penstock.engine.runtime.pass_runner import RunAs


class Runner:
    """A PassRunner that captures nothing, and says whether it was asked to."""

    def __init__(self, executor, run_as, *rest):
        self.run_as, self.num_captures = run_as, 0

    def capture_all(self) -> None:
        self.num_captures += 1


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cuda", {}, (RunAs.GRAPHS, 1)),
        ("cuda", {"capture": "lazy"}, (RunAs.GRAPHS, 0)),
        ("cuda", {"enforce_eager": True}, (RunAs.PADDED, 0)),
        ("cpu", {}, (RunAs.EAGER, 0)),
    ],
)
def test_graphs_are_captured_at_start_where_there_are_any_unless_they_shall_be_lazy(
    device, options, expected, monkeypatch
):
    monkeypatch.setattr(build, "PassRunner", Runner)
    runner = build_runner(monkeypatch, device, **options)
    assert (runner.run_as, runner.num_captures) == expected


def build_runner(monkeypatch, device, **options):
    monkeypatch.setattr(build, "build_mover", lambda given, executor: None)
    plan = SimpleNamespace(max_num_seqs=1, residency=SimpleNamespace(max_model_len=1))
    given = SimpleNamespace(config=EngineConfig("demo", **options), plan=plan, device=torch.device(device))
    return build.build_runner(given, None)


def test_graphs_are_dropped_where_a_later_one_cannot_be_captured(monkeypatch):
    """The traceback keeps the runner, and its graphs would keep NCCL's communicator."""
    closed = []

    class Failing(Runner):
        def capture_all(self) -> None:
            raise RuntimeError("another rank has failed")

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(build, "PassRunner", Failing)
    with pytest.raises(RuntimeError, match="another rank"):
        build_runner(monkeypatch, "cuda")
    assert len(closed) == 1


@pytest.mark.parametrize(("max_model_len", "windows"), [(16, (None, None)), (17, (16, None))])
def test_attention_knows_of_no_window_that_sees_all_of_the_longest_sequence(max_model_len, windows, tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    own = {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    own |= {"max_position_embeddings": 64, "max_window_layers": 0, "num_key_value_heads": 2}
    config = {"model_type": "qwen3", "vocab_size": 101, "head_dim": 8, **sizes, **own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"device": "cpu", "load_format": "dummy", "dtype": "float32", "max_model_len": max_model_len}
    with LLM(str(tmp_path), **options) as llm:
        assert llm.engine.plan.spec.windows == (16, None)
        assert llm.engine.worker.runner.model.spec.windows == windows
