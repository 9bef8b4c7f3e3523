# SPDX-License-Identifier: Apache-2.0
"""DETR's data: COCO-layout folders or archives, their augmentation and metrics."""
