"""The site: built without a warning, every link leads somewhere, its pages from the code name what the code has."""

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from fastrdm.config import help
from fastrdm.config.run_config import Config

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("material", "mkdocstrings"):
        pytest.importorskip(module, reason="needs pip install 'fastrdm[docs]'")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_link_of_the_site_leads_to_a_page_and_its_part(site: Path) -> None:
    pages = {page: page.read_text() for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 15
    parts = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    broken = []
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="(?!https?:|mailto:|data:|//)([^"]*)"', text):
            path, _, part = unescape(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (part and part not in parts.get(target, {part})):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert broken == []


def test_the_settings_page_has_every_setting(site: Path) -> None:
    text = (site / "settings" / "index.html").read_text()
    keys = [setting.key for setting in help.walk(Config)]
    assert len(keys) > 80
    assert [key for key in keys if f"<code>{key}</code>" not in text] == []


def test_the_api_page_shows_docstrings(site: Path) -> None:
    text = (site / "reference" / "index.html").read_text()
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE):
        assert f'id="{name}"' in text, name
    assert "Newest value of every metric" in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs pip install 'fastrdm[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install 'fastrdm[docs]'")
    pytest.importorskip("ipykernel", reason="needs pip install 'fastrdm[docs]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shown = nbformat.read(notebook, as_version=4)
    assert all(not cell.get("outputs") for cell in shown.cells), "outputs are not committed"
    nbclient.NotebookClient(shown, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [cell.outputs for cell in shown.cells if cell.cell_type == "code"]
    assert len(printed) >= 3 and all(printed)
