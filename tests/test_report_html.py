from __future__ import annotations

import base64
import re
import stat
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from report_examples import (
    HOSTILE,
    LARGE,
    LOWERED,
    PROJECTION,
    SHARPNESS,
    diagnoses,
    han_diagnosis,
    healthy_diagnosis,
    hostile_page,
    large_data,
    repaired_diagnosis,
    report_data,
)

import diagnoser.report
from diagnoser.errors import UsageError
from diagnoser.report import ReportComponent, render_report, write_report
from diagnoser.report.data import QUANTITIES
from diagnoser.report.data import report_data as recorded_data
from diagnoser.report.drawing import (
    DIVERGING,
    INFINITE,
    LEVELS,
    MISSING,
    OWN,
    SEQUENTIAL,
    ZERO,
    Scale,
    heat_map,
    line_path,
    scale_of,
)
from diagnoser.report.wording import number
from diagnoser.runlog import RunLogWriter, read_run
from diagnoser.types import Component, Cost, Estimate, Measurement

VOID = {"meta", "img", "br", "input", "link", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in its place, no attribute twice."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def text() -> str:
    return render_report(repaired_diagnosis(), report_data())


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_it_says_the_verdict_the_causes_and_the_evidence_in_words(page):
    words = page.words()
    for expected in (
        "faulty something is wrong with this run",
        han_diagnosis().reason,
        "1 The learning rate of word_attention.projection is too high.",
        "Multiply the learning rate of word_attention.projection by 0.01",
        "the step size is larger than the curvature allows in word_attention.projection",
        SHARPNESS.message,
        "step_sharpness 14.2 > 2 ± 1.3 ± 2.1 120 to 160 lanczos",
        "gradients are cleared before every step",
        "overfitting: the script reports no evaluation",
        "training 40.1 s, monitoring 3.2 s (8.0 % of training)",
    ):
        assert expected in words
    assert words.index("is too high.") < words.index("The run over time")


def test_it_draws_loss_accuracy_heat_maps_and_coupling(page):
    labels = [svg.get("aria-label") for svg in page.all("svg")]
    assert labels[:2] == ["training loss over steps", "accuracy over steps"]
    assert [img["alt"] for img in page.all("img")] == [
        f"heat map of {title}, one row a component"
        for title in (
            *("gradient norm", "update ratio", "step sharpness", "attention entropy"),
            *("largest curvature", "smallest curvature", "coupling"),
        )
    ]


def test_every_flag_leads_to_an_entry_that_is_there(page):
    targets = {attributes["id"] for attributes in page.all("details") if "id" in attributes}
    assert targets == {f"{kind}-{k}" for kind in ("finding", "repair") for k in (1, 2, 3)}
    links = {attributes["href"] for attributes in page.all("a")}
    assert links == {f"#{target}" for target in targets} - {"#repair-2", "#repair-3"}


def test_repairs_that_were_tried_are_compared_in_a_table(page):
    words = page.words()
    for expected in (
        "repairs kept 1 of 3",
        "\N{CHECK MARK}1 kept word_attention.projection at step 160",
        "Multiply the learning rate of word_attention.projection by 0.01",
        f"Kept : {LOWERED.reason}",
        "without it: -63.6 ± 4.1 %",
        "measured before 20 steps with the repair 20 steps without it 20 steps",
        "loss mean over the steps 1.12 0.412 1.13",
        "step_sharpness fires if > 2 14.2 ± 1.3 0.31 ± 1.3 13.8 ± 1.3",
        "rule:attention-entropy-collapse none rule:sharpness-instability",
        f"20 batches used up; where the numbers come from: {LOWERED.derivation}",
        "2 rolled back word_attention.context at step 130",
        "loss mean over the steps 1.12 NaN not measured",
        f"Compared (1, 3): {LOWERED.guarantee}",
    ):
        assert expected in words
    assert words.index("is too high.") < words.index("Repairs that were tried")
    assert words.index("Repairs that were tried") < words.index("The run over time")
    tables = [table for table in page.all("table") if table.get("class") == "compared"]
    assert len({table["aria-label"] for table in tables}) == 3
    assert "Repairs" not in Page(render_report(han_diagnosis(), report_data())).words()


def test_a_repair_that_was_kept_is_marked_on_the_loss_chart(page):
    (mark,) = (a for a in page.all("a") if a["class"] == "flag kept")
    assert mark["href"] == "#repair-1"
    assert mark["title"] == "repair 1: kept in word_attention.projection, at step 160"
    assert mark["style"].startswith("left:40.00%;")
    assert len([line for line in page.all("line") if line["class"] == "since kept"]) == 1


def test_a_feature_that_only_one_arm_has_is_not_measured_in_the_others():
    only = replace(LOWERED, twin=replace(LOWERED.twin, evidence=()))
    words = Page(render_report(replace(han_diagnosis(), repairs=(only,)), report_data())).words()
    assert "step_sharpness fires if > 2 14.2 ± 1.3 0.31 ± 1.3 not measured" in words
    assert "Compared: " in words


def test_identifiers_are_unique(page):
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    labelled = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert labelled <= set(identifiers)


def test_nothing_is_loaded_from_anywhere(text, page):
    assert "://" not in text
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "data", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(
                ("data:image/png;base64,", "#finding-", "#repair-")
            )
    assert "url(" not in text
    assert "@import" not in text
    policy = next(m for m in page.all("meta") if "http-equiv" in m)
    assert policy["content"].startswith("default-src 'none';")


def test_scripts_and_attributes_are_ours_alone(page):
    assert len(page.all("script")) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name, page):
    hostile = Page(hostile_page(name))
    assert len(hostile.all("script")) == 1
    allowed = {tag for tag, _ in page.tags}
    assert {tag for tag, _ in hostile.tags} <= allowed
    assert not [a for _, attributes in hostile.tags for a in attributes if a.startswith("on")]
    for piece in hostile.text:
        assert piece.replace("\n", "").isprintable()
    hostile_page(name).encode("utf-8")


