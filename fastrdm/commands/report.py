"""`fastrdm report`: the page on one run or several, written or served."""

from collections.abc import Sequence

from fastrdm.commands import parsers
from fastrdm.report import watch
from fastrdm.report.page import page, write
from fastrdm.report.run_files import read_runs


def main(arguments: Sequence[str]) -> int:
    """`fastrdm report`; the exit status."""
    options = parsers.report().parse_args(arguments)
    if options.watch:
        read_runs(options.runs)  # a path that is no run is refused before anything is served
        return watch.serve(lambda stamp: page(read_runs(options.runs), stamp), options.runs, options.port)
    out = write(options.runs, options.out)
    for run in read_runs(options.runs):
        print(f"{run.name}: {run.verdict().text}")
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
