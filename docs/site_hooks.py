"""Hooks of the site (mkdocs.yml): pages made from the code, and links that lead out of docs/.

The sources link to files of the repository, so that they can be read there. On the site, a link to a record or to the
changes leads to the page made from it, and a link to any other file becomes the file's name.
"""

import re
from html import escape
from pathlib import Path
from typing import Any

import yaml

from fastrdm.config import help, run_config
from fastrdm.methods.losses import ALIGNMENTS, loss_settings
from fastrdm.methods.transform_settings import TRANSFORMS, transform_settings

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "benchmarks" / "records").glob("*.md"))
PAGES = {  # files of the repository and the pages made from them
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{f"benchmarks/records/{file.name}": f"records/{file.name}" for file in RECORDS},
}

LINK = r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)"  # of Markdown, not to another site


def on_config(config: Any) -> Any:
    """Put pages that nobody gave a place under a title of their own, so that none is lost."""
    placed = yaml.safe_dump(config.nav)
    rest = sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name not in placed)
    if rest:
        config.nav.append({"More": rest})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the pictures of the records."""
    from mkdocs.structure.files import File

    made = {"settings.md": settings(), "records.md": records()}
    made |= {page: (ROOT / file).read_text(encoding="utf-8") for file, page in PAGES.items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    for file in (ROOT / "benchmarks" / "records").glob("*.svg"):
        files.append(File.generated(config, f"records/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that lead out of docs/ lead to the page made from their file, or become words."""
    origin = next((file for file, made in PAGES.items() if made == page.file.src_uri), f"docs/{page.file.src_uri}")
    return re.sub(LINK, lambda found: _link(found, origin, page), markdown)


def _link(found: re.Match[str], origin: str, page: Any) -> str:
    target = ((ROOT / origin).parent / found[3]).resolve()
    here = Path(page.file.src_uri).parent
    if not target.is_relative_to(ROOT) or not (target.exists() or (ROOT / "docs" / here / found[3]).suffix == ".md"):
        return found[0]  # reported as a link that leads nowhere
    name = target.relative_to(ROOT).as_posix()
    made = PAGES.get(name, name.removeprefix("docs/") if name.startswith("docs/") else "")
    if name.startswith("benchmarks/records/") and name.endswith(".svg"):
        made = name.removeprefix("benchmarks/")
    if not made:
        return found[2] if found[2].startswith("`") else f"{found[2]} (`{name}`)"
    up = "../" * len(here.parts)
    return f"{found[1]}[{found[2]}]({up}{made}{found[4] or ''})"


def records() -> str:
    """The page that lists the records."""
    lines = ["# Records", "", "What was measured on one machine, with the commands that repeat it.", ""]
    for file in RECORDS:
        title = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        lines.append(f"- [{title}](records/{file.name})")
    return "\n".join([*lines, ""])


def settings() -> str:
    """The page of all settings, from the fields of the configuration and their docstrings."""
    lines = [
        "# Settings",
        "",
        "Every setting with its default, as `fastrdm train --help all` shows it.",
        "",
    ]
    about = run_config.sections()
    found: dict[str, list[help.Setting]] = {}
    for setting in help.walk(run_config.Config):
        section = setting.key.partition(".")[0]
        found.setdefault(section if section in about else "", []).append(setting)
    for section, members in found.items():
        lines += [f"## {section or 'The run'}", "", about.get(section, ""), "", *_table(members)]
    lines += [
        "## Transforms",
        "",
        "Items of `method.online` and `method.target`.",
        "",
    ]
    lines += _kinds({name: transform_settings(name) for name in TRANSFORMS})
    lines += ["## Losses", "", "Settings of `method.alignment`.", ""]
    lines += _kinds({name: loss_settings(name) for name in ALIGNMENTS})
    return "\n".join(lines)


def _kinds(kinds: dict[str, Any]) -> list[str]:
    lines = []
    for name, kind in kinds.items():
        members = [setting for setting in help.walk(kind) if setting.key != "name"]
        lines += [f"### {name}", "", (kind.__doc__ or "").partition("\n")[0], "", *(_table(members) if members else [])]
    return lines


def _table(members: list[help.Setting]) -> list[str]:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for setting in members:
        value = yaml.safe_dump(setting.default, default_flow_style=True, width=10_000).partition("\n")[0]
        choices = f" One of {', '.join(f'`{choice}`' for choice in setting.choices)}." if setting.choices else ""
        meaning = escape(setting.description, quote=False).replace("|", "\\|")
        lines.append(f"| `{setting.key}` | `{value}` | {meaning}{choices} |".replace("\n", " "))
    return [*lines, ""]
