"""The transfer ledger: it counts by site, and copies, differences and sums of ledgers are those of their sites."""

import json

from penstock.parallel.ledger import Site, Transfer, TransferLedger

ATTN, FFN, REDUCE = Site("attn", 0), Site("ffn", 0), Site("attn_allreduce", -1)


def ledger(*calls: tuple[Site, int, int]) -> TransferLedger:
    made = TransferLedger()
    for call in calls:
        made.add(*call)
    return made


def test_calls_and_bytes_by_site():
    counted = ledger((FFN, 5, 1), (ATTN, 10, 0), (FFN, 7, 2))
    assert list(counted.sites.items()) == [(FFN, Transfer(2, 12, 3)), (ATTN, Transfer(1, 10, 0))]
    assert counted.at(FFN) == Transfer(2, 12, 3) and counted.at(REDUCE) == Transfer()
    assert counted.total == Transfer(3, 22, 3) and counted.total.total_bytes == 25
    assert counted.operation("attn", "nothing") == Transfer(1, 10, 0)
    assert counted.only(lambda site: site == ATTN) == ledger((ATTN, 10, 0))
    assert counted == ledger((ATTN, 10, 0), (FFN, 7, 2), (FFN, 5, 1)) != ledger((ATTN, 10, 0), (FFN, 12, 3))


def test_json_has_totals_by_operation():
    counted = ledger((ATTN, 10, 1), (Site("attn", 1), 20, 2), (REDUCE, 4, 0))
    told = json.loads(json.dumps(counted.to_dict()))
    names = ("num_calls", "sent_bytes", "received_bytes")
    assert told["total"] == dict(zip(names, (3, 34, 3)))
    assert told["operations"] == {
        "attn": dict(zip(names, (2, 30, 3))),
        "attn_allreduce": dict(zip(names, (1, 4, 0))),
    }
    first, second, third = told["sites"]
    assert second == {"operation": "attn", "layer_idx": 1, **dict(zip(names, (1, 20, 2)))}
    assert (first["layer_idx"], third["layer_idx"]) == (0, -1)
    nothing = dict.fromkeys(names, 0)
    assert TransferLedger().to_dict() == {"total": nothing, "operations": {}, "sites": []}


def test_a_gain_is_what_was_counted_since():
    counted = ledger((ATTN, 10, 1), (FFN, 5, 0))
    before = counted.copy()
    counted.add(ATTN, 3)
    counted.add(REDUCE, 4)
    gain = counted - before
    assert gain == ledger((ATTN, 3, 0), (REDUCE, 4, 0)) and before == ledger((ATTN, 10, 1), (FFN, 5, 0))
    for _ in range(2):
        before.update(gain)
    assert before == ledger((ATTN, 10, 1), (FFN, 5, 0), *[(ATTN, 3, 0), (REDUCE, 4, 0)] * 2)
    assert gain == ledger((ATTN, 3, 0), (REDUCE, 4, 0)), "what is added to is not what is added"
    counted.clear()
    assert counted == TransferLedger() and counted.total == Transfer()


def test_parts_are_not_the_whole():
    counted = ledger((ATTN, 10, 0))
    part = counted.only(lambda site: True)
    part.add(ATTN, 1)
    assert counted.at(ATTN) == Transfer(1, 10, 0)
