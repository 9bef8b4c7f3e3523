# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs.yml: README.md is the first page, and links to files outside of docs/ lead to the repository."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent


def on_files(files, config):
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"(\]\(|src=\")docs/", r"\1", re.sub(r"\]\((?!docs/|https?:|#)", "](../", text))
    files.append(File.generated(config, "index.md", content=text.replace("](benchmarks)", "](benchmarks/README.md)")))
    return files


def on_page_markdown(markdown, page, config, files):
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def outside(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        return link[0] if target.startswith("docs/") else f"]({config.repo_url}/blob/main/{target}"

    return re.sub(r"\]\((\.\./[^)#]*)", outside, markdown)