def test_a_name_is_shown_as_it_is_written():
    assert "<script>alert(1)</script>" in Page(hostile_page("<script>alert(1)</script>")).words()
    assert "{{ 7 * 7 }}{% raw %}" in Page(hostile_page("{{ 7 * 7 }}{% raw %}")).words()


def test_nothing_in_the_package_marks_text_as_safe():
    for path in Path(diagnoser.report.__file__).parent.iterdir():
        if path.suffix in {".py", ".j2"}:
            source = path.read_text("utf-8")
            assert not re.search(r"\|\s*safe|Markup|autoescape (false|true)", source), path.name


@given(diagnoses)
@settings(max_examples=15, deadline=None)
def test_any_diagnosis_makes_a_page(diagnosis):
    Page(render_report(diagnosis, report_data()))


def test_sixty_components_and_a_hundred_steps_stay_small():
    components = tuple(
        ReportComponent(
            f"transformer.encoder.layer.{i // 6}.attention.self.{i % 6}_projection[{i}]",
            "query",
            "",
        )
        for i in range(60)
    )
    data = report_data(components, measured=100)
    everything = dict.fromkeys(QUANTITIES, data.quantities["lambda_max"])
    text = render_report(han_diagnosis(), replace(data, quantities=everything))
    assert len(text.encode()) < 500_000
    assert len(Page(text).all("img")) == len(QUANTITIES) + 1


def test_a_long_run_stays_small():
    data = report_data(measured=401)
    steps = np.arange(100_000)
    long = replace(data, loss_steps=steps, loss_values=np.sin(steps), steps=np.arange(401) * 250)
    text = render_report(han_diagnosis(), long)
    assert len(text.encode()) < 500_000
    assert "1 of 2 measurements" in Page(text).words()


def test_the_largest_run_stays_small_and_has_every_component():
    text = render_report(repaired_diagnosis(), large_data())
    assert len(text.encode()) < 500_000
    read = Page(text)
    assert len(read.all("img")) == len(QUANTITIES) + 1
    body = text[text.index('id="components-table"') :]
    assert body[: body.index("</table>")].count("<tr") == 1 + LARGE[0]
    words = read.words()
    for component in large_data().components:
        assert component.name in words
    assert re.search(r"1 of \d+ measurements", words)


def layered(size: int, layer: int) -> tuple[ReportComponent, ...]:
    return tuple(
        ReportComponent(f"block{k // layer}.part{k}", "linear", f"block{k // layer}")
        for k in range(size)
    )


def names_of(text: str) -> list[str]:
    """Returns what stands beside the rows of the first heat map."""
    first = text[text.index('<ol class="names') :]
    return re.findall(r"<bdi>(.*?)</bdi>", first[: first.index("</ol>")])


