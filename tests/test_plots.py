"""Figures and controls, on made-up data. A glyph that the font lacks is an error here (see pyproject.toml)."""

from __future__ import annotations

import base64
import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager
from matplotlib.colors import to_rgba
from matplotlib.patches import PathPatch
from matplotlib.text import Text
from PIL import Image, ImageDraw

from clipcap_lib import panels, plots, spaces, style
from clipcap_lib.config import preset

CAPTIONS = ["草地上有一只棕色的狗，右边是一个红色的球。", "两只白色的猫坐在蓝色的沙发上", "一个小女孩在海边放风筝",
            "三条金鱼在水里游", "一辆黄色的公共汽车停在街道旁边，车前站着两个人", "夜空中挂着一轮弯弯的月亮",
            "一把 iPhone 形状的伞（$5）", "一名滑板运动员在半空中做动作"]
WORDS = [*"草地上有一只狗", "[SEP]"]
SYSTEMS = ["model1", "model2", "1+2+3"]


@pytest.fixture(autouse=True, scope="module")
def _house_style():
    plots.use_house_style()


def scene(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (48, 48), tuple(int(v) for v in random.integers(150, 255, 3)))
    ImageDraw.Draw(image).ellipse((10, 12, 34, 36), fill=tuple(int(v) for v in random.integers(0, 200, 3)))
    return image


IMAGES = [scene(i) for i in range(8)]
RANDOM = np.random.default_rng(0)
SIMILARITY = np.clip(RANDOM.normal(0.05, 0.1, (8, 8)) + 0.6 * np.eye(8), -1, 1)
MAPS = RANDOM.dirichlet(np.ones(9), (len(WORDS), 2, 4)).reshape(len(WORDS), 2, 4, 3, 3)
RECALLS = {name: {f"{way} R@{k}": factor * k for way in ("image->text", "text->image") for k in (1, 5, 10)}
           | {"image->text median rank": 3} for name, factor in (("before", 1), ("after", 7))}
HISTORY = pd.DataFrame({"step": range(10, 610, 10), "epoch": np.arange(1, 61) / 6, "loss": np.linspace(4, 1, 60),
                        "CIDEr": [float("nan") if i % 6 else i for i in range(60)]})
WEIGHTS = np.array([(a, b, 4 - a - b) for a in range(5) for b in range(5 - a)]) / 4
INTERVALS = pd.DataFrame([{"system": s, "board": b, "value": 50 + i, "low": 45 + i, "high": 56.0 + i,
                           "kind": "ensemble" if "+" in s else "one model"}
                          for b in ("board-a", "board-b") for i, s in enumerate(SYSTEMS)]
                         + [{"system": "constant caption", "board": "board-a", "value": 9, "low": 7, "high": 11,
                             "kind": "floor"}])
BY_REFERENCES = pd.DataFrame([{"references": n, "segmentation": s, "BLEU-4": 5.0 * n, "CIDEr": 100 + n}
                              for s in ("characters", "jieba") for n in (1, 2, 3)])
ERRORS = pd.DataFrame({"model1 on board-a": [50.0, 20, 36], "model4 on board-a": [40.0, 10, 48]},
                      index=["object missed", "wrong colour", "nothing wrong"])
CONCEPTS = pd.DataFrame({"model1": [0.0, 80, 50], "model4": [60.0, 70, 50], "images": [42, 10, 3]},
                        index=["香蕉", "狗", "船"])
BOARDS = pd.DataFrame({"board-a": ["71.3 [65.0, 77.1]", "-", "74.0 [68.0, 80.0]"],
                       "original board-a": ["30.02", "-", "30.72"]}, index=SYSTEMS)
LOG_ODDS = [("狗", -1.0, -1.5, -0.4), ("风筝", 0.1, -0.3, 0.5), ("雪", 2, 1, 3)]
FREQUENCIES = pd.DataFrame({"甲": [1.5, 20], "乙": [3, 0.0]}, index=["狗", "猫"])
SCORES = {"甲": np.linspace(0, 200, 50), "乙": np.linspace(20, 90, 50)}
COUNTS = {"image_encoder": 470_000, "gpt": 950_000, "image_head": 82_000, "text_head": 33_000, "grid_head": 82_000}

