"""`fastrdm train`: `--help` is answered here, without torch; everything else is for fastrdm.commands.train."""

from collections.abc import Sequence

from fastrdm.commands.described import kept

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


def main(arguments: Sequence[str]) -> int:
    """Print what `--help` asks for, or train; the exit status."""
    words = list(arguments)
    asked = next((place for place, word in enumerate(words) if word in ("--help", "-h")), None)
    if asked is not None:
        section = next((word for word in words[asked + 1 : asked + 2] if not word.startswith("-")), "")
        print(help_text(section))
        return 0
    from fastrdm.commands import train

    return train.main(words)


def help_text(section: str) -> str:
    """What `--help` prints: usage and sections, or the settings of a section, a key, a transform or of `all`."""
    text: str | None = kept("help").get(section)
    return compose_help(section) if text is None else text


def compose_help(section: str) -> str:
    """The text of `--help SECTION` by the settings as they are; ValueError names what there is."""
    from fastrdm.config import run_config
    from fastrdm.methods.dual_branch import TRANSFORMS

    if section:
        return "\n".join(run_config.describe("" if section == "all" else section))
    width = max(map(len, run_config.sections()))
    told = [f"  {name:{width}}  {sentence}" for name, sentence in run_config.sections().items()]
    names = ", ".join(TRANSFORMS)
    return "\n".join([USAGE, "sections:", *told, f"transforms, which --help takes too: {names}"])
