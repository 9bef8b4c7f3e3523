"""What DETR is trained and scored on: COCO-layout folders or archives, their augmentation and their metrics."""
