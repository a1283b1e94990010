"""`fastrdm bench SOURCE`: every engine and the training step on the images at hand, and what to set."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastrdm.commands import parsers
from fastrdm.commands.source_word import loader_of, named_source
from fastrdm.config import run_config
from fastrdm.config.layers import user_sets
from fastrdm.config.run_config import Loaded
from fastrdm.efficiency import speed
from fastrdm.efficiency.speed import AMPLE, MORE, Budget, LoadRate, ReadCost, StepRate, Together
from fastrdm.evaluation.sets import open_sets
from fastrdm.runtime import distributed
from fastrdm.schema import require
from fastrdm.training import automatic
from fastrdm.training.fit import fit_batch, fit_views

LEAST_SECONDS = 20.0
WAITS = 0.05  # share of the step's speed that loading may cost without being called a bottleneck
PAYS = 1.2  # times as fast as the files that a pack must load to be worth making
DATA = {"set": "", "sample": "sample in memory", "jpeg": "sample packed, jpeg", "raw": "sample packed, raw"}


class Bench(NamedTuple):
    """What was measured."""

    about: str
    images: int
    batch: int
    """Images of a step in the configuration."""

    reading: ReadCost | None
    loading: list[LoadRate]
    steps: list[StepRate]
    training: Together | None


def main(arguments: Sequence[str]) -> int:
    """`fastrdm bench`; the exit status."""
    options = parsers.bench().parse_intermixed_args(arguments)
    require(options.seconds >= LEAST_SECONDS, "--seconds", f"at least {LEAST_SECONDS:g}", options.seconds)
    found = measure(run_config.compose(settings_of(options.words), trust=options.trust), options.seconds)
    print("\n".join(summary_lines(found)))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    return 0


def settings_of(words: Sequence[str]) -> list[str]:
    """The arguments of `fastrdm train` for these words, one of which may be a source."""
    sources = [word for word in words if "=" not in word and named_source(word)]
    require(len(sources) <= 1, "SOURCE", "one folder, file, URL or name", sources)
    given: list[str] = []
    for word in sources:
        loader = loader_of(word, None, None)
        given = [f"loader.source={loader.source}", *([f"loader.root={loader.root}"] if loader.root else [])]
    return [*given, *(word for word in words if word not in sources)]


def measure(loaded: Loaded, seconds: float = parsers.BENCH_SECONDS) -> Bench:
    """Measure what a configuration asks for, in about `seconds`. ValueError where it cannot be run here."""
    settings = loaded.config
    processes = distributed.start(settings.train.device)
    try:
        require(processes.world == 1, "fastrdm bench", "run by one process", f"{processes.world} of torchrun's")
        sets = open_sets(settings.loader, settings.evaluate)
        source = sets.train
        require(len(source) > 1, "SOURCE", "at least two images", len(source))
        settings = speed.plain(automatic.choose(settings, processes, source)[0])
        given = user_sets(loaded.layers)
        settings = fit_views(fit_batch(settings, len(source), 1, given)[0], source, given)[0]
        most = min(settings.loader.batch_size, len(source) - len(source) % settings.train.accumulate)
        step = speed.training_step(settings, source, processes, len(source.classes) if sets.probed else 0)
        budget = Budget(seconds)
        reading = speed.read_cost(source, budget.share(0.04))
        steps = speed.step_rates(settings, step, processes, most, budget.share(0.25))
        loading = speed.engine_rates(settings, source, processes, budget)
        loading += speed.pack_rates(settings, source, processes, budget)
        loading += speed.thread_rates(settings, source, processes, speed.preferred(loading), budget)
        training, chosen = None, choice(loading, steps)
        if steps and chosen is not None:
            images = steps[-1].images
            training = speed.together(settings, source, step, processes, chosen, images, budget.share(0.15))
    finally:
        distributed.stop()
    views = ", ".join(f"{view.size} px" for view in settings.loader.views)
    about = (
        f"{len(source):,} images of {source.name}, views of {views}; {settings.preset}, {settings.encoder.name}, "
        f"{settings.train.precision} on {processes.device.type}"
    )
    return Bench(about, len(source), settings.loader.batch_size, reading, loading, steps, training)


def choice(loading: Sequence[LoadRate], steps: Sequence[StepRate]) -> LoadRate | None:
    """The engine to take, with the fewest threads that are as fast as any, or fast enough for the step."""
    on_set = [rate for rate in loading if rate.data == "set"]
    fastest = speed.preferred(on_set)
    if fastest is None:
        return None
    assert fastest.images_per_second is not None
    enough = fastest.images_per_second / MORE
    if steps:
        enough = min(enough, AMPLE * max(step.images_per_second for step in steps))
    same = [rate for rate in on_set if rate.engine == fastest.engine and (rate.images_per_second or 0.0) >= enough]
    return min(same, key=lambda rate: rate.workers)


def summary_lines(found: Bench) -> Iterator[str]:
    """The table, and the line of advice."""
    yield f"bench: {found.about}"
    if found.reading:
        yield f"an image: {found.reading.read:.2f} ms to read, {found.reading.decode:.2f} ms to decode, on one thread"
    yield f"{'loading':32}{'threads':>9}{'images/s':>10}{'first batch':>13}"
    for rate in found.loading:
        name = rate.engine + (f", {DATA[rate.data]}" if DATA[rate.data] else "")
        if rate.images_per_second is None:
            yield f"  {name:30}{'':9}{'-':>10}  {rate.reason}"
        else:
            yield f"  {name:30}{rate.workers:9}{rate.images_per_second:10,.0f}{rate.first:11.2f} s"
    yield f"{'training step, eager':41}{'images/s':>10}{'a step':>13}"
    for step in found.steps:
        yield f"  {f'{step.images:,} images':39}{step.images_per_second:10,.1f}{step.seconds:11.3f} s"
    if found.training:
        what = f"{found.training.images:,} images, with its loader"
        yield f"  {what:39}{found.training.images_per_second:10,.1f}{100 * found.training.waited:9.0f} % waiting"
    yield f"advice: {advice(found)}"


def advice(found: Bench) -> str:
    """One line: engine, threads, batch, pack or not, and what training would wait for."""
    chosen = choice(found.loading, found.steps)
    if chosen is None:
        return "no engine reads this set: the table has the reasons"
    threads = "" if chosen.engine == "resident" else f" loader.workers={chosen.workers}"
    told = [f"loader.engine={chosen.engine}{threads}"]
    if found.steps:
        told.append(_batch(found))
    told += [_pack(found), _waiting(found)]
    return "; ".join(filter(None, told))


def _batch(found: Bench) -> str:
    most = max(step.images_per_second for step in found.steps)
    images = next(step.images for step in found.steps if step.images_per_second >= most / MORE)
    largest = found.steps[-1].images
    limit = "" if largest >= found.batch else f" (larger ones than {largest:,} were not timed)"
    return f"steps of {images:,} images reach the full speed{limit}"


def _pack(found: Bench) -> str:
    rates = {rate.data: rate.images_per_second for rate in found.loading if rate.data != "set"}
    plain, jpeg, raw = (rates.get(data) for data in ("sample", "jpeg", "raw"))
    if not plain or not jpeg or not raw:
        return "what packing would bring was not measured" if rates else ""
    gains = f"packed as raw it loads {raw / plain:.1f} times as fast, as jpeg {jpeg / plain:.1f} times"
    if found.training and found.training.cost < WAITS:
        return f"do not pack, loading keeps up ({gains})"
    if raw >= PAYS * max(jpeg, plain):
        return f"pack with --mode raw, {found.images * 3 * 256**2 / 1e9:,.1f} GB ({gains})"
    if jpeg >= PAYS * plain or _storage_bound(found):
        return f"pack ({gains}, from memory)"
    return f"do not pack ({gains})"


def _storage_bound(found: Bench) -> bool:
    return found.reading is not None and found.reading.read > found.reading.decode


def _waiting(found: Bench) -> str:
    training = found.training
    if training is None:
        return ""
    epoch = f"an epoch takes about {_duration(found.images / training.images_per_second)}"
    if training.cost < WAITS:
        return f"training waits for the step itself; {epoch}"
    if training.waited < WAITS:
        shared = f"training never waits, but loading beside it takes {100 * training.cost:.0f} % of the cores' speed"
        return f"{shared}; {epoch}"
    what = "storage" if _storage_bound(found) else "decoding and augmentation"
    return f"training waits {100 * training.waited:.0f} % of its time for {what}; {epoch}"


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} seconds"


def as_json(found: Bench) -> dict[str, Any]:
    """The numbers as plain data."""
    rows: dict[str, Sequence[Any]] = {"loading": found.loading, "steps": found.steps}
    return {
        "about": found.about,
        "images": found.images,
        "batch": found.batch,
        "reading_ms": found.reading._asdict() if found.reading else None,
        **{name: [row._asdict() for row in some] for name, some in rows.items()},
        "training": found.training._asdict() if found.training else None,
        "advice": advice(found),
    }
