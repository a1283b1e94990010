"""The `fastrdm` command: the table of its commands, their exit statuses, and what becomes of their errors. No torch."""

import difflib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from fastrdm import __version__
from fastrdm.errors import RunError
from fastrdm.renamed import RENAMED
from fastrdm.worker import OUTCOMES

EXIT_FAILED, EXIT_REFUSED, EXIT_ALARM = 1, 2, 3  # 3: an alarm stopped the run, monitor.alarms.action
EXIT_STOPPED = 75  # asked to stop, saved; the same command continues
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals on which a run finishes its step, saves and stops."""


class Command(NamedTuple):
    """One command of the command line."""

    module: str  # below fastrdm; its function gives the exit status from the arguments
    sentence: str
    function: str = "main"


COMMANDS = {
    "train": Command(
        "commands.train_cli", "Train an encoder; without arguments, a small one on the digits of scikit-learn."
    ),
    "eval": Command("commands.evaluate", "Measure a trained encoder by k-NN, a linear probe or fine-tuning."),
    "embed": Command("commands.embed", "Write the features of all images of a source, with names and labels."),
    "explore": Command("commands.explore", "Write a page to look at images as a trained encoder sees them."),
    "analyze": Command("commands.analyze", "Measure spectra, rank difference and spectral filter of finished runs."),
    "report": Command("commands.report", "Write an HTML page about one run or several."),
    "export": Command("commands.export", "Write an encoder's weights for torchvision, timm or safetensors."),
    "plan": Command("commands.plan", "Estimate the memory and the time of a run without training it."),
    "bench": Command("commands.bench", "Measure how fast your images are loaded and trained on, and say what to set."),
    "pack": Command("loaders.packing.pack", "Pack a folder of images into a few large files that load quickly."),
    "recipes": Command("commands.catalog", "List the configuration files that come with fastrdm.", "recipes"),
    "presets": Command("commands.catalog", "List the methods, and which recipes there are for each.", "presets"),
    "schema": Command("commands.json_schema", "Print the JSON schema of a configuration file, for editors."),
    "completion": Command("commands.catalog", "Print a script that completes words in a shell.", "completion"),
    "doctor": Command("commands.doctor", "Say what is installed, what will be used, and how to get what is missing."),
}

PARSED = ("eval", "embed", "explore", "analyze", "report", "export", "plan", "bench")
"""Commands whose modules import torch: commands.parsers reads their arguments before."""


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit status of a command. What a user can set right is told in one line instead of a traceback."""
    _print_any_name()
    try:
        status, told = command(arguments), ""
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()  # here, where a full disk behind it is told in one line
    except RunError as error:
        status, told = EXIT_FAILED, str(error)
    except ValueError as error:
        status, told = EXIT_REFUSED, str(error)
    except BrokenPipeError:
        _drop_output()  # whoever reads the output has left, such as `head`
        return EXIT_FAILED
    except OSError as error:  # a full disk, a file that may not be read
        _drop_output()
        status, told = EXIT_FAILED, f"{error.filename or 'a file'}: {error.strerror or error}"
    except KeyboardInterrupt:
        status, told = 128 + signal.SIGINT, "interrupted"
    _tell(status, f"fastrdm: {told}" if told else "")
    return status


def _drop_output() -> None:
    """Where what was printed cannot be written, let nothing be left of it: Python would try once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(status: int, told: str) -> None:
    """Print how a command ended. A worker of several leaves it to its launcher, else to the first worker."""
    folder = os.environ.get(OUTCOMES)
    if folder is not None:
        try:
            Path(folder, os.environ.get("RANK", "0")).write_text(json.dumps([status, told]), encoding="utf-8")
        except OSError as error:
            print(f"{told}\nfastrdm: {folder}: {error.strerror}".lstrip(), file=sys.stderr)
    elif told and (status != EXIT_REFUSED or not re.fullmatch("0*[1-9][0-9]*", os.environ.get("RANK", "0"))):
        print(told, file=sys.stderr)


def _print_any_name() -> None:
    """Let names of files be printed that are no text in the terminal's encoding: the bytes are escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the command `name` of COMMANDS and return its exit status."""
    command = COMMANDS[name]

    def work(words: Sequence[str]) -> int:
        # Help is printed and options are refused before the command's module imports torch.
        if name in PARSED:
            import_module("fastrdm.commands.parsers").PARSERS[name]().parse_intermixed_args(words)
        return int(getattr(import_module(f"fastrdm.{command.module}"), command.function)(words))

    return guarded(work, arguments)


def train(arguments: Sequence[str]) -> int:
    """Run `fastrdm train` and return its exit status."""
    return run("train", arguments)


def usage() -> str:
    """The text of `fastrdm --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.sentence}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastrdm COMMAND [arguments]",
            "       fastrdm COMMAND --help",
            "       fastrdm --version",
            "",
            "Non-contrastive self-supervised learning, fast, with the rank of both branches in sight.",
            "",
            *lines,
        ]
    )


def main(arguments: Sequence[str]) -> int:
    """The exit status of `fastrdm` with these arguments."""
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h", "--version"):
        told = f"fastrdm {__version__}" if name == "--version" else usage()
        return guarded(lambda _: print(told) or 0, [])
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        now = f"it is called {RENAMED[name]!r} now" if name in RENAMED else near and f"did you mean {near[0]!r}?"
        print(f"fastrdm: unknown command {name!r}: {now or 'known: ' + ', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_REFUSED
    return run(name, rest)


def entry() -> None:
    """Entry point of the `fastrdm` console script and of `python -m fastrdm`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
