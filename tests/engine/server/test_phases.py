"""A service while it loads, while it drains and once its engine has ended; keys; and who may wait."""

import asyncio
import dataclasses
import json
import threading
import time
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
from penstock.engine.llm import LLM
from penstock.engine.runtime import heap
from penstock.engine.server import service
from penstock.engine.server.admission import Admission
from penstock.engine.server.encoding import sequences_of
from penstock.engine.server.errors import ApiError
from penstock.engine.server.metrics import Metrics
from penstock.engine.server.options import ServeOptions
from penstock.engine.server.outbox import Outbox
from penstock.engine.server.remote_engine import RemoteEngine
from penstock.engine.server.server import Server
from penstock.engine.text.model_prompts import ModelPrompts

from penstock import SamplingParams
from tests.support.serving import CONFIG, WAIT_S, Client, Serving, until
from tests.support.watches import BeginPass

PATH = "/v1/completions"
LONG = {"prompt": "Return the number of", "temperature": 0, "max_tokens": 100, "ignore_eos": True}


def error_of(response) -> tuple[int, str, dict]:
    return response.status_code, response.json()["error"]["code"], response.headers


def test_while_it_loads_models_are_listed_and_nothing_is_answered():
    may_load = threading.Event()
    served = Serving(make=lambda: may_load.wait(WAIT_S) and LLM(**CONFIG.to_dict())).begin()
    models = served.call("GET", "/v1/models")
    assert models.status_code == 200 and models.json()["data"][0]["max_model_len"] is None
    health = served.call("GET", "/health")
    assert (health.status_code, health.content) == (503, b"")
    for path, body in ((PATH, LONG), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        status, code, headers = error_of(served.post(path, **body))
        assert (status, code) == (503, "loading") and 1 <= int(headers["retry-after"]) <= 60
    assert served.call("GET", "/status").json()["phase"] == "loading"
    may_load.set()
    until(lambda: served.service.phase == "ready")
    assert served.call("GET", "/health").status_code == 200
    assert served.answer(PATH, **LONG | {"max_tokens": 2})["usage"]["completion_tokens"] == 2
    served.close()


def test_an_engine_that_cannot_be_loaded_is_dead():
    def fail():
        raise ValueError("no such model")

    served = Serving(make=fail).begin()
    until(lambda: served.service.phase == "dead" and served.error)
    assert str(served.error) == "no such model"
    assert served.call("GET", "/health").status_code == 503
    served.close()


def test_when_the_engine_fails_every_client_is_told():
    served = Serving().start()

    def fail(batch) -> None:
        if served.llm.engine.times.num_passes >= 5:
            raise RuntimeError("the device is lost")

    async def ask_all():
        bodies = [LONG | {"stream": True}, LONG, LONG | {"n": 2}, LONG | {"prompt": ["a"] * 20}]
        return await asyncio.gather(*(Client(PATH, body).ask(served.app) for body in bodies))

    with served.llm.engine.watched_by(BeginPass(fail)):
        streamed, *whole = served.run(ask_all())
    until(lambda: served.service.phase == "dead")
    last = json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))
    assert last["error"]["code"] == "engine_dead" and "[DONE]" not in streamed.text
    assert [(client.status, json.loads(client.text)["error"]["code"]) for client in whole] == [(503, "engine_dead")] * 3
    status, code, headers = error_of(served.post(PATH, **LONG))
    assert (status, code, headers["x-should-retry"]) == (503, "engine_dead", "false") and "retry-after" not in headers
    assert served.call("GET", "/health").status_code == 503 and served.call("GET", "/v1/models").status_code == 200
    until(lambda: served.error)
    assert "lost" not in streamed.text and str(served.error) == "the device is lost"
    served.close()


def test_while_it_drains_new_requests_are_turned_away_and_old_ones_end(served):
    async def ask():
        old = asyncio.create_task(Client(PATH, LONG | {"max_tokens": 30, "stream": True}).ask(served.app))
        while not served.service.engine.num_unfinished:
            await asyncio.sleep(0.001)
        served.service.is_draining = True
        new = await Client(PATH, LONG).ask(served.app)
        return await old, new

    old, new = served.run(ask())
    try:
        assert old.text.endswith("data: [DONE]\n\n")
        assert (new.status, json.loads(new.text)["error"]["code"]) == (503, "shutting_down")
        assert served.call("GET", "/health").status_code == 503
        assert served.call("GET", "/v1/models").status_code == 200
    finally:
        served.service.is_draining = False


def test_an_engine_that_was_told_to_end_has_not_failed():
    """Who comes between its end and the server's is told that the server goes."""
    served = Serving().start()

    async def end() -> None:
        served.service.engine.stop()
        served.service.engine.fail()

    served.run(end())
    status, code, headers = error_of(served.post(PATH, **LONG))
    assert (status, code) == (503, "shutting_down") and "retry-after" in headers
    assert served.call("GET", "/status").json()["phase"] == "draining"
    served.close()


