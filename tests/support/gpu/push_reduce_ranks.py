"""One rank of test_push_reduce.py; also run alone, for its table of latencies:

PYTHONPATH=. python -m torch.distributed.run --standalone --nproc-per-node 4 -m tests.support.gpu.push_reduce_ranks
"""

import json
import random
import sys

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from penstock.engine.kernels import reduce_residual_norm as fused
from penstock.engine.kernels.reduce_residual_norm import reduce_residual_norm
from penstock.engine.kernels.residual_norm import residual_norm
from penstock.parallel.launch import resolve_launch
from penstock.parallel.rendezvous import connect
from penstock.parallel.topology import resolve_topology

from tests.support.norm_oracle import assert_normed
from tests.support.rounding import assert_apart, sums_apart

CASES = [
    (1, 4096, torch.bfloat16, "rms"),
    (3, 4096, torch.float16, "layer"),
    (16, 8192, torch.bfloat16, "rms"),
    (128, 1024, torch.bfloat16, "layer"),
    (5, 2880, torch.float32, "rms"),
    (2, 5120, torch.float32, "layer"),
    (1, 16384, torch.bfloat16, "rms"),
]
SHAPES = [(1, 2048), *((rows, 4096) for rows in (1, 2, 4, 8, 16, 32)), *((rows, 8192) for rows in (1, 4, 16))]
REPLAYS = 300
MOST_CYCLES = 100_000  # some 50 us


class Case:
    """One fused sum of seeded parts; `run` starts anew from the same inputs."""

    def __init__(self, group, num_rows, width, dtype, kind):
        self.group, self.kind, self.label = group, kind, f"{dtype} {num_rows} x {width} {kind}"
        seed = torch.Generator(device="cuda").manual_seed(num_rows * width)
        made = torch.randn(group.size + 1, num_rows, width, generator=seed, device="cuda").to(dtype)
        self.parts, self.start = made[:-1], made[-1]
        self.weight = torch.rand(width, generator=seed, device="cuda").to(dtype) + 0.5
        self.bias = self.weight.flip(0) if kind == "layer" else None
        self.x, self.x_ = torch.empty_like(self.start), torch.empty_like(self.start)

    def run(self):
        self.x.copy_(self.start)
        self.x_.copy_(self.parts[self.group.rank])
        peers = self.group.peer_buffers(self.x_, "fused")
        reduce_residual_norm(peers, self.x, self.x_, self.weight, self.bias, 1e-5, self.x_, self.kind)

    def is_right(self):
        """The sum is the nearest but for the order of additions, as is the norm; all ranks agree."""
        exact = self.parts.double().sum(0) + self.start
        sizes = self.parts.double().abs().sum(0) + self.start.abs()
        once = sums_apart(1, sizes, self.start.dtype)  # the sum of the parts and x are rounded, half a unit each
        assert_apart((self.x.double() - exact).abs(), once + sums_apart(self.group.size + 1, sizes))
        assert_normed(self.x_, self.x, self.weight, self.bias, 1e-5, self.kind)
        return is_everywhere(self.x) and is_everywhere(self.x_)


def is_everywhere(tensor):
    """Do all ranks have these bits?"""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return all(torch.equal(tensor, other) for other in gathered)


def captured(run):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


def wrong_replays(group, cases):
    """Counts how many of many replays differ from eager calls, with delays in other places on every rank, and eager
    calls of other sizes between; the two largest are summed in two steps. The graph makes 11 and 3 such calls, so
    halves change roles from replay to replay."""
    delays = random.Random(group.rank)
    plain = [torch.full((n,), 1.0 + group.rank, device="cuda") for n in (4, 65536, 300_000, 3_000_000)]
    total = sum(1.0 + rank for rank in range(group.size))
    work = [torch.empty_like(tensor) for tensor in plain]

    def add_up(index):
        work[index].copy_(plain[index])
        group.all_reduce(work[index], "plain")

    def run():
        for index, case in enumerate(cases):
            torch.cuda._sleep(delays.randrange(MOST_CYCLES))
            case.run()
            add_up(index % len(plain))

    run()
    expected = [(case.x.clone(), case.x_.clone()) for case in cases]
    graph, wrong = captured(run), torch.zeros((), dtype=torch.int64, device="cuda")
    same_choices = random.Random(0)
    for _ in range(REPLAYS):
        for case in cases:
            case.x.fill_(float("nan"))
            case.x_.fill_(float("nan"))
        torch.cuda._sleep(delays.randrange(MOST_CYCLES))
        graph.replay()
        for case, (x, x_) in zip(cases, expected):
            wrong += (case.x != x).any() | (case.x_ != x_).any()
        for tensor in work:
            wrong += (tensor != total).any()
        if same_choices.random() < 0.5:
            add_up(same_choices.randrange(len(plain)))
            same_choices.choice(cases).run()
    torch.cuda.synchronize()
    graph.reset()
    return int(wrong)


def microseconds(group, call, repeats=100):
    """Of one call among many in a graph, the best of five replays."""
    call()
    graph = captured(lambda: [call() for _ in range(repeats)])
    times = []
    for _ in range(6):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        group.barrier()
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / repeats)
    graph.reset()
    return min(times[1:])


def latencies(group, num_rows, width):
    """Microseconds of each way to sum (num_rows, width) bf16, then with residual and norm."""
    x, x_ = torch.zeros(2, num_rows, width, dtype=torch.bfloat16, device="cuda")
    flat, weight, name = x_.view(-1), torch.ones_like(x[0]), dist.group.WORLD.group_name
    buffer = symm_mem.empty(x.numel(), dtype=x.dtype, device=x.device)
    symm_mem.rendezvous(buffer, name)
    norm = (x, x_, weight, None, 1e-5, x_, "rms")
    row = {"rows": num_rows, "width": width, "nbytes": x.nbytes}

    def one_shot():
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(buffer, flat, "sum", name, flat)

    def push_then_norm():
        group.all_reduce(x_)
        residual_norm(*norm)

    def together():
        reduce_residual_norm(group.peer_buffers(x_), *norm)

    row["one_shot_us"] = microseconds(group, one_shot)
    row["push_us"] = microseconds(group, lambda: group.all_reduce(x_))
    row["push_then_norm_us"] = microseconds(group, push_then_norm)
    row["fused_us"] = microseconds(group, together)
    kept = fused.MAX_WARPS
    for most_warps in (8, 32):
        fused.MAX_WARPS = most_warps
        row[f"fused_{most_warps}_warps_us"] = microseconds(group, together)
    fused.MAX_WARPS = kept
    return row


def main():
    launch = resolve_launch()
    topology = resolve_topology(launch.rank, launch.tp_size, launch.local_rank)
    group = connect(topology, launch)
    cases = [Case(group, *case) for case in CASES]
    right = {}
    for case in cases:
        case.run()
        right[case.label] = case.is_right()
    report = {"ranks": group.size, "right": right, "wrong_replays": wrong_replays(group, cases)}
    report["latencies"] = [latencies(group, *shape) for shape in SHAPES]
    if group.rank == 0:
        for row in report["latencies"]:
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        print(json.dumps({name: report[name] for name in ("ranks", "right", "wrong_replays")}), flush=True)
        if len(sys.argv) > 1:
            with open(sys.argv[1], "w") as file:
                json.dump(report, file)
    group.close()


if __name__ == "__main__":
    main()
