"""The command lines of the commands that need torch for their work, read before torch is imported."""

import argparse
from pathlib import Path

from fastrdm.analysis.settings import IMAGES_PER_DIMENSION, MIN_IMAGES
from fastrdm.config import help
from fastrdm.evaluation.published_settings import RECIPES
from fastrdm.evaluation.settings import EvalConfig
from fastrdm.models.layouts import EXPORTS, LAYOUTS

SOURCE = "SOURCE: a folder, a .tar or .parquet file, a URL of packs or .tar files, or a name as in loader.source"
MOST_IMAGES = 10_000
"""Images on a page of `fastrdm explore`."""

BENCH_SECONDS = 100.0
"""Time that `fastrdm bench` measures; starting Python and listing the images come on top."""


def add_trust(p: argparse.ArgumentParser) -> None:
    """The option without which a stored configuration brings no code with it."""
    told = "load the parts outside fastrdm (package.module:Name) that a stored configuration names: they are code"
    p.add_argument("--trust", action="store_true", help=told)


def add_branch(p: argparse.ArgumentParser) -> None:
    """The option that chooses between a run's two networks."""
    p.add_argument("--branch", choices=("online", "target"), default="online", help="target: the EMA network, teacher")


def add_weights(p: argparse.ArgumentParser) -> None:
    """Options that say where the encoder comes from; `opened` reads them."""
    add_branch(p)
    p.add_argument("--weights", type=Path, metavar="FILE", help="weights of another project, in place of CHECKPOINT")
    p.add_argument("--layout", choices=LAYOUTS, help="the project that wrote FILE")
    p.add_argument("--encoder", metavar="NAME", help="network of FILE, as in encoder.name: resnet50, timm/NAME, ...")
    p.add_argument("--stem", choices=("imagenet", "cifar", "cifar_padding2"), default="imagenet", help="of that ResNet")


def add_images(p: argparse.ArgumentParser) -> None:
    """Options that say which images are read and how."""
    p.add_argument("--root", help="folder of a SOURCE that is given by name")
    p.add_argument("--split", choices=("train", "test"), default="train", help="part of SOURCE; default train")
    p.add_argument("--size", type=int, help="pixels of a view; as in training without it")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder")
    p.add_argument("--batch-size", type=int, default=256, help="images a pass")
    p.add_argument("--workers", type=int, default=2, help="decoding threads of each process")


