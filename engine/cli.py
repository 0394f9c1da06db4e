"""The command line: subcommands, and flags made from EngineConfig's fields.

A subcommand is a module with `add_arguments(parser)` and `run(args, config) -> int`; only the chosen one is
imported, so that `plan` stays quick and free of torch.
"""

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from engine.config import METAVARS, EngineConfig
from engine.version import VERSION
from parallel.failure import SELF_LAUNCHED

# name -> (module, one line for --help, or None to leave it out there)
COMMANDS: dict[str, tuple[str, str | None]] = {
    "generate": ("engine.generate_command", "generate text from prompts"),
    "plan": ("engine.plan_command", "show what stays, what streams and the predicted speed; no GPU needed"),
    "trace": ("engine.trace_command", "draw the two lanes of a pass, predicted beside measured"),
    "profile": ("engine.profile_command", "show where the time of a decode and a prefill pass goes"),
    "worker": ("engine.worker_command", None),
}
EPILOG = """examples:
  penstock plan --model benchmarks/shapes/Llama-3-70B.json -tp 2 --gpu-memory 24GiB
  penstock generate --model demo --prompt 'Return a list of'"""


RANK_0_SPEAKS_S = 5.0  # under torchrun: the time rank 0 has to say what all ranks found


OWN_VARIABLES = (SELF_LAUNCHED, "PENSTOCK_COMMIT")  # the second goes into the records of benchmarks


class Parser(argparse.ArgumentParser):
    """Mistakes are ValueErrors like all others: one line, not a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help shows what there is)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status. A user's mistake is one line on stderr and status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    try:
        _check_environment()
        parser, chosen = _parsers(name)
        args = parser.parse_args(argv)
        return chosen.run(args, _config(args))
    except ValueError as error:
        if SELF_LAUNCHED in os.environ:
            raise  # rank 0 shows it, with its traceback: the user's own mistakes it found before it launched us
        if os.environ.get("RANK", "0") != "0":
            time.sleep(RANK_0_SPEAKS_S)  # by then torchrun has ended this process, if rank 0 failed too
        print(f"penstock: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the flush at exit complain
        return 1


def _check_environment() -> None:
    """A PENSTOCK_ variable that means nothing is a user's mistake."""
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
            add_config_arguments(sub)
    return parser, chosen


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of EngineConfig; the model may also stand alone. Defaults are the config's, not ours."""
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model")
    group = parser.add_argument_group("engine")
    for field in dataclasses.fields(EngineConfig):
        option = "--" + field.name.replace("_", "-")
        text = field.metadata["help"].replace("%", "%%")
        if "default:" not in text and field.default is not None:
            text += f" (default: {field.default})"
        settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if isinstance(field.default, bool):
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": _typed(field.metadata["type"]), "choices": field.metadata["choices"]}
            settings["metavar"] = None if field.metadata["choices"] else _metavar(field)
        group.add_argument(option, *field.metadata["flags"], **settings)


def _typed(parse):
    """argparse hides a ValueError's words; they name the field and what is allowed."""
    if parse is None or parse in (int, float):
        return parse

    def convert(text: str):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _metavar(field: dataclasses.Field) -> str:
    return METAVARS.get(field.metadata["type"], field.name.upper().split("_")[-1])


def _config(args: argparse.Namespace) -> EngineConfig:
    """The config of the flags that were given. Raises ValueError as EngineConfig does."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(EngineConfig) if hasattr(args, f.name)}
    alone = getattr(args, "model_argument", None)
    if alone is not None:
        if given.get("model", alone) != alone:
            raise ValueError(f"model={alone!r} and --model {given['model']!r}: which one?")
        given["model"] = alone
    return EngineConfig(**given)
