"""A hook of MkDocs: pages of the site that lie outside of `docs/`.

The documents link to files of the repository by their place in it, `../benchmarks/results/lm.md`,
so that the links work in a clone and on the page of a repository. The site gets these files, too,
and the links to them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = [
    "README.md",
    "CHANGELOG.md",
    "NOTICE",
    "assets/**/*.png",
    "benchmarks/gpu-notes.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "pez_core/words/unsafe.txt",
    "pez_core/words/english.txt",
    "pez_core/models/*/SOURCES.md",
]
RENAMED = {"README.md": "index.md", "NOTICE": "NOTICE.txt"}


def _places() -> dict[str, str]:
    """Path in the repository -> path in the site, of all that is outside of `docs/`."""
    found = (str(path.relative_to(ROOT)) for pattern in OUTSIDE for path in ROOT.glob(pattern))
    return {path: RENAMED.get(path, path) for path in found}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for path, place in _places().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links by the place of a file in the site instead of its place in the repository."""
    places = _places()
    in_site = page.file.src_uri
    of_site = {place: path for path, place in places.items()}
    here = posixpath.dirname(of_site.get(in_site, f"docs/{in_site}"))

    def moved(found: re.Match) -> str:
        target, anchor = found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(here, target))
        place = places.get(path, path.removeprefix("docs/"))
        if path not in places and not path.startswith("docs/"):
            return found[0]
        relative = posixpath.relpath(place, posixpath.dirname(in_site) or ".")
        return f"{found[1]}{relative}{anchor})"

    return re.sub(r"(\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", moved, markdown)
