"""Two agents of torchrun, each with its own ranks, as on two hosts; they meet over a loopback:

    python -m tests.support.two_agents RANKS_OF_EACH SCRIPT ARGUMENTS

Ends when both have, with the larger exit code. It hosts the store of the rendezvous, so that no port can be taken.
"""

import subprocess
import sys

from torch.distributed import TCPStore


def main() -> int:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-conf", "is_host=0"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        *where,
        "--nproc-per-node",
        *sys.argv[1:],
    ]
    agents = [subprocess.Popen(command) for _ in range(2)]
    return max(abs(agent.wait()) for agent in agents)


if __name__ == "__main__":
    sys.exit(main())
