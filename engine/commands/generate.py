"""`penstock generate` prints the text of prompts as it is generated, with a line before it and one after it (said.py).

Text goes to stdout (with --json one object a prompt), everything else to stderr: with --json the last line has, in
JSON, the bytes that each rank has moved. Under torchrun rank 0 prints.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from penstock.engine.commands.flags import Groups
from penstock.engine.commands.prompts import read_prompts
from penstock.engine.config import METAVARS, EngineConfig
from penstock.engine.output import RequestOutput, describe_errors
from penstock.engine.text.model_text import check_chat, has_tokenizer, is_config_alone, model_first
from penstock.engine.text.prompts import refuse_text
from penstock.parallel.launch import resolve_launch
from penstock.scheduler.batching.request import SamplingParams

if TYPE_CHECKING:
    from penstock.engine.llm import LLM

# how each field of SamplingParams is parsed and explained; its default is the dataclass's
SAMPLING_FLAGS = {
    "max_tokens": (int, "most tokens to generate"),
    "temperature": (float, "0 takes the most likely token"),
    "top_p": (float, "sample among the most likely tokens of this joint probability"),
    "top_k": (int, "sample among this many most likely tokens; 0 is off"),
    "min_p": (float, "sample among tokens at least this likely, relative to the most likely one"),
    "n": (int, "sequences for each prompt"),
    "repetition_penalty": (float, "above 1 discourages tokens of prompt and output"),
    "presence_penalty": (float, "above 0 discourages tokens that were generated"),
    "frequency_penalty": (float, "the same, for each time that they were"),
    "logprobs": (int, "log probabilities of this many tokens, in --json"),
}
EVERYDAY = ("max_tokens", "temperature")  # of SAMPLING_FLAGS


def add_arguments(groups: Groups) -> None:
    add_request_arguments(groups)
    text = "a message to a chat model, to be answered; may be repeated"
    groups.everyday.add_argument("--chat", action="append", default=[], metavar="TEXT", help=text)
    text = "show the plan before the text, at rates that are measured first, and what was moved after it"
    groups.everyday.add_argument("--verbose", action="store_true", help=text)
    groups.debugging.add_argument("--table", action="store_true", help="print the step table of the plan before")


def add_request_arguments(groups: Groups) -> None:
    """Prompts, sampling parameters, and how outputs are shown."""
    parser = groups.everyday
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a text to continue; may be repeated"
    )
    parser.add_argument(
        "--prompts-file", metavar="FILE", help="one prompt a line, or JSONL with prompt or prompt_token_ids; - is stdin"
    )
    add_sampling_arguments(groups, SAMPLING_FLAGS)
    text = "one JSON object a prompt on stdout, with token ids; one on stderr of what was moved"
    parser.add_argument("--json", action="store_true", help=text)


def add_sampling_arguments(groups: Groups, names: Iterable[str]) -> None:
    """Those sampling parameters of SAMPLING_FLAGS, and what ends a text."""
    sampling = groups.sampling
    for name in names:
        kind, text = SAMPLING_FLAGS[name]
        flag = "--" + name.replace("_", "-")
        settings = {"type": kind, "metavar": METAVARS[kind], "default": argparse.SUPPRESS}
        flags = [flag, "--num-sequences"] if name == "n" else [flag]  # torchrun takes --n for one of its own
        group = groups.everyday if name in EVERYDAY else sampling
        group.add_argument(*flags, dest=f"sampling_{name}", help=text + _default(name), **settings)
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    sampling.add_argument("--stop-token-ids", type=int, nargs="*", default=[], metavar="ID", help="end the text")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after end-of-sequence")


def _default(name: str) -> str:
    default = next(field.default for field in dataclasses.fields(SamplingParams) if field.name == name)
    return "" if default is None else f" (default: {default})"


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    params = sampling_params(args, **({"max_tokens": None} if args.chat else {}))
    if args.chat:
        check_chat(config)
    speaks = resolve_launch(config.tensor_parallel_size).rank == 0
    # under torchrun all ranks have the same standard input, and only one may read it
    reads = speaks and (args.prompt or args.prompts_file or not args.chat)
    prompts = read_prompts(args.prompt, args.prompts_file) if reads else []
    chats = [[{"role": "user", "content": text}] for text in args.chat] if speaks else []
    if config.tokenizer is None and not is_config_alone(config) and not has_tokenizer(config):
        with model_first(config):  # refused before the weights are loaded
            for index, prompt in enumerate(prompts):
                refuse_text(config.model, index, prompt, params)
    from penstock.engine.commands.said import say_after, say_before  # with torch, which takes a second
    from penstock.engine.llm import LLM

    with LLM(**config.for_job((len(prompts) + len(chats)) * params.n).to_dict()) as llm:
        prompts += llm.render_chat(chats) if chats else []
        llm.check(prompts, params)
        if args.verbose:
            print(llm.engine.topology.describe(), file=sys.stderr)
        if speaks:
            say_before(llm, len(prompts) * params.n, config if args.verbose else None, args.table)
            llm.engine.times.keep()
        printer = TextPrinter(len(prompts), params.n) if speaks and not args.json and llm.tokenizer else None
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, on_text=printer)
        elapsed_s = time.perf_counter() - start
        if speaks:
            say_outputs(outputs, args.json, printer)
            if args.verbose or any(sequence.token_ids for output in outputs for sequence in output.outputs):
                say_after(llm, outputs, elapsed_s, args.verbose)
            say_transfers(llm, args.json)
    return say_errors(outputs) if speaks else 0


def sampling_params(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """The parameters that flags give, above `defaults`. Raises ValueError naming the field, as SamplingParams does."""
    given = defaults | {
        name: getattr(args, f"sampling_{name}") for name in SAMPLING_FLAGS if hasattr(args, f"sampling_{name}")
    }
    return SamplingParams(**given, stop=args.stop, stop_token_ids=args.stop_token_ids, ignore_eos=args.ignore_eos)


class TextPrinter:
    """Prints text as it comes: that of the first sequence at once, of others when those before them have ended."""

    def __init__(self, num_prompts: int, n: int):
        self.order = [(prompt, index) for prompt in range(num_prompts) for index in range(n)]
        self.waiting: dict[tuple[int, int], str] = {}
        self.ended: set[tuple[int, int]] = set()
        self.current = 0  # index in `order` of the sequence that is being printed
        self._title()

    def __call__(self, prompt: int, index: int, text: str | None) -> None:
        key = (prompt, index)
        if text is None:
            self.ended.add(key)
        else:
            self.waiting[key] = self.waiting.get(key, "") + text
        while self.current < len(self.order):
            key = self.order[self.current]
            sys.stdout.write(self.waiting.pop(key, ""))
            sys.stdout.flush()
            if key not in self.ended:
                return
            sys.stdout.write("\n")
            self.current += 1
            self._title()

    def _title(self) -> None:
        if len(self.order) > 1 and self.current < len(self.order):
            prompt, index = self.order[self.current]
            print(f"--- prompt {prompt}, output {index}", flush=True)


def say_outputs(outputs: list[RequestOutput], as_json: bool, printer: TextPrinter | None) -> None:
    for output in outputs:
        if as_json:
            print(json.dumps(output.to_dict()), flush=True)
        elif printer is None:
            for sequence in output.outputs:
                print(*sequence.token_ids)


def say_errors(outputs: list[RequestOutput]) -> int:
    """Prints a line for each sequence that has not ended by itself. Returns the exit status, 1 if there are any."""
    errors = describe_errors(outputs)
    for error in errors:
        print(f"penstock: error: {error}", file=sys.stderr)
    return 1 if errors else 0


def say_transfers(llm: "LLM", as_json: bool) -> None:
    """Prints the ledgers on a line of stderr: on stdout, every line is a prompt's."""
    if as_json:
        print(json.dumps({"transfers": llm.engine.transfers}), file=sys.stderr)
