"""The network and its ONNX export: packaged weights, activation maps that add up to the logit, parity."""

import numpy as np
import onnxruntime
import pytest
import torch

from modeling.image_scorer import ExportableScorer, create_scorer
from modeling.onnx_export import export_onnx, write_parity

BACKBONE = "tf_efficientnet_lite0"


def pictures(number, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    return create_scorer(BACKBONE, 7, "package").eval()


def test_packaged_weights_replace_every_tensor(scorer):
    """Copied by position: one tensor left out or shifted would show as one that kept its initial value."""
    torch.manual_seed(0)
    fresh = create_scorer(BACKBONE, 7, "none").state_dict()
    loaded = scorer.state_dict()
    kept = [
        name
        for name, value in fresh.items()
        if name.startswith("backbone.") and "num_batches" not in name and torch.equal(value, loaded[name])
    ]
    assert kept == []
    variances = [value for name, value in loaded.items() if name.endswith("running_var")]
    # Dead channels have a variance of 0; a bias or mean in its place would be negative somewhere.
    assert all((value >= 0).all() for value in variances)


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


@pytest.mark.parametrize(("members", "num_views"), [(1, 1), (2, 4)])
def test_the_exported_graph_is_the_same_function_at_any_batch_size(scorer, tmp_path, members, num_views):
    path = tmp_path / "image_scorer.onnx"
    others = [create_scorer(BACKBONE, 7, "none").eval() for _ in range(members - 1)]
    exportable = ExportableScorer([scorer, *others], num_views)
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
