"""What the tests of the ablation and of the report share."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def coarse_pictures(monkeypatch):
    """Pictures that nobody looks at are saved at a tenth of their resolution, which takes a fraction of the time."""
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: save(self, file, **options | {"dpi": 30}))
