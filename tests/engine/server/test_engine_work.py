"""The engine's side of a server: what it says, and what it does when it cannot do what it is told."""

import asyncio
import binascii
import dataclasses
import json

from penstock.engine.server.channel import Channel
from penstock.engine.server.messages import Message, Outputs, Scores

from tests.support.serving import CONFIG, WAIT_S, Client, Serving, until
from tests.support.watches import BeginPass

PATH = "/v1/completions"
BODY = {"prompt": "Return the number of", "temperature": 0, "max_tokens": 6, "ignore_eos": True}
MANY = 64


def sent_by(channel: Channel, monkeypatch) -> list[Message]:
    """The messages that are sent from now on at one end, each noted once it is out."""
    sent, send = [], channel.send

    def sending(message: Message) -> None:
        send(message)
        sent.append(message)

    monkeypatch.setattr(channel, "send", sending)
    return sent


def test_a_pass_is_one_message_whatever_its_number_of_rows(monkeypatch):
    """Of many clients, all of which are there before the second pass is sealed."""
    config = dataclasses.replace(CONFIG, max_num_seqs=MANY, max_num_batched_tokens=MANY * 16)
    served = Serving(config).start()
    sent, asked = sent_by(served.work._channel, monkeypatch), sent_by(served._channels[0], monkeypatch)

    def wait_for_all(batch) -> None:
        until(lambda: len(asked) == MANY)

    async def ask_all():
        clients = [Client(PATH, BODY | {"stream": number % 2 == 0}) for number in range(MANY)]
        return await asyncio.gather(*(client.ask(served.app) for client in clients))

    with served.llm.engine.watched_by(BeginPass(wait_for_all)):
        clients = served.run(ask_all())
    until(served.at_rest)
    passes = [message for message in sent if message.passed is not None]
    assert [type(message) for message in sent] == [Outputs] * len(sent)
    assert len(passes) == served.llm.engine.times.num_passes and max(len(message.ids) for message in passes) == MANY
    assert sum(len(message.ids) for message in sent) == MANY * BODY["max_tokens"]
    texts = {client.text for client in clients if not client.body["stream"]}
    assert all(client.status == 200 for client in clients)
    assert len({json.loads(text)["choices"][0]["text"] for text in texts}) == 1
    served.close()


def test_what_a_pass_gives_of_a_prompts_log_probabilities_is_told_right_behind_it(served, monkeypatch):
    """So what a turn tells is bounded by the tokens of a pass. Where the prompt ends its first token comes next."""
    sent, num_top, prompt = sent_by(served.work._channel, monkeypatch), 20, list(range(5, 205))
    body = BODY | {"prompt": prompt, "echo": True, "logprobs": num_top, "max_tokens": 2}
    (choice,) = served.answer(PATH, **body)["choices"]
    until(served.at_rest)
    sizes = [len(binascii.a2b_base64(message.packed)) if isinstance(message, Scores) else None for message in sent]
    most = CONFIG.max_num_batched_tokens
    lengths = [most, most, most, len(prompt) - 1 - 3 * most]
    assert sizes[:8] == [size for length in lengths for size in (4 * length * (2 + 2 * num_top), None)]
    assert [len(message.ids) for message in sent[1:8:2]] == [0, 0, 0, 1] and sizes[8:] == [None] * len(sizes[8:])
    assert len(choice["logprobs"]["tokens"]) == len(prompt) + 2


def test_sequences_that_cannot_be_made_end_alone(served, monkeypatch):
    """The front has checked them, and still it may fail where they are made once more; the engine goes on."""
    expected = served.answer(PATH, **BODY)["choices"]
    expand = served.llm.prompts.expand

    def failing(token_ids, params, request_ids=None):
        if params.max_tokens == 5:
            raise TypeError("no such parameter")
        return expand(token_ids, params, request_ids)

    monkeypatch.setattr(served.llm.prompts, "expand", failing)

    async def ask_all():
        bodies = [BODY | {"max_tokens": 5, "n": 2}, BODY | {"max_tokens": 5, "stream": True}, BODY]
        return await asyncio.gather(*(Client(PATH, body).ask(served.app) for body in bodies))

    whole, streamed, fine = served.run(ask_all())
    assert whole.status == 500 and json.loads(whole.text)["error"]["code"] == "request_failed"
    assert "could not be made (TypeError)" in streamed.text and "[DONE]" not in streamed.text
    assert json.loads(fine.text)["choices"] == expected and served.service.phase == "ready"


def test_an_answer_is_not_waited_for_by_passes(served):
    """While the front's event loop does nothing at all, every token is made; then the client gets each of them."""
    body = BODY | {"max_tokens": 100, "stream": True}

    async def ask():
        client = Client(PATH, body)
        asks = asyncio.create_task(client.ask(served.app))
        while not client.bodies:
            await asyncio.sleep(0.001)
        until(lambda: not served.llm.loop.has_unfinished, WAIT_S)  # holds up this loop
        await asks
        return client

    assert served.run(ask()).text.endswith("data: [DONE]\n\n")