def test_rows_of_a_heat_map_are_parted_by_layer_and_named_while_there_is_room():
    few = layered(12, 4)
    text = render_report(healthy_diagnosis(), report_data(few))
    assert names_of(text) == [component.name for component in few]
    assert 'd="M0 4h1M0 8h1"' in text
    assert text.count('<li class="first">') == 2 * (5 + 1)  # heat maps, and coupling
    many = layered(100, 10)
    text = render_report(healthy_diagnosis(), report_data(many))
    assert names_of(text) == [f"block{k}" for k in range(10)]
    assert "--row:8px;--rows:100" in text
    alone = layered(100, 1)
    text = render_report(healthy_diagnosis(), report_data(alone))
    assert names_of(text)[:3] == ["block1", "block3", "block5"]  # what has room
    assert 'd="M0 1h1' not in text


def test_drawings_are_said_in_words(page):
    data = report_data()
    quantities = {name: values.copy() for name, values in data.quantities.items()}
    quantities["gradient_norm"][2, 30:32] = np.inf
    words = Page(render_report(repaired_diagnosis(), replace(data, quantities=quantities))).words()
    loss, gradient = data.loss_values, quantities["gradient_norm"]
    low, high = int(loss.argmin()), int(loss.argmax())
    assert (
        f"From {number(loss[0])} at step 0 to {number(loss[-1])} at step 400; "
        f"lowest {number(loss[low])} at step {low}, highest {number(loss[high])} at step {high}."
    ) in words
    row, column = np.unravel_index(np.nanargmin(gradient), gradient.shape)
    assert (
        f"; smallest {number(gradient[row, column])}: {data.components[row].name} at step "
        f"{data.steps[column]}; infinite in 2 cells, first word_rnn.weight_hh at step 300."
    ) in words
    assert f"; smallest -0.62: {PROJECTION} with word_attention.context." in words


def test_what_is_infinite_is_drawn_though_only_some_measurements_are():
    data = report_data(measured=1201)
    gradient = data.quantities["gradient_norm"].copy()
    gradient[3, 1003] = np.inf  # one in five is shown, and not this one
    long = replace(data, quantities={"gradient_norm": gradient}, steps=np.arange(1201))
    read = Page(render_report(han_diagnosis(), long))
    assert "1 of 5 measurements, infinite where any of them is" in read.words()
    codes, _, _ = pixels(read.all("img")[0]["src"])
    assert np.argwhere(codes == INFINITE).tolist() == [[3, 200]]


def test_numbers_have_units(page):
    words = page.words()
    assert "training loss in units of the loss" in words
    assert words.count("loss / weight²") == 2 * 2  # two curvatures, in legend and table
    shown = [f"{QUANTITIES[name][0]} {QUANTITIES[name][1]}" for name in report_data().quantities]
    assert f"component layer findings {' '.join(shown)}" in words
    assert all(unit for _, unit, _ in QUANTITIES.values())


def empty_data():
    none = np.array([], dtype=np.int64)
    return replace(
        report_data(),
        loss_steps=none,
        loss_values=none.astype(float),
        accuracy_steps=none,
        accuracy_values=none.astype(float),
        components=(),
        steps=none,
        quantities={},
        coupling=None,
        coupling_step=None,
    )


def test_a_run_of_which_nothing_was_recorded_has_a_page():
    words = Page(render_report(han_diagnosis(), empty_data())).words()
    assert "No loss was recorded." in words
    assert "Where and when" not in words


def test_a_healthy_run_says_so():
    words = Page(render_report(healthy_diagnosis(), report_data())).words()
    assert "healthy nothing is wrong with this run" in words
    assert "Likely causes" not in words
    assert "Findings and their evidence" not in words
    cause = han_diagnosis().causes[0]
    low = replace(healthy_diagnosis(), causes=(cause,))
    words = Page(render_report(low, report_data())).words()
    assert "Worth a look, of low severity" in words
    assert "Likely causes" not in words


def test_a_loss_that_is_not_finite_is_said():
    data = report_data()
    values = data.loss_values.copy()
    values[300:310] = np.nan
    values[310] = np.inf
    words = Page(render_report(han_diagnosis(), replace(data, loss_values=values))).words()
    assert "not finite at 11 steps, first at step 300" in words


def test_the_same_input_gives_the_same_bytes(text):
    assert render_report(repaired_diagnosis(), report_data()) == text


# -- writing ------------------------------------------------------------------------------------


