"""User mistakes: one clear message, no traceback, before training if possible."""

import pytest
import torch

from deit_irpe.args import get_args_parser, image_size, keywords
from deit_irpe.data.from_flags import training_loader
from deit_irpe.data.images import LabelledImages
from irpe_train.config import ConfigError, parse_args
from tests.helpers.deit_runs import deit
from tests.helpers.tiny_images import write_images


def explained(data, tmp_path, words, *flags, code=1, **options):
    (ended,) = deit(data, tmp_path / "out", "--epochs", "1", *flags, **options)
    assert ended.code == code and words in ended.text, ended.text
    assert "Traceback" not in ended.text and not (tmp_path / "out" / "checkpoint.pth").exists()
    return ended.text


def test_a_missing_folder(tmp_path):
    explained(tmp_path / "absent", tmp_path, f"--data-path {tmp_path / 'absent'}: no such folder")
    write_images(tmp_path / "val", {"a": 1})
    explained(tmp_path, tmp_path, f"{tmp_path / 'train'}: no such folder (there is out, outputs, val). It should hold")


def test_a_folder_around_all_classes_is_not_learned_to_100_percent(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / split / "images", {"ant": 2, "bee": 2})
    explained(
        tmp_path, tmp_path, "one class, 'images', leaves nothing to learn; expected one folder per class, side by"
    )


def test_one_image_cannot_be_mixed():
    one = LabelledImages(["a"], ["x.png"], [0])
    flags = ["--no-repeated-aug", "--num_workers", "0"]
    with pytest.raises(ValueError, match="one training image per process, but Mixup and CutMix mix two"):
        training_loader(get_args_parser().parse_args(flags), one, torch.device("cpu"))
    plain = get_args_parser().parse_args([*flags, "--mixup", "0", "--cutmix", "0"])
    assert len(training_loader(plain, one, torch.device("cpu"))) == 1


def test_an_empty_class_and_a_flat_val_folder(tmp_path):
    write_images(tmp_path / "train", {"a": 1, "b": 1})
    write_images(tmp_path / "val", {"a": 1, "b": 0})
    explained(tmp_path, tmp_path, f"{tmp_path / 'val' / 'b'}: no images in this class folder")
    (tmp_path / "val" / "a" / "0.png").rename(tmp_path / "val" / "0.png")
    (tmp_path / "val" / "a").rmdir()
    (tmp_path / "val" / "b").rmdir()
    explained(tmp_path, tmp_path, "the images here are in no class folder")


def test_classes_that_differ(tmp_path):
    write_images(tmp_path / "train", {"a": 1, "b": 1})
    write_images(tmp_path / "val", {"a": 1, "c": 1})
    explained(tmp_path, tmp_path, "only in train: b; only in val: c")


def test_a_truncated_image_in_evaluation_is_named(colours, tmp_path):
    write_images(tmp_path / "val", {"a": 2})
    broken = tmp_path / "val" / "a" / "1.png"
    broken.write_bytes(broken.read_bytes()[:300])
    explained(tmp_path, tmp_path, f"evaluation cannot read {broken}", "--eval")
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    write_images(tmp_path / "val", {"b": 2})
    explained(tmp_path, tmp_path, f"UnreadableImage: {broken}: ")  # not after an epoch of training


