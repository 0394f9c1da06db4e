"""One engine on the demo model for all tests of this folder that need no process of their own."""

import pytest
from penstock.engine.llm import LLM

from tests.support.serving import CONFIG, Serving, serving, until


@pytest.fixture(scope="session")
def shared():
    with serving() as served:
        yield served


@pytest.fixture(scope="session")
def alone():
    """The same engine without a server: what it gives is expected."""
    with LLM(**CONFIG.to_dict()) as llm:
        yield llm


@pytest.fixture
def served(shared) -> Serving:
    """The shared service, at rest before and after."""
    until(shared.at_rest)
    shared.llm.reset_prefix_cache()
    yield shared
    until(shared.at_rest)
