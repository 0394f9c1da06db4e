"""`penstock split-device`: the device side of a split execution, which a host side launched. Its config arrives as JSON
on stdin, its calls over the socket that is named there; it ends when that is closed, or with its parent."""

import json
import socket

from penstock.engine.config import EngineConfig
from penstock.parallel.failure import exit_with_parent


def add_arguments(groups) -> None:
    """Adds nothing: it has no options of its own."""


def run(args, config: EngineConfig) -> int:
    told = json.loads(exit_with_parent())
    from penstock.engine.split.channel import run_device_side  # imports torch: the parent is watched before that

    run_device_side(EngineConfig(**told["config"]), told["wire_dtype"], socket.socket(fileno=told["socket"]))
    return 0
