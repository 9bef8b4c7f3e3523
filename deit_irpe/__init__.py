# SPDX-License-Identifier: Apache-2.0
"""Image classification with iRPE: importing this registers the published model names with timm."""

from typing import TYPE_CHECKING

from irpe_train.flags import is_program

if TYPE_CHECKING or not is_program(__name__):  # python -m deit_irpe reads its flags before it imports PyTorch
    from deit_irpe.models import create_model
else:

    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from deit_irpe import models

        return getattr(models, name)


__all__ = ["create_model"]
