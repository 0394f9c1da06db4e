"""`penstock serve` answers OpenAI's API over HTTP. What it says goes to standard error.

Under torchrun rank 0 serves, and the others compute with it.
"""

import argparse
import dataclasses
import os
import signal
import sys
import warnings

from penstock.engine.commands.flags import Groups, add_flag
from penstock.engine.commands.said import say_before
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.runtime.progress import Progress
from penstock.engine.text.model_text import has_tokenizer
from penstock.parallel.launch import resolve_launch

try:
    from penstock.engine.server.generation_defaults import FILE, read_defaults
    from penstock.engine.server.options import FIELDS, KEY_VARIABLE, ServeOptions
    from penstock.engine.server.request_log import request_log
    from penstock.engine.server.server import Server, bind
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "penstock":
        raise
    MISSING = error.name
else:
    MISSING = None


def add_arguments(groups: Groups) -> None:
    if MISSING is None:
        for field in FIELDS:
            add_flag(groups.everyday, field)


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    if MISSING is not None:
        raise ValueError(f"penstock serve needs {MISSING}: pip install 'penstock[serve]'")
    options = options_of(args)
    if resolve_launch(config.tensor_parallel_size).rank > 0:
        return follow(config)
    listener = bind(options.host, options.port)
    defaults = read_defaults(config) if options.generation_config == "auto" else {}
    address, port = listener.getsockname()[:2]
    say(f"listening on http://{f'[{address}]' if ':' in address else address}:{port}, loading {config.model}")
    if defaults:
        shown = ", ".join(f"{name} {value}" for name, value in defaults.items())
        say(f"defaults of {FILE}: {shown} (--generation-config none leaves them out)")
    if not has_tokenizer(config):
        say("this model has no tokenizer: prompts are token ids, and answers have no text")
    # a text of a request is not for the log
    warnings.filterwarnings("ignore", message="stop=")
    start = Progress()
    with request_log(options.request_log) as log:
        Server(config, options, lambda: leading(config, start), defaults, say, log, start).run(listener)
    return 0


def follow(config: EngineConfig) -> int:
    """Does what rank 0 says until that one ends: torchrun tells all ranks when they are to end, and rank 0 answers its
    clients first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with LLM(**config.to_dict()) as llm:
        llm.serve()
    return 0


def options_of(args: argparse.Namespace) -> "ServeOptions":
    """The options that flags give, and the key of the environment."""
    given = {field.name: getattr(args, field.name) for field in FIELDS if hasattr(args, field.name)}
    options = ServeOptions(**given)
    return options if options.api_key else dataclasses.replace(options, api_key=os.environ.get(KEY_VARIABLE))


def leading(config: EngineConfig, start: Progress) -> LLM:
    """The engine, whose other ranks follow; says what streams, and how fast that is."""
    llm = LLM(**config.to_dict(), progress=start)
    llm.lead()
    say_before(llm, llm.loop.scheduler.max_num_seqs, verbose=False, table=False)
    return llm


def say(line: str) -> None:
    print(f"penstock serve: {line}", file=sys.stderr, flush=True)