def test_an_end_of_all_is_told_to_every_client(served):
    async def ask():
        asks = [asyncio.create_task(Client(PATH, LONG | {"stream": s}).ask(served.app)) for s in (True, False)]
        while served.service.engine.num_unfinished < 2:
            await asyncio.sleep(0.001)
        served.service.abort_all()
        return await asyncio.gather(*asks)

    streamed, whole = served.run(ask())
    last = json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))
    assert last["error"]["code"] == "shutting_down"
    assert (whole.status, json.loads(whole.text)["error"]["code"]) == (503, "shutting_down")


def test_beyond_the_queue_a_request_is_turned_away_with_the_predicted_wait(served):
    """Four rows and two that may wait, while the passes stand still."""
    admission = served.service.admission
    may_go = threading.Event()

    async def ask_all():
        asks = []
        for number in range(6):
            asks.append(asyncio.create_task(Client(PATH, LONG | {"max_tokens": 4}).ask(served.app)))
            while served.service.engine.num_unfinished <= number:
                await asyncio.sleep(0.001)
        late = await Client(PATH, LONG).ask(served.app)
        may_go.set()
        return late, await asyncio.gather(*asks)

    most, admission._most_queued = admission._most_queued, 2
    num_rejected = served.kept.rejected.count("queue_full")
    try:
        with served.llm.engine.watched_by(BeginPass(lambda batch: may_go.wait(WAIT_S))):
            late, others = served.run(ask_all())
    finally:
        admission._most_queued = most
    assert (late.status, json.loads(late.text)["error"]["code"]) == (503, "queue_full")
    assert served.kept.rejected.count("queue_full") == num_rejected + 1
    assert [client.status for client in others] == [200] * 6


def test_every_sequence_of_a_request_takes_a_place_in_the_queue(served, monkeypatch):
    """Four rows and two that may wait: six sequences fill them, of one request or of several."""
    admission, engine = served.service.admission, served.service.engine
    monkeypatch.setattr(admission, "_most_queued", 2)
    may_go, short = threading.Event(), LONG | {"max_tokens": 2}

    async def ask_all():
        first = asyncio.create_task(Client(PATH, short | {"n": 3}).ask(served.app))
        while engine.num_unfinished < 3:
            await asyncio.sleep(0.001)
        many = [short | {"n": 4}, short | {"prompt": ["a", "b"], "n": 2}, short | {"prompt": ["a"] * 4}]
        late = [await Client(PATH, body).ask(served.app) for body in many]
        fits = asyncio.create_task(Client(PATH, short | {"n": 3}).ask(served.app))
        while engine.num_unfinished < 6:
            await asyncio.sleep(0.001)
        late.append(await Client(PATH, short).ask(served.app))
        may_go.set()
        return late, await asyncio.gather(first, fits)

    with served.llm.engine.watched_by(BeginPass(lambda batch: may_go.wait(WAIT_S))):
        late, others = served.run(ask_all())
    codes = [(client.status, json.loads(client.text)["error"]["code"]) for client in late]
    assert codes == [(503, "queue_full")] * 4 and [client.status for client in others] == [200] * 2
    assert len(served.answer(PATH, **short | {"n": 6})["choices"]) == 6
    for never in (short | {"n": 7}, short | {"prompt": ["a"] * 7}):
        refused = served.post(PATH, **never)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"


def test_a_priority_is_refused_where_who_comes_first_is_served_first(served, monkeypatch):
    """As vLLM does: it would be ignored."""
    model = served.service.model
    config = dataclasses.replace(model.config, scheduling_policy="fcfs")
    vocab_size = served.llm.engine.plan.spec.vocab_size
    monkeypatch.setattr(served.service, "model", ModelPrompts(config, model.tokenizer, vocab_size, model.limits))
    for path, body in ((PATH, LONG), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})):
        for priority, status in ((1, 400), (-1, 400), (0, 200), (None, 200)):
            response = served.post(path, **body | {"priority": priority, "max_tokens": 1})
            assert response.status_code == status, response.text
            assert status == 200 or response.json()["error"]["param"] == "priority"


def test_those_whose_texts_are_being_encoded_count_too(served, monkeypatch):
    """A flood of a hundred, of which a queue of none lets in as many as there are rows."""
    may_go = threading.Event()
    monkeypatch.setattr(service, "sequences_of", lambda *asked: may_go.wait(WAIT_S) and sequences_of(*asked))
    monkeypatch.setattr(served.service.admission, "_most_queued", 0)

    async def flood():
        asks = [asyncio.create_task(Client(PATH, LONG | {"max_tokens": 2}).ask(served.app)) for _ in range(100)]
        while sum(task.done() for task in asks) < 96:
            await asyncio.sleep(0.001)
        may_go.set()
        return await asyncio.gather(*asks)

    statuses = sorted(client.status for client in served.run(flood()))
    assert statuses == [200] * 4 + [503] * 96


