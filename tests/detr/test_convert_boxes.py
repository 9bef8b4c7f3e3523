"""The converters of docs/convert_boxes.md: their files have the boxes of the other format, and pass the check."""

from pathlib import Path

import pytest
from PIL import Image

from detr_irpe.data.coco import CocoDetection
from tests.helpers.snippets import REPOSITORY, run_python_blocks

VOC = """<annotation><filename>a.jpg</filename><size><width>80</width><height>60</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>50</ymax></bndbox></object>
<object><name>cat</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>
</annotation>"""


@pytest.fixture(scope="module")
def page():
    return run_python_blocks(REPOSITORY / "docs" / "convert_boxes.md")


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "train2017").mkdir()
    for name in "ab":
        Image.new("RGB", (80, 60)).save(tmp_path / "train2017" / f"{name}.jpg")
    return tmp_path / "train2017"


def read(coco, page, root):
    page["write_split"](coco, root, "train2017")
    return CocoDetection(root, "train2017", lambda image, target: (image, target))


def test_yolo(page, images, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("1 0.25 0.5 0.25 0.5\n", "utf-8-sig")  # as Windows programs write it
    data = read(page["yolo_to_coco"](images, tmp_path / "labels", ["cat", "dog"]), page, tmp_path)
    assert data.categories == {1: "cat", 2: "dog"} and len(data) == 2 and len(data[1][1]["boxes"]) == 0
    assert data[0][1]["boxes"].tolist() == [[10, 15, 30, 45]] and data[0][1]["labels"].tolist() == [2]
    (tmp_path / "labels" / "b.txt").write_text("1 0.1 0.1 0.2 0.1 0.2 0.2\n")
    with pytest.raises(ValueError, match="b.txt: .* is not a box"):
        page["yolo_to_coco"](images, tmp_path / "labels", ["cat", "dog"])


def test_yolo_folders_hold_more_than_images_and_boxes(page, images, tmp_path):
    for name in (".DS_Store", "._a.jpg", "Thumbs.db", "a.txt"):
        (images / name).write_bytes(b"x")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.25 0.5 0.25 0.5\r\n\r\n \n")
    coco = page["yolo_to_coco"](images, tmp_path / "labels", ["cat"])
    assert [image["file_name"] for image in coco["images"]] == ["a.jpg", "b.jpg"] and len(coco["annotations"]) == 1
    (tmp_path / "labels" / "c.txt").write_text("0 0.25 0.5 0.25 0.5")  # of a format that Pillow cannot read
    with pytest.raises(ValueError, match="labels: no image for c$"):
        page["yolo_to_coco"](images, tmp_path / "labels", ["cat"])


def test_yolo_boxes_of_a_turned_photo_are_in_the_frame_that_people_see(page, images, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (80, 60)).save(images / "a.jpg", exif=exif)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    image, target = read(page["yolo_to_coco"](images, tmp_path / "labels", ["cat"]), page, tmp_path)[0]
    assert image.size == (60, 80) and target["boxes"].tolist() == [[15, 0, 45, 40]]


def test_pascal_voc(page, images, tmp_path):
    (tmp_path / "a.xml").write_text(VOC)
    data = read(page["voc_to_coco"]([tmp_path / "a.xml"], ["dog", "cat"]), page, tmp_path)
    assert data.categories == {1: "cat", 2: "dog"}
    assert data[0][1]["boxes"].tolist() == [[10, 20, 30, 50]] and data[0][1]["labels"].tolist() == [2]
