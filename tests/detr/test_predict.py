import json
import logging
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from pycocotools import mask as coco_mask

from detr_irpe import build_model, export
from detr_irpe.data.coco import CocoDetection
from detr_irpe.drawing import PALETTE, attention_maps, cell_of, draw_objects, font_for, ink_on, side_by_side
from detr_irpe.load_model import Detector
from detr_irpe.predict import Truth, centres, class_indices, get_predict_parser, main, read_in_frame
from irpe_train.errors import BadCheckpoint, BadData, RunError
from irpe_train.launch import launch
from irpe_train.pixels import to_rgb
from tests.helpers.tiny_detr import published_flags, tiny_transformer

NAMES = {1: "seven", 4: "three"}


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(path)
    return path


def write_checkpoint(path, categories: dict | None = NAMES, **flags) -> str:
    """A tiny model as after training, with only the published flags; every query is sure of class 4."""
    torch.manual_seed(0)
    args = published_flags(enc_rpe2d="rpe-2.0-product-ctx-1-qk", num_classes=5, image_size=160, **flags)
    model = build_model(args)[0]
    detr = getattr(model, "detr", model)
    torch.nn.init.constant_(detr.class_embed.bias[4], 9.0)
    del args.num_classes, args.backbone_weights
    content = {"model": model.state_dict(), "epoch": 3, "args": args}
    torch.save(content if categories is None else content | {"categories": categories}, path)
    return str(path)


def predict(*words: object) -> None:
    main(get_predict_parser().parse_args([*map(str, words), "--device", "cpu"]))


