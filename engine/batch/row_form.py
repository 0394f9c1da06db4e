"""The form of a row in an output: how its bytes begin and end, which tells rows of a job from all else.

{"id": "batch_req_JOB_LINE", "custom_id": .., "response": .., "error": null}
"""

import re
from dataclasses import dataclass

JOB_CHARACTERS = 16  # of a job's name, in ids
_HEAD = re.compile(rb'\{"id": "batch_req_([0-9a-f]{%d})_(\d{1,18})", "custom_id": ' % JOB_CHARACTERS)
_DONE, _FAILED = b'"error": null}\n', b"}}\n"


@dataclass(frozen=True)
class RowForm:
    """The form of the rows of one job."""

    job: str

    def is_row(self, line: bytes) -> bool:
        """Tells whether a line, with its end, is a whole row of this job."""
        head = _HEAD.match(line)
        return head is not None and head[1].decode() == self.job[:JOB_CHARACTERS] and line.endswith((_DONE, _FAILED))

    def is_torn(self, line: bytes) -> bool:
        """Tells whether this is what a kill in the midst of a write left, or, with zeros, a power failure."""
        start = f'{{"id": "batch_req_{self.job[:JOB_CHARACTERS]}_'.encode()
        return b"\0" in line or (not line.endswith(b"\n") and line[: len(start)] == start[: len(line)])


def row_id(job: str, number: int) -> str:
    """The name of the row of a line, in ids."""
    return f"{job[:JOB_CHARACTERS]}_{number}"


def number_of(line: bytes) -> int:
    """The line in the input of a row."""
    return int(_HEAD.match(line)[2])


def has_failed(line: bytes) -> bool:
    """Tells whether a row has an error."""
    return not line.endswith(_DONE)
