"""What the ingress needs of the bundle that the other nodes run: its task, input size, and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modeling.abstention import AbstentionRule
from modeling.bundle import load_bundle
from modeling.schema import TaskSpec
from modeling.tested_risks import TestedRisks
from serve.settings import ModelReference


@dataclass(frozen=True)
class ServedModel:
    """One deployed bundle, without its networks.

    Attributes:
        reference: where it came from, and its version in the registry.
        digest: the bundle's digest; every node must answer with the same.
        input_size: side of the network's input, pixels.
        card: manifest fields for the model card.
        abstention: which pictures it does not score; None for a bundle without such a rule.
        contexts: what its risks can rest on.
        average_risk: share of lesions that are malignant where the model is used, 0-1.
        tested: by context, its risks of lesions whose diagnosis is known.
    """

    reference: ModelReference
    digest: str
    task: TaskSpec
    input_size: int
    card: dict[str, Any]
    abstention: AbstentionRule | None = None
    contexts: Sequence[str] = ()
    average_risk: float = 0.0
    tested: Mapping[str, TestedRisks] = field(default_factory=dict)

    @classmethod
    def load(cls, reference: ModelReference) -> ServedModel:
        """Verifies the bundle and reads its manifest; ValueError as in `load_bundle`."""
        bundle = load_bundle(reference.bundle_uri, reference.sha256)
        manifest = bundle.manifest
        card = manifest.model_dump(
            mode="json", include={"name", "created_at", "backbone", "input_size", "dataset_digest", "git_commit"}
        )
        return cls(
            reference,
            bundle.digest,
            bundle.task,
            manifest.input_size,
            card,
            bundle.abstention(),
            manifest.contexts,
            float(np.dot(manifest.population_prior, bundle.task.malignant_mask)),
            bundle.tested_risks(),
        )

    @property
    def notice(self) -> str:
        """What every answer of this model says of itself."""
        notice = "Not a medical device."
        if self.task.synthetic:
            notice += " Trained on synthetic data: its answers say nothing about real skin."
        return notice
