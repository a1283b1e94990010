"""`fastrdm recipes`, `fastrdm presets` and `fastrdm completion`: what there is to choose from. No torch."""

import argparse
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastrdm.config import tree
from fastrdm.methods.presets import PRESETS

RECIPES = Path(__file__).parents[1] / "recipes"


def recipes(arguments: Sequence[str]) -> int:
    """`fastrdm recipes`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastrdm recipes",
        description="List the configuration files that come with fastrdm: fastrdm train NAME loader.root=FOLDER.",
    )
    parser.parse_args(arguments)
    rows = [(name, ", ".join(file.presets), _about(file.path)) for name, file in shipped().items()]
    print("\n".join(_table(("recipe", "for preset=", "what it is"), rows)))
    return 0


def presets(arguments: Sequence[str]) -> int:
    """`fastrdm presets`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastrdm presets",
        description="List the methods that preset=NAME chooses: transforms of both branches, moving average and loss.",
    )
    parser.parse_args(arguments)
    files = shipped()
    rows = [
        (name, *_composition(preset["method"]), " ".join(recipe for recipe, file in files.items() if _fits(file, name)))
        for name, preset in PRESETS.items()
    ]
    print("\n".join(_table(("preset", "online", "target", "EMA", "loss", "recipes"), rows)))
    return 0


def completion(arguments: Sequence[str]) -> int:
    """`fastrdm completion SHELL`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastrdm completion",
        description='Print a script that completes commands, recipes and settings: eval "$(fastrdm completion bash)".',
    )
    parser.add_argument("shell", choices=sorted(SHELLS))
    options = parser.parse_args(arguments)
    print(completion_script(options.shell), end="")
    return 0


def shipped() -> dict[str, tree.Source]:
    """The recipes by their names."""
    files = sorted(RECIPES.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return {str(file.relative_to(RECIPES)): tree.read_files(file)[-1] for file in files}


def completion_script(shell: str) -> str:
    """Return the script that a shell runs to complete the words of `fastrdm`; the words are written into it."""
    from fastrdm.cli import COMMANDS
    from fastrdm.config import help, run_config

    settings = list(help.walk(run_config.Config))
    values = [f"{setting.key}={choice}" for setting in settings for choice in setting.choices or [""]]
    words = [*shipped(), *(f"preset={name}" for name in PRESETS), *values]
    return SHELLS[shell].format(commands=" ".join(COMMANDS), words=" ".join(words))


SHELLS = {
    "bash": """\
_fastrdm() {{
    local word=${{COMP_LINE:0:COMP_POINT}}; word=${{word##* }}
    local words="{commands}"
    [ "$COMP_CWORD" -gt 1 ] && words="{words}"
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    [ "$COMP_CWORD" -gt 1 ] && COMPREPLY+=($(compgen -f -- "${{word#*=}}"))
    case $word in *=*) COMPREPLY=("${{COMPREPLY[@]#${{word%%=*}}=}}") ;; esac
    [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
}}
complete -F _fastrdm fastrdm
""",
    "zsh": """\
#compdef fastrdm
_fastrdm() {{
    if ((CURRENT == 2)); then
        compadd -- {commands}
    else
        compadd -S '' -- ${{(z)${{:-"{words}"}}}}
        _files
    fi
}}
compdef _fastrdm fastrdm
""",
    "fish": """\
complete -c fastrdm -n __fish_use_subcommand -f -a "{commands}"
complete -c fastrdm -n "not __fish_use_subcommand" -a "{words}"
""",
}


def _about(file: Path) -> str:
    """The first sentence of a recipe's second line of comments."""
    comments = [line.lstrip("# ") for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return " ".join(comments[1:]).partition(". ")[0].rstrip(".")


def _fits(file: tree.Source, preset: str) -> bool:
    return any(fnmatchcase(preset, pattern) for pattern in file.presets)


def _composition(method: dict[str, Any]) -> tuple[str, str, str, str]:
    loss = " + ".join(
        [method.get("alignment", {}).get("name", "negative_cosine"), *(r["name"] for r in method.get("regularize", ()))]
    )
    branches = (", ".join(_transform(t) for t in method[branch]) or "-" for branch in ("online", "target"))
    online, target = branches
    return online, target, "yes" if "ema" in method else "no", loss


def _transform(transform: Any) -> str:
    if isinstance(transform, str):
        return transform
    if transform["name"] != "filter":
        return str(transform["name"])
    return f"filter {transform.get('kind', 'power')}" + (f" {transform['power']:g}" if "power" in transform else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
