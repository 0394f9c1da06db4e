"""Flags made from the fields of EngineConfig and DebugConfig, for the command line and the benchmarks, in four groups:
--help shows the everyday ones, those of sampling and those of memory and streaming, --help-all those for debugging too.
"""

import argparse
import dataclasses
import functools
from typing import Any, NamedTuple, NoReturn

from penstock.engine.config import METAVARS, DebugConfig, EngineConfig

ENGINE = tuple(field for field in dataclasses.fields(EngineConfig) if field.name != "debug")
DEBUG = dataclasses.fields(DebugConfig)
EVERYDAY = ("model", "tokenizer", "chat_template", "tensor_parallel_size", "dtype", "device", "max_model_len", "seed")
MEMORY = (
    *("gpu_memory", "gpu_memory_utilization", "resident", "weights_compression", "max_num_seqs"),
    *("max_num_batched_tokens", "scheduling_policy", "enable_prefix_caching", "attention_sinks", "attention_window"),
    *("kv_host_memory", "device_profile", "link_gb_s"),
)
DEBUGGING = "debugging"  # the title of the group that --help leaves out


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError for mistakes, as all else does: one line, without a page of usage."""

    shows_all = False

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help shows what there is)")

    def format_help(self) -> str:
        groups = self._action_groups
        self._action_groups = [group for group in groups if self.shows_all or group.title != DEBUGGING]
        try:
            return super().format_help()
        finally:
            self._action_groups = groups


class Groups(NamedTuple):
    """The groups of a parser's options, in the order in which they are shown."""

    everyday: argparse._ArgumentGroup
    sampling: argparse._ArgumentGroup
    memory: argparse._ArgumentGroup
    debugging: argparse._ArgumentGroup


class _HelpAll(argparse.Action):
    """--help of all groups."""

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def add_groups(parser: Parser) -> Groups:
    """Adds the groups, empty, and --help-all."""
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show the options for debugging as well, and exit")
    return Groups(*map(parser.add_argument_group, ("everyday", "sampling", "memory and streaming", DEBUGGING)))


def add_config_arguments(groups: Groups, names: tuple[str, ...] | None = None) -> None:
    """A flag for each field of EngineConfig and of its debug group, or for those of `names`; the model may also be
    given without a flag. Defaults are those of the config."""
    if names is None:
        groups.everyday.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model")
    for field in (*ENGINE, *DEBUG):
        if names is None or field.name in names:
            add_flag(_group(groups, field), field)


def _group(groups: Groups, field: dataclasses.Field) -> argparse._ArgumentGroup:
    if field.name in EVERYDAY:
        return groups.everyday
    return groups.memory if field.name in MEMORY else groups.debugging


def add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
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
    """A type for argparse that shows the message of `parse`'s ValueError, which argparse would hide."""
    if parse is None or parse in (int, float):
        return parse

    @functools.wraps(parse)
    def convert(text: str):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _metavar(field: dataclasses.Field) -> str:
    return METAVARS.get(field.metadata["type"], field.name.upper().split("_")[-1])


def config_from_args(args: argparse.Namespace, **defaults: Any) -> EngineConfig:
    """The config of the flags that were given; `defaults` replace flags that were not. Raises ValueError as
    EngineConfig does, and if the model was given twice."""
    given, debug = (
        {f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)} for fields in (ENGINE, DEBUG)
    )
    alone = getattr(args, "model_argument", None)
    if alone is not None:
        if given.get("model", alone) != alone:
            advice = " (a prompt goes behind --prompt)" if hasattr(args, "prompt") else ""
            raise ValueError(f"model={alone!r} and --model {given['model']!r}: which one?{advice}")
        given["model"] = alone
    return EngineConfig(**defaults | given, debug=DebugConfig(**debug))