def evaluate() -> argparse.ArgumentParser:
    """The command line of `fastrdm eval`."""
    p = argparse.ArgumentParser(
        "fastrdm eval",
        usage="fastrdm eval (CHECKPOINT | --weights FILE --layout NAME) [options] [a.b=c ...]",
        description="Measure a trained encoder: k-NN, linear probe, fine-tuning; top-1 and top-5 with Wilson's 95 % "
        "intervals. Each measurement is printed and written to eval-METHOD-SOURCE.json.",
        epilog="Settings, written a.b=c:\n" + "\n".join(map(help.show, help.walk(EvalConfig))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("words", nargs="*", metavar="CHECKPOINT", help="run folder (its newest checkpoint) or a step folder")
    add_weights(p)
    add_trust(p)
    p.add_argument("--source", help="images to use; the run's own without it (digits, cifar10, folder, pkg.mod:Class)")
    p.add_argument("--root", help="folder of the images")
    p.add_argument("--holdout", type=float, metavar="N", help="share or number of the images to test on, without val")
    p.add_argument("--size", type=int, help="pixels of a view; as in training without it")
    p.add_argument("--method", help="of knn, linear, finetune, separated by commas; default knn,linear")
    p.add_argument("--recipe", choices=RECIPES, help="published settings, see docs/evaluation.md")
    p.add_argument("--labels", help="shares of the labels for finetune, such as 0.01,0.1,1")
    p.add_argument("-o", "--out", type=Path, help="folder of the result files; default: beside the checkpoint")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder")
    p.add_argument("--batch-size", type=int, default=256, help="images a pass where nothing is trained")
    p.add_argument("--workers", type=int, default=2, help="decoding threads")
    return p


def embed() -> argparse.ArgumentParser:
    """The command line of `fastrdm embed`."""
    p = argparse.ArgumentParser(
        "fastrdm embed",
        usage="fastrdm embed (RUN | FILE | --weights FILE --layout NAME --encoder NAME) [SOURCE] -o OUT [options]\n"
        "       torchrun --nproc-per-node N -m fastrdm embed ...",
        description="Write the features of every image of SOURCE, in its order: OUT/features.npy has one row for each "
        "image that can be read, OUT/images.csv its index, name and label. A stopped command continues when it is "
        "given again. RUN is a run folder or a step folder, FILE was written by `fastrdm export`.",
    )
    p.add_argument("words", nargs="*", metavar="RUN SOURCE", help=SOURCE)
    p.add_argument("-o", "--out", type=Path, metavar="OUT", required=True, help="folder of the files")
    add_weights(p)
    add_trust(p)
    add_images(p)
    p.add_argument(
        "--tap",
        default="features",
        help="what to write: features of the encoder; hidden or projection of "
        "the projector; or a module of the encoder, such as layer3, averaged over positions",
    )
    p.add_argument("--whiten", action="store_true", help="zero mean and identity covariance over all rows (ZCA)")
    p.add_argument("--unit", action="store_true", help="rows of length 1, after whitening")
    p.add_argument("--parquet", action="store_true", help="write OUT/features.parquet too, with index, name and label")
    return p


def explore() -> argparse.ArgumentParser:
    """The command line of `fastrdm explore`."""
    p = argparse.ArgumentParser(
        "fastrdm explore",
        usage="fastrdm explore RUN [RUN ...] [SOURCE] [-o PAGE.html] [options]",
        description="Write one HTML page with a map of the images, the nearest neighbors of each in pixels, in a "
        "random encoder and in each run's encoder, near duplicates, outliers, classes that are confused, and augmented "
        "views. RUN is a run folder, a step folder, or a file of `fastrdm export`; without SOURCE, the images of the "
        "first run are shown.",
    )
    p.add_argument("words", nargs="+", metavar="RUN SOURCE", help=SOURCE)
    p.add_argument("-o", "--out", type=Path, metavar="PAGE", default=Path("explore.html"), help="default explore.html")
    add_branch(p)
    p.add_argument("--map", default="pca", help="of pca, umap, separated by commas; the page switches between them")
    p.add_argument("--images", type=int, default=MOST_IMAGES, help="most images, spread evenly; default 10,000")
    p.add_argument("--views", type=int, default=100, help="images whose augmented views are kept; default 100")
    p.add_argument("--columns", type=Path, metavar="CSV", help="more to color by: a column `name`, and others")
    add_trust(p)
    add_images(p)
    return p


def analyze() -> argparse.ArgumentParser:
    """The command line of `fastrdm analyze`."""
    p = argparse.ArgumentParser(
        "fastrdm analyze",
        usage="fastrdm analyze RUN ... [options] [a.b=c ...]",
        description="Spectra, rank difference, spectral filter and eigenspace alignment of the last checkpoint of each "
        "run, on new views of its training images; written to RUN/analysis.json. How to read them: docs/theory.md.",
    )
    p.add_argument("words", nargs="+", metavar="RUN", help="run folder; a.b=c changes its settings (loader.root=...)")
    p.add_argument(
        "--images",
        type=int,
        help=f"images to measure on; default {IMAGES_PER_DIMENSION} for each dimension, at least {MIN_IMAGES}",
    )
    p.add_argument("--split", choices=("train", "test"), default="train", help="whose images")
    p.add_argument("--replicates", type=int, default=100, help="bootstrap samples of an interval, at least 10")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_trust(p)
    return p


def export() -> argparse.ArgumentParser:
    """The command line of `fastrdm export`."""
    p = argparse.ArgumentParser(
        "fastrdm export",
        description="Write the encoder of a run, without its projector, in the layout of another library, and compare "
        "both on random images. FILE.safetensors is a safetensors file, any other name a torch file; huggingface "
        "writes a folder. Everything written says how images are prepared and where the encoder came from.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, step folder, or a file of this command")
    p.add_argument(
        "--layout",
        choices=EXPORTS,
        required=True,
        help="safetensors: the encoder's own keys; huggingface: a folder for timm's local-dir: and for transformers",
    )
    p.add_argument("-o", "--out", type=Path, metavar="FILE", required=True)
    p.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the weights in an ONNX file")
    add_branch(p)
    add_trust(p)
    return p


def bench() -> argparse.ArgumentParser:
    """The command line of `fastrdm bench`."""
    p = argparse.ArgumentParser(
        prog="fastrdm bench",
        description="Measure every installed engine and the training step on your images, in two minutes at most, and "
        "say what to set. Nothing is trained or kept.",
    )
    p.add_argument(
        "words",
        nargs="*",
        metavar="SOURCE CONFIG a.b=c",
        help=f"{SOURCE}; the rest as for fastrdm train",
    )
    p.add_argument("--seconds", type=float, default=BENCH_SECONDS, help=f"time of measuring; default {BENCH_SECONDS:g}")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE too")
    add_trust(p)
    return p


def plan() -> argparse.ArgumentParser:
    """The command line of `fastrdm plan`."""
    p = argparse.ArgumentParser(prog="fastrdm plan", description="Steps, memory and time of a run.")
    p.add_argument("config", nargs="*", metavar="CONFIG a.b=c", help="as for fastrdm train")
    p.add_argument("--gpus", type=int, metavar="N", help="processes, one a GPU; left out: one, on what is here")
    p.add_argument("--images", type=int, metavar="N", help="images of the set, where it is not here")
    p.add_argument("--images-per-second", type=float, metavar="X", help="of all GPUs together, as measured")
    p.add_argument("--from", dest="run", metavar="RUN", help="folder of a run that measured images/s")
    p.add_argument("--table", metavar="CSV", help="of benchmarks.training.step, with this step on this device")
    p.add_argument(
        "--bench",
        action="store_true",
        help="measure images/s here first, in two minutes at most, as fastrdm bench does",
    )
    add_trust(p)
    return p


def report() -> argparse.ArgumentParser:
    """The command line of `fastrdm report`."""
    p = argparse.ArgumentParser(prog="fastrdm report", description="A page of HTML on one run or several.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run, finished or not.")
    p.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help="The page. By default RUN/report.html, for several runs report.html.",
    )
    p.add_argument(
        "--watch", action="store_true", help="Serve the page on this machine's loopback address; it follows the runs."
    )
    p.add_argument("--port", type=int, default=0, help="Port of --watch. By default the system chooses a free one.")
    return p


PARSERS = {
    "eval": evaluate,
    "embed": embed,
    "explore": explore,
    "analyze": analyze,
    "export": export,
    "bench": bench,
    "plan": plan,
    "report": report,
}
