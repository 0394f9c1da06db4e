"""Shows transfer ledgers as text: by operation and layer, and what each remedy leaves. Torch-free."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from penstock.engine.model.spec import ModelSpec
from penstock.engine.split.transfers import ATTENTION_OPERATIONS, REMEDIES, predict, prefill
from penstock.parallel.ledger import Site, Transfer, TransferLedger, total
from penstock.scheduler.passes.pass_plan import Compute
from penstock.scheduler.units import KIB, MIB

LEAST_MIB_BYTES = 16 * MIB  # less than this in all is shown in KiB
Line = list[str]


def transfer_table(predicted: TransferLedger, counted: TransferLedger | None = None, folded: bool = True) -> str:
    """A table with a line for each operation and layer, or, folded, for each operation and run of layers with equal
    transfers. With `counted` its figures are beside the predicted ones."""
    unit, divisor = _unit(predicted.total)
    head = ["operation", "layers", "calls", f"sent {unit}", f"received {unit}", f"total {unit}", "share"]
    if counted is not None:
        head += ["counted: calls", f"sent {unit}", f"received {unit}"]

    def line(name: str, layers: str, sites: Iterable[Site]) -> Line:
        sites = list(sites)
        expected = total(predicted.at(site) for site in sites)
        cells = [name, layers, *_cells(expected, divisor), f"{expected.total_bytes / divisor:.2f}"]
        cells.append(f"{expected.total_bytes / predicted.total.total_bytes:.1%}")
        if counted is not None:
            cells += _cells(total(counted.at(site) for site in sites), divisor)
        return cells

    runs = _runs(predicted, counted, folded)
    lines = [line(sites[0].operation, _layers(sites), sites) for sites in runs]
    every = line("all", "", [site for sites in runs for site in sites])
    return _aligned([head, *lines, every])


def difference(predicted: TransferLedger, counted: TransferLedger) -> str:
    """A sentence that says whether two ledgers are equal, or where they first differ."""
    for site in dict.fromkeys([*predicted.sites, *counted.sites]):
        expected, found = predicted.at(site), counted.at(site)
        if expected != found:
            return f"counted differs from predicted, first at {site}: {found} and not {expected}"
    return "counted equals predicted, byte for byte"


def remedy_table(steps: Sequence[Compute], spec: ModelSpec, num_tokens: int) -> str:
    """A table of what crosses in the prefill of a prompt, originally and with each remedy."""
    ledgers = {
        name: predict(steps, spec, prefill(num_tokens, chunk_tokens), config)
        for name, (config, chunk_tokens) in REMEDIES.items()
    }
    original = next(iter(ledgers.values())).total
    unit, divisor = _unit(original)
    sizes = (f"sent {unit}", f"received {unit}", f"total {unit}", f"saved {unit}")
    head = ["wire and attention", "calls", *sizes, "attention calls", "score tensors"]
    lines = []
    for name, ledger in ledgers.items():
        moved = ledger.total
        saved_bytes = original.total_bytes - moved.total_bytes
        attention_bytes = ledger.operation(*ATTENTION_OPERATIONS).total_bytes
        scores_bytes = 2 * ledger.operation("attention_scores").received_bytes  # they are received, and sent back
        lines.append(
            [name, *_cells(moved, divisor)]
            + [f"{moved.total_bytes / divisor:.2f}", f"{saved_bytes / divisor:.2f}"]
            + [f"{part / moved.total_bytes:.1%}" for part in (attention_bytes, scores_bytes)]
        )
    return _aligned([head, *lines])


def _unit(moved: Transfer) -> tuple[str, int]:
    return ("MiB", MIB) if moved.total_bytes >= LEAST_MIB_BYTES else ("KiB", KIB)


def _cells(moved: Transfer, divisor: int) -> Line:
    return [str(moved.num_calls), f"{moved.sent_bytes / divisor:.2f}", f"{moved.received_bytes / divisor:.2f}"]


def _runs(predicted: TransferLedger, counted: TransferLedger | None, folded: bool) -> list[list[Site]]:
    """The sites of each line of the table."""
    sites = list(dict.fromkeys([*predicted.sites, *(counted.sites if counted is not None else ())]))
    if not folded:
        return [[site] for site in sites]

    def moved(site: Site) -> tuple[Transfer, Transfer | None]:
        return predicted.at(site), counted.at(site) if counted is not None else None

    names = dict.fromkeys(site.operation for site in sites)
    of_name = [[site for site in sites if site.operation == name] for name in names]
    return [list(run) for group in of_name for _, run in groupby(group, key=moved)]


def _layers(sites: list[Site]) -> str:
    first, last = sites[0].layer_idx, sites[-1].layer_idx
    if sites[0].operation in ("embedding", "head"):
        return ""
    return str(first) if first == last else f"{first} to {last}"


def _aligned(lines: list[Line]) -> str:
    """Aligns the text of the first column to the left and the figures of the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )
