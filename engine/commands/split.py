"""`penstock split` prints the text of `penstock generate`, computed by a trusted host side that drives an untrusted
device side, and a table of what crossed between them.

Text goes to stdout (with --json one object a prompt), the table to stderr, with --json in JSON as well.
"""

import argparse
import sys
from typing import Any

from penstock.engine.commands.flags import Groups
from penstock.engine.commands.generate import (
    TextPrinter,
    add_request_arguments,
    sampling_params,
    say_errors,
    say_outputs,
    say_transfers,
)
from penstock.engine.commands.prompts import Prompt, read_prompts
from penstock.engine.config import EngineConfig
from penstock.engine.split.channel import DeviceSideFailed
from penstock.engine.split.flags import add_split_arguments
from penstock.engine.split.llm import FIXED, SplitLLM
from penstock.engine.split.permutation import NOTICE
from penstock.engine.split.report import difference, transfer_table
from penstock.engine.split.transfers import PERMUTED, SplitConfig
from penstock.scheduler.batching.request import SamplingParams

CONFIG_FIELDS = (
    *("model", "tokenizer", "dtype", "load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("attention_sinks", "attention_window", "page_size", "num_pages", "seed"),
)


def add_arguments(groups: Groups) -> None:
    """Options of `split` beside the engine's own."""
    parser = groups.everyday
    add_request_arguments(groups)
    add_split_arguments(parser)
    parser.add_argument("--process", action="store_true", help="run the device side as a process of its own")
    text = "seconds that the process has for each answer beside its work (default: %(default)g)"
    parser.add_argument("--timeout-s", type=float, default=SplitConfig.timeout_s, metavar="NUMBER", help=text)
    kinds = "; ".join(f"{name}: {text}" for name, text in PERMUTED.items())
    text = f"permute what the device side sees ({kinds}); {NOTICE}".replace("%", "%%")
    parser.add_argument("--permute", default=(), metavar="NAMES", help=text)
    text = "the key of the permutations, for tests (default: drawn)"
    groups.debugging.add_argument("--permute-key", metavar="HEX", help=text)


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    params, prompts = sampling_params(args), read_prompts(args.prompt, args.prompts_file)
    config = config.for_job(len(prompts) * params.n)
    options = {name: value for name, value in config.to_dict().items() if name not in FIXED}
    split = SplitConfig(
        args.wire_dtype, args.attention, args.process, args.permute, args.permute_key, timeout_s=args.timeout_s
    )
    try:
        return _generate(args, split, options, prompts, params)
    except DeviceSideFailed as error:  # no mistake of the user's or ours: a traceback would say no more
        print(f"penstock: error: {error}", file=sys.stderr)
        return 1


def _generate(
    args: argparse.Namespace, split: SplitConfig, options: dict[str, Any], prompts: list[Prompt], params: SamplingParams
) -> int:
    with SplitLLM(split=split, **options) as llm:
        llm.check(prompts, params)
        if split.permute:
            print(f"permuted: {', '.join(split.permute)}. This is {NOTICE}", file=sys.stderr)
        printer = TextPrinter(len(prompts), params.n) if not args.json and llm.tokenizer else None
        outputs = llm.generate(prompts, params, on_text=printer)
        say_outputs(outputs, args.json, printer)
        counters = llm.engine.worker.executor.counters
        shown = transfer_table(llm.predicted, llm.counted, folded=not args.layers)
        print(f"{counters.num_passes} passes over {counters.num_tokens} tokens\n{shown}", file=sys.stderr)
        print(difference(llm.predicted, llm.counted), file=sys.stderr)
        say_transfers(llm, args.json)
    return say_errors(outputs)
