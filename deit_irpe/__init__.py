# SPDX-License-Identifier: Apache-2.0
"""Image classification with iRPE: importing this registers the published model names with timm."""

from irpe_train.config import answer_early

answer_early(__name__)

from deit_irpe.models import create_model  # noqa: E402

__all__ = ["create_model"]
