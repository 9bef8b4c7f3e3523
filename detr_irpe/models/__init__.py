# SPDX-License-Identifier: Apache-2.0
"""DETR: the network, its losses, and what turns its outputs into detections."""

from detr_irpe.models.detr import build_model, create_model

__all__ = ["build_model", "create_model"]
