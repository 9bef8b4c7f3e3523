"""Memory does not grow: annotations and file names are shared with the workers, and nothing accumulates."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from torch.utils.data import DistributedSampler

from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.transforms import train_transforms
from detr_irpe.nested_tensor import collate
from irpe_train.loader import TrainLoader
from tests.helpers.tiny_coco import write_tiny_coco

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")


def memory_of_all() -> float:
    """MiB of this process and its workers together; pages they share count once (the kernel's Pss).

    Without files: a library's pages are shared with whatever else runs on the machine, and weigh more when that ends.
    """
    total = 0
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total / 1024


def crowd_of_images(root: Path, images: int, objects: int) -> None:
    """``images`` names for one file, with ``objects`` annotations each: much to remember, little to store."""
    write_tiny_coco(root, train=1, val=1)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    first = content["images"][0]
    source = root / "train2017" / first["file_name"]
    content["images"] = [{**first, "id": i, "file_name": f"link_{i}.jpg"} for i in range(images)]
    for image in content["images"]:
        os.link(source, source.with_name(image["file_name"]))
    content["annotations"] = [
        {
            "id": 1 + i * objects + k,
            "image_id": i,
            "category_id": 3,
            "bbox": [k % 20, k % 10, 10, 12],
            "area": 120,
            "iscrowd": 0,
            "segmentation": [[k % 20, k % 10, 30, 10, 30, 22, k % 20, 22]],
        }
        for i in range(images)
        for k in range(objects)
    ]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("workers", "epochs", "images"),
    [(2, 3, 100), pytest.param(4, 10, 300, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_memory_does_not_grow(tmp_path, workers, epochs, images):
    crowd_of_images(tmp_path, images, objects=40)
    dataset = CocoDetection(tmp_path, "train2017", train_transforms(48))
    loader = TrainLoader(
        dataset, DistributedSampler(dataset, 1, 0), batch_size=4, seed=0, collate_fn=collate, num_workers=workers
    )
    taken = []
    for epoch in range(epochs):
        for _ in loader.batches(epoch):
            pass
        taken.append(memory_of_all())
    assert taken[-1] < 1.05 * taken[0], f"MiB after each epoch: {taken}"
    print(f"MiB after each epoch: {', '.join(f'{m:.0f}' for m in taken)}")
