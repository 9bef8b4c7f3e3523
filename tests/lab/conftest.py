"""Shared by the tests of the ablation and of the report."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def coarse_pictures(monkeypatch):
    """Pictures that no test looks at are saved at a tenth of their resolution, which is much faster."""
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: save(self, file, **options | {"dpi": 30}))
