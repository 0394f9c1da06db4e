"""Facts that every record of benchmarks/ states beside its figures, and the writing of a record."""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from penstock.engine.version import VERSION
from penstock.parallel.topology import device_name


def machine(device: torch.device, num_devices: int = 1) -> dict[str, Any]:
    """Hardware, versions and commit (from PENSTOCK_COMMIT, since a script may run where no repository is)."""
    versions = {"penstock": VERSION, "torch": torch.__version__, "cuda": torch.version.cuda}
    return {
        "hardware": f"{num_devices} x {device_name(device)}",
        "versions": versions | {"python": platform.python_version()},
        "commit": os.environ.get("PENSTOCK_COMMIT", "unknown"),
    }


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --output-json, which vLLM's benchmarks have too."""
    parser.add_argument("--output-json", default=None, metavar="FILE", help="write the record there as well")


def keep(record: dict[str, Any], path: str | None) -> None:
    """Prints the record as the last line, one JSON object, and writes it to `path` if there is one.

    Raises ValueError naming the file if it cannot be written; the line is out by then.
    """
    print(json.dumps(record), flush=True)
    if path is not None:
        try:
            Path(path).write_text(json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"--output-json {path}: {error.strerror}") from None
