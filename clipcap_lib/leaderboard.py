"""The boards' table, computed from the rows of `results`, never typed: DataFrame, Markdown, LaTeX, CSV; and its check.

What makes the rows (predict, score, compare) can be reached from here as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clipcap_lib import metrics
from clipcap_lib.clip_scores import judged, retrieval
from clipcap_lib.config import InputError
from clipcap_lib.ensemble_weights import search_weights, wrong_weights
from clipcap_lib.files import read_json, writing
from clipcap_lib.prepare import evaluation_sets
from clipcap_lib.results import (
    SEGMENTATIONS,
    alike,
    compare,
    concepts,
    differences,
    evaluate,
    row,
    rows,
    same_csv,
    score_system,
    scored,
    slot_details,
)
from clipcap_lib.systems import (
    BASELINES,
    baselines,
    boards,
    load_system,
    main_segmentation,
    members_of,
    planned,
    predict,
    shuffled,
    systems,
)

__all__ = [
    "BASELINES", "ORIGINAL", "SEGMENTATIONS", "baselines", "beside", "boards", "check_kept", "compare", "concepts",
    "evaluate", "export", "formatted", "judged", "kept_results", "latex", "load_system", "main_segmentation", "markdown",
    "members_of", "planned", "predict", "retrieval", "row", "rows", "score_kept", "score_system", "scored",
    "search_weights", "shuffled", "slot_details", "systems", "table", "verify",
]

ORIGINAL = {  # published by the authors; the organiser's metric is not documented
    "model1": {"board-a": 30.02}, "model2": {"board-a": 28.54}, "model3": {"board-a": 28.52},
    "model4": {"board-b": 19.78}, "1+2+3": {"board-a": 30.72, "board-b": 20.19}, "1+2+4": {"board-b": 20.49},
}


def table(run: Path, segmentation: str = "characters", metric: str = "CIDEr") -> Any:
    """The boards' table as a DataFrame: one line a system; score and interval on each set, beside the original's of it.

    Ceiling and floors stand last. Every number is that of a row, and every row's prediction file is there.
    """
    import pandas as pd

    found = _complete(run)
    if not found:
        raise InputError(f"{run}: no scores yet; train first (`python -m clipcap_lib train`, or `make workbook`)")
    sets = [name for name in evaluation_sets(Path(run) / "data") if any(r["set"] == name for r in found)]
    lines = []
    for system in dict.fromkeys(r["system"] for r in found):
        of = next((r["of"] for r in found if r["system"] == system and "of" in r), "")
        line: dict[str, Any] = {"system": BASELINES.get(system, system).format(of=of)}
        if system == "constant" and segmentation != main_segmentation(run):
            line["system"] += f" by {main_segmentation(run)}"  # another one may be the best here
        for name in sets:
            result = next((r for r in found if r["system"] == system and r["set"] == name), None)
            values = result[segmentation] if result else None
            line[f"{name} {metric}"] = values["values"][metric] if values else float("nan")
            line[f"{name} low"], line[f"{name} high"] = values["intervals"][metric] if values else (float("nan"),) * 2
        for name in [name for name in ("board-a", "board-b") if name in sets]:
            line[f"original {name}"] = ORIGINAL.get(system, {}).get(name, float("nan"))
        lines.append(line)
    return pd.DataFrame(lines).set_index("system")


def beside(run: Path) -> int:
    """How many of the table's last rows are ceiling and floors."""
    return len({r["system"] for r in _complete(run)} & set(BASELINES))


def formatted(frame: Any) -> Any:
    """The table as text: "71.3 [65.0, 77.1]", and "-" where there is no number."""
    import pandas as pd

    def number(value: float) -> str:
        return "-" if pd.isna(value) else f"{value:.2f}"

    columns: dict[str, list[str]] = {}
    for column in frame.columns:
        if column.startswith("original"):
            columns[column] = [number(v) for v in frame[column]]
        elif not column.endswith((" low", " high")):
            name = column.rsplit(" ", 1)[0]
            columns[column] = ["-" if pd.isna(v) else f"{v:.1f} [{low:.1f}, {high:.1f}]" for v, low, high in zip(
                frame[column], frame[f"{name} low"], frame[f"{name} high"], strict=True)]
    return pd.DataFrame(columns, index=frame.index)


def markdown(frame: Any) -> str:
    """A formatted table as Markdown."""
    text = frame.reset_index()
    lines = ["| " + " | ".join(text.columns) + " |", "|" + "---|" * len(text.columns)]
    return "\n".join(lines + ["| " + " | ".join(map(str, values)) + " |" for values in text.to_numpy()]) + "\n"


def latex(frame: Any, caption: str) -> str:
    """A formatted table as a LaTeX table (booktabs), `caption` in plain text."""
    text = frame.rename_axis(None).to_latex(escape=True, column_format="l" + "r" * len(frame.columns), caption="CAPTION")
    for character in "\\&%$#_{}":
        caption = caption.replace(character, f"\\{character}" if character != "\\" else "")
    return text.replace("CAPTION", caption.replace("|", "\\textbar{}"))


