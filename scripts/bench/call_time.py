"""Times what a call takes beside its passes, and its first pass beside those that follow, before which the host is
ahead: of one row of one token, the shortest of some calls. Whoever waits for a first token waits for these too."""

from penstock.engine.llm import LLM

from scripts.bench.job_run import run, timed_passes
from scripts.bench.workload import Job, greedy

TOKENS, REPEATS = 8, 5


def call_s(llm: LLM) -> float:
    """Seconds that a call takes beside passes that follow each other: those of one token, less what each of TOKENS more
    takes."""
    first_s, more_s = (min(_run(llm, num_tokens) for _ in range(REPEATS)) for num_tokens in (1, 1 + TOKENS))
    return max(first_s - (more_s - first_s) / TOKENS, 0.0)


def start_s(llm: LLM) -> float:
    """Seconds that the first pass of a call takes beside one that follows, on rank 0; 0 where weights stream,
    under whose copies it is hidden."""
    if llm.engine.work.streamed_bytes:
        return 0.0
    firsts, others = [], []
    for _ in range(REPEATS):
        _run(llm, 1 + TOKENS)
        times = [one.measured_s for one in timed_passes(llm)]
        firsts += times[:1]
        others += times[1:]
    return max(min(firsts, default=0.0) - min(others, default=0.0), 0.0)


def _run(llm: LLM, num_tokens: int) -> float:
    job = Job([0], num_tokens)
    return run(llm, [job], [greedy(job)])[0]
