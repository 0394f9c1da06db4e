"""/v1/chat/completions gives what LLM.chat gives, in OpenAI's form; and texts go to token ids and back."""

import pytest

from penstock import SamplingParams

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "What does sorted() return?"}]
TURNS = [*HELLO, {"role": "assistant", "content": "A list"}]
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def output(alone):
    """Gives the output of LLM.chat."""

    def chat(messages, options=None, **params):
        alone.reset_prefix_cache()
        return alone.chat(messages, SamplingParams(**params), **options or {})[0].outputs[0]

    return chat


def test_an_answer_has_the_text_of_chat(served, alone, output):
    expected = output(HELLO, **GREEDY)
    answer = served.answer(PATH, messages=HELLO, model="demo", **GREEDY)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["usage"]["prompt_tokens"] == len(alone.render_chat(HELLO)[0].token_ids)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")


def test_parts_are_texts_and_null_is_absent(served, output):
    expected = output([{"role": "user", "content": "a\nb"}], **GREEDY)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts, "name": None}]
    (choice,) = served.answer(PATH, messages=messages, tools=None, **GREEDY)["choices"]
    assert choice["message"]["content"] == expected.text


def test_options_reach_the_template(served, output):
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    for options, given in (
        (continued, continued),
        (continued, {"continue_final_message": True}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
    ):
        (choice,) = served.answer(PATH, messages=TURNS, **given, **GREEDY)["choices"]
        assert choice["message"]["content"] == output(TURNS, options, **GREEDY).text


def test_an_answer_may_fill_the_context(served, alone):
    long = [{"role": "user", "content": "word " * 180}]
    answer = served.answer(PATH, messages=long, temperature=0, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 256
    assert (
        served.answer(PATH, messages=HELLO, temperature=0, ignore_eos=True, max_tokens=9, max_completion_tokens=3)[
            "usage"
        ]["completion_tokens"]
        == 3
    )


def test_log_probabilities_are_a_list_of_tokens(served, output):
    expected = output(HELLO, logprobs=2, **GREEDY)
    for top in (2, 0):
        asked = {"logprobs": True, "top_logprobs": top, "cache_salt": f"{top}"}  # nothing is cached: the same sums
        (choice,) = served.answer(PATH, messages=HELLO, **asked, **GREEDY)["choices"]
        content = choice["logprobs"]["content"]
        assert [c["logprob"] for c in content] == [p[t].logprob for p, t in zip(expected.logprobs, expected.token_ids)]
        assert [len(c["top_logprobs"]) for c in content] == [top] * 6
        assert all(bytes(c["bytes"]).decode() == c["token"] for c in content)
        assert all(c["top_logprobs"][0]["logprob"] == c["logprob"] for c in content if top)


def test_a_stream_says_whose_turn_it_is_once_and_then_a_chunk_a_token(served, output):
    expected = output(HELLO, **GREEDY)
    role, *chunks = (chunk["choices"][0] for chunk in served.stream(PATH, messages=HELLO, **GREEDY))
    assert role["delta"] == {"role": "assistant", "content": ""} and role["finish_reason"] is None
    assert [list(chunk["delta"]) for chunk in chunks] == [["content"]] * 6
    assert "".join(chunk["delta"]["content"] for chunk in chunks) == expected.text
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]


def test_the_token_that_ends_a_text_is_a_chunk_too(served, alone):
    """One that is no part of the text: a stop token, which stands for end-of-sequence."""
    stops = {"temperature": 0, "max_tokens": 40, "stop_token_ids": list(range(0, 2048, 3))}
    (expected,) = alone.chat(HELLO, SamplingParams(**stops))[0].outputs
    _, *chunks = served.stream(PATH, messages=HELLO, stream_options={"include_usage": True}, **stops)
    *chunks, usage = chunks
    assert len(chunks) == len(expected.token_ids) == usage["usage"]["completion_tokens"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" == expected.finish_reason
    assert chunks[-1]["choices"][0]["delta"]["content"] == ""


def test_texts_become_token_ids_and_back(served, alone):
    text = "Return the number of"
    answer = served.answer("/tokenize", prompt=text, return_token_strs=True)
    assert answer["tokens"] == alone.encode(text) and answer["count"] == len(answer["tokens"]) == len(
        answer["token_strs"]
    )
    assert answer["max_model_len"] == 256
    plain = served.answer("/tokenize", prompt=text, add_special_tokens=False)
    assert plain["tokens"] == alone.encode(text, add_special=False) and plain["token_strs"] is None
    assert served.answer("/detokenize", tokens=answer["tokens"]) == {"prompt": text}
    (chat,) = alone.render_chat(HELLO)
    assert served.answer("/tokenize", messages=HELLO)["tokens"] == chat.token_ids


def test_special_tokens_may_be_put_around_a_chat_once_more(served, alone):
    (chat,) = alone.render_chat(HELLO)
    added = len(alone.encode("a")) - len(alone.encode("a", add_special=False))
    tokens = served.answer("/tokenize", messages=HELLO, add_special_tokens=True)["tokens"]
    assert len(tokens) == len(chat.token_ids) + added


def test_the_tokenizer_is_described(served, alone):
    told = served.call("GET", "/tokenizer_info").json()
    assert told["bos_token"] == alone.tokenizer.named["bos_token"] and "message['content']" in told["chat_template"]
    assert set(told) == {"tokenizer_class", "bos_token", "eos_token", "pad_token", "chat_template"}
