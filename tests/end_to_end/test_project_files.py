"""The files around the code fit the project and each other: citation, workflows, container, constraints, site."""

import ast
import html
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.end_to_end.test_documented_commands import PROJECT
from tests.helpers.snippets import REPOSITORY

TRACKED = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.splitlines()
CONSTRAINTS = dict(
    re.fullmatch(r"([\w.-]+)==(\S+)", line).groups()
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


def read(name: str) -> str:
    return (REPOSITORY / name).read_text()


def test_citation():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "title", "message", "authors", "license"} <= citation.keys()
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    bibtex = re.search(r"@inproceedings\{.*?\n\}", read("README.md"), flags=re.DOTALL)[0]
    assert paper["title"] in bibtex and f"{paper['start']}--{paper['end']}" in bibtex and str(paper["year"]) in bibtex
    assert all(f"{name['family-names']}, {name['given-names']}" in bibtex for name in paper["authors"])


def test_workflows_call_what_is_there():
    for path in sorted((REPOSITORY / ".github" / "workflows").iterdir()):
        workflow = yaml.safe_load(path.read_text())
        for job in workflow["jobs"].values():
            for command in [step["run"] for step in job["steps"] if "run" in step]:
                program, *words = command.split()
                assert program in ("pip", "pipx", "mkdocs") or os.access(REPOSITORY / program, os.X_OK), command
                assert all((REPOSITORY / word).exists() for word in words if "/" in word or word.endswith(".txt")), (
                    command
                )
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert [f"Programming Language :: Python :: {version}" for version in matrix] == [
        line for line in PROJECT["classifiers"] if "Python ::" in line
    ]
    assert f">={matrix[0]}" == PROJECT["requires-python"]


def test_constraints_cover_what_is_required():
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    required = re.findall(r"^([\w.-]+)(?=[\[><=])", "\n".join([read("requirements.txt"), *extras]), flags=re.MULTILINE)
    known = {name.lower().replace("_", "-") for name in CONSTRAINTS}
    assert len(required) > 20 and {name.lower() for name in required} <= known
    hook = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]
    assert hook["rev"] == f"v{CONSTRAINTS['ruff']}"


def test_the_container_copies_and_installs_what_is_there():
    text = read("Dockerfile")
    for line in re.findall(r"^COPY (.*)", text, flags=re.MULTILINE):
        assert all((REPOSITORY / source).exists() for source in line.split()[:-1])
    extras = re.search(r"-e '\.\[(.*?)\]'", text)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert re.search(r"nvidia/cuda:(\d+)\.", text)[1] == CONSTRAINTS["nvidia-cublas"].partition(".")[0]


def test_issue_forms_are_valid():
    for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").iterdir():
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        assert all(item["type"] in ("textarea", "input") and item["attributes"]["label"] for item in form["body"])


def test_every_source_file_says_its_licence():
    endings = (".py", ".cpp", ".cu", ".h", ".inl")
    sources = [name for name in TRACKED if name.endswith(endings) and not name.startswith("tests/")]
    assert len(sources) > 100
    missing = [name for name in sources if "SPDX-License-Identifier: Apache-2.0" not in read(name)[:200]]
    assert not missing, f"put this into the first line of {', '.join(missing)}"


def test_nothing_names_a_place_that_exists_on_one_machine_only():
    own = [name for name in TRACKED if name.endswith((".md", ".yml", ".yaml", ".cff", ".toml", ".sh", "Dockerfile"))]
    homes = re.compile(r"(?<![\w.])/(home|Users|root|work|mnt|scratch)/\w+")
    assert not [(name, found[0]) for name in own if (found := homes.search(read(name)))]


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs the extra [docs]")
def test_the_site_builds_and_has_every_page(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = [path for path in (REPOSITORY / "docs").rglob("*.md")]
    assert len(list(tmp_path.rglob("index.html"))) == len(pages) + 1
    linked = set(re.findall(r"[\w/]+\.md", read("mkdocs.yml")))
    assert linked == {str(page.relative_to(REPOSITORY / "docs")) for page in pages} | {"index.md"}
    reference = (tmp_path / "api" / "index.html").read_text()
    exported = ast.literal_eval(re.search(r"__all__ = (\[.*?\])", read("irpe_ops/__init__.py"), flags=re.DOTALL)[1])
    assert all(re.search(rf'id="irpe_ops\.(\w+\.)?{name}"', reference) for name in exported)
    text = re.sub(r"\s+", "", html.unescape(re.sub(r"<[^>]+>", "", reference)))
    assert "irpe_ops.get_rpe_config=RPEConfig" in text and "RPEConfigunderitspublishedname." in text
    assert "RPEConfig(ratio=1.9,method='product',mode='ctx',shared_head=True,skip=0,rpe_on='k')" in text
