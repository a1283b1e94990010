"""`fastrdm explore`: what the page says of planted images, its bounds, and the page itself in headless Chromium."""

import base64
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastrdm.commands import explore
from fastrdm.config import run_config
from fastrdm.explore import space
from fastrdm.explore.page import packed, page
from fastrdm.explore.thumbnails import sheets
from fastrdm.trainer import Trainer

from .chromium import CHROMIUM, Browser

SMALL = [
    "quickstart.yaml",
    "preset=byol",
    "train.length=1st",
    "optim.warmup=1st",
    "encoder.width=4",
    "method.projector.hidden=16",
    "method.projector.out=12",
    "loader.batch_size=16",
    "loader.views.*.size=16",
    "evaluate.baselines=false",
    "evaluate.probe=false",
    "evaluate.every=0st",
]
TWINS = ("cat/004.png", "dog/005.png")


def test_neighbors_are_the_nearest_by_cosine() -> None:
    features = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)) + 3
    found = space.nearest(features)
    unit = (features - features.mean(0)).double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T - 9 * np.eye(300)
    assert np.array_equal(found.images, np.argsort(-cosine, axis=1)[:, : space.NEIGHBORS])
    np.testing.assert_allclose(found.cosine, -np.sort(-cosine, axis=1)[:, : space.NEIGHBORS], atol=1e-5)
    assert space.nearest(features[:3]).images.shape == (3, 2)


def test_pca_map_holds_the_most_variance() -> None:
    features = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9, 1, 4, 1])
    places = space.pca_map(features)
    values = np.linalg.eigvalsh(np.cov(features.numpy().T, bias=True))
    np.testing.assert_allclose(places.var(0), values[:-3:-1], rtol=1e-4)
    assert space.pca_map(torch.ones(3, 1)).shape == (3, 2)


def test_votes_and_confused_classes() -> None:
    features = torch.tensor([[1, 0.2], [1, 0], [1, -0.2], [-1, 0.2], [-1, -0.2], [-1, 0], [1, 0.1]])
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    near = space.nearest(features, 3)
    votes = space.voted(near, labels)
    assert votes.tolist() == [0, 0, 0, 1, 1, 1, 0]
    (only,) = space.confused(labels, votes)
    assert only == {"label": 1, "vote": 0, "count": 1, "share": 0.25, "images": [6]}
    assert space.voted(near, np.full(7, -1)).tolist() == [-1] * 7


def test_pictures_keep_within_their_bytes() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (1500, 64, 64, 3), np.uint8)
    found = sheets(pictures, 1_500_000)
    assert sum(len(base64.b64decode(uri.partition(",")[2])) for uri in found["sheets"]) <= 1_500_000
    assert found["side"] < 64 and len(found["sheets"]) == 2


