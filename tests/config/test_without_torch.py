"""Settings are read, checked and shown without torch, by tables that say what the code of their parts says."""

import subprocess
import sys

import pytest

from fastrdm import cli, parts
from fastrdm.methods.losses import ALIGNMENTS, AlignmentConfig, loss_settings
from fastrdm.methods.regularizer import find_regularizer
from fastrdm.methods.regularizer_settings import REGULARIZERS, RegularizerConfig
from fastrdm.methods.transform import find_transform
from fastrdm.methods.transform_settings import TRANSFORMS, TransformConfig
from fastrdm.models.settings import ENCODERS

HEAVY = ("torch", "numpy", "scipy", "sklearn")
PROGRAM = f"""
import sys, time
from fastrdm import cli
try:
    status = cli.main(sys.argv[1:])
except SystemExit as asked:  # argparse
    status = asked.code
print("imported:", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
print("seconds:", time.process_time(), file=sys.stderr)
sys.exit(status)
"""
ANSWERED = {  # what is asked for: exit status, and words of the answer
    "train --print-config": (0, "preset: simsiam"),
    "train cifar10/cpu_ema.yaml preset=rdm_byol_log1p --print-config": (0, "kind: log1p"),
    "train loader.source=folder loader.root=PHOTOS preset=dino encoder.name=timm/vit_tiny_patch16_224 --print-config": (
        0,
        "name: center_sharpen",
    ),
    "train --help": (0, "usage: fastrdm train"),
    "train --help optim": (0, "optim.lr = "),
    "train --epochs 3": (2, "unknown option --epochs: write train.length=100ep"),
    "train optim.lrr=3": (2, "unknown configuration key 'optim.lrr': did you mean 'optim.lr'?"),
    "train preset=simsiamm": (2, "did you mean 'simsiam'?"),
    "train loader.views.0.flip=2": (2, "loader.views.0.flip must be a probability in [0, 1]"),
    "train preset=swav method.online=[]": (2, "alignment cross_entropy takes scores here"),
    "train method.regularize=[varianse]": (2, "did you mean 'variance'?"),
    "train encoder.name=resnet51": (2, "encoder.name must be one of"),
    "train --processes 3 loader.batch_size=256": (2, "loader.batch_size must be a multiple of 3 processes"),
    **{f"{name} --help": (0, f"usage: fastrdm {name}") for name in cli.COMMANDS if name != "train"},
    "eval x --size y": (2, "argument --size: invalid int value: 'y'"),
    "export x": (2, "the following arguments are required: --layout, -o/--out"),
    "embed x y -o out --taps z": (2, "unrecognized arguments: --taps z"),
    "schema": (0, '"AlarmsConfig": {'),
    "presets": (0, "rdm_simsiam"),
    "recipes": (0, "cifar10/cpu.yaml"),
}


def answered(words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words.split()], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", ANSWERED)
def test_what_needs_no_torch_is_answered_without_it(words: str) -> None:
    status, told = ANSWERED[words]
    found, out, err = answered(words)
    assert found == status, err
    assert told in (err if status else out)
    imported = next(line for line in err.splitlines() if line.startswith("imported:"))
    assert imported == ("imported: numpy" if words.startswith("pack") else "imported:")


def test_an_answer_takes_little_time() -> None:
    """The least of three, as the processor may be shared. 0.5 s is the bar on an idle one."""
    seconds = [float(answered("train --print-config")[2].rpartition("seconds:")[2]) for _ in range(3)]
    assert min(seconds) < 1.0, seconds


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_row_of_a_transform_says_what_its_class_says(name: str) -> None:
    row, code = TRANSFORMS[name], find_transform(name)
    assert parts.settings_of(code, TransformConfig) is row.settings
    assert (code.takes, code.gives) == (row.takes, row.gives)
    assert row.settings.name == name


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_the_settings_of_a_loss_are_found_without_torch(name: str) -> None:
    """Its formula is annotated with tensors, whose class is not there yet."""
    kind = loss_settings(name)
    assert kind is AlignmentConfig or kind.name == name
    assert (kind is AlignmentConfig) == (name not in ("cross_entropy", "cross_correlation"))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_row_of_a_regularizer_says_what_its_class_says(name: str) -> None:
    row = REGULARIZERS[name]
    assert parts.settings_of(find_regularizer(name), RegularizerConfig) is row.settings
    assert row.settings.name == name


def test_every_row_of_an_encoder_names_code_that_is_there() -> None:
    for row in ENCODERS.values():
        assert callable(parts.of_ours(row.code))
