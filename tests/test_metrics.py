"""Scores against pycocoevalcap and the METEOR jar called directly, and against figures measured on real captions."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from clipcap_lib import bootstrap, captions, cli, meteor, metrics, rouge
from clipcap_lib.clip_scores import clip_score
from clipcap_lib.config import InputError

SUBJECTS = ["一个男人", "一个小女孩", "两只黑色的狗", "一只狗", "几个孩子", "穿着红色T恤的男孩", "一群人"]
PLACES = ["在草地上", "在沙滩上", "在雪地里", "在水里", "在足球场上", "站在大树旁边，", ""]
ACTIONS = ["奔跑", "玩耍", "追一个红色的球", "踢足球", "看着一只黑色的狗", "骑自行车", "跳起来接飞盘", "走路走路走路"]


def drawn_captions(images: int, captions: int, seed: int) -> dict[str, list[str]]:
    """Made-up captions with repeated words, punctuation and full stops: `{file: [captions]}`."""
    random = np.random.default_rng(seed)
    pick = lambda words: words[random.integers(len(words))]  # noqa: E731
    return {f"{i}.jpg": [pick(SUBJECTS) + pick(PLACES) + pick(ACTIONS) + "。" * int(random.integers(2))
                         for _ in range(captions)] for i in range(images)}


@pytest.fixture(scope="module")
def drawn() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    predictions = drawn_captions(120, 1, seed=1)
    predictions["0.jpg"] = ["。"]  # nothing is left of it
    return predictions, drawn_captions(120, 5, seed=2)


@pytest.fixture(scope="module")
def human(real_data_root) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Flickr8k-CN's test images: the first human caption, and the other four."""
    folder = real_data_root / "flickr8k-cn" / "data"
    names = (folder / "flickr8ktest.txt").read_text(encoding="utf-8").split()
    captions: dict[str, dict[int, str]] = defaultdict(dict)
    for line in (folder / "flickr8kzhc.caption.txt").read_text(encoding="utf-8").splitlines():
        key, caption = line.split(" ", 1)
        name, _, number = key.split("#")
        captions[name][int(number)] = caption
    rows = {f"{name}.jpg": [captions[f"{name}.jpg"][n] for n in range(5)] for name in names}
    return {name: row[:1] for name, row in rows.items()}, {name: row[1:] for name, row in rows.items()}


def segmented(captions: dict[str, list[str]], segmentation: str) -> dict[str, list[str]]:
    return {name: [" ".join(row) for row in metrics.segment(rows, segmentation)] for name, rows in captions.items()}


def pycocoevalcap_scores(predictions, references, segmentation) -> dict[str, tuple[float, list[float]]]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given, said = segmented(references, segmentation), segmented(predictions, segmentation)
    said = {name: said[name] for name in given}
    with contextlib.redirect_stdout(io.StringIO()):
        values, rows = Bleu(4).compute_score(given, said)
    return {**{f"BLEU-{n + 1}": (values[n], rows[n]) for n in range(4)},
            "ROUGE-L": Rouge().compute_score(given, said), "CIDEr": Cider().compute_score(given, said)}


# -- caption scores ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("segmentation", ["jieba", "characters"])
def test_bleu_rouge_and_cider_are_those_of_pycocoevalcap_called_directly(drawn, segmentation, capsys):
    scores = metrics.score(*drawn, segmentation)
    assert capsys.readouterr().out == ""  # pycocoevalcap prints its counts unless told not to
    for metric, (value, rows) in pycocoevalcap_scores(*drawn, segmentation).items():
        assert scores.values[metric] == pytest.approx(100 * value, abs=1e-9)
        assert [scores.per_image[name][metric] for name in drawn[1]] == pytest.approx(100 * np.array(rows), abs=1e-9)


def test_real_captions_score_as_with_pycocoevalcap_called_directly(human):
    scores = metrics.score(*human, "characters")
    for metric, (value, _) in pycocoevalcap_scores(*human, "characters").items():
        assert scores.values[metric] == pytest.approx(100 * value, abs=1e-9)


@pytest.mark.parametrize(("segmentation", "expected"), [
    ("jieba", {"BLEU-4": 24.2, "METEOR": 36.5, "ROUGE-L": 55.3, "CIDEr": 108.0}),
    ("characters", {"BLEU-4": 39.7, "METEOR": 36.5, "ROUGE-L": 66.3, "CIDEr": 180.3}),
])
def test_one_human_caption_against_the_other_four_scores_as_measured(human, segmentation, expected):
    values = metrics.score(*human, segmentation).values
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=0.1)