def test_writing_replaces_the_old_page_whole(tmp_path, text):
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(repaired_diagnosis(), report_data(), path)
    assert path.read_text("utf-8") == text
    assert list(tmp_path.iterdir()) == [path]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path / "missing" / "report.html", file / "report.html", tmp_path):
        with pytest.raises(UsageError, match="cannot write the report to .*; choose") as caught:
            write_report(han_diagnosis(), report_data(), path)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_half_way_keeps_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_report(han_diagnosis(), report_data(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- drawing ------------------------------------------------------------------------------------


def pixels(uri: str) -> tuple[np.ndarray, list[tuple[int, int, int]], bytes]:
    """Decodes an indexed PNG by the specification: codes, palette, opacities."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            name + body
        )
        chunks[name] = body
        at += 12 + size
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, kind) == (8, 3)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    palette = [tuple(p) for p in np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3).tolist()]
    return lines[:, 1:], palette, chunks[b"tRNS"]


def test_a_heat_map_keeps_missing_zero_and_infinite_apart():
    drawn = heat_map(np.array([[1e-4, 2.0, np.nan], [0.0, np.inf, 1e4]]))
    codes, palette, opacity = pixels(drawn.image)
    assert codes.tolist() == [[0, 34, MISSING], [ZERO, INFINITE, LEVELS - 1]]
    assert palette[0] == SEQUENTIAL[0]
    assert palette[LEVELS - 1] == SEQUENTIAL[-1]
    assert opacity[MISSING] == 0
    assert set(opacity[:MISSING]) == {255}
    assert drawn.scale == "logarithmic scale"
    assert [label for label, _ in drawn.special] == ["exactly zero", "infinite", "not measured"]


def test_a_coupling_matrix_is_symmetric_about_zero_and_leaves_out_the_diagonal():
    drawn = heat_map(np.array([[1.0, -0.2], [0.1, 1.0]]), own_diagonal=True)
    codes, palette, _ = pixels(drawn.image)
    assert codes[0, 0] == codes[1, 1] == OWN
    assert codes[0, 1] == 0
    assert LEVELS // 2 < codes[1, 0] < LEVELS
    assert palette[0] == DIVERGING[0]


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
VISIONS = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


def seen(colours: list[tuple[int, int, int]], vision: str) -> np.ndarray:
    """Returns colours in CIELAB as somebody sees them: distances of 2.3 are just noticed."""
    share = np.array(colours) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(VISIONS[vision]).T, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    ratio = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("signed", [False, True])
def test_what_is_special_is_told_from_the_scale_in_every_kind_of_vision(vision, signed):
    values = np.array([[1.0, 1e4]]) * (np.array([[-1, 1]]) if signed else 1)
    _, palette, _ = pixels(heat_map(values).image)
    levels = seen(palette[:LEVELS], vision)
    special = (INFINITE, OWN) if signed else (ZERO, INFINITE)
    for colour in seen([palette[code] for code in special], vision):
        assert np.linalg.norm(levels - colour, axis=1).min() > 12
    lightness = np.diff(levels[:, 0])
    if signed:
        assert (lightness[: LEVELS // 2 - 1] > 0).all()
        assert (lightness[LEVELS // 2 :] < 0).all()
        assert (
            np.linalg.norm(levels[: LEVELS // 4] - levels[: -LEVELS // 4 - 1 : -1], axis=1).min()
            > 12
        )
    else:
        assert (lightness > 0).all()


matrices = numpy_strategies.arrays(
    np.float64,
    numpy_strategies.array_shapes(min_dims=2, max_dims=2, max_side=5),
    elements=st.floats(),
)


@given(matrices)
@settings(max_examples=100, deadline=None)
def test_exactly_the_nan_cells_are_missing(values):
    codes, _, _ = pixels(heat_map(values).image)
    assert ((codes == MISSING) == np.isnan(values)).all()
    assert ((codes == INFINITE) == np.isinf(values)).all()


@given(matrices)
@settings(max_examples=100, deadline=None)
def test_a_scale_keeps_order_and_reads_back(values):
    scale = scale_of(values)
    finite = np.sort(values[np.isfinite(values)])
    if scale is None:
        assert finite.size == 0
        return
    place = scale.forward(finite)
    place = place[~np.isnan(place)]
    assert (np.diff(place) >= 0).all()
    assert ((place >= 0) & (place <= 1)).all()
    for at, label in scale.ticks():
        assert 0 <= at <= 1
        assert label


@pytest.mark.parametrize(
    "scale",
    [Scale("linear", -2.0, 6.0), Scale("logarithmic", 1e-6, 1e3), Scale("signed", -5.0, 5.0, 0.1)],
)
def test_backward_undoes_forward(scale):
    for place in (0.0, 0.3, 0.5, 1.0):
        assert scale.forward(np.array(scale.backward(place))) == pytest.approx(place)


def test_ticks_stand_at_round_values():
    assert Scale("linear", 0.0, 1.0).ticks(5) == [
        (pytest.approx(k / 5), label)
        for k, label in enumerate(("0", "0.2", "0.4", "0.6", "0.8", "1"))
    ]
    labels = [label for _, label in Scale("logarithmic", 5e-4, 2e2).ticks()]
    assert labels == ["0.001", "0.01", "0.1", "1", "10", "100"]


def drawn_points(path: str) -> list[tuple[int, int]]:
    """Follows an SVG path of absolute M, relative l and h."""
    points, x, y = [], 0, 0
    for command, body in re.findall(r"([Mlh])([-\d ]+)", path):
        numbers = [int(n) for n in body.split()]
        pairs = (
            [(numbers[0], 0)]
            if command == "h"
            else list(zip(numbers[::2], numbers[1::2], strict=True))
        )
        for dx, dy in pairs:
            x, y = (dx, dy) if command == "M" else (x + dx, y + dy)
            points.append((x, y))
    return points


def test_a_curve_has_gaps_where_it_is_not_finite():
    steps, values = np.array([0, 10, 20, 30, 40]), np.array([0.0, 1.0, np.nan, np.inf, 0.5])
    path = line_path(steps, values, Scale("linear", 0, 1), span=(0, 40), size=(40, 10), bins=99)
    assert path == "M0 10l10 -10M40 5h1"


def test_a_spike_survives_the_thinning():
    values = np.zeros(100_000)
    values[77_777] = 1.0
    path = line_path(
        np.arange(100_000),
        values,
        Scale("linear", 0, 1),
        span=(0, 99_999),
        size=(1000, 100),
        bins=50,
    )
    points = drawn_points(path)
    assert (778, 0) in points
    assert len(points) <= 100


# -- from a recording ----------------------------------------------------------------------------


def test_a_recording_gives_components_layers_quantities_and_the_last_coupling(tmp_path):
    parts = [
        Component(name, kind, layer, order, (), 1)
        for order, (name, kind, layer) in enumerate(
            [
                ("embedding", "embedding", "embedding"),
                ("attn.query", "query", "attn"),
                ("attn.key", "key", "attn"),
            ]
        )
    ]

    def row(step, quantity, component, value, other=None):
        return Measurement(step, quantity, component, Estimate(value), other)

    with RunLogWriter(tmp_path / "run", "a run", {}) as log:
        log.components(0, parts, {})
        log.measurement(
            0,
            [
                row(0, "gradient_norm", "attn.query", 2.0),
                row(0, "weight_norm", "attn.query", 8.0),
                row(0, "gradient_norm", "attn.key", 2.0),
                row(0, "weight_norm", "attn.key", 0.0),
                row(0, "weight_norm", "embedding", 1.0),
            ],
            0.1,
        )
        log.measurement(
            10,
            [
                row(10, "attention_entropy", "attn", 0.5),
                row(10, "gradient_norm", "model", 9.0),
                row(10, "coupling_share", "attn.query", -0.3, "attn.key"),
            ],
            0.1,
        )
    data = recorded_data(read_run(tmp_path / "run"), Cost(10, 2, 1.0, 0.1))
    assert [(c.name, c.kind) for c in data.components] == [
        ("embedding", "embedding"),
        ("attn", "layer"),
        ("attn.query", "query"),
        ("attn.key", "key"),
    ]
    assert data.steps.tolist() == [0, 10]
    nan = np.nan
    assert set(data.quantities) == {"gradient_norm", "gradient_ratio", "attention_entropy"}
    np.testing.assert_equal(
        data.quantities["gradient_norm"], [[nan, nan], [nan, nan], [2.0, nan], [2.0, nan]]
    )
    np.testing.assert_equal(  # of weights that are zero there is no ratio
        data.quantities["gradient_ratio"], [[nan, nan], [nan, nan], [0.25, nan], [nan, nan]]
    )
    np.testing.assert_equal(
        data.quantities["attention_entropy"], [[nan, nan], [nan, 0.5], [nan, nan], [nan, nan]]
    )
    assert data.coupling_step == 10
    coupling = np.full((4, 4), nan)
    coupling[2, 3] = coupling[3, 2] = -0.3
    np.testing.assert_equal(data.coupling, coupling)
    words = Page(render_report(han_diagnosis(), data)).words()
    assert "attn.query attn.key -0.3" in words


def test_projection_is_flagged_in_its_row_of_the_heat_map(page):
    flags = [
        a
        for a in page.all("a")
        if "flag" in (a.get("class") or "") and "top:35.00%" in (a.get("style") or "")
    ]
    assert flags
    assert all(PROJECTION in (flag["title"] or "") for flag in flags)
