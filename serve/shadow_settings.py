"""Shadow mode as it is configured: which challenger scores a copy of the traffic, how much of it, at what cost."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from serve.settings import APP_NAME, ModelReference

SHADOW_APP_PREFIX = f"{APP_NAME}-shadow-"


class ShadowSettings(BaseModel):
    """What the copies may cost. They travel in `user_config`, as models do: a change restarts no replica of the
    champion."""

    model_config = ConfigDict(extra="forbid")

    fraction: float = Field(1.0, ge=0, le=1, description="share of lesions that the shadow scores, by prediction id")
    max_bytes: int = Field(64 * 2**20, ge=2**20, description="copies that an ingress replica holds; others are dropped")
    max_wait_s: float = Field(5.0, gt=0, description="a copy that has waited longer for its turn is dropped")
    timeout_s: float = Field(10.0, gt=0, description="after it, a copy that is being scored has failed")
    concurrency: int = Field(16, ge=1, description="copies that one ingress replica has scored at a time")
    max_pause_s: float = Field(
        60.0, ge=1, description="copies are dropped for a second after a failure, twice as long after each, up to this"
    )
    num_cpus: float = Field(0.3, ge=0, description="what Ray reserves for the shadow's one replica")
    num_gpus: float = Field(0.0, ge=0)
    niceness: int = Field(10, ge=0, le=19, description="of the shadow's process: the champion gets the CPU first")


class ShadowReference(BaseModel):
    """Which model is the shadow."""

    model_config = ConfigDict(extra="forbid")

    model: ModelReference
    settings: ShadowSettings = Field(default_factory=ShadowSettings)

    @property
    def app_name(self) -> str:
        """The Serve application that holds the shadow: one per bundle, so that a new one starts beside the old one."""
        return SHADOW_APP_PREFIX + self.model.sha256[:12]


class ServedModels(BaseModel):
    """The `user_config` of the ingress."""

    model_config = ConfigDict(extra="forbid")

    champion: ModelReference
    shadow: ShadowReference | None = None