def test_a_truncated_training_image_is_named_and_too_many_stop_the_run(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / split, {"a": 8, "b": 8})
    broken = tmp_path / "train" / "a" / "3.png"
    broken.write_bytes(broken.read_bytes()[:300])
    text = explained(tmp_path, tmp_path, "--max-bad 0.001 allows 0", "--no-repeated-aug")
    assert str(broken) in text
    (ended,) = deit(tmp_path, tmp_path / "fine", "--epochs", "1", "--no-repeated-aug", "--max-bad", "0.1")
    assert ended.code == 0 and f"replaced by its neighbour: {broken}" in ended.text, ended.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rpe", "rpe-1.9-prodct-ctx-1-k"), "unknown method 'prodct'"),
        (("--model", "deit_tiny_patch16_24"), "unknown; did you mean deit_tiny_patch16_224?"),
        (("--model-kwargs", "size=3"), "model 'deit_tiny_patch16_224'"),
        (("--batch-size", "7"), "it must be even"),
        (("--distillation-type", "soft"), "needs --teacher-path FILE or URL"),
        (
            ("--distillation-type", "soft", "--teacher-path", "x.pth", "--no-train-mode"),
            "--no-train-mode averages the two heads",
        ),
        (("--eval-ema", "--no-model-ema"), "--no-model-ema switches it off"),
        (("--eval", "--eval-ema", "--finetune", "x.pth"), "evaluates the moving average in a checkpoint"),
        (("--resume", "absent.pth"), "absent.pth: no such file"),
        (("--finetune", "absent.pth"), "absent.pth: no such file"),
        (("--pretrained", "--finetune", "x.pth"), "give one"),
        (("--expect",), "--expect compares an evaluation with the published figures: add --eval"),
        (("--eval", "--expect", ""), "no published checkpoint ''; expected one of"),
        (("--opt", "adamm"), "adamm"),
        (("--opt-betas", "0.9"), "--opt adamw with lr"),
        (("--opt-betas", "0.9", "1.5"), "--opt adamw with lr"),
        (("--opt", "adahessian"), "it needs second derivatives"),
        (("--aa", "foo"), "cannot build the augmentation (--aa foo"),
        (("--smoothing", "1"), "--smoothing 1: nothing would be left of the label"),
        (("--cutmix-minmax", "0.8", "0.2"), "--cutmix-minmax 0.8 0.2: expected the smaller one first, a pixel apart"),
        (("--cutmix-minmax", "0.5", "0.51"), "a pixel apart in images of 32"),
        (("--lr-noise", "0.5", "--lr-noise-pct", "0"), "--lr-noise-pct 0: expected more than a thousandth"),
        (("--model-kwargs", "in_chans=1"), "--model-kwargs in_chans=...: images have three channels"),
        (("--model-kwargs", "num_heads=5"), "cannot be built with these arguments"),
    ],
)
def test_wrong_flags(colours, tmp_path, flags, words):
    explained(colours, tmp_path, words, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", "-4"], "argument --batch-size: expected 1 or more, got -4"),
        (["--epochs", "9" * 20], "argument --epochs: expected at most 2147483647"),
        (["--input-size", "224x"], "argument --input-size: expected pixels, 224 or HEIGHTxWIDTH"),
        (["--drop-path", "2"], "argument --drop-path: expected a fraction from 0 to 1"),
        (["--min-lr", "-1"], "argument --min-lr: expected a number from 0 to 1e30, got -1"),
        (["--lr", "1e300"], "argument --lr: expected a number from 0 to 1e30, got 1e300"),
        (["--mixup", "-0.1"], "argument --mixup: expected a number from 0"),
        (["--cutmix-minmax", "0", "2"], "argument --cutmix-minmax: expected a fraction from 0 to 1, got 2"),
        (["--color-jitter", "nan"], "argument --color-jitter: expected a number from 0"),
        (["--opt-eps", "inf"], "argument --opt-eps: expected a number from 0"),
        (["--input-size", "9" * 30], "argument --input-size: expected pixels, 224 or HEIGHTxWIDTH"),
        (["--model-kwargs", "depth"], "expected KEY=VALUE, got 'depth'"),
        (["--data-set", "COCO"], "invalid choice: 'COCO'"),
        (["--btach-size", "4"], "unknown flag --btach-size; did you mean --batch-size?"),
    ],
)
def test_flags_that_no_run_could_take(capsys, flags, words):
    with pytest.raises(SystemExit) as ended:
        parse_args(get_args_parser(), flags)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_an_unknown_flag_in_a_config(tmp_path):
    (tmp_path / "c.yaml").write_text("batch-sise: 4\n")
    with pytest.raises(ConfigError, match="unknown name 'batch-sise'; did you mean batch-size"):
        parse_args(get_args_parser(), ["--config", str(tmp_path / "c.yaml")])


def test_a_config_is_a_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "batch-size: 4\nmodel_ema: false\nrepeated-aug: false\ninput-size: 32x48\n"
        "model-kwargs: [depth=2, act_layer=gelu]\nload-tar: true\n"
    )
    args = parse_args(get_args_parser(), ["--config", str(tmp_path / "c.yaml"), "--batch-size", "6"])
    assert (args.batch_size, args.model_ema, args.repeated_aug, args.load_tar) == (6, False, False, True)
    assert image_size(args.input_size) == (32, 48)
    assert keywords(args.model_kwargs) == {"depth": 2, "act_layer": "gelu"}
