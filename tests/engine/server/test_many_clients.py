"""Clients that come and go by the hundred: nothing of them stays, and one that stays gets a token in every pass."""

import asyncio
import dataclasses
import json
import os
import random
import threading
from collections import Counter

import psutil
import pytest
from penstock.scheduler.units import MIB

from tests.support.serving import CONFIG, Client, Serving, chunks_of, serving, until

PATHS = {
    "/v1/completions": {"prompt": "Return the number of"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
}
BODY = {"temperature": 0, "ignore_eos": True}
MOST_TOKENS = 200
STAYS = PATHS["/v1/completions"] | BODY | {"max_tokens": MOST_TOKENS, "stream": True}


def body_of(rng: random.Random) -> tuple[str, dict]:
    path = rng.choice(sorted(PATHS))
    rest = {"max_tokens": rng.choice((1, 5, 40)), "stream": rng.random() < 0.5, "n": rng.choice((1, 1, 3))}
    return path, PATHS[path] | BODY | {"temperature": 1, "seed": rng.randrange(9)} | rest


async def come_and_go(served: Serving, rng: random.Random, number: int, at_once: int) -> None:
    """Clients, some of which stay, some of which leave after a pass or more, and some of which read slowly."""
    gate = asyncio.Semaphore(at_once)

    async def one() -> None:
        path, body = body_of(rng)
        passes = served.llm.engine.times.num_passes + rng.choice((0, 1, 3, 10, 10**9))
        naps = rng.choice((0.0, 0.0, 0.01))
        takes = (lambda: asyncio.sleep(naps)) if naps else None
        async with gate:
            client = Client(path, body, lambda _: served.llm.engine.times.num_passes > passes, takes)
            await client.ask(served.app)
            assert client.status in (200, None), client.text

    await asyncio.gather(*(one() for _ in range(number)))


async def beside(served: Serving, rng: random.Random, number: int, at_once: int) -> Client:
    """One that stays, from before the others come until it has its answer."""
    stays = Client("/v1/completions", STAYS)
    asks = asyncio.create_task(stays.ask(served.app))
    while not stays.bodies:
        await asyncio.sleep(0.001)
    await come_and_go(served, rng, number, at_once)
    return await asks


async def ask_all(served: Serving, clients: list[Client]) -> None:
    await asyncio.gather(*(client.ask(served.app) for client in clients))


def text_of(client: Client) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks_of(client.text))


def passes_of(served: Serving, num_tokens: int) -> list[int]:
    """The passes, by number, in which the sequence with so many tokens got them."""
    (request_id,) = [j.sequence.request.id for j in served.kept.journeys if j.num_tokens == num_tokens]
    return [number for number, moved in enumerate(served.kept.passes) if request_id in moved]


def test_one_that_stays_gets_a_token_in_every_pass(served):
    served.kept.passes.clear()
    served.kept.journeys.clear()
    stays = served.run(beside(served, random.Random(1), number=16, at_once=8))
    assert stays.text.endswith("data: [DONE]\n\n") and stays.status == 200
    until(lambda: len(passes_of(served, MOST_TOKENS)) == MOST_TOKENS)  # the last one is noted behind its token
    numbers = passes_of(served, MOST_TOKENS)
    assert numbers == list(range(numbers[0], numbers[0] + MOST_TOKENS))
    until(served.at_rest)


async def beside_slow_readers(served: Serving, rng: random.Random) -> tuple[Client, list[Client]]:
    """One that stays, beside 64 that have rows and take nothing until it has its answer, and others of which 200 go
    away."""
    may_take, slow = asyncio.Event(), {"prompt": "def", "max_tokens": MOST_TOKENS - 1, "stream": True}
    readers = [Client("/v1/completions", BODY | slow, takes=may_take.wait) for _ in range(64)]
    reading = asyncio.gather(*(reader.ask(served.app) for reader in readers))
    while served.service.engine.num_unfinished < len(readers):
        await asyncio.sleep(0.001)
    stays = await beside(served, rng, number=100, at_once=12)
    while served.kept.num_disconnects < 200:
        await come_and_go(served, rng, number=50, at_once=12)
    assert not any(reader.bodies for reader in readers)
    may_take.set()
    await reading
    return stays, readers


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_one_beside_slow_readers_and_who_go_away_gets_a_token_in_every_pass():
    """And the text that it has without them."""
    config = dataclasses.replace(CONFIG, max_num_seqs=80, max_num_batched_tokens=256)
    with serving(config=config) as served:
        alone = served.run(Client("/v1/completions", STAYS).ask(served.app))
        served.kept.passes.clear()
        served.kept.journeys.clear()
        stays, readers = served.run(beside_slow_readers(served, random.Random(2)), 1500)
        until(served.at_rest)
        numbers = passes_of(served, MOST_TOKENS)
        assert numbers == list(range(numbers[0], numbers[0] + MOST_TOKENS))
        assert [text_of(client) for client in (stays, *readers[1:])] == [text_of(alone)] + [text_of(readers[0])] * 63
        served.llm.loop.scheduler.check_integrity()


@pytest.mark.soak
def test_nothing_stays_of_thousands_of_clients():
    """Memory, threads and open files are after many as after few."""
    with serving(max_num_queued_reqs=10_000) as served:
        process, sizes = psutil.Process(), []
        for round_ in range(6):
            served.run(come_and_go(served, random.Random(round_), number=500, at_once=64), 200)
            until(served.at_rest)
            for kept in (served.kept.records, served.kept.journeys, served.kept.passes):
                kept.clear()
            threads, files = threading.active_count(), len(os.listdir(f"/proc/{os.getpid()}/fd"))
            sizes.append((process.memory_info().rss, threads, files))
        (first_bytes, first_threads, first_files), (last_bytes, last_threads, last_files) = sizes[1], sizes[-1]
        assert last_bytes - first_bytes < 24 * MIB and last_files == first_files, sizes
        assert last_threads - first_threads <= 8, sizes  # pools begin their threads when they need them
        served.llm.loop.scheduler.check_integrity()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_flood_of_ten_thousand_is_answered_or_turned_away_and_leaves_nothing():
    """A thousand at a time, of which rows and queue hold twenty."""
    with serving(max_num_queued_reqs=16) as served:
        process, sizes, statuses = psutil.Process(), [], Counter()
        for _ in range(10):
            body = PATHS["/v1/completions"] | BODY | {"max_tokens": 5}
            clients = [Client("/v1/completions", body) for _ in range(1000)]
            served.run(ask_all(served, clients), 1500)
            until(served.at_rest)
            statuses += Counter(client.status for client in clients)
            away = [json.loads(client.text)["error"]["code"] for client in clients if client.status == 503]
            assert set(away) <= {"queue_full"}
            sizes.append(process.memory_info().rss)
        assert statuses[200] + statuses[503] == 10_000 and min(statuses[200], statuses[503]) >= 20
        assert sizes[-1] - sizes[1] < 24 * MIB, sizes
