"""What is said of the settings without torch: texts kept in described.json, a test compares them with the settings.

`python -m fastrdm.commands.described` writes them anew after a setting, a transform or a loss has changed.
"""

import json
from pathlib import Path
from typing import Any

from fastrdm.files import write_whole

FILE = Path(__file__).with_name("described.json")


def kept(what: str) -> Any:
    """A part of the file: `help` (texts by section, "" and `all`), `schema` (of JSON) or `words` (to complete)."""
    return json.loads(FILE.read_text(encoding="utf-8"))[what]


def collect() -> dict[str, Any]:
    """The content of the file by the settings as they are, which takes torch."""
    from fastrdm.commands.train_cli import compose_help
    from fastrdm.config import help, run_config
    from fastrdm.methods.losses import ALIGNMENTS
    from fastrdm.methods.transform_settings import TRANSFORMS

    names = ["", "all", "preset", "run", *run_config.sections(), *TRANSFORMS, *ALIGNMENTS]
    helps = {}
    for name in names:
        try:
            helps[name] = compose_help(name)
        except ValueError:  # a part whose settings are those of all its sort
            continue
    settings = list(help.walk(run_config.Config))
    words = [f"{setting.key}={choice}" for setting in settings for choice in setting.choices or [""]]
    return {"help": helps, "schema": run_config.json_schema(), "words": words}


if __name__ == "__main__":
    write_whole(FILE, json.dumps(collect(), indent=1) + "\n")