def test_the_signature_says_how_a_score_was_made(drawn):
    predictions, references = drawn
    signature = metrics.score(predictions, references, "jieba", ["CIDEr"]).signature
    for part in ("seg:jieba-0.", "punct:full stop dropped", "refs:5", "cider:D-sigma6-df:refs", "images:120",
                 "pycocoevalcap:1.", "v:"):
        assert part in signature
    fewer = {**references, "3.jpg": references["3.jpg"][:4]}
    assert "seg:characters|punct:all dropped|refs:4-5|" in metrics.score(predictions, fewer).signature


def test_an_empty_prediction_scores_nothing_and_is_counted(drawn):
    scores = metrics.score(*drawn)
    assert scores.counted == {"empty predictions": 1, "empty references left out": 0}
    assert max(scores.per_image["0.jpg"].values()) < 1e-9


@pytest.mark.parametrize("segmentation", ["jieba", "characters"])
def test_spaces_and_special_tokens_in_predictions_are_counted_and_scored_as_they_are(segmentation):
    references = {f"{n}.jpg": ["一只狗在草地上跑", "狗在跑"] for n in range(4)}
    said = ["一 只 狗", "一只狗[SEP][PAD]", "[CLS] 狗 在 跑", "穿 T 恤的 2 只狗"]
    scores = metrics.score({f"{n}.jpg": [text] for n, text in enumerate(said)}, references, segmentation, ["ROUGE-L"])
    assert {what: count for what, count in scores.counted.items() if count} == {
        "predictions with spaces between Chinese characters": 2, "predictions with [SEP] or another special token": 2}
    plain = metrics.score({name: ["一只狗"] for name in references}, references, segmentation, ["ROUGE-L"])
    assert plain.per_image["1.jpg"]["ROUGE-L"] > scores.per_image["1.jpg"]["ROUGE-L"] > 0


def test_an_empty_reference_is_left_out_and_counted(drawn):
    predictions, references = drawn
    longer = {**references, "5.jpg": [*references["5.jpg"], "。！"]}
    scores = metrics.score(predictions, longer)
    assert scores.counted["empty references left out"] == 1
    assert scores.values == metrics.score(predictions, references).values


def test_chosen_metrics_score_as_all_of_them(drawn):
    everything = metrics.score(*drawn).values
    assert metrics.score(*drawn, metrics=["CIDEr", "METEOR"]).values == {m: everything[m] for m in ("CIDEr", "METEOR")}
    assert metrics.score(*drawn, metrics="BLEU-4").values == {"BLEU-4": everything["BLEU-4"]}


def test_words_added_to_the_shared_jieba_do_not_change_the_segmentation():
    import jieba

    before = metrics.segment(["一只狗在绿草地上飞奔"], "jieba")
    jieba.add_word("狗在绿草地", freq=10**9)
    try:
        captions._segment.cache_clear()
        assert metrics.segment(["一只狗在绿草地上飞奔"], "jieba") == before
    finally:
        jieba.del_word("狗在绿草地")


def test_characters_are_all_but_punctuation_space_and_symbols():
    assert metrics.segment(["穿T恤的，2个 人。～！"], "characters") == [list("穿T恤的2个人")]
    assert metrics.segment(["一只狗，在跑。"], "jieba") == [["一只", "狗", "，", "在", "跑"]]


# -- METEOR -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def meteor_jar():
    if shutil.which("java") is None:
        pytest.skip("the METEOR jar needs Java")
    from pycocoevalcap.meteor.meteor import Meteor

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")  # whatever the machine's own encoding is
        return Meteor()


def assert_meteor_is_the_jars(meteor_jar, candidates: list[list[str]], references: list[list[list[str]]]) -> None:
    try:
        jar, jar_images = meteor_jar.compute_score(
            {i: [" ".join(tokens) for tokens in rows] for i, rows in enumerate(references)},
            {i: [" ".join(tokens)] for i, tokens in enumerate(candidates)})
    except Exception:
        meteor_jar.lock.release()  # its destructor would wait for it forever
        raise
    table = np.array([meteor.image_statistics(meteor.tokenize(row), [meteor.tokenize(r) for r in rows])
                      for row, rows in zip(candidates, references, strict=True)])
    assert float(meteor.pooled_score(table.sum(axis=0))) == pytest.approx(jar, abs=1e-4)
    assert meteor.pooled_score(table) == pytest.approx(np.array(jar_images), abs=1e-4)


@pytest.mark.parametrize("segmentation", ["jieba", "characters"])
def test_meteor_is_the_jars_on_the_thousand_human_caption_sets(meteor_jar, human, segmentation):
    predictions, references = (list(captions.values()) for captions in human)
    assert_meteor_is_the_jars(meteor_jar, [metrics.segment(row, segmentation)[0] for row in predictions],
                              [metrics.segment(rows, segmentation) for rows in references])


