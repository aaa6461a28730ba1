import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from spd_fast import figures
from spd_fast.errors import InputError

POINTS = {
    "VisA": [
        {"name": "simsiam", "classification": 80.2, "segmentation": 9.1, "source": "paper"},
        {"name": "simsiam+spd", "classification": 82.8, "segmentation": 9.4, "source": "paper"},
        {"name": "simsiam", "classification": 80.9, "segmentation": 9.0, "source": "ours"},
        {"name": "mine+spd", "classification": 84.0, "segmentation": 11.0, "source": "ours"},
    ],
    "MVTec-AD": [{"name": "moco", "classification": 95.0, "segmentation": 33.2, "source": "paper"}],
}
CYAN = (0, 255, 255)


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def scenes(count, shape=(40, 60)):
    images = [np.full((*shape, 3), 60 * (i + 1), np.uint8) for i in range(count)]
    masks = [np.zeros(shape, bool) for _ in range(count)]
    masks[0][10:20, 30:50] = True
    maps = [np.where(mask, 1.0, 0.0).astype(np.float32) for mask in masks]
    return images, masks, maps


def picture(figure, row, column, columns):
    """The pixels of a panel, as given to matplotlib."""
    return np.asarray(figure.axes[row * columns + column].images[0].get_array())


def every_kind():
    x = np.linspace(0, 1, 9)
    images, masks, maps = scenes(2)
    return {
        "scatter": figures.scatter(POINTS, "AU-PR", "all"),
        "curves": figures.curves("image_roc", [("a", x, x**0.5, 66.7)]),
        "attention": figures.attention_sheet(images, images, masks, {"w": maps}),
        "segmentation": figures.segmentation_sheet(images, masks, {"w": maps}, ["a", "b"]),
    }


def test_files_are_the_same_when_repeated(tmp_path):
    for path in (tmp_path / "first", tmp_path / "second"):
        path.mkdir()
        for name, figure in every_kind().items():
            figures.save_figure(figure, path / f"{name}.v1")  # no part of the name is a suffix
            figures.save_figure(figure, path / f"{name}.v1")
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert len(first) == 8 and first == second
    for name, data in first.items():
        assert data.startswith(b"%PDF" if name.endswith(".v1.pdf") else b"\x89PNG")
        assert b"CreationDate" not in data and b"Software" not in data
    with pytest.raises(InputError, match="there is no directory"):
        figures.save_figure(every_kind()["curves"], tmp_path / "missing" / "figure")


def test_scatter_places_styles_and_texts():
    figure = figures.scatter(POINTS, "AU-PR", "1-class")
    found = {
        (axes.get_title(), line.get_label()): line for axes in figure.axes for line in axes.lines
    }
    assert len(found) == 5
    for data_set, points in POINTS.items():
        for point in points:
            line = found[data_set, f"{point['name']} {point['source']}"]
            place = [point["classification"], point["segmentation"]]
            assert line.get_xydata().tolist() == [place]
            filled = to_hex(line.get_markerfacecolor()) == to_hex(line.get_color())
            assert filled == (point["source"] == "ours")
            assert line.get_marker() == ("^" if point["name"].endswith("+spd") else "o")
    colours = {key: to_hex(line.get_color()) for key, line in found.items()}
    assert colours["VisA", "simsiam ours"] == colours["VisA", "simsiam+spd paper"]
    assert len(set(colours.values())) == 3
    written = texts(figure)
    assert written.count("SimSiam") == 2  # none at the point with SPD, to which an arrow leads
    for text in ("VisA", "MVTec-AD", "MoCo", "mine+SPD", "1-class", "this code", "the paper"):
        assert text in written
    assert written.count("classification AU-PR, per cent") == 2
    assert written.count("segmentation AU-PR, per cent") == 2


def test_scatter_draws_an_arrow_to_each_partner():
    arrows = [
        (tuple(map(float, text.xyann)), tuple(map(float, text.xy)))
        for axes in figures.scatter(POINTS, "AU-PR").axes
        for text in axes.texts
        if text.arrow_patch
    ]
    assert arrows == [((80.2, 9.1), (82.8, 9.4))]