RANDOM_NOISE = 0.01 * np.random.default_rng(1).normal(size=(24, 24))
METHODS = {"attention": MAPS[:4, 0, 0], "Grad-CAM": 40 * MAPS[:4, 1, 0], "occlusion": MAPS[:4, 1, 1] - 0.2}
LOCALISATION = pd.DataFrame({"mass": [0.3, 0.55], "random mass": [0.1, 0.2], "hit": [0.4, 0.6], "random hit": [0.1, 0.2],
                             "box": [0.12, 0.12]}, index=["attention", "Grad-CAM"])
RANKS = {name: {way: RANDOM.integers(1, most, 300) for way in ("image->text", "text->image")}
         for name, most in (("before training", 301), ("之后", 20))}
POINTS = {name: RANDOM.normal(size=(60, 2)) for name in ("PCA", "t-SNE")}
BEAMS = [([*"一只狗", "[SEP]"], [0.9, 0.8, 0.5, 0.99], -0.3), ([*"一只小狗", "[SEP]"], [0.9, 0.8, 0.3, 0.9, 0.9], -0.4),
         ([*"两条狗", "[SEP]"], [0.05, 0.2, 0.9, 0.9], -1.2)]
FEW = pd.DataFrame([{"start": start, "images": n, "seed": seed, "CIDEr": 10.0 * i + n / 10, "low": 5.0, "high": 90.0,
                     "constant": 12.5}
                    for i, start in enumerate("abc") for n in (100, 600) for seed in (1, 2)])
GAINS = pd.DataFrame([{"comparison": what, "images": n, "seed": seed, "difference": 3.0 - seed, "low": -2.0, "high": 6.0}
                      for what in ("文字", "image encoder") for n in (100, 600) for seed in (1, 2)])
STARTS = {"a": "GPT of random weights", "b": "+ 文字", "c": "+ image encoder"}

