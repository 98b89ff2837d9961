"""What `mkdocs build` needs to know about this repository: a hook of mkdocs.yml.

Pages are written for GitHub, where links lead anywhere in the repository. On the site README.md is the home page, the
pictures of results/figures are copied, and links to other files lead to GitHub. A link to a file that is not there
fails the build, as mkdocs' own checks do for links between pages.
"""

import os
import re
from pathlib import Path
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
HOME, FIGURES = "index.md", "results/figures"
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s#]+)(#[^)\s]*)?\)")
log = get_plugin_logger("site")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the home page and the pictures."""
    found = {HOME: ROOT / "README.md", **{f"{FIGURES}/{p.name}": p for p in sorted((ROOT / FIGURES).glob("*.png"))}}
    for name, path in found.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead each relative link to where the file is on the site, or else on GitHub."""
    source = ROOT / "README.md" if page.file.src_uri == HOME else Path(config.docs_dir) / page.file.src_uri
    fenced = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)

    def lead(match: re.Match[str]) -> str:
        before, link, anchor = match[1], match[2], match[3] or ""
        if "://" in link or link.startswith("mailto:"):
            return match[0]
        path = Path(os.path.normpath(source.parent / link))
        if not path.exists():
            log.warning(f"{source.relative_to(ROOT)} links to {link}, which is not there.")
        name = path.relative_to(ROOT).as_posix()
        on_site = HOME if name == "README.md" else name.removeprefix("docs/")
        if files.get_file_from_path(on_site) is None:
            return f"{before}{config.repo_url}/{'tree' if path.is_dir() else 'blob'}/main/{name}{anchor})"
        return f"{before}{relpath(on_site, Path(page.file.src_uri).parent.as_posix())}{anchor})"

    parts, end = [], 0
    for block in fenced.finditer(markdown):
        parts += [LINK.sub(lead, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(lead, markdown[end:])])