def test_a_name_cannot_leave_its_script() -> None:
    text = page("a <b>", {"names": ["</script><script>alert(1)</script>"]})
    assert "<title>a &lt;b&gt;</title>" in text and "</script><script>alert" not in text
    found = packed(np.array([[1, 300]]))
    assert (found["type"], found["shape"]) == ("uint16", [1, 2])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run, its images with twins of two classes and an unreadable file, and their page."""
    folder = tmp_path_factory.mktemp("explore")
    assert Trainer(run_config.load([*SMALL, f"run={folder / 'run'}"])).train()
    draw = np.random.default_rng(0)
    for i in range(60):
        base = draw.integers(0, 256, (3, 3, 3)).astype(np.uint8)
        path = folder / "photos" / ("cat", "dog")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(base).resize((40, 32), Image.Resampling.BICUBIC).save(path)
    shutil.copy(folder / "photos" / TWINS[0], folder / "photos" / TWINS[1])
    (folder / "photos" / "cat" / "010.png").write_bytes(b"no image")
    out = folder / "page.html"
    assert explore.main([str(folder / "run"), str(folder / "photos"), "-o", str(out), "--views", "5"]) == 0
    return folder / "run", folder / "photos", out


def content(file: Path) -> Any:
    text = file.read_text(encoding="utf-8").partition('<script id="content" type="application/json">')[2]
    return json.loads(text.partition("</script>")[0])


def test_the_page_finds_what_was_planted(made: tuple[Path, Path, Path]) -> None:
    found = content(made[2])
    names = found["names"]
    assert len(names) == 59 and not any("010" in name for name in names)
    first, second, *cosines = found["pairs"][0]
    assert {names[first], names[second]} == set(TWINS) and min(cosines) > 0.9999
    column = found["columns"][0]
    labels = np.frombuffer(base64.b64decode(column["values"]["data"]), np.uint8)
    assert [column["classes"][i] for i in labels] == [name[:3] for name in names]
    assert [entry["name"] for entry in found["spaces"]] == ["pixels", "a random encoder", "run"]
    assert found["views"]["each"] == 4 and len(found["views"]["numbers"]) == 5
    assert "1 unreadable images left out" in found["about"]


def test_columns_of_a_table(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    names = content(made[2])["names"]
    table = tmp_path / "table.csv"
    table.write_text(
        "\ufeffname,year,place\n" + "".join(f"{name},{1990 + i},{'ab'[i % 2]}\n" for i, name in enumerate(names))
    )
    year, place = explore.read_columns(table, names)
    assert np.frombuffer(base64.b64decode(year["values"]["data"]), np.float32).tolist() == list(range(1990, 2049))
    assert place["classes"] == ["a", "b"]
    with pytest.raises(ValueError, match="--columns must be a CSV with a row for every image"):
        explore.read_columns(table, [*names, "other"])


def test_what_is_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    run, photos, _ = map(str, made)
    for arguments, message in (
        ([photos], "CHECKPOINT must be a run folder with checkpoints"),
        ([run, photos, "digits"], "SOURCE must be one folder or name"),
        ([run] * 5, "RUN must be at most 4 of them"),
        ([run, photos, "--map", "tsne"], "--map must be of pca, umap"),
    ):
        with pytest.raises(ValueError) as refused:
            explore.main([*arguments, "-o", str(tmp_path / "x.html")])
        assert str(refused.value).startswith(message)
    assert not (tmp_path / "x.html").exists()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    started = Browser(tmp_path)
    yield started
    started.process.terminate()
    started.process.wait()


@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 900, False), (390, 844, True)])
def test_the_page_in_a_browser(
    browser: Browser, made: tuple[Path, Path, Path], width: int, height: int, phone: bool
) -> None:
    browser.show(made[2], width, height, phone)
    assert browser.value("document.documentElement.scrollWidth") <= width
    # Where image 7 lies on the map: pointing at it shows its name, clicking chooses it.
    spot = "(() => { const v = views[0], b = v.canvas.getBoundingClientRect(), r = v.canvas.width / b.width;"
    x, y = browser.value(f"{spot} return [b.left + v.at[14] / r, b.top + v.at[15] / r]; }})()")
    name = browser.value(f"{spot} return C.names[under(v, {{ clientX: {x}, clientY: {y} }})]; }})()")
    browser.mouse("mouseMoved", x, y)
    assert browser.value("document.querySelector('#tip').style.display") == "block"
    assert name in browser.value("document.querySelector('#tip span').textContent")
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, x, y, button="left", clickCount=1)
    assert browser.value("document.querySelector('#facts b').textContent") == name
    rows = browser.value("[...document.querySelectorAll('#near [data-space]')].map(x => x.childElementCount)")
    assert rows == [8, 8, 8]
    # A neighbor can be chosen, colors switched, a name found, and lists opened.
    second = browser.value("document.querySelector('#near [data-space] button').title")
    browser.value("document.querySelector('#near [data-space] button').click()")
    assert browser.value("document.querySelector('#facts b').textContent") == second
    browser.value("color.selectedIndex = 1, color.onchange()")
    assert "cluster 0" in browser.value("legend.name, document.querySelector('#legend').textContent")
    browser.value("document.querySelector('#pairs').open = true")
    time.sleep(0.2)
    assert browser.value("document.querySelectorAll('#pairs .row button').length") >= 2
    browser.value(f"$('find').value = {TWINS[0]!r}, $('find').oninput()")
    assert browser.value("document.querySelector('#facts b').textContent") == TWINS[0]
    shot = base64.b64decode(browser("Page.captureScreenshot", format="png")["data"])
    Path(os.environ.get("FASTRDM_SCREENSHOTS", made[2].parent), f"explore-{width}.png").write_bytes(shot)
