"""The first screen of the page: what a reader asks first, answered from the records. It imports no torch.

A row stands for all recorded passes of its kind, with the lowest and the highest of their figures: none is chosen.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from penstock.scheduler.units import GB, ms

from scripts.report.markdown_table import Column, Row, number, table, text
from scripts.report.markdown_table import ms as in_ms
from scripts.report.records import Record, comparison_rows, decode_rows, prefill_rows, throughput_rows, traffic_rows

NO_RECORD = "No record yet."
BASELINES = {  # how --compare calls them: what they are
    "accelerate": "accelerate's `cpu_offload`",
    "transformers": "transformers' `generate`",
    "transformers-cb": "transformers' continuous batching",
    "vllm": "vLLM",
    "vllm-offload": "vLLM's weight offload",
    "vllm-serve": "vLLM's server",
}
COMPARES_BITS = ("bit by bit", "bit for bit", "bitwise", "streamed equals resident")
Figure = Callable[[float], str]
Kind = tuple[str, list[Row]]  # what was predicted, and the rows that say how it came out


@dataclass(frozen=True)
class Answer:
    """The answer to a question: a sentence or two, a table that shows what they rest on, and the title of the
    section that has all of it."""

    question: str
    short: str = NO_RECORD
    table: str = ""
    behind: str = ""


def answers(records: list[Record]) -> list[Answer]:
    """Five of them."""
    decodes = decode_rows(records)
    streamed = [row for row in decodes if row["streamed_bytes"]]
    resident = [row for row in decodes if not row["streamed_bytes"]]
    return [
        passes("How fast is it when weights stream?", streamed, STREAMED, STREAMED_SHOWN, "Streamed decode"),
        passes(
            "How fast is it when everything stays on the GPU?", resident, RESIDENT, RESIDENT_SHOWN, "Resident decode"
        ),
        compared("How does it compare?", comparison_rows(records)),
        predicted("Are the predictions right?", kinds_of_predictions(records, streamed, resident)),
        equal("Are the outputs the same to the last bit?", records),
    ]


def first_screen(answered: list[Answer]) -> str:
    """The questions with their short answers."""
    lines = [
        f"{index}. **{answer.question}** {answer.short}"
        + (f" [Table](#{anchor(answer.question)})" * bool(answer.table))
        for index, answer in enumerate(answered, start=1)
    ]
    return "\n".join(lines) + "\n"


def tables(answered: list[Answer]) -> str:
    """The tables, each under its question."""
    sections = []
    for answer in answered:
        more = f"One by one: [{answer.behind}](#{anchor(answer.behind)}).\n\n" if answer.behind else ""
        sections += [f"## {answer.question}\n\n{more}{answer.table}"] if answer.table else []
    return "\n".join(sections)


def anchor(title: str) -> str:
    """The fragment by which GitHub names a heading."""
    return title.lower().replace(" ", "-").replace("?", "")


def passes(question: str, rows: list[Row], keys: tuple[str, ...], columns: list[Column], behind: str) -> Answer:
    """Decode passes, a row for those that agree in `keys`; the kind with the most of them is the example."""
    if not rows:
        return Answer(question)
    kinds = list(alike(rows, keys))
    fractions = [row["fraction_of_bound"] for row in rows]
    bounds = Counter(row["bound"] for row in rows)
    by = " or ".join(name for name, _ in bounds.most_common())
    example = summary(max(kinds, key=len))
    ranks = "1 rank" if example["tp_size"] == 1 else f"{example['tp_size']} ranks"
    short = f"{len(rows)} recorded decode passes reach {span(fractions, two)} of their bound ({by}), the median"
    short += f" {two(statistics.median(fractions))}. {example['model']}, {ranks}, {example['weights']} weights, batch"
    short += f" {example['batches']}: {example['passes']} ms a pass."
    return Answer(question, short, table(map(summary, kinds), columns), behind)


def alike(rows: list[Row], keys: tuple[str, ...]) -> Iterator[list[Row]]:
    """The rows in groups that agree in `keys`, in the order of their first rows."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from groups.values()


def summary(rows: list[Row]) -> Row:
    """One row for all of them."""
    fields = (("batch_size", "batches", str), ("input_len", "prompts", str), ("fraction_of_bound", "fractions", two))
    fields += (("decode_pass_s", "passes", milliseconds), ("bound_s", "bounds", milliseconds))
    return rows[0] | {name: span([row[key] for row in rows], show) for key, name, show in fields}


