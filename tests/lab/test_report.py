"""Tables from logs, published and ours."""

import base64
import json
import os
import re

import pytest

from irpe_lab import console_log, report
from irpe_lab.figures import TASKS
from irpe_lab.tables import markdown
from irpe_train.config import ROOT
from irpe_train.errors import BadData

MODEL = "deit_small_patch16_224_ctx_product_50_shared_k"
DETR = "rpe-2.0-product-ctx-1-k_300epochs"
DEIT = TASKS["deit_irpe"]


def deit_line(epoch, acc1):
    """One line of log.txt with the published keys in the published order."""
    return json.dumps(
        {
            "train_lr": 1e-6,
            "train_loss": 6.9,
            "test_loss": 1.2,
            "test_acc1": acc1,
            "test_acc5": 95.0,
            "epoch": epoch,
            "n_parameters": 22089064,
        }
    )


def detr_line(epoch, ap):
    """One line of a published DETR log, unscaled and auxiliary losses included."""
    losses = [
        f"loss_{kind}{layer}{scaled}"
        for scaled in ("", "_unscaled")
        for layer in ("", "_0", "_1", "_2", "_3", "_4")
        for kind in ("ce", "bbox", "giou")
    ]
    keys = ["class_error", "loss", *losses, "class_error_unscaled", "cardinality_error_unscaled"]
    line = {"train_lr": 1e-4, **{f"train_{key}": 1.5 for key in keys}, **{f"test_{key}": 1.7 for key in keys}}
    return json.dumps(line | {"test_coco_eval_bbox": [ap] + [0.5] * 11, "epoch": epoch, "n_parameters": 41317920})


@pytest.fixture
def logs(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / f"log_{MODEL}.txt").write_text(deit_line(0, 10.0) + "\n" + deit_line(299, 80.93) + "\n")
    (folder / f"log_{DETR}.txt").write_text(detr_line(0, 0.1) + "\n" + detr_line(299, 0.4213) + "\n")
    (folder / "log_demo.txt").write_text(deit_line(0, 97.2) + "\n")
    (folder / "demo.yaml").write_text("epochs: 1\n")
    (folder / "detail_other.log").write_text(
        "number of params: 5755816\nEpoch: [0]  [ 0/10]  eta: 0:00:01  lr: 0.000001  loss: 6.9 (6.9)\n"
        "* Acc@1 70.000 Acc@5 90.000 loss 1.300\nEpoch: [1] Total time: 0:00:10 (0.1 s / it)\n"
        "* Acc@1 73.700 Acc@5 92.000 loss 1.234\nMax accuracy: 73.70%\n"
    )
    (folder / "mini").mkdir()
    (folder / "mini" / "table.md").write_text(markdown(["run", "top-1 (%)"], [["a|b", "90.00"]]))
    (folder / "mini" / "README.md").write_text("Small-scale evidence.\n")
    (folder / "mini" / "table.png").write_bytes(b"picture")
    (folder / "mini" / "log_none_seed0.txt").write_text(deit_line(0, 50.0) + "\n" + deit_line(1, 90.0) + "\n")
    return folder


def test_detail_logs(logs):
    assert console_log.read_detail(logs / "detail_other.log") == [
        {"test_acc1": 70.0, "test_acc5": 90.0, "test_loss": 1.3, "epoch": 0, "n_parameters": 5755816},
        {"test_acc1": 73.7, "test_acc5": 92.0, "test_loss": 1.234, "epoch": 1, "n_parameters": 5755816},
    ]
    assert console_log.images_per_second(logs / "detail_other.log") is None
    detr = logs / "detail_detr.log"
    detr.write_text(
        "Epoch: [3]  [0/7]  120 img/s\n"
        "IoU metric: bbox\n"
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.422\n"
        " Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.623\n"
        "IoU metric: segm\n"
        " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.311\n\n"
    )
    assert console_log.read_detail(detr) == [{"test_coco_eval_bbox": [0.422], "epoch": 3}]
    assert console_log.images_per_second(detr) == 120
    assert console_log.last_words(detr).startswith("Average Precision")
    assert console_log.last_words(logs / "no") == "it printed nothing"


