"""Brings what shall be served into Serve, waits until it answers, and puts back what was there when it does not."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray_jobs.job import say
from ray_jobs.model_swap import Deployed, all_replicas_hold, drop_prepared, kept_model, prepare_replicas
from serve.settings import APP_NAME, ServeSettings
from serve.shadow_settings import ShadowReference

_POLL_S = 0.3
_EXCEPTION = re.compile(r"^\s*((?:[\w.]+(?:Error|Exception)): .+)$", re.MULTILINE)


class Rollout:
    """One deploy.

    Args:
        url: where the service answers.
        ready_timeout_s: how long an application may take until it does.
    """

    def __init__(self, url: str, ready_timeout_s: float):
        self.url = url
        self.ready_timeout_s = ready_timeout_s

    def model_card(self) -> dict[str, Any] | None:
        """What /v1/model says; None while there is no answer."""
        return _get(f"{self.url}/v1/model")

    def finish_putting_back(self, running: Deployed) -> Deployed:
        """Puts back what a deploy that was killed left undone: its model was refused, and nobody took it away again.

        Returns:
            What runs now; as given where there was nothing to put back, or it could not be: the next deploy decides.
        """
        kept = kept_model()
        if kept is None:
            return running
        before = replace(running, model=kept)
        say(f"a deploy ended before it put back version {kept.version}, which a node kept; putting it back")
        try:
            self._deploy(before)
        except ValueError as error:
            say(f"version {kept.version} is not put back: {error}")
            return running
        return before

    def start_shadow(self, settings: ServeSettings, shadow: ShadowReference, previous: Deployed | None) -> None:
        """Starts a shadow beside what runs; one that does not start is taken away again, or gets back what it had.

        Raises:
            ValueError: why it does not run; the service was not touched.
        """
        from serve.shadow_model import run_shadow

        say(f"starting shadow {shadow.model.version} from {shadow.model.bundle_uri}")
        run_shadow(settings, shadow)
        try:
            self._wait_until_running(shadow.app_name, "the shadow")
        except ValueError:
            _take_back_shadow(shadow, previous)
            raise

    def deploy_or_put_back(
        self, wanted: Deployed, previous: Deployed | None, upgrade_store: Callable[[], bool]
    ) -> None:
        """Deploys; a service that does not take the model, or the settings, gets back what it had. Shadows that are not
        wanted any more end.

        Args:
            upgrade_store: called when nothing is left that could refuse, and before the service changes; returns
                whether it made the store one that older releases do not open any more.

        Raises:
            ValueError: why nothing changed; or that what was there before could not be put back either.
        """
        model = wanted.model
        what = f"model version {model.version} from {model.bundle_uri}"
        # Replicas of another release may not know this bundle's format; they are replaced anyway.
        same_release = previous is not None and previous.settings.runtime_env == wanted.settings.runtime_env
        prepared = previous is not None and previous.model != model and same_release
        try:
            if prepared:
                say(f"{what}: loading it beside version {previous.model.version} on every replica")
                prepare_replicas(model, self.ready_timeout_s)
            upgraded = self._upgraded(upgrade_store, prepared)
        except ValueError as error:
            goes_on = "" if previous is None else f"; version {previous.model.version} goes on"
            _take_back_shadow(wanted.shadow, previous)
            raise ValueError(f"{what} is not served: {error}{goes_on}") from error
        say(f"deploying {what}")
        try:
            self._deploy(wanted)
        except ValueError as error:
            if previous is None or previous == wanted:
                if previous is None:
                    _end_shadows(but=None)
                raise
            say(f"{error}; putting back version {previous.model.version} and its settings")
            try:
                missing = self._put_back(previous, wanted.shadow)
            except ValueError as second:
                raise ValueError(
                    f"{what} is not served: {error}; putting back version {previous.model.version} failed too: {second}"
                ) from error
            if upgraded and not same_release:
                missing = f", but new replicas of its release cannot open the store, which was upgraded{missing}"
            raise ValueError(
                f"{what} is not served: {error}; version {previous.model.version} answers again{missing}"
            ) from error

    @staticmethod
    def _upgraded(upgrade_store: Callable[[], bool], prepared: bool) -> bool:
        try:
            return upgrade_store()
        except BaseException:
            if prepared:
                drop_prepared()
            raise

    def _put_back(self, previous: Deployed, started: ShadowReference | None) -> str:
        """Deploys what was there before; `started` is the failed deploy's shadow. Returns what is not as it was.

        Raises:
            ValueError: see `wait_until_ready`.
        """
        changed = started is not None and _same_app(started, previous.shadow)
        if changed:
            # First, since it may hold the room that the service's own nodes need.
            _take_back_shadow(started, previous)
        self._deploy(previous)
        if changed:
            try:
                self._wait_until_running(previous.shadow.app_name, "its shadow")
            except ValueError as error:
                return f", but {error}"
        return ""

    def _deploy(self, wanted: Deployed) -> None:
        from ray.serve.api import RunTarget, run_many

        from serve.app import build_app

        application = build_app(wanted.settings, wanted.model, wanted.shadow)
        run_many([RunTarget(application, name=APP_NAME, route_prefix="/")], wait_for_applications_running=False)
        self.wait_until_ready(wanted)
        # Only now: no ingress replica sends copies to the others any more.
        _end_shadows(but=wanted.shadow)

    def wait_until_ready(self, wanted: Deployed) -> None:
        """Returns once the service runs, every replica answers with this model, and this shadow gets its copies.

        Raises:
            ValueError: a deployment failed, a replica refused the model, or the service was not ready in time; with
                the reason, or the state of each deployment.
        """
        model, shadow = wanted.model, wanted.shadow
        expected = (model.sha256, model.version, None if shadow is None else shadow.model.sha256)

        def answers() -> bool:
            if not all_replicas_hold(model):
                return False
            ready = _get(f"{self.url}/readyz")
            card = self.model_card() if ready is not None and ready["status"] == "ok" else None
            if card is None:
                return False
            return (card["digest"], card["model_version"], (card["shadow"] or {}).get("digest")) == expected

        self._wait_until_running(APP_NAME, "the service", answers)

    def _wait_until_running(self, name: str, what: str, answers: Callable[[], bool] = lambda: True) -> None:
        """Returns once a Serve application runs and `answers`.

        Raises:
            ValueError: it failed, or took too long.
        """
        from ray import serve

        deadline = time.monotonic() + self.ready_timeout_s
        while True:
            application = serve.status().applications.get(name)
            if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ValueError(f"{what} did not start: {_reason(application, name)}")
            if application is not None and application.status == "RUNNING" and answers():
                return
            if time.monotonic() > deadline:
                state = "is not deployed"
                if application is not None:
                    state = f"is {application.status.value}: {_reason(application, name)}"
                raise ValueError(f"{what} was not ready in {self.ready_timeout_s:g} s; it {state}")
            time.sleep(_POLL_S)


def _take_back_shadow(started: ShadowReference | None, previous: Deployed | None) -> None:
    """Ends what `start_shadow` started; where it changed the shadow that the service had, of the same bundle, that gets
    its settings, its room and its release back. Returns before that runs."""
    from serve.shadow_model import delete_shadow, run_shadow

    if started is None:
        return
    if previous is not None and _same_app(started, previous.shadow):
        run_shadow(previous.settings, previous.shadow)
    else:
        delete_shadow(started.app_name)


def _same_app(shadow: ShadowReference, other: ShadowReference | None) -> bool:
    return other is not None and shadow.app_name == other.app_name


def _end_shadows(but: ShadowReference | None) -> None:
    from serve.shadow_model import delete_shadow, running_shadows

    for name in running_shadows():
        if but is None or name != but.app_name:
            delete_shadow(name)


def _get(url: str) -> dict[str, Any] | None:
    """The JSON behind a URL; None while there is none."""
    # No proxy: the address is this host's, whatever http_proxy says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as response:
            return json.load(response)
    except (OSError, http.client.HTTPException, json.JSONDecodeError):
        return None


def _reason(application: Any, name: str) -> str:
    """One line from Serve's messages, which hold whole tracebacks."""
    messages = {node: deployment.message for node, deployment in application.deployments.items() if deployment.message}
    parts = []
    for where, message in messages.items() or {name: application.message}.items():
        errors = _EXCEPTION.findall(message)
        parts.append(f"{where}: {errors[-1] if errors else ' '.join(message.split())[:500] or 'no message'}")
    return "; ".join(parts)
