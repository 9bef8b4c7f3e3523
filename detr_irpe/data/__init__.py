# SPDX-License-Identifier: Apache-2.0
"""What DETR is trained and scored on: COCO-layout folders or archives, their augmentation and their metrics."""
