"""COCO-layout sets of a few small images with coloured rectangles on them, quick to write."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = {3: "red", 4: "green", 9: "blue"}  # not from 0 or 1, and with gaps
COLOURS = {3: (255, 30, 30), 4: (30, 255, 30), 9: (30, 30, 255)}


def write_tiny_coco(
    root: Path,
    *,
    train: int = 6,
    val: int = 5,
    size: tuple[int, int] = (40, 56),
    zips: bool = False,
    panoptic: bool = False,
    seed: int = 0,
    first_id: int = 100,
) -> Path:
    """Both splits below ``root``; image ``i`` of a split has ``i % 3`` objects, the last of three a crowd beside it."""
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in (("train2017", train), ("val2017", val)):
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
        segments = {
            "images": content["images"],
            "annotations": [],
            "categories": [{"id": i, "name": name, "isthing": int(i != 9)} for i, name in CATEGORIES.items()],
        }
        (root / split).mkdir(exist_ok=True)
        for index in range(count):
            height, width = size[0] + 4 * (index % 2), size[1]
            pixels = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
            segment_map = np.zeros((height, width, 3), dtype=np.uint8)
            image_id, infos = first_id + index, []
            content["images"].append(
                {"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": height, "width": width}
            )
            for number in range(index % 3):
                label = int(rng.choice(list(CATEGORIES)))
                w, h = (int(v) for v in rng.integers(12, 20, 2))
                x, y = int(rng.integers(0, width // 2 - w)) + number * width // 2, int(rng.integers(0, height - h))
                pixels[y : y + h, x : x + w] = COLOURS[label]
                annotation = {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
                content["annotations"].append(annotation)
                segment_map[y : y + h, x : x + w] = (number + 1, 2, 0)
                infos.append({"id": number + 1 + 512, "category_id": label, "iscrowd": 0, "area": w * h})
            Image.fromarray(pixels).save(root / split / f"{image_id:012d}.jpg", quality=95)
            if panoptic:
                (root / f"panoptic_{split}").mkdir(exist_ok=True)
                Image.fromarray(segment_map).save(root / f"panoptic_{split}" / f"{image_id:012d}.png")
                segments["annotations"].append(
                    {"image_id": image_id, "file_name": f"{image_id:012d}.png", "segments_info": infos}
                )
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        if panoptic:
            (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(segments))
        if zips:
            zip_split(root, split)
    return root


def zip_split(root: Path, split: str) -> None:
    """Replace the folder ``split`` by an archive, half of the members stored and half deflated."""
    with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
        for index, file in enumerate(sorted((root / split).rglob("*"))):
            kind = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[index % 2]
            archive.write(file, file.relative_to(root), compress_type=kind)
    shutil.rmtree(root / split)


def edit_annotations(root: Path, split: str, change) -> None:
    """Let ``change(content)`` modify the instance annotations of a split in place."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
