"""`penstock serve` answers OpenAI's API over HTTP. What it says goes to standard error.

This process is the front: it starts the engine's (commands/engine.py), and has no torch. Under torchrun rank 0 serves,
and the others compute with its engine.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import warnings

from penstock.engine.commands.check_model import check_model
from penstock.engine.commands.flags import Groups, add_flag
from penstock.engine.config import EngineConfig
from penstock.engine.planning.find_model import find_model
from penstock.engine.server.engine_process import EngineProcess
from penstock.engine.server.generation_defaults import FILE, read_defaults
from penstock.engine.server.listener import bind
from penstock.engine.server.open_files import allow_many
from penstock.engine.server.options import FIELDS, KEY_VARIABLE, ServeOptions
from penstock.engine.server.request_log import request_log
from penstock.engine.server.signals import heard_by, ignore
from penstock.engine.text.model_text import has_tokenizer
from penstock.engine.weights.read_model import check_there
from penstock.parallel.launch import resolve_launch

NEEDED = ("fastapi", "starlette", "uvicorn", "h11", "prometheus_client")
MISSING = next((name for name in NEEDED if importlib.util.find_spec(name) is None), None)


def add_arguments(groups: Groups) -> None:
    for field in FIELDS:
        add_flag(groups.everyday, field)


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    if MISSING is not None:
        raise ValueError(f"penstock serve needs {MISSING}: pip install 'penstock[serve]'")
    options = options_of(args)
    if resolve_launch(config.tensor_parallel_size).rank > 0:
        return follow(config)
    allow_many()
    # nobody is served before the server hears signals itself
    with bind(options.host, options.port) as listener, request_log(options.request_log) as log, heard_by(sys.exit):
        check_there(find_model(config.model))  # all the rest of the model may take a while
        address, port = listener.getsockname()[:2]
        say(f"listening on http://{f'[{address}]' if ':' in address else address}:{port}, loading {config.model}")
        check_model(config)
        defaults = read_defaults(config) if options.generation_config == "auto" else {}
        process = EngineProcess(config)
        from penstock.engine.server.metrics import Metrics  # these come in while the engine's process loads
        from penstock.engine.server.server import Server
        from penstock.engine.server.service import Service

        if defaults:
            shown = ", ".join(f"{name} {value}" for name, value in defaults.items())
            say(f"defaults of {FILE}: {shown} (--generation-config none leaves them out)")
        if not has_tokenizer(config):
            say("this model has no tokenizer: prompts are token ids, and answers have no text")
        # a text of a request is not for the log
        warnings.filterwarnings("ignore", message="stop=")
        return Server(Service(config, options, defaults, Metrics(), log), process, say).run(listener)


def follow(config: EngineConfig) -> int:
    """Does what rank 0 says until that one ends: torchrun tells all ranks when they are to end, and rank 0 answers its
    clients first."""
    ignore()
    from penstock.engine.llm import LLM  # with torch, which rank 0 has in another process

    with LLM(**config.to_dict()) as llm:
        llm.serve()
    return 0


def options_of(args: argparse.Namespace) -> ServeOptions:
    """The options that flags give, and the key of the environment."""
    given = {field.name: getattr(args, field.name) for field in FIELDS if hasattr(args, field.name)}
    options = ServeOptions(**given)
    return options if options.api_key else dataclasses.replace(options, api_key=os.environ.get(KEY_VARIABLE))


def say(line: str) -> None:
    print(f"penstock serve: {line}", file=sys.stderr, flush=True)
