"""The steps of a round on GPUs, as data: what scripts/round.py runs, how long that takes, and what it shows.

The words of a command are those after `python -m`. In them {out} is the folder of logs and records, {shm} one in memory
for files that only the step reads, and {vllm} the flags that compare with vLLM, or nothing where none is given. `small`
is what stands behind them for a CPU, where shapes of benchmarks/shapes are the demo model's.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A module with its arguments, and the record of benchmarks/ that it writes, if it does."""

    words: str
    record: str = ""
    small: str = ""


@dataclass(frozen=True)
class Step:
    """Commands one after another, which may take twice the `seconds` that are expected of them together on H200s, with
    nothing compiled before."""

    name: str
    gpus: int
    seconds: int
    shows: str
    commands: tuple[Command, ...]
    needs_vllm: bool = False


CPU = "--device cpu"
SHORT = f"{CPU} --max-model-len 256"
FEW = f"{SHORT} --max-num-seqs 4"
FEW_REQUESTS = f"{FEW} --num-prompts 6 --input-len 20 --output-len 6"
BRIEF = f"{SHORT} --max-num-seqs 8 --rows first-token-128 token-batch-1-brief"
TIGHT = "--gpu-memory 24MiB --num-pages 20"  # where part of the demo model streams
FEW_ROWS, IN_LITTLE = f"{CPU} --batch-size 1 2", f"{SHORT} {TIGHT}"
RANKS = "torch.distributed.run --standalone --nproc-per-node"
HOSTS = "tests.support.two_agents"


def one(name: str, seconds: int, shows: str, *commands: Command, needs_vllm: bool = False) -> Step:
    """A step on one GPU."""
    return Step(name, 1, seconds, shows, commands, needs_vllm)


def bench(script: str, model: str, flags: str, record: str, small: str, launcher: str = "") -> Command:
    """A benchmark of random weights in a model's shape."""
    words = f"{launcher} scripts.bench.{script} --model benchmarks/shapes/{model}.json --load-format dummy {flags}"
    return Command(words.strip(), record, small)


def batch(flags: str, record: str) -> Command:
    words = f"scripts.bench.batch --model benchmarks/shapes/Llama-3-8B.json --input-len 512 --output-len 256 {flags}"
    return Command(words, record, FEW_REQUESTS)


def gguf(kind: str, head: str, *flags: str) -> Command:
    """Writes a GGUF file of random blocks."""
    words = f"scripts.bench.dummy_gguf benchmarks/shapes/Llama-3-8B.json {{shm}}/Llama-3-8B-{kind}.gguf"
    return Command(" ".join([words, "--type", kind, "--head-type", head, *flags]))


def gguf_start(kind: str, resident: str, record: str) -> Command:
    words = f"scripts.bench.startup --model {{shm}}/Llama-3-8B-{kind}.gguf --resident {resident} --max-num-seqs 8"
    words += " --capture lazy --num-iters-cold 0 --num-iters-warmup 0 --num-iters-warm 2"
    return Command(words, record, SHORT)


def gguf_decode(kind: str, flags: str, record: str) -> Command:
    words = f"scripts.bench.latency --model {{shm}}/Llama-3-8B-{kind}.gguf --load-format dummy {flags}"
    words += " --input-len 128 --output-len 24 --num-iters-warmup 1 --num-iters 2"
    return Command(words, record, f"{SHORT} --batch-size 1 2 --input-len 8 --output-len 3")


def tests(words: str) -> Command:
    return Command(f"pytest -p no:cacheprovider --durations 8 {words}", small="--collect-only")


