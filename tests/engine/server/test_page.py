"""The page at /, in a browser: a message is sent and its answer appears, gauges move, texts stay texts; a key is asked
for, and a server that is gone is called so."""

import re

import pytest
from penstock.engine.output import Sequence
from penstock.engine.server.pages import HEADERS, PAGE

from tests.support.browser import CHROMIUM, WHY_NOT, browser
from tests.support.listening import Listening

pytestmark = pytest.mark.timeout(120)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
ANSWER = "document.querySelector('#messages .message:last-child {}').textContent"
HOSTILE = "<img src=x onerror=window.hit=1><b>bold</b>"


@pytest.fixture(scope="module")
def server():
    listening = Listening(resident="none")
    yield listening
    listening.close()


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        page.look(1280, 800)
        page.open(server.url)
        yield page


def test_the_page_loads_nothing_and_makes_no_markup_of_texts():
    source = PAGE.read_text()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", source)
    assert not re.findall(r"https?:|\bsrc=|@import|url\(", source)
    assert "default-src 'none'; connect-src 'self'" in HEADERS["Content-Security-Policy"]


def test_page_and_metrics_are_routes(served):
    shown, told = served.call("GET", "/"), served.call("GET", "/metrics")
    assert shown.text == PAGE.read_text() and shown.headers["content-type"].startswith("text/html")
    assert all(shown.headers[name] == value for name, value in HEADERS.items())
    assert "penstock:generation_tokens_total" in told.text and told.headers["content-type"].startswith("text/plain")
    assert served.call("HEAD", "/metrics").status_code == 200


@needs_chromium
def test_a_message_is_sent_tokens_appear_and_gauges_move(page):
    page.until("document.getElementById('phase').textContent", lambda phase: phase == "ready")
    page.until("document.getElementById('rows').textContent", lambda rows: rows == "0 of 4")
    before = page.text("tokens-note")
    page.type("text", f"Return the {HOSTILE}")
    page.until(ANSWER.format(".text"), lambda text: len(text) > 10)
    page.until(ANSWER.format(".note"), lambda note: " tokens in " in note)
    page.until("document.getElementById('tokens-note').textContent", lambda passes: passes not in (before, ""))
    page.until("document.getElementById('tokens').textContent", lambda tokens: tokens not in ("0.0", "–"))
    assert page.text("link").endswith("%") and page.text("pass").endswith("s")
    assert page.run("document.querySelectorAll('#tokens-curve polyline')[0].getAttribute('points').length") > 10
    assert "groups stream" in page.text("plan")
    assert page.run("document.querySelector('.message.user .text').textContent") == f"Return the {HOSTILE}"
    assert page.run("document.querySelectorAll('#messages img, #messages b').length") == 0
    assert page.run("window.hit") is None and page.errors == []


@needs_chromium
def test_an_answer_that_fails_in_its_middle_is_shown_as_such(page, monkeypatch):
    push = Sequence.push

    def failing(sequence, token):
        if len(sequence.request.output_token_ids) == 3:
            raise RuntimeError("of a tokenizer")
        return push(sequence, token)

    monkeypatch.setattr(Sequence, "push", failing)
    page.type("text", "def")
    page.until(ANSWER.format(".text"), lambda text: text.endswith("its text could not be made (RuntimeError)"))
    assert page.run("document.querySelectorAll('.message.failed').length") == 1


@needs_chromium
def test_a_page_without_room_scrolls_in_one_direction_only(page):
    page.look(390, 844, dark=True)
    assert page.run("document.documentElement.scrollWidth") == 390
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(15, 20, 25)"
    page.look(1280, 800)


@needs_chromium
def test_a_key_is_asked_for_and_a_server_that_is_gone_is_unreachable(page, server):
    server.key = "a key"
    page.until("document.getElementById('key-dialog').open")
    assert page.text("phase") == "key needed"
    page.type("key", "a key")
    page.until("document.getElementById('phase').textContent", lambda phase: phase == "ready")
    assert not page.run("document.getElementById('key-dialog').open") and page.errors == []
    server.stop_http()
    page.until("document.getElementById('phase').textContent", lambda phase: phase == "unreachable")
    assert page.run("document.getElementById('machine').classList.contains('stale')")
