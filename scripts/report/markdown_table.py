"""Rows of records as Markdown tables. Torch-free."""

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]  # its name, and what it shows of a row

DECIMALS = 3


def text(key: str) -> Callable[[Row], str]:
    return lambda row: cell(row.get(key))


def number(key: str, decimals: int = DECIMALS, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else f"{row[key] * scale:.{decimals}f}"


def nonzero(key: str) -> Callable[[Row], str]:
    """A value that says nothing where it is 0."""
    return lambda row: cell(row.get(key) or None)


def ms(key: str) -> Callable[[Row], str]:
    return number(key, 2, 1e3)


def table(rows: Iterable[Row], columns: list[Column]) -> str:
    """Makes a Markdown table, without columns that have no value."""
    lines = [[show(row) for _, show in columns] for row in rows]
    used = [index for index in range(len(columns)) if any(line[index] for line in lines)]
    head = [columns[index][0] for index in used]
    body = [[line[index] for index in used] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(used), *body)) + "\n"


def cell(value: Any) -> str:
    """Shows a value as Markdown that does not break a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(one)}" for key, one in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")