FIRST_TOKENS = "first-token-128 first-token-512 first-token-2000"
JOBS = "uneven long-prompts short"
DRAWN = "token-batch-256-drawn token-batch-256-penalties token-batch-256-logprobs"
TOKENS = "token-batch-1 token-batch-8 token-batch-64 token-batch-256"
RESIDENT = "--resident all --max-num-seqs 512"
TRAFFIC = f"{RESIDENT} --rows {FIRST_TOKENS} first-token-8000 {TOKENS} token-64-rows-at-2100 {JOBS}"
UNEVEN = "--input-len 512 --output-len 128 --random-range-ratio 0.8"
TIMED_ONCE = "--num-iters-warmup 1 --num-iters 1"
START_ONCE = "--num-iters-cold 1 --num-iters-warmup 0 --num-iters-warm 1"
STREAMED_8B = "--resident none --input-len 32 --output-len 10 --num-iters-warmup 1"
STREAMED_8B_THRICE = f"{STREAMED_8B} --num-iters 3"
RESIDENT_DECODE = "--resident all --input-len 32 --num-iters-warmup 1 --num-iters 3"
STREAMED_70B = f"--input-len 32 --max-num-batched-tokens 2048 {TIMED_ONCE}"
IN_24_GIB = f"{STREAMED_70B} --gpu-memory 24GiB --batch-size 1 --output-len 6"
REUSE_SMALL = f"{SHORT} --kv-host-memory 16MiB --prefix-gb 0.001 --prefix-len 64 --own-len 8 --share 0.6"

SHARED = (
    "-p no:cacheprovider --durations 8 -n 4 --dist worksteal -m gpu "
    "-k 'ranks or rank_faults or hosts or symmetric or kernel_ranks or mixed' tests/gpu"
)
OF_TWO = (
    "tests/gpu/test_rank_faults.py tests/gpu/test_kernel_ranks.py tests/gpu/test_hosts.py tests/gpu/test_binding.py "
    "tests/gpu/test_oracles.py::test_two_ranks_agree_with_one "
    "tests/gpu/test_failing_rows.py::test_a_row_fails_alone_on_two_ranks"
)

