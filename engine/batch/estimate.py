"""Predicts a job before anything is loaded: its tokens from a sample of its rows, its time from the time model.

Lengths are taken as the longest that rows ask for, so a job that stops earlier takes less.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from penstock.engine.batch.done_rows import DoneRows
from penstock.engine.batch.outlook import Outlook
from penstock.engine.batch.play import Passes
from penstock.engine.batch.rows import Row, RowReader
from penstock.engine.config import EngineConfig
from penstock.engine.planning.engine_plan import EnginePlan, longest_sequence
from penstock.engine.planning.predictions import pass_work
from penstock.engine.server.requests import Completion
from penstock.engine.text.model_text import load_tokenizer, make_chat_reader
from penstock.engine.user_files import open_file
from penstock.scheduler.batching.limits import Limits
from penstock.scheduler.cost.time_model import PassTime

SAMPLE = 200  # rows whose prompts are encoded
MOST_PLAYED = 10**5  # sequences; once, so more than on the way


@dataclass(frozen=True)
class Estimate:
    """A job as it is predicted: `num_at_once` sequences run at most, and `pass_time` is that of a pass in which so many
    do, and as many begin as end."""

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
    """The prediction for all rows that have not run. Raises ValueError for prompts that cannot be encoded."""
    limits = Limits(longest_sequence(config, plan), plan.residency.num_pages - 1, plan.retention)
    passes = Passes(pass_work(plan), plan.rates, plan.max_num_batched_tokens, plan.max_num_seqs, limits)
    outlook, rows, own, cached = Outlook(passes), 0, 0, 0
    is_shared = config.enable_prefix_caching and plan.retention.max_cached is None
    for num_tokens, n in _sampled_prompts(config, plan, reader, done):
        if num_tokens < limits.max_model_len:  # a longer one is refused, and takes no time
            own += num_tokens
            cached += is_shared * (n - 1) * ((num_tokens - 1) // config.page_size * config.page_size)
            for _ in range(n):
                outlook.note_prompt(num_tokens)
    for index in done.pending():
        rows += 1
        outlook.add_row(done.lines, index)
    sequences, outputs = outlook.num_waiting, outlook.most_tokens
    played = outlook.play(shared=cached / max(outlook.num_prompt_tokens, 1), most_played=MOST_PLAYED)
    pass_time = played.costs.pass_time(played.most_rows, played.most_rows * sequences / max(outputs, 1))
    tokens = (round(sequences * own / max(outlook.num_prompts, 1)), outputs)  # each prompt once, however large its n
    return Estimate(rows, sequences, *tokens, played.most_rows, round(played.passes), played.seconds, pass_time)


def _sampled_prompts(
    config: EngineConfig, plan: EnginePlan, reader: RowReader, done: DoneRows
) -> Iterator[tuple[int, int]]:
    """The tokens of prompts and the sequences of each, of rows evenly spread."""
    lines, count = done.lines, _Counter(config, plan.spec.vocab_size)
    step = max((done.num_rows - done.num_done) // SAMPLE, 1)
    with open_file(lines.path) as stream:
        for index in itertools.islice(done.pending(), 0, None, step):
            row = reader.read(lines.read(stream, index), lines.numbers[index])
            yield from ((num_tokens, row.asked.params.n) for num_tokens in count.tokens_of(row))


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
