"""`fastrdm eval`: how good a trained encoder is, on its own images or on others."""

import argparse
import difflib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fastrdm.commands import parsers
from fastrdm.commands.pretrained import Pretrained, from_file, from_path, write_classifier
from fastrdm.config import help, run_config
from fastrdm.config import tree as trees
from fastrdm.evaluation.evaluator import Evaluator, Machine, sized
from fastrdm.evaluation.published_settings import RECIPES
from fastrdm.evaluation.sets import open_sets
from fastrdm.evaluation.settings import EvalConfig, EvaluateConfig
from fastrdm.files import write_whole
from fastrdm.live_line import LiveLine
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.models.encoders import EncoderConfig
from fastrdm.runtime import distributed
from fastrdm.schema import require
from fastrdm.training.run_state import versions

FORMAT = "fastrdm-eval-1"
METHODS = ("knn", "linear", "finetune")
_ADAPTER = TypeAdapter(EvalConfig)
_SETTING = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=")


def opened(checkpoint: str | None, options: argparse.Namespace) -> Pretrained:
    """The encoder that a command names, in one of the two ways."""
    if (checkpoint is None) == (options.weights is None):
        raise ValueError("the encoder must be a CHECKPOINT or --weights FILE, one of the two: see --help")
    if checkpoint is not None:
        require(options.layout is None, "--layout", "left out for a checkpoint of fastrdm", options.layout)
        return from_path(Path(checkpoint), options.branch, options.encoder, options.source, trust=options.trust)
    for key in ("layout", "encoder"):
        require(getattr(options, key) is not None, f"--{key}", "given with --weights", None)
    try:
        encoder = EncoderConfig(name=options.encoder, stem=options.stem)
    except ValidationError as error:
        raise ValueError("\n".join(run_config.explain(error, EncoderConfig, "encoder"))) from None
    return from_file(options.weights, options.layout, encoder, options.branch)


def main(arguments: Sequence[str]) -> int:
    """Measure what `arguments` ask for; the exit status."""
    options = parsers.evaluate().parse_intermixed_args(arguments)
    world = os.environ.get("WORLD_SIZE", "1")
    require(world == "1", "fastrdm eval", "run on one process, without torchrun", f"{world} processes")
    paths = [word for word in options.words if not _SETTING.match(word)]
    require(len(paths) <= 1, "CHECKPOINT", "one folder", paths)
    for key in ("size", "batch_size", "workers"):
        value = getattr(options, key)
        require(value is None or value > 0, f"--{key.replace('_', '-')}", "above 0", value)
    config = settings(options, [word for word in options.words if _SETTING.match(word)])
    methods = options.method or ",".join(RECIPES.get(options.recipe, ("knn", "linear")))
    for method in methods.split(","):
        require(method in METHODS, "--method", f"of {', '.join(METHODS)}", method)
    pretrained = opened(paths[0] if paths else None, options)
    data, judged = images(options, pretrained)
    live = LiveLine()
    machine = Machine(
        distributed.start(options.device).device, options.precision == "bf16", options.batch_size, options.workers
    )
    view = sized(pretrained.view, options.size)
    found = open_sets(data, judged)
    measures = Evaluator(pretrained.encoder, view, found.bank, found.test, machine, live.tell)
    for note in found.notes:
        live.say(f"note: {note}")
    for method in methods.split(","):
        for name, part, result in measured(measures, config, method):
            record = {**result, "recipe": options.recipe, "settings": part, "source": described(measures, data)}
            file = write(record, name, pretrained, options, live)
            if method == "finetune" and measures.finetuned is not None:
                model = file.with_suffix(".safetensors")
                write_classifier(pretrained, measures.finetuned, measures.train.classes, model)
                live.say(f"fine-tuned model: {model}")
    if measures.unread:
        live.say(f"left out {len(measures.unread)} unreadable images, such as {measures.unread[0]}")
    return 0