ONE_GPU = (
    one(
        "decode_8b",
        95,
        "decode passes with all weights on the GPU, and while they stream, compressed or as they are",
        *(
            bench(
                "latency",
                "Llama-3-8B",
                f"{flags} --batch-size 1 64 {largest}",
                f"decode_llama3_8b_{name}_1rank",
                f"{CPU} --batch-size 1 3 --output-len 6",
            )
            for flags, largest, name in (
                (f"{RESIDENT_DECODE} --output-len 64", 256, "resident"),
                (f"{STREAMED_8B} --num-iters 1", 512, "compressed"),
                (f"{STREAMED_8B} --num-iters 1 --weights-compression none", 512, "streamed"),
            )
        ),
    ),
    one(
        "throughput",
        100,
        "jobs against the sum of their passes: alike, alike while all weights stream, and of uneven lengths",
        *(
            bench("throughput", "Llama-3-8B", flags, f"throughput_llama3_8b_{name}_1rank", FEW_REQUESTS)
            for flags, name in (
                ("--resident all --num-prompts 1000 --input-len 128 --output-len 64", "resident"),
                ("--resident none --num-prompts 512 --input-len 128 --output-len 32", "compressed"),
                (f"--resident all --num-prompts 512 {UNEVEN}", "mixed_resident"),
            )
        ),
    ),
    one(
        "traffic",
        300,
        "first tokens, tokens of batches, and jobs, with all weights on the GPU, beside vLLM",
        bench(
            "traffic",
            "Llama-3-8B",
            f"{TRAFFIC} long-tailed shared-prefix {{vllm}}",
            "traffic_llama3_8b_1rank",
            BRIEF,
        ),
        needs_vllm=True,
    ),
    one(
        "traffic_drawn",
        45,
        "what drawing, penalties and log probabilities add to a token of 256 rows",
        bench(
            "traffic",
            "Llama-3-8B",
            f"{RESIDENT} --rows token-batch-256 {DRAWN}",
            "traffic_llama3_8b_drawn_1rank",
            BRIEF,
        ),
    ),
    one(
        "long_row",
        60,
        "a token of one row of 65,000 tokens among short ones, and of as many tokens spread evenly",
        bench(
            "traffic",
            "Llama-3.1-8B",
            "--resident all --max-model-len 65536 --rows token-one-long-row token-same-kv-evenly",
            "long_row_llama31_8b_1rank",
            BRIEF,
        ),
    ),
    one(
        "streamed_uneven",
        120,
        "the uneven job with eight of 32 layers and the head streamed",
        bench(
            "traffic",
            "Llama-3-8B",
            "--resident 0.75 --weights-compression lossless --max-num-seqs 512 --rows uneven",
            "traffic_llama3_8b_8_layers_streamed_1rank",
            BRIEF,
        ),
    ),
    one(
        "full_8b",
        100,
        "a token of as many rows of 640 tokens as fit while all weights stream, and the passes that fill them",
        bench(
            "traffic",
            "Llama-3-8B",
            "--resident none --max-model-len 2048 --rows full-at-640",
            "full_llama3_8b_compressed_1rank",
            f"{CPU} --num-pages 130",
        ),
    ),
    one(
        "full_70b",
        280,
        "the same of 70B in 80 GiB, where all layers stream",
        bench(
            "traffic",
            "Llama-3-70B",
            "--gpu-memory 80GiB --max-model-len 2048 --rows full-at-640",
            "full_llama3_70b_80gib_compressed_1rank",
            f"{CPU} --gpu-memory 34MiB --num-pages 130 --max-num-batched-tokens 256",
        ),
    ),
    one(
        "urgent",
        60,
        "how soon an urgent request has its first token when others have all rows",
        bench(
            "traffic",
            "Llama-3-8B",
            "--resident none --max-num-seqs 64 --max-model-len 2048 --scheduling-policy priority --rows urgent",
            "urgent_llama3_8b_compressed_1rank",
            f"{CPU} --max-num-seqs 2 --num-pages 130",
        ),
    ),
    one(
        "unknown_ends",
        110,
        "a job of requests whose ends nobody knows, with pages for 0.6 of the tokens that 256 rows have in the mean; "
        "and with 149 rows, as many as these pages hold, and pages for all of them",
        bench(
            "traffic",
            "Llama-3-8B",
            "--resident all --max-num-seqs 256 --num-pages 2394 --max-model-len 4352 --rows unknown-ends",
            "ends_llama3_8b_1rank",
            BRIEF,
        ),
        bench(
            "traffic",
            "Llama-3-8B",
            "--resident all --max-num-seqs 149 --max-model-len 4352 --rows unknown-ends",
            "ends_llama3_8b_rows_that_fit_1rank",
            BRIEF,
        ),
    ),
    one(
        "reuse",
        90,
        "first tokens of prefixes used in turn, with KV pages in host memory and without; also while weights stream",
        bench("reuse", "Llama-3-8B", "--kv-host-memory 24GiB", "reuse_llama3_8b_1rank", REUSE_SMALL),
        bench(
            "reuse",
            "Llama-3-8B",
            "--kv-host-memory 24GiB --resident none --weights-compression none --prefix-gb 5.3 --share 0.4 --rounds 1",
            "reuse_llama3_8b_streamed_1rank",
            REUSE_SMALL,
        ),
    ),
    one(
        "serving",
        220,
        "the server beside the loop that it stands on, and beside vLLM's server",
        bench(
            "serving",
            "Llama-3-8B",
            f"{RESIDENT} --max-model-len 2048 --num-prompts 512 {UNEVEN} {{vllm}}",
            "serving_llama3_8b_1rank",
            FEW_REQUESTS,
        ),
    ),
    one(
        "serving_streamed",
        105,
        "the server beside the loop where all of eight layers stream to 64 clients",
        bench(
            "serving",
            "Llama-3-8B-8-layers",
            "--resident none --max-num-seqs 64 --max-model-len 2048 --max-concurrency 64 --num-prompts 192 "
            "--input-len 32 --output-len 48",
            "serving_llama3_8b_8layers_streamed_1rank",
            FEW_REQUESTS,
        ),
    ),
    one(
        "batch_fixed",
        170,
        "a batch of 2,400 rows while all weights stream, and how its end is foreseen",
        batch("--resident none --num-prompts 2400", "batch_llama3_8b_compressed_1rank"),
    ),
    one(
        "batch_unknown",
        130,
        "a batch of 1,200 rows whose ends nobody knows",
        batch(
            "--resident none --num-prompts 1200 --max-num-seqs 600 --lengths unknown",
            "batch_llama3_8b_unknown_ends_1rank",
        ),
    ),
    one(
        "batch_beside",
        180,
        "a batch of 1,000 rows beside vllm run-batch",
        batch("--resident all --num-prompts 1000 {vllm}", "batch_llama3_8b_resident_1rank"),
        needs_vllm=True,
    ),
    one(
        "gguf_load",
        70,
        "starts from a Q4_K file in memory: what loading takes, to the GPU and to host memory",
        gguf("Q4_K", "Q6_K"),
        gguf_start("Q4_K", "all", "startup_llama3_8b_q4_k_resident_1rank"),
        gguf_start("Q4_K", "none", "startup_llama3_8b_q4_k_streamed_1rank"),
    ),
    one(
        "gguf_decode",
        80,
        "decode passes over quantised weights: Q8_0 and Q4_0 on the GPU, Q4_K streamed",
        gguf("Q8_0", "Q8_0", "--sparse"),
        gguf_decode("Q8_0", "--resident all --batch-size 1 8 32 64", "decode_llama3_8b_q8_0_resident_1rank"),
        gguf("Q4_0", "Q4_0", "--sparse"),
        gguf_decode("Q4_0", "--resident all --batch-size 1 8 32 64", "decode_llama3_8b_q4_0_resident_1rank"),
        gguf("Q4_K", "Q6_K", "--sparse"),
        gguf_decode("Q4_K", "--resident none --batch-size 1", "decode_llama3_8b_q4_k_streamed_1rank"),
    ),
    one(
        "dequantisers",
        30,
        "dequantisers of every kind of blocks, held to their reference, and their rates beside a copy's",
        Command("scripts.bench.stored_kernels --tokens", "dequantisers", f"{CPU} --kinds Q8_0"),
    ),
    one(
        "stored_kernels",
        150,
        "kernels of quantised weights, held to their reference, and their rates",
        Command("scripts.bench.stored_kernels", "stored_kernels", f"{CPU} --kinds Q8_0 --tokens 1"),
    ),
    one(
        "startup",
        150,
        "from the start of a process to its first token, cold and warm, and what captures at start cost",
        bench(
            "startup",
            "Llama-3-8B",
            f"{RESIDENT} --against-lazy {START_ONCE}",
            "startup_llama3_8b_resident_1rank",
            FEW,
        ),
        bench("startup", "Llama-3-8B", f"--resident none {START_ONCE}", "startup_llama3_8b_compressed_1rank", FEW),
    ),
    one(
        "tests_compute",
        270,
        "tests of kernels, and of what is computed with them; sums of ranks that are emulated on one GPU",
        tests("tests/parallel/test_push_reduce.py tests/parallel/test_two_step_reduce.py"),
        tests("-m gpu tests/engine tests/oracle tests/scripts"),
    ),
    one("tests_gpu", 270, "tests of whole engines", tests("-m gpu tests/gpu")),
    one(
        "tests_of_ranks_that_share",
        300,
        "what several ranks compute, share and survive on one GPU, which says nothing about times; four tests at once",
        Command(f"tests.support.gpu.sharing {SHARED}", small="--collect-only"),
    ),
)


