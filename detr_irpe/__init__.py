# SPDX-License-Identifier: Apache-2.0
"""DETR with image relative position encoding in the encoder (Wu et al., ICCV 2021)."""

from irpe_train.config import answer_early

answer_early(__name__)

from detr_irpe.models import build_model, create_model  # noqa: E402

__all__ = ["build_model", "create_model"]
