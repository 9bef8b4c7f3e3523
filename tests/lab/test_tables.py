"""The text of a table: signs, units, escapes; the console's lines are in test_ablate.py."""

from irpe_lab import tables
from irpe_lab.figures import TASKS

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
    text = tables.latex(["run"], [["50%_of $x^2 ± 1\\"], ["bad"]], [False, True])
    assert "50\\%\\_of \\$x\\textasciicircum{}2 $\\pm$ 1\\textbackslash{} \\\\" in text
    assert "\\textcolor{red}{bad}" in text
    assert text.startswith("% \\usepackage{booktabs, xcolor}\n\\begin{tabular}{l}\n")
