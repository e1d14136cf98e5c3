"""A data set without pictures: prepared, trained, gated and scored by the same jobs, with no Ray cluster started."""

import json

import numpy as np
import pandas as pd
import pytest
import ray

from data_pipelines.image_dataset import open_dataset
from data_pipelines.synthetic_metadata import build_metadata
from data_pipelines.synthetic_patients import draw_latents
from modeling.bundle import load_bundle
from modeling.metrics import roc_auc
from modeling.registry import Registry
from ray_jobs import deploy_service, export_engine, prepare_dataset, promote_model, score_dataset, train_model
from ray_jobs.job import REPO_ROOT, read_yaml
from store.candidates import find_candidate
from store.database import open_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("tabular")


@pytest.fixture(scope="module")
def metadata(home):
    rng = np.random.default_rng([0, 150])
    latents = draw_latents(150, 6.0, 0.15, rng)
    build_metadata(latents, rng, "0000").to_csv(home / "train-metadata.csv", index=False)
    return home / "train-metadata.csv"


@pytest.fixture(scope="module")
def prepared(home, metadata):
    task = read_yaml(REPO_ROOT / "configs/prepare_dataset.yaml")["task"]
    settings = {"images": None, "metadata": str(metadata), "out": str(home / "dataset"), "task": task, "num_folds": 3}
    return prepare_dataset.run(prepare_dataset.PrepareDatasetConfig(**settings, check=True))


def registry(home):
    return {
        "tracking_uri": f"sqlite:///{home}/mlflow.db",
        "artifact_root": str(home / "artifacts"),
        "model_name": "tabular",
    }


def train(home, prepared, run_name):
    return train_model.run(
        train_model.TrainModelConfig(
            dataset=prepared["dataset"],
            build={"num_bootstrap": 50},
            run_name=run_name,
            runs=str(home / "runs"),
            bundles=str(home / "bundles"),
            store_url=f"sqlite:///{home}/store.db",
            **registry(home),
        )
    )


@pytest.fixture(scope="module")
def trained(home, prepared):
    return train(home, prepared, "tabular")


def test_the_store_hears_of_the_candidate(home, trained):
    candidate = find_candidate(open_store(f"sqlite:///{home}/store.db", create=False), trained["model_version"])
    assert (candidate["digest"], candidate["state"]) == (trained["digest"], "candidate")
    assert candidate["gate_metrics"] == trained["gate"] and candidate["gate_metrics"]["none"]["auc"]["value"] > 0.5


def scoring(home, model, metadata, name="scores.csv", **other):
    settings = {"metadata": str(metadata), "out": str(home / name), "model": str(model), **registry(home), **other}
    return score_dataset.ScoreDatasetConfig(**settings)


def test_every_row_is_kept_and_the_digest_follows_the_table(home, metadata, prepared):
    version = open_dataset(prepared["dataset"])
    assert version.images_path is None and prepared["num_quarantined"] == 0
    assert len(version.lesions) == len(pd.read_csv(metadata))
    changed = pd.read_csv(metadata)
    changed.loc[0, "age_approx"] += 5
    changed.to_csv(home / "changed.csv", index=False)
    settings = {"images": None, "out": str(home / "other"), "task": version.task, "num_folds": 3}
    other = prepare_dataset.run(prepare_dataset.PrepareDatasetConfig(metadata=str(home / "changed.csv"), **settings))
    same = prepare_dataset.run(prepare_dataset.PrepareDatasetConfig(metadata=str(metadata), **settings))
    assert other["digest"] != prepared["digest"] == same["digest"]


def test_the_bundle_holds_no_network_and_says_so(trained):
    bundle = load_bundle(trained["bundle"])
    assert bundle.manifest.modalities == ["metadata"] and list(bundle.contexts) == ["none", "patient"]
    assert not list(bundle.directory.glob("*.onnx")) and not list(bundle.directory.glob("*.npz"))
    card = (bundle.directory / "model_card.md").read_text()
    assert "sees no image" in card and "boosted trees on metadata alone" in card and "0 x 0" not in card
    assert {"risk_none", "risk_patient"} <= set(bundle.reference()) and "image_score" not in bundle.reference()
    assert not ray.is_initialized()


