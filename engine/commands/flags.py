"""Flags made from the fields of EngineConfig and DebugConfig, for the command line and the benchmarks."""

import argparse
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NoReturn

from penstock.engine.config import METAVARS, DebugConfig, EngineConfig

ENGINE = tuple(field for field in dataclasses.fields(EngineConfig) if field.name != "debug")
DEBUG = dataclasses.fields(DebugConfig)


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError for mistakes, as all else does: one line, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help shows what there is)")


def add_config_arguments(parser: argparse.ArgumentParser, names: tuple[str, ...] | None = None) -> None:
    """A flag for each field of EngineConfig and of its debug group, or for those of `names`; the model may also be
    given without a flag. Defaults are those of the config."""
    if names is None:
        parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model")
    for title, fields in (("engine", ENGINE), ("debug", DEBUG)):
        _add_flags(parser.add_argument_group(title), [f for f in fields if names is None or f.name in names])


def _add_flags(group: argparse._ArgumentGroup, fields: Iterable[dataclasses.Field]) -> None:
    for field in fields:
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
            raise ValueError(f"model={alone!r} and --model {given['model']!r}: which one?")
        given["model"] = alone
    return EngineConfig(**defaults | given, debug=DebugConfig(**debug))