def test_labels_of_the_papers_points_do_not_overlap():
    names = ("supervised", "simsiam", "simsiam+spd", "moco", "moco+spd", "simclr", "simclr+spd")
    places = ((88.2, 11.4), (80.2, 9.1), (82.8, 9.4), (83.6, 10.5), (84.1, 11), (82.7, 8.8))
    points = [
        {"name": n, "classification": x, "segmentation": y, "source": "paper"}
        for n, (x, y) in zip(names, (*places, (83.9, 8.7)))
    ]
    (axes,) = figures.scatter({"VisA": points}, "AU-PR").axes
    axes.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 4
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:i]) == 0
        assert axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)


def test_curves():
    x = np.linspace(0, 1, 5)
    lines = [("plain", x, x**0.5, 66.67), ("better", x, x**0.2, 83.33)]
    figure = figures.curves("pixel_roc", lines)
    (axes,) = figure.axes
    for line, (_, x, y, _) in zip(axes.lines, lines):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([x, y], axis=1))
    assert axes.lines[2].get_xydata().tolist() == [[0, 0], [1, 1]]  # chance
    for text in ("plain  66.7", "better  83.3", "Pixels: ROC", "AU-ROC, per cent", "recall"):
        assert text in texts(figure)
    figure = figures.curves("image_pr", [("plain", x, 1 - 0.7 * x, 65)], title="pcb1")
    assert figure.axes[0].lines[1].get_ydata() == pytest.approx([0.3, 0.3])
    for text in ("plain  65.0", "pcb1", "AU-PR, per cent", "precision"):
        assert text in texts(figure)
    many = figures.curves("image_roc", [(f"run {i}", x, x, 50) for i in range(20)]).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in many}) == 21


def test_attention_sheet(tmp_path):
    images, masks, maps = scenes(3)
    normals = [np.full((30, 30, 3), 10, np.uint8)] * 3
    weights = {"SimSiam": maps, "SimSiam+SPD": [m[::2, ::2] for m in maps]}  # another resolution
    figure = figures.attention_sheet(normals, images, masks, weights, ["a", "b", "c"])
    assert len(figure.axes) == 12
    assert sorted(texts(figure)) == sorted(
        ["a", "b", "c", "normal", "anomalous, defect\noutlined", "SimSiam", "SimSiam+SPD"]
    )
    assert picture(figure, 0, 0, 3).shape == (300, 300, 3) and picture(figure, 0, 0, 3).max() == 10
    outlined = (picture(figure, 1, 0, 3) == CYAN).all(axis=2)
    rows, columns = np.nonzero(outlined)
    assert (rows.min(), rows.max()) == (49, 100)  # the mask is at 50:100 of 200
    assert (columns.min(), columns.max()) == (149, 250)
    assert not (picture(figure, 1, 1, 3) == CYAN).all(axis=2).any()
    for row in (2, 3):
        heat = picture(figure, row, 0, 3).astype(int).sum(axis=2)
        assert heat[75, 200] > heat[150, 50] + 200
        assert np.ptp(picture(figure, row, 1, 3)) < 60  # nothing lights up
    figures.save_figure(figure, tmp_path / "sheet")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert (pixels == CYAN).all(axis=2).sum() == outlined.sum()  # panels come pixel for pixel
    (row,) = {text.get_rotation() for text in figure.texts if text.get_text() == "SimSiam"}
    assert row == 90


