"""The command line: subcommands, each with its own flags and the engine's (flags.py).

A subcommand is a module with `add_arguments(groups)` and `run(args, config) -> int`; only the chosen one is
imported, so that `plan` stays quick and free of torch. One that needs few fields of the config names them in
CONFIG_FIELDS, and has no flags for the others.
"""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.engine.streams import say_mistake
from penstock.engine.version import VERSION
from penstock.parallel.failure import SELF_LAUNCHED


class Command(NamedTuple):
    """A subcommand: its module, a sentence that says what it does, and examples. One without a sentence is our own,
    and no help shows it."""

    module: str
    does: str | None = None
    examples: tuple[str, ...] = ()


COMMANDS = {
    "generate": Command(
        "penstock.engine.commands.generate",
        "Continue a text with a language model; weights that do not fit on the GPU stream in from host memory.",
        (
            "penstock generate --model demo --temperature 0 --prompt 'Return a new list'",
            "penstock generate --model /path/to/Llama-3-8B --gpu-memory 12GiB --prompt 'Once upon a time'",
        ),
    ),
    "chat": Command(
        "penstock.engine.commands.chat",
        "Talk with a chat model in the terminal, turn by turn; its answers come as they are generated.",
        ("penstock chat --model /path/to/Llama-3-8B-Instruct --temperature 0.7",),
    ),
    "serve": Command(
        "penstock.engine.commands.serve",
        "Answer OpenAI's API over HTTP: completions and chats, streamed or whole, of many clients at once.",
        ("penstock serve demo", "penstock serve /path/to/Llama-3-8B-Instruct --port 8080 --gpu-memory 24GiB"),
    ),
    "batch": Command(
        "penstock.engine.commands.batch",
        "Run a file of requests, as OpenAI's batches have them, and lose nothing whatever ends it in between.",
        ("penstock batch --model demo -i requests.jsonl -o answers.jsonl",),
    ),
    "plan": Command(
        "penstock.engine.commands.plan",
        "Say how much of a model fits on the GPU, what streams from host memory and how fast that is; needs no GPU.",
        ("penstock plan --model benchmarks/shapes/Llama-3-70B.json -tp 2 --gpu-memory 24GiB",),
    ),
    "probe": Command(
        "penstock.engine.commands.probe",
        "Measure how fast this machine copies, reads and computes; `plan` and `generate` then predict with its speeds.",
        ("penstock probe -tp 2",),
    ),
    "profile": Command(
        "penstock.engine.commands.profile",
        "Show where the time goes while a model generates, instruction by instruction, and draw it.",
        ("penstock profile --model demo --resident none --batch-size 8 --plot lanes.png",),
    ),
    "split": Command(
        "penstock.engine.commands.split",
        "Generate with the large weights on another, untrusted side, and count the bytes that cross.",
        ("penstock split --model demo --process --prompt 'Return a list of'",),
    ),
    "worker": Command("penstock.engine.commands.worker"),
    "engine": Command("penstock.engine.commands.engine"),
    "split-device": Command("penstock.engine.commands.split_device"),
}

# the second goes into the records of benchmarks, the third is for `serve`
OWN_VARIABLES = (SELF_LAUNCHED, "PENSTOCK_COMMIT", "PENSTOCK_API_KEY")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status. A user's mistake is one line on stderr and status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    try:
        _check_environment()
        parser, sub, chosen = _parsers(name)
        args, unknown = parser.parse_known_args(argv)
        if unknown:  # parse_args would point to the whole command's help
            advice = f"{_meant(unknown[0], sub)}penstock {name} --help shows what there is"
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)} ({advice})")
        return chosen.run(args, config_from_args(args))
    except (ValueError, OSError, MemoryError) as error:
        if not say_mistake(error):
            raise
        return 2


def _check_environment() -> None:
    """Raises ValueError for a PENSTOCK_ variable that has no meaning."""
    unknown = [name for name in os.environ if name.startswith("PENSTOCK_") and name not in OWN_VARIABLES]
    if unknown:
        raise ValueError(f"environment variable {unknown[0]}: known are {', '.join(OWN_VARIABLES)}")


def _meant(option: str, sub: argparse.ArgumentParser) -> str:
    """A question for the option that the help shows and that `option` resembles, if there is one."""
    shown = re.findall(r"(?<=[ ,])--?[a-z][a-z-]*", sub.format_help())
    alike = difflib.get_close_matches(option.partition("=")[0].replace("_", "-"), shown, n=1, cutoff=0.82)
    return f"did you mean {alike[0]}? " if alike else ""


def _parsers(name: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None, Any]:
    """The whole parser, with the options of subcommand `name` only, and that subcommand's parser and module."""
    parser = Parser(
        prog="penstock",
        description="Run a language model that is larger than its GPUs: weights stream from host memory.",
        epilog=_examples(*(command.examples[0] for command in COMMANDS.values() if command.examples)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"penstock {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = chosen_parser = None
    for command, (module, does, examples) in COMMANDS.items():
        if does is None and command != name:
            continue
        sub = commands.add_parser(
            command,
            allow_abbrev=False,
            help=does,
            usage=argparse.SUPPRESS,  # a list of all options says less than what follows
            description=f"{does}\n\n{_examples(*examples)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command == name:
            chosen, chosen_parser = importlib.import_module(module), sub
            groups = add_groups(sub)
            chosen.add_arguments(groups)
            add_config_arguments(groups, getattr(chosen, "CONFIG_FIELDS", None))
    return parser, chosen_parser, chosen


def _examples(*lines: str) -> str:
    return "\n".join([f"example{'s' * (len(lines) > 1)}:", *(f"  {line}" for line in lines)])
