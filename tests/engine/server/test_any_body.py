"""Whatever a body has, it is answered or refused: no request makes the server fail, nor the engine."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.engine.server.fields import CHAT, COMPLETION, DETOKENIZE, REFUSED, TOKENIZE

from tests.support.serving import Serving, until

ROUTES = {
    "/v1/completions": (COMPLETION, {"prompt": "def"}),
    "/v1/chat/completions": (CHAT, {"messages": [{"role": "user", "content": "Hello"}]}),
    "/tokenize": (TOKENIZE, {"prompt": "def"}),
    "/detokenize": (DETOKENIZE, {"tokens": [5]}),
}
TEXT = st.text(max_size=8)
NUMBERS = st.integers(-3, 3000) | st.integers() | st.floats() | st.just(0.5)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]) | LEAVES, "content": LEAVES})
VALUES = st.recursive(
    LEAVES | MESSAGES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def requests(draw):
    """A route and a body, most of whose fields may be meant."""
    path = draw(st.sampled_from(sorted(ROUTES)))
    fields, good = ROUTES[path]
    some = st.dictionaries(st.sampled_from(sorted([*fields, *REFUSED, "best_of", "user"])), VALUES, max_size=3)
    body = {"temperature": 1, "seed": 5} | (good if draw(st.integers(0, 5)) else {}) | draw(some)
    return path, body | {"max_tokens": 2, "max_completion_tokens": 2}


def check(served: Serving, path: str, body: dict) -> None:
    """Asserts that a body is answered or refused, and that nothing of it stays."""
    content = json.dumps(body).encode()
    response = served.call("POST", path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert served.service.phase == "ready"
    until(served.at_rest)


@settings(max_examples=80)
@given(request=requests())
def test_a_body_is_answered_or_refused(shared, request):
    check(shared, *request)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@settings(max_examples=10_000)
@given(request=requests())
def test_ten_thousand_bodies_are_answered_or_refused(shared, request):
    check(shared, *request)
