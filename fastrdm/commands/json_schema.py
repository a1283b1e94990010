"""`fastrdm schema`: the JSON schema of a configuration file, for editors that check and complete YAML."""

import argparse
import json
from collections.abc import Sequence

from fastrdm.config import run_config


def main(arguments: Sequence[str]) -> int:
    """`fastrdm schema`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastrdm schema",
        description="Print the JSON schema of a configuration file. Save it, and begin the file with "
        "`# yaml-language-server: $schema=FILE`.",
    )
    parser.parse_args(arguments)
    print(json.dumps(run_config.json_schema(), indent=1))
    return 0
