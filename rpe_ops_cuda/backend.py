# SPDX-License-Identifier: Apache-2.0
"""Build backend: setuptools, with the torch that is already installed.

pip builds in an isolated environment, which hides the installed torch. Naming torch under ``build-system.requires``
would download another one, gigabytes of it, and an extension built against that may not load with the installed one. So
this backend puts the site-packages of the running interpreter back at the *end* of the search path.
"""

import importlib.util
import os
import site
import sys
import sysconfig


def _installed_packages() -> list[str]:
    paths = sysconfig.get_paths()
    found = [paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()]
    return [p for p in dict.fromkeys(found) if p not in sys.path and os.path.isdir(p)]


sys.path += _installed_packages()
if importlib.util.find_spec("torch") is None:
    raise SystemExit(
        f"rpe_ops_cuda: {sys.executable} has no torch, and the extension is built against the installed one.\n"
        "Install torch first (pip install torch), then: pip install ./rpe_ops_cuda"
    )


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """What pip must install into the isolated environment because this interpreter lacks it: usually nothing."""
    return [] if importlib.util.find_spec("setuptools") else ["setuptools>=70.1"]


get_requires_for_build_sdist = get_requires_for_build_editable = get_requires_for_build_wheel


def __getattr__(name: str):
    # The other hooks are setuptools' own; it is imported late because pip may install it only after those above.
    if name.startswith(("build_", "prepare_metadata_")):
        import setuptools.build_meta

        return getattr(setuptools.build_meta, name)
    raise AttributeError(name)
