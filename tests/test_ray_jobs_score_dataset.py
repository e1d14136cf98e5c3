"""The job on a real cluster: what it writes, which rows it lists as not to be trusted, and that a killed run goes on
instead of scoring a row twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pandas as pd
import pytest

from modeling.bundle import load_bundle
from ray_jobs.job import REPO_ROOT
from serve.image_scorer import ImageScorerLogic
from serve.lesion import prepare
from serve.settings import ModelReference, UploadLimits
from tests.bundle_factory import blank_image, lesion_image, lesion_rule
from tests.tiny_bundle import SIZE, tiny_bundle

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
NUM_ROWS = 16_000
# Every 16th picture shows no lesion.
PICTURES = [lesion_image(seed) for seed in range(60)]
for _position, _grey in ((3, 0), (19, 255), (35, 70), (51, 128)):
    PICTURES.insert(_position, blank_image(_grey))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """16,000 pictures with metadata; one is broken, one row has no picture, one an impossible age."""
    folder = tmp_path_factory.mktemp("scoring")
    tiny_bundle(folder / "bundle", contexts=["image_only", "none"], abstention=lesion_rule())
    rng = np.random.default_rng(0)
    with h5py.File(folder / "images.hdf5", "w") as file:
        for number in range(NUM_ROWS - 1):
            file[f"ISIC_{number:07d}"] = np.void(b"broken" if number == 77 else PICTURES[number % 64])
    table = pd.DataFrame(
        {
            "isic_id": [f"ISIC_{number:07d}" for number in range(NUM_ROWS)],
            "age_approx": rng.integers(20, 80, NUM_ROWS),
            "sex": rng.choice(["male", "female"], NUM_ROWS),
        }
    )
    table.loc[5, "age_approx"] = 300
    table.to_csv(folder / "metadata.csv", index=False)
    return folder


def command(inputs, out):
    files = ["--images", f"{inputs}/images.hdf5", "--metadata", f"{inputs}/metadata.csv", "--out", str(out)]
    return [sys.executable, "-m", "ray_jobs.score_dataset", "--model", f"{inputs}/bundle", *files]


def environment(ray_cluster, home):
    return os.environ | ray_cluster.client_environment() | {"DERMRAY_HOME": str(home), "PYTHONPATH": str(REPO_ROOT)}


def score(inputs, out, ray_cluster):
    done = subprocess.run(
        command(inputs, out),
        cwd=REPO_ROOT,
        env=environment(ray_cluster, out.parent),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def refused_by_the_service(bundle):
    """Ids of the table's scored rows -> reason codes, from the service's own parts."""
    reference = ModelReference(bundle_uri=str(bundle.directory), sha256=bundle.digest, version="1")
    scorer, rule = ImageScorerLogic(reference, max_batch_size=1), bundle.abstention()
    reasons = []
    for data in PICTURES:
        image = prepare(data, SIZE, UploadLimits())
        (found,) = rule.refusals(image.quality, scorer.score(image.pixels[None]).distances)
        reasons.append(" ".join(refusal.reason for refusal in found))
    rows = set(range(NUM_ROWS - 1)) - {5, 77}
    return {f"ISIC_{row:07d}": reasons[row % 64] for row in sorted(rows) if reasons[row % 64]}


def mark_a_kept_row(part):
    """Says of one row in a kept part that it was abstained from, as no rule says it."""
    with np.load(part) as kept:
        arrays = dict(kept)
    abstained = json.loads(str(arrays["abstained"]))
    row = next(int(row) for row in arrays["row"] if str(row) not in abstained)
    np.savez(part, **arrays | {"abstained": json.dumps(abstained | {row: ["kept", "by the first attempt"]})})


@pytest.mark.slow
def test_a_killed_run_goes_on_and_writes_what_an_unbroken_one_writes(ray_cluster, inputs, tmp_path):
    whole, _ = score(inputs, tmp_path / "whole.csv", ray_cluster)
    assert (whole["rows"], whole["quarantined"]) == (NUM_ROWS - 3, 3)
    quarantine = pd.read_csv(tmp_path / "whole.quarantine.csv").set_index("id")["reason"].to_dict()
    assert quarantine == {
        "ISIC_0000005": "out_of_range",
        "ISIC_0000077": "undecodable",
        f"ISIC_{NUM_ROWS - 1:07d}": "image_missing",
    }

    listed = pd.read_csv(tmp_path / "whole.abstained.csv")
    refused = refused_by_the_service(load_bundle(inputs / "bundle"))
    assert listed.set_index("id")["reasons"].to_dict() == refused and len(refused) == whole["abstained"] >= 4 * 249

    out = tmp_path / "resumed.parquet"
    process = subprocess.Popen(
        command(inputs, out), cwd=REPO_ROOT, env=environment(ray_cluster, tmp_path), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob(".resumed.parquet.parts-*/scores-*.npz")):
        assert process.poll() is None and time.monotonic() < deadline, "no part was written"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    parts = sorted(tmp_path.glob(".resumed.parquet.parts-*/scores-*.npz"))
    kept = sum(len(np.load(part)["row"]) for part in parts)
    mark_a_kept_row(parts[0])
    resumed, said = score(inputs, out, ray_cluster)
    (earlier, total) = map(int, re.search(r"(\d+) of (\d+) images were scored by an earlier attempt", said).groups())
    assert earlier == kept and 0 < earlier < total == NUM_ROWS - 2
    # The mark is there: kept rows came from their part and were not scored again.
    lists = pd.read_csv(tmp_path / "resumed.abstained.csv")
    assert (lists["reasons"] == "kept").sum() == 1
    pd.testing.assert_frame_equal(lists[lists["reasons"] != "kept"].reset_index(drop=True), listed)
    same = {"seconds": 0, "out": "", "abstained": len(listed) + 1}
    assert resumed | same == whole | same and resumed["abstained"] == len(listed) + 1
    first, second = pd.read_csv(tmp_path / "whole.csv"), pd.read_parquet(out)
    assert second["isic_id"].is_unique and first["isic_id"].tolist() == second["isic_id"].tolist()
    assert np.allclose(first["target"], second["target"], atol=1e-6)
    assert first["target"].nunique() > 50
    assert not list(tmp_path.glob(".*.parts-*"))


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--images", "/nowhere/x.hdf5", "images file /nowhere/x.hdf5 does not exist"),
        ("--out", "scores.txt", "expected a name ending in .csv or .parquet"),
        ("--model", "/nowhere/bundle", "/nowhere/bundle"),
        ("--context", "patient", "context = 'patient': the model has ['image_only', 'none']"),
    ],
)
def test_a_users_mistake_is_one_line_before_anything_starts(inputs, tmp_path, flag, value, says, dermray_home):
    done = subprocess.run(
        [*command(inputs, tmp_path / "x.csv"), flag, value],
        cwd=tmp_path,
        # Nothing listens there: a job that asked for a cluster would end with another message.
        env=os.environ | {"PYTHONPATH": str(REPO_ROOT), "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("score_dataset: error:") and says in done.stderr.splitlines()[-1]
