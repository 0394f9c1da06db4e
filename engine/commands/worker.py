"""`penstock worker`: a rank that another process launched. Its config arrives as JSON on stdin; it serves until that
process says stop or is gone."""

import json

from penstock.engine.config import EngineConfig
from penstock.parallel.failure import exit_with_parent


def add_arguments(groups) -> None:
    """Adds nothing: it has no options of its own."""


def run(args, config: EngineConfig) -> int:
    message = exit_with_parent()
    from penstock.engine.runtime.start_engine import start_engine  # imports torch: the parent is watched before that
    from penstock.parallel.launch import resolve_launch

    start_engine(EngineConfig(**json.loads(message)), resolve_launch()).serve()
    return 0
