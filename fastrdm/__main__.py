"""`python -m fastrdm`: the `fastrdm` command."""

from fastrdm.cli import entry

if __name__ == "__main__":
    entry()
