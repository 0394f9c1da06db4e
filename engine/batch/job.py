"""A job: what decides its rows to the last byte, kept beside its output in `OUTPUT.job`.

Its name is a hash of that; ids and seeds of rows are made from it and from the row's line, so a row is the same
whenever and wherever it runs.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from penstock.engine.batch.output_log import sync_folder
from penstock.engine.user_files import named_errors, read_json
from penstock.scheduler.units import show_value

SEMANTICS = 1  # raised when the same job would give other rows
FIELDS = {"job": str, "created": int, "facts": dict, "shard": int, "num_shards": int, "errors": str | None}
ANEW = "give another -o, or --force-new to begin anew"
HASHES, MOST_SHOWN = ("input", "checkpoint"), 16  # facts of which so many characters are shown


@dataclass(frozen=True)
class Job:
    """A job, or the share of it that the lines of `shard` of `num_shards` are. `facts` decide its rows; `created` is
    the Unix time at which it began, `errors` the file that failed rows go to, from the output's folder on, if it is not
    the output."""

    facts: dict[str, Any]
    created: int
    shard: int = 0
    num_shards: int = 1
    errors: str | None = None

    @functools.cached_property
    def name(self) -> str:
        """The hash of the facts, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def flags(self) -> dict[str, str | None]:
        """The flags that decide which rows are in the output, and their values."""
        return {"shard": f"{self.shard}/{self.num_shards}", "errors": self.errors}

    def has(self, index: int) -> bool:
        """Tells whether the row of this index, among all of the input, is in this share."""
        return index % self.num_shards == self.shard

    def seed(self, number: int) -> int:
        """The seed of the row of a line whose body gives none."""
        digest = hashlib.sha256(f"{self.name} {number}".encode()).digest()
        return int.from_bytes(digest[:8], "little")

    def errors_beside(self, output: Path) -> Path | None:
        """The file of failed rows, if there is one."""
        return None if self.errors is None else output.parent / self.errors

    def continued(self, output: Path) -> Self:
        """This job as it was begun, by the file beside its output. Raises ValueError, saying what differs, if the
        output is another job's."""
        try:
            begun = read_job(output)
        except ValueError as error:
            raise ValueError(f"{error} ({ANEW})") from None
        other = difference(begun.facts, self.facts)
        for flag in ("shard", "errors"):
            before, now = begun.flags[flag], self.flags[flag]
            if before != now:
                other = other or f"--{flag} was {before}, and is {now}"
        if other:
            raise ValueError(f"{output}: is the output of another job: {other} ({ANEW})")
        return dataclasses.replace(self, created=begun.created)

    def keep(self, output: Path) -> None:
        """Writes the file beside the output, all at once. Raises ValueError if it cannot be."""
        file = job_file(output)
        new = file.with_name(file.name + ".new")
        content = {"job": self.name, **dataclasses.asdict(self)}
        with named_errors(file), contextlib.ExitStack() as undo:
            undo.callback(new.unlink, missing_ok=True)
            with open(new, "w") as stream:
                json.dump(content, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            os.rename(new, file)
            sync_folder(file)


def job_file(output: Path) -> Path:
    """The file in which the job of an output is kept."""
    return output.parent / f"{output.name}.job"  # `with_name` takes no folder, which others refuse by its flag


def errors_from(output: str, errors: str | None) -> str | None:
    """The file of failed rows as seen from the folder of the output: the two move together."""
    return None if errors is None else os.path.relpath(errors, Path(output).parent)


def read_job(output: Path) -> Job:
    """The job of an output. Raises ValueError, naming the file beside it, if that is none."""
    file = job_file(output)
    if output.exists() and not file.exists():
        raise ValueError(f"{output}: is no output of a batch job: {file} is missing")
    content = read_json(file)
    if set(content) != set(FIELDS) or not all(isinstance(content[name], kind) for name, kind in FIELDS.items()):
        raise ValueError(f"{file}: expected the fields {', '.join(FIELDS)}; another version may have others")
    name = content.pop("job")
    job = Job(**content)
    if job.name != name:
        raise ValueError(f"{file}: job: is not the hash of the facts; the file was changed")
    return job


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first fact, or default, that is not what it was; empty if there is none."""
    for name in [*now, *before]:
        facts = before.get(name), now.get(name)
        if facts[0] != facts[1] and name == "defaults":
            return difference(*facts)
        if facts[0] != facts[1]:
            was, is_now = ("not given" if fact is None else _shown(name, fact) for fact in facts)
            return f"its {name.replace('_', ' ')} was {was}, and is {is_now}"
    return ""


def _shown(name: str, fact: Any) -> str:
    return fact[:MOST_SHOWN] if name in HASHES else show_value(fact)
