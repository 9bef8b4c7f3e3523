"""DETR: the network, its losses, and what turns its outputs into detections."""

from .detr import build_model, create_model

__all__ = ["build_model", "create_model"]
