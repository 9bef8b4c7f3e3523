"""timm's own tools take our models: names, configs, feature maps, data pipeline, optimizers, averages, checkpoints.

timm's train.py and validate.py are in its repository, not in its package; their parts are tested here.
"""

import fnmatch
import re
import sys

import pytest
import timm
import torch
from timm.data import Mixup, create_loader, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import get_notrace_functions, get_notrace_modules, get_pretrained_cfg, load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy
from torchvision.models.feature_extraction import create_feature_extractor

from deit_irpe import create_model
from deit_irpe.data.datasets import build_dataset
from deit_irpe.models import RPE_MODELS
from tests.helpers.snippets import REPOSITORY

NAME = "deit_tiny_patch16_224_ctx_product_50_shared_k"


def test_names_are_listed_and_the_published_ones_have_weights():
    assert timm.list_models("*product_50*") == sorted(fnmatch.filter(RPE_MODELS, "*product_50*"))
    assert NAME in timm.list_pretrained("*product_50*")
    assert not timm.models.is_model_pretrained("deit_tiny_patch16_224_ctx_product_50_shared_qk")  # never published


def test_the_config_is_the_published_preprocessing():
    config = get_pretrained_cfg(NAME)
    assert (config.architecture, config.crop_pct, config.num_classes) == (NAME, 0.875, 1000)
    assert config.input_size == (3, 224, 224)
    assert config.url.endswith(f"{NAME}.pth") and config.hf_hub_id is None
    data = resolve_model_data_config(timm.create_model(NAME, depth=1))
    assert (data["interpolation"], data["crop_pct"], data["mean"]) == ("bicubic", 0.875, (0.485, 0.456, 0.406))


def test_feature_maps_have_the_shape_of_the_image_and_those_of_the_whole_model():
    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=(32, 64), depth=3).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.rpe_k.lookup_table_weight)
    features = timm.create_model(NAME, img_size=(32, 64), depth=3, features_only=True, out_indices=(0, 2)).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 64)
    maps = features(images)
    assert [tuple(one.shape) for one in maps] == [(2, 192, 2, 4)] * 2
    assert features.feature_info.channels() == [192, 192] and features.feature_info.reduction() == [16, 16]
    for ours, wanted in zip(
        maps, model.forward_intermediates(images, indices=[0, 2], intermediates_only=True), strict=True
    ):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("indices, count", [(None, 3), (2, 2), ([-1], 1)])
def test_which_feature_maps(indices, count):
    model = timm.create_model(NAME, img_size=32, depth=4, features_only=True, out_indices=indices)
    assert len(model(torch.randn(1, 3, 32, 32))) == count


def test_feature_maps_start_from_published_weights(monkeypatch, tmp_path):
    published = create_model(NAME)
    torch.nn.init.normal_(published.blocks[3].attn.rpe_k.lookup_table_weight)
    torch.save({"model": published.state_dict()}, tmp_path / "published.pth")
    monkeypatch.setattr("deit_irpe.models.registration.fetch", lambda name: tmp_path / "published.pth")
    features = timm.create_model(NAME, pretrained=True, features_only=True, num_classes=5, out_indices=[3])
    ours = features.model.blocks[3].attn.rpe_k.lookup_table_weight
    assert torch.equal(ours, published.blocks[3].attn.rpe_k.lookup_table_weight)


def test_a_traced_graph_gives_the_same_features_and_gradients():
    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=32, depth=2).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.rpe_k.lookup_table_weight)
    graph = create_feature_extractor(
        model,
        {"blocks.1": "features", "head": "logits"},
        tracer_kwargs={"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()},
    )
    images = torch.randn(2, 3, 32, 32)
    traced, logits = graph(images), model(images)
    torch.testing.assert_close(traced["logits"], logits, atol=0, rtol=0)
    assert traced["features"].shape == (2, 5, 192)
    table = model.blocks[0].attn.rpe_k.lookup_table_weight
    ours, wanted = (torch.autograd.grad(output.square().sum(), table)[0] for output in (traced["logits"], logits))
    torch.testing.assert_close(ours, wanted, atol=0, rtol=0)
    assert wanted.any()


def test_an_unknown_argument_is_the_error_that_timm_promises():
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer_count'"):
        timm.create_model(NAME, layer_count=3)


def test_timms_own_tools_train_validate_and_resume(colours, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=4, img_size=32, depth=1, drop_rate=0.0, drop_path_rate=0.1, in_chans=3)
    config = resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    loaders = [
        create_loader(
            build_dataset(colours, train),
            batch_size=16,
            is_training=train,
            num_workers=0,
            device=torch.device("cpu"),
            use_prefetcher=False,
            persistent_workers=False,
            **config,
        )
        for train in (True, False)
    ]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, layer_decay=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, warmup_epochs=0)
    mixup, loss_of = Mixup(mixup_alpha=0.1, num_classes=4), SoftTargetCrossEntropy()
    ema = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    for epoch in range(2):
        model.train()
        for images, targets in loaders[0]:
            loss = loss_of(model(*(mixed := mixup(images, targets))[:1]), mixed[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
        scheduler.step(epoch + 1)
        model.eval()
        with torch.no_grad():
            scores = [accuracy(model(images), targets)[0] for images, targets in loaders[1]]
        saver.save_checkpoint(epoch, metric=float(sum(scores)))
    assert model.blocks[0].attn.rpe_k.lookup_table_weight.abs().sum() > 0

    again = timm.create_model(NAME, num_classes=4, img_size=32, depth=1).eval()
    load_checkpoint(again, str(tmp_path / "last.pth.tar"), use_ema=False, weights_only=False)
    images = next(iter(loaders[1]))[0]
    torch.testing.assert_close(again(images), model(images))


def test_the_documented_way_into_timms_scripts(tmp_path, monkeypatch, capsys):
    code = re.search(r'python -c "(import deit_irpe, .*?)"', (REPOSITORY / "docs" / "evaluate.md").read_text())[1]
    script = tmp_path / "validate.py"
    script.write_text("import sys, timm\nif __name__ == '__main__':\n    print(timm.is_model(sys.argv[2]), sys.argv)\n")
    monkeypatch.setattr(sys, "argv", ["-c", str(script), "--model", NAME])
    exec(code, {})
    assert capsys.readouterr().out == f"True {[str(script), '--model', NAME]}\n"