def test_segmentation_sheet():
    images, masks, _ = scenes(3)
    maps = [np.full((40, 60), value, np.float32) for value in (0, 10, 1000)]
    maps[2][:20] = 2000
    weights = {"SimSiam": maps, "MoCo": [m / 1000 for m in maps]}
    figure = figures.segmentation_sheet(images, masks, weights, ["pcb", "pcb", "candle"])
    assert texts(figure).count("pcb") == 2
    assert {"image", "ground truth", "SimSiam", "MoCo", "candle"} <= set(texts(figure))
    truth = picture(figure, 1, 0, 3)
    assert truth[75, 200] == 1 and truth[150, 50] == 0 and truth.mean() == masks[0].mean()
    assert picture(figure, 1, 1, 3).max() == 0
    cold, hot, both = (picture(figure, 2, c, 3).astype(int).sum(axis=2) for c in range(3))
    grey = [0.45 * 3 * 60 * (c + 1) for c in range(3)]  # the share of the photo in each sum
    assert np.ptp(cold) == 0 and np.ptp(hot) == 0
    assert hot[0, 0] - grey[1] > cold[0, 0] - grey[0] + 200  # the same scale, of both images
    assert both[0, 0] - grey[2] == pytest.approx(hot[0, 0] - grey[1], abs=6)
    assert both[-1, 0] - grey[2] == pytest.approx(cold[0, 0] - grey[0], abs=6)
    for column in range(3):  # other weights have a scale of their own
        np.testing.assert_array_equal(picture(figure, 3, column, 3), picture(figure, 2, column, 3))
    scales = {("SimSiam", "pcb"): (10, 20)}
    given = figures.segmentation_sheet(images, masks, weights, ["pcb", "pcb", "candle"], scales)
    assert picture(given, 2, 1, 3).sum() < picture(figure, 2, 1, 3).sum()
    np.testing.assert_array_equal(picture(given, 2, 2, 3), picture(figure, 2, 2, 3))
    np.testing.assert_array_equal(picture(given, 3, 1, 3), picture(figure, 3, 1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "theirs"}, "ours or paper; got"),
        ({"segmentation": float("nan")}, "is not finite"),
        ({"name": "moco", "source": "paper"}, "comes twice"),
    ],
)
def test_wrong_points_are_refused(change, message):
    good = {"name": "moco", "classification": 95.0, "segmentation": 33.2, "source": "paper"}
    figures.scatter({"VisA": [good]}, "AU-PR")
    with pytest.raises(InputError, match=message):
        figures.scatter({"VisA": [good, good | {"name": "simclr"} | change]}, "AU-PR")


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="no point"):
        figures.scatter({"VisA": []}, "AU-PR")
    with pytest.raises(InputError, match="a point has"):
        figures.scatter({"VisA": [{"name": "moco"}]}, "AU-PR")
    with pytest.raises(InputError, match="kind is one of image_roc"):
        figures.curves("roc", [("a", [0, 1], [0, 1], 50)])
    with pytest.raises(InputError, match="no curve"):
        figures.curves("image_roc", [])
    with pytest.raises(InputError, match=r"a: x and y have shapes \(2,\) and \(3,\)"):
        figures.curves("image_roc", [("a", [0, 1], [0, 1, 1], 50)])
    images, masks, maps = scenes(2)
    attention, segmentation = figures.attention_sheet, figures.segmentation_sheet
    with pytest.raises(InputError, match="no image"):
        segmentation([], [], {}, [])
    with pytest.raises(InputError, match="w: 1 given for 2 images"):
        attention(images, images, masks, {"w": maps[:1]})
    with pytest.raises(InputError, match="titles: 1 given for 2 images"):
        attention(images, images, masks, {"w": maps}, ["a"])
    with pytest.raises(InputError, match="categories: 3 given for 2 images"):
        segmentation(images, masks, {"w": maps}, ["a", "b", "c"])
    with pytest.raises(InputError, match=r"mask has shape \(40, 60, 1\)"):
        segmentation(images, [m[..., None] for m in masks], {"w": maps}, ["a", "b"])
    with pytest.raises(InputError, match=r"score map has shape \(1, 40, 60\)"):
        attention(images, images, masks, {"w": [m[None] for m in maps]})
    with pytest.raises(InputError, match="NaN"):
        segmentation(images, masks, {"w": [m * np.nan for m in maps]}, ["a", "b"])
    for wrong in ([i[..., 0] for i in images], [i.astype(float) for i in images]):
        with pytest.raises(InputError, match="image is .*expected"):
            attention(wrong, images, masks, {"w": maps})
        with pytest.raises(InputError, match="image is .*expected"):
            segmentation(wrong, masks, {"w": maps}, ["a", "b"])
