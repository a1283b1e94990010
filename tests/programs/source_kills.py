"""`python source_kills.py OUT [FORM ...]`: runs on other sources that are killed in mid-epoch and started again.

Prints a JSON line for each, as kills.py does.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import forms
from kills import at_step, die, metrics, train, weights
from slow_store import running

from fastrdm.loaders.packing import pack
from fastrdm.runtime import distributed

WINDOWED = ["loader.order=windowed", "loader.window=2"]
FORMS = ("imagenet archives", "tar of folders", "webdataset", "parquet", "remote", "remote webdataset")
PATTERN = "set-{train-{0000..0002},validation-0000}.tar"


def arguments_of(name: str, root: Path) -> list[str]:
    """Make the form below `root`; the settings that name it."""
    if name == "remote webdataset":
        forms.webdataset(root / "store")
        largest = max(path.stat().st_size for path in (root / "store").glob("*.tar"))
        more = [f"loader.cache={root / 'cache'}", f"loader.cache_gb={3 * largest / 1e9}"]
        return ["loader.source=webdataset", *more, "loader.order=windowed", "loader.window=1"]
    if name != "remote":
        source, build = forms.FORMS[name]
        build(root)
        single = name in ("imagenet archives", "tar of folders")
        return [f"loader.source={source}", f"loader.root={root}", *([] if single else WINDOWED)]
    forms.folders(root / "set")
    whole, pack.plan = pack.plan, lambda sizes, _: [(k, min(k + 2, len(sizes))) for k in range(0, len(sizes), 2)]
    pack.main([str(root / "set"), str(root / "pack"), "--workers", "1"])
    pack.plan = whole
    largest = max(path.stat().st_size for path in (root / "pack" / "train" / "shards").iterdir())
    more = [f"loader.cache={root / 'cache'}", f"loader.cache_gb={5 * largest / 1e9}"]
    return ["loader.source=packed", *more, *WINDOWED]


def main() -> None:
    out = Path(sys.argv[1])
    for name in sys.argv[2:] or FORMS:
        root = out / name.replace(" ", "-")
        common = arguments_of(name, root)
        common += ["preset=rdm_simsiam_log1p", "loader.subset=null", "loader.batch_size=4", "train.length=12st"]
        served = {"remote": ("pack", ""), "remote webdataset": ("store", f"/{PATTERN}")}.get(name)
        store: Any = running(root / served[0]) if served else nullcontext()
        with store as server:
            common += [f"loader.root={server.url}{served[1]}"] if served else []
            for world in (1, 2):
                place = root / f"runs-{world}"
                codes = [train(world, place / "unbroken", [], more=common)]
                codes.append(train(world, place / "killed", [], at_step(8, die), more=common))
                codes.append(train(world, place / "killed", [], more=common))
                same = weights(place / "unbroken") == weights(place / "killed")
                logged = metrics(place / "unbroken") == metrics(place / "killed")
                told = {"world": world, "case": name, "codes": codes, "same": same, "logged": logged}
                print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
    distributed.stop()
