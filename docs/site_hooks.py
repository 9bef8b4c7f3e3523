# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs.yml: README.md is the first page; pictures outside docs/ are copied, other files linked."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent


def on_files(files, config):
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"(\]\(|src=\")docs/", r"\1", re.sub(r"\]\((?!docs/|https?:|#)", "](../", text))
    files.append(File.generated(config, "index.md", content=text.replace("](benchmarks)", "](benchmarks/README.md)")))
    pictures = [path.relative_to(ROOT) for path in sorted((ROOT / "logs").rglob("*.png"))]
    for path in pictures:
        files.append(File(str(path), str(ROOT), config.site_dir, use_directory_urls=False))
    return files


def on_page_markdown(markdown, page, config, files):
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def outside(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[3]))
        if target.startswith("docs/"):
            return link[0]
        if link[1]:
            return f"![{link[2]}]({posixpath.relpath(target, folder.removeprefix('docs') or '.')})"
        return f"[{link[2]}]({config.repo_url}/blob/main/{target})" if config.repo_url else link[2]

    return re.sub(r"(!?)\[([^\]]*)\]\((\.\./[^)]*)\)", outside, markdown)
