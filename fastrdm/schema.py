"""Building blocks of every settings class: strictness, `require`, durations, and the run's length they refer to."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, ConfigDict

from fastrdm.renamed import RENAMED

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""A misspelled key is an error. The docstring under a field is its text in `--help`."""


Pair = tuple[float, float]
Triple = tuple[float, float, float]


def require(holds: bool, key: str, expected: str, value: object) -> None:
    """Raise ValueError naming `key`, what it takes and what it got, unless `holds`."""
    if not holds:
        raise ValueError(f"{key} must be {expected}, got {value!r}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggestion for an unknown word: its new name, else the nearest known one, else all known ones."""
    names = list(known)
    if RENAMED.get(word) in names:
        return f"it is called {RENAMED[word]!r} now"
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ep|%)|([0-9]+)(st)")


def _parsed(duration: object) -> tuple[float, str]:
    match = _DURATION.fullmatch(str(duration))
    if match is None:
        raise ValueError(
            f"a duration is written '50ep' (epochs), '2000st' (steps) or '5%' (of the run), got {duration!r}"
        )
    number, unit = float(match[1] or match[3]), match[2] or match[4]
    require(unit != "%" or number <= 100, "a share of the run", "at most 100%", duration)
    return number, unit


def _checked(duration: object) -> object:
    _parsed(duration)
    return duration


Duration = Annotated[str, BeforeValidator(_checked)]


def durations(settings: Any) -> list[str]:
    """Names of the fields of a settings dataclass that hold a duration."""
    return [field.name for field in dataclasses.fields(settings) if field.type == Duration]


def steps_of(duration: str, steps_per_epoch: int, total: int | None = None) -> int:
    """Optimizer steps in `duration`, rounded to the nearest; a share needs the run's `total` steps."""
    number, unit = _parsed(duration)
    if unit == "%":
        require(total is not None, "the length of the run", "in epochs or steps, such as '50ep'", duration)
        assert total is not None
        return round(number / 100 * total)
    return round(number * (steps_per_epoch if unit == "ep" else 1))


class Horizon(NamedTuple):
    """The length of a run, against which durations are resolved."""

    steps_per_epoch: int
    total: int  # steps

    def steps(self, duration: Duration) -> int:
        return steps_of(duration, self.steps_per_epoch, self.total)