def test_the_predicted_wait_grows_with_the_queue_and_is_bounded(served):
    """A request that is sent to the engine counts at once, before that says anything of it."""
    engine = RemoteEngine(Metrics())
    engine.facts, engine.state = served.service.engine.facts, served.service.engine.state
    admission, waits = Admission(engine, most_queued=10**6, most_wait_s=1e9), [0.0]
    assert admission._predict() == 0.0 and engine.state.pass_s > 0
    engine._send = lambda message: None
    for number in (100, 900):
        engine.add(Outbox(served.service.model.sequences([5] * 9, SamplingParams(n=number)), number))
        waits.append(admission._predict())
    assert 0 < waits[1] < waits[2]
    admission = Admission(engine, most_queued=10**6, most_wait_s=waits[2] / 2)
    with pytest.raises(ApiError, match="it would wait") as raised:
        admission.check()
    assert raised.value.wait_s == waits[2] and raised.value.headers["Retry-After"]


def test_with_a_key_only_the_page_and_health_are_open(served):
    locked = Serving(api_key="secret-key")
    locked.service.engine, locked.service.model = served.service.engine, served.service.model
    paths = (
        "/v1/models",
        "/v1/models/demo",
        "/version",
        "/status",
        "/metrics",
        "/openapi.json",
        "/tokenizer_info",
        "/v1/no",
    )
    for headers in (
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer secret-kez"},
        {"authorization": "secret-key"},
    ):
        for path in paths:
            response = locked.call("GET", path, headers=headers)
            status, code, told = error_of(response)
            assert (status, code, told["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
            assert "secret" not in response.text
        for path in (PATH, "/v1/chat/completions", "/tokenize", "/detokenize", "/health/"):
            assert locked.call("POST", path, json=LONG, headers=headers).status_code == 401
            assert locked.call("OPTIONS", path, headers=headers).status_code == 401
    assert locked.call("GET", "/health").status_code == 200
    assert locked.call("GET", "/v1/models", headers={"authorization": "bearer secret-key"}).status_code == 200
    locked.close()
    open_metrics = Serving(api_key="k", metrics_without_key=True)
    assert open_metrics.call("GET", "/metrics").status_code != 401
    open_metrics.close()


def test_who_lacks_the_key_is_counted_and_logged_as_others_who_are_refused():
    """With nothing that the client wrote: of other paths, which it may choose, there is no line."""
    locked = Serving(api_key="secret-key")
    for headers in ({}, {"authorization": "Bearer secret-kez"}):
        for method, path in (("POST", PATH), ("POST", "/v1/chat/completions"), ("GET", PATH), ("GET", "/secret")):
            assert locked.call(method, path, headers=headers).status_code == 401
    assert locked.kept.rejected == ["invalid_api_key"] * 8
    shown = locked.call("GET", "/metrics", headers={"authorization": "Bearer secret-key"}).text
    assert 'penstock:admission_rejections_total{reason="invalid_api_key"} 8.0' in shown
    records = locked.kept.records
    assert all(time.time() - record.pop("came") < WAIT_S for record in records)
    assert records == 2 * [
        {"route": route, "status": 401, "error": "invalid_api_key", "param": None}
        for route in ("completions", "chat/completions")
    ]
    locked.close()


def test_without_a_key_this_machine_is_not_asked_under_another_name(served):
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil.example", "[::1"):
        num_rejected = len(served.kept.rejected)
        response = served.call("GET", "/v1/models", headers={"host": host})
        assert response.status_code == 400 and response.json()["error"]["message"].startswith("Host: "), host
        assert served.kept.rejected[num_rejected:] == ["invalid"]
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "192.168.0.5"):
        assert served.call("GET", "/v1/models", headers={"host": host}).status_code == 200, host
    for options in ({"api_key": "k"}, {"host": "0.0.0.0"}):
        open_to_names = Serving(**options)
        headers = {"host": "my.example", "authorization": "Bearer k"}
        assert open_to_names.call("GET", "/v1/models", headers=headers).status_code == 200
        open_to_names.close()


def test_options_that_cannot_be_meant_are_refused():
    for wrong in (
        {"port": 70000}, {"max_num_queued_reqs": -1}, {"shutdown_timeout": -1}, {"max_queue_wait": 0},
        {"api_key": "a\nb"}, {"api_key": ""}, {"served_model_name": "a,,b"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ServeOptions(**wrong)
    assert ServeOptions(served_model_name="a/b, c").names("demo") == ["a/b", "c"]


@pytest.mark.parametrize("phase", ["ready", "dead"])
def test_a_front_that_is_ready_sets_its_modules_aside(phase, monkeypatch):
    """So that a full collection does not hold up its clients."""
    called, server = [], object.__new__(Server)
    monkeypatch.setattr(heap, "set_aside", lambda: called.append("aside"))
    server.service = SimpleNamespace(open=AsyncMock(), phase=phase, started_s=0.0)
    server._changed, server._say = asyncio.Event(), lambda text: called.append("said")
    asyncio.run(server._open())
    assert called == (["aside", "said"] if phase == "ready" else [])