def test_meteor_is_the_jars_on_long_repetitive_empty_and_identical_captions(meteor_jar, drawn):
    predictions, references = (list(captions.values()) for captions in drawn)
    said = [metrics.segment(row, "characters")[0] for row in predictions]
    given = [metrics.segment(rows, "characters") for rows in references]
    # Four captions in a row repeat so many characters that the jar's beam search no longer finds the best alignment.
    said += [said[i] + said[i + 1] + said[i + 2] + said[i + 3] for i in range(1, 60)]
    given += [[a + b + c + d, a] for a, b, c, d, _ in given[1:60]]
    said += [list("一只狗" * 8), given[0][2]]
    given += [given[3], given[0]]
    assert_meteor_is_the_jars(meteor_jar, said, given)


def test_meteor_of_a_hand_made_pair_follows_the_published_formula():
    # 3 of 4 and of 5 tokens match, in 2 chunks.
    table = np.array(meteor.image_statistics(list("甲乙丙丁"), [list("甲乙戊丙己")]))
    assert table.tolist() == [4, 5, 3, 2]
    precision, recall = 3 / 4, 3 / 5
    f_mean = precision * recall / (0.85 * precision + 0.15 * recall)
    assert meteor.pooled_score(table) == pytest.approx(f_mean * (1 - 0.6 * (2 / 3) ** 0.2), abs=1e-12)
    assert meteor.pooled_score(np.array(meteor.image_statistics(list("甲乙"), [list("丙"), list("甲乙")]))) == 1


# -- CIDEr-D ----------------------------------------------------------------------------------------------------------