def test_boxes_json_and_pictures(tmp_path, photo):
    predict(photo, "--resume", write_checkpoint(tmp_path / "x.pth"), "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert (found["width"], found["height"], len(found["objects"])) == (60, 40, 5)
    for entry in found["objects"]:
        assert entry["category_id"] == 4 and entry["category"] == "three" and entry["score"] > 0.9
        x0, y0, x1, y1 = entry["box"]
        assert x0 < x1 and y0 < y1
        assert [entry["score"], *entry["box"]] == [round(entry["score"], 4), *(round(x, 2) for x in entry["box"])]
    assert Image.open(tmp_path / "out" / "photo.png").size == (720, 480)  # enlarged twelve times
    assert not (tmp_path / "out" / "photo_attention.png").exists()


def test_ids_that_are_no_category_are_left_out_and_nothing_found_says_the_best_score(tmp_path, photo, capsys):
    resume = write_checkpoint(tmp_path / "x.pth", {1: "seven", 2: "two"})  # every query is sure of 4, which is neither
    predict(photo, "--resume", resume, "--out", tmp_path / "out", "--threshold", "0")
    assert "photo.jpg: 0 objects -> " in capsys.readouterr().out
    predict(photo, "--resume", write_checkpoint(tmp_path / "y.pth"), "--out", tmp_path / "y", "--threshold", "1")
    assert "photo.jpg: 0 objects (best score 1.00, --threshold 1) -> " in capsys.readouterr().out


@pytest.mark.parametrize(
    "size, name, times",
    [((1, 1), b"a", 1), ((2, 900), b"thin", 1), ((900, 2), b"flat", 1), ((9, 9), b"no utf-8 \xff", 2)],
)
@pytest.mark.filterwarnings("error:constrained_layout")
def test_odd_sizes_and_names(tmp_path, size, name, times):
    image = tmp_path / (os.fsdecode(name) + ".png")
    Image.new("RGB", size).save(image)
    for _ in range(times):  # its own results may be replaced
        predict(image, "--resume", write_checkpoint(tmp_path / "x.pth"), "--out", tmp_path / "out", "--attention")
    assert len(list((tmp_path / "out").glob("[!.]*"))) == 4
    assert max(Image.open(tmp_path / "out" / f"{image.stem}_attention.png").size) < 20_000


def test_attention_and_encodings(tmp_path, photo):
    resume = write_checkpoint(tmp_path / "x.pth")
    predict(photo, "--resume", resume, "--out", tmp_path / "out", "--attention", "--point", "5,5", "--point", "59,39")
    assert Image.open(tmp_path / "out" / "photo_attention.png").height > 100
    assert Image.open(tmp_path / "out" / "tables.png").height > 100
    predict(photo, "--resume", resume, "--out", tmp_path / "own", "--attention", "--threshold", "1")  # no detection
    assert (tmp_path / "own" / "photo_attention.png").exists()
    with pytest.raises(BadData, match=r"photo.jpg: --point 60,0 is outside the image of 60 x 40 pixels"):
        predict(photo, "--resume", resume, "--out", tmp_path / "out", "--attention", "--point", "60,0")


def test_images_of_one_name_are_distinguished_by_their_folders(tmp_path, photo):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        shutil.copy(photo, tmp_path / folder)
    resume = write_checkpoint(tmp_path / "x.pth")
    predict(tmp_path / "a", tmp_path / "b", "--resume", resume, "--out", tmp_path / "out")
    written = [file for file in (tmp_path / "out").rglob("[!.]*.*")]
    assert {str(file.relative_to(tmp_path / "out")) for file in written} == {
        "a/photo.json", "a/photo.png", "b/photo.json", "b/photo.png"
    }  # fmt: skip


def test_tables_need_no_image(tmp_path, capsys):
    predict("--tables", "--resume", write_checkpoint(tmp_path / "x.pth"), "--out", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("[!.]*")] == ["tables.png"]
    assert f"tables.png is in {tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="name images, or give --tables"):
        predict("--resume", tmp_path / "x.pth", "--out", tmp_path / "out")


def test_masks(tmp_path, photo):
    predict(photo, "--resume", write_checkpoint(tmp_path / "x.pth", masks=True), "--out", tmp_path / "out")
    (first, *_) = json.loads((tmp_path / "out" / "photo.json").read_text())["objects"]
    assert coco_mask.decode(first["segmentation"]).shape == (40, 60)


def test_ground_truth_is_on_the_left(tmp_path, photo):
    annotations = {
        "images": [{"id": 9, "file_name": "photo.jpg"}],
        "annotations": [{"image_id": 9, "category_id": 1, "bbox": [10, 10, 20, 16]}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(annotations))
    resume = write_checkpoint(tmp_path / "x.pth")
    annotated = ["--resume", resume, "--out", tmp_path / "out", "--annotations", tmp_path / "instances.json"]
    predict(photo, *annotated)
    picture = Image.open(tmp_path / "out" / "photo.png")
    assert picture.size == (2 * 720 + 8, 480 + 28)  # two pictures, their titles above them
    assert min(picture.crop((0, 0, 60, 28)).convert("L").tobytes()) < 90  # "truth"
    left, right, bottom = (picture.getpixel((x, 28 + y)) for x, y in ((120, 240), (360, 240), (240, 26 * 12)))
    assert left == right == bottom == ImageColor.getrgb(PALETTE[0])  # the first of the two classes
    photo.rename(tmp_path / "other.jpg")
    with pytest.raises(ValueError, match="--annotations .*instances.json: no image called other.jpg there"):
        predict(tmp_path / "other.jpg", *annotated)


def test_published_checkpoints_speak_of_coco(tmp_path):
    args = published_flags()
    torch.save({"model": build_model(args)[0].state_dict(), "args": args}, tmp_path / "detr.pth")
    names = Detector(str(tmp_path / "detr.pth"), torch.device("cpu")).names
    assert (names[1], names[90]) == ("person", "toothbrush")
    assert Detector(write_checkpoint(tmp_path / "own.pth", categories=None), torch.device("cpu")).names == {}


def test_what_cannot_be_predicted(tmp_path, photo):
    resume = write_checkpoint(tmp_path / "x.pth")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadData, match=f"1 of 1 images could not be predicted: {tmp_path}/text.png: this image cannot"):
        predict(tmp_path / "text.png", "--resume", resume, "--out", tmp_path / "out")
    for name, flag in (("tables.png", "--tables"), ("photo_attention.png", "--attention")):
        with pytest.raises(RunError, match=f"two results would be called {name}"):
            predict(photo, tmp_path / "a" / name, "--resume", resume, "--out", tmp_path / "out", flag)
    no_encoder = write_checkpoint(tmp_path / "no_encoder.pth", enc_layers=0)
    for flag, reason in (("--attention", "encoder layer to inspect"), ("--tables", "relative position encoding")):
        with pytest.raises(ValueError, match=f"{flag}: .*no_encoder.pth has no {reason}"):
            predict(photo, "--resume", no_encoder, "--out", tmp_path / "out", flag)
    torch.save({"model": torch.load(resume, weights_only=False)["model"]}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="bare.pth has no 'args' with the flags of a DETR: .* is for irpe classify"):
        predict(photo, "--resume", tmp_path / "bare.pth", "--out", tmp_path / "out")


def test_from_the_command_line_a_mistake_is_one_message(tmp_path, photo):
    words = [photo, "--resume", tmp_path / "none.pth", "--out", tmp_path / "out", "--device", "cpu"]
    with pytest.raises(SystemExit, match="predict: BadCheckpoint: .*none.pth: no such file"):
        launch(main, get_predict_parser(), list(map(str, words)))


def test_an_image_without_objects_is_drawn_as_it_is():
    image = Image.new("RGB", (600, 500), "navy")
    drawn = draw_objects(image, torch.zeros(0, 4), [], [])
    assert drawn.tobytes() == image.tobytes()
    assert side_by_side({"truth": image, "prediction": image}).size == (1208, 500 + 28)


def test_cells():
    assert cell_of((0, 0), (60, 40), 2, 3) == 0
    assert cell_of((59.9, 39.9), (60, 40), 2, 3) == 5
    assert cell_of((20, 19), (60, 40), 2, 3) == 1
    for point in ((60, 0), (0, 40), (-0.1, 0), (0, -0.1)):
        with pytest.raises(ValueError, match="is outside the image of 60 x 40 pixels"):
            cell_of(point, (60, 40), 2, 3)


@pytest.mark.parametrize("enc_rpe2d", ["", "rpe-2.0-product-ctx-1-qk", "rpe-2.0-cross-bias-0-k"])
def test_the_attention_drawn_is_the_attention_used(enc_rpe2d):
    layer = tiny_transformer(enc_rpe2d).encoder.layers[0].self_attn
    torch.manual_seed(0)
    query_key, value = torch.randn(2, 1, 6, 16, dtype=torch.float64)
    mask = torch.tensor([[[False] * 3, [False, False, True]]])
    inputs = (query_key, value, mask)
    weights = layer.weights(query_key, mask)
    heads = weights @ layer.project(query_key, query_key, value)[2]
    torch.testing.assert_close(layer.merge(heads), layer(*inputs))
    maps = attention_maps(layer, inputs, token=4)
    assert list(maps) == ["mean of heads", "head 0", "head 1"]
    torch.testing.assert_close(maps["head 1"], weights[0, 1, 4].view(2, 3))
    assert maps["mean of heads"][1, 2] == 0


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_boxes_and_masks_have_their_colours_on_any_image(mode):
    box, masks = torch.tensor([[100, 100, 300, 300]]), torch.zeros(1, 500, 600)
    masks[0, 100:300, 100:300] = 1
    image = Image.new("RGB", (600, 500), "gray").convert(mode)
    found = draw_objects(image, box, [1], ["x"], masks)
    assert found.getpixel((100, 200)) == ImageColor.getrgb(PALETTE[1])
    assert found == draw_objects(image.convert("RGB"), box, [1], ["x"], masks)


def test_sixteen_bits_are_drawn_as_the_detector_sees_them():
    image = Image.fromarray(np.full((500, 600), 2**15, np.uint16))  # convert("RGB") makes it white
    assert draw_objects(image, torch.zeros(0, 4), [], []).getpixel((5, 5)) == to_rgb(image).getpixel((5, 5))


def test_a_box_is_drawn_on_its_corners_and_its_label_above_it_or_within():
    size, colour = (900, 600), ImageColor.getrgb(PALETTE[1])
    box = torch.tensor([[300, 200, 500, 400], [-9, 250, 299, 350], [870.4, 3, 2000, 2000]])
    picture = draw_objects(Image.new("RGB", size, "gray"), box, [1, 10, 21], ["Hg", "Hg", "Hg Hg Hg"])
    line, white, gray = [colour] * 2, [(255, 255, 255)], [(128, 128, 128)]  # two pixels between white ones
    assert [picture.getpixel((x, 380)) for x in range(298, 304)] == [*gray, *white, *line, *white, *gray]
    assert [picture.getpixel((x, 380)) for x in range(497, 503)] == [*gray, *white, *line, *white, *gray]
    assert [picture.getpixel((400, y)) for y in range(397, 403)] == [*gray, *white, *line, *white, *gray]
    assert [picture.getpixel((480, y)) for y in range(197, 203)] == [*gray * 2, *white, *line, *white]
    other = [ImageColor.getrgb(PALETTE[0])] * 2  # a bright colour has black beside it
    assert [picture.getpixel((x, 300)) for x in range(4)] == [*other, (0, 0, 0), *gray]  # clipped to the image
    assert min(picture.crop((0, 235, 20, 250)).convert("L").tobytes()) < 30
    assert [picture.getpixel((x, 300)) for x in range(867, 874)] == [*gray * 2, *white, *line, *white, *gray]
    assert [picture.getpixel((880, y)) for y in range(596, 600)] == [*gray, *white, *line]
    assert [picture.getpixel((x, 300)) for x in range(896, 900)] == [*gray, *white, *line]

    def label(x0, y0, x1, y1):
        """The left and upper end of a label in a part of the picture, and the text's distance from each side."""
        part = np.array(picture.crop((x0, y0, x1, y1)))
        field = np.argwhere((part == colour).all(-1))
        top, left = field.min(0)
        text = np.argwhere((part[top:, left : field[:, 1].max() + 1] != colour).any(-1))
        lower, right = [y1 - y0, field[:, 1].max()] - (text.max(0) + [top, left])
        return left + x0, top + y0, [*text.min(0), lower, right]

    # The upper ends of the box and of the image; the other end of the second is the image's.
    for part, end in (((250, 150, 450, 199), {0: 300}), ((700, 3, 900, 19), {1: 3})):
        *ends, margins = label(*part)
        assert all(ends[axis] == wanted for axis, wanted in end.items()) and {*margins} <= {2, 3}, margins
    assert [ink_on(colour) for colour in ("red", "lime", "blue", "#808080", "#7e7e7e")] == [
        "white", "black", "white", "black", "white"
    ]  # fmt: skip


def test_a_mask_is_enlarged_with_its_image_and_blended_with_it():
    masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    masks[0, 5:10, 5:15] = True
    picture = draw_objects(Image.new("RGB", (30, 20)), torch.tensor([[20, 15, 22, 17]]), [0], [""], masks)
    assert picture.size == (720, 480)  # 24 times
    inside, half = picture.crop((120, 120, 360, 240)), tuple(part // 2 for part in ImageColor.getrgb(PALETTE[0]))
    assert inside.getcolors() == [(240 * 120, half)]
    assert picture.crop((0, 0, 120, 480)).getcolors() == [(120 * 480, (0, 0, 0))]
    assert picture.crop((0, 0, 720, 120)).getcolors() == [(720 * 120, (0, 0, 0))]


def test_attention_is_drawn_at_the_centres_of_the_best_detections():
    image = Image.new("RGB", (60, 40))
    boxes = torch.tensor([[0, 0, 20, 10], [0, 0, 20, 10], [50, 30, 90, 70], [1, 1, 3, 3]]).float()
    assert centres(boxes, image) == [(10, 5), (59, 39)]  # of three, two are the same
    assert centres(boxes[:1] - 30, image) == [(0, 0)] and centres(boxes[:0], image) == [(30, 20)]


def test_lines_and_text_grow_with_the_image_up_to_a_limit():
    def drawn(width, height):
        image = Image.new("RGB", (width, height), "white")
        return draw_objects(image, torch.tensor([[0.2, 0.4, 0.8, 0.9]]) * torch.tensor([width, height] * 2), [0], [""])

    for size, line in (((640, 480), 2), ((1920, 1080), 4)):
        picture = drawn(*size)
        column = [picture.getpixel((size[0] // 2, y)) for y in range(size[1])]
        assert column.count(ImageColor.getrgb(PALETTE[0])) == 2 * line  # the upper and the lower edge
    assert [font_for(Image.new("RGB", size)).size for size in ((640, 480), (1920, 1080))] == [12, 27]
    assert drawn(600, 4).size == (1800, 12) and drawn(3000, 2).size == (3000, 2)


def test_ten_classes_have_ten_colours_that_differ_for_everyone():
    """Simulated as Viénot et al. (1999) do: a person without red or green cones sees two different colours."""
    assert len(set(PALETTE)) == 10
    to_lms = torch.tensor([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    without_red = torch.tensor([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    without_green = torch.tensor([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    colours = torch.tensor([ImageColor.getrgb(colour) for colour in PALETTE]) / 255.0
    for seen in (torch.eye(3), without_red, without_green):
        rgb = colours**2.2 @ to_lms.T @ seen.T @ torch.linalg.inv(to_lms).T
        apart = torch.cdist(rgb.clamp(0, 1) ** (1 / 2.2), rgb.clamp(0, 1) ** (1 / 2.2)) + 9 * torch.eye(10)
        assert apart.min() > 0.08


def test_colours_follow_the_place_of_a_class_and_not_its_id(tmp_path, photo):
    names = {category: str(category) for category in (2, 6, 9, 3, 7, 4, 8, 15, 27, 90)}
    assert sorted(class_indices(list(names), names)) == list(range(10))
    assert class_indices([2, 3, 90, 5], names) == [0, 1, 9, 5]


def turned_photo(path, orientation=6):
    """White where the annotated box is, stored 56 x 40."""
    exif = Image.Exif()
    exif[0x112] = orientation
    image = Image.new("RGB", (56, 40))
    image.paste((255, 255, 255), (30, 5, 50, 15))
    image.save(path, exif=exif, quality=95)
    return path


def test_a_photo_is_turned_as_people_see_it_and_the_json_says_so(tmp_path):
    path, resume = turned_photo(tmp_path / "p.jpg"), write_checkpoint(tmp_path / "x.pth")
    predict(path, "--resume", resume, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "p.json").read_text())
    assert (found["width"], found["height"], found["frame"]) == (40, 56, "displayed")


@pytest.mark.parametrize(
    "height, width, box, frame",
    [
        (40, 56, [30, 5, 20, 10], "stored"),
        (56, 40, [25, 30, 10, 20], "displayed"),
        (None, None, [30, 5, 20, 10], "stored"),
        (80, 112, [30, 5, 20, 10], "stored"),  # for a photo of another size
    ],
)
def test_with_annotations_the_frame_is_theirs(tmp_path, height, width, box, frame, monkeypatch):
    said = []
    monkeypatch.setattr("detr_irpe.predict.logger.warning", said.append)
    path, resume = turned_photo(tmp_path / "p.jpg"), write_checkpoint(tmp_path / "x.pth")
    image = {"id": 1, "file_name": "p.jpg", "height": height, "width": width}
    truth = {"images": [image], "annotations": [{"id": 1, "image_id": 1, "category_id": 4, "bbox": box}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    flags = ("--resume", resume, "--out", tmp_path / "out", "--annotations", tmp_path / "truth.json")
    predict(path, *flags, "--threshold", "1")
    assert json.loads((tmp_path / "out" / "p.json").read_text())["frame"] == frame
    assert ["40 x 56 pixels, annotated 80 x 112" in line for line in said] == [True] * (height == 80)
    (tmp_path / "val2017").mkdir()
    path.rename(tmp_path / "val2017/p.jpg")
    (tmp_path / "annotations").mkdir()
    truth["categories"] = [{"id": 4, "name": "three"}]
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(truth))
    trained_on, target = CocoDetection(tmp_path, "val2017", lambda image, target: (image, target))[0]
    shown, _ = read_in_frame(tmp_path / "val2017/p.jpg", (height or 0, width or 0))
    assert shown.tobytes() == trained_on.tobytes()  # training and prediction see the same pixels
    x0, y0, x1, y1 = target["boxes"][0].int().tolist()
    inside = trained_on.convert("L").crop((x0, y0, x1, y1))
    assert sum(value > 128 for value in inside.tobytes()) > 0.9 * 200


def test_nothing_that_was_there_is_replaced(tmp_path, photo):
    resume, before = write_checkpoint(tmp_path / "x.pth"), photo.read_bytes()
    (tmp_path / "photo.json").write_text("hours of work")
    with pytest.raises(RunError, match="photo.json: already there, and not a result of predict; nothing was written"):
        predict(photo, "--resume", resume, "--out", tmp_path)
    assert not (tmp_path / "photo.png").exists() and (tmp_path / "photo.json").read_text() == "hours of work"
    (tmp_path / "photo.json").unlink()
    predict(photo, "--resume", resume, "--out", tmp_path)
    for name in ("tables.png", "photo_attention.png"):
        (tmp_path / name).write_text("not wanted from this prediction")
    predict(photo, "--resume", resume, "--out", tmp_path)  # its own results are replaced
    assert photo.read_bytes() == before


def test_one_bad_image_does_not_cost_the_others(tmp_path, photo):
    (tmp_path / "bad.png").touch()
    words = [photo, tmp_path / "bad.png", photo.rename(tmp_path / "z.jpg")]
    arguments = ["--resume", write_checkpoint(tmp_path / "x.pth"), "--out", tmp_path / "out", "--device", "cpu"]
    with pytest.raises(SystemExit, match="BadData: 1 of 2 images could not be predicted"):
        launch(main, get_predict_parser(), list(map(str, [*words[1:], *arguments])))
    assert (tmp_path / "out" / "z.json").is_file()


def test_names_are_printed_without_their_line_breaks_and_control_characters(tmp_path, photo, capsys):
    photo.rename(tmp_path / "a\n\x1b[31m.jpg")
    (tmp_path / "b\n\x1b[31m.jpg").touch()
    with pytest.raises(BadData):
        predict(tmp_path, "--resume", write_checkpoint(tmp_path / "x.pth"), "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert r"/a\n\x1b[31m.jpg: 5 objects -> " in printed and r"/out/a\n\x1b[31m.png, .json" in printed
    assert r"/b\n\x1b[31m.jpg: this image cannot be read" in printed and "\x1b" not in printed


def test_a_point_outside_of_one_image_does_not_cost_the_others(tmp_path, photo):
    Image.open(photo).resize((20, 20)).save(tmp_path / "a_small.png")
    flags = ["--resume", write_checkpoint(tmp_path / "x.pth"), "--out", tmp_path / "out", "--point", "50,30"]
    with pytest.raises(ValueError, match="--point is the query point of --attention: add --attention"):
        predict(tmp_path, *flags)
    with pytest.raises(BadData, match="1 of 2 .*a_small.png: --point 50,30 is outside the image of 20 x 20"):
        predict(tmp_path, *flags, "--attention")
    written = {path.name for path in (tmp_path / "out").iterdir()} - {".written_by_predict"}
    assert written == {"tables.png", "photo.png", "photo.json", "photo_attention.png"}


def test_a_folder_stands_for_its_images(tmp_path, photo):
    (tmp_path / "notes.txt").write_text("no image")
    resume = write_checkpoint(tmp_path / "x.pth")
    for named in (tmp_path, tmp_path, tmp_path / "*.jpg"):  # earlier results are not predicted
        predict(named, "--resume", resume, "--out", tmp_path / "out")
        assert sorted(f.name for f in (tmp_path / "out").glob("[!.]*")) == ["photo.json", "photo.png"]
        (tmp_path / "out/photo.json").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no image in this folder"):
        predict(photo, tmp_path / "empty", "--resume", resume, "--out", tmp_path / "out")


def test_names_with_dollars(tmp_path, photo):
    named = photo.rename(tmp_path / "costs $5_and_$6.jpg")
    resume = write_checkpoint(tmp_path / "x.pth")
    predict(named, "--resume", resume, "--out", tmp_path / "out", "--attention")
    assert (tmp_path / "out" / "costs $5_and_$6_attention.png").is_file()


@pytest.mark.parametrize("prefix", ["", "./", "././/"])
def test_images_of_one_name_have_their_own_annotations(tmp_path, prefix):
    names = ["a/x.png", "b/x.png", "c/y.png", "b/z.png", "z.png"]
    truth = {
        "images": [{"id": i, "file_name": prefix + name} for i, name in enumerate(names)],
        "categories": [{"id": 1, "name": "seven"}],
        "annotations": [],
    }
    (tmp_path / "truth.json").write_text("\ufeff" + json.dumps(truth))  # a byte-order mark
    found = Truth(tmp_path / "truth.json", {})
    assert [found.number_of(tmp_path / name) for name in names] == [0, 1, 2, 3, 4]
    assert found.number_of(tmp_path / "elsewhere/y.png") == 2
    with pytest.raises(ValueError, match="2 images called x.png there"):
        found.number_of(tmp_path / "c/x.png")
    (tmp_path / "farm/b").mkdir(parents=True)  # symlinks to files of another name, or of the name of another image
    for target in ("blobs/0123", "a/x.png"):
        (tmp_path / "farm/b/x.png").unlink(missing_ok=True)
        (tmp_path / "farm/b/x.png").symlink_to(tmp_path / target)
        assert found.number_of(tmp_path / "farm/b/x.png") == 1


def test_truth_with_other_class_names_is_reported(tmp_path, caplog):
    logging.getLogger("irpe").propagate = True
    truth = {"images": [], "annotations": [], "categories": [{"id": 4, "name": "four"}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    Truth(tmp_path / "truth.json", NAMES)
    assert "4 is 'three' in the checkpoint and 'four' in truth.json" in caplog.text


@pytest.mark.slow
def test_an_exported_file_predicts_as_its_checkpoint(tmp_path, photo):
    resume = write_checkpoint(tmp_path / "x.pth")
    export.main(export.get_export_parser().parse_args(["--resume", resume, "--out", str(tmp_path / "x.onnx")]))
    (tmp_path / "X.ONNX").symlink_to(tmp_path / "x.onnx")
    for source, out in ((resume, "a"), (tmp_path / "X.ONNX", "b")):
        predict(photo, "--resume", source, "--out", tmp_path / out)
    ours, exported = (json.loads((tmp_path / out / "photo.json").read_text()) for out in "ab")
    assert len(ours["objects"]) == 5 and ours.keys() == exported.keys()
    for one, other in zip(ours["objects"], exported["objects"], strict=True):
        assert one["category"] == other["category"] and one["score"] == pytest.approx(other["score"], abs=2e-4)
        assert one["box"] == pytest.approx(other["box"], abs=0.02)
    with pytest.raises(ValueError, match="give the checkpoint, not the exported file"):
        predict(photo, "--resume", tmp_path / "x.onnx", "--out", tmp_path / "c", "--attention")
    onnx = pytest.importorskip("onnx")
    changed = onnx.load(tmp_path / "x.onnx")
    changed.graph.output[0].name = "other"  # onnxruntime's message has two lines
    onnx.save(changed, tmp_path / "y.onnx")
    with pytest.raises(BadCheckpoint, match="y.onnx: not a detector that detr_irpe.export wrote") as error:
        predict(photo, "--resume", tmp_path / "y.onnx", "--out", tmp_path / "c")
    assert "\n" not in str(error.value)


def test_damaged_metadata_does_not_stop_a_prediction(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (6, 4)).save(path, exif=b"Exif\0\0garbage!!!")
    for annotated in (None, (4, 6), (6, 4)):
        image, frame = read_in_frame(path, annotated)
        assert (image.size, frame) == ((6, 4), "displayed")


def test_python_callers_give_an_image_of_any_mode(tmp_path, photo):
    detector = Detector(write_checkpoint(tmp_path / "x.pth"), torch.device("cpu"))
    grey = Image.open(photo).convert("L")
    wanted = detector(grey.convert("RGB"))
    for mode in ("L", "LA", "RGBA", "CMYK"):
        found = detector(grey.convert(mode))
        assert all(torch.equal(value, wanted[kind]) for kind, value in found.items())
