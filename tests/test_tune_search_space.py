"""The search space is checked before the first trial, and overrides reach the config they name."""

import pytest
from pydantic import TypeAdapter, ValidationError

from modeling.schema import TaskSpec
from training.config import TrainingConfig
from tune.search_space import SearchSpace, check_space, networks, to_ray, trial_config, with_overrides

LITE = {"backbone": "tf_efficientnet_lite0", "weights": "package"}
SMALL = {"backbone": "mobilenetv3_small_100", "weights": "none"}

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
        ({"model": {"kind": "choice", "values": [{"backbon": "a"}]}}, "'model.backbon' is not a training field"),
        ({"model": {"kind": "choice", "values": ["resnet18"]}}, "'model' is a section"),
        (
            {
                "model": {"kind": "choice", "values": [LITE, {**SMALL, "input_size": 96}]},
                "model__input_size": {"kind": "integer", "low": 96, "high": 128, "step": 32},
            },
            "'model' and 'model.input_size' both set 'model.input_size'",
        ),
        # Each end is fine with the base; together they are not.
        (
            {
                "optimizer__batch_size": {"kind": "choice", "values": [16, 64]},
                "sampling__epoch_rows": {"kind": "integer", "low": 32, "high": 128},
            },
            "expected at least one batch per worker, 64",
        ),
        # Both ends are whole numbers, what is drawn between them is not.
        ({"optimizer__epochs": {"kind": "uniform", "low": 2, "high": 8}}, "got a number with a fractional part"),
        ({"optimizer__epochs": {"kind": "uniform", "low": 2, "high": 8, "log": True}}, "with a fractional part"),
        (
            {"workers__num_workers": {"kind": "integer", "low": 1, "high": 2}},
            "'workers.num_workers': a trial could hold",
        ),
        ({"workers": {"kind": "choice", "values": [{"use_gpu": False}]}}, "train_model.training.workers"),
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
            optimizer__epochs={"kind": "integer", "low": 2, "high": 3},
            optimizer__batch_size={"kind": "integer", "low": 32, "high": 96, "step": 32},
        )
    )
    for _ in range(20):
        assert 1e-4 <= fields["optimizer.learning_rate"].sample() <= 1e-2
        assert fields["model.input_size"].sample() in (64, 96)
    assert {fields["optimizer.epochs"].sample() for _ in range(40)} == {2, 3}
    assert {fields["optimizer.batch_size"].sample() for _ in range(80)} == {32, 64, 96}


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"low": 4, "high": 4}, "expected low < high"),
        ({"low": 32, "high": 100, "step": 32}, "expected a divisor of high - low"),
        ({"low": 0, "high": 8, "log": True}, "low > 0 with log"),
    ],
)
def test_whole_numbers_reach_both_bounds(bounds, message):
    with pytest.raises(ValidationError, match=message):
        space(optimizer__epochs={"kind": "integer", **bounds})


def test_a_value_listed_twice_is_refused():
    with pytest.raises(ValidationError, match="listed twice"):
        space(model={"kind": "choice", "values": [LITE, dict(LITE)]})


def test_backbone_and_weights_are_chosen_together():
    fields = space(
        model={"kind": "choice", "values": [LITE, SMALL]}, model__input_size={"kind": "choice", "values": [64, 96]}
    )
    base = TrainingConfig()
    label = to_ray(fields)["model"].categories[1]
    assert label == "backbone=mobilenetv3_small_100, weights=none"
    config = trial_config(base, fields, {"model": label, "model.input_size": 96})
    assert (config.model.backbone, config.model.weights) == ("mobilenetv3_small_100", "none")
    assert (config.model.input_size, config.model.dropout) == (96, base.model.dropout)
    drawn = [(drawn.model.backbone, drawn.model.weights, drawn.model.input_size) for drawn in networks(fields, base)]
    assert drawn == [(*values.values(), size) for values in (LITE, SMALL) for size in (64, 96)]
    apart = space(
        model__backbone={"kind": "choice", "values": ["a", "b"]}, model__weights={"kind": "choice", "values": ["none"]}
    )
    assert [drawn.model.backbone for drawn in networks(apart, base)] == ["a", "b"]
    assert networks({}, base) == [base]
