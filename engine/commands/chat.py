"""`penstock chat` talks with a model in the terminal: each line is a message, and the conversation so far goes with it.

Answers go to standard output as they are generated, everything else to standard error. Lines that begin with a slash
are commands (COMMANDS). Ctrl-C ends an answer, or the chat where none is under way, as the end of the input does.
"""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock.engine.commands.flags import Groups
from penstock.engine.commands.generate import SAMPLING_FLAGS, add_sampling_arguments, sampling_params
from penstock.engine.config import EngineConfig
from penstock.engine.output import RequestOutput
from penstock.engine.text.model_text import check_chat
from penstock.parallel.launch import resolve_launch
from penstock.scheduler.batching.request import SamplingParams, TooLong
from penstock.scheduler.units import show_time

if TYPE_CHECKING:
    from penstock.engine.llm import LLM

try:
    import readline  # with it input() edits lines
except ImportError:
    readline = None

COMMANDS = {
    "/stats": "how fast the answers came, and how long the conversation is",
    "/reset": "begin a new conversation",
    "/help": "these commands",
    "/exit": "leave, as Ctrl-D does",
}


def add_arguments(groups: Groups) -> None:
    add_sampling_arguments(groups, (name for name in SAMPLING_FLAGS if name not in ("n", "logprobs", "max_tokens")))
    text = "most tokens of an answer (default: what the context leaves)"
    groups.everyday.add_argument("--max-tokens", type=int, metavar="N", dest="sampling_max_tokens", help=text)
    text = "how the model is to behave: the first message of every conversation"
    groups.everyday.add_argument("--system", metavar="TEXT", help=text)


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    if resolve_launch(config.tensor_parallel_size).kind == "torchrun":
        raise ValueError("penstock chat starts its ranks itself: give -tp N instead of torchrun")
    params = sampling_params(args)
    check_chat(config)
    from penstock.engine.commands.said import say_before  # with torch, which takes a second
    from penstock.engine.llm import LLM

    with LLM(**config.for_job(1).to_dict()) as llm:
        say_before(llm, 1)
        llm.engine.times.keep()
        print(f"commands: {', '.join(COMMANDS)}", file=sys.stderr)
        talk(Chat(llm, params, args.system), read_lines())
    return 0


def read_lines() -> Iterator[str]:
    """Lines of the terminal, asked for and edited there, or of another standard input."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield from sys.stdin or ()
        return
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    print(file=sys.stderr)


@dataclass
class Chat:
    """A conversation. `outputs` are those of all answers, `answer_s` the seconds that they took."""

    llm: "LLM"
    params: SamplingParams
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, text: str, on_text: Callable[[str], None]) -> str | None:
        """Answers a message; `on_text` gets the text as it comes, and ends the answer by raising Stopped. Returns an
        error that ended it. Raises ValueError, with the conversation as it was, for a message that cannot be
        answered."""
        asked = [*self.messages, {"role": "user", "content": text}]
        start = time.perf_counter()
        try:
            (output,) = self.llm.chat(asked, self.params, on_text=lambda _, __, piece: piece and on_text(piece))
        except Stopped as stopped:
            (output,) = stopped.outputs
        self.answer_s.append(time.perf_counter() - start)
        self.outputs.append(output)
        (sequence,) = output.outputs
        self.messages = [*asked, {"role": "assistant", "content": sequence.text}]
        return sequence.error if sequence.finish_reason == "error" else None

    def stats(self) -> None:
        """Says how the answers went."""
        if not self.outputs:
            print("no answer yet", file=sys.stderr)
            return
        from penstock.engine.commands.said import say_after

        last = self.outputs[-1]
        num_tokens = len(last.outputs[0].token_ids)
        held = f"{len(last.prompt_token_ids)} + {num_tokens} of {self.llm.loop.scheduler.max_model_len} tokens"
        print(f"the last answer: {num_tokens} tokens in {show_time(self.answer_s[-1])}; held {held}", file=sys.stderr)
        print("all answers: ", end="", file=sys.stderr)
        say_after(self.llm, self.outputs, sum(self.answer_s), verbose=False)


class Stopped(Exception):
    """The user has ended an answer; `outputs` is what there was by then."""

    outputs: list[RequestOutput]


def talk(chat: Chat, lines: Iterator[str]) -> None:
    """Answers line by line until they end."""
    for line in lines:
        text = line.strip()
        if text == "/exit":
            return
        if text.startswith("/"):
            obey(chat, text)
        elif text:
            say_answer(chat, text)


def obey(chat: Chat, command: str) -> None:
    if command == "/stats":
        chat.stats()
    elif command == "/reset":
        chat.reset()
        print("a new conversation", file=sys.stderr)
    else:
        told = [f"{name}: {does}" for name, does in COMMANDS.items()]
        unknown = [] if command == "/help" else [f"{command}: there is no such command"]
        print(*unknown, *told, sep="\n", file=sys.stderr)


def say_answer(chat: Chat, text: str) -> None:
    """Prints the answer to a message as it comes."""
    with interrupts() as interrupted:

        def show(piece: str) -> None:
            print(piece, end="", flush=True)
            if interrupted:
                raise Stopped

        try:
            error = chat.answer(text, show)
        except TooLong as refused:
            error = f"{refused}; /reset begins a new conversation"
        except ValueError as refused:
            error = str(refused)
        print(flush=True)
    if error is not None:
        print(f"penstock: error: {error}", file=sys.stderr)


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that the first Ctrl-C fills, in place of KeyboardInterrupt; the second one raises that."""
    heard: list[int] = []

    def hear(number: int, _) -> None:
        heard.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)
