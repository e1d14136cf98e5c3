"""A complete bundle in 50 ms for tests: a linear network on mean colour instead of a trained one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from modeling.abstention import AbstentionRule
from modeling.bundle import Bundle, load_bundle, write_manifest
from modeling.schema import TaskSpec

SIZE = 16
EMBEDDING_DIM = 8

GATE_METRICS = {
    "n": 400,
    "n_malignant": 60,
    "auc": {"value": 0.9, "low": 0.86, "high": 0.94},
    "pauc": {"value": 0.14, "low": 0.12, "high": 0.16},
    "balanced_accuracy": {"value": 0.8, "low": 0.75, "high": 0.85},
    "accuracy": 0.85,
    "macro_f1": 0.78,
    "sensitivity": 0.95,
    "specificity": 0.6,
    "ece": 0.02,
    "calibration_slope": 1.02,
    "calibration_intercept": -0.05,
    "recalls": {"benign": 0.6, "malignant": 0.95},
}


def tiny_task(synthetic: bool = True, context_group: str | None = None) -> TaskSpec:
    return TaskSpec(
        name="tiny",
        synthetic=synthetic,
        fold_group="patient_id",
        context_group=context_group,
        label_column="target",
        label_values=["0", "1"],
        classes=["benign", "malignant"],
        malignant=["malignant"],
        columns={"age_approx": {"kind": "numeric", "minimum": 0, "maximum": 120}, "sex": {"kind": "categorical"}},
    )


def write_onnx(path: Path, num_classes: int = 2, bias: float = 0.0, seed: int = 0) -> None:
    """images uint8 (N, 16, 16, 3) -> logits (N, K), embedding (N, 8), cam (N, K, 16, 16); `bias` shifts the logits."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(EMBEDDING_DIM, 3, 1, 1)).astype(np.float32)
    head = rng.normal(size=(num_classes, EMBEDDING_DIM, 1, 1)).astype(np.float32)
    constants = {
        "scale": np.float32(1 / 255),
        "mixing": mixing,
        "head": head,
        "bias": np.array([0.0] * (num_classes - 1) + [bias], np.float32),
        "axes": np.array([2, 3], np.int64),
    }
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            node("Mul", ["float", "scale"], ["unit"]),
            node("Transpose", ["unit"], ["nchw"], perm=[0, 3, 1, 2]),
            node("Conv", ["nchw", "mixing"], ["features"]),
            node("ReduceMean", ["features", "axes"], ["embedding"], keepdims=0),
            node("Conv", ["features", "head"], ["cam"]),
            node("ReduceMean", ["cam", "axes"], ["pooled"], keepdims=0),
            node("Add", ["pooled", "bias"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", num_classes]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", EMBEDDING_DIM]),
            helper.make_tensor_value_info("cam", TensorProto.FLOAT, ["batch", num_classes, SIZE, SIZE]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))


def expected_outputs(images: np.ndarray, num_classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(logits, embedding) of `write_onnx`'s network without bias, computed in numpy."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(EMBEDDING_DIM, 3, 1, 1)).astype(np.float32)[:, :, 0, 0]
    head = rng.normal(size=(num_classes, EMBEDDING_DIM, 1, 1)).astype(np.float32)[:, :, 0, 0]
    embedding = (images.astype(np.float32) / 255).mean(axis=(1, 2)) @ mixing.T
    return embedding @ head.T, embedding


def write_contexts(
    directory: Path, task: TaskSpec, metrics: dict, contexts: list[str], clinical: dict | None = None
) -> None:
    from modeling.metadata_fusion import BoosterConfig, FusionConfig, fit_context_model

    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 60)
    log_probabilities = np.log(np.clip(rng.beta(2 + 2 * labels, 4 - labels), 0.01, 0.99))
    log_probabilities = np.stack([np.log1p(-np.exp(log_probabilities)), log_probabilities], axis=1)
    groups = np.arange(120).astype(str)
    prior = np.array([0.5, 0.5])
    columns = {"age_approx": rng.uniform(20, 80, 120), "sex": rng.choice(["female", "male"], 120).astype(object)}
    for context in contexts:
        model, _ = fit_context_model(
            context,
            task,
            log_probabilities,
            columns,
            labels,
            groups,
            np.arange(120) % 3,
            FusionConfig(boosters=(BoosterConfig(num_bags=1),), num_boost_round=5),
            prior,
            prior,
            0,
        )
        model.save(directory / "contexts" / context)
        (directory / "contexts" / context / "metrics.json").write_text(
            json.dumps({"gate": metrics} | ({} if clinical is None else {"clinical": clinical}))
        )


def tiny_bundle(
    directory: Path,
    metrics: dict | None = None,
    contexts: list[str] | None = None,
    synthetic: bool = True,
    onnx_bias: float = 0.0,
    torch_bias: float = 0.0,
    abstention: AbstentionRule | None = None,
    network_seed: int = 0,
    clinical: dict | None = None,
    **fields,
) -> Bundle:
    """Writes a bundle into `directory` and opens it; `fields` override the manifest's.

    `onnx_bias` is the network's last bias, `torch_bias` that of the recorded answers: where they differ, parity breaks.
    Another `network_seed` is another network; `clinical` goes beside the gate's metrics.
    """
    import pandas as pd

    contexts = contexts or ["image_only"]
    task = tiny_task(synthetic, "patient_id" if "patient" in contexts else None)
    directory.mkdir(parents=True)
    write_onnx(directory / "image_scorer.onnx", bias=onnx_bias, seed=network_seed)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (16, SIZE, SIZE, 3), dtype=np.uint8)
    logits, embedding = expected_outputs(images, seed=network_seed)
    logits = logits + np.array([0.0, torch_bias], np.float32)
    np.savez_compressed(directory / "parity.npz", images=images, logits=logits, embedding=embedding)
    matrix = np.eye(EMBEDDING_DIM, 64, dtype=np.float32)
    np.savez_compressed(directory / "projection.npz", matrix=matrix, mean=np.zeros(EMBEDDING_DIM, np.float32))
    write_contexts(directory, task, GATE_METRICS | (metrics or {}), contexts, clinical)
    risk = rng.uniform(size=50)
    reference = {"group": np.arange(50), "label": "benign", "image_score": risk, "risk": risk}
    reference |= {f"risk_{context}": risk for context in contexts}
    pd.DataFrame(reference).to_parquet(directory / "reference.parquet")
    (directory / "model_card.md").write_text("# tiny\n")
    if abstention is not None:
        abstention.save(directory)
    values = {
        "name": task.name,
        "task": task.model_dump(),
        "input_size": SIZE,
        "backbone": "linear",
        "embedding_dim": EMBEDDING_DIM,
        "modalities": ["image", "metadata"],
        "dataset_digest": "d" * 64,
        "git_commit": "unknown",
        "contexts": contexts,
        "sampling_prior": [0.5, 0.5],
        "population_prior": [0.9, 0.1],
    }
    write_manifest(directory, values | fields)
    return load_bundle(directory)
