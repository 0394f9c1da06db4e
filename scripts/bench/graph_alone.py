"""Times the graph of a decode pass replayed alone, back to back, as it last ran: a pass without the host's work."""

import torch
from penstock.engine.llm import LLM
from penstock.engine.measure.rates import all_ranks, seconds
from penstock.engine.runtime.binding import on_own_device
from penstock.engine.runtime.pass_runner import PassRunner

NUM_REPLAYS, LEAST_REPLAYS, MOST_S = 20, 3, 2.0  # fewer of a graph that takes long


def graph_alone_s(llm: LLM, num_rows: int) -> float | None:
    """Seconds of a greedy decode pass over `num_rows` rows, on the slowest rank. None where no graph is captured, and
    where rank 0 launched the others, since these run no script. Call it between calls of `generate`; under torchrun on
    all ranks together."""
    engine = llm.engine
    if engine.launch.kind == "parent":
        return None
    with engine.together():
        return replay_s(engine.worker.runner, num_rows)


@on_own_device
def replay_s(runner: PassRunner, num_rows: int) -> float | None:
    """The seconds of `graph_alone_s`, on ranks that have come together. No pass is under way, so the pages to which the
    graph writes belong to no request."""
    graph = greedy_graph(runner, num_rows)
    if graph is None:
        return None
    collectives, device = runner.model.collectives, runner.device

    def slowest_s(number: int) -> float:
        own_s = seconds(lambda: [graph.replay() for _ in range(number)], device, repeats=1, warm_ups=0)
        return max(rank_s for (rank_s,) in all_ranks([own_s], collectives, device))

    collectives.barrier()
    number = min(NUM_REPLAYS, max(LEAST_REPLAYS, int(MOST_S / slowest_s(1))))
    collectives.barrier()
    graph.replay()  # this replay lines the ranks up
    graph_s = slowest_s(number) / number
    runner.forget()  # the letters that the replays sent
    return graph_s


def greedy_graph(runner: PassRunner, num_rows: int) -> torch.cuda.CUDAGraph | None:
    """The graph that ran last; None if there is none, if it is not a greedy decode pass of so many rows, or if it has a
    trace's marks."""
    if runner.graphs is None or runner.graphs.latest is None:
        return None
    size, asked = runner.graphs.latest
    takes = runner.graphs.passes[size, asked]
    is_it = not asked.stages and not size.num_chunks and num_rows <= size.num_single < 2 * num_rows
    return takes[0].graph if is_it and len(takes) == 1 else None
