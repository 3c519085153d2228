"""Slot accuracy: whether captions name the right objects, colours, counts, relations and backgrounds of drawn scenes.

Captions are parsed and compared with the renderer's truth. Objects are scored by F1; everything else given the object:
a colour counts where its object is named rightly, so that one mistake is counted once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clipcap_lib.corpora.scenes import Parsed, Relation, parse_caption

ERRORS = ("object missed", "object invented", "wrong colour", "wrong count", "wrong relation", "wrong background",
          "nothing wrong")
_TURNED = {"left": "right", "right": "left"}


def slot_accuracy(predictions: Mapping[str, Sequence[str]], truth: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Score the first caption of each image of `truth` (rows of `miniature.load_truth`); one without says nothing.

    Returns, all in [0, 1], NaN where nothing can be said:

    - object_f1, object_precision, object_recall: over the sets of kinds named and kinds there, pooled over images;
    - colour_accuracy: of the kinds named rightly and with a colour, how many have the right one; colour_stated: how
      many of those named rightly have one;
    - count_accuracy: of the kinds named rightly that are several, or said to be, how many have the right number;
    - relation_accuracy: of the relations stated, how many hold; relation_stated: share of images that state one;
    - background_accuracy and background_stated likewise;
    - <name>_n: the denominator of each; images; per_image: what each image contributes, see `score_image`.
    """
    images = [score_image(name, (list(predictions.get(name, ())) or [""])[0], scene) for name, scene in truth.items()]
    said, there, hits = (sum(len(image[key]) for image in images) for key in ("said", "there", "hits"))
    colours = [item for image in images for item in image["colours"]]
    stated = [item for item in colours if item["said"]]
    counts = [item for image in images for item in image["counts"]]
    relations = [image["relation"] for image in images if image["relation"]]
    backgrounds = [image["background"] for image in images if image["background"]["said"]]
    ratios = {
        "object_f1": (2 * hits, said + there),
        "object_precision": (hits, said),
        "object_recall": (hits, there),
        "colour_accuracy": (sum(item["right"] for item in stated), len(stated)),
        "colour_stated": (len(stated), len(colours)),
        "count_accuracy": (sum(item["right"] for item in counts), len(counts)),
        "relation_accuracy": (sum(item["right"] for item in relations), len(relations)),
        "relation_stated": (len(relations), len(images)),
        "background_accuracy": (sum(item["right"] for item in backgrounds), len(backgrounds)),
        "background_stated": (len(backgrounds), len(images)),
    }
    result: dict[str, Any] = {}
    for name, (part, whole) in ratios.items():
        result |= {name: part / whole if whole else float("nan"), f"{name}_n": whole}
    return {**result, "images": len(images), "per_image": images}


def score_image(file_name: str, caption: str, scene: Mapping[str, Any]) -> dict[str, Any]:
    """What one caption says of one scene, and what of that is right.

    `said`, `there`, `hits`: kinds, sorted; `colours`: one entry a hit, `counts`: one a hit where a number matters, each
    {kind, said, true, right}; `relation`: {said, true, right}, None if none is stated; `background`: the same, always.
    """
    parsed = parse_caption(caption)
    kinds = {item["kind"]: item for item in scene["objects"]}
    numbers = {kind: sum(item["kind"] == kind for item in scene["objects"]) for kind in kinds}
    said = {kind for kind, _, _ in parsed.objects}
    hits = sorted(said & set(kinds))
    colours, counts = [], []
    for kind in hits:
        colour, number = _stated(parsed, kind)
        colours.append({"kind": kind, "said": colour, "true": kinds[kind]["colour"],
                        "right": colour == kinds[kind]["colour"]})
        if numbers[kind] > 1 or (number or 1) > 1:
            counts.append({"kind": kind, "said": number, "true": numbers[kind], "right": number == numbers[kind]})
    relation = parsed.relation and {"said": list(parsed.relation), "true": scene["relation"],
                                    "right": holds(parsed.relation, scene)}
    return {"file_name": file_name, "caption": caption, "said": sorted(said), "there": sorted(kinds), "hits": hits,
            "colours": colours, "counts": counts, "relation": relation,
            "background": {"said": parsed.background, "true": scene["background"],
                           "right": parsed.background == scene["background"]}}


def _stated(parsed: Parsed, kind: str) -> tuple[str | None, int | None]:
    """Colour and number said of a kind; where it is named more than once, the first of each."""
    mentions = [item for item in parsed.objects if item[0] == kind]
    return (next((colour for _, colour, _ in mentions if colour), None),
            next((number for _, _, number in mentions if number), None))


def holds(relation: Relation, scene: Mapping[str, Any]) -> bool:
    """Whether a stated relation is true of a scene: as the scene has it (either way round), or by its boxes.

    By the boxes something is left of, right of or above another if their boxes are clear of each other in that
    direction, for all objects of the two kinds.
    """
    one, how, other = relation
    true = scene["relation"]
    if true and (list(relation) == list(true) or [other, _TURNED.get(how), one] == list(true)):
        return True
    ones, others = ([item["box"] for item in scene["objects"] if item["kind"] == kind] for kind in (one, other))
    if not ones or not others:
        return False
    gaps = {"left": min(b[0] for b in others) - max(b[2] for b in ones),
            "right": min(b[0] for b in ones) - max(b[2] for b in others),
            "above": min(b[1] for b in others) - max(b[3] for b in ones)}
    return gaps.get(how, -1.0) >= 0


def errors_of(image: Mapping[str, Any]) -> list[str]:
    """Which of `ERRORS` a caption makes, from what `score_image` says of it. What it does not state is no error, but for
    an object that it does not name."""
    wrong = (
        set(image["there"]) - set(image["said"]),
        set(image["said"]) - set(image["there"]),
        [item for item in image["colours"] if item["said"] and not item["right"]],
        [item for item in image["counts"] if not item["right"]],
        image["relation"] and not image["relation"]["right"],
        image["background"]["said"] and not image["background"]["right"],
    )
    return [name for name, found in zip(ERRORS, wrong, strict=False) if found] or [ERRORS[-1]]


def error_shares(per_image: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Percent of the images that make each of `ERRORS`; an image may make several. per_image: of `slot_accuracy`."""
    found = [name for image in per_image for name in errors_of(image)]
    return {name: 100 * found.count(name) / len(per_image) for name in ERRORS}


def concept_recall(per_image: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """For each kind of object: on how many images it is named rightly, and on how many it is there."""
    kinds = sorted({kind for image in per_image for kind in image["there"]})
    return {kind: (sum(kind in image["hits"] for image in per_image), sum(kind in image["there"] for image in per_image))
            for kind in kinds}
