"""`python -m clipcap_lib prepare | train | predict | ensemble | validate-submission | score | leaderboard | bench`

Exit codes: 0 done, 1 a check failed (`leaderboard --verify`, `validate-submission`), 2 something given cannot be used (one
sentence says what).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipcap_lib.config import PRESETS, Config, InputError, data_root, preset, runs_folder
from clipcap_lib.journal import EVENTS

DEBUG_LIMIT = {"train": 1000, "val": 100, "test": 100, "board-a": 100, "board-b": 100}  # the original's --debug


def _settings(arguments: argparse.Namespace) -> tuple[Config, Path]:
    config = preset(arguments.preset.removesuffix("-debug") + "-debug" if arguments.debug else arguments.preset)
    return config, runs_folder() / config.name


def _progress(line: dict[str, Any]) -> None:
    """Training progress as text: a line at the end of an epoch."""
    what = f"{line['stage']}/{line['name']}"
    if line["event"] in EVENTS:
        print(f"{what}: {EVENTS[line['event']].format(**line)}", flush=True)
    elif "retrieval" in line:
        before, after = (line["retrieval"][when]["image->text R@1"] for when in ("before", "after"))
        print(f"{what}: image->text R@1 {before:.1f} before, {after:.1f} after"
              + _warning(what, line), flush=True)
    elif "validation" in line:
        values = "  ".join(f"{key} {value if isinstance(value, int) else format(value, '.1f')}"
                           for key, value in line["validation"].items())
        reward = f"reward {line['reward']:.2f}  " if "reward" in line else ""
        print(f"{what}: epoch {line['epoch']:.0f}  step {line['step']}/{line['steps']}  loss {line['loss']:.3f}  {reward}"
              f"{line['images_per_second']:.0f} images/s  {values}"
              + _warning(what, line), flush=True)


def _warning(what: str, line: dict[str, Any]) -> str:
    return f"\n{what}: WARNING: {line['warning']}" if "warning" in line else ""


def _prepare(arguments: argparse.Namespace) -> None:
    from clipcap_lib.corpora import caption_choices
    from clipcap_lib.prepare import check, prepare

    config, run = _settings(arguments)
    captions = caption_choices(arguments.captions or ())
    if arguments.images and not arguments.csv:
        raise InputError("--images is the folder of a table's images; give the table as well, with --csv")
    if arguments.csv and (arguments.data_root or arguments.corpora or captions):
        raise InputError("--csv is prepared alone; leave out --data-root, --corpora and --captions")
    common = dict(data_root=None if arguments.csv else data_root(config, arguments.data_root), corpora=arguments.corpora,
                  vocabulary=arguments.vocabulary, limit=DEBUG_LIMIT if arguments.debug else None, captions=captions,
                  table=arguments.csv, images=arguments.images)
    if arguments.check:
        check(config, run / "findings.csv", **common)
    else:
        prepare(config, run / "data", **common, skip_damaged=arguments.skip_damaged, keep_leaks=arguments.keep_leaks)


def _train(arguments: argparse.Namespace) -> None:
    from clipcap_lib import processes, train
    from clipcap_lib.corpora.lines import is_plain_name
    from clipcap_lib.data import check_without
    from clipcap_lib.prepare import options_of

    if not is_plain_name(arguments.name):
        raise InputError(f"--name {arguments.name!r}: no plain name of a folder; give one without / or \\, such as model1")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed {arguments.seed}: give a whole number from 0 to {2**32 - 1}")
    if arguments.clip and arguments.stage != "caption":
        raise InputError(f"--clip {arguments.clip} is what a captioner starts from; give --stage caption with it, or leave "
                         "it out")
    config, run = _settings(arguments)
    if arguments.compare and arguments.stage != "scst":
        raise InputError("--compare asks what self-critical training gains; give --stage scst with it")
    config = replace(config, image_weights=arguments.image_weights or config.image_weights,
                     gpt_weights=arguments.gpt_weights or config.gpt_weights)
    processes.start()
    with processes.main_first():
        _check_root(run / "data", arguments.data_root)
        if not (run / "data" / "manifest.json").is_file():  # train alone does it all, as the original's train.py
            whole = run.with_name(run.name.removesuffix("-debug"))
            if arguments.debug and (options_of(whole / "data") or {}).get("table"):
                raise InputError(f"{run / 'data'}: nothing prepared here, and {whole / 'data'} is of a table; prepare the "
                                 "sliver from it as well: the same `prepare --csv ..` with --debug")
            _prepare(argparse.Namespace(**{**vars(arguments), "corpora": None, "vocabulary": None, "skip_damaged": False,
                                           "check": False, "keep_leaks": False, "captions": None, "csv": None,
                                           "images": None}))
    without = tuple(arguments.without)
    check_without(run / "data", without)
    trained_on = train.training_set(without)
    # both stages as one: another seed's CLIP must not come between this one's and the captioner that begins from it
    with processes.alone(run, "clip", f"{trained_on}.both-stages") if arguments.stage is None else nullcontext():
        if arguments.stage in (None, "clip"):
            train.pretrain_clip(config, run, arguments.seed, without, progress=_progress)
        if arguments.stage in (None, "caption"):
            if arguments.stage and not arguments.clip and processes.rank() == 0:
                _say_whose(run / "clip" / trained_on / "best", arguments.seed)
            folder = train.finetune_captioner(config, run, arguments.name, arguments.seed, without, arguments.clip,
                                              progress=_progress)
            if processes.rank() == 0:
                print(f"train: the captioner is in {folder / 'best'}")
    if arguments.stage == "scst":
        folder = train.self_critical(config, run, arguments.name, arguments.seed, without, progress=_progress)
        if processes.rank() == 0:
            print(f"train: the captioner trained on scores is in {folder / 'best'}: give that to predict as --model")
    if arguments.compare:
        _compare(config, run, arguments.name, arguments.seed, without)


def _say_whose(clip: Path, seed: int) -> None:
    from clipcap_lib import checkpoint

    if checkpoint.exists(clip) and (theirs := checkpoint.about(clip)["seed"]) != seed:
        print(f"train: the captioner of seed {seed} begins from the CLIP of seed {theirs}, which is the one in "
              f"{clip.parent}; `train --stage clip --seed {seed}` puts that seed's there")


def _check_root(data: Path, given: Path | None) -> None:
    """Raise InputError if what is prepared is not of the root that was given: it would be passed over."""
    from clipcap_lib.prepare import options_of

    options = options_of(data) if given and (data / "manifest.json").is_file() else None
    if given and options is not None:
        before = options.get("table") or options.get("data_root") or "drawn corpora"
        if Path(before).resolve() != given.resolve():
            raise InputError(f"--data-root {given}: {data} was prepared from {before}; run `prepare --data-root {given}` "
                             "first, or leave out --data-root")


def _compare(config: Config, run: Path, name: str, seed: int, without: tuple[str, ...]) -> None:
    from clipcap_lib.scst_gain import self_critical_gain

    for row in self_critical_gain(config, run, name, seed, without, _progress):
        ways = ", ".join(f"{way} {row[way]:.1f} ({row['distinct'][way]} distinct, {share:.1f} % broken endings)"
                         for way, share in row["broken"].items())
        print(f"{row['set']}, {row['beams']} beams: CIDEr {ways}; SCST minus cross-entropy {row['difference']:.1f} "
              f"[{row['low']:.1f}, {row['high']:.1f}], p {row['p']:.3f}\n  {row['signature']}")


def _caption(arguments: argparse.Namespace) -> None:
    from clipcap_lib import commands

    commands.caption(arguments, *_settings(arguments))


def _validate(arguments: argparse.Namespace) -> int:
    from clipcap_lib import commands

    return commands.validate(arguments, _settings(arguments)[1])


def _score(arguments: argparse.Namespace) -> None:
    from clipcap_lib import metrics
    from clipcap_lib.files import write_json, writing

    _, run = _settings(arguments)
    path = arguments.references or run / "data" / f"references-{arguments.set}.json"
    if not path.is_file():
        from clipcap_lib.prepare import evaluation_sets

        sets = ", ".join(evaluation_sets(run / "data"))
        raise InputError(f"{path}: no such references; give a file with --references, or a prepared set with --set "
                         f"({f'there are {sets}' if sets else 'there is none'})")
    output = arguments.output
    given = {p.resolve() for p in (arguments.predictions, arguments.compare, path) if p}
    if output and (output.is_dir() or output.resolve() in given):
        raise InputError(f"{output}: is a folder or one of the files to be scored; give another file with --output")
    if output:
        with writing(output):  # before what takes long
            output.parent.mkdir(parents=True, exist_ok=True)
    references = metrics.prepare_references(path, arguments.segmentation)
    scores = metrics.score(arguments.predictions, references)
    other = metrics.score(arguments.compare, references) if arguments.compare else None
    intervals = metrics.bootstrap_intervals(scores)
    result: dict[str, Any] = {"values": scores.values, "intervals": intervals, "interval": metrics.INTERVAL,
                              "signature": scores.signature, "counted": scores.counted, "per_image": scores.per_image}
    for name, value in scores.values.items():
        print(f"{name:8} {value:6.1f}  [{intervals[name][0]:.1f}, {intervals[name][1]:.1f}]")
    print(f"[..]: {metrics.INTERVAL}")
    print(scores.signature)
    for what, count in scores.counted.items():
        if count:
            print(f"{count} {what}")
    if other:
        result["compared"] = {}
        for what, count in other.counted.items():
            if count and "predictions" in what:  # the references are the same
                print(f"{count} {what} in {arguments.compare}")
        print(f"\n{arguments.predictions} minus {arguments.compare}, paired bootstrap:")
        for name in scores.values:
            found = metrics.paired_bootstrap(scores, other, name)
            result["compared"][name] = {"difference": found.difference, "low": found.low, "high": found.high, "p": found.p}
            print(f"{name:8} {found.difference:+6.1f}  [{found.low:+.1f}, {found.high:+.1f}]  p {found.p:.3f}")
    if output:
        with writing(output):
            write_json(output, result)


def _leaderboard(arguments: argparse.Namespace) -> int:
    from clipcap_lib import leaderboard

    config, run = _settings(arguments)
    shipped = Path(__file__).resolve().parents[1] / "figures" / config.name
    if arguments.verify and not arguments.results and not leaderboard.rows(run) and (shipped / "predictions").is_dir():
        arguments.results = shipped  # nothing of one's own: what comes with the workbook
    if not arguments.results:
        return _table(arguments, config, run, run / "figures")
    from clipcap_lib.prepare import prepare

    leaderboard.check_kept(arguments.results)  # before what takes long
    print(f"leaderboard: the results kept in {arguments.results}")
    apart = runs_folder() / f"{config.name}-kept"  # one's own data, which may be other data, are left alone
    prepare(config, apart / "data", data_root=data_root(config, arguments.data_root))
    with leaderboard.kept_results(arguments.results, apart) as kept:
        if not arguments.verify:
            leaderboard.score_kept(kept)
        code = _table(arguments, config, kept, arguments.results)
    return max(code, _verify_ablation(arguments.results / "ablation", apart)) if arguments.verify else code


def _verify_ablation(results: Path, run: Path) -> int:
    """Recompute what is kept of an ablation beside a table, if anything is -> exit code."""
    from clipcap_lib import ablation, leaderboard

    if not results.is_dir():
        return 0
    with leaderboard.kept_results(results, run) as kept:
        problems = ablation.wrong(kept, results)
    count = len(list((results / "predictions").glob("*.about.json")))
    print("\n".join(problems) or f"leaderboard: {results.name}: {count} rows recomputed, all equal")
    return 1 if problems else 0


def _table(arguments: argparse.Namespace, config: Config, run: Path, output: Path) -> int:
    from clipcap_lib import leaderboard

    if arguments.verify:
        if not leaderboard.rows(run):
            raise InputError(f"{arguments.results or run}: no scores to verify; run `python -m clipcap_lib leaderboard` "
                             "without --verify first")
        problems = leaderboard.verify(run, output)
        print("\n".join(problems) or f"leaderboard: {len(leaderboard.rows(run))} rows recomputed, all equal")
        return 1 if problems else 0
    if leaderboard.systems(run):
        leaderboard.evaluate(run, config)
    from clipcap_lib import plots

    segmentation = arguments.segmentation or leaderboard.main_segmentation(run)
    frame = leaderboard.formatted(leaderboard.table(run, segmentation))
    print(frame.to_string())
    files = leaderboard.export(run, output, segmentation)
    print(files[1].read_text(encoding="utf-8").split("\n\n", 1)[1], end="")
    plots.use_house_style()
    picture = plots.save(plots.board_table(frame, beside=leaderboard.beside(run)), output, "leaderboard")
    print(f"leaderboard: {', '.join(path.name for path in [*files, picture])} -> {picture.parent}")
    return 0


def _bench(arguments: argparse.Namespace) -> None:
    from clipcap_lib.bench import bench

    config, run = _settings(arguments)
    bench(arguments.what, config, arguments.output or run / "bench", arguments.tiny, data_root=arguments.data_root)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--preset", default="miniature", help=f"one of {', '.join(PRESETS)} (default: miniature)")
    common.add_argument("--debug", action="store_true",
                        help="1,000 training and 100 other images, one epoch a stage, in a run folder of its own")
    from clipcap_lib.commands import IMAGES, add_arguments

    top = argparse.ArgumentParser(prog="python -m clipcap_lib", description="Two-stage Chinese image captioning.")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, act: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[common], help=text, description=text)
        made.set_defaults(act=act)
        return made

    root = dict(type=Path, help="folder that holds flickr8k-cn, aic-icc, .. (default: CLIPCAP_DATA; "
                                     "the miniature preset draws its own)")
    one = command("prepare", _prepare, "raw corpora to checked Parquet")
    one.add_argument("--data-root", **root)
    one.add_argument("--corpora", nargs="+", help="exactly these corpora (default: all that are there)")
    one.add_argument("--captions", nargs="+", metavar="CORPUS[/SPLIT]=CAPTIONS",
                     help="which captions of a corpus that has several: flickr8k-cn=zhc, zhb, zhg or zhm; flickr30k-cn=ruc "
                          "or cna; coco-cn=human-written, machine- or manually-translated; flickr8k-cn/test=zhm: one split")
    one.add_argument("--csv", type=Path, metavar="TABLE",
                     help="a table of your own instead of corpora: .csv with columns file,caption, or .jsonl")
    one.add_argument("--images", type=Path, help="the folder of that table's images (default: the table's own)")
    one.add_argument("--vocabulary", type=Path, help="the original's vocab_cn.json instead of one of these captions")
    one.add_argument("--skip-damaged", action="store_true",
                     help="leave out missing or unreadable images and empty captions instead of stopping")
    one.add_argument("--check", action="store_true",
                     help="only report what is wrong with the corpora, and list it in runs/<preset>/findings.csv")
    one.add_argument("--keep-leaks", action="store_true",
                     help="keep training images that are copies of validation, test or board images")
    one = command("train", _train, "language-model warm-up and CLIP pretraining, then caption fine-tuning")
    one.add_argument("--stage", choices=("clip", "caption", "scst"),
                     help="only this stage (default: clip, then caption; scst trains a captioner further on CIDEr-D)")
    one.add_argument("--compare", action="store_true",
                     help="with --stage scst: train by cross-entropy for as many steps as well, and compare on a board")
    one.add_argument("--seed", type=int, default=42, help="of weights, order and augmentation (default: 42)")
    one.add_argument("--name", default="model1", help="of the captioner, under runs/<preset>/caption (default: model1)")
    one.add_argument("--without", nargs="+", default=[], metavar="CORPUS", help="corpora not to train on")
    one.add_argument("--image-weights", metavar="FILE|timm|random",
                     help="pretrained weights of the image encoder: a file of them, or timm's own, fetched")
    one.add_argument("--gpt-weights", metavar="FOLDER|NAME|random",
                     help="a pretrained GPT-2 that reads by character: a folder of transformers, or a hub name")
    one.add_argument("--clip", type=Path,
                     help="with --stage caption: CLIP folder to start from (default: the one of this training set)")
    one.add_argument("--data-root", **root)
    for name, text in (("predict", "captions of one model to res.json"),
                       ("ensemble", "captions of a weighted ensemble to res_ensemble.json")):
        one = command(name, _caption, text)
        add_arguments(one, several=name == "ensemble")
    one = command("validate-submission", _validate, "what is wrong with a result file for a board; exit code 1 if any")
    one.add_argument("submission", type=Path, help="a res.json")
    one.add_argument("--images", help=f"the board's images: {IMAGES}")
    one.add_argument("--set", default="board-a", help="board-a, board-b, test or val (default: board-a)")
    one = command("score", _score, "scores of a prediction file, with intervals and signature")
    one.add_argument("--predictions", type=Path, required=True, help="a {file: [caption]} JSON file")
    one.add_argument("--references", type=Path, help="a {file: [captions]} JSON file (default: those of --set)")
    one.add_argument("--set", default="test", help="board-a, board-b, test or val (default: test)")
    one.add_argument("--segmentation", choices=("jieba", "characters"), default="jieba",
                     help="what metrics count: words by jieba, or characters (default: jieba)")
    one.add_argument("--compare", type=Path, metavar="PREDICTIONS", help="a second system: differences, intervals, p values")
    one.add_argument("--output", type=Path, help="a JSON file of all that is printed, and of every image's scores")
    one = command("leaderboard", _leaderboard, "the table of all systems on all boards")
    one.add_argument("--verify", action="store_true", help="recompute every row from its prediction file")
    one.add_argument("--segmentation", choices=("jieba", "characters"),
                     help="whose scores are shown (default: characters for drawn corpora, jieba for real ones)")
    one.add_argument("--results", type=Path,
                     help="predictions kept without their corpus (--verify without a run: figures/<preset>)")
    one.add_argument("--data-root", **root)
    one = command("bench", _bench, "speed as ratios to a plain loop of the original's shape, measured in one run")
    one.add_argument("--what", choices=("train", "memory", "decode", "score", "prepare"), required=True,
                     help="which of them is timed, or measured")
    one.add_argument("--data-root", **root)
    one.add_argument("--tiny", action="store_true", help="a smoke test of the benchmark itself: no claim")
    one.add_argument("--output", type=Path, help="folder of bench-<what>.json and .md (default: runs/<preset>/bench)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line -> exit code."""
    parsed = parser().parse_args(arguments)
    try:
        return parsed.act(parsed) or 0
    except InputError as error:
        print(f"clipcap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clipcap: stopped; run the same command to go on", file=sys.stderr)
        return 130
