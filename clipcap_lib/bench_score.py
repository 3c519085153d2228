"""Scoring, beside pycocoevalcap's pipeline with its tokenizer and METEOR in Java."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from clipcap_lib import captions, metrics
from clipcap_lib.config import Config
from clipcap_lib.files import write_json
from clipcap_lib.timing import Report, Rows, Variant, measure

LEXICON = (  # of made-up captions: one of each
    "一个 两个 一群 几只", "穿红衣服的 戴帽子的 年轻的 高大的 笑着的", "男人 女人 孩子 小狗 运动员 骑手",
    "傍晚 雨中 阳光下 正 一起", "在草地上 在海边 在舞台上 在街道上 在雪山前", "跑步 唱歌 踢足球 看书 休息 拍照 跳舞 等车",
    " ，天空很蓝 ，身后有一棵树 ，手里拿着东西 ，旁边停着一辆汽车")


def measure_score(config: Config, tiny: bool, report: Report) -> Rows:
    """All metrics of made-up captions against five references each, segmented by jieba."""
    draw, images = random.Random(0), 8 if tiny else 5000
    texts = ["".join(draw.choice(part.split(" ")) for part in LEXICON) + "。" for _ in range(6 * images)]
    predictions = {f"{i}.jpg": texts[6 * i:6 * i + 1] for i in range(images)}
    references = {f"{i}.jpg": texts[6 * i + 1:6 * i + 6] for i in range(images)}

    prepared = metrics.prepare_references(references, "jieba")
    ours = partial(metrics.score, predictions, references, "jieba")
    ours_prepared = partial(metrics.score, predictions, prepared)
    ours_prepared()  # what metrics need of the references is kept from the first system on
    jar_pipeline, forget = partial(_jar_pipeline, predictions, references), captions._segment.cache_clear
    variants = {"jar_pipeline": Variant(jar_pipeline, images, forget), "ours": Variant(ours, images, forget),
                "ours_prepared": Variant(ours_prepared, images, forget)}
    if tiny or shutil.which("java") is None:
        report("  without the Java pipeline: " + ("a tiny run" if tiny else "no java on PATH"))
        del variants["jar_pipeline"]
    seconds = measure(variants, tiny, report)
    rows: Rows = {name: (1000 * value, "ms an image") for name, value in seconds.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("res.json", "references.json")]
        for path, content in zip(paths, (predictions, references), strict=True):
            write_json(path, content)
        # not resource.getrusage: its peak begins with that of the process which started this one
        code = ("import sys; from clipcap_lib import metrics; metrics.score(*sys.argv[1:], 'jieba'); "
                "print(open('/proc/self/status').read())")
        if Path("/proc/self/status").is_file():
            said = subprocess.check_output([sys.executable, "-c", code, *map(str, paths)], text=True)
            rows["ours peak memory"] = int(re.search(r"VmHWM:\s+(\d+) kB", said)[1]) / 2**20, "GiB"
    return rows


def _jar_pipeline(predictions: captions.Captions, references: captions.Captions) -> dict[str, float]:
    """What scorers of Chinese captions usually do: jieba, then pycocoevalcap's tokenizer and its four scorers."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    given, said = (PTBTokenizer().tokenize({name: [{"caption": " ".join(tokens)} for tokens in metrics.segment(row, "jieba")]
                                            for name, row in texts.items()}) for texts in (references, predictions))
    jar = Meteor()
    try:
        scores = {"METEOR": jar.compute_score(given, said)[0]}
    except Exception:
        jar.lock.release()  # its destructor would wait for it forever
        raise
    scores["BLEU-4"] = Bleu(4).compute_score(given, said, verbose=0)[0][3]
    return scores | {"ROUGE-L": Rouge().compute_score(given, said)[0], "CIDEr": Cider().compute_score(given, said)[0]}
