import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from detr_irpe.data.annotations import Annotations
from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.image_files import FilesInZip
from detr_irpe.data.packed_strings import PackedStrings
from detr_irpe.data.panoptic import CocoPanoptic
from detr_irpe.data.segmentations import decode_masks
from detr_irpe.data.transforms import eval_transforms, train_transforms
from detr_irpe.nested_tensor import collate
from detr_irpe.predict import Truth
from irpe_train.errors import BadData
from tests.helpers.tiny_coco import edit_annotations, write_tiny_coco, zip_split

PLAIN = eval_transforms(40)


def assert_same_items(ours, theirs):
    assert len(ours) == len(theirs)
    for (image, target), (other_image, other_target) in zip(ours, theirs, strict=True):
        assert torch.equal(image, other_image)
        assert target.keys() == other_target.keys()
        assert all(torch.equal(target[name], other_target[name]) for name in target)


def test_packed_gives_back_what_it_was_given():
    items = [b"", b"abc", b"\0\xff", "größe.jpg".encode(), b""]
    packed = pickle.loads(pickle.dumps(PackedStrings(items)))
    assert [packed[i] for i in range(len(packed))] == items
    assert list(PackedStrings([])) == []
    with pytest.raises(IndexError):
        packed[5]


def test_targets_are_those_of_the_file(tmp_path):
    root = write_tiny_coco(tmp_path)
    edit_annotations(
        root,
        "train2017",
        lambda c: c["annotations"].append(
            {
                "id": 90,
                "image_id": 102,
                "category_id": 3,
                "bbox": [0, 0, 9, 9],
                "area": 81,
                "iscrowd": 1,
                "segmentation": {"size": [40, 56], "counts": [0, 100, 2140]},
            }
        ),
    )
    dataset = CocoDetection(root, "train2017", PLAIN, return_masks=True)
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    assert len(dataset) == 6 and dataset.categories == {3: "red", 4: "green", 9: "blue"}

    image, target = dataset[2]  # id 102, 40 x 56: two objects, and a crowd, which does not count
    wanted = [a for a in content["annotations"] if a["image_id"] == 102 and not a["iscrowd"]]
    assert image.shape == (3, 40, 56) and len(wanted) == 2
    assert target["image_id"].tolist() == [102]
    assert target["orig_size"].tolist() == target["size"].tolist() == [40, 56]
    assert target["labels"].tolist() == [a["category_id"] for a in wanted]
    assert target["area"].tolist() == [a["area"] for a in wanted]
    for box, mask, annotation in zip(target["boxes"], target["masks"], wanted, strict=True):
        x, y, w, h = annotation["bbox"]
        expected = torch.tensor([(x + w / 2) / 56, (y + h / 2) / 40, w / 56, h / 40])
        torch.testing.assert_close(box, expected)
        painted = torch.zeros(40, 56, dtype=torch.bool)
        painted[y : y + h, x : x + w] = True
        assert torch.equal(mask, painted)

    _, empty = dataset[0]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 40, 56)
    assert empty["labels"].shape == (0,) and empty["labels"].dtype == torch.int64


def test_images_come_in_the_order_of_their_ids_and_objects_in_that_of_the_file(tmp_path):
    root = write_tiny_coco(tmp_path)
    before = CocoDetection(root, "val2017", PLAIN)
    edit_annotations(root, "val2017", lambda c: c["images"].reverse())
    assert_same_items(list(before), list(CocoDetection(root, "val2017", PLAIN)))


def test_boxes_are_clipped_and_empty_ones_dropped(tmp_path):
    root = write_tiny_coco(tmp_path, train=1)
    boxes = [[-5, -5, 10, 10], [50, 30, 100, 100], [10, 10, 0, 5], [10, 10, -3, 5], [60, 5, 4, 4]]
    edit_annotations(
        root,
        "train2017",
        lambda c: c["annotations"].extend(
            {"id": i, "image_id": 100, "category_id": 3, "bbox": box, "area": 1} for i, box in enumerate(boxes, 1)
        ),
    )
    _, target = CocoDetection(root, "train2017", PLAIN)[0]
    pixels = target["boxes"] * torch.tensor([56.0, 40, 56, 40])
    torch.testing.assert_close(pixels, torch.tensor([[2.5, 2.5, 5, 5], [53, 35, 6, 10]]))


def test_segmentations_in_all_three_forms():
    polygon = [[2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]]
    masks = decode_masks([polygon, [], {"size": [5, 8], "counts": [0, 5, 35]}], 5, 8)
    assert masks[0].sum() == 12 and masks[0, 1:4, 2:6].all()
    assert masks[1].sum() == 0
    assert masks[2, :, 0].all() and masks[2].sum() == 5
    from pycocotools import mask as rle

    packed = rle.encode(np.asfortranarray(masks[0].numpy()))
    assert torch.equal(decode_masks([packed], 5, 8)[0], masks[0])


