"""Coordinates of charts: what is drawn where."""

from __future__ import annotations

import re

import pytest

from serve.page_templates import environment
from serve.plots import Bar, Line, Mark, Plot, Scale, Tick, count_ticks, nice_ceiling, path, steps


def test_a_scale_is_linear_and_holds_what_is_beyond_at_its_edge():
    scale = Scale(0, 10, 100, 0)
    assert [scale(value) for value in (0, 5, 10, -3, 99)] == [100, 50, 0, 100, 0]
    assert Scale(4, 4, 10, 20)(4) == 10


@pytest.mark.parametrize(
    ("value", "top"), [(0, 1), (-2, 1), (1, 1), (3, 5), (7, 10), (11, 20), (130, 200), (0.13, 0.2)]
)
def test_an_axis_ends_at_a_round_number_above(value, top):
    assert nice_ceiling(value) == pytest.approx(top)


def test_ticks_are_whole_where_things_are_counted():
    y = Scale(0, 1, 0, 1)
    assert [tick.text for tick in count_ticks(1.0, y)] == ["0", "1"]
    assert [tick.text for tick in count_ticks(5_000.0, y)] == ["0", "2,500", "5,000"]
    assert [tick.text for tick in count_ticks(5.0, y)] == ["0", "2.5", "5"]


def test_a_path_breaks_where_a_point_is_missing():
    assert path([(0, 1), (2, 3.5), None, (4, 5)]) == "M0 1L2 3.5M4 5"
    assert path([]) == ""


def test_the_outline_of_a_histogram_runs_along_its_bars():
    x, y = Scale(0, 2, 0, 20), Scale(0, 1, 10, 0)
    assert steps([0, 1, 2], [0.5, 1.0], x, y) == "M0 5L10 5L10 0L20 0"


def test_a_chart_says_in_words_what_it_shows_and_keeps_text_text():
    plot = Plot("p", "<b>Risks</b>", "median & more")
    plot.bars.append(Bar(1, 2, 3, 4, "answered"))
    plot.lines.append(Line("M0 0L1 1", "series"))
    plot.marks += [Mark(5, 6, "alarm"), Mark(7, 8, "series")]
    plot.x_ticks.append(Tick(9, "<i>"))
    svg = str(environment().get_template("_plots.html").module.plot(plot))
    assert 'role="img" aria-labelledby="p-title p-desc"' in svg
    assert re.search(
        r'<title id="p-title">&lt;b&gt;Risks&lt;/b&gt;</title>\s*<desc id="p-desc">median &amp; more</desc>', svg
    )
    # Told apart by shape, not by colour alone.
    assert svg.count('<path class="alarm"') == 1 and svg.count("<circle") == 1
    assert "<i>" not in svg and "style=" not in svg
