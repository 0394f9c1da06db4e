"""An exception of `on_text` ends its prompt, and nothing else: the call goes on and raises it at its end."""

import pytest
from penstock.engine.output import Listener

from penstock import LLM, SamplingParams
from tests.support.llm_runs import LONG, OPTIONS, WAYS

PROMPTS = ["Return the", LONG, "def", "Raise an error"]
PARAMS = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12, n=2)


class Gone(Exception):
    """A user's own."""


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def llm(request):
    with LLM("demo", **OPTIONS | request.param) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm):
    return llm.generate(PROMPTS, PARAMS)


class Raises:
    """Raises for some prompts from their third piece of text on, or where they end, and keeps all that it hears."""

    def __init__(self, prompts: set[int], at_end: bool = False):
        self.prompts, self.at_end, self.heard, self.error = prompts, at_end, [], Gone("the client has gone")

    def __call__(self, prompt: int, index: int, text: str | None) -> None:
        self.heard.append((prompt, index, text))
        pieces = [piece for index, _, piece in self.heard if index == prompt]
        if prompt in self.prompts and (text is None if self.at_end else len(pieces) == 3):
            raise self.error


def outputs_of(llm: LLM, on_text: Raises):
    with pytest.raises(Gone) as caught:
        llm.generate(PROMPTS, PARAMS, on_text=on_text)
    assert caught.value is on_text.error
    llm.loop.scheduler.check_integrity()
    assert llm.loop.scheduler.num_running == llm.loop.scheduler.num_waiting == 0
    return caught.value.outputs


@pytest.mark.parametrize("prompts", [{0}, {1, 3}, {0, 1, 2, 3}], ids=str)
def test_its_prompt_is_aborted_and_the_others_are_as_they_would_be(llm, expected, prompts):
    """Both sequences of that prompt; it hears no more of it. Prompts that wait for a row get one."""
    on_text = Raises(prompts)
    outputs = outputs_of(llm, on_text)
    for index, (output, whole) in enumerate(zip(outputs, expected, strict=True)):
        if index not in prompts:
            assert output == whole
            continue
        assert sum(prompt == index for prompt, _, _ in on_text.heard) == 3
        for one, other in zip(output.outputs, whole.outputs, strict=True):
            assert (one.finish_reason, one.error) == ("abort", "on_text raised Gone('the client has gone')")
            assert one.token_ids == other.token_ids[: len(one.token_ids)] and other.text.startswith(one.text)
            assert 1 <= len(one.token_ids) < 12
        assert "".join(text for prompt, _, text in on_text.heard if prompt == index)
    others = f" and for {len(prompts) - 1} more" if len(prompts) > 1 else ""
    assert any(f"{others}; its `outputs` has what all prompts gave" in note for note in on_text.error.__notes__)
    assert llm.generate(PROMPTS, PARAMS) == expected


def test_one_that_has_ended_keeps_its_end(llm, expected):
    """All sequences of a prompt end in the same pass, so that the exception has nothing left to abort."""
    outputs = outputs_of(llm, Raises({2}, at_end=True))
    assert outputs == expected


def test_interrupts_end_the_call(llm, expected):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        llm.generate(PROMPTS, PARAMS, on_text=interrupt)
    assert not hasattr(caught.value, "outputs")
    assert llm.generate(PROMPTS, PARAMS) == expected


class Closed(Exception):
    """One that takes no attributes."""

    def __setattr__(self, name, value):
        raise AttributeError(name)


def test_an_exception_that_takes_no_attributes_is_raised_as_it_is():
    def raising(*_):
        raise Closed

    listener = Listener(raising)
    assert isinstance(listener.tell(0, 0, "text", is_last=False), Closed)
    with pytest.raises(Closed):
        listener.reraise([])
