"""`fastrdm schema`: the JSON schema of a configuration file, for editors that check and complete YAML."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from fastrdm.commands.described import kept


def main(arguments: Sequence[str]) -> int:
    """`fastrdm schema`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastrdm schema",
        description="Print the JSON schema of a configuration file. Save it, and begin the file with "
        "`# yaml-language-server: $schema=FILE`.",
    )
    parser.parse_args(arguments)
    schema: dict[str, Any] = kept("schema")
    print(json.dumps(schema, indent=1))
    return 0
