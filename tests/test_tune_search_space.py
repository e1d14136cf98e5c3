"""The search space is checked before the first trial, and overrides reach the config they name."""

import pytest
from pydantic import TypeAdapter, ValidationError

from modeling.schema import TaskSpec
from training.config import TrainingConfig
from tune.search_space import SearchSpace, check_space, to_ray, with_overrides

TASK = TaskSpec(
    name="spots",
    fold_group="patient_id",
    label_column="target",
    classes=["benign", "malignant"],
    malignant=["malignant"],
)


def space(**fields):
    return TypeAdapter(SearchSpace).validate_python({name.replace("__", "."): value for name, value in fields.items()})


def test_overrides_reach_nested_fields_and_leave_the_rest():
    base = TrainingConfig()
    changed = with_overrides(base, {"optimizer.learning_rate": 0.002, "sampling.class_balance": 1.0})
    assert changed.optimizer.learning_rate == 0.002 and changed.sampling.class_balance == 1.0
    assert changed.model == base.model and base.optimizer.learning_rate != 0.002


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer__speed": {"kind": "uniform", "low": 0, "high": 1}}, "'optimizer.speed' is not a training field"),
        ({"model__input_size": {"kind": "choice", "values": [64, 8]}}, "greater than or equal to 32"),
        ({"optimizer__learning_rate": {"kind": "uniform", "low": 0.1, "high": 7}}, "less than or equal to 1"),
        ({"optimizer__malignant_weight": {"kind": "choice", "values": [0, 1]}}, "task spots has two classes"),
    ],
)
def test_a_space_that_leaves_the_config_is_refused_before_any_trial(fields, message):
    with pytest.raises(ValueError, match=message):
        check_space(space(**fields), TrainingConfig(), TASK)


@pytest.mark.parametrize("bounds", [{"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True}])
def test_bounds_are_ordered(bounds):
    with pytest.raises(ValidationError, match="expected low < high"):
        space(optimizer__learning_rate={"kind": "uniform", **bounds})


def test_samples_stay_inside_the_space():
    fields = to_ray(
        space(
            optimizer__learning_rate={"kind": "uniform", "low": 1e-4, "high": 1e-2, "log": True},
            model__input_size={"kind": "choice", "values": [64, 96]},
        )
    )
    for _ in range(20):
        assert 1e-4 <= fields["optimizer.learning_rate"].sample() <= 1e-2
        assert fields["model.input_size"].sample() in (64, 96)
