"""Chooses the files of the site. MkDocs calls these functions by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT: Final = Path(__file__).resolve().parents[2]
DECISIONS: Final = "docs/decisions"
PAGES: Final = (
    "*.md",
    "LICENSE",
    "NOTICE",
    "docs/**/*",
    "helm/shiwu/README.md",
    "recipes/README.md",
    "worker/shiwu_worker/data/photo_zh/MODEL_CARD.md",
)
"""Patterns of the files, whose paths stay as they are."""
LEFT_OUT: Final = ("docs/site", "__pycache__")
SCRIPTS: Final = ROOT / ".venv" / "site-scripts"
"""Where `python -m tests.support.site_scripts` puts what pages would otherwise load from a web address."""
DIAGRAMS: Final = "mermaid.min.js"
SEARCH_IN_FILES: Final = "iframe-worker.js"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the decisions to the navigation, and the scripts that are there to the pages."""
    decisions = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / DECISIONS).glob("*.md"))
    decisions.sort(key=lambda path: not path.endswith("README.md"))
    for section in config.nav or []:
        for entries in section.values():
            for entry in entries:
                if isinstance(entry, dict) and entry.get("Decisions") == DECISIONS:
                    entry["Decisions"] = decisions
    # Named even where it is missing: the theme would name a web address.
    config.extra["polyfills"] = [f"scripts/{SEARCH_IN_FILES}"]
    if (SCRIPTS / DIAGRAMS).exists():
        config.extra_javascript.append(f"scripts/{DIAGRAMS}")
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and what they show."""
    for path in sorted({path for pattern in PAGES for path in ROOT.glob(pattern) if path.is_file()}):
        name = path.relative_to(ROOT).as_posix()
        if not any(part in name for part in LEFT_OUT):
            files.append(File(name, str(ROOT), config.site_dir, use_directory_urls=False))
    for path in sorted(SCRIPTS.glob("*.js")):
        files.append(File.generated(config, f"scripts/{path.name}", abs_src_path=str(path)))
    return files
