"""Make the links of README.md absolute for a package index; pyproject.toml has everything else.

README.md has relative links, which work in a clone and on the page of a repository but not on a
package index. With `Repository` in `[project.urls]` of pyproject.toml the description of a package
links to the files of its version there; without, README.md is taken as it is.
"""

import re
import sys
from pathlib import Path

from setuptools import setup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent
_RELATIVE = r"\]\((?![a-z]+:|#)([^)\s]+)\)"


def with_absolute_links(text: str, repository: str, version: str) -> str:
    """`text` with its relative links to the files of a version in a repository."""
    repository = repository.removesuffix("/").removesuffix(".git")

    for begin, kind in ((r"(!\[[^\]]*)", "raw"), ("()", "blob")):
        text = re.sub(begin + _RELATIVE, rf"\1]({repository}/{kind}/v{version}/\2)", text)
    return text


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    repository = project.get("urls", {}).get("Repository")
    if repository:
        readme = with_absolute_links(readme, repository, project["version"])
    setup(long_description=readme, long_description_content_type="text/markdown")


if __name__ == "__main__":
    main()
