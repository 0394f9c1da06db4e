"""What a split execution moves between its two sides in one prefill pass, by operation and layer, predicted from a
config alone; and what the remedies leave of it.

    python scripts/transfer_report.py --model benchmarks/shapes/Llama-3.2-1B.json --tokens 1024
"""

import argparse
import sys

from engine.flags import Parser
from engine.model.families import read_config, read_spec
from engine.model.spec import ModelSpec
from engine.model.steps import model_steps
from engine.planning import find_model
from engine.split.report import remedy_table, transfer_table
from engine.split.transfers import ATTENTION_WAYS, WIRE_DTYPES, PassRow, SplitConfig, predict
from scripts.entry import run_script


def main() -> int:
    args = arguments()
    path = find_model(args.model)
    spec = read_spec(read_config(path), str(path))
    if args.tokens < 1:
        raise ValueError(f"--tokens {args.tokens}: expected a positive number")
    config, row, steps = (
        SplitConfig(args.wire_dtype, args.attention),
        PassRow(args.tokens, args.tokens, True),
        model_steps(spec),
    )
    print(heading(args.model, spec, args.tokens, config))
    print(transfer_table(predict(steps, spec, [row], config), folded=not args.layers))
    print(f"\n{remedy_table(steps, spec, row)}")
    return 0


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory, config.json or 'demo'")
    parser.add_argument("--tokens", type=int, required=True, metavar="N", help="length of the prompt")
    parser.add_argument(
        "--wire-dtype", choices=WIRE_DTYPES, default=WIRE_DTYPES[0], help="dtype in which tensors cross"
    )
    ways = "; ".join(f"{way}: {text}" for way, text in ATTENTION_WAYS.items())
    parser.add_argument("--attention", choices=tuple(ATTENTION_WAYS), default="scores", help=ways)
    parser.add_argument("--layers", action="store_true", help="a line for each layer, also where layers are alike")
    return parser.parse_args()


def heading(model: str, spec: ModelSpec, num_tokens: int, config: SplitConfig) -> str:
    heads = f"{spec.num_heads} heads, {spec.num_kv_heads} KV heads of {spec.head_dim}"
    return (
        f"{model}: {spec.num_layers} layers, hidden {spec.hidden_size}, {heads}, FFN {spec.ffn_size}; prefill of "
        f"{num_tokens} tokens, {config.wire_dtype} on the wire, attention {config.attention}"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
