"""Two agents of torchrun, each with its own ranks and GPUs, as on two hosts; they meet over a loopback:

    python -m tests.support.two_agents RANKS_OF_EACH SCRIPT ARGUMENTS

Ends when both have, with the larger exit code. It hosts the store of the rendezvous, so that no port can be taken. NCCL
takes the agents for hosts, too, and so goes over the network.
"""

import os
import subprocess
import sys

from torch.distributed import TCPStore


def main() -> int:
    store, num_ranks = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), int(sys.argv[1])
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{store.port}", "--rdzv-conf", "is_host=0"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        *where,
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        *sys.argv[1:],
    ]
    agents = []
    for agent in range(2):
        gpus = ",".join(str(agent * num_ranks + rank) for rank in range(num_ranks))
        own = {"CUDA_VISIBLE_DEVICES": gpus, "NCCL_HOSTID": f"host{agent}"}
        agents.append(subprocess.Popen(command, env=os.environ | own))
    return max(abs(agent.wait()) for agent in agents)


if __name__ == "__main__":
    sys.exit(main())
