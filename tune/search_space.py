"""The search space as data: dotted training fields to distributions, checked before the first trial starts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modeling.schema import TaskSpec
from training.config import TrainingConfig


class Uniform(BaseModel):
    """A float in [low, high]; `log` draws uniformly in the logarithm."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["uniform"]
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low = {self.low}, high = {self.high}: expected low < high, and low > 0 with log")
        return self


class Choice(BaseModel):
    """One of the listed values."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["choice"]
    values: list[Any] = Field(min_length=1)


Distribution = Annotated[Uniform | Choice, Field(discriminator="kind")]
SearchSpace = dict[str, Distribution]


def with_overrides(config: TrainingConfig, overrides: dict[str, Any]) -> TrainingConfig:
    """The config with dotted fields replaced, validated anew.

    Raises:
        ValueError: a field that does not exist or a value out of its range.
    """
    values = config.model_dump()
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        target = values
        for name in path:
            if not isinstance(target.get(name), dict):
                raise ValueError(f"search space field {dotted!r} is not a training field")
            target = target[name]
        if last not in target:
            raise ValueError(f"search space field {dotted!r} is not a training field")
        target[last] = value
    return TrainingConfig.model_validate(values)


def check_space(space: SearchSpace, base: TrainingConfig, task: TaskSpec) -> None:
    """Tries both ends or every choice of each field against the base config and the task.

    Raises:
        ValueError: naming the field and what is wrong with it.
    """
    for dotted, distribution in space.items():
        ends = [distribution.low, distribution.high] if isinstance(distribution, Uniform) else distribution.values
        for value in ends:
            with_overrides(base, {dotted: value}).check_task(task)


def to_ray(space: SearchSpace) -> dict[str, Any]:
    """Ray Tune's own distributions, which its Optuna searcher converts."""
    from ray import tune

    converted: dict[str, Any] = {}
    for dotted, distribution in space.items():
        if isinstance(distribution, Choice):
            converted[dotted] = tune.choice(distribution.values)
        elif distribution.log:
            converted[dotted] = tune.loguniform(distribution.low, distribution.high)
        else:
            converted[dotted] = tune.uniform(distribution.low, distribution.high)
    return converted