@pytest.mark.parametrize(
    "line",
    [
        "* Acc@1 ... Acc@5 ... loss ...",
        "* Acc@1 1.2.3 Acc@5 4.5",
        "* Acc@1 " + "1" * 5000 + " Acc@5 2.0",
        "number of params: ,,,",
        "number of params: " + "9" * 5000,
        "Epoch: [" + "9" * 5000 + "]",
        "Epoch: [0] . img/s max mem: " + "9" * 5000,
        "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = -.",
    ],
)
def test_a_line_that_only_looks_like_a_figure_is_ignored(tmp_path, line):
    file = tmp_path / "detail_x.log"
    file.write_text(f"{line}\nnumber of params: 7\nEpoch: [3] 5 img/s max mem: 9\n* Acc@1 70.0 Acc@5 90\n")
    assert console_log.read_detail(file) == [{"epoch": 3, "n_parameters": 7, "test_acc1": 70.0, "test_acc5": 90.0}]
    assert (console_log.images_per_second(file), console_log.peak_memory(file)) == (5.0, 9)


def test_published_and_here_side_by_side(logs, tmp_path):
    made = report.Report(logs, tmp_path / "docs" / "results.md")
    rows = {line.split("]")[0][3:]: line for line in made.published_and_here(DEIT).splitlines()}
    assert f"| 80.9 | [80.93](../logs/log_{MODEL}.txt) |" in rows[MODEL]
    assert f"| 95.4 | [95](../logs/log_{MODEL}.txt) | 22.09 | not run | 4,659 | not run |" in rows[MODEL]
    assert "| 73.7 | not run |" in rows[MODEL.replace("small", "tiny")]
    assert f"| [pth]({made.zoo.models[MODEL].url}) |" in rows[MODEL]
    coco = made.published_and_here(TASKS["detr_irpe"])
    assert f"| 0.422 | [0.4213](../logs/log_{DETR}.txt) |" in coco and "| 0.409 | not run |" in coco
    other = made.other_runs()
    assert "| demo | [flags](../logs/demo.yaml) | 1 | 22,089,064 | [97.20 top-1 (%)](../logs/log_demo.txt) |" in other
    assert "| other | - | 2 | 5,755,816 | [73.70 top-1 (%)](../logs/detail_other.log) |" in other and MODEL not in other
    assert "| 0.410 | not run |" in coco and "| AP small, published |" in coco
    short = made.short_tables()
    assert f"| [small_k]({os.path.relpath(ROOT / 'configs/deit/small_k.yaml', tmp_path / 'docs')}) | [pth]" in short
    assert "| 80.9 | [80.93]" in short and "| 0.422 | [0.4213]" in short and "AP small" not in short


def test_a_run_that_was_stopped_early_says_so_beside_the_published_figure(logs, tmp_path):
    (logs / f"log_{MODEL}.txt").write_text(deit_line(0, 10.0) + "\n" + deit_line(9, 41.5) + "\n")
    block = report.Report(logs, tmp_path / "results.md").published_and_here(DEIT)
    assert f"| 80.9 | [41.5 after 10 of 300 epochs](logs/log_{MODEL}.txt) |" in block
    (logs / f"log_{MODEL}.txt").unlink()
    evaluated = "* Acc@1 41.500 Acc@5 60.000 loss 2.000\n"
    for text, shown in (("", "41.5"), ("Epoch: [9]  [0/1]\n", "41.5 after 10 of 300 epochs")):  # evaluated, trained
        (logs / f"detail_{MODEL}.log").write_text(text + evaluated)
        block = report.Report(logs, tmp_path / "results.md").published_and_here(DEIT)
        assert f"| 80.9 | [{shown}](logs/detail_{MODEL}.log) |" in block


