"""The running service while its model changes: what it serves, and whether every replica can serve the next model.

A replica whose `reconfigure` fails keeps its model, but the other nodes would already have the new one. So every
replica loads it first, beside the one it serves (`prepare`); the switch that follows takes a moment, and hardly fails.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_jobs.job import say
from serve.settings import APP_NAME, ModelReference, ServeSettings
from serve.shadow_settings import ShadowReference

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

# The cheapest to load first.
MODEL_NODES = ("Ingress", "MetadataFusion", "ImageScorer")
# For answers that need no loading.
_ANSWER_S = 10.0


@dataclass(frozen=True)
class Deployed:
    """What a service runs with."""

    settings: ServeSettings
    model: ModelReference
    shadow: ShadowReference | None = None

    def told(self) -> dict[str, Any]:
        """As an ingress replica says it."""
        return {
            "settings": self.settings.model_dump(),
            "model": self.model.model_dump(),
            "shadow": None if self.shadow is None else self.shadow.model_dump(),
        }


def _handle(node: str, method: str) -> DeploymentHandle:
    from ray import serve

    handle = serve.get_deployment_handle(node, APP_NAME)
    if not handle.is_initialized:
        # In Serve's throughput mode handles expect an event loop around them, which a job has not.
        handle._init(_run_router_in_separate_loop=True)
    return handle.options(method_name=method, _by_reference=True)


def _ask_all(node: str, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
    """Answers of all running replicas of a node, among them exceptions; empty where it has none, scaled to zero."""
    from ray.serve.exceptions import DeploymentUnavailableError

    try:
        calls = _handle(node, method).broadcast(method, *arguments)
        return calls.results(timeout_s=timeout_s, return_exceptions=True)
    except DeploymentUnavailableError:
        return []


def _words(error: Exception) -> str:
    """One line of what a call to a replica raised."""
    from ray.exceptions import RayActorError

    if isinstance(error, RayActorError):
        return "a replica died before it answered"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:500] if lines else 'no message'}"


def running_service() -> Deployed | None:
    """What the service of this cluster runs with; None where there is none, or where it cannot be put back, because it
    does not say, or is of a release with other settings: a warning then tells so before anything changes.

    All ingress replicas are asked at once and one answer is enough. A call through a handle would be turned away by
    full replicas for as long as the service is overloaded; these calls stand in line behind what was there before.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return None
    try:
        return _read(_ask_all("Ingress", "deployed", timeout_s=_ANSWER_S))
    except (RayError, RayServeException, TimeoutError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if type(error) is ValueError else _words(error)
        say(
            f"warning: the service that is there ({application.status.value}) does not say what it serves ({reason}); "
            "if this deploy fails, there is nothing to put back"
        )
        return None


def _read(answers: list[Any]) -> Deployed:
    """What the ingress replicas run with, by their answers to `deployed`, some of which may be exceptions."""
    told = [answer for answer in answers if not isinstance(answer, Exception)]
    if not told:
        raise ValueError(_words(answers[0]) if answers else "no replica of its HTTP node runs")
    if any(answer != told[0] for answer in told):
        raise ValueError("its HTTP node's replicas differ in model or settings")
    found = told[0]
    deployed = Deployed(
        ServeSettings.model_validate(found["settings"]),
        ModelReference.model_validate(found["model"]),
        None if found["shadow"] is None else ShadowReference.model_validate(found["shadow"]),
    )
    if deployed.told() != found:
        # Its replicas would refuse the fields that they do not know.
        raise ValueError("it is of a release with other settings")
    return deployed


def kept_model() -> ModelReference | None:
    """The model that a replica of the service kept when it refused another one at the switch; None where none did.

    Whoever ordered that switch puts the old model back. Where a replica still says this, nobody has: the nodes' models
    differ, and all requests are told to come later.
    """
    for node in MODEL_NODES:
        for state in _states(node):
            if not isinstance(state, Exception) and state["refused"] is not None:
                return ModelReference.model_validate(state["model"])
    return None


def _states(node: str) -> list[Any]:
    """What the replicas of a node say of their models; empty also where not all answer in time."""
    try:
        return _ask_all(node, "model_state", timeout_s=_ANSWER_S)
    except TimeoutError:
        return []


def prepare_replicas(model: ModelReference, timeout_s: float) -> None:
    """Has every replica load a model beside the one that it serves; when one cannot, none keeps it.

    Raises:
        ValueError: which node cannot, and why; the service is as it was.
    """
    try:
        deadline = time.monotonic() + timeout_s
        for node in MODEL_NODES:
            reason = _prepare_node(node, model, deadline)
            if reason is not None:
                raise ValueError(f"{node}: {reason}")
    except BaseException:
        drop_prepared()
        raise


def _prepare_node(node: str, model: ModelReference, deadline: float) -> str | None:
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    config, started = model.model_dump(), time.monotonic()
    try:
        # A call of one replica first: it wakes a scorer that scaled to zero, where a broadcast finds nobody.
        answers = [_handle(node, "prepare").remote(config).result(timeout_s=max(0.0, deadline - started))]
        if answers == [None]:
            answers = _ask_all(node, "prepare", config, timeout_s=max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return f"the bundle was not loaded within {time.monotonic() - started:.0f} s"
    except (RayError, RayServeException) as error:
        return _words(error)
    failed = [answer for answer in answers if answer is not None]
    if not failed:
        return None
    return _words(failed[0]) if isinstance(failed[0], Exception) else failed[0]


def drop_prepared() -> None:
    """Has every replica free what `prepare_replicas` had it load."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    for node in MODEL_NODES:
        try:
            _ask_all(node, "drop_prepared", timeout_s=_ANSWER_S)
        except (RayError, RayServeException, TimeoutError) as error:
            say(f"{node} may hold the new model beside the old one for some minutes: {_words(error)}")


def all_replicas_hold(model: ModelReference) -> bool:
    """Whether every running replica serves this model.

    Raises:
        ValueError: a replica refused it and kept its old one.
    """
    wanted, held = model.model_dump(), True
    for node in MODEL_NODES:
        try:
            states = _ask_all(node, "model_state", timeout_s=_ANSWER_S)
        except TimeoutError:
            return False
        for state in states:
            if isinstance(state, Exception):
                held = False  # it died, or a replica of the release before is about to go
            elif state["refused"] is not None and state["refused"]["model"] == wanted:
                raise ValueError(f"{node}: {state['refused']['reason']}")
            else:
                held = held and state["model"] == wanted
    return held
