"""Time of a decode pass, streamed or resident, against the bound measured in the same run.

Where weights stream the bound is W / link: W are the bytes that cross in a pass, the link is the best of three times
that all copies of a pass were made by themselves, from the same arena to the same ring, in the same process, with all
ranks copying (a shorter run would not do: four H200s reach 44.5 GB/s a rank over 2 GiB and sustain 40). Where nothing
streams it is what must be read (weights and KV) over the read rate. Rates are measured after a warm-up: the first
copies of a fresh machine reach 95 % of what later ones do. The prediction is the device profile's (that of a saved
probe, else an assumed one) and is written down before anything is measured. Run it plainly, or by torchrun over several
ranks; the last line is one JSON object.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

import torch

from engine.llm import LLM
from engine.planning import decode_time
from engine.record import add_output_argument, keep, machine
from scheduler.request import SamplingParams


def main() -> None:
    args = parse_args()
    options = {"load_format": "dummy", "dtype": args.dtype, "resident": args.resident, "gpu_memory": args.gpu_memory}
    lanes = {"trace": args.trace, "enforce_eager": args.enforce_eager}
    limits = {"max_num_seqs": max(args.batch_size), "max_num_batched_tokens": args.max_num_batched_tokens}
    with LLM(args.model, **options, **limits, max_model_len=args.max_model_len, **lanes) as llm:
        speaks = llm.rank.topology.rank == 0
        predictions = [predict(llm, num_seqs, args) for num_seqs in args.batch_size]
        if speaks:
            print("predicted:", *(f"batch {n}: {s * 1e3:.2f} ms" for n, s in zip(args.batch_size, predictions)))
        results = [measure_batch(llm, n, predicted_s, args) for n, predicted_s in zip(args.batch_size, predictions)]
        if speaks:
            report = describe(llm, args) | {"passes": results}
            print_table(report)
            keep(report, args.output_json)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="benchmarks/shapes/Llama-3-8B.json")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--resident", default="none")
    parser.add_argument("--gpu-memory", default=None)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=12)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--trace", default=None, help="write the lanes of all passes as Chrome/Perfetto JSON")
    add_output_argument(parser)
    return parser.parse_args()


def predict(llm: LLM, num_seqs: int, args: argparse.Namespace) -> float:
    """Seconds of a decode pass by the profile's rates, the context half way through the output."""
    return decode_time(llm.rank.work, num_seqs, args.input_len + args.output_len // 2, llm.rank.rates).total_s


def measure_batch(llm: LLM, num_seqs: int, predicted_s: float, args: argparse.Namespace) -> dict | None:
    """Median and best of the decode passes over `num_seqs` rows; on rank 0, None on the others."""
    vocab_size, speaks = llm.rank.plan.spec.vocab_size, llm.rank.topology.rank == 0
    generator = torch.Generator().manual_seed(num_seqs)
    prompts = torch.randint(0, vocab_size, (num_seqs, args.input_len), generator=generator).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True)
    context = args.input_len + args.output_len // 2
    llm.generate(prompts, dataclasses.replace(params, max_tokens=4))  # libraries load kernels, passes are captured
    if speaks:
        llm.measure(llm.rank.work.streamed_bytes)
    first = len(llm.rank.ledger.passes)
    llm.generate(prompts, params)
    if not speaks:
        return None
    decodes = [measured for shape, measured, _ in llm.rank.ledger.passes[first:] if shape.num_tokens == num_seqs][1:]
    median_s = statistics.median(decodes)
    work, rates = llm.rank.work, llm.rank.rates
    read_bytes = work.streamed_bytes + work.resident_bytes + num_seqs * context * work.kv_token_bytes
    bounds = {"link": work.streamed_bytes / rates.link_gb_s / 1e9, "memory": read_bytes / rates.memory_gb_s / 1e9}
    bound = max(bounds, key=bounds.get)
    return {
        "batch_size": num_seqs,
        "decode_pass_s": median_s,
        "decode_pass_best_s": min(decodes),
        "num_timed_passes": len(decodes),
        "bound": bound,
        "bound_s": bounds[bound],
        "fraction_of_bound": bounds[bound] / median_s,
        "predicted_s": predicted_s,
        "predicted_over_measured": predicted_s / median_s,
        "tokens_per_second": num_seqs / median_s,
        "achieved_link_gb_s": work.streamed_bytes / median_s / 1e9,
        "achieved_memory_gb_s": read_bytes / median_s / 1e9,
    }


def describe(llm: LLM, args: argparse.Namespace) -> dict:
    """Hardware, versions, workload and rates, as every record in benchmarks/ has them."""
    device, counters = llm.rank.topology.device, llm.rank.worker.executor.counters
    cuda = device.type == "cuda"
    return {
        "benchmark": "decode",
        **machine(device, llm.rank.topology.tp_size),
        "model": Path(args.model).stem,
        "dtype": llm.rank.plan.dtype,
        "tp_size": llm.rank.topology.tp_size,
        "resident": args.resident,
        "graphs": llm.rank.worker.executor.decode is not None and llm.rank.worker.executor.decode.graphs is not None,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "streamed_bytes_per_pass_and_rank": llm.rank.work.streamed_bytes,
        "ring_bytes": llm.rank.plan.residency.ring.ring_bytes,
        "host_bytes_per_rank": llm.rank.worker.weights.host_bytes,
        "copied_bytes_total": counters.copied_bytes.total(),
        "num_passes": counters.num_passes,
        "link_gb_s": llm.rank.rates.link_gb_s,
        "memory_gb_s": llm.rank.rates.memory_gb_s,
        "gemm_tflops": llm.rank.rates.gemm_tflops,
        "step_latency_s": llm.rank.rates.step_latency_s,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "claimed_device_memory_bytes": llm.rank.plan.residency.claimed_bytes,
    }


def print_table(report: dict) -> None:
    moved = f"{report['streamed_bytes_per_pass_and_rank'] / 1e9:.3f} GB a pass and rank"
    print(f"{report['model']} on {report['hardware']}, {moved}, link {report['link_gb_s']:.2f} GB/s")
    print(f"{'batch':>6} {'pass ms':>9} {'bound ms':>9} {'fraction':>9} {'predicted ms':>13} {'tokens/s':>9}")
    for row in report["passes"]:
        print(
            f"{row['batch_size']:>6} {row['decode_pass_s'] * 1e3:>9.2f} {row['bound_s'] * 1e3:>9.2f} "
            f"{row['fraction_of_bound']:>9.3f} {row['predicted_s'] * 1e3:>13.2f} {row['tokens_per_second']:>9.1f}"
        )


if __name__ == "__main__":
    main()
