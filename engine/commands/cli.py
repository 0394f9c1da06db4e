"""The command line: subcommands, each with its own flags and the engine's (flags.py).

A subcommand is a module with `add_arguments(parser)` and `run(args, config) -> int`; only the chosen one is
imported, so that `plan` stays quick and free of torch. One that needs few fields of the config names them in
CONFIG_FIELDS, and has no flags for the others.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from penstock.engine.commands.flags import Parser, add_config_arguments, config_from_args
from penstock.engine.streams import say_mistake
from penstock.engine.version import VERSION
from penstock.parallel.failure import SELF_LAUNCHED

# name -> (module, one line for --help, or None to leave it out there)
COMMANDS: dict[str, tuple[str, str | None]] = {
    "generate": ("penstock.engine.commands.generate", "generate text from prompts"),
    "plan": ("penstock.engine.commands.plan", "show what stays, what streams and the predicted speed; no GPU needed"),
    "probe": (
        "penstock.engine.commands.probe",
        "measure links, memory, compute and all-reduces, for `plan` and the engine",
    ),
    "profile": (
        "penstock.engine.commands.profile",
        "show where the time of a decode and a prefill pass goes, and draw its lanes",
    ),
    "split": (
        "penstock.engine.commands.split",
        "generate with the large weights on an untrusted side, and count what crosses",
    ),
    "worker": ("penstock.engine.commands.worker", None),
    "split-device": ("penstock.engine.commands.split_device", None),
}
EPILOG = """examples:
  penstock plan --model benchmarks/shapes/Llama-3-70B.json -tp 2 --gpu-memory 24GiB
  penstock generate --model demo --prompt 'Return a list of'
  penstock probe -tp 2"""


OWN_VARIABLES = (SELF_LAUNCHED, "PENSTOCK_COMMIT")  # the second goes into the records of benchmarks


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status. A user's mistake is one line on stderr and status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    try:
        _check_environment()
        parser, chosen = _parsers(name)
        args, unknown = parser.parse_known_args(argv)
        if unknown:  # parse_args would point to the whole command's help
            listed = " ".join(unknown)
            raise ValueError(f"unrecognized arguments: {listed} (penstock {name} --help shows what there is)")
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


def _parsers(name: str | None) -> tuple[argparse.ArgumentParser, Any]:
    """The whole parser, with the options of subcommand `name` only, and that subcommand's module."""
    parser = Parser(
        prog="penstock",
        description="Run a language model that is larger than its GPUs: weights stream from host memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"penstock {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = None
    for command, (module, text) in COMMANDS.items():
        if text is None and command != name:
            continue
        sub = commands.add_parser(command, allow_abbrev=False, help=text, description=text)
        if command == name:
            chosen = importlib.import_module(module)
            chosen.add_arguments(sub.add_argument_group(command))
            add_config_arguments(sub, getattr(chosen, "CONFIG_FIELDS", None))
    return parser, chosen
