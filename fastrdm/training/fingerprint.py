"""Fingerprints of a run's data, to notice when a restart would train on other images."""

import hashlib
from typing import Any

import numpy as np

from fastrdm.loaders.sources.decode import CorruptImage
from fastrdm.loaders.sources.source import Source

SAMPLES = 64  # images whose content is looked at


def fingerprint(source: Source) -> dict[str, Any]:
    """The number of images, and digests of the classes, of the labels and of the content of 64 images.

    The images are spread evenly over the source. Content is compared as it is stored, and for sets in memory as pixels;
    an image that cannot be read has None, so that it may be repaired. A source of the user's that only has `read` may
    make its images up and is not asked for them.
    """
    found = {
        "images": len(source),
        "classes": _digest("\n".join(source.classes).encode("utf-8", "surrogateescape")),
        "labels": _digest(np.ascontiguousarray(source.labels, dtype=np.int64).tobytes()),
    }
    if len(source) and (source.encoded or source.images is not None):
        chosen = np.unique(np.linspace(0, len(source) - 1, SAMPLES).round().astype(np.int64))
        found["content"] = [_content(source, int(i)) for i in chosen]
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say in words how two fingerprints differ."""
    found = []
    for key in [key for key in old if key in new and not _same(old[key], new[key])]:
        found.append(f"images: {old[key]} -> {new[key]}" if key == "images" else f"other {key}")
    return found


def _same(old: Any, new: Any) -> bool:
    """Whether two parts of fingerprints agree; contents of as many images agree where both could be read."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) != len(new) or all(None in pair or pair[0] == pair[1] for pair in zip(old, new, strict=True))
    return type(old) is not type(new) or bool(old == new)


def _content(source: Source, index: int) -> str | None:
    try:
        pixels = source.read(index)
        return _digest(pixels.tobytes() if source.images is not None else source.fetch(index)[0])
    except CorruptImage:
        return None


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]
