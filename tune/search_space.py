"""The search space as data: dotted training fields to distributions, checked before the first trial starts."""

from __future__ import annotations

import itertools
import json
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

    @property
    def ends(self) -> list[Any]:
        return [self.low, self.high]

    @property
    def tried(self) -> list[Any]:
        """The ends, and a value between them that is hardly ever a whole number."""
        share = 0.381966
        inner = self.low * (self.high / self.low) ** share if self.log else self.low + share * (self.high - self.low)
        return [*self.ends, inner]


class Integer(BaseModel):
    """A whole number in low, low + step, ..., high; `log` draws uniformly in the logarithm."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["integer"]
    low: int
    high: int
    step: int = Field(1, ge=1)
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Integer:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low = {self.low}, high = {self.high}: expected low < high, and low > 0 with log")
        if (self.high - self.low) % self.step or (self.log and self.step > 1):
            raise ValueError(f"step = {self.step}: expected a divisor of high - low, and 1 with log")
        return self

    @property
    def ends(self) -> list[Any]:
        return [self.low, self.high]

    @property
    def tried(self) -> list[Any]:
        return self.ends


class Choice(BaseModel):
    """One of the listed values. A mapping sets several fields of its section together, as backbone and weights do."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["choice"]
    values: list[Any] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Choice:
        if len({json.dumps(label(value)) for value in self.values}) < len(self.values):
            raise ValueError("a value is listed twice")
        return self

    @property
    def ends(self) -> list[Any]:
        return self.values

    @property
    def tried(self) -> list[Any]:
        return self.values

    @property
    def labels(self) -> list[Any]:
        return [label(value) for value in self.values]


Distribution = Annotated[Uniform | Integer | Choice, Field(discriminator="kind")]
SearchSpace = dict[str, Distribution]


def label(value: Any) -> Any:
    """What stands for a choice in Optuna, MLflow and progress lines: scalars themselves, a mapping as "a=1, b=2"."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={label(inner)}" for name, inner in value.items())
    return json.dumps(value) if isinstance(value, list) else value


def _leaves(dotted: str, value: Any) -> dict[str, Any]:
    """The dotted fields that a value sets."""
    if not isinstance(value, dict):
        return {dotted: value}
    return {field: leaf for name, inner in value.items() for field, leaf in _leaves(f"{dotted}.{name}", inner).items()}


def with_overrides(config: TrainingConfig, overrides: dict[str, Any]) -> TrainingConfig:
    """The config with dotted fields replaced, validated anew. A mapping replaces the fields it names in its section.

    Raises:
        ValueError: a field that does not exist or a value out of its range.
    """
    values = config.model_dump()
    for dotted, value in overrides.items():
        for field, leaf in _leaves(dotted, value).items():
            *path, last = field.split(".")
            target: Any = values
            for name in path:
                target = target.get(name) if isinstance(target, dict) else None
            if not isinstance(target, dict) or last not in target:
                raise ValueError(f"search space field {field!r} is not a training field")
            if isinstance(target[last], dict):
                raise ValueError(f"search space field {field!r} is a section; expected values like {{field: value}}")
            target[last] = leaf
    return TrainingConfig.model_validate(values)


def trial_config(base: TrainingConfig, space: SearchSpace, sample: dict[str, Any]) -> TrainingConfig:
    """The training config of a trial.

    Args:
        sample: space field -> number or choice label, as Ray Tune hands it to the trial.
    """
    overrides = {}
    for dotted, value in sample.items():
        distribution = space[dotted]
        if isinstance(distribution, Choice):
            value = distribution.values[distribution.labels.index(value)]
        overrides[dotted] = value
    return with_overrides(base, overrides)


def check_space(space: SearchSpace, base: TrainingConfig, task: TaskSpec) -> None:
    """Tries both ends (of floats also a value between) or every choice of each field, and the ends of every pair,
    against the base config and the task.

    Raises:
        ValueError: naming the field and what is wrong with it.
    """
    setters: dict[str, str] = {}
    for dotted, distribution in space.items():
        if dotted.partition(".")[0] == "workers":
            raise ValueError(
                f"search space field {dotted!r}: a trial could hold more than the search has reserved for it; set it "
                f"for all trials by train_model.training.{dotted}"
            )
        for value in distribution.tried:
            with_overrides(base, {dotted: value}).check_task(task)
            for field in _leaves(dotted, value):
                if setters.setdefault(field, dotted) != dotted:
                    raise ValueError(f"search space fields {setters[field]!r} and {dotted!r} both set {field!r}")
    for (first, one), (second, other) in itertools.combinations(space.items(), 2):
        for pair in itertools.product(one.ends, other.ends):
            with_overrides(base, dict(zip((first, second), pair, strict=True)))


def networks(space: SearchSpace, base: TrainingConfig) -> list[TrainingConfig]:
    """The base config with every network that a trial can draw: each combination of what touches `model`."""
    named = {dotted: drawn.ends for dotted, drawn in space.items() if dotted.split(".")[0] == "model"}
    return [
        with_overrides(base, dict(zip(named, values, strict=True))) for values in itertools.product(*named.values())
    ]


def to_ray(space: SearchSpace) -> dict[str, Any]:
    """Ray Tune's own distributions, which its Optuna searcher converts. Choices are drawn by their labels."""
    from ray import tune

    converted: dict[str, Any] = {}
    for dotted, distribution in space.items():
        if isinstance(distribution, Choice):
            converted[dotted] = tune.choice(distribution.labels)
        elif isinstance(distribution, Uniform):
            draw = tune.loguniform if distribution.log else tune.uniform
            converted[dotted] = draw(distribution.low, distribution.high)
        elif distribution.step > 1:
            converted[dotted] = tune.qrandint(distribution.low, distribution.high, distribution.step)
        else:
            # Their upper bound is exclusive.
            draw = tune.lograndint if distribution.log else tune.randint
            converted[dotted] = draw(distribution.low, distribution.high + 1)
    return converted
