"""LLM.chat answers conversations as generate answers their rendered text."""

import shutil

import pytest
from penstock.engine.planning.find_model import find_model
from penstock.engine.text.chat import RenderedChat

from penstock import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
HELLO = [{"role": "user", "content": "What does sorted() return?"}]
TURNS = [*HELLO, {"role": "assistant", "content": "A list."}, {"role": "user", "content": "Of what?"}]


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", max_model_len=128) as llm:
        yield llm


def test_a_chat_is_the_generation_of_its_rendered_text(llm):
    heard = []
    llm.reset_prefix_cache()
    one, two = llm.chat([HELLO, TURNS], GREEDY, on_text=lambda *told: heard.append(told))
    rendered = llm.render_chat([HELLO, TURNS])
    assert [output.prompt for output in (one, two)] == [each.text for each in rendered]
    assert [output.prompt_token_ids for output in (one, two)] == [each.token_ids for each in rendered]
    ids = [each.token_ids for each in rendered]
    assert [o.outputs for o in llm.generate(ids, GREEDY)] == [one.outputs, two.outputs]
    assert [o.outputs for o in llm.generate(rendered, GREEDY)] == [one.outputs, two.outputs]
    assert "".join(text or "" for prompt, _, text in heard if prompt == 1) == two.outputs[0].text
    llm.reset_prefix_cache()
    assert llm.chat(HELLO, GREEDY)[0].to_dict() == one.to_dict()
    assert llm.chat([], GREEDY) == []


def test_options_reach_the_template(llm):
    (opened,) = llm.render_chat(HELLO)
    (closed,) = llm.render_chat(HELLO, add_generation_prompt=False)
    (continued,) = llm.render_chat(TURNS[:2], add_generation_prompt=False, continue_final_message=True)
    assert opened.text.startswith(closed.text) and len(opened.text) > len(closed.text)
    assert continued.text.endswith("A list.")
    with pytest.raises(TypeError, match="no_such"):
        llm.render_chat(HELLO, no_such=True)


def test_without_parameters_an_answer_may_fill_the_context(llm):
    (output,) = llm.chat(TURNS)
    (sequence,) = output.outputs
    ended = sequence.finish_reason == "stop"
    assert ended or len(output.prompt_token_ids) + len(sequence.token_ids) == 128


def test_what_cannot_be_answered_is_refused_before_anything_runs(llm):
    for messages, message in (
        ([{"role": "user"}, {"content": "a"}], "conversation 0, message 1: "),
        ([{"role": "user", "content": "word " * 200}], "prompt 0: has "),
        ([{"role": "user", "content": "a" * 2**21}], "prompt 0: a text of "),
    ):
        with pytest.raises(ValueError, match=message):
            llm.chat(messages, GREEDY)
    assert isinstance(llm.render_chat(HELLO)[0], RenderedChat)


def test_a_model_without_a_template_generates_but_does_not_chat(tmp_path):
    shutil.copy(find_model("demo") / "tokenizer.json", tmp_path)
    with LLM("demo", tokenizer=str(tmp_path)) as other:
        assert len(other.generate("Return", GREEDY)[0].outputs[0].token_ids) == 6
        with pytest.raises(ValueError, match=f"{tmp_path}: has no chat template .*: give --chat-template FILE"):
            other.chat(HELLO)
    (tmp_path / "own.jinja").write_text("Q: {{ messages[0].content }} A:")
    with LLM("demo", chat_template=str(tmp_path / "own.jinja")) as other:
        (output,) = other.chat(HELLO, GREEDY)
    assert output.prompt == f"Q: {HELLO[0]['content']} A:"
