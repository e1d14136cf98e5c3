"""The only door to MLflow: candidates, the champion alias, and the history of promotions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modeling.bundle import load_bundle
from modeling.mlflow_runs import MlflowRuns

CHAMPION = "champion"
CANDIDATE = "candidate"
_EVENT = "promotion."
_HINTS = {
    CHAMPION: "promote one with python -m ray_jobs.promote_model --approver NAME",
    CANDIDATE: "train one with python -m ray_jobs.train_model",
}


@dataclass(frozen=True)
class ModelVersion:
    """A registered model: `uri` and `digest` are what `load_bundle` takes.

    A bundle that was given by path has an empty `version` and `run_id`.
    """

    version: str
    uri: str
    digest: str
    run_id: str


class Registry(MlflowRuns):
    """Model versions and the champion of one model name.

    Every promotion and rollback is kept as a tag `promotion.<number>` of the registered model, written before the
    alias moves: after a crash in between, the same call finishes the job.
    """

    def log_candidate(
        self,
        bundle_dir: str | Path,
        run_name: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        artifacts_dir: str | Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> ModelVersion:
        """Copies a bundle (and a report folder) beside a new run, registers it and points `candidate` at it.

        Raises:
            ValueError: the bundle does not verify, before or after the copy.
        """
        from mlflow.exceptions import MlflowException

        bundle = load_bundle(bundle_dir)
        run_id = self.start_parent(run_name, params, tags)
        status = "FAILED"
        try:
            self.log_metrics(run_id, metrics)
            self.client.log_artifacts(run_id, str(bundle.directory), "bundle")
            if artifacts_dir is not None:
                self.client.log_artifacts(run_id, str(artifacts_dir), "report")
            uri = f"{self.client.get_run(run_id).info.artifact_uri}/bundle"
            load_bundle(uri, bundle.digest)
            with self.exclusive():
                try:
                    self.client.get_registered_model(self.model_name)
                except MlflowException:
                    self.client.create_registered_model(self.model_name)
                created = self.client.create_model_version(
                    self.model_name,
                    source=uri,
                    run_id=run_id,
                    tags={
                        **(tags or {}),
                        "bundle_digest": bundle.digest,
                        "dataset_digest": bundle.manifest.dataset_digest,
                        "synthetic": str(bundle.task.synthetic).lower(),
                    },
                )
                self.client.set_registered_model_alias(self.model_name, CANDIDATE, created.version)
            status = "FINISHED"
        finally:
            self.finish(run_id, status)
        return ModelVersion(str(created.version), uri, bundle.digest, run_id)

    def adopt_candidate(self, run_name: str) -> ModelVersion | None:
        """The version that a training run of this name registered, or None. Where the process was cut off before
        `candidate` pointed at it, it does now, unless a later version has the alias."""
        if self._registered() is None:
            return None
        for found in self.client.search_model_versions(f"name = '{self.model_name}'"):
            if found.run_id and self.client.get_run(found.run_id).info.run_name == run_name:
                break
        else:
            return None
        with self.exclusive():
            current = self._aliases().get(CANDIDATE)
            if current is None or int(current) < int(found.version):
                self.client.set_registered_model_alias(self.model_name, CANDIDATE, found.version)
        return self.resolve(str(found.version))

    def resolve(self, ref: str) -> ModelVersion:
        """The version behind an alias ("champion", "candidate") or a version number.

        Raises:
            ValueError: no such alias or version; says how to get one.
        """
        found = self.find(ref)
        if found is not None:
            return found
        what = f"version {ref}" if ref.isdecimal() else ref
        hint = f"; {_HINTS[ref]}" if ref in _HINTS else ""
        raise ValueError(f"no {what} registered for model {self.model_name!r} in {self.tracking_uri}{hint}")

    def find(self, ref: str) -> ModelVersion | None:
        """As `resolve`, but None where there is no such alias or version."""
        version = ref if ref.isdecimal() else self._aliases().get(ref)
        return None if version is None else self._version(version)

    def log_artifact_file(self, version: ModelVersion | str, path: str | Path, artifact_path: str) -> str:
        """Copies a file into folder `artifact_path` of the version's run; returns the copy's URI."""
        found = version if isinstance(version, ModelVersion) else self.resolve(version)
        self.client.log_artifact(found.run_id, str(path), artifact_path)
        return f"{self.client.get_run(found.run_id).info.artifact_uri}/{artifact_path}/{Path(path).name}"

    def _exists(self) -> bool:
        # Looking for a model must not leave an empty database behind where the URI is mistyped.
        return self._database is None or self._database.exists()

    def _registered(self) -> Any:
        if not self._exists():
            return None
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _aliases(self) -> dict[str, str]:
        registered = self._registered()
        return {} if registered is None else {alias: str(version) for alias, version in registered.aliases.items()}

    def _version(self, version: str) -> ModelVersion | None:
        if not self._exists():
            return None
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version(self.model_name, version)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return ModelVersion(str(found.version), found.source, found.tags.get("bundle_digest", ""), found.run_id)

    def history(self) -> list[dict[str, Any]]:
        """Promotions and rollbacks, oldest first: event, action, version, previous, approver, reason, at, gate."""
        registered = self._registered()
        tags = {} if registered is None else registered.tags
        return [json.loads(tags[name]) for name in sorted(tags) if name.startswith(_EVENT)]

    def promote(self, version: str, approver: str, reason: str, gate: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a version the champion and records who decided it, why, and what the gate said.

        Args:
            gate: the gate's verdict as JSON; `passed` must be true.

        Returns:
            The history's event, plus `changed`: False when the version already was the champion.

        Raises:
            ValueError: blank approver, a gate that was not passed, or no such version.
        """
        if gate.get("passed") is not True:
            raise ValueError(f"version {version} did not pass the gate; it cannot be promoted")
        target = self.resolve(version)
        return self._move_champion("promote", target.version, approver, reason, dict(gate))

    def previous_champion(self) -> ModelVersion:
        """What `rollback` would return to; ValueError where there is none."""
        champion = self.resolve(CHAMPION).version
        events = self.history()
        if events and (events[-1]["action"], events[-1]["previous"]) == ("rollback", champion):
            # Cut off between the record and the alias.
            return self.resolve(events[-1]["version"])
        earlier: list[str | None] = []
        for event in events:
            if event["action"] == "promote":
                earlier.append(event["previous"])
            elif earlier:
                earlier.pop()
        while earlier and earlier[-1] == champion:
            earlier.pop()
        if not earlier or earlier[-1] is None:
            raise ValueError(f"version {champion} of model {self.model_name!r} has no earlier champion to roll back to")
        return self.resolve(earlier[-1])

    def rollback(self, approver: str, reason: str, leaving: str | None = None) -> dict[str, Any]:
        """Makes the previous champion the champion again; returns the event as `promote` does.

        Rolling back twice goes back by two promotions, except with `leaving`.

        Args:
            leaving: version of the champion to leave; where another process just did, nothing changes.

        Raises:
            ValueError: blank approver, no champion, none before it, or another champion than `leaving`.
        """
        return self._move_champion("rollback", self.previous_champion().version, approver, reason, {}, leaving)

    def _move_champion(
        self, action: str, version: str, approver: str, reason: str, gate: dict, leaving: str | None = None
    ) -> dict[str, Any]:
        if not approver.strip():
            raise ValueError("approver is blank; expected the name of the person who approves")
        client = self.client
        with self.exclusive():
            current = self._aliases().get(CHAMPION)
            history = self.history()
            last = history[-1] if history else {}
            if leaving not in (None, current) and (last.get("action"), last.get("previous")) == ("rollback", leaving):
                return {**last, "changed": False}
            if current == version and leaving in (None, current):
                return {**(last if last.get("version") == version else {"version": version}), "changed": False}
            if leaving not in (None, current):
                raise ValueError(f"the champion of model {self.model_name!r} became version {current} meanwhile")
            event = last
            # An equal last event whose alias never moved was cut off; it is finished, not repeated.
            if (last.get("action"), last.get("version"), last.get("previous")) != (action, version, current):
                event = {
                    "event": len(history) + 1,
                    "action": action,
                    "version": version,
                    "previous": current,
                    "approver": approver.strip(),
                    "reason": reason,
                    "at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "gate": gate,
                }
                client.set_registered_model_tag(self.model_name, f"{_EVENT}{event['event']:06d}", json.dumps(event))
            for name in ("approver", "reason", "at", "gate"):
                text = event[name] if isinstance(event[name], str) else json.dumps(event[name])
                client.set_model_version_tag(self.model_name, version, f"{action}.{name}", text)
            client.set_registered_model_alias(self.model_name, CHAMPION, version)
        return {**event, "changed": True}


def find_model(ref: str, tracking_uri: str, model_name: str, artifact_root: str) -> ModelVersion:
    """The model a job's `--model` means: an alias, a version number, or the path or URL of a bundle.

    A relative path starts from the working directory or, as in a submitted job, from DERMRAY_HOME.

    Raises:
        ValueError: nothing of that name, or a bundle that does not verify.
    """
    if "://" in ref:
        return ModelVersion("", ref, load_bundle(ref).digest, "")
    for base in (Path.cwd(), Path(os.environ.get("DERMRAY_HOME", "."))):
        if (base / ref).is_dir():
            return ModelVersion("", str((base / ref).absolute()), load_bundle(base / ref).digest, "")
    if "/" in ref:
        raise ValueError(f"model = {ref!r}: no such bundle directory")
    return Registry(tracking_uri, model_name, artifact_root).resolve(ref)
