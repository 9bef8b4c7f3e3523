# SPDX-License-Identifier: Apache-2.0
"""DETR: the network, its losses, and the post-processing of its outputs into detections."""

from detr_irpe.models.detr import create_model
from detr_irpe.models.from_flags import build_model

__all__ = ["build_model", "create_model"]
