"""The network and its ONNX export: packaged weights, activation maps that add up to the logit, parity."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch

from modeling.image_scorer import ExportableScorer, create_scorer
from modeling.onnx_export import export_onnx, write_parity
from training.epoch import ExponentialMovingAverage

BACKBONE = "tf_efficientnet_lite0"


def pictures(number, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    return create_scorer(BACKBONE, 7, "package").eval()


def test_the_activation_map_adds_up_to_the_logit(scorer):
    images = torch.from_numpy(pictures(3, 64))
    with torch.inference_mode():
        logits, embedding, cam = ExportableScorer([scorer])(images)
        direct, direct_embedding = scorer(images)
    assert cam.shape == (3, 7, 2, 2) and embedding.shape == (3, scorer.embedding_dim)
    assert torch.allclose(logits, direct, atol=1e-4)
    assert torch.allclose(embedding, direct_embedding, atol=1e-5)


def test_mirrored_views_make_the_score_of_a_mirrored_picture_the_same(scorer):
    images = torch.from_numpy(pictures(3, 64))
    exportable = ExportableScorer([scorer], num_views=2)
    with torch.inference_mode():
        logits, embedding, cam = exportable(images)
        mirrored, mirrored_embedding, mirrored_cam = exportable(images.flip(2))
        single, _ = scorer(images)
    assert torch.allclose(logits, mirrored, atol=1e-4) and torch.allclose(embedding, mirrored_embedding, atol=1e-4)
    # The map follows the picture.
    assert torch.allclose(cam.flip(3), mirrored_cam, atol=1e-4)
    assert not torch.allclose(logits, single, atol=1e-3)


def test_every_view_puts_its_map_back_in_place(scorer):
    images = torch.from_numpy(pictures(2, 64))
    turned = {2: images.flip(2), 3: images.flip(1), 4: images.transpose(1, 2)}
    with torch.inference_mode():
        by_count = {count: ExportableScorer([scorer], num_views=count)(images)[2] * count for count in (1, 2, 3, 4)}
        for count, other in turned.items():
            own = ExportableScorer([scorer])(other)[2]
            undone = {2: own.flip(3), 3: own.flip(2), 4: own.transpose(2, 3)}[count]
            assert torch.allclose(by_count[count] - by_count[count - 1], undone, atol=1e-3)


def test_an_ensemble_averages_logits_and_keeps_the_first_embedding(scorer):
    torch.manual_seed(1)
    other = create_scorer(BACKBONE, 7, "none").eval()
    images = torch.from_numpy(pictures(3, 64))
    with torch.inference_mode():
        logits, embedding, cam = ExportableScorer([scorer, other])(images)
        (first, first_embedding), (second, _) = scorer(images), other(images)
    assert torch.allclose(logits, (first + second) / 2, atol=1e-4)
    assert torch.allclose(embedding, first_embedding, atol=1e-5)
    bias = (scorer.head.bias + other.head.bias) / 2
    assert torch.allclose(cam.mean(dim=(2, 3)) + bias, logits, atol=1e-4)


def test_frozen_blocks_keep_their_weights_and_statistics_while_the_rest_learns():
    network = create_scorer(BACKBONE, 2, "package", frozen_blocks=2).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    logits, _ = network(torch.from_numpy(pictures(4, 64)))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    frozen = ("backbone.conv_stem", "backbone.bn1", "backbone.blocks.0", "backbone.blocks.1.")
    assert not [name for name in changed if name.startswith(frozen)]
    assert "head.weight" in changed and any(name.startswith("backbone.blocks.6") for name in changed)


MALIGNANT = [False, True, False, True]


@pytest.fixture(scope="module")
def two_heads():
    torch.manual_seed(2)
    scorer = create_scorer("mobilenetv3_small_050", 4, "none", input_size=64, malignant=MALIGNANT).eval()
    with torch.no_grad():
        scorer.head.weight.normal_()
        scorer.malignant_head.weight.normal_()
        scorer.malignant_head.bias.fill_(1.5)
    return scorer


def log_odds(logits):
    return logits[:, [1, 3]].logsumexp(dim=1) - logits[:, [0, 2]].logsumexp(dim=1)


def test_the_served_log_odds_of_malignancy_are_the_mean_of_both_heads(two_heads):
    images = torch.from_numpy(pictures(3, 64))
    with torch.inference_mode():
        classes, _, malignant = two_heads(images)
        logits, _, cam = ExportableScorer([two_heads])(images)
    assert torch.allclose(log_odds(logits), (log_odds(classes) + malignant) / 2, atol=1e-4)
    assert (log_odds(logits) - log_odds(classes)).abs().min() > 0.01
    # Which malignant class, and which benign one, is the classes' own affair.
    for first, second in ((1, 3), (0, 2)):
        assert torch.allclose((logits - classes)[:, first], (logits - classes)[:, second], atol=1e-5)
    assert torch.allclose(cam.mean(dim=(2, 3)) + two_heads.head.bias, logits, atol=1e-5)


def test_views_and_ensembles_of_two_heads_average_what_each_would_serve(two_heads):
    torch.manual_seed(3)
    other = create_scorer("mobilenetv3_small_050", 4, "none", input_size=64, malignant=MALIGNANT).eval()
    images = torch.from_numpy(pictures(3, 64))
    with torch.inference_mode():
        logits, _, cam = ExportableScorer([two_heads, other], num_views=2)(images)
        each = [ExportableScorer([s])(i)[0] for s in (two_heads, other) for i in (images, images.flip(2))]
    assert torch.allclose(logits, torch.stack(each).mean(dim=0), atol=1e-4)
    bias = (two_heads.head.bias + other.head.bias) / 2
    assert torch.allclose(cam.mean(dim=(2, 3)) + bias, logits, atol=1e-4)


def test_the_malignant_head_is_averaged_and_kept_with_the_rest(two_heads):
    network = copy.deepcopy(two_heads)
    average = ExponentialMovingAverage(network, 0.9)
    with torch.no_grad():
        network.malignant_head.bias += 1.0
    average.update(network)
    assert 1.5 < float(average.model.malignant_head.bias) < 2.5
    restored = create_scorer("mobilenetv3_small_050", 4, "none", input_size=64, malignant=MALIGNANT)
    restored.load_state_dict(average.model.state_dict())
    assert torch.equal(restored.malignant_head.bias, average.model.malignant_head.bias)


def test_without_a_malignant_head_checkpoints_have_the_names_they_always_had(scorer):
    names = {name for name in scorer.state_dict() if not name.startswith("backbone.")}
    assert names == {"scale", "shift", "head.weight", "head.bias"}
    assert {name.split(".")[1] for name in scorer.state_dict() if name.startswith("backbone.")} == {
        "conv_stem", "bn1", "blocks", "conv_head", "bn2"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet_of_dreams", "weights": "none"}, "not a timm model name"),
        ({"backbone": "resnet18", "weights": "package"}, "no packaged weights for resnet18"),
        ({"backbone": BACKBONE, "weights": "/nowhere/w.pt"}, "expected 'none', 'package' or the path"),
        ({"backbone": BACKBONE, "weights": "none", "frozen_blocks": 12}, "allows 0 to 7"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_scorer(num_classes=2, **arguments)


TWO_HEADS = [True, True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("members", "num_views", "malignant"),
    [
        pytest.param(1, 1, None, marks=pytest.mark.slow),
        (2, 2, TWO_HEADS),
        pytest.param(2, 4, TWO_HEADS, marks=pytest.mark.slow),
    ],
)
def test_the_exported_graph_is_the_same_function_at_any_batch_size(tmp_path, members, num_views, malignant):
    path = tmp_path / "image_scorer.onnx"
    torch.manual_seed(0)
    weights = ["package", *["none"] * (members - 1)]
    scorers = [create_scorer(BACKBONE, 7, each, input_size=64, malignant=malignant).eval() for each in weights]
    exportable = ExportableScorer(scorers, num_views)
    export_onnx(exportable, 64, path)
    fixed = pictures(5, 64, seed=1)
    write_parity(exportable, fixed, tmp_path / "parity.npz")
    recorded = np.load(tmp_path / "parity.npz")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_outputs()] == ["logits", "embedding", "cam"]
    for count in (1, 5):
        logits, embedding, cam = session.run(None, {"images": fixed[:count]})
        assert np.abs(logits - recorded["logits"][:count]).max() < 1e-3
        assert np.abs(embedding - recorded["embedding"][:count]).max() < 1e-3
        assert cam.shape[:2] == (count, 7)
