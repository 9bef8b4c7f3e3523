"""The notebook runs from top to bottom, and learns."""

import ast
import json

import pytest
from matplotlib.figure import Figure

from tests.helpers.snippets import REPOSITORY


def test_the_tour_runs(capsys):
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install .[demo]")
    notebook = json.loads((REPOSITORY / "notebooks" / "tour.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace, shown = {"__name__": "tour"}, []
    for cell in cells:
        assert not cell["outputs"], "commit the notebook without outputs"
        code = "".join(line for line in cell["source"] if not line.startswith("%"))
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "tour.ipynb", "exec"), namespace)
        if last is not None:  # what Jupyter would show below the cell
            shown.append(eval(compile(ast.Expression(last.value), "tour.ipynb", "eval"), namespace))
    assert sum(isinstance(value, Figure) for value in shown) == 3
    assert namespace["losses"][-1] < namespace["losses"][0]
    assert "rpe-1.9-product-ctx-1-k: 49 buckets for 64 x 64 pairs" in capsys.readouterr().out
