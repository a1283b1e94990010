"""Processes that make shards: plain children on pipes, so that a kill leaves neither locks nor shared memory."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from fastrdm.loaders.packing import shard_writer
from fastrdm.loaders.packing.shard_writer import Settings

Message = dict[str, Any]
TICK = 1.0  # seconds without a message after which None is sent, for a progress line


def make_shards(settings: Settings, todo: dict[int, list[tuple[str, int]]], workers: int) -> Iterator[Message | None]:
    """Messages of `workers` processes that make the shards of `todo`, and None now and then; ValueError if one fails.

    Multiprocessing would import the command's main module, and torch with it, in each of them.
    """
    tasks = iter([{"shard": number, "files": files} for number, files in todo.items()])
    messages: queue.SimpleQueue[Message | Exception | None] = queue.SimpleQueue()
    processes = [_start(settings) for _ in range(min(workers, len(todo)))]
    lock = threading.Lock()
    for process in processes:
        threading.Thread(target=_converse, args=(process, tasks, lock, messages), daemon=True).start()
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


def _start(settings: Settings) -> "subprocess.Popen[str]":
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, shard_writer.__file__],  # `-m` would look into the working folder first
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdin
    process.stdin.write(json.dumps(settings._asdict()) + "\n")
    return process


def _converse(
    process: "subprocess.Popen[str]",
    tasks: Iterator[Message],
    lock: threading.Lock,
    messages: "queue.SimpleQueue[Message | Exception | None]",
) -> None:
    """Give one process its tasks, one after the other, and pass on what it says; None at the end."""
    assert process.stdin and process.stdout
    try:
        while True:
            with lock:
                task = next(tasks, None)
            if task is None:
                break
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            message: Message = {}
            while "record" not in message:
                line = process.stdout.readline()
                message = json.loads(line) if line else {"error": f"its process died (status {process.wait()})"}
                if "error" in message:
                    files = task["files"]
                    raise ValueError(f"shard {task['shard']}, {files[0][0]} to {files[-1][0]}: {message['error']}")
                messages.put(message)
    except (OSError, ValueError) as error:
        messages.put(error if isinstance(error, ValueError) else ValueError(f"a packing process died: {error}"))
    messages.put(None)
