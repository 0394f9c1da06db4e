"""A watch that runs a fault told by the environment, on every rank of a command or a script.

The fault is Python text that defines `begin_pass(batch)` or `around(instruction, ctx, run)`; as `rank`, `folder` and
`failing()`, which notes the time, it has what it needs.
"""

import os
import time
from pathlib import Path

from penstock.engine.runtime.watch import Watch

TEXT, FOLDER = "TESTS_FAULT", "TESTS_FOLDER"
NAME = f"{__name__}:Told"


class Told(Watch):
    """Does what the fault of this process's environment defines."""

    def __init__(self):
        folder = os.environ[FOLDER]
        told = {"rank": int(os.environ.get("RANK", 0)), "folder": folder}
        told["failing"] = lambda: note_failure(Path(folder))
        exec(os.environ[TEXT], told)
        if "begin_pass" in told:
            self.begin_pass = told["begin_pass"]
        if "around" in told:
            self.around = told["around"]


def note_failure(folder: Path) -> None:
    """Notes that something fails now."""
    (folder / "failed_at").write_text(str(time.time()))
