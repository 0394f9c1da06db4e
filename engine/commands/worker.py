"""`penstock worker`: a rank that another process launched. Its config arrives as JSON on stdin; it serves until that
process says stop or is gone."""

import json
import sys

from penstock.engine.config import EngineConfig
from penstock.parallel.failure import exit_with_parent


def add_arguments(parser) -> None:
    """None of its own."""


def run(args, config: EngineConfig) -> int:
    message = exit_with_parent()
    from penstock.engine.runtime.engine import Rank  # imports torch: the parent is watched before that
    from penstock.parallel.launch import resolve_launch

    rank = Rank(EngineConfig(**json.loads(message)), resolve_launch())
    print(rank.topology.describe(), file=sys.stderr)
    rank.serve()
    return 0