def test_a_zip_archive_reads_as_the_folder_does(tmp_path):
    folder = write_tiny_coco(tmp_path / "a")
    archive = write_tiny_coco(tmp_path / "b", zips=True)
    assert not (archive / "train2017").exists()
    ours = CocoDetection(archive, "train2017", PLAIN)
    assert_same_items(list(ours), list(CocoDetection(folder, "train2017", PLAIN)))
    assert ours.name(1).endswith("train2017.zip:000000000101.jpg")


@pytest.mark.parametrize("name", ["\u00e9.jpg", "a/\u00e9.jpg", "\u00e9/\u00e9.jpg"])
@pytest.mark.parametrize("zips", [False, True])
@pytest.mark.parametrize(("listed", "on_disk"), [("\u00e9", "e\u0301"), ("e\u0301", "\u00e9")])  # macOS: the second
def test_accents_may_be_written_in_two_ways(tmp_path, listed, on_disk, zips, name):
    root = write_tiny_coco(tmp_path)
    stored, name = root / "val2017" / name.replace("\u00e9", on_disk), name.replace("\u00e9", listed)
    stored.parent.mkdir(exist_ok=True)
    (root / "val2017/000000000101.jpg").rename(stored)
    edit_annotations(root, "val2017", lambda c: c["images"][1].update(file_name=name))
    if zips:
        zip_split(root, "val2017")
    dataset = CocoDetection(root, "val2017", PLAIN)
    assert dataset[1][0].shape == (3, 40, 50)
    assert Truth(dataset.path, {}).number_of(Path(f"{on_disk}.jpg")) == 1


def test_workers_share_an_archive_without_moving_each_others_position(tmp_path):
    dataset = CocoDetection(write_tiny_coco(tmp_path, train=24, zips=True), "train2017", PLAIN)
    alone = list(dataset)  # opens the archive here first, so that a fork inherits the handle
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", prefetch_factor=8)
    assert_same_items(list(loader), alone)
    assert_same_items(list(dataset), alone)


def test_a_data_set_can_be_sent_to_a_spawned_worker(tmp_path):
    dataset = CocoDetection(write_tiny_coco(tmp_path, zips=True), "train2017", PLAIN)
    wanted = list(dataset)
    assert_same_items(list(pickle.loads(pickle.dumps(dataset))), wanted)


def test_annotations_lie_in_shared_memory(tmp_path):
    annotations = Annotations(write_tiny_coco(tmp_path) / "annotations/instances_train2017.json", with_masks=True)
    tensors = [value for value in vars(annotations).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 7 and all(tensor.is_shared() for tensor in tensors)
    assert annotations._masks._bytes.is_shared() and annotations.names._bytes.is_shared()


def test_batches_are_padded(tmp_path):
    dataset = CocoDetection(write_tiny_coco(tmp_path), "train2017", eval_transforms(40))
    images, targets = collate([dataset[0], dataset[1]])
    assert images.tensors.shape == (2, 3, 40, 56) and len(targets) == 2
    assert images.mask[1, :, -1].all() and not images.mask[0].any()  # 44 x 56 becomes 40 x 50


def test_a_worker_shares_what_is_large_itself_so_that_full_shared_memory_is_an_error(tmp_path, monkeypatch):
    """PyTorch would do it in a thread that prints the error and drops the batch, for which training waits forever."""
    dataset = CocoDetection(write_tiny_coco(tmp_path), "train2017", eval_transforms(300), return_masks=True)
    assert not collate([dataset[1]])[0].tensors.is_shared()
    monkeypatch.setattr("detr_irpe.nested_tensor.get_worker_info", lambda: "a worker")
    images, (target,) = collate([dataset[1]])
    assert images.tensors.is_shared() and images.mask.is_shared() and target["masks"].is_shared()
    assert not target["boxes"].is_shared()


def test_training_augmentation_is_reproducible_and_stays_consistent(tmp_path):
    root = write_tiny_coco(tmp_path, size=(80, 120))
    dataset = CocoDetection(root, "train2017", train_transforms(80), return_masks=True)
    sizes = set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = dataset[2]
        torch.manual_seed(seed)
        assert_same_items([dataset[2]], [(image, target)])
        sizes.add(tuple(image.shape[1:]))
        height, width = image.shape[1:]
        assert target["size"].tolist() == [height, width] and target["orig_size"].tolist() == [80, 120]
        assert 20 <= min(height, width) <= 80 and max(height, width) <= 133
        assert len({len(target[name]) for name in ("boxes", "labels", "masks", "area", "iscrowd")}) == 1
        for (cx, cy, w, h), mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            box = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
            np.testing.assert_allclose(found, box, atol=3)  # masks are resized twice, to the nearest pixel
    assert len(sizes) > 10


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.pop("images"), "no list 'images'"),
        (lambda c: c["images"][0].pop("file_name"), r"images\[0\] lacks 'file_name'"),
        (lambda c: c["annotations"][0].pop("bbox"), r"annotations\[0\] lacks 'bbox'"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "bbox"),
        (lambda c: c["annotations"][0].update(category_id="cat"), "category_id"),
        (lambda c: c.pop("categories"), "no 'categories'"),
        (lambda c: c["images"][0].update(file_name="../secret.jpg"), "instances_train2017.json: unsafe file name"),
        (lambda c: c["images"][0].update(file_name="/etc/passwd"), "instances_train2017.json: unsafe file name"),
        (lambda c: c["images"][0].update(file_name="images\\1.jpg"), "_train2017.json: unsafe .* / between folders"),
        (lambda c: c["images"][0].update(file_name="http://x/1.jpg"), "_train2017.json: unsafe file name 'http://x/1"),
    ],
)
def test_bad_annotations_are_refused(tmp_path, change, words):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", change)
    with pytest.raises(ValueError, match=words) as error:
        CocoDetection(root, "train2017", PLAIN)
    assert "train2017" in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no annotation file .*instances_train2017.json"):
        CocoDetection(tmp_path, "train2017", PLAIN)
    root = write_tiny_coco(tmp_path)
    os.rename(root / "train2017", root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"--coco_path .*: no train2017/ or train2017.zip there"):
        CocoDetection(root, "train2017", PLAIN)
    os.rename(root / "elsewhere", root / "train2017")
    (root / "train2017/000000000103.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing images that .* lists: 1 \(000000000103.jpg\)"):
        CocoDetection(root, "train2017", PLAIN)
    listed = root / "annotations/instances_train2017.json"
    listed.write_text(listed.read_text().replace("000000000103.jpg", "x" * 300))  # longer than a file's name can be
    with pytest.raises(FileNotFoundError, match=r"missing images that .* lists: 1 \('x{59}\)"):
        CocoDetection(root, "train2017", PLAIN)
    listed.write_text("{not json")
    with pytest.raises(ValueError, match="not valid JSON"):
        CocoDetection(root, "train2017", PLAIN)


