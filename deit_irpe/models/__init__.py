# SPDX-License-Identifier: Apache-2.0
"""DeiT with any encoding: the table of names, timm registration, and weights from other runs."""

from deit_irpe.models.from_flags import build_model
from deit_irpe.models.names import DEMO_SIZES, RPE_MODELS
from deit_irpe.models.registration import create_model

__all__ = ["DEMO_SIZES", "RPE_MODELS", "build_model", "create_model"]
