"""Charts: what is drawn lies where the numbers say, in the picture, and a screen reader is told."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from usfmae_jax.reporting import charts, pages

EVIL = '<script>alert("1")</script>\'"&'


def parse(figure):
    return ElementTree.fromstring(figure)


def curve(name="malignant", **options):
    return charts.Line(name, np.linspace(0, 1, 11), np.linspace(0, 1, 11) ** 2, **options)


def draw(shown, x=None, y=None, **options):
    axes = x or charts.percent_axis("across"), y or charts.percent_axis("up")
    return charts.lines("Name", "How to read it.", shown, *axes, **options)


def path(figure, kind):
    return next(one.get("d") for one in parse(figure).iter("path") if kind in one.get("class", "").split())


def test_lines_run_from_corner_to_corner_of_the_axes():
    at = re.findall(r"(-?[\d.]+) (-?[\d.]+)", path(draw([curve()]), "line"))
    assert at[0] == ("56.0", "224.0")
    assert at[-1] == ("328.0", "10.0")


def test_every_chart_is_well_formed_and_has_a_text_alternative():
    band = curve(EVIL, low=np.zeros(11), high=np.ones(11), says=EVIL)
    dots = curve("dots", low=np.zeros(11), high=np.ones(11), dots=True, colour=12)
    figures = [
        draw([band, dots], guides=[((0, 1), (0, 1), EVIL)], counts=[0, 3, 5], spot=(0.5, 0.5, EVIL)),
        charts.points("Map", EVIL, np.random.default_rng(0).random((50, 2)), [EVIL, "b"] * 25, [EVIL, "b"]),
        charts.matrix(EVIL, "Rows are true.", [EVIL, "b"], np.array([[3, 1], [0, 0]])),
        charts.matrix("Many", "Rows are true.", [f"class {i}" for i in range(20)], np.eye(20)),
    ]
    for figure in figures:
        picture = parse(figure).find("svg")
        assert picture.get("role") == "img"
        assert len(picture.get("aria-label")) > 10
        assert "<script" not in figure
        assert "nan" not in figure


def test_whiskers_of_two_lines_at_one_step_stand_side_by_side():
    two = [charts.Line(name, [0.5], [0.5], [0.2], [0.8], dots=True, colour=i) for i, name in enumerate("ab")]
    across = [
        float(one.get("d").partition(" ")[0][1:])
        for one in parse(draw(two)).iter("path")
        if "whisker" in one.get("class", "")
    ]
    assert sorted(across) == [189.0, 195.0]


def test_what_is_not_defined_is_not_drawn():
    y = np.linspace(0, 1, 11)
    y[3:6] = np.nan
    figure = draw([charts.Line("part", y, y, dots=True), charts.Line("none", y, y * np.nan)])
    assert "nan" not in figure
    assert len(parse(figure).find("svg").findall("circle")) == 8


def test_values_beyond_an_axis_stay_within_the_picture():
    figure = draw([charts.Line("wild", [-1, 2], [-3, 4])])
    assert path(figure, "line") == "M56.0 224.0L328.0 10.0"


def test_long_lines_are_thinned_and_keep_their_steps():
    x = np.linspace(0, 1, 100_000)
    drawn = path(draw([charts.Line("step", x, (x > 0.5).astype(float))]), "line")
    at = np.array(re.findall(r"([\d.]+) ([\d.]+)", drawn), float)
    assert len(at) <= 400
    assert {224.0, 10.0} == set(at[:, 1])


def test_points_are_all_there_and_no_group_hides_another():
    at = np.random.default_rng(0).random((100, 2))
    figure = parse(charts.points("Map", "", at, ["a", "b"] * 50, ["a", "b"])).find("svg")
    paths = [one for one in figure.findall("path") if "dot" in one.get("class")]
    assert sum(one.get("d").count("M") for one in paths) == 100
    assert len({one.get("class") for one in paths[:2]}) == len({one.get("class") for one in paths[-2:]})
    assert len(paths) > 2


@pytest.mark.parametrize("count", [2, 4, 5, 8, 14, 30])
def test_a_confusion_matrix_lies_within_its_picture(count):
    names = [f"a rather long name of class {i}" for i in range(count)]
    figure = parse(charts.matrix("Confusion", "", names, np.arange(count**2).reshape(count, count))).find("svg")
    width, height = map(float, figure.get("viewBox").split()[2:])
    boxes = figure.findall("rect")
    assert len(boxes) == count**2
    assert max(float(one.get("x")) + float(one.get("width")) for one in boxes) <= width
    assert max(float(one.get("y")) + float(one.get("height")) for one in boxes) <= height
    wrong = [one for one in boxes if "wrong" in one.get("class")]
    assert len(wrong) == count**2 - count


def test_a_round_axis_holds_all_values():
    for values in ([0.5, 0.5], [0.912, 0.934], [0, 1], [np.nan, 0.7], [], [1.0, 1.0], [0.0, 0.0]):
        axis = charts.value_axis("", values)
        known = [one for one in values if np.isfinite(one)]
        assert axis.ticks[0] <= min(known, default=0) + 1e-9
        assert axis.ticks[-1] >= max(known, default=1) - 1e-9
        assert 2 <= len(axis.ticks) == len(set(axis.labels)) <= 7


def test_bars_of_a_table_hold_their_shares():
    assert "left:25.0%;width:50.0%" in pages.part("interval", 0.5, 0.25, 0.75)
    assert "width:100.0%" in pages.part("share_bar", 1.2)
    assert 'class="bar"' in pages.table(["a", "b"], [["x", pages.part("share_bar", 0.3)]])
