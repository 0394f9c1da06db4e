"""Predicts from a config alone what a split execution moves between its two sides in the prefill of a prompt, by
operation and layer, and how much remains with each remedy. With --measure the prefill runs too, with the checkpoint's
weights, or random ones where --model is a config.json, and its transfers are counted.

    python -m scripts.research.transfer_report --model benchmarks/shapes/Llama-3.2-1B.json --tokens 1024 \\
      --attention repeated

MiB are 2^20 bytes. The exit status is 1 if what was counted is not what was predicted.
"""

import argparse
import random
import sys

from penstock.engine.commands.flags import Parser
from penstock.engine.model.spec import ModelSpec
from penstock.engine.model.steps import model_steps
from penstock.engine.planning.find_model import find_model
from penstock.engine.split.flags import add_split_arguments
from penstock.engine.split.report import difference, remedy_table, transfer_table
from penstock.engine.split.transfers import SplitConfig, predict, prefill
from penstock.engine.weights.read_model import read_model_to_plan
from penstock.parallel.ledger import TransferLedger
from penstock.scheduler.batching.request import SamplingParams

from scripts.bench.entry import run_script


def main() -> int:
    args = arguments()
    for flag, value in (("--tokens", args.tokens), ("--chunk", args.chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: expected a positive number")
    spec = read_model_to_plan(find_model(args.model)).spec
    if args.tokens > spec.max_position:
        raise ValueError(f"--tokens {args.tokens}: {args.model} is trained to {spec.max_position} positions")
    config, steps = SplitConfig(args.wire_dtype, args.attention), model_steps(spec)
    predicted = predict(steps, spec, prefill(args.tokens, args.chunk), config)
    counted = measure(args, spec, config) if args.measure else None
    print(heading(args, spec))
    print(transfer_table(predicted, counted, folded=not args.layers))
    if counted is not None:
        print(difference(predicted, counted))
    print(f"\n{remedy_table(steps, spec, args.tokens)}")
    return int(counted is not None and counted != predicted)


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory, config.json or 'demo'")
    parser.add_argument("--tokens", type=int, required=True, metavar="N", help="length of the prompt")
    text = "prefill in chunks of so many tokens (default: in one pass)"
    parser.add_argument("--chunk", type=int, metavar="N", help=text)
    add_split_arguments(parser)
    parser.add_argument("--measure", action="store_true", help="run it, and count what crosses")
    return parser.parse_args()


def measure(args: argparse.Namespace, spec: ModelSpec, config: SplitConfig) -> TransferLedger:
    """Counts what crosses in a prefill of random tokens. Raises ValueError if the model takes no such prompt."""
    from penstock.engine.split.llm import SplitLLM  # imports torch: a prediction does without

    options = {
        "load_format": "auto" if find_model(args.model).is_dir() else "dummy",
        "max_num_seqs": 1,
        "max_num_batched_tokens": args.chunk or args.tokens,
        "max_model_len": args.tokens + 1,
    }
    prompt = random.Random(0).choices(range(spec.vocab_size), k=args.tokens)
    with SplitLLM(args.model, config, **options) as llm:
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
        return llm.counted


def heading(args: argparse.Namespace, spec: ModelSpec) -> str:
    heads = f"{spec.num_heads} heads, {spec.num_kv_heads} KV heads of {spec.head_dim}"
    chunks = "" if args.chunk is None else f" in chunks of {args.chunk}"
    return (
        f"{args.model}: {spec.num_layers} layers, hidden {spec.hidden_size}, {heads}, FFN {spec.ffn_size}\n"
        f"prefill of {args.tokens} tokens{chunks}, {args.wire_dtype} on the wire, attention {args.attention}"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
