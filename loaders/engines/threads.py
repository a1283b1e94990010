"""Threads that prepare images beside the training step."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch


def start_threads(workers: int, name: str) -> ThreadPoolExecutor:
    """`workers` running threads in which torch keeps to one core each.

    By default an operation in each of them would call up its own team of threads, as many as there are cores, and the
    teams would fight (measured: half the images a second on 2 cores, 2 workers).
    """
    mine = torch.get_num_threads()
    together = Barrier(workers)  # no thread takes two of the tasks below

    def keep_to_one_core() -> None:
        torch.get_num_threads()  # the first call in a thread sets it to the default: before, not after
        torch.set_num_threads(1)
        together.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    for task in [pool.submit(keep_to_one_core) for _ in range(workers)]:
        task.result()
    torch.set_num_threads(mine)  # the setting is the thread's own, but for MKL's and that of threads yet to come
    return pool
