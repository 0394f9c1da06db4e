"""Collectives on two gloo ranks, of one launch, which write their results; then the errors that count as a
lost peer, and the group of one rank."""

import json

import pytest
import torch
import torch.distributed as dist
from penstock.parallel.collectives import Solo
from penstock.parallel.failure import PeerLost, RankFailed
from penstock.parallel.gloo import peer_errors
from penstock.parallel.launch import Launch
from penstock.parallel.ledger import TransferLedger
from penstock.parallel.rendezvous import connect
from penstock.parallel.topology import Topology

from tests.support.forked_ranks import fork_ranks

pytestmark = pytest.mark.timeout(60)
DTYPES = ("float32", "bfloat16", "float16", "int32")
LONG = [*range(-5000, 5000), 2**31 - 1, -(2**31)]
LISTS = [
    [],
    [7, -8],
    LONG,
    *(list(range(n)) for n in (1021, 1022, 1023)),
]  # with lengths around what the first frame holds

RANK = """
import json, sys
import torch
from penstock.parallel.gloo import DIRECT_BYTES
from penstock.parallel.launch import resolve_launch, run_rank
from penstock.parallel.rendezvous import connect
from penstock.parallel.topology import resolve_topology

WIDTHS = [DIRECT_BYTES // 4, DIRECT_BYTES // 4 + 1, DIRECT_BYTES]  # on both sides of the border in dtypes of 4 and 2

def main():
    folder, lists, dtypes = json.loads(sys.argv[1])
    for _ in range(2):  # a second group in the same processes, as one LLM after another
        launch = resolve_launch(2)
        topology = resolve_topology(launch.rank, launch.tp_size, launch.local_rank, "cpu")
        group = connect(topology, launch, timeout_s=50)
        got = {"tensors": {name: tensors(group, getattr(torch, name)) for name in dtypes}}
        got |= {"rank": group.rank, "size": group.size, **messages(group, lists)}
        got |= {"ledger": group.ledger.to_dict()}
        group.close()
        group.close()
        launch.close()
    with open(f"{folder}/{launch.rank}.json", "w") as file:
        json.dump(got, file)

def tensors(group, dtype):
    part = (torch.arange(6).reshape(2, 3) + 10 * group.rank).to(dtype)
    columns = torch.full((2, 6), 99, dtype=dtype)
    group.all_gather_columns(part, columns)
    strided = torch.full((2, 6), 99, dtype=dtype)
    group.all_gather_columns(torch.stack((part, part), dim=-1)[..., 0], strided)
    kept = part.clone()
    group.all_reduce(part, "attn")
    group.all_reduce(kept, "ffn")
    for width in WIDTHS:
        given = torch.arange(width)[None] % 7
        row = (given + group.rank).to(dtype)
        rows = torch.full((1, 2 * width), 99, dtype=dtype)
        group.all_gather_columns(row, rows)
        assert torch.equal(rows, torch.cat([given, given + 1], -1).to(dtype))
        group.all_reduce(row, "large")
        assert torch.equal(row, (given * 2 + 1).to(dtype))
    return [part.tolist(), columns.tolist(), strided.tolist()]

def messages(group, lists):
    give = group.rank == 0
    data = group.broadcast_bytes(bytes(range(256)) * 40 if give else None)
    group.barrier()
    own = [b"", bytes(range(group.rank + 3)), bytes([group.rank]) * 5000 * (2 - group.rank)]
    gathered = [group.gather_bytes(one) for one in own]
    heard = None if gathered == [None] * 3 else [[one.hex() for one in ones] for ones in gathered]
    heard_lists = [group.broadcast_ints(ints if give else None) for ints in lists]
    return {"gathered": heard, "lists": heard_lists, "data": data.hex()}

sys.exit(run_rank(main))
"""


@pytest.fixture(scope="module")
def got(tmp_path_factory) -> list[dict]:
    """The results of the two ranks, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(RANK)
    done = fork_ranks(2, folder / "rank.py", json.dumps([str(folder), LISTS, DTYPES]), timeout=55)
    assert done.all_ended, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_and_gather(got, dtype):
    columns = [[0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15]]
    for rank in got:
        assert rank["tensors"][dtype] == [[[10, 12, 14], [16, 18, 20]], columns, columns]


def test_host_messages_reach_all_ranks(got):
    assert [(rank["rank"], rank["size"]) for rank in got] == [(0, 2), (1, 2)]
    for rank in got:
        assert rank["lists"] == LISTS
        assert bytes.fromhex(rank["data"]) == bytes(range(256)) * 40


def test_rank_0_gets_the_bytes_of_all(got):
    own = [[b"", bytes(range(rank + 3)), bytes([rank]) * 5000 * (2 - rank)] for rank in (0, 1)]
    assert got[0]["gathered"] == [[one.hex() for one in ones] for ones in zip(*own)]
    assert got[1]["gathered"] is None


def test_a_ledger_counts_one_group(got):
    moved = {"num_calls": len(DTYPES), "sent_bytes": 6 * (4 + 2 + 2 + 4), "received_bytes": 0}
    for rank in got:
        operations = rank["ledger"]["operations"]
        assert operations.pop("large")["num_calls"] == 3 * len(DTYPES)
        assert operations == {"attn": moved, "ffn": moved}


def test_solo_moves_nothing():
    group = connect(Topology(0, 1, 0, torch.device("cpu")), Launch("solo"))
    assert isinstance(group, Solo)
    part, out = torch.ones(2, 3), torch.zeros(2, 3)
    group.all_reduce(part, "attn")
    group.all_gather_columns(part, out)
    assert torch.equal(part, torch.ones(2, 3)) and torch.equal(out, part)
    assert group.broadcast_ints([1, 2]) == [1, 2] and group.broadcast_bytes(b"ab") == b"ab"
    assert group.gather_bytes(b"ab") == [b"ab"] and group.ledger == TransferLedger()
    group.barrier()
    group.close()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6037."),
        RuntimeError("Connection reset by peer"),
        RuntimeError("[/gloo/transport/tcp/pair.cc] writev [::1]:9: Broken pipe"),
        RuntimeError("Timed out waiting 600000ms for recv operation to complete"),
        RuntimeError("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 600000 ms"),
        dist.DistNetworkError("The client socket has timed out after 2000ms while trying to connect"),
        dist.DistStoreError("wait timeout after 300000ms"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
    ],
)
def test_errors_of_dead_peers(error):
    with pytest.raises(PeerLost), peer_errors():
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Connection closed by peer"),
        RuntimeError("op.preamble.length <= op.nbytes. 4 vs 8"),
        dist.DistBackendError("NCCL error: invalid usage"),
        RankFailed(1, "failed", "RuntimeError: Connection closed by peer"),
    ],
)
def test_own_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, peer_errors():
        raise error
    assert raised.value is error