FIGURES = {
    "captioned_images": lambda: plots.captioned_images(FEW, STARTS),
    "ladder": lambda: plots.ladder(GAINS),
    "sample_grid": lambda: plots.sample_grid(IMAGES, CAPTIONS, [f"图 {i}.jpg" for i in range(8)]),
    "caption_card": lambda: plots.caption_card(IMAGES[0], {"参考": CAPTIONS}, "图 1"),
    "similarity_matrix": lambda: plots.similarity_matrix(SIMILARITY, IMAGES, CAPTIONS),
    "similarity_large": lambda: plots.similarity_matrix(np.eye(40)),
    "similarity_marked": lambda: plots.similarity_matrix(np.eye(40), marked=(3, 39)),
    "similarity_pair": lambda: plots.similarity_pair(IMAGES[0], CAPTIONS[4], ["余弦 0.31", "第 1 名"], "图 1，句 5"),
    "similarity_before_after": lambda: plots.similarity_before_after(0.1 * SIMILARITY, SIMILARITY, IMAGES, CAPTIONS),
    "recall_bars": lambda: plots.recall_bars(RECALLS, {"R@1": 0.3, "R@5": 1.7, "R@10": 3.3}),
    "training_curves_long_names": lambda: plots.training_curves(
        {f"model{i} of mine, validated on 300 images": HISTORY for i in range(4)}, ["loss", "CIDEr"]),
    "training_curves": lambda: plots.training_curves({"甲": HISTORY, "乙": HISTORY[["step", "loss"]]}, ["loss", "CIDEr"]),
    "training_state": lambda: plots.training_state(HISTORY, ["loss", "CIDEr"], {"图.jpg": CAPTIONS[0]}, "甲"),
    "attention_strip": lambda: plots.attention_strip(IMAGES[0], WORDS, MAPS[:, 0, 0], MAPS[:, 0, 0].sum((1, 2))),
    "attention_word": lambda: plots.attention_word(IMAGES[0], WORDS, 1, MAPS[1, 0, 0], 0.5, title="“地”"),
    "attention_signed": lambda: plots.attention_word(IMAGES[0], WORDS, 1, MAPS[1, 0, 0] - 0.1, 0.5, signed=True),
    "next_characters": lambda: plots.next_characters(IMAGES[0], WORDS[:3], 3, [("一", 0.6), ("两", 0.3), ("[SEP]", 0.0004)],
                                                     "第 4 个字", ["草地上有一只狗"]),
    "layer_head_overview": lambda: plots.layer_head_overview(MAPS[1], IMAGES[0]),
    "layer_head_shares": lambda: plots.layer_head_overview(np.linspace(0, 1, 144).reshape(12, 12)),
    "caption_card_long": lambda: plots.caption_card(IMAGES[0], {name: ["一" * 60] * 8 for name in "甲乙丙"}, "图 1"),
    "sample_grid_long_names": lambda: plots.sample_grid(IMAGES[:6], CAPTIONS[:6], ["3385593926_d3e9c21170.jpg"] * 6, 6),
    "next_twenty": lambda: plots.next_characters(IMAGES[0], ["一"], 1, [(word, 0.1) for word in "狗猫鸟鱼船" * 4]),
    "method_grid_shared": lambda: plots.method_grid(IMAGES[0], WORDS[:4], METHODS, shared="权重"),
    "method_grid": lambda: plots.method_grid(IMAGES[0], WORDS[:4], METHODS, [[], [(0.2, 0.25, 0.7, 0.75)], [], []]),
    "similarity_maps": lambda: plots.similarity_maps(IMAGES[:5], CAPTIONS[:5], MAPS[:5, 0, 0], [0.9, -0.1, 0.3, 0.5, 0.2]),
    "localisation_bars": lambda: plots.localisation_bars(LOCALISATION),
    "recall_curves": lambda: plots.recall_curves(RANKS, 300),
    "embedding_map": lambda: plots.embedding_map(POINTS, [*"狗猫鸟鱼船车花树球伞" * 6], [False, True] * 30),
    "similarity_clusters": lambda: plots.similarity_clusters(np.kron(np.eye(3), np.ones((8, 8))) + RANDOM_NOISE,
                                                            ["狗"] * 8 + ["汽车"] * 8 + ["树"] * 8, clusters=3),
    "search_card": lambda: plots.search_card(IMAGES[0], [(IMAGES[i], CAPTIONS[i], 0.9 - i / 10) for i in range(5)],
                                             [(caption, -0.8) for caption in CAPTIONS[:5]], {"model1": CAPTIONS[4]}),
    "search_card_text": lambda: plots.search_card("一只狗", [(IMAGES[0], CAPTIONS[0], 0.9)]),
    "beam_tree": lambda: plots.beam_tree(BEAMS),
    "share_bars": lambda: plots.share_bars(WORDS, np.linspace(0.2, 0.8, len(WORDS))),
    "caption_lengths": lambda: plots.caption_lengths({"华录杯": [8, 12, 12, 20], "coco-cn": [9, 9, 14]}),
    "concept_log_odds": lambda: plots.concept_log_odds(LOG_ODDS),
    "concept_frequencies": lambda: plots.concept_frequencies(FREQUENCIES),
    "vocabulary_growth": lambda: plots.vocabulary_growth({"华录杯": [5, 30, 44, 50], "coco-cn": [7, 20, 25]}),
    "score_intervals": lambda: plots.score_intervals(INTERVALS, "CIDEr"),
    "score_distributions": lambda: plots.score_distributions(SCORES),
    "simplex": lambda: plots.simplex(WEIGHTS, WEIGHTS[:, 0], ["一", "二", "三"], (0.5, 0.25, 0.25),
                                     {"original": (0.5, 0.3, 0.2)}),
    "board_table": lambda: plots.board_table(BOARDS, note="“原”", beside=1),
    "scores_by_references": lambda: plots.scores_by_references(BY_REFERENCES),
    "null_p_values": lambda: plots.null_p_values(np.linspace(0.001, 1, 200)),
    "error_shares": lambda: plots.error_shares(ERRORS),
    "concept_change": lambda: plots.concept_change(CONCEPTS, "model1", "model4", ["香蕉"], "blue: concepts of COCO-CN"),
    "side_by_side": lambda: plots.side_by_side([10, 200, 30, 5], [20, 150, 30, 60], ("model1", "1+2+3")),
    "clip_architecture": lambda: plots.clip_architecture(preset("hualu").model, (7, 7), 2048, COUNTS),
    "caption_architecture": lambda: plots.caption_architecture(preset("miniature").model, (6, 6), 512, COUNTS),
}


