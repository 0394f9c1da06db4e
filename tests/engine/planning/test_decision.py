"""The decision of rank 0 gives the other ranks its plan, without a search of their own."""

import pytest
from penstock.engine.config import EngineConfig
from penstock.engine.model.families import read_config, read_spec
from penstock.engine.planning import engine_plan
from penstock.engine.planning.decision import Decision
from penstock.engine.planning.device_profile import plan_rates
from penstock.engine.planning.engine_plan import make_engine_plan, plain_plan
from penstock.scheduler.units import GIB

SHAPES = "benchmarks/shapes"
CASES = [
    ("Llama-3-8B", 1, 141 * GIB, {}),
    ("Llama-3-8B", 2, 8 * GIB, {}),
    ("Llama-3-8B", 1, 12 * GIB, {"max_num_seqs": 3, "weights_compression": "lossless"}),
    ("Llama-3-70B", 2, 24 * GIB, {}),
    ("Llama-3-70B", 4, 80 * GIB, {"resident": 0.4, "weights_compression": "none"}),
    ("Llama-3.2-1B", 1, None, {"attention_sinks": 4, "attention_window": 508}),
]


@pytest.mark.parametrize(("shape", "tp_size", "memory", "options"), CASES)
def test_the_plan_is_made_again_without_a_search(shape, tp_size, memory, options, monkeypatch):
    model = f"{SHAPES}/{shape}.json"
    config, spec = EngineConfig(model, load_format="dummy", **options), read_spec(read_config(model), model)
    rates = plan_rates(config, tp_size, "cpu" if memory is None else "cuda")
    plans = [make_engine_plan(config, spec, tp_size, memory, rates, ("a note",))]
    if plans[0].residency.compressed and memory > 8 * GIB:
        plans.append(plain_plan(plans[0]))
    monkeypatch.setattr(engine_plan, "choose_compression", lambda *_: pytest.fail("searched"))
    for plan in plans:
        told = Decision.unpack(plan.decision.pack())
        assert told == plan.decision
        again = make_engine_plan(told.as_told(config), spec, tp_size, memory, told.rates, ("a note",), told)
        assert again.max_num_seqs == plan.max_num_seqs
        for name in ("residency", "pass_plan", "activation_offsets", "activations_bytes", "rates", "notes", "layout"):
            assert getattr(again, name) == getattr(plan, name), name