def test_the_same_rows_and_seed_give_the_same_scores(home, prepared, trained):
    again = train(home, prepared, "again")
    for name in ("risk_none", "risk_patient"):
        scores = [load_bundle(result["bundle"]).reference()[name].to_numpy() for result in (trained, again)]
        assert np.abs(scores[0] - scores[1]).max() < 1e-6
    tables = [pd.read_parquet(f"{result['report']}/out_of_fold.parquet") for result in (trained, again)]
    version = open_dataset(prepared["dataset"])
    rows = version.lesions.iloc[version.training_positions]
    for table in tables:
        assert list(table.columns) == ["id", "fold", "label", "risk_none", "risk_patient"]
        assert (table["id"].to_numpy() == rows["id"].to_numpy()).all()
        assert ((table["label"] == "malignant") == (rows["label"].to_numpy() == 1)).all()
    for name in ("risk_none", "risk_patient"):
        assert np.abs(tables[0][name] - tables[1][name]).max() < 1e-6
    # They are the scores that the report was measured on.
    report = json.loads((home / "runs" / "tabular" / "report" / "evaluation.json").read_text())
    measured = roc_auc((tables[0]["label"] == "malignant").to_numpy(), tables[0]["risk_patient"].to_numpy())
    assert measured == pytest.approx(report["patient"]["out_of_fold"]["auc"]["value"])


def test_the_run_records_code_config_data_and_environment(home, prepared, trained):
    registered = Registry(**registry(home))
    run = registered.client.get_run(registered.resolve(trained["model_version"]).run_id)
    params = run.data.params
    assert params["dataset"] == prepared["digest"] and params["git_commit"] == train_model.git_commit() != "unknown"
    assert (params["seed"], params["build.num_bootstrap"]) == ("0", "50")
    assert [params[f"build.fusion.boosters.{kind}.num_leaves"] for kind in range(4)] == ["8", "8", "31", "31"]
    report = {item.path for item in registered.client.list_artifacts(run.info.run_id, "report")}
    assert {"report/environment.json", "report/out_of_fold.parquet", "report/evaluation.json"} <= report
    environment = json.loads((home / "runs" / "tabular" / "report" / "environment.json").read_text())
    assert environment["packages"]["lightgbm"] and environment["cpus"] >= 1
    manifest = load_bundle(trained["bundle"]).manifest
    assert manifest.git_commit == params["git_commit"] and manifest.training["build"]["num_bootstrap"] == 50


def test_scores_separate_cancers_and_need_no_pictures(home, metadata, trained):
    test_rows = pd.read_csv(metadata).drop(columns=["target", "lesion_id"])
    test_rows.loc[3, "age_approx"] = 300
    test_rows.to_csv(home / "test.csv", index=False)
    # A leftover --images is not looked at.
    result = score_dataset.run(scoring(home, trained["bundle"], home / "test.csv", images="/nowhere/x.hdf5"))
    assert (result["rows"], result["quarantined"], result["context"]) == (len(test_rows) - 1, 1, "patient")
    table = pd.read_csv(home / "scores.csv")
    assert list(table.columns) == ["isic_id", "target"]
    truth = pd.read_csv(metadata).set_index("isic_id")["target"].reindex(table["isic_id"]).to_numpy()
    assert roc_auc(truth, table["target"].to_numpy()) > 0.8
    assert not ray.is_initialized()


def test_a_lesion_alone_is_scored_by_the_context_without_its_patient(home, metadata, trained):
    single = pd.read_csv(metadata).head(20)
    single["patient_id"] = ""
    single.to_csv(home / "single.csv", index=False)
    assert (
        score_dataset.run(scoring(home, trained["bundle"], home / "single.csv", "single.csv.csv"))["context"] == "none"
    )


def test_rows_without_a_single_value_are_scored_near_the_prevalence(home, metadata, trained):
    task = load_bundle(trained["bundle"]).task
    empty = pd.read_csv(metadata).head(30)
    empty[list(task.columns)] = np.nan
    empty.to_csv(home / "empty.csv", index=False)
    result = score_dataset.run(scoring(home, trained["bundle"], home / "empty.csv", "empty.csv.csv"))
    assert (result["rows"], result["quarantined"]) == (30, 0)
    scores, share = pd.read_csv(home / "empty.csv.csv")["target"], pd.read_csv(metadata)["target"].mean()
    assert scores.between(0.3 * share, 3 * share).all()


