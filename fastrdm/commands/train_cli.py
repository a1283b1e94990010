"""`fastrdm train`: its options, its help, and its settings checked and printed. Torch is imported for a run alone."""

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from fastrdm.cli import EXIT_STOPPED, STOP_SIGNALS
from fastrdm.config import run_config
from fastrdm.config.layers import user_sets
from fastrdm.methods.transform_settings import TRANSFORMS
from fastrdm.runtime.run_folder import RunFolder
from fastrdm.schema import require

USAGE = """usage: fastrdm train [RECIPE or FILE.yaml] [a.b=c ...]
       fastrdm train --processes N [--nodes N --rdzv-endpoint HOST:PORT] ...    several processes, one a GPU

examples:
  fastrdm train                                                        the quick start, on scikit-learn's digits
  fastrdm train loader.source=folder loader.root=PHOTOS                SimSiam with ResNet-18 on your own photographs
  fastrdm train preset=byol loader.source=cifar10 loader.root=DATA train.length=200ep
  fastrdm train cifar10/resnet18.yaml loader.root=DATA preset=dino     a recipe; fastrdm recipes lists them
  fastrdm train train.init=RUN run=LONGER train.length=400ep           from the weights of another run

options:
  --help [SECTION]        this text; the settings of a section or of a key; `--help all` has every one
  --print-config          print the settings, each with the place it comes from, and do nothing
  --published             the precision of the published run, where a recipe knows it, instead of the fastest
  --processes N           start N worker processes on this machine; `gpu` for one on each GPU
  --nodes N               machines that each start the same command, 1 by default
  --rdzv-endpoint H:P     host and port of the first machine, the same on all
  --rdzv-id NAME          tells apart runs that meet at one endpoint; the job's number under Slurm
  --max-restarts N        start the workers again so often when one dies, 0 by default

Settings are written a.b=c; the later one wins. Durations are written 50ep (epochs), 2000st (steps) or 5% (of the
run). Nobody needs to set more than where the images are: what is assumed is told at the start.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see fastrdm train --help")


def main(arguments: Sequence[str]) -> int:
    """Train as the command line says, and return the exit status."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", nargs="?", const="")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--processes")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--rdzv-endpoint")
    parser.add_argument("--rdzv-id", default=os.environ.get("SLURM_JOB_ID"))
    parser.add_argument("--max-restarts", type=int, default=0)
    options, words = parser.parse_known_args(arguments)
    if options.help is not None:
        print(help_text(options.help))
        return 0
    if unknown := [word for word in words if word.startswith("-")]:
        raise ValueError("; ".join(_unknown(option) for option in unknown))
    loaded = run_config.compose(words, published=options.published)
    if options.print_config:
        print(run_config.annotated(loaded), end="")
        return 0
    if options.processes is None:
        for name in ("nodes", "rdzv_endpoint", "max_restarts"):
            given = getattr(options, name) != parser.get_default(name)
            require(not given, f"--{name.replace('_', '-')}", "given together with --processes", getattr(options, name))
        from fastrdm.commands.train import run

        return run(loaded).status
    return _launch(loaded, options, [*words, *["--published"] * options.published])


def _unknown(option: str) -> str:
    meant = run_config.meant(option)
    return f"unknown option {option}" + (f": write {meant}" if meant else "; settings are written a.b=c, see --help")


def _launch(loaded: run_config.Loaded, options: argparse.Namespace, words: Sequence[str]) -> int:
    """Check what needs no worker, then start them; the exit status is the run's."""
    settings, number = loaded.config, options.processes
    if number == "gpu":
        import torch

        number = str(torch.cuda.device_count())
    wanted = "a number from 1 up, or gpu where there are GPUs"
    require(number.isdecimal() and int(number) > 0, "--processes", wanted, options.processes)
    require("RANK" not in os.environ, "--processes", "left out under torchrun, which starts processes itself", number)
    require(options.nodes >= 1, "--nodes", "at least 1", options.nodes)
    alone = options.nodes == 1 or options.rdzv_endpoint is not None
    require(alone, "--rdzv-endpoint", f"HOST:PORT of the first of {options.nodes} nodes", options.rdzv_endpoint)
    world, parts, batch = int(number) * options.nodes, settings.train.accumulate, settings.loader.batch_size
    # A batch that nobody set is made to fit by the workers.
    fits = batch % (world * parts) == 0 or not user_sets(loaded.layers)("loader.batch_size")
    require(fits, "loader.batch_size", f"a multiple of {world} processes x train.accumulate={parts}", batch)
    RunFolder(run_config.run_folder(settings)).check()
    from fastrdm.runtime.launch import Launch, launch

    how = Launch(int(number), options.nodes, options.rdzv_endpoint, options.rdzv_id, options.max_restarts)
    return launch(words, how, EXIT_STOPPED, STOP_SIGNALS)


def help_text(section: str) -> str:
    """What `--help` prints: usage and sections, or the settings of a section, a key, a transform or of `all`.

    ValueError names what there is.
    """
    if section:
        return "\n".join(run_config.describe("" if section == "all" else section))
    width = max(map(len, run_config.sections()))
    told = [f"  {name:{width}}  {sentence}" for name, sentence in run_config.sections().items()]
    names = ", ".join(TRANSFORMS)
    return "\n".join([USAGE, "sections:", *told, f"transforms, which --help takes too: {names}"])
