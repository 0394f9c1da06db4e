"""Predicts a job before anything is loaded: its tokens from a sample of its rows, its time from the time model.

Lengths are taken as the longest that rows ask for, so a job that stops earlier takes less.
"""

import functools
import itertools
import math
from dataclasses import dataclass

from penstock.engine.batch.done_rows import DoneRows
from penstock.engine.batch.rows import Row, RowReader
from penstock.engine.config import EngineConfig
from penstock.engine.planning.engine_plan import EnginePlan, longest_sequence
from penstock.engine.planning.predictions import most_seqs, pass_work
from penstock.engine.server.requests import Completion
from penstock.engine.text.model_text import load_tokenizer, make_chat_reader
from penstock.engine.user_files import open_file
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.time_model import PassTime, predict_pass

SAMPLE = 200  # rows whose prompts are encoded


@dataclass(frozen=True)
class Estimate:
    """A job as it is predicted: `num_at_once` sequences run in each pass, and `pass_time` is that of one between ramp
    and drain."""

    rows: int
    sequences: int
    prompt_tokens: int
    output_tokens: int
    num_at_once: int
    passes: int
    seconds: float
    pass_time: PassTime

    def to_dict(self) -> dict:
        """The figures as JSON takes them."""
        names = ("rows", "sequences", "prompt_tokens", "output_tokens", "num_at_once", "passes", "seconds")
        return {name: getattr(self, name) for name in names} | {
            "output_tokens_s": self.output_tokens / self.seconds if self.seconds else 0.0,
            "pass_s": self.pass_time.total_s,
            "bound": self.pass_time.bound,
        }


def estimate(config: EngineConfig, plan: EnginePlan, reader: RowReader, done: DoneRows) -> Estimate:
    """The prediction for all rows that have not run. Raises ValueError for prompts that cannot be encoded, and if not
    one sequence fits."""
    lines, longest = done.lines, longest_sequence(config, plan)
    prompt = _mean_prompt_tokens(config, plan, reader, done)
    rows = sequences = prompts = outputs = 0
    for index in done.pending():
        rows += 1
        sequences += lines.num_sequences[index]
        most = lines.most_tokens[index] or longest
        outputs += lines.num_sequences[index] * max(min(most, longest - math.ceil(prompt)), 1)
    prompts = round(sequences * prompt)
    mean = outputs / max(sequences, 1)
    fit = most_seqs(plan.kept, plan.residency, min(math.ceil(prompt + mean / 2), plan.residency.max_model_len))
    if not fit:
        raise ValueError(f"not one sequence of {math.ceil(prompt + mean)} tokens fits into the KV cache")
    seats = max(min(fit, sequences), 1)
    pass_time, share = _steady_pass(plan, seats, prompt, mean)
    drain = mean / 2 if sequences > seats else 0.0  # in which, on average, half of the last ones have ended
    passes = math.ceil((outputs / seats + drain) * share)
    return Estimate(rows, sequences, prompts, outputs, seats, passes, passes * pass_time.total_s, pass_time)


def _steady_pass(plan: EnginePlan, seats: int, prompt: float, output: float) -> tuple[PassTime, float]:
    """A pass in which as many prompts come as sequences end; and how many passes one token of each takes, more than
    one if the prompts do not fit into it."""
    came = seats / max(output, 1.0)
    passes = max((seats + came * prompt) / plan.max_num_batched_tokens, 1.0)
    num_tokens, read = (seats + came * prompt) / passes, seats * (prompt + output / 2) / passes
    pairs = read + came * prompt * (prompt + 1) / 2 / passes
    shape = PassShape(round(num_tokens), max(round(seats / passes), 1), 0, round(pairs), round(read), 0)
    return predict_pass(pass_work(plan), shape, plan.rates), passes


def _mean_prompt_tokens(config: EngineConfig, plan: EnginePlan, reader: RowReader, done: DoneRows) -> float:
    """The tokens of a prompt, over rows evenly spread."""
    lines, count = done.lines, _Counter(config, plan.spec.vocab_size)
    step = max((done.num_rows - done.num_done) // SAMPLE, 1)
    with open_file(lines.path) as stream:
        counts = [
            num_tokens
            for index in itertools.islice(done.pending(), 0, None, step)
            for num_tokens in count.tokens_of(reader.read(lines.read(stream, index), lines.numbers[index]))
        ]
    return sum(counts) / max(len(counts), 1)


class _Counter:
    """Counts tokens of prompts as the engine will have them, without one."""

    def __init__(self, config: EngineConfig, vocab_size: int):
        self.config, self.vocab_size = config, vocab_size
        self.tokenizer = load_tokenizer(config)
        self._chats = functools.cache(functools.partial(make_chat_reader, config, self.tokenizer))

    def tokens_of(self, row: Row) -> list[int]:
        """The tokens of each prompt of a row. Raises ValueError for one that cannot be encoded."""
        asked = row.asked
        if isinstance(asked, Completion):
            return [self._tokens(row, prompt, asked.add_special) for prompt in asked.prompts]
        chats = self._chats(bool(asked.options.tools)).read([asked.messages], asked.options, lambda *text: None)
        return [len(chat.token_ids) for chat in chats]

    def _tokens(self, row: Row, prompt: str | list[int], add_special: bool) -> int:
        if not isinstance(prompt, str):
            return len(prompt)
        if self.tokenizer is None:
            raise ValueError(f"{self.config.model}: no tokenizer, so line {row.number} cannot have a text")
        return len(self.tokenizer.encode(prompt, self.vocab_size, add_special))
