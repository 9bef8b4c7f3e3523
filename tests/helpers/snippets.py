"""Runs the Python of a Markdown file, so that documentation cannot rot."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def python_blocks(markdown: Path) -> list[tuple[int, str]]:
    """``(line, code)`` of every fenced block that is marked ``python``; ``line`` is the first line of code."""
    text = markdown.read_text()
    fences = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in fences]


def run_python_blocks(markdown: Path) -> dict:
    """Run the blocks one after the other in one namespace, and return it; tracebacks show the lines of the file."""
    namespace = {"__name__": markdown.stem}
    for line, code in python_blocks(markdown):
        exec(compile("\n" * (line - 1) + code, str(markdown), "exec"), namespace)
    return namespace
