"""`python stops.py OUT`: two processes are asked to stop in mid-epoch; the run goes on with 1, 2 and 4.

Prints a JSON line for each: exit codes, and the images that either part of the first epoch trained on.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import launch
from kills import ARGUMENTS, STEP, SWAV

from fastrdm import cli, trainer
from fastrdm.runtime import distributed


def noting(file: Path, stop_at: int | None) -> Callable[[int], None]:
    """A run that writes the images of the first epoch to `file`, and whose last rank gets SIGTERM in step `stop_at`."""

    def work(rank: int) -> None:
        def train_step(self: trainer.Trainer, batch: Any) -> Any:
            index = distributed.gather_rows(batch.index).tolist()
            if rank == 0 and self.step < 5 and min(index) >= 0:
                with file.open("a") as out:
                    out.writelines(f"{i}\n" for i in index)
            if stop_at == self.step + 1 and rank == self.processes.world - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return STEP(self, batch)

        trainer.Trainer.train_step = train_step  # type: ignore[method-assign]
        sys.stdout = open(file.with_suffix(f".{rank}.log"), "w")  # noqa: SIM115
        sys.exit(cli.train([*SWAV, *ARGUMENTS, f"run={file.parent / 'run'}"]))

    return work


def main() -> None:
    out = Path(sys.argv[1])
    for world in (1, 2, 4):
        place = out / str(world)
        place.mkdir(parents=True)
        stopped = launch(2, noting(place / "first", stop_at=2))
        continued = launch(world, noting(place / "second", stop_at=None))
        first, second = ([int(line) for line in (place / name).read_text().split()] for name in ("first", "second"))
        result = {"world": world, "stopped": stopped, "continued": continued, "first": first, "second": second}
        print(json.dumps(result), flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
