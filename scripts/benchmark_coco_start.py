# SPDX-License-Identifier: Apache-2.0
"""How long a detection data set takes to its first batch, and how much memory it then holds, beside torchvision's.

    python scripts/benchmark_coco_start.py [--annotations 100000] [--workers 4] [--rounds 5]

Writes a set of small images with polygons into a temporary folder. Each figure is from a fresh process, from the
annotation file to the first batch of the loader: seconds, CPU time (steadier on a busy machine), and the
memory of the process and its workers (proportional set size: shared memory counts once).
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.transforms import prepare_image

OBJECTS = 20  # of an image
POINTS = 25  # of a polygon; COCO's have about as many
WHO = ("torchvision", "ours", "torchvision, a second time", "ours with masks")


def write_set(root: Path, annotations: int) -> None:
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    (root / "train2017").mkdir()
    images, objects = [], []
    for image_id in range(1, annotations // OBJECTS + 1):
        name = f"{image_id:012d}.jpg"
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(root / "train2017" / name)
        images.append({"id": image_id, "file_name": name, "height": 64, "width": 80})
        for _ in range(OBJECTS):
            polygon = np.round(rng.random(2 * POINTS) * 60, 2).tolist()
            place = {"image_id": image_id, "category_id": int(rng.integers(1, 90)), "bbox": [3.25, 4.5, 40.12, 30.0]}
            extra = {"id": len(objects) + 1, "area": 512.25, "iscrowd": 0, "segmentation": [polygon]}
            objects.append(place | extra)
    categories = [{"id": i, "name": str(i)} for i in range(1, 91)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))


def memory(pids: list[int]) -> float:
    """MiB of these processes, with shared memory counted once."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(text.split("\nPss:")[1].split()[0]) for text in texts) / 1024


def measure(root: Path, who: str, workers: int, result) -> None:
    warnings.simplefilter("ignore")  # PyTorch's advice on the number of workers

    def plain(image, target):
        return prepare_image(image, 64), target

    before, began, busy = memory([os.getpid()]), time.perf_counter(), time.process_time()
    if who.startswith("torchvision"):
        file = root / "annotations/instances_train2017.json"
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            data = torchvision.datasets.CocoDetection(root / "train2017", file, transforms=plain)
    else:
        data = CocoDetection(root, "train2017", plain, return_masks="masks" in who)
    how = dict(batch_size=2, num_workers=workers, multiprocessing_context="fork")
    loader = iter(DataLoader(data, collate_fn=lambda batch: batch[0], **how))
    next(loader)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    held = memory(pids) - before
    del loader  # ends the workers, so that their time is counted
    of_workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    result.put((seconds, busy + of_workers.ru_utime + of_workers.ru_stime, held))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--annotations", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {os.cpu_count()} CPUs")
    context = multiprocessing.get_context("spawn")
    figures: dict[str, list] = {who: [] for who in WHO}
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), args.annotations)
        for _ in range(args.rounds):
            for who in WHO:  # in turns
                result = context.Queue()
                process = context.Process(target=measure, args=(Path(folder), who, args.workers, result))
                process.start()
                figures[who].append(result.get())
                process.join()
    for who, runs in figures.items():
        seconds, busy, mib = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{who:<27} {seconds:6.2f} s  {busy:6.2f} s of processor time  {mib:6.0f} MiB")


if __name__ == "__main__":
    main()
