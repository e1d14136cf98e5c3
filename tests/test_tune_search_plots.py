"""The search's pictures for many and for hardly any trials, and what they and the table say."""

import cv2
import numpy as np
import pytest
from pydantic import TypeAdapter

from tune import search_importance
from tune.parallel_coordinates import plot_parallel_coordinates
from tune.search_importance import importances
from tune.search_ledger import SearchLedger
from tune.search_plots import trials_table, write_search_report
from tune.search_space import Choice, Integer, SearchSpace

SPACE = TypeAdapter(SearchSpace).validate_python(
    {
        "model": {"kind": "choice", "values": [{"backbone": "a_net", "weights": "none"}, {"backbone": "b"}]},
        "model.input_size": {"kind": "integer", "low": 96, "high": 160, "step": 32},
        "optimizer.learning_rate": {"kind": "uniform", "low": 1e-4, "high": 1e-2, "log": True},
        "optimizer.label_smoothing": {"kind": "uniform", "low": 0.0, "high": 0.1},
    }
)


def searched(num_trials, fields=tuple(SPACE)):
    """Trials whose score depends on the learning rate alone; every third is pruned after an easy first fold."""
    generator = np.random.default_rng(0)
    ledger = SearchLedger(num_trials=num_trials, num_folds=2)
    for number in range(1, num_trials + 1):
        params = {}
        for field in fields:
            distribution = SPACE[field]
            if isinstance(distribution, Choice):
                params[field] = distribution.labels[number % 2]
            elif isinstance(distribution, Integer):
                params[field] = int(generator.choice([96, 128, 160]))
            else:
                low, high = distribution.ends
                params[field] = float(
                    10 ** generator.uniform(-4, -2) if distribution.log else generator.uniform(low, high)
                )
        ledger.start(str(number), number, params)
        score = 0.16 - 0.03 * abs(np.log10(params["optimizer.learning_rate"]) + 3)
        for fold, easy in enumerate((0.02, 0.0) if number % 3 else (0.02,), 1):
            ledger.spend(600, cpus=1, gpus=0)
            ledger.report(str(number), fold, score + easy, 0.9, 600)
        ledger.end(str(number))
    return ledger


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(search_importance, "NUM_RESAMPLES", 1)


def test_the_report_of_a_search_is_complete(tmp_path):
    ledger = searched(12)
    ledger.start("13", 13, {field: entry for field, entry in ledger.entries()[0].params.items()})
    ledger.end("13", error="RuntimeError: out of memory")
    write_search_report(tmp_path, ledger, SPACE)
    for name in ("parallel_coordinates", "importance", "best_over_cost"):
        picture = cv2.imread(str(tmp_path / f"{name}.png"))
        assert min(picture.shape[:2]) > 250 and picture.std() > 10
    table = trials_table(ledger)
    assert list(table["trial"]) == list(range(1, 14))
    assert table["state"].value_counts().to_dict() == {"finished": 8, "pruned": 4, "failed": 1}
    pruned = table[table["state"] == "pruned"].iloc[0]
    # Its only fold is the easy one; over both it would have scored 0.01 less.
    assert pruned["mean_pauc"] - pruned["mean_pauc_adjusted"] == pytest.approx(0.01)
    assert table.iloc[-1]["error"] == "RuntimeError: out of memory"


def test_a_failed_trial_is_not_drawn_as_a_pruned_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure.axes[0]))

    def lines(ledger):
        """Dashes of the trials' lines, and those that the legend explains."""
        plot_parallel_coordinates(tmp_path / "plot.png", ledger, SPACE)
        axes = drawn[-1]
        thin = {str(patch.get_linestyle()) for patch in axes.patches}
        explained = dict(zip(axes.get_legend().get_texts(), axes.get_legend().get_lines(), strict=True))
        return thin, {text.get_text().partition(";")[0]: line.get_linestyle() for text, line in explained.items()}

    ledger = searched(5)
    before, legend = lines(ledger)
    assert set(legend) == {"all folds", "pruned", "best"}
    ledger.end("4", error="RuntimeError: out of memory")
    after, legend = lines(ledger)
    assert set(legend) == {"all folds", "pruned", "failed", "best"}
    assert len(after) == len(before) + 1


def test_importance_finds_the_hyperparameter_that_decides():
    shares = importances(searched(24), SPACE)
    assert next(iter(shares)) == "optimizer.learning_rate"
    assert shares["optimizer.learning_rate"][0] > 0.5
    assert sum(share for share, _, _ in shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("num_trials", [0, 2])
def test_hardly_any_trials_make_pictures_too(tmp_path, num_trials):
    fields = ("optimizer.learning_rate", "model")
    write_search_report(tmp_path, searched(num_trials, fields), {field: SPACE[field] for field in fields})
    assert len(list(tmp_path.glob("*.png"))) == 3