def compared(question: str, rows: list[Row]) -> Answer:
    """Others on the same prompts and number of tokens, on the same GPU in the same run."""
    if not rows:
        return Answer(question)
    rows = [row | {"baseline": BASELINES.get(row["baseline"], row["baseline"])} for row in rows]
    ran = [row for row in rows if row.get("speedup") is not None]
    ratios = (
        f"{kind[0]['baseline']} {span([row['speedup'] for row in kind], times)}" for kind in alike(ran, ("baseline",))
    )
    short = "On weights of the same shape, in the same run, a token, or a job of many requests, takes others so many"
    short += f" times as long: {', '.join(ratios)}."
    return Answer(question, short, table(rows, COMPARED), "Against others")


def kinds_of_predictions(records: list[Record], streamed: list[Row], resident: list[Row]) -> list[Kind]:
    by_ranks = [("decode, weights stream", streamed), ("decode, nothing streams", resident)]
    by_ranks.append(("first token", prefill_rows(records)))
    kinds = []
    for name, rows in by_ranks:
        for group in sorted(alike(rows, ("tp_size",)), key=lambda group: group[0]["tp_size"]):
            ranks = group[0]["tp_size"]
            kinds.append((f"{name}, {ranks} {'rank' if ranks == 1 else 'ranks'}", group))
    return [*kinds, ("many requests at once", throughput_rows(records)), ("real traffic", traffic_rows(records))]


def predicted(question: str, kinds: list[Kind]) -> Answer:
    """The times that the plan predicted before anything ran, over what was measured."""
    rows, every = [], []
    for what, measured in kinds:
        ratios = [row["predicted_over_measured"] for row in measured if row.get("predicted_over_measured") is not None]
        if ratios:
            rows.append({"what": what, "number": len(ratios), "span": span(ratios, two)})
            rows[-1]["middle"] = statistics.median(ratios)
        every += ratios
    if not rows:
        return Answer(question)
    near = sum(abs(ratio - 1) <= 0.1 for ratio in every)
    short = f"Of {len(every)} predictions {near} are within 10 % of what was measured. Predicted / time is"
    short += f" {span(every, two)}, the median {two(statistics.median(every))}: below 1 the prediction was too fast."
    return Answer(question, short, table(rows, PREDICTED))


def equal(question: str, records: list[Record]) -> Answer:
    """The test runs whose records say that bits were compared."""
    runs = [row for record in records if record.kind == "tests/gpu" for row in record.content["rows"]]
    bits = [row for row in runs if any(words in row["what"] for words in COMPARES_BITS)]
    if not bits:
        return Answer(question)
    passed, failed = (sum(row[name] for row in bits) for name in ("passed", "failed"))
    short = f"Tests that compare bits on GPUs, on up to {max(row['gpus'] for row in bits)} at once:"
    return Answer(
        question,
        f"{short} {passed} passed and {failed} failed in the recorded runs.",
        table(bits, RAN),
        "Tests on GPUs",
    )


def span(values: Iterable[float], show: Figure) -> str:
    """`low to high`, or the one figure that all of them are shown as."""
    values = list(values)
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def two(value: float) -> str:
    return f"{value:.2f}"


def times(value: float) -> str:
    """A ratio, more exactly where it is near 1."""
    return f"{value:.2f}" if value < 2 else f"{value:.1f}"


def milliseconds(seconds: float) -> str:
    return f"{ms(seconds):.4g}"


STREAMED = ("model", "ranks", "resident", "weights", "streamed_bytes")
RESIDENT = ("model", "ranks", "weights", "batch_size")
MODEL: list[Column] = [(name, text(name)) for name in ("model", "ranks", "weights")]
TIMES: list[Column] = [("a decode pass, ms", text("passes")), ("bound, ms", text("bounds"))]
TIMES.append(("bound / time", text("fractions")))
STREAMED_SHOWN: list[Column] = [
    *MODEL,
    *(("streamed GB a rank", number("streamed_bytes", 2, 1 / GB)), ("batch", text("batches"))),
    *TIMES,
]
RESIDENT_SHOWN: list[Column] = [*MODEL, ("batch", text("batches")), ("prompt tokens", text("prompts")), *TIMES]
COMPARED: list[Column] = [
    *(("against", text("baseline")), ("our weights", text("weights")), ("row", text("row"))),
    *(("batch", text("batch_size")), ("their ms", in_ms("theirs_s")), ("ours", in_ms("ours_s"))),
    *(("times faster", number("speedup", 2)), ("our bound / time", number("fraction_of_bound", 2))),
    *(("error", text("error")), ("record", text("record"))),
]
PREDICTED: list[Column] = [
    *(("what", text("what")), ("measured", text("number"))),
    *(("predicted / time", text("span")), ("median", number("middle", 2))),
]
RAN: list[Column] = [(name, text(name)) for name in ("tests", "gpus", "passed", "failed", "what")]