def settings(options: argparse.Namespace, given: Sequence[str]) -> EvalConfig:
    """Defaults, under the recipe, under `a.b=c`; ValueError names what is refused."""
    tree: Any = RECIPES.get(options.recipe, {})
    if options.labels:
        tree = trees.merge(tree, trees.setting(f"finetune.labels=[{options.labels}]"))
    for text in given:
        tree = trees.merge(tree, trees.setting(text))
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "unexpected_keyword_argument":
        known = [setting.key for setting in help.walk(EvalConfig)]
        near = difflib.get_close_matches(key, known, n=1)
        return f"unknown setting {key}: " + (f"did you mean {near[0]}?" if near else "see --help")
    if error["type"] == "value_error":
        return f"{key}.{error['ctx']['error']}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def images(options: argparse.Namespace, pretrained: Pretrained) -> tuple[LoaderConfig, EvaluateConfig]:
    """The images to measure on, and how they are split: those of --source, else what the run is judged on."""
    if options.source:
        return LoaderConfig(source=options.source, root=options.root), EvaluateConfig(holdout=options.holdout)
    if pretrained.loader is None:
        raise ValueError("--source must name the images: a file of weights does not know them")
    loader = replace(pretrained.loader, root=options.root or pretrained.loader.root)
    judged = replace(pretrained.evaluate, holdout=options.holdout or pretrained.evaluate.holdout)
    return loader, replace(judged, source=None, root=None) if options.root else judged


def measured(measures: Evaluator, config: EvalConfig, method: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, settings and result of each measurement that `method` stands for, with its seconds."""
    began = time.monotonic()
    part = getattr(config, method)
    dumped = _ADAPTER.dump_python(config, mode="json")[method]
    if method == "finetune":
        for share in part.labels:
            yield f"finetune-{share:g}", dumped, {**measures.finetune(part, share), "seconds": time.monotonic() - began}
            began = time.monotonic()
        return
    name = "linear-augmented" if method == "linear" and part.augment else method
    yield name, dumped, {**getattr(measures, method)(part), "seconds": time.monotonic() - began}


def described(measures: Evaluator, data: LoaderConfig) -> dict[str, Any]:
    """Description of the measured images for a result file."""
    return {
        "name": data.source,
        "subset": data.subset,
        "train_images": len(measures.train),
        "test_images": len(measures.test),
        "classes": len(measures.train.classes),
        "unreadable": len(measures.unread),
        "view": {k: v for k, v in asdict(measures.view).items() if k in ("size", "interpolation", "mean", "std")},
    }


def write(
    record: dict[str, Any], name: str, pretrained: Pretrained, options: argparse.Namespace, live: LiveLine
) -> Path:
    """Write one result file, print its summary, and return the file."""
    about = {
        "format": FORMAT,
        "method": name,
        "interval": "Wilson's score interval, 95 %",
        "checkpoint": pretrained.origin,
        "precision": options.precision,
        "versions": versions(),
    }
    source = re.sub(r"[^\w.]+", "-", record["source"]["name"])
    parts = ["eval", name, source, *["target"] * (options.branch == "target")]
    parts += [options.weights.stem] if options.weights else []
    folder: Path = options.out or pretrained.folder
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{'-'.join(parts)}.json"
    write_whole(file, json.dumps({**about, **record}, indent=1))
    live.say(f"{line(name, record)}  {file}")
    return file


def line(name: str, record: dict[str, Any]) -> str:
    """Summary of one measurement for the terminal, in one line."""
    shares = [
        f"top-{key[3:]} {100 * x['share']:.1f} % ({100 * x['low']:.1f} to {100 * x['high']:.1f})"
        for key, x in record.items()
        if key in ("top1", "top5")
    ]
    rate = f", rate {record['rate']:g} chosen from {len(record['rates'])}" if "rate" in record else ""
    of = record["top1"]["of"]
    return f"{name} on {record['source']['name']}, {of:,} images: {', '.join(shares)}{rate}, {record['seconds']:.0f} s"