def test_cards_fill_what_needs_no_data(logs, tmp_path):
    (logs / "cards").mkdir()
    figures = [
        {"figure": "macs_M", "here": 4658.82, "verdict": "PASS"},
        {"figure": "buckets", "here": 51, "verdict": "FAIL"},
        {"figure": "acc1", "here": None, "verdict": "not run"},
    ]
    (logs / "cards" / f"{MODEL}.json").write_text(json.dumps({"figures": figures}))
    table = report.Report(logs, tmp_path / "README.md").published_and_here(DEIT)
    assert f"| 4,659 | [4,658.82 PASS](logs/cards/{MODEL}.md) | 50 | [51 FAIL](logs/cards/{MODEL}.md) |" in table
    for broken in ("[1]", "{", "[" * 100_000, '{"figures": [{"figure": "acc1", "here": 1, "verdict": "<b>"}]}'):
        (logs / "cards" / f"{MODEL}.json").write_text(broken)
        with pytest.raises(BadData, match=f"{MODEL}.json: not a reproduction card"):
            report.Report(logs, tmp_path / "README.md").published_and_here(DEIT)


def test_the_page_and_its_html(logs, tmp_path, capsys):
    page = tmp_path / "docs" / "results.md"
    report.main([str(logs), "-o", str(page)])
    text = page.read_text()
    assert "Small-scale evidence." in text and "![mini](../logs/mini/table.png)" in text and "a\\|b" in text
    offline = page.with_suffix(".html").read_text()
    assert base64.b64encode(b"picture").decode() in offline and "<td>a|b</td>" in offline
    assert '<a href="../logs/log_demo.txt">97.20 top-1 (%)</a>' in offline
    assert '<a href="https://github.com/' in offline and 'src="http' not in offline
    assert report.main([str(logs), "-o", str(page)]) == 0
    assert page.read_text() == text  # whatever was there before
    assert report.main([str(logs), "-o", str(page), "--check"]) == 0
    (logs / "log_demo.txt").write_text(deit_line(0, 98.0) + "\n")
    assert report.main([str(logs), "-o", str(page), "--check"]) == 1 and page.read_text() == text
    assert "results.md is stale" in capsys.readouterr().err


