"""The text of a table: signs, units, escapes; the console's lines are in test_ablate.py."""

from irpe_lab import tables
from irpe_lab.figures import TASKS
from irpe_lab.results import Outcome, Row
from irpe_ops import visualize

ACC1, AP = (task.figure for task in TASKS.values())


def test_differences_have_their_sign_and_the_unit_of_the_figure():
    assert tables.difference([-1.0, -2.0], ACC1) == "-1.50 [-]"
    assert tables.difference([0.5] * 5, ACC1) == "+0.50 [+0.50, +0.50]" and tables.difference([], ACC1) == "-"
    assert tables.difference([0.01, -0.02], AP) == "-0.005 [-]"


def test_a_mean_has_a_deviation_from_two_seeds_on():
    assert tables.mean_and_spread([80.0, 82.0], ACC1) == "81.00 ± 1.41"
    assert tables.mean_and_spread([0.4], AP) == "0.400" and tables.mean_and_spread([], AP) == ""


def test_durations():
    assert [tables.duration(s) for s in (0, 59.6, 3599, 360_000)] == ["0:00:00", "0:01:00", "0:59:59", "100:00:00"]


def test_cells_stay_cells_in_markdown_and_latex():
    assert tables.markdown(["a"], [["x|y\nz"]]) == "| a |\n| --- |\n| x\\|y z |\n"
    assert tables.markdown(["a"], [["x\ry\u2028\tz"]]) == "| a |\n| --- |\n| x y z |\n"
    minus = tables.latex(["rpe-1.9-k", "a"], [["seed-0", "-0.33 [-1.00, +0.78]"], ["-", "[-]"]], [False, False])
    assert "rpe-1.9-k & a" in minus and "seed-0 & $-$0.33 [$-$1.00, +0.78]" in minus and "- & [-]" in minus
    text = tables.latex(["run"], [["50%_of $x^2 ± 1\\"], ["bad"]], [False, True])
    assert "50\\%\\_of \\$x\\textasciicircum{}2 $\\pm$ 1\\textbackslash{} \\\\" in text
    assert "\\textcolor{red}{bad}" in text
    assert text.startswith("% \\usepackage{booktabs, xcolor}\n\\begin{tabular}{l}\n")


def test_a_row_has_medians_of_its_finished_seeds_and_each_evaluation():
    model = {"n_parameters": 1234, "buckets": 50, "macs_M": 1234.56}
    outcomes = {
        0: Outcome("done", 2, 80.0, 81.0, None, 60.0, 100.0, 5, model, {"at 48": 40.0}),
        1: Outcome("done", 2, 82.0, 85.0, None, 120.0, 200.0, 9, model, {"at 48": 42.0}),
        2: Outcome("failed", reason="x", seconds=9999.0),
    }
    baseline = Row("none", "", {0: Outcome("done", 2, 79.0, 79.0, evaluations={"at 48": 39.5})})
    row = Row("irpe", "", outcomes, published=80.9, baseline=baseline)
    assert tables.cells(row, ACC1, baseline="none", evaluations=("at 48",)) == {
        "run": "irpe",
        "buckets": "50",
        "parameters": "1,234",
        "MACs (M)": "1234.6",
        "img/s": "150",
        "memory (MiB)": "7",
        "time": "0:01:30",
        "top-1 (%), last epoch": "81.00 ± 1.41, failed: x",
        "best epoch": "83.00",
        "minus none [95%]": "+1.00 [-]",
        "top-1 (%) at 48": "41.00 ± 1.41",
        "minus none at 48 [95%]": "+0.50 [-]",
        "seeds": "2/3",
        "published": "80.90",
    }
    assert set(tables.cells(Row("irpe", "", {0: Outcome("waiting")}), ACC1).values()) == {
        "irpe", "-", "not run", "0/1", tables.NOT_PUBLISHED
    }  # fmt: skip


def test_the_pictures_of_a_table_are_for_print(tmp_path, monkeypatch):
    saved = {}
    monkeypatch.setattr(visualize, "save", lambda canvas, path, *, dpi: saved.update({path.name: dpi}))
    tables.write([Row("irpe", "", {0: Outcome("done", 2, 80.0, 81.0)})], tmp_path, ACC1, title="x")
    assert saved == {"table.png": 300, "table.pdf": 300}
