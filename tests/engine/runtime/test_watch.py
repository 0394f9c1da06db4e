"""A watch sees passes and instructions, replaces one, and is loaded by name; several are one around the other."""

import pytest
from penstock.engine.runtime.watch import Watch, Watches, load_watch
from penstock.scheduler.passes.pass_plan import Compute

from penstock import LLM, SamplingParams
from tests.support.watches import Around, BeginPass, EndPass

OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "resident": "none"}
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def test_every_pass_and_every_instruction_is_seen_in_order():
    with LLM("demo", **OPTIONS) as llm:
        seen, begun, ended = [], [], []
        around = Around(lambda instruction, ctx, run: (seen.append(instruction), run()))
        with llm.engine.watched_by(around), llm.engine.watched_by(BeginPass(begun.append)):
            with llm.engine.watched_by(EndPass(lambda batch, logits: ended.append((batch, len(logits))))):
                llm.generate("Return the", PARAMS)
        plan, num_passes = llm.engine.plan.pass_plan, len(begun)
        assert num_passes == 4 and ended == [(batch, 1) for batch in begun]
        steps = [instruction for instruction in seen if isinstance(instruction, Compute)]
        assert steps == list(plan.steps) * num_passes
        assert len(seen) == len(plan.prologue) + len(plan.instructions) * num_passes
        llm.generate("Return the", PARAMS)
        assert len(begun) == num_passes, "a watch sees nothing once its context has ended"


def test_one_instruction_is_replaced():
    def negate(instruction, ctx, run):
        run()
        if isinstance(instruction, Compute) and instruction.step == "final_norm":
            ctx.act["x_"].neg_()

    with LLM("demo", **OPTIONS) as llm:
        (plain,) = llm.generate("Return the", PARAMS)
        with llm.engine.watched_by(Around(negate)):
            (negated,) = llm.generate("Return the", PARAMS)
        assert negated.outputs[0].token_ids != plain.outputs[0].token_ids
        assert llm.generate("Return the", PARAMS) == [plain]


def test_a_later_watch_stands_around_the_earlier_ones():
    order = []

    def noting(name: str) -> Watch:
        return Around(lambda instruction, ctx, run: (order.append(f"+{name}"), run(), order.append(f"-{name}")))

    watches = Watches(noting("a"), noting("b"))
    with watches.with_one_more(noting("c")):
        watches.around(None, None, lambda: order.append("do"))
    assert order == ["+c", "+b", "+a", "do", "-a", "-b", "-c"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:Watch", "expected module:Class of a Watch .ModuleNotFoundError.*nowhere"),
        ("penstock.engine.runtime.watch:Missing", "has no attribute 'Missing'"),
        ("os:path", "is no subclass of Watch"),
        ("tests.support.raises:Watch", "ZeroDivisionError"),
        ("collections:Counter", "is no subclass of Watch"),
    ],
)
def test_a_name_that_means_no_watch_is_refused(name, message):
    with pytest.raises(ValueError, match=f"^watch='{name}': .*{message}"):
        load_watch(name)
    with pytest.raises(ValueError, match=message):
        LLM("demo", **OPTIONS, debug={"watch": name})


@pytest.mark.parametrize("name", ["", "penstock.engine.runtime.watch", ":Watch", "module:"])
def test_what_is_no_name_is_refused_by_the_config(name):
    with pytest.raises(ValueError, match=f"^watch='{name}': expected module:Class$"):
        LLM("demo", **OPTIONS, debug={"watch": name})
