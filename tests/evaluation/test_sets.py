"""What a run trains on and what it is judged on, where the set has a split for it and where it has none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrdm.config import run_config
from fastrdm.evaluation.knn import EvaluateConfig
from fastrdm.evaluation.sets import Sets, open_sets
from fastrdm.loaders.sources.checks import no_accuracy
from fastrdm.loaders.spec import LoaderConfig
from fastrdm.trainer import Trainer


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(root / name)
    return root


def opened(folder: Path | None, source: str = "folder", subset: int | None = None, **judged: Any) -> Sets:
    loader = LoaderConfig(source=source, root=folder and str(folder), subset=subset)
    return open_sets(loader, EvaluateConfig(**judged))


def classes(root: Path, *names: str, each: int = 10) -> Path:
    return put(root, *(f"{name}/{k}.jpg" for name in names for k in range(each)))


def test_digits_are_judged_as_ever() -> None:
    sets = opened(None, "digits", subset=200)
    assert [len(s) for s in sets[:3]] == [200, 200, 360] and sets.probed and not sets.notes


def test_train_only_is_not_judged_and_says_what_would_help(tmp_path: Path) -> None:
    sets = opened(classes(tmp_path, "a", "b"))
    assert len(sets.train) == 20 and len(sets.test) == 0 and not sets.probed
    assert "evaluate.holdout=0.1 sets some aside, evaluate.root names others" in sets.notes[-1]


@pytest.mark.parametrize("holdout", [0.3, 6])
def test_holdout_is_of_each_class_and_never_trained_on(tmp_path: Path, holdout: float) -> None:
    sets = opened(classes(tmp_path, "a", "b"), holdout=holdout)
    assert sets.train is sets.bank and len(sets.train) == 14 and np.bincount(sets.test.labels).tolist() == [3, 3]
    keys = [{s.key(k) for k in range(len(s))} for s in (sets.train, sets.test)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 20
    again = opened(tmp_path, holdout=holdout)
    assert [again.test.key(k) for k in range(6)] == [sets.test.key(k) for k in range(6)]
    assert sets.probed


def test_holdout_beside_a_split_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg")
    with pytest.raises(ValueError, match=r"evaluate\.holdout must be left out: folder has images to evaluate on, got"):
        opened(tmp_path, holdout=0.5)
    with pytest.raises(ValueError, match=r"evaluate\.holdout must be below the 20 images of folder, got 20"):
        opened(classes(tmp_path / "flat", "a", "b"), holdout=20)


def test_unlabeled_images_are_judged_on_a_labeled_set(tmp_path: Path) -> None:
    put(tmp_path / "photos", *(f"{k}.jpg" for k in range(8)))
    sets = opened(tmp_path / "photos", root=str(classes(tmp_path / "labeled", "x", "y")))
    assert len(sets.train) == 8 and len(sets.bank) == 16 and np.bincount(sets.test.labels).tolist() == [2, 2]
    assert no_accuracy(sets.bank, sets.test) is None and not sets.probed
    assert any("are used without labels" in note for note in sets.notes)
    digits = (
        opened(tmp_path / "photos", source="folder", **{})
        if False
        else open_sets(LoaderConfig(source="folder", root=str(tmp_path / "photos")), EvaluateConfig(source="digits"))
    )
    assert len(digits.bank) == 1437 and len(digits.test) == 360


def test_a_run_on_unlabeled_images_is_judged_while_it_trains(tmp_path: Path) -> None:
    put(tmp_path / "photos", *(f"deep/{k % 2}/{k}.jpg" for k in range(20)))
    classes(tmp_path / "labeled", "x", "y")
    arguments = ["loader.source=folder", f"loader.root={tmp_path / 'photos'}", f"run={tmp_path / 'run'}"]
    arguments += [f"evaluate.root={tmp_path / 'labeled'}", "encoder.width=4", "loader.batch_size=8"]
    arguments += ["loader.views.*.size=8", "train.length=2st", "optim.warmup=1st", "method.projector.out=8"]
    trainer = Trainer(run_config.load(arguments))
    assert trainer.learner.probe is None and trainer.train()
    assert {"knn", "knn_random_encoder", "knn_raw_pixels"} <= trainer.metrics.keys()