def test_an_unreadable_image_is_named(tmp_path):
    root = write_tiny_coco(tmp_path)
    (root / "train2017/000000000101.jpg").write_bytes(b"\xff\xd8 not really")
    with pytest.raises(OSError, match="000000000101.jpg: this image cannot be read"):
        CocoDetection(root, "train2017", PLAIN)[1]


@pytest.mark.parametrize("kind", ["coco", "panoptic"])
def test_a_failing_augmentation_is_not_taken_for_an_unreadable_image(tmp_path, kind):
    def broken(image, target):
        raise ValueError("bits")

    root = write_tiny_coco(tmp_path, panoptic=True)
    sets = {"coco": lambda: CocoDetection(root, "val2017", broken)}
    sets["panoptic"] = lambda: CocoPanoptic(root, root, "val2017", broken)
    with pytest.raises(RuntimeError, match=r"\.jpg: the augmentation failed on this image \(bits\)"):
        sets[kind]()[0]


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)


@pytest.mark.parametrize("name", ["../up.jpg", "/abs.jpg", "train2017/../../up.jpg", "c:/x.jpg", "a\\..\\b.jpg"])
def test_hostile_member_names_are_refused(tmp_path, name):
    write_zip(tmp_path / "train2017.zip", [("train2017/a.jpg", b"x"), (name, b"x")])
    with pytest.raises(BadData, match="points outside the archive"):
        FilesInZip(tmp_path / "train2017.zip", ["a.jpg"])


def test_a_member_that_claims_to_be_huge_is_refused(tmp_path):
    path = tmp_path / "train2017.zip"
    write_zip(path, [("train2017/a.jpg", b"small")])
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 24  # uncompressed size in the archive's directory
    content[place : place + 4] = struct.pack("<I", 2**31)
    path.write_bytes(content)
    with pytest.raises(BadData, match="claims 2,147,483,648 bytes"):
        FilesInZip(path, ["a.jpg"])


def test_a_member_that_unfolds_beyond_its_claim_is_refused(tmp_path):
    path = tmp_path / "train2017.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train2017/a.jpg", np.random.default_rng(0).bytes(100_000) + bytes(20_000_000))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 24
    content[place : place + 4] = struct.pack("<I", 1000)
    content[place - 8 : place - 4] = struct.pack("<I", zlib.crc32(content[:1000]))
    path.write_bytes(content)
    with pytest.raises(OSError, match="damaged"):
        FilesInZip(path, ["a.jpg"]).read(0)


def test_damaged_archives_are_named(tmp_path):
    path = tmp_path / "train2017.zip"
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(BadData, match="train2017.zip: damaged, or not a .zip archive"):
        FilesInZip(path, ["a.jpg"])
    write_zip(path, [("train2017/a.jpg", b"0123456789" * 10)])
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    with pytest.raises(OSError, match="train2017.zip:a.jpg: the archive is damaged"):
        FilesInZip(path, ["a.jpg"]).read(0)
    with pytest.raises(FileNotFoundError, match="no such member"):
        FilesInZip(path, ["b.jpg"]).read(0)
