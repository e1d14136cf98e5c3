"""The model card: what a bundle is for, what it was trained on, how well it does, and where it must not be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modeling.bundle_manifest import BundleManifest

SYNTHETIC_BANNER = (
    "> **SYNTHETIC.** Images and labels of the training data were generated. The figures below say that the software "
    "works; they say nothing about patients. Never use this model on people."
)
_CONTEXTS = {
    "image_only": "the image alone",
    "none": "the image and the lesion's own metadata",
    "patient": "as `none`, plus how the lesion compares with the patient's other lesions",
}
_TABULAR_CONTEXTS = _CONTEXTS | {"none": "the lesion's own metadata; this model sees no image"}
_INTERVALS = {"auc": "AUC", "pauc": "pAUC above 80 % sensitivity (0-0.2)", "balanced_accuracy": "balanced accuracy"}
_NUMBERS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "sensitivity": "sensitivity at the operating threshold",
    "specificity": "specificity at the operating threshold",
    "ece": "calibration error (adaptive ECE)",
    "calibration_slope": "calibration slope (ideal 1)",
    "calibration_intercept": "calibration intercept (ideal 0)",
}
_ENDS = (("value", ""), ("low", "_low"), ("high", "_high"))
_UNUSABLE = {"non_lesion": "no lesion", "corrupted_lesion": "spoilt lesions"}
# Under this many cancers an interval is wider than any difference between two useful models.
_FEW_MALIGNANT = 30


def _number(value: Any) -> str:
    return "not measurable" if value is None else f"{value:.3f}"


def _interval(value: Mapping[str, Any] | None) -> str:
    if value is None or value.get("value") is None:
        return "not measurable"
    if value.get("low") is None or value.get("high") is None:
        return _number(value["value"])
    dash = "-" if value["low"] >= 0 else " to "
    return f"{value['value']:.3f} ({value['low']:.3f}{dash}{value['high']:.3f})"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _metric_rows(metrics: Mapping[str, Mapping[str, Any]], contexts: list[str]) -> list[list[str]]:
    rows = [
        ["lesions (malignant)"]
        + [f"{metrics[context].get('n')} ({metrics[context].get('n_malignant')})" for context in contexts]
    ]
    rows += [[title] + [_interval(metrics[c].get(key)) for c in contexts] for key, title in _INTERVALS.items()]
    for key, title in _NUMBERS.items():
        bounds = [metrics[context].get("intervals", {}).get(key, {}) for context in contexts]
        values = [{"value": metrics[context].get(key)} for context in contexts]
        rows.append([title, *(_interval(value | bound) for value, bound in zip(values, bounds, strict=True))])
    classes = list(dict.fromkeys(name for c in contexts for name in metrics[c].get("recalls", {})))
    rows += [
        [f"recall of {name}"] + [_number(metrics[c].get("recalls", {}).get(name)) for c in contexts] for name in classes
    ]
    return rows


def _conformal_rows(clinical: Mapping[str, Mapping[str, Any]], contexts: list[str]) -> list[list[str]]:
    """Sets of classes instead of one: how often the true class is among them, and how many classes they hold."""
    reports = [clinical[context]["conformal"] for context in contexts]
    lowest = [min((share for share in r["coverage"].values() if share is not None), default=None) for r in reports]
    return [
        [f"prediction sets for {reports[0]['target']:.0%}: lowest coverage of a class", *map(_number, lowest)],
        ["prediction sets: classes in a set, mean", *(_number(report["mean_size"]) for report in reports)],
    ]


def _clinical_lines(clinical: Mapping[str, Mapping[str, Any]], context: str) -> list[str]:
    """Operating points and subgroups of one context."""
    report = clinical[context]
    points = [
        [
            f"{point['sensitivity']:.2f}",
            f"{point['threshold']:.4g}",
            _number(point["sensitivity_low"]),
            *(
                _interval({end: point.get(f"measured_{name}{tail}") for end, tail in _ENDS})
                for name in ("sensitivity", "specificity")
            ),
            "none found" if point["needed_to_triage"] is None else f"{point['needed_to_triage']:.1f}",
        ]
        for point in report["operating_points"]
    ]
    header = [
        "chosen for sensitivity",
        "risk from",
        "95 % lower bound",
        "sensitivity",
        "specificity",
        "lesions a cancer",
    ]
    lines = [f"### Operating points of `{context}`", "", *_table(header, points), ""]
    lines += [
        "Thresholds and lower bounds (one-sided; lesions that belong together count as one) come from out-of-fold "
        "predictions, of networks that each saw a part of the data; the other columns from the gate split. The last "
        "one: how many lesions are looked at for every cancer found.",
        "",
    ]
    if report["subgroups"]:
        measures = ("auc", "sensitivity", "specificity")
        rows = [
            [
                row["column"],
                row["value"],
                f"{row['n']} ({row['n_malignant']})",
                *(_number(row[name]) for name in measures),
            ]
            for row in report["subgroups"]
        ]
        lines += [f"### Subgroups of the gate split, `{context}`", ""]
        lines += _table(["", "", "lesions (malignant)", "AUC", "sensitivity", "specificity"], rows)
        lines += ["", "With fewer than 10 malignant or benign lesions a subgroup is counted but not judged.", ""]
    return lines


def _institution_lines(institutions: Sequence[Mapping[str, Any]], context: str, has_image: bool) -> list[str]:
    """What the model loses at an institution it has not seen."""
    rows = [
        [
            row["institution"],
            f"{row['n']} ({row['n_malignant']})",
            _number(row["seen"]["auc"]),
            _number(row["unseen"]["auc"]),
            _interval(row["difference"]["auc"]),
        ]
        for row in institutions
    ]
    header = ["", "lesions (malignant)", "AUC, seen", "AUC, left out", "difference"]
    networks = " The network that scored the pictures had seen the institution all the same." if has_image else ""
    return [
        f"### Institutions the model has not seen, `{context}`",
        "",
        *_table(header, rows),
        "",
        "Training lesions, scored by models that saw other patients of the institution, and by models fitted without "
        f"the whole institution.{networks}",
        "",
    ]


def _abstention_lines(measured: Mapping[str, Any]) -> list[str]:
    """Pictures that get reasons instead of a risk."""

    def share(counts: Mapping[str, Any]) -> str:
        if counts["share"] is None:
            return "none there"
        return f"{counts['share']:.1%} ({counts['low']:.1%}-{counts['high']:.1%}) of {counts['n']}"

    gate = measured["gate"]
    rows = [["usable: lesions of the gate split", share(gate["all"]), ""]]
    rows += [[f"usable: {name} ones", share(gate[name]), ""] for name in ("malignant", "benign")]
    for group, title in _UNUSABLE.items():
        for held_out in (False, True):
            kinds = [row for row in measured["kinds"] if row["set"] == group and row["held_out"] == held_out]
            if not kinds:
                continue
            least = min(kinds, key=lambda row: row["share"])
            mean = sum(row["share"] for row in kinds) / len(kinds)
            name = f"unusable: {title}, {len(kinds)} kinds {'held out' if held_out else 'designed for'}"
            rows.append([name, f"{mean:.1%}", f"{least['kind'].replace('_', ' ')}: {least['share']:.0%}"])
    return [
        "## Pictures it does not score",
        "",
        *_table(["", "refused", "least refused kind"], rows),
        "",
        "A refused picture gets reasons instead of a risk: a person has to look. The limits come from training "
        "pictures alone and were made to refuse 1 % of such. Intervals are 95 % (Wilson; lesions that belong "
        "together count as one). "
        "The figures of performance above include the refused pictures of the gate split. By kind: `abstention.json`.",
        "",
    ]


def render_model_card(
    manifest_fields: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    clinical: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    institutions: Sequence[Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
    abstention: Mapping[str, Any] | None = None,
) -> str:
    """Markdown text of `model_card.md`.

    Args:
        manifest_fields: fields of `BundleManifest`; `files` is not needed.
        metrics: per context the report that `modeling.metrics.evaluate` made on the gate split.
        clinical: per context the report of `training.clinical_report`, for operating points, prediction sets and
            subgroups.
        institutions: rows of `training.institution_report.leave_one_institution_out` for the last context.
        notes: sentences on what the data could not show; repeated ones are shown once.
        abstention: what the abstention rule refused, from `training.ood_report`.

    Raises:
        ValueError: a context of the manifest has no metrics.
    """
    manifest = BundleManifest.model_validate(dict(manifest_fields))
    missing = [context for context in manifest.contexts if context not in metrics]
    if missing:
        raise ValueError(f"model card: no metrics for contexts {missing}")
    task, contexts = manifest.task, list(manifest.contexts)
    has_image = "image" in manifest.modalities
    described = _CONTEXTS if has_image else _TABULAR_CONTEXTS
    network = (
        f"network `{manifest.backbone}`, input {manifest.input_size} x {manifest.input_size} RGB, "
        f"embedding {manifest.embedding_dim}"
    )
    few = min(int(metrics[context].get("n_malignant") or 0) for context in contexts)
    shares = [
        [name, "yes" if name in task.malignant else "no", f"{population:.4f}", f"{sampling:.4f}"]
        for name, population, sampling in zip(
            task.classes, manifest.population_prior, manifest.sampling_prior, strict=True
        )
    ]
    lines = [
        f"# Model card: {manifest.name}",
        "",
        *([SYNTHETIC_BANNER, ""] if task.synthetic else []),
        "**Not a medical device.** Not cleared or certified by any authority. It does not diagnose.",
        "",
        "## Intended use",
        "",
        f"Research, and ranking {'lesion images' if has_image else 'lesions'} so that a dermatologist looks at the "
        "most suspicious ones first. Every "
        "lesion still needs a person's judgement: a low risk is no reason to skip an examination.",
        "",
        "It answers in these contexts:",
        "",
        *(f"- `{context}`: {described[context]}" for context in contexts),
        "",
        "## Data",
        "",
        f"- task `{task.name}`, data set version `{manifest.dataset_digest}`{' (synthetic)' if task.synthetic else ''}",
        f"- folds and gate split keep every `{task.fold_group}` in one part",
        f"- metadata features: {', '.join(f'`{name}`' for name in task.columns) or 'none'}",
        "",
        *_table(["class", "malignant", "share that risks are for", "share in training batches"], shares),
        "",
        "## Performance on the gate split",
        "",
        "The gate split trained nothing. Intervals are 95 %, from a bootstrap over "
        f"`{task.fold_group}`; risk = P(malignant).",
        "",
        *_table(
            ["", *(f"`{context}`" for context in contexts)],
            _metric_rows(metrics, contexts) + (_conformal_rows(clinical, contexts) if clinical else []),
        ),
        "",
        *(_clinical_lines(clinical, contexts[-1]) if clinical else []),
        *(_institution_lines(institutions, contexts[-1], has_image) if institutions else []),
        *(_abstention_lines(abstention) if abstention else []),
        "## Limits",
        "",
        *(
            [f"- Only {few} malignant lesions in the gate split: other patients may give quite other figures."]
            if few < _FEW_MALIGNANT
            else []
        ),
        *(f"- {note}" for note in dict.fromkeys(notes)),
        "- Measured on the data set above. Other cameras, clinics, skin tones and body sites can do worse.",
        "- Risks are for the shares above, which may differ from yours.",
        "- The operating threshold was chosen for sensitivity on out-of-fold predictions; misses still happen.",
        "- A lesion of a class outside the list above gets the probabilities of the listed ones.",
        "",
        "## How it was made",
        "",
        f"- {network if has_image else 'boosted trees on metadata alone, no network'}",
        f"- code {manifest.git_commit}, created {manifest.created_at}",
        "- resolved training config: `training` in `manifest.json`",
        "",
    ]
    return "\n".join(lines)
