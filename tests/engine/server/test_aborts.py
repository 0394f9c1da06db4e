"""Clients that go away while their sequences are in any state: each ends once and alone, and leaves nothing within two
passes."""

import asyncio
import dataclasses
import functools
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable

import pytest
from penstock.engine.server.delivery import GONE
from penstock.engine.server.messages import Abort, Message
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.request import Request, RequestState

from tests.support.llm_runs import WAYS
from tests.support.serving import CONFIG, Client, Serving, chunks_of, until

PATH = "/v1/completions"
BODY = {"temperature": 0, "ignore_eos": True, "max_tokens": 12}
PROMPTS = [list(range(5, 5 + length)) for length in (3, 30, 70, 100)]  # some in several chunks
AT_ONCE = 12  # three times as many as there are rows, whose pages are for two or three of them
NUM_PAGES = 11
STATES = ("queued", "prefill", "decoding", "gave way", "ended")
ANNOUNCED = "announced"  # its pass is, and has not begun


def state_of(request: Request) -> str:
    """The state of a request that has not been aborted."""
    if request.state is RequestState.FINISHED:
        return "ended"
    if request.state is RequestState.WAITING:
        return "gave way" if request.num_preemptions else "queued"
    return "decoding" if request.output_token_ids else "prefill"


class Aborts:
    """Aborts of one service, each by a client that goes away: right before the engine reads what came, it is told to,
    and waited for. `most` of each state, of clients that stream and of those that do not."""

    def __init__(self, served: Serving, monkeypatch, states: tuple[str, ...], most: int):
        self.served, self.loop = served, served.llm.loop
        self.counts = Counter()
        self.wanted = {(state, streams): most for state in states for streams in (True, False)}
        self.clients: dict[int, Client] = {}
        self.left: set[int] = set()  # clients that went away, or were told to
        self._known: dict[int, Request] = {}  # by id, when that was read last
        self._announced: set[int] = set()  # rows of a pass that has not begun
        self._sent: set[int] = set()  # ids in Abort messages
        self._freed: list[tuple[int, Request]] = []  # those that were aborted, and by which pass they must have left
        self._receive, self._send = self.loop._receive, served.service.engine._channel.send
        self._announce = self.loop.engine.announce
        monkeypatch.setattr(self.loop, "_receive", self.receive)
        monkeypatch.setattr(self.loop.engine, "announce", self.announce)
        monkeypatch.setattr(served.service.engine._channel, "send", self.send)

    @property
    def are_enough(self) -> bool:
        return all(self.counts[kind] >= most for kind, most in self.wanted.items())

    def send(self, message: Message) -> None:
        self._send(message)
        if isinstance(message, Abort):
            self._sent |= set(message.ids)

    def announce(self, batch: Batch) -> None:
        self._announced = {row.index for row in batch.rows}
        self._announce(batch)

    def receive(self) -> None:
        """Runs before a pass is sealed, and before one that was announced begins."""
        num_passes = self.served.llm.engine.times.num_passes
        for due, request in self._freed:
            assert num_passes < due or (request.row is None and not request.pages), (num_passes, due, request)
        self._freed = [(due, request) for due, request in self._freed if num_passes < due]
        now = {number: sequence.request for number, sequence in self.loop._sequences.items()}
        requests, self._known = (self._known | now).values(), now
        if kinds := self._kinds(requests):
            kind = min(kinds, key=lambda kind: self.counts[kind])
            self.counts[kind] += 1
            victim = kinds[kind]
            self._leave(kind[0], victim)
            if kind[0] != "ended":
                own = [one for one in requests if one.params.cache_salt == victim.params.cache_salt]
                self._freed += [(num_passes + 2, request) for request in own]
        self._announced = set()
        self._receive()

    def _kinds(self, requests: Iterable[Request]) -> dict[tuple[str, bool], Request]:
        """One request of each kind of which more are to be aborted."""
        kinds: dict[tuple[str, bool], Request] = {}
        for request in requests:
            number = int(request.params.cache_salt)
            if number not in self.left:
                streams = self.clients[number].body["stream"]
                kinds.setdefault((state_of(request), streams), request)
                if request.row in self._announced:
                    kinds[ANNOUNCED, streams] = request
        return {kind: request for kind, request in kinds.items() if self.counts[kind] < self.wanted.get(kind, 0)}

    def _leave(self, state: str, victim: Request) -> None:
        """Lets the client go. Of one whose sequence has ended the front may have heard that already: then it says
        nothing, and what it might have said is said twice."""
        self.left.add(int(victim.params.cache_salt))
        if state == "ended":
            for _ in range(2):
                send = functools.partial(self.served.service.engine._channel.send, Abort([victim.id], GONE))
                self.served.loop.call_soon_threadsafe(send)
        until(lambda: victim.id in self._sent)

    async def run(self) -> None:
        """Lets clients come until enough of each state went away, and then until the last one has its answer."""
        rng, numbers, asking = random.Random(1), itertools.count(), set()
        while not self.are_enough:
            while len(asking) < AT_ONCE:
                number = next(numbers)
                body = {"prompt": rng.choice(PROMPTS), "stream": rng.random() < 0.5, "n": rng.choice((1, 1, 2))}
                body["priority"] = -number  # who comes takes the rows of others
                leaves = functools.partial(lambda number, _: number in self.left, number)
                self.clients[number] = Client(PATH, BODY | body | {"cache_salt": f"{number}"}, leaves)
                if rng.random() < 0.2:
                    self.left.add(number)  # before anything of it has reached the engine
                asking.add(asyncio.create_task(self.clients[number].ask(self.served.app)))
            _, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            assert self.served.error is None
        await asyncio.gather(*asking)


def texts_of(client: Client) -> list[str]:
    """The texts of a client's choices."""
    if not client.body["stream"]:
        return [choice["text"] for choice in json.loads(client.text)["choices"]]
    texts = [""] * client.body["n"]
    for chunk in chunks_of(client.text):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    return texts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "most", [1, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])], ids=["few", "a-thousand"]
)
def test_an_abort_in_any_state_ends_its_sequences_alone(monkeypatch, way, most):
    """Those that stay have the texts that they have alone; each sequence ends once, for the metrics and for the log."""
    config = dataclasses.replace(CONFIG, max_model_len=128, num_pages=NUM_PAGES, **WAYS[way])
    served = Serving(config, max_num_queued_reqs=10_000).start()
    expected = {len(prompt): served.answer(PATH, prompt=prompt, **BODY)["choices"][0]["text"] for prompt in PROMPTS}
    until(served.at_rest)
    kept = served.kept
    kept.journeys.clear(), kept.records.clear()
    aborts = Aborts(served, monkeypatch, (*STATES, ANNOUNCED) if way == "prepared" else STATES, most)
    served.run(aborts.run(), most_s=1500)
    until(served.at_rest)
    until(lambda: len(kept.records) == len(aborts.clients))
    served.llm.loop.scheduler.check_integrity()
    assert aborts.counts == aborts.wanted
    ids = [journey.sequence.request.id for journey in kept.journeys]
    assert len(set(ids)) == len(ids) == sum(client.body["n"] for client in aborts.clients.values())
    stayed = [client for number, client in aborts.clients.items() if number not in aborts.left]
    for client in stayed:
        assert texts_of(client) == [expected[len(client.body["prompt"])]] * client.body["n"]
    num_gone = sum(record["error"] == "client_disconnected" for record in kept.records)
    assert num_gone == kept.num_disconnects >= sum(aborts.counts[kind] for kind in aborts.counts if kind[0] != "ended")
    assert served.service.phase == "ready"
    served.close()
