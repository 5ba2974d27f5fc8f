"""Lets the site show documents of the repository that lie outside of docs/ (an MkDocs hook).

The front page, ARCHITECTURE.md, CHANGELOG.md and the benchmarks' pages stay where they are, and
their links work on a code host. Here each becomes a page of the site, and links are rewritten to
where their targets are there. Links to files that the site does not have become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Path in the repository: path in the site. (MkDocs would take a README.md for an index.)
OUTSIDE = {
    "README.md": "front-page.md",
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CHANGELOG.md": "CHANGELOG.md",
    **{
        path.relative_to(ROOT).as_posix(): f"benchmarks/{path.parent.name}.md"
        for path in sorted(ROOT.glob("benchmarks/*/README.md"))
    },
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the documents from outside."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: Any, files: Files) -> str:
    """Rewrite a page's links."""
    return with_site_links(markdown, page.file.src_uri)


def with_site_links(markdown: str, page: str) -> str:
    """Return a page of the site with its links leading to pages of the site.

    Args:
        markdown: the page.
        page: its path in the site.
    """
    sources = {site: source for source, site in OUTSIDE.items()}
    folder = posixpath.dirname(sources.get(page, f"docs/{page}"))

    def rewritten(match: re.Match[str]) -> str:
        is_picture, text, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target):
            return match.group(0)
        source = posixpath.normpath(posixpath.join(folder, target))
        if source in OUTSIDE:
            there = OUTSIDE[source]
        elif source.startswith("docs/") and (ROOT / source).suffix in (".md", ".png"):
            there = source.removeprefix("docs/")
        else:
            return text
        relative = posixpath.relpath(there, posixpath.dirname(page) or ".")
        return f"{is_picture}[{text}]({relative}{anchor or ''})"

    return _LINK.sub(rewritten, markdown)
