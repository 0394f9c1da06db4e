"""`penstock engine`: the process of a server's engine, started by its front (engine_process.py). The config and the
descriptor of the channel arrive as JSON on stdin; it works until the front says stop or is gone. Signals that reach all
processes of a service are for the front, which answers its clients first."""

import json
import socket

from penstock.engine.config import EngineConfig
from penstock.engine.server.signals import ignore
from penstock.parallel.failure import exit_with_parent


def add_arguments(groups) -> None:
    """Adds nothing: it has no options of its own."""


def run(args, config: EngineConfig) -> int:
    ignore()
    told = json.loads(exit_with_parent())
    from penstock.engine.commands.said import say_before  # imports torch: the front is watched before that
    from penstock.engine.llm import LLM
    from penstock.engine.server.channel import Channel
    from penstock.engine.server.engine_work import EngineWork

    def make(progress) -> LLM:
        llm = LLM(**told["config"], progress=progress)
        llm.lead()
        say_before(llm, llm.loop.scheduler.max_num_seqs)
        return llm

    with socket.socket(fileno=told["channel"]) as end:
        end.set_inheritable(False)  # it is to end with this process, not with its ranks
        EngineWork(make, Channel(end)).run()
    return 0
