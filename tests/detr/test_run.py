"""Runs from the command line: their files and output, evaluation, resuming, several processes, mistakes."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from pycocotools.cocoeval import Params

from detr_irpe import build_model, engine, train
from detr_irpe.args import get_args_parser
from detr_irpe.data.from_flags import classes_of_data
from detr_irpe.models.from_flags import start_from
from detr_irpe.optimizer import build_optimizer
from detr_irpe.train import main
from irpe_train import zoo
from irpe_train.checkpoint import Checkpoint, read_checkpoint
from irpe_train.distributed import rank
from irpe_train.errors import BadCheckpoint, Preempted, RunError
from tests.helpers.detr_runs import TINY, detr, detr_ok, log_of
from tests.helpers.sabotage import be_stopped, change_a_loss
from tests.helpers.snippets import REPOSITORY, run_python_blocks
from tests.helpers.tiny_coco import edit_annotations, write_tiny_coco

UNREAD = ("--backbone_weights", "nowhere.pth")  # where a checkpoint is evaluated or resumed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_coco(tmp_path_factory.mktemp("data"), train=8, val=5, panoptic=True)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of two epochs: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, detr_ok(data, folder, "--lr_drop", 1, "--dec_layers", 6)


def keys_of_log(layers, *, masks=False):
    """The keys of a line after training in one process, in their order; six decoder layers give the published ones."""
    weighted = ["loss_ce", "loss_bbox", "loss_giou"] + ["loss_mask", "loss_dice"] * masks
    weighted += [f"{name}_{i}" for i in range(layers - 1) for name in ("loss_ce", "loss_bbox", "loss_giou")]
    unscaled = ["loss_ce", "class_error", "loss_bbox", "loss_giou", "cardinality_error"]
    unscaled += ["loss_mask", "loss_dice"] * masks
    unscaled += [
        f"{name}_{i}" for i in range(layers - 1) for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
    ]
    both = ["class_error", "loss", *weighted, *(f"{name}_unscaled" for name in unscaled)]
    return ["train_lr", *(f"train_{k}" for k in both), *(f"test_{k}" for k in both), "test_coco_eval_bbox"]


def test_the_log_has_the_published_keys_in_their_order(trained):
    folder, _ = trained
    lines = log_of(folder)
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert list(line) == [*keys_of_log(6), "epoch", "n_parameters"]
        assert len(line["test_coco_eval_bbox"]) == 12
        numbers = [v for k, v in line.items() if k not in ("test_coco_eval_bbox", "epoch", "n_parameters")]
        assert all(isinstance(v, float) for v in numbers)
        weighted = sum(v for k, v in line.items() if k.startswith("train_loss_") and "unscaled" not in k)
        assert line["train_loss"] == pytest.approx(weighted, rel=1e-5)
        assert line["train_loss_bbox"] == pytest.approx(5 * line["train_loss_bbox_unscaled"], rel=1e-5)
    assert [line["train_lr"] for line in lines] == pytest.approx([1e-3, 1e-4])  # lr_drop after one epoch


def test_a_run_writes_the_published_files(trained):
    folder, text = trained
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    published = {"checkpoint.pth", "checkpoint0000.pth", "checkpoint0001.pth", "log.txt", "eval/000.pth"}
    ours = {
        ".lock",
        "best.pth",
        "checkpoint_previous.pth",
        "config.yaml",
        "detail_run.log",
        "model.json",
        "starts.jsonl",
    }
    assert names == published | {"eval/latest.pth"} | ours
    assert read_checkpoint(folder / "checkpoint0000.pth")["epoch"] == 0
    latest = torch.load(folder / "eval/latest.pth", weights_only=True)
    assert latest["precision"].shape == (10, 101, 3, 4, 3) and len(latest["params"]["recThrs"]) == 101
    for words in (
        "8 training, 5 validation images, 3 categories",
        "2 images per update: 2 x 1 process(es)",
        "that can run here)\n  effective batch",  # the backend of attention
        "4 steps, 8 samples",
        "hidden_dim=16 (default: 256)",
        "Average Precision  (AP) @[ IoU=0.50:0.95",
        "Training time 0:0",
        "the epoch with the best AP: ",
        "COCO's curves: ",
    ):
        assert words in text
    assert f"number of params: {log_of(folder)[0]['n_parameters']}\nnumber of buckets: 81\n" in text
    assert "\nEpoch: [1]  [0/4]  eta: 0:00:" in text and text.count("\nAveraged stats: ") == 4
    assert max(map(len, re.findall("^Epoch: .*", text, flags=re.MULTILINE))) < 140


def test_a_mistake_in_the_spec_is_told_before_a_download(monkeypatch):
    monkeypatch.setattr("detr_irpe.models.detr.build_resnet", pytest.fail)
    args = get_args_parser().parse_args(["--enc_rpe2d", "rpe-2.0-prodct-ctx-1-k"])
    with pytest.raises(ValueError, match="unknown method 'prodct'"):
        build_model(args)


def test_a_checkpoint_is_as_published(trained):
    folder, _ = trained
    checkpoint = read_checkpoint(folder / "checkpoint.pth")
    assert list(checkpoint)[:5] == ["model", "optimizer", "lr_scheduler", "epoch", "args"]
    assert checkpoint["epoch"] == 1 and checkpoint["args"].enc_rpe2d == "rpe-2.0-product-ctx-1-k"
    assert checkpoint["categories"] == {3: "red", 4: "green", 9: "blue"}
    assert len(checkpoint["model"]["class_embed.bias"]) == 9 + 2  # ids up to 9, and "no object"
    rest, backbone = checkpoint["optimizer"]["param_groups"]
    assert rest["weight_decay"] == backbone["weight_decay"] == 1e-4
    assert backbone["initial_lr"] == 1e-5 and rest["initial_lr"] == 1e-3
    assert checkpoint["lr_scheduler"]["step_size"] == 1 and checkpoint["lr_scheduler"]["gamma"] == 0.1


def test_the_published_optimizer_has_199_and_42_tensors():
    args = get_args_parser().parse_args(["--enc_rpe2d", "rpe-2.0-product-ctx-1-k", "--backbone_weights", "none"])
    groups = build_optimizer(args, build_model(args)[0], torch.device("cpu")).param_groups
    assert [len(group["params"]) for group in groups] == [199, 42]


def test_evaluation_repeats_the_figures_and_writes_no_log(trained, data, tmp_path, capsys):
    folder, _ = trained
    flags = ["--dec_layers", 6, "--eval", "--resume", folder / "checkpoint.pth", *UNREAD]
    text = detr_ok(data, tmp_path / "eval", *flags)
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["eval.pth"]
    latest, again = read_checkpoint(folder / "eval/latest.pth"), read_checkpoint(tmp_path / "eval/eval.pth")
    assert torch.equal(latest["precision"], again["precision"]) and torch.equal(latest["scores"], again["scores"])
    assert "IoU metric: bbox" in text
    run_python_blocks(REPOSITORY / "docs/detect.md")["print_categories"](tmp_path / "eval/eval.pth")
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(category) for category, _ in printed] == [3, 4, 9]
    figures = torch.tensor([float(figure) for _, figure in printed])
    assert figures.nanmean().item() == pytest.approx(log_of(folder)[-1]["test_coco_eval_bbox"][0], abs=1e-6)


@pytest.mark.parametrize("name, flags", [("eval.pth", ["--eval", "--resume"]), ("eval/latest.pth", ["--finetune"])])
def test_a_checkpoint_with_the_name_of_a_result_is_kept(trained, data, tmp_path, name, flags):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(trained[0] / "checkpoint.pth", tmp_path / name)
    args = get_args_parser().parse_args(
        [*flags, str(tmp_path / name), "--coco_path", str(data), "--output_dir", str(tmp_path)]
    )
    with pytest.raises(RunError, match=f"{name} is not a result of an evaluation: move it away"):
        main(args)
    assert "model" in read_checkpoint(tmp_path / name)
    torch.save({"params": Params(), "precision": torch.zeros(3)}, tmp_path / name)
    train.refuse_to_replace(tmp_path / name)  # as the published code writes it


def test_evaluation_needs_the_validation_split_only(trained, tmp_path):
    root = write_tiny_coco(tmp_path / "data", zips=True)
    (root / "train2017.zip").unlink()
    (root / "annotations/instances_train2017.json").unlink()
    detr_ok(root, tmp_path / "eval", "--dec_layers", 6, "--eval", "--resume", trained[0] / "checkpoint.pth")
    scored = read_checkpoint(tmp_path / "eval/eval.pth")
    assert scored["params"]["imgIds"] == list(range(100, 105)) and scored["scores"].max() > 0


def test_evaluation_on_other_categories_warns(trained, data, tmp_path):
    root = write_tiny_coco(tmp_path / "data")
    edit_annotations(root, "val2017", lambda c: c["categories"][0].update(name="pink"))
    text = detr_ok(root, tmp_path / "eval", "--dec_layers", 6, "--eval", "--resume", trained[0] / "checkpoint.pth")
    assert "warning: checkpoint" in text and "'pink'" in text
    edit_annotations(
        root, "val2017", lambda c: [e.update(name=n) for e, n in zip(c["categories"], ("green", "red"), strict=False)]
    )
    (ended,) = detr(root, tmp_path / "no", "--dec_layers", 6, "--eval", "--resume", trained[0] / "checkpoint.pth")
    assert ended.code == 1 and "'green' is 3 here and 4 there" in ended.text


def test_evaluation_has_the_class_head_of_the_checkpoint(trained, data, tmp_path):
    root = write_tiny_coco(tmp_path / "data")

    def drop_blue(content):
        content["categories"].pop()
        content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] != 9]

    edit_annotations(root, "val2017", drop_blue)
    detr_ok(root, tmp_path / "eval", "--dec_layers", 6, "--eval", "--resume", trained[0] / "checkpoint.pth")
    detr_ok(root, tmp_path / "start", "--dec_layers", 6, "--eval", "--finetune", trained[0] / "checkpoint.pth")
    flags = ("--dec_layers", 6, "--eval", "--finetune", trained[0] / "checkpoint.pth", "--num_classes", 12)
    (ended,) = detr(root, tmp_path / "fresh", *flags)
    assert ended.code == 1 and "class_embed.weight starts fresh" in ended.text


def test_a_run_does_not_resume_with_other_classes(trained, tmp_path):
    root = write_tiny_coco(tmp_path / "data", train=8)
    for split in ("train2017", "val2017"):
        edit_annotations(root, split, lambda c: c["categories"][0].update(name="pink"))
    flags = ("--dec_layers", 6, "--epochs", 3, "--resume", trained[0] / "checkpoint.pth")
    (ended,) = detr(root, tmp_path / "on", *flags)
    assert ended.code == 1 and "3 is 'pink' here and 'red' there" in ended.text and "--finetune" in ended.text


def averages_of(text):
    """The means of the last "Averaged stats" line, by name."""
    line = text.rpartition("Averaged stats: ")[2].partition("\n")[0]
    return {name: float(mean) for name, mean in re.findall(r"(\w+): \S+ \((\S+)\)", line)}


@pytest.mark.distributed
@pytest.mark.parametrize("batch", [1, 2])
def test_evaluation_is_the_same_in_any_number_of_processes(trained, data, tmp_path, batch):
    flags = ["--dec_layers", 6, "--eval", "--resume", trained[0] / "checkpoint.pth", "--eval_batch_size", batch]
    losses = averages_of(detr_ok(data, tmp_path / "one", *flags))
    alone = read_checkpoint(tmp_path / "one/eval.pth")
    assert alone["scores"].max() > 0 and losses["loss"] > 0 and len(losses) == 44  # all but the class error
    for world_size in (2, 4):  # 5 images: the processes have different numbers of them, or none
        assert averages_of(detr_ok(data, tmp_path / "several", *flags, world_size=world_size)) == losses
        together = read_checkpoint(tmp_path / "several/eval.pth")
        for name in ("precision", "recall", "scores"):
            assert torch.equal(alone[name], together[name])


def test_masks_and_panoptic(trained, data, tmp_path):
    text = detr_ok(
        data,
        tmp_path / "run",
        "--dec_layers",
        6,
        "--masks",
        "--epochs",
        1,
        "--frozen_weights",
        trained[0] / "checkpoint.pth",
        "--dataset_file",
        "coco_panoptic",
        "--coco_panoptic_path",
        data,
    )
    (line,) = log_of(tmp_path / "run")
    wanted = [*keys_of_log(6, masks=True), "test_coco_eval_masks", "test_PQ_all", "test_PQ_th", "test_PQ_st"]
    assert list(line) == [*wanted, "epoch", "n_parameters"]
    assert list(line["test_PQ_all"]) == ["pq", "sq", "rq", "n"] and "   PQ    SQ    RQ     N\nAll " in text
    assert not (tmp_path / "run/checkpoint0000.pth").exists()  # the learning rate has not dropped
    predictions = json.loads((tmp_path / "run/panoptic_eval/predictions.json").read_text())
    assert len(predictions["annotations"]) == 5
    before = read_checkpoint(trained[0] / "checkpoint.pth")["model"]
    after = read_checkpoint(tmp_path / "run/checkpoint.pth")["model"]
    assert all(torch.equal(after[f"detr.{name}"], value) for name, value in before.items())


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    else:
        assert a == b, where


def assert_same_run(ours, other):
    assert (ours / "log.txt").read_text() == (other / "log.txt").read_text()
    a, b = (read_checkpoint(folder / "checkpoint.pth") for folder in (ours, other))
    del a["args"], b["args"]
    assert_same(a, b)


def test_a_stopped_run_resumes_to_the_same_bits(data, tmp_path):
    flags = ["--deterministic", "--dropout", "0.1", "--lr_drop", 1]
    detr_ok(data, tmp_path / "whole", *flags)
    for number in (1, 2, 1):  # of four steps per epoch: in mid-epoch, at the last step, in the second epoch
        (ended,) = detr(
            data, tmp_path / "cut", *flags, "--resume", "auto", main=partial(change_a_loss, main, number, 0, be_stopped)
        )
        assert ended.code == Preempted.EXIT_CODE, ended.text
    detr_ok(data, tmp_path / "cut", *flags, "--resume", "auto", "--num_workers", 2)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    text = detr_ok(data, tmp_path / "cut", *flags, "--resume", "auto")  # finished: nothing to do
    assert "Epoch: [" not in text
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_run_continued_for_more_epochs_equals_a_longer_one_and_keeps_the_published_epochs(data, tmp_path):
    flags = ["--deterministic", "--start_epoch", 99, "--epochs"]
    detr_ok(data, tmp_path / "long", *flags, 101)
    detr_ok(data, tmp_path / "short", *flags, 100)
    detr_ok(data, tmp_path / "short", *flags, 101, "--resume", tmp_path / "short/checkpoint.pth", *UNREAD)
    assert_same_run(tmp_path / "short", tmp_path / "long")
    for folder in (tmp_path / "short", tmp_path / "long"):  # the 100th checkpoint, curves whenever 50 divides the epoch
        assert (folder / "checkpoint0099.pth").exists() and not (folder / "checkpoint0100.pth").exists()
        assert (folder / "eval/100.pth").exists() and not (folder / "eval/099.pth").exists()


def spoil_one_loss(args):
    """``main`` in which one loss of rank 1 is NaN in the third training step."""
    weigh, step = engine.weigh, [-1]

    def weigh_and_spoil(losses, weights):
        step[0] += 1
        if step[0] == 2 and rank() == 1:
            losses["loss_giou"] = losses["loss_giou"] * torch.nan
        return weigh(losses, weights)

    engine.weigh = weigh_and_spoil
    main(args)


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(data, tmp_path):
    ended = detr(data, tmp_path / "run", "--save-interval", 1, "--batch_size", 1, world_size=2, main=spoil_one_loss)
    for one in ended:
        assert one.code == 1 and "NonFiniteLoss: loss is not finite on rank 1 at epoch 0, step 2" in one.text
    (report,) = json.loads((tmp_path / "run/nonfinite_loss.json").read_text())
    assert report["rank"] == 1 and report["lr"] == 1e-3 and report["step"] == 2
    assert report["terms"]["loss_giou"] != report["terms"]["loss_giou"]  # NaN
    assert report["terms"]["loss_ce"] > 0
    assert len(report["samples"]) == 1 and report["samples"][0].startswith(str(data / "train2017"))
    assert read_checkpoint(tmp_path / "run/checkpoint.pth")["progress"]["step"] == 2


@pytest.mark.distributed
def test_images_without_objects_neither_hang_nor_give_nan(tmp_path):
    root = write_tiny_coco(tmp_path / "data", train=4, val=3)

    def empty_most(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 101]

    edit_annotations(root, "train2017", empty_most)
    edit_annotations(root, "val2017", lambda c: c.update(annotations=[]))
    detr_ok(root, tmp_path / "run", "--batch_size", 1, world_size=2)
    for line in log_of(tmp_path / "run"):
        assert line["train_loss_bbox"] > 0
        assert all(v == v for v in line.values() if isinstance(v, float))
        assert line["test_coco_eval_bbox"] == [-1.0] * 12


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp", "bf16"],
        ["--accumulate", 3],
        ["--position_embedding", "learned"],
        ["--pre_norm", "--no_aux_loss"],
        ["--lr_backbone", 0],
        ["--augment", "none"],
        ["--batch_size", 100],  # more than there are images
    ],
)
def test_other_ways_to_train(data, tmp_path, flags):
    detr_ok(data, tmp_path / "run", "--epochs", 1, *flags)
    (line,) = log_of(tmp_path / "run")
    assert 0 < line["train_loss"] < 50 and 0 < line["test_loss"] < 50
    assert ("train_loss_ce_0" in line) == ("--no_aux_loss" not in flags)


def test_finetuning_on_other_classes(trained, tmp_path):
    root = write_tiny_coco(tmp_path / "data")

    def renumber(content):
        for entry in content["categories"]:
            entry["id"] += 20
        for entry in content["annotations"]:
            entry["category_id"] += 20

    for split in ("train2017", "val2017"):
        edit_annotations(root, split, renumber)
    flags = ["--dec_layers", 6, "--epochs", 1, "--finetune", trained[0] / "checkpoint.pth"]
    text = detr_ok(root, tmp_path / "run", *flags)
    assert "--finetune: class_embed.weight" in text
    checkpoint = read_checkpoint(tmp_path / "run/checkpoint.pth")
    assert len(checkpoint["model"]["class_embed.bias"]) == 29 + 2 and set(checkpoint["categories"]) == {23, 24, 29}


def test_pretrained_is_named_and_downloaded_only_where_it_is_used(trained, data, tmp_path, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(zoo, "fetch", lambda name: fetched.append(name) or trained[0] / "checkpoint.pth")
    flags = ["--coco_path", str(data), *TINY, "--dec_layers", "6", "--device", "cpu", "--num_workers", "0"]
    flags += ["--output_dir", str(tmp_path), "--eval", "--pretrained", "NAME"]
    train.main(get_args_parser().parse_args([*flags, "--resume", str(trained[0] / "checkpoint.pth")]))
    assert not fetched and "--pretrained:" not in capsys.readouterr().out
    with pytest.raises(BadCheckpoint, match="class_embed.weight"):
        train.main(get_args_parser().parse_args([*flags, "--num_classes", "20"]))
    assert fetched == ["NAME"] and "--pretrained: class_embed.weight" in capsys.readouterr().out


def test_a_frozen_detector_of_other_classes_is_refused(trained, data, tmp_path):
    contents = torch.load(trained[0] / "checkpoint.pth", weights_only=False)
    contents["categories"] = {3: "green", 4: "red", 9: "blue"}
    torch.save(contents, tmp_path / "other.pth")
    flags = ["--coco_path", str(data), *TINY, "--dec_layers", "6", "--device", "cpu", "--num_workers", "0", "--masks"]
    args = get_args_parser().parse_args([*flags, "--frozen_weights", str(tmp_path / "other.pth")])
    with pytest.raises(BadCheckpoint, match="other.pth numbers its categories differently .* 'red' is 3 here and 4"):
        train.main(args)


def main_with_scores(masks, args):
    """A run whose evaluations find the same boxes every time, as those of a frozen detector do, and other masks."""
    train.score = lambda *_: ({"coco_eval_bbox": [0.4], "coco_eval_masks": [masks]}, None)
    main(args)


def test_a_frozen_detector_says_how_many_classes_the_model_has_and_its_masks_which_epoch_is_best(trained, tmp_path):
    root = write_tiny_coco(tmp_path / "data", train=4, val=2)

    def drop_the_largest(content):
        content["categories"] = [entry for entry in content["categories"] if entry["id"] != 9]
        content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] != 9]

    for split in ("train2017", "val2017"):
        edit_annotations(root, split, drop_the_largest)
    flags = ["--dec_layers", 6, "--masks", "--frozen_weights", trained[0] / "checkpoint.pth", "--resume", "auto"]
    detr_ok(root, tmp_path / "run", *flags, "--epochs", 1, main=partial(main_with_scores, 0.1))
    assert len(read_checkpoint(tmp_path / "run/checkpoint.pth")["model"]["detr.class_embed.bias"]) == 11
    text = detr_ok(root, tmp_path / "run", *flags, "--epochs", 2, main=partial(main_with_scores, 0.2))
    assert "resumed from" in text and read_checkpoint(tmp_path / "run/best.pth")["epoch"] == 1


def test_that_a_frozen_detector_has_no_masks_is_no_difference(trained, monkeypatch):
    monkeypatch.setattr("irpe_train.run.logger.warning", pytest.fail)
    file = str(trained[0] / "best.pth")
    args = get_args_parser().parse_args([*TINY, "--dec_layers", "6", "--masks", "--eval", "--frozen_weights", file])
    frozen = Checkpoint.read(file)
    args.num_classes = len(frozen.weights()["class_embed.bias"]) - 1
    start_from(build_model(args)[0], args, None, frozen, frozen.contents["categories"])


@pytest.mark.parametrize("flag", ["--finetune", "--frozen_weights"])
def test_flags_that_no_shape_shows_are_compared(trained, data, tmp_path, flag):
    other = ["--enc_rpe2d", "rpe-2.1-product-ctx-1-k", "--image_size", 50]
    masks = ["--masks"] * (flag == "--frozen_weights")
    text = detr_ok(
        data, tmp_path / "run", "--dec_layers", 6, "--epochs", 1, flag, trained[0] / "best.pth", *other, *masks
    )
    expected = "enc_rpe2d=rpe-2.1-product-ctx-1-k (stored: rpe-2.0-product-ctx-1-k). Those given now are used"
    assert f"warning: flags differ from the checkpoint's: {expected}" in text


@pytest.mark.parametrize(
    ("flags", "words"), [(["--masks"], "bbox_attention.*starts fresh"), (["--num_queries", "9"], "others start fresh")]
)
def test_parts_that_were_never_trained_are_not_evaluated(trained, data, tmp_path, flags, words):
    flags = ["--coco_path", str(data), *TINY, "--dec_layers", "6", "--device", "cpu", "--num_workers", "0", *flags]
    flags += ["--eval", "--finetune", str(trained[0] / "best.pth")]
    with pytest.raises(BadCheckpoint, match=f"a part of this model was never trained .*{words}"):
        train.main(get_args_parser().parse_args(flags))


def test_published_class_counts():
    class Of:
        def __init__(self, largest):
            self.categories = {1: "one", largest: "last"}

    assert classes_of_data([Of(90)], "coco") == 91
    assert classes_of_data([Of(200)], "coco_panoptic") == 250
    assert classes_of_data([Of(7), Of(12)], "coco") == classes_of_data([Of(12)], "coco_panoptic") == 13


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--coco_path", ""], "--coco_path is needed"),
        (["--coco_path", "/nowhere"], "no annotation file /nowhere/annotations/instances_val2017.json"),
        (["--dataset_file", "coco_panoptic"], "needs --coco_panoptic_path"),
        (["--frozen_weights", "x.pth"], "add --masks"),
        (["--dropout", "1"], "--dropout 1 leaves nothing"),
        (["--pretrained", "x", "--finetune", "y"], "give one"),
        (["--expect"], "add --eval"),
        (["--eval", "--expect", ""], "no published checkpoint ''"),
        (["--enc_rpe2d", "rpe-2.0-product-ctx-1-k", "--enc_layers", "0"], "leaves no encoder for it"),
        (["--num_classes", "9"], r"--num_classes 9 \(the largest id plus one"),
        (["--enc_rpe2d", "rpe-2.0-prodct-ctx-1-k"], "unknown method 'prodct'"),
        (["--backbone_weights", "nowhere.pth"], "nowhere.pth"),
        (["--resume", "nowhere.pth"], "nowhere.pth: no such file"),
    ],
)
def test_mistakes_end_in_one_message_before_training(data, tmp_path, flags, words):
    quick = ["--device", "cpu", "--num_workers", "0", "--output_dir", str(tmp_path)]
    args = get_args_parser().parse_args(["--coco_path", str(data), *TINY, *quick, *flags])
    with pytest.raises((ValueError, OSError, RuntimeError), match=words):
        train.main(args)


def test_unreadable_images(trained, tmp_path):
    root = write_tiny_coco(tmp_path / "data", train=8)
    (root / "train2017/000000000103.jpg").write_bytes(b"damaged")
    text = detr_ok(root, tmp_path / "run", "--max-bad", 0.2, "--epochs", 1)
    assert "unreadable training image" in text and "000000000103.jpg" in text
    (ended,) = detr(root, tmp_path / "run2", "--epochs", 1)
    assert ended.code == 1 and "unreadable images: 1" in ended.text and "000000000103.jpg" in ended.text
    (root / "val2017/000000000104.jpg").write_bytes(b"damaged")
    (ended,) = detr(root, tmp_path / "run3", "--dec_layers", 6, "--eval", "--resume", trained[0] / "checkpoint.pth")
    assert ended.code == 1 and "unreadable images: 1" in ended.text and "000000000104.jpg" in ended.text
