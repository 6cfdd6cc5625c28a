"""A Ray cluster of local nodes, as a program: `ray_nodes.py BYTES…`, a node for each number, which is its memory.

It prints address and raylets in one line. A raylet on its standard input ends that node; the end of the input ends the cluster.
The head has no CPU, the first node two, the others one.
"""

from __future__ import annotations

import json
import sys
import warnings

warnings.simplefilter("ignore")

from ray.cluster_utils import Cluster  # noqa: E402 - its warnings are Ray's own


def lose(raylet: int) -> None:
    """Kill a raylet and all processes below it, which would go on without it."""
    import psutil  # comes with Ray, which finds it

    process = psutil.Process(raylet)
    below = process.children(recursive=True)
    for one in (process, *below):
        one.kill()


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        sizes = [int(size) for size in sys.argv[1:]]
        nodes = [cluster.add_node(num_cpus=1 if number else 2, memory=size) for number, size in enumerate(sizes)]
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)  # noqa: T201
        for line in sys.stdin:
            lose(int(line))
            print("lost", flush=True)  # noqa: T201
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