def test_tables_between_markers(logs, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n")
    check = [str(logs), "--readme", str(readme), "--check"]
    assert report.main(check) == 1 and "old" in readme.read_text()
    report.main(check[:-1])
    assert report.main(check) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- results:begin -->\n**ImageNet-1K") and "old" not in text
    assert "| 0.422 | [0.4213](logs/log_" in text and text.endswith("<!-- results:end -->\nafter\n")
    report.main([str(logs), "--readme", str(readme)])
    assert readme.read_text() == text
    (link := tmp_path / "link.md").symlink_to(readme)
    readme.write_text(text.replace("0.4213", "old"))
    before = os.stat(readme).st_ino
    report.main([str(logs), "--readme", str(link)])
    assert link.is_symlink() and readme.read_text() == text and os.stat(readme).st_ino != before  # replaced as a whole
    windows = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    readme.write_bytes(windows.replace(b"0.4213", b"old"))
    report.main([str(logs), "--readme", str(readme)])
    assert readme.read_bytes() == windows and report.main(check) == 0


def test_the_html_trusts_nothing_it_reads(logs, tmp_path):
    """Logs of someone else: names, tables, links, pictures and links in the file system that lead out of the folder."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"TOP-SECRET")
    names = [
        "[x](javascript:alert(1))",
        "<script>alert(1)</script>",
        "a|b`c*d_e",
        os.fsdecode(b"caf\xe9"),
        "![x](../../secret.png)",
    ]
    for name in names:
        (logs / f"log_{name.replace('/', chr(0x2044))}.txt").write_text(deit_line(0, 50.0) + "\n")
    (logs / "mini" / "table.md").write_text(
        '| r |\n| --- |\n| [q](x" onclick="alert`1`) |\n| <img src=x onerror=alert(1)> |\n\n[a](JaVaScRiPt:alert(1)) '
        "[b](data:text/html,x) [c]: javascript:alert(1)\n\n<iframe src=file:///etc/passwd></iframe>\n"
    )
    (logs / "mini" / "README.md").write_text(
        f"![s]({secret}) ![t](file://{secret}) ![u](../secret.png) ![v](http://x/y.png)\n"
    )
    (logs / "mini" / "table.png").unlink()
    (logs / "mini" / "table.png").symlink_to(secret)
    (logs / "p](evil)").mkdir()
    (logs / "p](evil)" / "table.md").write_text("| a |\n| --- |\n")
    (logs / "p](evil)" / "table.png").write_bytes(b"picture")
    (logs / "other").mkdir()
    (logs / "other" / "table.md").symlink_to(secret)
    page = tmp_path / "docs" / "results.md"
    report.main([str(logs), "-o", str(page)])
    text = page.with_suffix(".html").read_text()
    tags = re.findall(r"<[^>]*>", text)
    assert not [
        tag
        for tag in tags
        if re.search(r"javascript:|\son\w+=|<script|<iframe|data:text|src=\"?(http|file)", tag, re.I)
    ]
    assert "TOP-SECRET" not in text and base64.b64encode(b"TOP-SECRET").decode()[:12] not in text
    assert "TOP-SECRET" not in page.read_text() and "p](evil)" not in page.read_text()
    assert {re.match(r"<(/?\w+)", tag)[1] for tag in tags if tag[1] != "!"} <= ALLOWED_TAGS
    for shown in ("[x](javascript:alert(1))", "&lt;script&gt;alert(1)", "a|b`c*d_e", "caf?"):
        assert f"<td>{shown}" in text, shown


ALLOWED_TAGS = {"meta", "title", "/title", "style", "/style", "img"} | {
    slash + tag
    for tag in ("h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "a", "code", "em", "strong")
    for slash in ("", "/")
}


def test_bad_input(tmp_path):
    with pytest.raises(SystemExit, match="no folder .*nowhere"):
        report.main([str(tmp_path / "nowhere"), "-o", str(tmp_path / "x.md")])
    (tmp_path / "log_x.txt").write_text("{}\n")
    with pytest.raises(BadData, match="log_x.txt: line 1 is not a JSON object with 'epoch'"):
        report.find_runs(tmp_path)


@pytest.mark.parametrize("name", ["log_demo.txt", "mine.md", "other.md"])
def test_a_page_replaces_no_file_of_somebody_else(logs, name):
    (logs / "mine.md").write_text("written by hand")
    (logs / "other.html").write_text("a page")
    before = {path: path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="already there, and not made by report"):
        report.main([str(logs), "-o", str(logs / name)])
    assert {path: path.read_bytes() for path in logs.rglob("*") if path.is_file()} == before


def test_a_page_is_rewritten_and_is_not_its_own_twin(logs):
    for _ in range(2):
        report.main([str(logs), "-o", str(logs / "page.md")])
    with pytest.raises(SystemExit, match=r"name the page, .*page\.md"):
        report.main([str(logs), "-o", str(logs / "page.html")])


def test_a_report_that_was_killed_between_its_files_is_made_again(logs, monkeypatch):
    def killed(text, pictures):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(report, "to_html", killed)
        report.main([str(logs), "-o", str(logs / "page.md")])
    report.main([str(logs), "-o", str(logs / "page.md")])
    assert (logs / "page.html").is_file()


def test_a_byte_order_mark_is_not_part_of_a_text(logs):
    """Editors on Windows write one."""
    log = logs / f"log_{MODEL}.txt"
    card = {"figures": [{"figure": "buckets", "here": 50, "verdict": "PASS"}]}
    (logs / "cards").mkdir(exist_ok=True)
    (logs / "cards" / f"{MODEL}.json").write_text(json.dumps(card), encoding="utf-8-sig")
    plain = console_log.read_log(log)
    log.write_text(log.read_text(), encoding="utf-8-sig")
    assert console_log.read_log(log) == plain and len(plain) == 2
    for _ in range(2):
        report.main([str(logs), "-o", str(logs / "page.md")])
        page = logs / "page.md"
        assert "\ufeff" not in page.read_text()
        page.write_text(page.read_text(), encoding="utf-8-sig")


@pytest.mark.parametrize("text", [b"# mine\n", b"<!-- results:begin -->\nno end\n", b"\xff<!-- results:begin -->"])
def test_a_file_without_markers_is_reported(logs, text):
    path = logs / "mine.md"
    path.write_bytes(text)
    with pytest.raises(SystemExit, match=r"--readme .*mine\.md: (no <!--|not UTF-8)"):
        report.main([str(logs), "--readme", str(path)])
    assert path.read_bytes() == text
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SystemExit, match="mine.md: expected a plain file, not a folder, a pipe"):
        report.main([str(logs), "--readme", str(path)])