def test_it_can_be_promoted_but_not_served(home, trained):
    settings = {"approver": "tester", "store_url": f"sqlite:///{home}/store.db", "engine_sets": str(home / "engines")}
    rules = {"min_malignant": 5, "min_auc": 0.6, "min_auc_low": 0.5, "min_sensitivity": 0.3}
    rules |= {"min_calibration_slope": 0.1, "max_calibration_slope": 10}
    candidate = Registry(**registry(home)).resolve("candidate")
    config = promote_model.PromoteModelConfig(rules=rules, reason="test", **settings, **registry(home))
    assert promote_model.run(config)["champion"] == candidate.version
    with pytest.raises(ValueError, match="has no image model"):
        export_engine.run(export_engine.ExportEngineConfig(model=trained["bundle"], **registry(home)))
    reference = deploy_service.resolve_model(
        deploy_service.DeployServiceConfig(bundle=trained["bundle"], engine_sets=str(home / "engines"))
    )
    with pytest.raises(ValueError, match="no image_only context; it cannot be served"):
        deploy_service.load_once(reference, deploy_service.ScorerSettings())


def test_a_model_of_pictures_asks_for_them(home, metadata, tmp_path):
    from tests.tiny_bundle import tiny_bundle

    tiny_bundle(tmp_path / "bundle", contexts=["image_only", "none"])
    with pytest.raises(ValueError, match="images is null"):
        score_dataset.run(scoring(home, tmp_path / "bundle", metadata))


def test_neither_pictures_nor_columns_is_an_error(home, metadata):
    task = read_yaml(REPO_ROOT / "configs/prepare_dataset.yaml")["task"] | {"columns": {}, "site_column": None}
    settings = {"images": None, "metadata": str(metadata), "out": str(home / "nothing"), "task": task, "num_folds": 3}
    with pytest.raises(ValueError, match="a model would see nothing"):
        prepare_dataset.run(prepare_dataset.PrepareDatasetConfig(**settings))


def test_the_report_is_written(trained, home):
    report = json.loads((home / "runs" / "tabular" / "report" / "evaluation.json").read_text())
    assert set(report) == {"none", "patient"} and report["patient"]["out_of_fold"]["auc"]["value"] > 0.7
    for name in ("evaluation.png", "clinical.png"):
        assert (home / "runs" / "tabular" / "report" / name).stat().st_size > 10_000


def test_a_retrained_model_is_compared_with_the_champion_on_the_gate_split(home, prepared, trained, tmp_path):
    store_url = f"sqlite:///{tmp_path}/store.db"
    rules = {"min_malignant": 5, "min_auc": 0.6, "min_auc_low": 0.5, "min_sensitivity": 0.3}
    rules |= {"min_calibration_slope": 0.1, "max_calibration_slope": 10, "min_subgroup_sensitivity": None}
    settings = {"rules": rules, "store_url": store_url, "engine_sets": str(tmp_path / "engines")}
    settings |= {"approver": "tester", "reason": "test", **registry(home) | {"model_name": "pairs"}}
    models = Registry(settings["tracking_uri"], "pairs", settings["artifact_root"])
    again = train(home, prepared, "twin")
    for number, bundle in enumerate((trained["bundle"], again["bundle"])):
        models.log_candidate(bundle, f"run-{number}", {}, {})
        result = promote_model.run(promote_model.PromoteModelConfig(dataset=str(home / "dataset"), **settings))
    assert (result["champion"], result["previous"], result["paired"]) == ("2", "1", True)
    rows = {(row["rule"], row["context"]): row for row in result["gate"]}
    for context in ("none", "patient"):
        # Trained twice alike: the same risks, so nothing lies between the models; and the bundle's figures hold here.
        assert rows["max_pauc_drop", context]["value"] == pytest.approx(0, abs=1e-6)
        assert rows["max_auc_mismatch", context]["value"] < 1e-6
    assert not ray.is_initialized()
