"""The committed tables are those of the committed logs."""

from pathlib import Path

from irpe_lab import report
from irpe_train.zoo import read_zoo

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "stale: python -m irpe_lab.report logs -o docs/results.md --readme README.md"


def test_readme_is_not_stale():
    text = (ROOT / "README.md").read_text()
    assert report.MARKED.search(text)
    assert report.Report(ROOT / "logs", ROOT / "README.md").fill(text) == text, AGAIN
    for row in ("73.7", "82.8", "0.422"):
        assert row in text


def test_the_page_of_results_is_not_stale():
    page = ROOT / "docs" / "results.md"
    assert report.Report(ROOT / "logs", page).markdown() == page.read_text(), AGAIN


def test_links_of_the_page_lead_somewhere():
    page = ROOT / "docs" / "results.md"
    targets = [part.partition(")")[0] for part in page.read_text().split("](")[1:]]
    weights = {target for target in targets if "://" in target}
    assert weights == {entry.url for entry in read_zoo().models.values()}
    targets = [target for target in targets if target not in weights]
    assert len(targets) > 30
    for target in targets:
        assert (page.parent / target).is_file(), target
