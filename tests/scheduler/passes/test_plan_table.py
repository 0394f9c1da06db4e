"""The step table is the plan: it shows each letter and each copy that the plan has, and nothing else."""

import pytest
from penstock.scheduler.passes.build import default_ring_bytes, lay_out_ring, make_plan
from penstock.scheduler.passes.pass_plan import Compute, GroupId, RingLayout
from penstock.scheduler.passes.pass_table import render

TOKEN_BYTES = {"x": ("tokens", 128), "y": ("tokens", 64), "logits": ("rows", 1000)}


def steps(num_layers):
    made = [Compute("embedding", -1, None, (("x", "+w"),))]
    for i in range(num_layers):
        made += [
            Compute("up", i, GroupId(i, "attn"), (("x", "r"), ("y", "+w"))),
            Compute("think", i, None, (("y", "rw"),)),
            Compute("down", i, GroupId(i, "ffn"), (("x", "rw"), ("y", "rx"))),
        ]
    head = GroupId(num_layers, "head")
    return [
        *made,
        Compute("head", num_layers, head, (("x", "rx"), ("logits", "+w"))),
        Compute("sample", num_layers, None, (("logits", "rx"),)),
    ]


def plan_of(num_layers):
    groups = dict.fromkeys(step.group for step in steps(num_layers) if step.group)
    streamed = [(group, 512) for group in groups]
    return make_plan(steps(num_layers), lay_out_ring(streamed, default_ring_bytes(streamed)))


def cells(text):
    """The table as a list of {column: cell}."""
    lines = text.split("\n\n")[0].splitlines()
    head = [cell.strip() for cell in lines[0].split("|")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
    return [dict(zip(head, [*row, *[""] * (len(head) - len(row))], strict=True)) for row in rows]


def test_letters_of_a_layer():
    rows = {row["compute lane"]: row for row in cells(render(plan_of(5), TOKEN_BYTES))}
    assert (rows["embedding"]["x"], rows["embedding"]["y"]) == ("+w", "")
    assert (rows["up"]["x"], rows["up"]["y"], rows["up"]["weights"]) == ("r", "+w", "0.attn")
    assert (rows["think"]["x"], rows["think"]["y"], rows["think"]["weights"]) == ("o", "rw", "")
    assert (rows["down"]["x"], rows["down"]["y"]) == ("rw", "rx")
    assert (rows["head"]["x"], rows["head"]["logits"], rows["head"]["weights"]) == ("rx", "+w", "head")
    assert rows["sample"]["logits"] == "rx"


def test_the_other_layers_are_one_row():
    names = [row["compute lane"] for row in cells(render(plan_of(5), TOKEN_BYTES))]
    assert names.count("up") == 1 and "... layers 1 to 4 alike" in names
    assert names.index("... layers 1 to 4 alike") > names.index("release 0.ffn")
    assert "... layer 1" in [row["compute lane"] for row in cells(render(plan_of(2), TOKEN_BYTES))]


def test_a_layer_in_the_middle():
    names = [row["compute lane"] for row in cells(render(plan_of(5), TOKEN_BYTES, layer_idx=2))]
    assert "... layers 0 to 1 alike" in names and "... layers 3 to 4 alike" in names and "acquire 2.attn" in names


@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_every_copy_is_counted(num_layers):
    plan = plan_of(num_layers)
    shown = [row["copy lane"] for row in cells(render(plan, TOKEN_BYTES))]
    hidden = sum(int(cell.split()[0]) for cell in shown if cell.endswith("more copies"))
    assert sum(cell.count("prefetch") for cell in shown) + hidden == 2 * num_layers + 1


def test_lanes_show_what_they_wait_for():
    text = render(plan_of(5), TOKEN_BYTES)
    rows = {row["compute lane"]: row for row in cells(text)}
    assert rows["acquire 0.attn"]["weights"] == "in the ring"
    assert rows["release 0.attn"]["weights"] == "records free(0.attn)"
    assert rows["join"]["weights"].startswith("waits ready(")
    assert "<- 0." in text


def test_lifetimes_and_sizes_follow():
    text = render(plan_of(5), TOKEN_BYTES)
    assert "128 bytes a token" in text and "1000 bytes a row" in text
    assert "5 lives, the first from up to down" in text and "1 life, the first from embedding to head" in text


def test_a_resident_plan_has_one_lane():
    rows = cells(render(make_plan(steps(2), RingLayout(0, 0, ())), TOKEN_BYTES))
    assert all(row["copy lane"] == "" for row in rows) and rows[0]["compute lane"] == "embedding"
