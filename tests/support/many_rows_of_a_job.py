"""Runs a job of few rows and then one of many, without a model, and prints as JSON by how many bytes the process grew.

python -m tests.support.many_rows_of_a_job FOLDER NUM_ROWS
"""

import json
import sys
from pathlib import Path

from scripts.bench.peak_memory import resident_bytes
from tests.support.batch_jobs import StubLLM, run_here, write_many


def main() -> None:
    folder, num_rows = Path(sys.argv[1]), int(sys.argv[2])
    peaks = []
    for number in (1000, num_rows):
        given = write_many(folder / f"{number}.jsonl", number)
        assert run_here(StubLLM(), given, folder / f"{number}.out", "--order", "input") == 0
        peaks.append(resident_bytes())
    print(json.dumps({"grown_bytes": peaks[1] - peaks[0]}))


if __name__ == "__main__":
    main()
