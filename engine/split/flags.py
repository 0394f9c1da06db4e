"""The flags of a split execution, for the command line and the report alike. Torch-free."""

import argparse

from penstock.engine.split.transfers import ATTENTION_WAYS, WIRE_DTYPES, SplitConfig


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds flags that say how tensors cross, and how the table shows it."""
    defaults = SplitConfig()
    ways = "; ".join(f"{way}: {text}" for way, text in ATTENTION_WAYS.items())
    for name, choices, text in (
        ("wire_dtype", WIRE_DTYPES, "dtype in which tensors cross"),
        ("attention", tuple(ATTENTION_WAYS), ways),
    ):
        default = getattr(defaults, name)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, choices=choices, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--layers", action="store_true", help="a line for each layer, also where layers are alike")
