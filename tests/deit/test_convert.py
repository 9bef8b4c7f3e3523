"""Weights move between a plain DeiT, ours, and code with the published encoding under other names."""

import pytest
import timm
import torch

from deit_irpe import create_model
from deit_irpe.convert import convert, get_args_parser, main
from deit_irpe.models.finetune import load_pretrained_weights
from irpe_train.checkpoint import load_matching, model_weights, read_checkpoint
from irpe_train.errors import BadCheckpoint, RunError

TINY = "deit_tiny_patch16_224"
NAME = TINY + "_ctx_product_50_shared_k"
OPTIONS = dict(depth=2, img_size=32, num_classes=3)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("base", [TINY, "deit_tiny_distilled_patch16_224"])
def test_a_plain_deit_and_ours_exchange_weights(base):
    plain = timm.create_model(base, **OPTIONS).eval()
    ours = create_model(base, "rpe-1.9-product-ctx-1-qkv", **OPTIONS).eval()
    images = torch.randn(2, 3, 32, 32)

    notes = load_pretrained_weights(ours, plain.state_dict(), source="a.pth")
    assert len(notes) == 6 and all(key.endswith("lookup_table_weight") for key in notes)  # 2 blocks x q, k, v
    torch.testing.assert_close(ours(images), plain(images), atol=1e-5, rtol=0)

    other = timm.create_model(base, **OPTIONS).eval()
    other.load_state_dict(convert(ours.state_dict(), source="theirs.pth", drop_zero_tables=True))
    torch.testing.assert_close(other(images), plain(images), atol=0, rtol=0)


def test_a_trained_table_is_not_dropped():
    ours = create_model(NAME, **OPTIONS)
    torch.nn.init.ones_(ours.blocks[1].attn.rpe_k.lookup_table_weight)
    with pytest.raises(
        BadCheckpoint, match="^checkpoint theirs.pth: blocks.1.attn.rpe_k.lookup_table_weight is not zero"
    ):
        convert(ours.state_dict(), source="theirs.pth", drop_zero_tables=True)


def test_a_table_that_is_zero_in_part_is_not_dropped():
    ours = create_model(NAME, **OPTIONS)
    with torch.no_grad():
        ours.blocks[1].attn.rpe_k.lookup_table_weight[..., :3] = 1.0
    with pytest.raises(
        BadCheckpoint, match="^checkpoint theirs.pth: blocks.1.attn.rpe_k.lookup_table_weight is not zero"
    ):
        convert(ours.state_dict(), source="theirs.pth", drop_zero_tables=True)


@pytest.mark.parametrize("head", [{}, {"head.weight": torch.tensor(1.0)}, {"head.weight": torch.zeros(3)}])
def test_weights_without_a_class_head_are_refused_by_what_is_missing(tmp_path, head):
    torch.save(timm.create_model(TINY, num_classes=0, img_size=32).state_dict() | head, tmp_path / "theirs.pth")
    with pytest.raises(BadCheckpoint, match=r"theirs.pth: no class head \(head.weight\) in it"):
        run(tmp_path / "theirs.pth", tmp_path / "ours.pth", "--model", TINY)
    assert not (tmp_path / "ours.pth").exists()


def test_no_file_is_replaced(tmp_path):
    path, _ = theirs(tmp_path)
    before = path.read_bytes()
    with pytest.raises(RunError, match="theirs.pth: already there"):
        run(path, path, "--model", NAME, "--prefix", "backbone.", "--rename", "layers.=blocks.")
    assert path.read_bytes() == before


def theirs(tmp_path):
    """Our own weights as other code might name them: with a prefix, other words, and a part outside the ViT."""
    model = create_model(NAME, num_classes=3, img_size=32)
    torch.nn.init.normal_(model.blocks[0].attn.rpe_k.lookup_table_weight)
    renamed = {f"backbone.{name.replace('blocks.', 'layers.')}": value for name, value in model.state_dict().items()}
    path = tmp_path / "theirs.pth"
    torch.save({"state_dict": renamed | {"neck.weight": torch.ones(1)}}, path)
    return path, model


def run(source, out, *flags):
    main(get_args_parser().parse_args([str(source), str(out), "--input-size", "32", "--key", "state_dict", *flags]))


def test_other_names_become_ours(tmp_path, capsys):
    path, model = theirs(tmp_path)
    run(path, tmp_path / "ours.pth", "--model", NAME, "--prefix", "backbone.", "--rename", "layers.=blocks.")
    assert "164 of 165 entries, 12 of them tables" in capsys.readouterr().out
    checkpoint = read_checkpoint(tmp_path / "ours.pth")
    assert (checkpoint["args"].model, checkpoint["args"].nb_classes) == (NAME, 3)
    again = create_model(NAME, num_classes=3, img_size=32)
    load_matching(again, model_weights(checkpoint, source="ours"), source="ours")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_names_of_the_classes_are_kept(tmp_path):
    """Without them, data that number the same classes in another order would be evaluated wrongly."""
    weights = create_model(NAME, num_classes=3, img_size=32).state_dict()
    torch.save({"model": weights, "classes": ["b", "a", "c"]}, tmp_path / "ours.pth")
    run(tmp_path / "ours.pth", tmp_path / "plain.pth", "--model", TINY, "--drop-zero-tables", "--key", "model")
    assert read_checkpoint(tmp_path / "plain.pth")["classes"] == ["b", "a", "c"]


def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path):
    path, _ = theirs(tmp_path)
    with pytest.raises(BadCheckpoint, match="missing: blocks.0"):
        run(path, tmp_path / "ours.pth", "--model", NAME, "--prefix", "backbone.")
    with pytest.raises(BadCheckpoint, match=r"lookup_table_weight \(1, 64, 50\), not \(1, 64, 82\)"):
        run(
            path,
            tmp_path / "ours.pth",
            "--model",
            TINY,
            "--rpe",
            "rpe-2.0-product-ctx-1-k",
            "--prefix",
            "backbone.",
            "--rename",
            "layers.=blocks.",
        )
    with pytest.raises(BadCheckpoint, match=r"^checkpoint .*\.pth: no entry begins with 'encoder.'"):
        run(path, tmp_path / "ours.pth", "--model", NAME, "--prefix", "encoder.")
    assert not (tmp_path / "ours.pth").exists()


def test_two_entries_never_become_one():
    with pytest.raises(BadCheckpoint, match="^checkpoint x.pth: two entries would be called weight"):
        convert(
            {"a.weight": torch.ones(1), "b.weight": torch.ones(1)}, source="x.pth", renames=[("a.", ""), ("b.", "")]
        )