def export(run: Path, folder: Path, segmentation: str = "characters") -> list[Path]:
    """Write the boards' table -> the files: CSV (all digits), Markdown and LaTeX (with signatures), and JSON lines, the
    rows that it is computed from."""
    folder, written = Path(folder), []
    for kind, content in _contents(run, segmentation).items():
        written.append(folder / f"leaderboard.{kind}")
        with writing(written[-1]):
            folder.mkdir(parents=True, exist_ok=True)
            written[-1].write_text(content, encoding="utf-8")
    return written


def _contents(run: Path, segmentation: str) -> dict[str, str]:
    """What the files of the table hold: kind -> text."""
    frame, found = table(run, segmentation), _complete(run)
    signatures = sorted({r[segmentation]["signature"] for r in found})
    note = f"Ours: CIDEr x 100 with intervals ({metrics.INTERVAL}), signature {'; '.join(f'`{s}`' for s in signatures)}.\n"
    if any(column.startswith("original") for column in frame.columns):
        note += ("Original: as its authors published it; the organiser's metric is not documented, so the two cannot be "
                 "compared number by number.\n")
    return {"csv": frame.to_csv(), "md": f"{markdown(formatted(frame))}\n{note}",
            "tex": latex(formatted(frame), note.replace("`", "").replace("\n", " ").strip()),
            "jsonl": "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found)}


def _wrong_files(run: Path, folder: Path) -> list[str]:
    """What is wrong with the files of the table in a folder: each must be what `export` writes, but for rounding, under one
    segmentation or another.
    """
    there = [path for kind in ("csv", "md", "tex", "jsonl") if (path := folder / f"leaderboard.{kind}").is_file()]
    try:
        expected = [_contents(run, segmentation) for segmentation in SEGMENTATIONS] if there else []
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return [f"{path}: cannot be compared, there is no table of these rows" for path in there]
    return [f"{path}: is not what the rows give; `leaderboard` without --verify writes it again" for path in there
            if not any(_same_file(path, contents[path.suffix[1:]]) for contents in expected)]


def _same_file(path: Path, expected: str) -> bool:
    content = path.read_bytes()
    if path.suffix == ".csv":
        return same_csv(content, expected)
    if path.suffix == ".jsonl":
        try:
            return alike(*([json.loads(line) for line in text.splitlines()] for text in (content, expected)))
        except ValueError:
            return False
    return content == expected.encode("utf-8")


@contextmanager
def kept_results(results: Path, run: Path) -> Iterator[Path]:
    """A run folder for the time being: predictions and scores are those kept in `results`, data the run's.

    So results can be shared without the corpus that they are about. Raises InputError as `check_kept` does.
    """
    results, run = Path(results).resolve(), Path(run).resolve()
    check_kept(results)
    with TemporaryDirectory() as folder:
        for name, place in (("predictions", results), ("scores", results), ("data", run)):
            (Path(folder) / name).symlink_to(place / name, target_is_directory=True)
        yield Path(folder)


def check_kept(results: Path) -> None:
    """Raise InputError if a folder of kept results holds no predictions."""
    if not any((Path(results) / "predictions").glob("*.about.json")):
        raise InputError(f"{results}: no predictions kept here; give a folder that holds predictions/<system>-<set>.json")


def score_kept(run: Path) -> None:
    """Score every prediction file that is there."""
    scores = (Path(run) / "scores").resolve()  # of `kept_results` it is a link
    with writing(scores):
        scores.mkdir(exist_ok=True)
    for path in sorted((Path(run) / "predictions").glob("*.about.json")):
        about = read_json(path)
        if not isinstance(about, dict) or not {"system", "set"} <= about.keys():
            raise InputError(f"{path}: does not say of which system and set the predictions are; take it away")
        score_system(run, about["system"], about["set"])


def verify(run: Path, folder: Path | None = None) -> list[str]:
    """Recompute every row from its prediction file, every searched weighting, and the files of the table that are in
    `folder` -> what does not match ([]: all well).
    """
    run, problems = Path(run), []
    found = rows(run)
    scored_files = {r["predictions"] for r in found}
    for path in sorted((run / "predictions").glob("*.about.json")):
        name = f"predictions/{path.name.removesuffix('.about.json')}.json"
        if name not in scored_files:
            problems.append(f"{name}: has no row of scores; `leaderboard` without --verify scores it")
    for kept in found:
        name = f"{kept['system']} on {kept['set']}"
        if not (run / kept["predictions"]).is_file():
            problems.append(f"{name}: its prediction file {kept['predictions']} is not there")
            continue
        try:
            problems += [f"{name}: {key} is not what its prediction file gives" for key in differences(run, kept)]
        except InputError as error:
            problems.append(f"{name}: {error}")
    problems += [f"{name}: not the CIDEr of the captions kept with it" for name in wrong_weights(run)]
    return problems + _wrong_files(run, Path(folder or run / "figures"))


def _complete(run: Path) -> list[dict[str, Any]]:
    """The rows whose prediction file is there: no number without one."""
    return [r for r in rows(run) if (Path(run) / r["predictions"]).is_file()]
