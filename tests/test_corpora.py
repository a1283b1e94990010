"""What fuzzing found worth keeping goes through the readers again: a result or the error they promise, quickly."""

import runpy
import time
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
TARGETS = runpy.run_path(str(PROGRAMS / "fuzz.py"))["TARGETS"]
FILES = sorted((PROGRAMS / "corpora").glob("*/*"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_readers_take_or_refuse_what_fuzzing_found(file: Path) -> None:
    TARGETS[file.parent.name][0](b"")  # which imports the reader
    began = time.process_time()
    TARGETS[file.parent.name][0](file.read_bytes())
    assert time.process_time() - began < 10


def test_every_target_has_a_corpus_of_a_few_kilobytes() -> None:
    assert {file.parent.name for file in FILES} == set(TARGETS)
    assert sum(file.stat().st_size for file in FILES) < 64_000
