"""Short decode calls while other processes want the same cores: calls a second and latencies.

    python bench/load.py                         1 x 1, 2 x 1, 2 x 2 and 4 x 2 on this machine
    python bench/load.py --only 2x2 --seconds 5

P x T are P processes of T threads each, all on the cores of this machine at once.  A server with
several workers, or a machine with other work, is such a place: threads that wait for each other
by spinning take the cores from those that they wait for.  Each process calls `attention_decode`
(or torch's attention, for comparison) back to back; rows are Markdown.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time

SHAPE = (8, 1024, 64)  # heads, keys, head dimension of a call: some 0.3 ms on one core


def worker(name: str, threads: int, seconds: float, barrier, results) -> None:
    """Call for so long; put the milliseconds of each call into `results`"""
    import torch

    import attn_ext

    torch.set_num_threads(threads)
    heads, keys, dim = SHAPE
    q = torch.randn(1, heads, 1, dim)
    k, v = (torch.randn(1, heads, keys, dim) for _ in range(2))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    call = attn_ext.attention_decode if name == "attn_ext" else sdpa
    took = []
    with torch.no_grad():
        for _ in range(50):
            call(q, k, v)
        barrier.wait()
        end = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end:
            call(q, k, v)
            took.append((time.perf_counter() - begin) * 1e3)
    results.put(took)


def measure(name: str, processes: int, threads: int, seconds: float) -> list[float]:
    """Milliseconds of every call of all processes"""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    arguments = (name, threads, seconds, barrier, results)
    workers = [context.Process(target=worker, args=arguments) for _ in range(processes)]
    for process in workers:
        process.start()
    took = [ms for _ in workers for ms in results.get(timeout=120 + seconds)]
    for process in workers:
        process.join()
    return sorted(took)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="comma-separated, e.g. 2x1,2x2")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--what", default="attn_ext,torch", help="whose calls")
    options = parser.parse_args()
    runs = (options.only or "1x1,2x1,2x2,4x2").split(",")
    print("| calls of | processes x threads | calls/s | median, ms | p99, ms | largest, ms |")
    print("|---|---|---|---|---|---|")
    for name in options.what.split(","):
        for run in runs:
            processes, threads = (int(n) for n in run.split("x"))
            took = measure(name, processes, threads, options.seconds)
            late = took[min(len(took) - 1, int(len(took) * 0.99))]
            print(
                f"| {name} | {processes} x {threads} | {len(took) / options.seconds:.0f} "
                f"| {statistics.median(took):.3f} | {late:.3f} | {took[-1]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
