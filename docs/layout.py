"""The site has the layout of the repository, so a link means the same on a forge, in an editor and in the site.

MkDocs knows one folder of pages. Here pages keep their path from the root, and the README, which lies above that
folder, is the home page; results that pages link to come along.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
FOLDERS = ("docs", "benchmarks/results", "benchmarks/reference_model", "examples")
SHOWN = {".md", ".png", ".css", ".html", ".csv", ".json", ".yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Replace the files of docs/, named from there, by all that the site shows, named from the root."""
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*of_theme, *(_file(path, config) for path in _shown())])


def _shown() -> list[Path]:
    found = [ROOT / name for name in ROOT_PAGES]
    for folder in FOLDERS:
        found += sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in SHOWN)
    return found


def _file(path: Path, config: Any) -> File:
    source = path.relative_to(ROOT).as_posix()
    return File(source, str(ROOT), config.site_dir, config.use_directory_urls)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leave out the list of pages beside one that has no neighbours: its text gets the room."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]
    return markdown