def over(num: int) -> tuple[Step, ...]:
    """The steps on two or four GPUs of one host, with a rank on each; two agents of torchrun share them as two hosts
    would."""
    launched, as_hosts = f"{RANKS} {num} -m", f"{HOSTS} {num // 2} -m"

    def step(name: str, seconds: int, shows: str, *commands: Command) -> Step:
        return Step(f"{name}_{num}ranks", num, seconds, shows, commands)

    def rows(model: str, record: str, flags: str, small: str, script: str = "latency") -> Command:
        return bench(script, model, flags, f"{record}_{num}ranks", small, launched)

    return (
        step(
            "tests",
            180,
            "what ranks compute, share and survive; four tests at once, which mostly compile and start",
            tests(f"-n 4 --dist worksteal tests/gpu/test_bitwise.py::test_several_ranks[{num}] {OF_TWO}"),
        ),
        step(
            "times",
            100,
            "tests of what ranks compute, and in which time",
            tests(
                f"tests/gpu/test_symmetric.py::test_sums_of_every_size[{num}] tests/gpu/test_push_reduce.py "
                f"tests/gpu/test_probe.py::test_probe[{num}]"
            ),
        ),
        step(
            "probe",
            30,
            "what the machine does for these ranks, and a plan by that, which predicts the rows behind it",
            Command(f"penstock probe -tp {num}", small=f"{CPU} --output {{out}}/device_profile_{num}ranks.json"),
            Command(f"penstock plan benchmarks/shapes/Llama-3-8B.json -tp {num} --resident none --short", small=CPU),
        ),
        step(
            "rows_8b_compressed",
            60,
            "decode passes while all weights stream, compressed",
            rows("Llama-3-8B", "decode_llama3_8b_compressed", f"{STREAMED_8B_THRICE} --batch-size 1 64 512", FEW_ROWS),
        ),
        step(
            "rows_8b_resident",
            35,
            "decode passes with all weights on the GPUs",
            rows(
                "Llama-3-8B",
                "decode_llama3_8b_resident",
                f"{RESIDENT_DECODE} --output-len 64 --batch-size 1 64 256",
                f"{FEW_ROWS} --output-len 6",
            ),
        ),
        step(
            "rows_8b_traffic",
            95,
            "first tokens, tokens of batches, and jobs, with all weights on the GPUs",
            rows(
                "Llama-3-8B",
                "traffic_llama3_8b_resident",
                TRAFFIC,
                BRIEF,
                script="traffic",
            ),
        ),
        step(
            "rows_8b_streamed",
            60,
            "decode passes while all weights stream as they are",
            rows(
                "Llama-3-8B",
                "decode_llama3_8b_streamed",
                f"{STREAMED_8B_THRICE} --weights-compression none --batch-size 1 64 512",
                FEW_ROWS,
            ),
        ),
        step(
            "rows_8b_hosts",
            70,
            "the compressed passes of ranks that talk as over a network, predicted by a probe of theirs",
            Command(f"{as_hosts} penstock probe --output {{out}}/hosts_profile_{num}ranks.json", small=CPU),
            bench(
                "latency",
                "Llama-3-8B",
                f"{STREAMED_8B_THRICE} --batch-size 1 64 --device-profile {{out}}/hosts_profile_{num}ranks.json",
                f"decode_llama3_8b_compressed_2hosts_{num}ranks",
                FEW_ROWS,
                as_hosts,
            ),
        ),
        step(
            "collectives",
            20,
            "all-reduces by size, alone and beside copies",
            Command(f"{launched} scripts.bench.collectives", f"collectives_{num}ranks", f"{CPU} --size-kib 4"),
        ),
        step(
            "link",
            30,
            "copies of all ranks, one at a time and all at once",
            Command(
                f"{launched} scripts.bench.link --piece-mib 4 64 --in-flight 2 --repeats 1",
                f"link_{num}ranks",
                f"{CPU} --piece-mib 4",
            ),
        ),
        step(
            "rows_70b_24gib_compressed",
            70,
            "decode passes of 70B with 24 GiB on each GPU, what streams compressed",
            rows("Llama-3-70B", "decode_llama3_70b_24gib_compressed", IN_24_GIB, IN_LITTLE),
        ),
        step(
            "rows_70b_resident",
            40,
            "decode passes of 70B with all weights on the GPUs",
            rows(
                "Llama-3-70B",
                "decode_llama3_70b_resident",
                f"{RESIDENT_DECODE} --max-model-len 2048 --output-len 34 --batch-size 1 64",
                f"{FEW_ROWS} --output-len 6",
            ),
        ),
        step(
            "rows_70b_compressed",
            90,
            "decode passes of 70B while all weights stream, compressed",
            rows(
                "Llama-3-70B",
                "decode_llama3_70b_compressed",
                f"{STREAMED_70B} --resident none --output-len 5 --batch-size 1 64",
                FEW_ROWS,
            ),
        ),
        step(
            "rows_70b_24gib_streamed",
            45,
            "decode passes of 70B with 24 GiB on each GPU, what streams as it is",
            rows(
                "Llama-3-70B", "decode_llama3_70b_24gib_streamed", f"{IN_24_GIB} --weights-compression none", IN_LITTLE
            ),
        ),
    )


STEPS = {step.name: step for step in (*ONE_GPU, *over(2), *over(4))}
