# SPDX-License-Identifier: Apache-2.0
"""Image classification with iRPE: importing this registers the published model names with timm."""

from deit_irpe.models import create_model

__all__ = ["create_model"]