def test_alike_pairs_stand_together_and_are_named_by_what_most_are_about():
    shuffled = np.random.default_rng(0).permutation(24)
    similarity = (np.kron(np.eye(3), np.ones((8, 8))) + RANDOM_NOISE)[np.ix_(shuffled, shuffled)]
    order, clusters = spaces.cluster_order(similarity, 3)
    assert sorted(order) == list(range(24))
    groups = (shuffled // 8)[order]
    assert (np.diff(groups) != 0).sum() == 2, "three blocks, each in one piece"
    assert (np.diff(clusters) != 0).sum() == 2
    written = texts(plots.similarity_clusters(similarity, [["狗", "汽车", "树"][i // 8] for i in shuffled], clusters=3))
    assert {f"{name} (8 of 8)" for name in ("狗", "汽车", "树")} <= set(written.split("\n"))


def test_a_tree_of_beams_draws_a_shared_beginning_once():
    figure = plots.beam_tree(BEAMS)
    written = texts(figure).split("\n")
    assert [written.count(c) for c in "一只狗小两条"] == [1, 1, 3, 1, 1, 1]
    assert written.count("end") == 3 and "90" in written and "−0.40" in written


def test_recall_curves_pass_through_recall_at_k():
    ranks = {"after": {"image->text": [1, 1, 2, 5], "text->image": [1, 4, 4, 4]}}
    figure = plots.recall_curves(ranks, 5)
    curve = figure.axes[0].lines[0]
    assert list(curve.get_xdata()) == [1, 2, 3, 4, 5] and list(curve.get_ydata()) == [50, 75, 75, 75, 100]


def test_chance_is_that_of_each_run():
    chance = {"before": {"R@1": 1, "R@5": 2, "R@10": 3}, "after": {"R@1": 10, "R@5": 20, "R@10": 30}}
    lines = plots.recall_bars(RECALLS, chance).axes[0].collections
    assert [[y for (_, y), _ in line.get_segments()] for line in lines] == [[1, 2, 3] * 2, [10, 20, 30] * 2]
    assert all(s[0][0] == pytest.approx(s[1][0], abs=0.5) for line in lines for s in line.get_segments())


def test_rows_of_one_method_may_share_a_scale():
    """What is fainter in one checkpoint then looks fainter; else each row ends at its own highest value."""
    maps = {"model1": np.full((1, 3, 3), 0.2), "model4": np.full((1, 3, 3), 0.05)}

    def tops(**options) -> list[float]:
        figure = plots.method_grid(IMAGES[0], ["狗"], maps, **options)
        return [axes.images[1].get_clim()[1] for axes in figure.axes if len(axes.images) == 2]

    assert tops() == pytest.approx([0.2, 0.05]) and tops(shared="Grad-CAM") == pytest.approx([0.2, 0.2])
    assert "one scale of Grad-CAM" in texts(plots.method_grid(IMAGES[0], ["狗"], maps, shared="Grad-CAM"))
    assert panels.METHODS in texts(plots.method_grid(IMAGES[0], ["狗"], maps)), "Grad-CAM is no weight"


def test_a_colour_bar_keeps_its_steps_in_the_palette():
    figure = plots.attention_word(scene(0), ["狗"], 0, MAPS[0, 0, 0], 0.4)
    bar = next(axes for axes in figure.axes if axes.get_ylabel() == "attention weight")
    pixels = np.asarray(Image.open(io.BytesIO(plots.png_bytes(figure, colours=64))).convert("RGB"))
    x, y = bar.get_position().x0, bar.get_position()
    column = pixels[int((1 - y.y1) * len(pixels)) + 2:int((1 - y.y0) * len(pixels)) - 2, int((x + 0.005) * pixels.shape[1])]
    runs = np.diff(np.flatnonzero(np.r_[True, (column[1:] != column[:-1]).any(axis=1), True]))
    assert runs.max() < len(column) / 8, "no colour stands for more than an eighth of the scale"


def test_an_image_is_drawn_as_models_see_it():
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[274] = 6  # to be turned by a quarter
    buffer = io.BytesIO()
    turned.save(buffer, "jpeg", exif=exif)
    assert style.pixels(Image.open(buffer)).shape == (40, 20, 3)
    assert style.pixels(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).min() == 255
    assert style.pixels(Image.new("I;16", (2, 2), 65535)).min() == 255


def test_pairs_that_nothing_tells_apart_have_no_order():
    assert list(spaces.cluster_order(np.full((5, 5), 0.3))[0]) == [0, 1, 2, 3, 4]


def test_a_matrix_of_many_captions_stays_on_a_page():
    assert plots.similarity_matrix(np.zeros((3, 20))).get_figheight() < 8


def texts(figure) -> str:
    """All that is written in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_draws_chinese_text_and_gives_the_same_bytes_again(name):
    first, again = (plots.png_bytes(FIGURES[name]()) for _ in range(2))
    assert first == again
    assert len(first) < 60_000  # several of them stay under 300 KB in a notebook
    image = Image.open(io.BytesIO(first))
    assert image.width == 774
    assert image.convert("RGB").getpixel((773, 0)) == (255, 255, 255)  # the face stays white in the palette


def test_every_figure_function_is_drawn_here():
    drawing = {name for name in plots.__all__ if name not in ("png_bytes", "save", "show", "use_house_style")}
    assert drawing <= set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_leaves_the_figure(name):
    figure = FIGURES[name]()
    plots.png_bytes(figure)  # the layout is done when drawing
    frame = figure.bbox
    both = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = [tick for axis in both for tick in (*axis.majorTicks, *axis.minorTicks)]
    beyond = {label for tick in ticks for label in (tick.label1, tick.label2)}  # some lie outside and are not drawn
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in beyond:
            box = text.get_window_extent()
            assert box.x0 >= frame.x0 - 1 and box.x1 <= frame.x1 + 1, text.get_text()
            assert box.y0 >= frame.y0 - 1 and box.y1 <= frame.y1 + 1, text.get_text()


def test_the_font_has_the_gb2312_characters_and_punctuation():
    path = style.Path(style.__file__).parent / "fonts" / "NotoSansSC-subset.otf"
    glyphs = font_manager.get_font(path).get_charmap()
    hanzi = {bytes([high, low]).decode("gb2312", "ignore") for high in range(0xB0, 0xF8) for low in range(0xA1, 0xFF)} - {""}
    assert len(hanzi) == 6763
    wanted = hanzi | set("，。、；：！？“”‘’（）《》【】…—·～￥％×±≤≥−→←↑↓½²τθΔ") | {chr(i) for i in range(0x20, 0x7F)}
    assert not {character for character in wanted if ord(character) not in glyphs}
    assert path.stat().st_size < 3e6
    assert (path.parent / "OFL.txt").is_file()


def test_a_missing_glyph_is_an_error():
    with pytest.raises(UserWarning, match="Glyph"):
        plots.png_bytes(plots.caption_card(IMAGES[0], {"x": ["𠮷野家"]}))


def test_the_colours_of_similarity_do_not_depend_on_the_values():
    for factor in (0.01, 1):
        figure = plots.similarity_before_after(factor * SIMILARITY, SIMILARITY)
        matrices = [image for axes in figure.axes for image in axes.images if image.get_array().shape == (8, 8)]
        assert [image.get_clim() for image in matrices] == [(-1, 1)] * 2


def test_attention_panels_share_one_scale_and_say_what_they_are_not():
    figure = plots.attention_strip(IMAGES[0], WORDS, MAPS[:, 0, 0])
    maps = [image for axes in figure.axes for image in axes.images if image.get_array().shape == (72, 72)]
    assert len(maps) == len(WORDS)
    assert {image.get_clim() for image in maps} == {(0, MAPS[:, 0, 0].max())}
    assert "Weights are not explanations" in texts(figure)


def test_columns_are_images_and_rows_are_captions():
    similarity = np.zeros((3, 3))
    similarity[2, 0] = 0.77  # image 2 and caption 0
    figure = plots.similarity_matrix(similarity, IMAGES[:3], CAPTIONS[:3])
    matrix = next(image for axes in figure.axes for image in axes.images if image.get_array().shape == (3, 3))
    assert matrix.get_array()[0, 2] == 0.77 and matrix.get_array().sum() == 0.77


def test_the_mark_lies_on_its_cell_and_moves_without_the_rest_being_drawn_again(monkeypatch):
    figure = plots.similarity_matrix(np.zeros((40, 40)), marked=(0, 0))
    pictures = {}
    for cell in ((0, 0), (30, 7)):
        figure.mark(*cell)
        pictures[cell] = np.asarray(Image.open(io.BytesIO(plots.png_bytes(figure, dpi=100, small=False)))).astype(int)
        monkeypatch.setattr(type(figure), "draw", lambda *_: pytest.fail("drawn a second time"))
        matrix = next(image for axes in figure.axes for image in axes.images if image.get_array().shape == (40, 40))
        x, y = matrix.axes.transData.transform(np.array(cell) + 0.95) * 100 / figure.dpi  # the frame's lower right corner
        colour = pictures[cell][round(pictures[cell].shape[0] - y), round(x)]
        assert colour[0] > 180 and colour[2] < 120, "orange"
    changed = np.abs(pictures[0, 0] - pictures[30, 7]).sum(axis=2) > 0
    assert 0 < changed.mean() < 0.01


def test_the_numbers_in_the_cells_are_drawn_in_the_colour_that_is_read_on_them():
    figure = plots.similarity_matrix(np.array([[0.95, 0.1], [0.2, 0.9]]))
    colours = {tuple(np.round(patch.get_facecolor(), 2)) for patch in figure.findobj(PathPatch)}
    assert colours == {(1, 1, 1, 1), tuple(np.round(to_rgba(style.INK), 2))}


def test_maps_with_negative_values_have_a_scale_around_zero():
    figure = FIGURES["attention_signed"]()
    drawn = next(image for axes in figure.axes for image in axes.images if image.get_array().shape == (72, 72))
    assert drawn.get_clim() == (-0.5, 0.5) and drawn.get_cmap().name == style.DIVERGING


@pytest.mark.parametrize(("name", "grid", "channels", "shapes"), [
    ("hualu", (7, 7), 2048, ["N × 3 ×\n224 × 224", "N × 2048", "N × 768", "12 layers × 768", "12 heads", "T ≤ 100"]),
    ("miniature", (6, 6), 512, ["N × 3 ×\n96 × 96", "N × 512", "N × 128", "2 layers × 128", "4 heads", "T ≤ 40"]),
])
def test_the_clip_drawing_has_the_shapes_of_its_config(name, grid, channels, shapes):
    written = texts(plots.clip_architecture(preset(name).model, grid, channels, COUNTS))
    assert [shape for shape in shapes if shape not in written] == []
    assert "Res2Next50" in written and "0.5 M parameters" in written


def test_the_caption_drawing_has_one_prefix_token_or_one_more_than_cells():
    pooled = texts(plots.caption_architecture(preset("hualu").model, (7, 7), 2048))
    assert "P = 1 token" in pooled and "grid head" not in pooled and "N × 1 × 768" in pooled
    grid = texts(plots.caption_architecture(preset("miniature").model, (6, 6), 512))
    assert "P = 37 tokens, 1 pooled + 6 × 6 cells" in grid and "N × 36 × 128" in grid and "\n37\n" in grid


def test_captions_wrap_between_characters_and_never_before_a_comma():
    wrapped = style.wrap("草地上有一只狗，iPhone 12 在旁边。", 8).split("\n")
    assert wrapped == ["草地上有", "一只狗，", "iPhone", "12 在旁", "边。"]
    assert style.wrap("一二三四，五", 8) == "一二三\n四，五"
    assert style.wrap("一二三四五六", 4, lines=2) == "一二\n三…"


def test_save_writes_a_small_dated_by_nothing_picture_with_its_description(tmp_path):
    path = plots.save(FIGURES["similarity_matrix"](), tmp_path / "figures", "matrix", alt="相似度")
    image = Image.open(path)
    assert path == tmp_path / "figures" / "matrix.png"
    assert 1200 <= image.width <= 1600 and path.stat().st_size < 300_000
    assert image.text == {"Description": "相似度"}


def test_show_saves_and_gives_the_figure_which_carries_its_alt_text_into_the_notebook(tmp_path):
    figure = plots.show(FIGURES["board_table"](), tmp_path, "table", alt="the boards")
    data, metadata = figure._repr_mimebundle_()
    assert (tmp_path / "table.png").is_file()
    assert data["text/plain"] == metadata["image/png"]["alt"] == "the boards"
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")


def test_images_may_be_arrays_channels_first_or_floats():
    array = np.asarray(IMAGES[0])
    for same in (array.transpose(2, 0, 1), array / 255.0, (array / 255.0).transpose(2, 0, 1)):
        assert np.array_equal(style.pixels(same), array)


def test_the_rooms_open_without_torch_and_ipywidgets():
    code = ("import sys; sys.modules['torch'] = sys.modules['ipywidgets'] = None\n"
            "from clipcap_lib import plots, widgets; plots.use_house_style()")
    subprocess.run([sys.executable, "-c", code], check=True)
