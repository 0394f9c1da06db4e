"""Lines of an output: what a row gave, in OpenAI's batch format, the same bytes whenever the row runs.

    {"id": "batch_req_JOB_LINE", "custom_id": .., "response": {"status_code", "request_id", "body"}, "error": null}

A row that failed has `error`, and its response the status and body that a server would have answered with. Rows hold
no times but the job's, and nothing of what ran beside them.
"""

import json
from typing import Any

from penstock.engine.batch.job import Job
from penstock.engine.batch.row_form import row_id
from penstock.engine.batch.rows import Row
from penstock.engine.output import Sequence
from penstock.engine.server.answers import ChatAnswer, CompletionAnswer, Echo, Usage
from penstock.engine.server.errors import ApiError, failed
from penstock.engine.server.requests import Completion


def line_of(job: Job, row: Row, sequences: list[Sequence], echoes: list[Echo] | None, model: str) -> bytes:
    """The line of a row whose sequences have ended. `echoes` are its prompts, where they are to be given back, `model`
    is the name of one that it does not name."""
    error = next((sequence.error for sequence in sequences if sequence.error is not None), None)
    if error is not None:
        return error_line(job, row, failed(error))
    asked = row.asked
    shared = (asked.model or model, asked.params.logprobs or 0, job.created)
    answer = CompletionAnswer(*shared, echoes) if isinstance(asked, Completion) else ChatAnswer(*shared)
    answer.id = f"{answer.prefix}-{row_id(job.name, row.number)}"
    body = answer.whole(sequences, Usage.of(sequences, asked.params.n))
    del body["usage"]["prompt_tokens_details"]  # what was cached depends on what ran before
    return _line(job, row, 200, body, None)


def error_line(job: Job, row: Row, error: ApiError) -> bytes:
    """The line of a row that failed."""
    code = error.code or error.body["error"]["type"]
    told = error.message if error.place is None else f"{error.message}: {error.place}"
    return _line(job, row, error.status, error.body, {"code": code, "message": told})


def _line(job: Job, row: Row, status: int, body: dict[str, Any], error: dict[str, Any] | None) -> bytes:
    name = row_id(job.name, row.number)
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    content = {"id": f"batch_req_{name}", "custom_id": row.custom_id, "response": response, "error": error}
    return json.dumps(content).encode() + b"\n"
