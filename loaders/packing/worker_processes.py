"""Processes that make shards: plain children on pipes, so that a kill leaves neither locks nor shared memory."""

import json
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any, cast

import numpy as np

from fastrdm.loaders.packing.shard_writer import Settings
from fastrdm.loaders.sources.source import Source

Message = dict[str, Any]
Span = tuple[int, int]  # the images of a shard: numbers of the first one and of the one behind the last
TICK = 1.0  # seconds without a message after which None is sent, for a progress line
# Isolated: neither the working folder nor variables of the environment lead to other modules than the parent has.
CHILD = "import sys; sys.path[:] = sys.argv[1:]; from fastrdm.loaders.packing.shard_writer import main; main()"


def make_shards(settings: Settings, source: Source, todo: dict[int, Span], workers: int) -> Iterator[Message | None]:
    """Messages of `workers` processes that make the shards of `todo`, and None now and then; ValueError if one fails.

    Each shard's images go to the process as a source of their own. Multiprocessing would import the command's main
    module, and torch with it, in each of them.
    """
    tasks = iter(todo.items())
    messages: queue.SimpleQueue[Message | Exception | None] = queue.SimpleQueue()
    processes = [_start(settings) for _ in range(min(workers, len(todo)))]
    lock = threading.Lock()
    for process in processes:
        threading.Thread(target=_converse, args=(process, source, tasks, lock, messages), daemon=True).start()
    running = len(processes)
    try:
        while running:
            try:
                message = messages.get(timeout=TICK)
            except queue.Empty:
                yield None
                continue
            if message is None:
                running -= 1
            elif isinstance(message, Exception):
                raise message
            else:
                yield message
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start(settings: Settings) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", CHILD, *filter(None, sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    pickle.dump(settings, process.stdin)
    process.stdin.flush()
    return process


def _converse(
    process: "subprocess.Popen[bytes]",
    source: Source,
    tasks: Iterator[tuple[int, Span]],
    lock: threading.Lock,
    messages: "queue.SimpleQueue[Message | Exception | None]",
) -> None:
    """Give one process its tasks, one after the other, and pass on what it says; None at the end."""
    stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    try:
        while True:
            with lock:
                task = next(tasks, None)
            if task is None:
                break
            shard, span = task
            pickle.dump((shard, _part(source, span)), stdin)
            stdin.flush()
            message: Message = {}
            while "record" not in message:
                line = stdout.readline()
                message = json.loads(line) if line else {"error": f"its process died (status {process.wait()})"}
                if "error" in message:
                    first, last = source.key(span[0]), source.key(span[1] - 1)
                    raise ValueError(f"shard {shard}, {first} to {last}: {message['error']}")
                messages.put(message)
    except (OSError, ValueError) as error:
        messages.put(error if isinstance(error, ValueError) else ValueError(f"a packing process died: {error}"))
    messages.put(None)


def _part(source: Source, span: Span) -> bytes:
    """The images of a shard for another process, which unpickles them when it is ready to tell what goes wrong."""
    try:
        return pickle.dumps(source.take(np.arange(*span)))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"loader.source {source.name} cannot be sent to another process: {error}") from None
