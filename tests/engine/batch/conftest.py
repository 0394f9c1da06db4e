"""One engine for all tests of jobs: the demo model, few rows at once, so that a small job has many passes."""

import json

import pytest

from penstock import LLM


@pytest.fixture(scope="package")
def llm():
    with LLM("demo", device="cpu", dtype="float32", max_model_len=64, max_num_seqs=4) as llm:
        yield llm


@pytest.fixture
def said(capsys):
    """The summary that the command printed since the last time, and the lines of standard error."""

    def take():
        out, err = capsys.readouterr()
        return json.loads(out) if out.strip() else {}, err.splitlines()

    return take