def plain_cider_d(candidate, references, frequency: Counter, images: int) -> float:
    """The formula of Vedantam et al. (2015) for one image, with loops; lengths as pycocoevalcap takes them."""
    def vectors(tokens):
        counts = Counter(tuple(tokens[i:i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))
        return {gram: count * (math.log(images) - math.log(max(1, frequency[gram]))) for gram, count in counts.items()}

    total, said = 0.0, vectors(candidate)
    for reference in references:
        given = vectors(reference)
        penalty = math.exp(-(max(len(candidate) - 1, 0) - max(len(reference) - 1, 0)) ** 2 / (2 * 6**2))
        for n in range(1, 5):
            dot = sum(min(weight, given.get(gram, 0)) * given.get(gram, 0)
                      for gram, weight in said.items() if len(gram) == n)
            norms = [math.sqrt(sum(w**2 for gram, w in text.items() if len(gram) == n)) for text in (said, given)]
            total += penalty * dot / math.prod(norms) / 4 if all(norms) else 0
    return 10 * total / len(references)


@pytest.mark.parametrize("segmentation", ["jieba", "characters"])
def test_cider_d_with_the_references_own_frequencies_is_pycocoevalcaps(drawn, segmentation):
    predictions, references = drawn
    said = [metrics.segment(row, segmentation)[0] for row in predictions.values()]
    given = [metrics.segment(rows, segmentation) for rows in references.values()]
    _, expected = pycocoevalcap_scores(predictions, references, segmentation)["CIDEr"]
    assert metrics.cider_d(said, given, metrics.document_frequencies(given)) == pytest.approx(expected, abs=1e-9)


def test_cider_d_with_frequencies_of_another_set_follows_the_formula():
    training = [metrics.segment(rows, "characters") for rows in drawn_captions(300, 5, seed=3).values()]
    frequency = Counter(gram for rows in training
                        for gram in {tuple(row[i:i + n]) for row in rows for n in range(1, 5)
                                     for i in range(len(row) - n + 1)})
    said = [list("一只猫在草地上"), list("猫"), [], list("狗狗狗狗狗"), list("两只黑色的狗在水里奔跑")]
    given = [[list("一只猫在睡觉"), list("猫在草地上")], [list("猫")], [list("一只狗")], [list("一只狗"), list("狗狗")],
             [list("两只黑色的狗在水里奔跑")]]
    expected = [plain_cider_d(row, rows, frequency, 300) for row, rows in zip(said, given, strict=True)]
    found = metrics.cider_d(said, given, metrics.document_frequencies(training))
    assert found == pytest.approx(np.array(expected), abs=1e-9)
    assert found[4] == pytest.approx(10)  # a caption equal to its only reference


def test_cider_d_of_one_image_does_not_depend_on_the_others_in_the_call(drawn):
    predictions, references = drawn
    said = [metrics.segment(row, "characters")[0] for row in predictions.values()]
    given = [metrics.segment(rows, "characters") for rows in references.values()]
    frequencies = metrics.document_frequencies(given)
    everything = metrics.cider_d(said, given, frequencies)
    assert metrics.cider_d(said[7:9], given[7:9], frequencies) == pytest.approx(everything[7:9], abs=1e-12)


def test_captions_that_share_nothing_with_their_references_have_no_cider():
    given = [[list("一只狗")], [list("一个人")]]
    assert metrics.cider_d([list("天空"), []], given, metrics.document_frequencies(given)).tolist() == [0, 0]


def test_references_and_candidates_that_do_not_pair_are_refused():
    given = [[list("一只狗")], [list("一个人")]]
    frequencies = metrics.document_frequencies(given)
    for said, wanted in (([list("狗")], given), ([list("狗")], [[]])):
        with pytest.raises(InputError, match="references"):
            metrics.cider_d(said, wanted, frequencies)
    with pytest.raises(InputError, match="not empty"):
        metrics.document_frequencies([[[]]])


def test_training_can_import_the_metrics_without_the_scoring_packages():
    code = ("import sys\n"
            "for name in ('jieba', 'pycocoevalcap', 'pandas', 'torch'): sys.modules[name] = None\n"
            "from clipcap_lib import metrics\n"
            "tokens = [[list('一只狗')], [list('一个人')]]\n"
            "print(metrics.cider_d([list('一只狗')] * 2, tokens, metrics.document_frequencies(tokens)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- retrieval --------------------------------------------------------------------------------------------------------

def test_recall_counts_an_image_as_found_by_any_of_its_texts():
    similarity = np.array([[.9, .1, .8, .3],   # texts 0 and 1 are its own: rank 1
                           [.2, .3, .7, .6],   # its own text 2 is first
                           [.5, .6, .7, .4]])  # its own text 3 is last
    recalls = metrics.recall_at_k(similarity, np.array([0, 0, 1, 2]), ks=(1, 2))
    assert recalls["image->text R@1"] == pytest.approx(200 / 3)
    assert recalls["image->text median rank"] == 1
    # Text 0: first. Text 1: last. Text 2: .8 is higher, .7 ties. Text 3: second.
    assert recalls["text->image R@1"] == 25
    assert recalls["text->image R@2"] == 50
    assert recalls["text->image median rank"] == 2.5


def test_a_constant_similarity_recalls_nothing():
    recalls = metrics.recall_at_k(np.ones((20, 20)), np.arange(20))
    assert {value for name, value in recalls.items() if "R@" in name} == {0.0}


def test_recall_agrees_with_sorting_each_row():
    random = np.random.default_rng(0)
    similarity, image_of_text = random.normal(size=(30, 90)), random.permutation(np.repeat(np.arange(30), 3))
    recalls = metrics.recall_at_k(similarity, image_of_text)
    for k in (1, 5, 10):
        to_text = [i in image_of_text[np.argsort(-similarity[i])[:k]] for i in range(30)]
        to_image = [image_of_text[t] in np.argsort(-similarity[:, t])[:k] for t in range(90)]
        assert recalls[f"image->text R@{k}"] == pytest.approx(100 * np.mean(to_text))
        assert recalls[f"text->image R@{k}"] == pytest.approx(100 * np.mean(to_image))


@pytest.mark.parametrize(("similarity", "image_of_text"), [
    (np.ones((2, 3)), [0, 1]), (np.full((2, 2), np.nan), [0, 1]), (np.ones((2, 2)), [0, 0]), (np.ones((2, 2)), [0, 2]),
])
def test_recall_refuses_what_does_not_fit(similarity, image_of_text):
    with pytest.raises(InputError):
        metrics.recall_at_k(similarity, np.array(image_of_text))


# -- uncertainty ------------------------------------------------------------------------------------------------------

def test_sums_of_the_statistics_give_the_corpus_scores(drawn):
    scores = metrics.score(*drawn)
    again = scores.corpus(scores.statistics.sum(axis=0), scores.images)
    assert {name: float(value) for name, value in again.items()} == pytest.approx(scores.values, abs=1e-9)


def test_an_interval_holds_the_resampled_corpus_scores_and_the_score_itself(drawn):
    predictions, references = drawn
    scores = metrics.score(predictions, references, metrics=["BLEU-4", "METEOR"])
    intervals = metrics.bootstrap_intervals(scores, resamples=400, seed=3)
    # The plain twin: score the drawn images anew, each under a name of its own.
    random, files, values = np.random.default_rng(4), list(references), []
    for _ in range(60):
        rows = [files[i] for i in random.integers(0, len(files), len(files))]
        again = metrics.score({str(i): predictions[name] for i, name in enumerate(rows)},
                              {str(i): references[name] for i, name in enumerate(rows)}, metrics=["BLEU-4", "METEOR"])
        values.append([again.values["BLEU-4"], again.values["METEOR"]])
    for metric, column in zip(("BLEU-4", "METEOR"), np.transpose(values), strict=True):
        low, high = intervals[metric]
        assert low < scores.values[metric] < high
        assert 0.8 <= np.mean((low <= column) & (column <= high)) <= 1
    assert intervals == metrics.bootstrap_intervals(scores, resamples=400, seed=3)


def made_up(values: np.ndarray) -> metrics.Scores:
    """Scores of a system known only by the CIDEr of each image."""
    files = tuple(map(str, range(len(values))))
    return metrics.Scores({"CIDEr": 100 * float(np.mean(values))}, {}, "made up", len(values), {}, files, ("CIDEr",),
                          values[:, None])


def test_the_interval_of_a_mean_is_the_normal_one_on_many_images():
    values = np.random.default_rng(0).exponential(size=2000)
    error = 1.96 * values.std() / np.sqrt(len(values))
    expected = (values.mean() - error, values.mean() + error)
    assert metrics.mean_interval(values, 2000) == pytest.approx(expected, abs=0.1 * error)
    assert metrics.bootstrap_intervals(made_up(values), 2000)["CIDEr"] == pytest.approx(
        100 * np.array(expected), abs=10 * error)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    random, hits = np.random.default_rng(1), 0
    for trial in range(200):
        low, high = metrics.mean_interval(random.exponential(size=150), 300, seed=trial)
        hits += low <= 1 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_equal_systems_do_not_differ(drawn):
    scores = metrics.score(*drawn)
    assert metrics.paired_bootstrap(scores, scores, "BLEU-4") == metrics.Paired(0, 0, 0, 1)


def test_a_clearly_better_system_is_found_better(drawn):
    predictions, references = drawn
    better = {name: references[name][:1] if i % 2 else row for i, (name, row) in enumerate(predictions.items())}
    paired = metrics.paired_bootstrap(metrics.score(better, references), metrics.score(*drawn), "METEOR")
    assert paired.p < 0.01
    assert 0 < paired.low < paired.difference < paired.high


def test_the_paired_test_errs_at_its_nominal_level_on_two_samples_of_one_system():
    random = np.random.default_rng(2)
    errors = sum(metrics.paired_bootstrap(made_up(random.exponential(size=150)), made_up(random.exponential(size=150)),
                                          "CIDEr", 300, seed).p <= 0.05 for seed in range(200))
    assert abs(errors - 10) <= 3 * math.sqrt(200 * 0.05 * 0.95)


def test_the_seed_decides_the_resamples_and_blocks_of_them_go_on_where_the_last_ended(monkeypatch):
    values, other = np.random.default_rng(3).exponential(size=(2, 40))
    scores = made_up(values), made_up(other)
    for ask in (lambda seed: metrics.mean_interval(values, 100, seed),
                lambda seed: metrics.bootstrap_intervals(scores[0], 100, seed),
                lambda seed: metrics.paired_bootstrap(*scores, "CIDEr", 100, seed)):
        assert ask(1) == ask(1) != ask(2)
    whole, = bootstrap._weights(40, 10, 5)
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 3 * 40)
    blocks = list(bootstrap._weights(40, 10, 5))
    assert [len(block) for block in blocks] == [3, 3, 3, 1] and np.array_equal(np.concatenate(blocks), whole)
    assert (whole.sum(axis=1) == 40).all() and len(np.unique(whole, axis=0)) == 10


def test_every_comparison_of_nothing_is_dealt_and_resampled_anew(monkeypatch):
    samples, met, paired = [made_up(v) for v in np.random.default_rng(0).random((3, 30))], [], bootstrap.paired_bootstrap
    monkeypatch.setattr(bootstrap, "paired_bootstrap", lambda a, b, metric, resamples, seed: met.append(
        (seed, a.statistics.tobytes())) or paired(a, b, metric, resamples, seed))
    p = bootstrap.null_p_values(samples, "CIDEr", 8, 100)
    assert [len(set(column)) for column in zip(*met, strict=True)] == [8, 8] and len(set(p)) > 4
    bootstrap.null_p_values(samples, "CIDEr", 8, 100, seed=1)
    assert len({dealt for _, dealt in met}) == 16


@pytest.mark.parametrize("metric", ["CIDEr", "BLEU-4", "METEOR"])
def test_two_samples_of_the_same_writers_differ_no_more_often_than_the_level_says(metric):
    """Captions by the same hands, dealt to two would-be systems: 200 comparisons at the level 5 %, and at 20 %."""
    references = drawn_captions(100, 5, seed=9)
    samples = [metrics.score(*metrics.one_against_the_others(references, n)) for n in range(4)]
    p = metrics.null_p_values(samples, metric, comparisons=200, resamples=300)
    for level in (0.05, 0.2):
        assert abs((p <= level).sum() - 200 * level) <= 3 * math.sqrt(200 * level * (1 - level))
    better = [metrics.score({name: [row[-1]] for name, row in references.items()},
                            {name: row[:4] for name, row in references.items()}),
              metrics.score({name: ["一群人"] for name in references}, {n: r[:4] for n, r in references.items()})]
    assert metrics.paired_bootstrap(*better, metric, 300).p < 0.01, "where there is something to find, it is found"
    with pytest.raises(InputError, match="at least two"):
        metrics.null_p_values(samples[:1], metric)


def test_systems_on_other_images_or_with_another_signature_are_not_compared(drawn):
    predictions, references = drawn
    scores = metrics.score(*drawn)
    with pytest.raises(InputError, match="signature"):
        metrics.paired_bootstrap(scores, metrics.score(*drawn, "jieba"), "CIDEr")
    fewer = {name: references[name] for name in list(references)[1:]}
    other = metrics.score({name: predictions[name] for name in fewer}, fewer)
    with pytest.raises(InputError, match=r"same images.*'0\.jpg'"):
        metrics.paired_bootstrap(scores, other, "CIDEr")
    with pytest.raises(InputError, match="same order; they differ in 0 images"):
        metrics.paired_bootstrap(scores, replace(scores, files=scores.files[::-1]), "CIDEr")
    with pytest.raises(InputError, match="SPICE"):
        metrics.paired_bootstrap(scores, scores, "SPICE")


def test_scores_against_other_references_are_not_compared(drawn):
    predictions, references = drawn
    turned = dict(zip(references, [*list(references.values())[1:], next(iter(references.values()))], strict=True))
    with pytest.raises(InputError, match="different references"):
        metrics.paired_bootstrap(metrics.score(predictions, references), metrics.score(predictions, turned), "CIDEr")


def test_ties_of_systems_that_differ_on_few_images_are_counted_whatever_rounding_says():
    """Against the same test in whole numbers, where ties are exact."""
    for seed in range(40):
        random = np.random.default_rng(seed)
        base, better = random.integers(0, 300, 100), np.zeros(100, int)
        better[random.choice(100, 4, replace=False)] = 70
        found = metrics.paired_bootstrap(made_up((base + better) / 100), made_up(base / 100), "CIDEr", 500)
        weights = np.concatenate(list(bootstrap._weights(100, 500, 0))).astype(int)
        whole = weights @ better
        extreme = (np.abs(whole - better.sum()) >= better.sum()).sum()
        assert found.p == pytest.approx((extreme + 1) / 501), seed


def test_a_ratio_is_resampled_by_image():
    correct, cases = np.array([3, 0, 2, 0] * 50), np.array([4, 0, 2, 1] * 50)
    low, high = metrics.ratio_interval(correct, cases)
    assert low < 5 / 7 < high
    assert high - low < 0.15
    assert metrics.ratio_interval([1, 0, 0], [1, 0, 0]) == (1, 1), "many resamples hold no case and are left out"
    with pytest.raises(InputError):
        metrics.ratio_interval(correct, np.zeros(200))


# -- variety and floors -----------------------------------------------------------------------------------------------

def test_diversity_counts_distinct_novel_and_used():
    found = metrics.diversity({"a": ["一只狗。"], "b": ["一只狗"], "c": ["一个人"], "d": ["人"]}, ["一只狗，"])
    assert found == pytest.approx({"captions": 4, "distinct captions": 3, "distinct-1": 50, "distinct-2": 400 / 6,
                                   "vocabulary": 5, "mean length": 2.5, "novel": 50})


def test_the_best_constant_caption_is_the_one_that_scores_best(drawn):
    _, references = drawn
    candidates = ["天空", "。", "一只狗在草地上奔跑", "一个男人在草地上玩耍", "一个男人在草地上玩耍"]
    values = {caption: metrics.score({name: [caption] for name in references}, references, "jieba", "CIDEr").values
              for caption in candidates}
    best = max(values, key=lambda caption: values[caption]["CIDEr"])
    found, value = metrics.best_constant_caption(references, candidates, "jieba")
    assert (found, value) == (best, pytest.approx(values[best]["CIDEr"], abs=1e-9))


def test_the_constant_man_on_the_grass_scores_as_measured(human):
    references = {name: human[0][name] + human[1][name] for name in human[0]}
    for segmentation, expected in (("jieba", 16.1), ("characters", 27.0)):
        _, value = metrics.best_constant_caption(references, ["一个男人在草地上"], segmentation)
        assert value == pytest.approx(expected, abs=0.1)


# -- what is given ----------------------------------------------------------------------------------------------------

def test_captions_are_read_back_as_written(tmp_path):
    captions = {"甲.jpg": ["一只狗。", ""], "b.jpg": ["😀"]}
    path = tmp_path / "res.json"
    path.write_text(json.dumps(captions, ensure_ascii=True))
    assert metrics.load_captions(path) == captions
    path.write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8-sig")
    assert metrics.load_captions(path) == captions


@pytest.mark.parametrize(("content", "message"), [
    (b'{"a.jpg": ["x"', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    ('{"a.jpg": ["狗"]}'.encode("gb18030"), "not UTF-8 at byte"),
    (b'{"a.jpg": ["x"], "b.jpg": ["y"], "a.jpg": ["z"]}', r"'a\.jpg' is there twice"),
    (b'[{"image_id": "a", "caption": "x"}]', "found list"),
    (b'{"a.jpg": "x"}', r"'a\.jpg' must have a list"),
    (b'{"a.jpg": ["x", 1]}', r"'a\.jpg' must have a list"),
    (b'{"a.jpg": []}', r"'a\.jpg' has no caption"),
    (rb'{"a.jpg": ["x\ud83d"]}', r"'a\.jpg' holds half of a surrogate pair at character 1"),
    (rb'{"\ud83d.jpg": ["x"]}', "half of a surrogate pair"),
])
def test_a_file_that_is_not_captions_is_refused_naming_the_place(tmp_path, content, message):
    path = tmp_path / "res.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        metrics.load_captions(path)
    assert str(raised.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        metrics.load_captions(tmp_path / "none.json")


def test_predictions_that_do_not_fit_the_references_are_refused_naming_the_image(drawn):
    predictions, references = drawn
    for given, wanted, message in [
        ({n: c for n, c in predictions.items() if n != "4.jpg"}, references, r"1 of 120 .*no prediction, '4\.jpg'"),
        ({**predictions, "new.jpg": ["狗"]}, references, r"no references, 'new\.jpg'"),
        ({**predictions, "4.jpg": ["狗", "猫"]}, references, r"'4\.jpg' has 2 captions"),
        ({**predictions, "4.jpg": "狗"}, references, r"predictions: '4\.jpg' must have a list"),
        (predictions, {**references, "4.jpg": ["。"]}, None),
        (predictions, {**references, "4.jpg": []}, r"references: '4\.jpg' has no caption"),
        ({}, {}, "no images"),
    ]:
        with pytest.raises(InputError, match=message or r"'4\.jpg' has only empty captions"):
            metrics.score(given, wanted)


@pytest.fixture
def score_command(tmp_path, monkeypatch, capsys):
    """The command `score` on written files -> exit code, what it printed, what it complained of."""
    files = {"references": {"1.jpg": ["一只狗", "狗在跑"], "2.jpg": ["两只猫", "猫在睡"]},
             "ours": {"1.jpg": ["一只狗"], "2.jpg": ["两只狗"]}, "fewer": {"1.jpg": ["一只狗"]},
             "elsewhere": {"7": ["一只狗"], "8": ["猫"]}, "spaced": {"1.jpg": ["一 只 狗"], "2.jpg": [""]}}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPCAP_RUNS", str(tmp_path / "runs"))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["score", "--segmentation", "characters", *arguments])
        return code, *capsys.readouterr()

    return run


def test_a_fault_of_a_compared_file_is_said_of_that_file_before_scores_are_printed(score_command):
    ours = ("--references", "references.json", "--predictions", "ours.json")
    for name, words in (("fewer", "fewer.json: 1 of 2 images have no prediction, '2.jpg' first"),
                        ("elsewhere", "elsewhere.json: none of its images is among the references, '7' first: another "
                                      "set, or names without .jpg?"), ("none", "none.json: cannot be read")):
        code, printed, complaint = score_command(*ours, "--compare", f"{name}.json")
        assert code == 2 and printed == "" and words in complaint, complaint
    code, printed, _ = score_command(*ours, "--compare", "spaced.json")
    assert code == 0 and "1 empty predictions in spaced.json" in printed
    assert "1 predictions with spaces between Chinese characters in spaced.json" in printed


def test_a_place_that_scores_cannot_be_written_to_is_said_before_they_are_computed(score_command, monkeypatch):
    def never(*_):
        raise AssertionError("scored")

    ours = ("--references", "references.json", "--predictions", "ours.json", "--output")
    assert score_command(*ours, "new/folder/scores.json")[0] == 0
    monkeypatch.setattr(metrics, "score", never)
    code, _, complaint = score_command(*ours, "ours.json/scores.json")
    assert code == 2 and "ours.json/scores.json: cannot be written" in complaint


def test_where_a_set_has_no_references_those_that_have_are_named(score_command, tmp_path):
    arguments = ("--predictions", "ours.json", "--set", "tset")
    assert "with --set (there is none)" in score_command(*arguments)[2]
    data = tmp_path / "runs" / "miniature" / "data"
    data.mkdir(parents=True)
    for name in ("test", "board-a"):
        (data / f"references-{name}.json").write_text("{}")
    code, _, complaint = score_command(*arguments)
    assert code == 2 and "references-tset.json: no such references" in complaint and "(there are board-a, test)" in complaint


@pytest.mark.parametrize("segmentation", ["jieba", "characters"])
def test_references_prepared_once_score_every_system_as_if_prepared_anew(drawn, segmentation):
    predictions, references = drawn
    prepared = metrics.prepare_references(references, segmentation)
    for system in (predictions, {name: row[:1] for name, row in references.items()}):
        assert metrics.score(system, prepared) == metrics.score(system, references, segmentation)
    with pytest.raises(InputError, match="were prepared by"):
        metrics.score(predictions, prepared, {"jieba": "characters", "characters": "jieba"}[segmentation])


def test_the_longest_common_subsequence_is_the_tables():
    """Against the textbook's table, on texts longer than a machine word as well."""
    random = np.random.default_rng(4)
    for length, other in [(0, 5), (1, 1), (7, 12), (40, 31), (150, 90)] * 10:
        a, b = ([str(t) for t in random.integers(6, size=n)] for n in (length, other))
        table = np.zeros((length + 1, other + 1), dtype=int)
        for i, j in np.ndindex(length, other):
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
        assert rouge.longest_common_subsequence(a, rouge.places(b), other) == table[-1, -1]


def test_one_caption_against_the_others_needs_others(drawn):
    spoken, others = metrics.one_against_the_others(drawn[1], 2)
    assert all(spoken[name] + others[name] == [row[2], *row[:2], *row[3:]] for name, row in drawn[1].items())
    with pytest.raises(InputError, match=r"'a\.jpg' has 1 captions"):
        metrics.one_against_the_others({"a.jpg": ["狗"]})
    with pytest.raises(InputError, match="scored against the others"):
        metrics.one_against_the_others(drawn[1], -1)


def test_the_mean_of_the_held_out_human_captions_is_as_measured(human):
    """anchors.md: BLEU-4 28.9 / 44.6, ROUGE-L 56.8 / 66.3, CIDEr 114.9 / 189.4 by jieba / characters."""
    everything = {name: row + human[1][name] for name, row in human[0].items()}
    for segmentation, expected in (("jieba", {"BLEU-4": 28.9, "ROUGE-L": 56.8, "CIDEr": 114.9}),
                                   ("characters", {"BLEU-4": 44.6, "METEOR": 35.3, "ROUGE-L": 66.3, "CIDEr": 189.4})):
        found = [metrics.score(*metrics.one_against_the_others(everything, n), segmentation).values for n in range(5)]
        assert {m: np.mean([f[m] for f in found]) for m in expected} == pytest.approx(expected, abs=0.1)


def test_clip_zh_is_the_cosine_where_it_is_positive():
    images, texts = np.array([[1.0, 0], [0, 1], [0.6, 0.8]]), np.array([[1.0, 0], [0, -1], [0.8, 0.6]])
    assert clip_score(images, texts) == pytest.approx([100, 0, 96])
    with pytest.raises(InputError, match="one shape"):
        clip_score(images, texts[:2])


def test_unknown_names_are_refused_with_the_known_ones(drawn):
    with pytest.raises(InputError, match="jieba or characters"):
        metrics.score(*drawn, "words")
    with pytest.raises(InputError, match=r"'SPICE'; choose from BLEU-1"):
        metrics.score(*drawn, metrics=["SPICE"])


def test_files_are_scored_as_the_dictionaries_in_them(drawn, tmp_path):
    for name, content in zip(("res.json", "references.json"), drawn, strict=True):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert metrics.score(tmp_path / "res.json", str(tmp_path / "references.json")) == metrics.score(*drawn)
