# SPDX-License-Identifier: Apache-2.0
"""DETR with image relative position encoding in the encoder (Wu et al., ICCV 2021)."""

from typing import TYPE_CHECKING

from irpe_train.flags import is_program

if TYPE_CHECKING or not is_program(__name__):  # python -m detr_irpe reads its flags before it imports PyTorch
    from detr_irpe.models import build_model, create_model
else:

    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from detr_irpe import models

        return getattr(models, name)


__all__ = ["build_model", "create_model"]
