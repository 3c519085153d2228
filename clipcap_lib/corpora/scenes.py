"""Scenes and what is said of them: sampling a scene, writing Chinese captions of it, and parsing captions back.

`write_captions(scene, ...)` and `parse_caption(text)` share one lexicon (`things`), and a test holds that whatever a
caption states is true of its scene. The parser also takes generated text: words it does not know are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from clipcap_lib.corpora.things import BACKGROUNDS, COLOURS, KINDS, LARGE, NUMBERS, stands_on

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions of the image's width and height
Relation = tuple[str, str, str]  # kind, "left" | "right" | "above" | "in front", kind
SHAPE = (160, 128)  # width and height of a drawn image in pixels


@dataclass(frozen=True)
class Group:
    """One or several objects of one kind, alike in colour and size. A scene has at most one group of a kind."""

    kind: str
    colour: str
    size: str  # "big", "small" or "medium"; captions speak only of the first two
    boxes: tuple[Box, ...]

    @property
    def count(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class Scene:
    """One picture: groups in order of importance, drawn from the last to the first."""

    background: str
    groups: tuple[Group, ...]
    relation: Relation | None = None

    def truth(self) -> dict:
        """The scene as plain JSON types, as written beside the corpora."""
        objects = [{"kind": group.kind, "colour": group.colour, "size": group.size, "box": [round(v, 4) for v in box]}
                   for group in self.groups for box in group.boxes]
        return {"background": self.background, "objects": objects, "count": self.groups[0].count,
                "relation": list(self.relation) if self.relation else None}


# --- sampling ---------------------------------------------------------------------------------------------------------

LAYOUTS = {"one": 0.50, "beside": 0.17, "above": 0.06, "in front": 0.06, "several": 0.15, "several and one": 0.03,
           "three": 0.03}
ORDINARY = [name for name, kind in KINDS.items() if not kind.coco]
COCO = [name for name, kind in KINDS.items() if kind.coco]


def sample_scene(random: Random, coco_share: float = 0.01) -> Scene:
    """Draw a scene at random. `coco_share`: share of the scenes whose main object is of a COCO kind."""
    layout = random.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    coco = random.random() < coco_share
    while True:
        kinds = _sample_kinds(random, layout, coco)
        backgrounds = [name for name, background in BACKGROUNDS.items()
                       if all(stands_on(kind, name) for kind in kinds) and (coco or not background.coco)]
        if backgrounds:
            break
    # the sea takes few kinds, so it gets most of the scenes that it can have; COCO's own places likewise
    background = random.choices(backgrounds, [2.0 if name in ("sea", "room") or BACKGROUNDS[name].coco else 1.0
                                              for name in backgrounds])[0]
    colours = random.sample(list(COLOURS), len(kinds))
    placed, sizes = _place(random, layout, kinds)
    groups = tuple(Group(kind, colour, size, tuple(boxes))
                   for kind, colour, size, boxes in zip(kinds, colours, sizes, placed, strict=True))
    relation = None
    if layout == "beside":
        relation = (kinds[0], "left" if placed[0][0][0] < placed[1][0][0] else "right", kinds[1])
    elif layout in ("above", "in front"):
        relation = (kinds[0], layout, kinds[1])
    return Scene(background, groups, relation)


def sample_portrait(random: Random, kind: str) -> Scene:
    """A scene with one object of that kind and nothing else."""
    background = random.choice([name for name in BACKGROUNDS if stands_on(kind, name)])
    (boxes,), (size,) = _place(random, "one", [kind])
    return Scene(background, (Group(kind, random.choice(list(COLOURS)), size, tuple(boxes)),))


def _sample_kinds(random: Random, layout: str, coco: bool) -> list[str]:
    """Distinct kinds for a layout, the main one first. In a COCO scene it is of a COCO kind, and half of the others."""
    number = {"one": 1, "several": 1, "three": 3}.get(layout, 2)
    while True:
        kinds = [random.choice(COCO if coco else ORDINARY)]
        while len(kinds) < number:
            other = random.choice(COCO if coco and random.random() < 0.5 else ORDINARY)
            kinds += [other] if other not in kinds else []
        if layout == "above" and not coco and KINDS[kinds[0]].place != "air":
            continue  # what is above flies, but for COCO kinds, of which none does: there the other one must
        if layout == "above" and coco:
            kinds.reverse()
            if KINDS[kinds[0]].place != "air":
                continue
        if layout == "above" and KINDS[kinds[1]].place == "air":
            continue
        if layout == "in front" and (kinds[1] not in LARGE or KINDS[kinds[0]].place == "air"):
            continue
        return kinds


def _fit(kind: str, width: float, height: float) -> tuple[float, float]:
    """Width and height (fractions of the image) of a kind drawn as large as a cell of width x height allows."""
    aspect = KINDS[kind].aspect * SHAPE[1] / SHAPE[0]
    return (width, width / aspect) if width / aspect <= height else (height * aspect, height)


def _box(kind: str, width: float, height: float, centre: float, bottom: float) -> Box:
    """The box of a kind in a cell, standing on `bottom`, kept inside the image."""
    w, h = _fit(kind, width, height)
    x0 = min(max(centre - w / 2, 0.03), 0.97 - w)
    y1 = min(max(bottom, h + 0.04), 0.96)
    return (x0, y1 - h, x0 + w, y1)


def _bottom(random: Random, kind: str) -> float:
    """Where the lower edge of an object is: on the ground, or up in the air."""
    return random.uniform(0.50, 0.72) if KINDS[kind].place == "air" else random.uniform(0.84, 0.95)


def _place(random: Random, layout: str, kinds: Sequence[str]) -> tuple[list[list[Box]], list[str]]:
    """Boxes and size of each kind's group: a fifth of the image on average, so that where it stands says something."""
    first = kinds[0]
    if layout == "one":
        size = random.choices(("big", "medium", "small"), (0.3, 0.4, 0.3))[0]
        height = {"big": (0.58, 0.66), "medium": (0.46, 0.52), "small": (0.34, 0.39)}[size]
        room = {"big": 0.66, "medium": 0.53, "small": 0.41}[size]  # wide kinds are bounded by their width
        tall, centre = random.uniform(*height), random.uniform(0.25, 0.75)
        return [[_box(first, room, tall, centre, _bottom(random, first))]], [size]
    if layout == "above":
        x = random.uniform(0.3, 0.7)
        return [[_box(first, 0.40, 0.34, x, random.uniform(0.43, 0.46))],
                [_box(kinds[1], 0.44, 0.40, x + random.uniform(-0.1, 0.1), random.uniform(0.94, 0.96))]], ["medium"] * 2
    if layout == "in front":
        x, side = random.uniform(0.38, 0.62), random.choice((-1, 1))
        behind = _box(kinds[1], 0.56, 0.56, x, random.uniform(0.78, 0.82))
        edge = behind[0] + 0.06 if side < 0 else behind[2] - 0.06  # what is behind stays recognisable
        return [[_box(first, 0.35, 0.33, edge, 0.96)], [behind]], ["medium"] * 2
    # rows: cells from left to right
    counts = {"several": [random.choice((2, 2, 3))], "several and one": [2, 1]}.get(layout, [1] * len(kinds))
    row = [index for index, count in enumerate(counts) for _ in range(count)]
    if layout == "beside" or layout == "several and one":
        row = row if random.random() < 0.5 else row[::-1]
    sizes = ["medium"] * len(kinds)
    if layout == "beside" and random.random() < 0.25:
        sizes = random.choice((["big", "small"], ["small", "big"]))
    cell = 0.94 / len(row)
    boxes: list[list[Box]] = [[] for _ in kinds]
    bottoms = [_bottom(random, kind) for kind in kinds]
    for position, index in enumerate(row):
        scale = {"big": 0.90, "medium": random.uniform(0.72, 0.80), "small": 0.56}[sizes[index]]
        slack = min(0.04, cell * (1 - scale) / 2)  # nothing leaves its cell: left stays left of right
        centre = 0.03 + cell * (position + 0.5) + random.uniform(-slack, slack)
        bottom = bottoms[index] + random.uniform(-0.05, 0.05)
        boxes[index].append(_box(kinds[index], cell * scale, 0.66 * scale, centre, bottom))
    return boxes, sizes


# --- captions ---------------------------------------------------------------------------------------------------------

LENGTHS = (5, 20)  # characters of a caption, its full stop aside
_SAYS = {"left": ("左边", "左侧"), "right": ("右边", "右侧"), "above": ("上方", "上面"), "in front": ("前面", "前方"),
         "below": ("下方", "下面"), "behind": ("后面", "后方")}
_INVERSE = {"left": "right", "right": "left", "above": "below", "in front": "behind"}


def write_captions(scene: Scene, random: Random, number: int = 5, literal: float = 0.0, stop: str = "。") -> list[str]:
    """Differing captions of a scene. `literal`: share that reads like a machine's word-for-word translation."""
    captions: list[str] = []
    for attempt in range(1000):
        write = _literal if random.random() < literal else _natural
        caption = write(scene, random)
        # a scene too plain for that many captions of a good length gets longer ones
        fits = LENGTHS[0] <= len(caption) <= LENGTHS[1] + attempt // 50
        if fits and caption + stop not in captions:
            captions.append(caption + stop)
            if len(captions) == number:
                return captions
    raise ValueError(f"no {number} differing captions of {scene}")


def _noun(group: Group, random: Random) -> str:
    """A word for the kind that does not contradict its size."""
    clash = {"big": "小", "small": "大"}.get(group.size)
    words = [word for word in KINDS[group.kind].words if not (clash and word.startswith(clash))]
    return random.choice([*words, words[0]])


def _phrase(group: Group, random: Random, colour: float = 0.9, number: float = 0.9) -> str:
    """A noun phrase: 一只白色的小狗. `colour`, `number`: how often each is said (a number above one always is)."""
    noun, phrase = _noun(group, random), ""
    if group.count > 1 or random.random() < number:
        phrase = NUMBERS[group.count] + random.choice((*KINDS[group.kind].measures, KINDS[group.kind].measures[0]))
    size = {"big": "大", "small": "小"}.get(group.size, "")
    said = size if size and noun[0] not in "大小" and random.random() < 0.6 else ""
    if random.random() < colour:
        word = COLOURS[group.colour]
        phrase += f"{word}色的" if said else random.choice((f"{word}色的", f"{word}色的", f"{word}色", word))
    return phrase + said + noun


def _choose(random: Random, options: Mapping[str, float]) -> str:
    return random.choices(list(options), list(options.values()))[0]


def _natural(scene: Scene, random: Random) -> str:
    """A caption as a person would write it."""
    main, others = scene.groups[0], scene.groups[1:]
    where = random.choice(BACKGROUNDS[scene.background].phrases)
    a, verbs = _phrase(main, random), KINDS[main.kind].verbs
    if not others or random.random() < 0.12:
        colour, noun = COLOURS[main.colour], _noun(main, random)
        lead = random.choice(("画面中有", "图片里有", "这里有"))
        options = {f"{where}有{a}": 2.0, f"{a}在{where}": 1.5, f"{where}的{a}": 1.0, f"{lead}{a}": 4.0, a: 4.0,
                   f"{where}的{noun}是{colour}色的": 0.8 if main.count == 1 else 0.0}
        if verbs:
            verb = random.choice(verbs)
            options |= {f"{where}{verb}着{a}": 1.5, f"{a}{verb}在{where}": 1.5}
        if main.count > 1:
            options |= {f"{where}的{NUMBERS[main.count]}{KINDS[main.kind].measures[0]}{noun}都是{colour}色的": 0.8}
        return _choose(random, options)
    if len(others) == 2:
        b, c = (_phrase(group, random, colour=0.5, number=0.5) for group in others)
        return _choose(random, {f"{where}有{a}、{b}和{c}": 3.0, f"{a}、{b}和{c}在{where}": 2.0, f"{a}、{b}和{c}": 0.5,
                                f"{where}有{a}和{random.choice((b, c))}": 1.0})
    b = _phrase(others[0], random, colour=0.75)
    if scene.relation and random.random() < 0.55:
        return _related(scene, random, a, b, where)
    return _choose(random, {f"{where}有{a}和{b}": 2.0, f"{a}和{b}在{where}": 1.0, f"{b}旁边有{a}": 2.0, f"{a}和{b}": 3.0,
                            f"画面中有{a}和{b}": 2.0, f"{where}的{a}和{b}": 0.7, f"{b}和{a}": 2.0})


def _related(scene: Scene, random: Random, a: str, b: str, where: str) -> str:
    """A caption that says where the first object is, seen from the second, or the other way round."""
    relation = scene.relation[1]
    says, inverse = random.choice(_SAYS[relation]), random.choice(_SAYS[_INVERSE[relation]])
    verb = random.choice([*KINDS[scene.groups[0].kind].verbs, ""])
    there = f"{verb}着" if verb else "有"
    options = {f"{a}在{b}的{says}": 2.0, f"{b}的{says}有{a}": 2.0, f"{b}{says}{there}{a}": 2.0,
               f"{b}在{a}的{inverse}": 1.0, f"{where}{a}在{b}{says}": 1.0, f"{a}{verb}在{b}{says}": 1.0}
    if relation in ("left", "right"):
        options |= {f"{says}是{a}，{inverse}是{b}": 1.5}
    return _choose(random, options)


def _literal(scene: Scene, random: Random) -> str:
    """A caption as a machine translates it word for word: 个 or no measure word, stiff order, flat wording."""
    def phrase(group: Group, colour: float) -> str:
        counted = group.count > 1 or random.random() < 0.8
        number = NUMBERS[group.count] + random.choice(("个", "个", "")) if counted else ""
        word = COLOURS[group.colour]
        said = random.choice((f"{word}色", f"{word}色的")) if random.random() < colour else ""
        return number + said + _noun(group, random)

    where = random.choice(BACKGROUNDS[scene.background].phrases)
    a = phrase(scene.groups[0], 0.9)
    if len(scene.groups) == 1 or random.random() < 0.15:
        verb = random.choice([*KINDS[scene.groups[0].kind].verbs, "是"])
        return _choose(random, {f"有{a}在{where}": 2.0, f"{a}是在{where}": 2.0, f"{a}，{where}": 1.0,
                                f"在{where}{a}": 1.0, f"{a}正在{where}{verb if verb != '是' else ''}": 1.0})
    rest = [phrase(group, 0.6) for group in scene.groups[1:]]
    listed = "，".join([a, *rest[:-1]]) + "和" + rest[-1]
    options = {f"有{listed}在{where}": 2.0, f"{listed}是在{where}": 2.0, f"在{where}{listed}": 1.0, f"{listed}": 1.0}
    if scene.relation:
        options |= {f"{a}是在{rest[0]}的{random.choice(_SAYS[scene.relation[1]])}": 3.0}
    return _choose(random, options)


# --- parsing ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Parsed:
    """What a caption states. An object is (kind, colour or None, count or None), in the order of naming."""

    objects: tuple[tuple[str, str | None, int | None], ...]
    relation: Relation | None = None
    background: str | None = None


def _lexicon() -> dict[str, tuple[str, object]]:
    """Word -> (category, value) for everything that the parser knows."""
    words: dict[str, tuple[str, object]] = {}
    for name, kind in KINDS.items():
        words |= {word: ("kind", name) for word in kind.words}
    for name, background in BACKGROUNDS.items():
        words |= {word: ("background", name) for word in (*background.words, *background.phrases)}
    for name, word in COLOURS.items():
        words |= {word: ("colour", name), f"{word}色": ("colour", name)}
    for relation, cues in _SAYS.items():
        words |= {cue: ("cue", relation) for cue in (*cues, cues[0][0] + "边")}
    numbers = {1: "一1", 2: "两二2俩", 3: "三3", 4: "四4", 5: "五5"}
    words |= {word: ("number", number) for number, text in numbers.items() for word in text}
    words |= {mark: ("break", None) for mark in "，,；;。.！!"}
    words |= {word: ("other", None) for word in ("一起", "一些", "一样", "一边", "一旁", "旁边")}
    further = {"象": "elephant", "披萨": "pizza", "车": "car", "熊": "teddy bear"}  # not written, but understood
    words |= {word: ("kind", name) for word, name in further.items()}
    return words


_LEXICON = _lexicon()
_TOKEN = re.compile("|".join(re.escape(word) for word in sorted(_LEXICON, key=len, reverse=True)))


def parse_caption(caption: str) -> Parsed:
    """What a caption states: the longest known word at each place counts, everything else is passed over."""
    objects: list[list] = []  # [kind, colour, count]
    trail: list[tuple[str, object]] = []  # ("object", index) and ("cue", relation), in order
    background = colour = number = None
    for match in _TOKEN.finditer(caption):
        category, value = _LEXICON[match.group()]
        if category == "kind":
            objects.append([value, colour, number])
            trail.append(("object", len(objects) - 1))
            colour = number = None
        elif category == "colour":
            colour = value
        elif category == "number":
            number = value
        elif category == "cue":
            trail.append(("cue", value))
        elif category == "background":
            background = background or value
            number = None  # "一片草地": it counted the place
        elif category == "break":
            _late_colour(objects, colour)
            colour = number = None
    _late_colour(objects, colour)
    return Parsed(tuple(tuple(item) for item in objects), _relation(objects, trail), background)


def object_words(caption: str) -> list[tuple[str, int, int]]:
    """The nouns of a caption that name a kind of object: (kind, first character, end), in the order of naming."""
    return [(_LEXICON[m.group()][1], *m.span()) for m in _TOKEN.finditer(caption) if _LEXICON[m.group()][0] == "kind"]


def _late_colour(objects: list[list], colour: object) -> None:
    """草地上的汽车是红色的: a colour with no noun after it belongs to the one before it."""
    if colour and objects and objects[-1][1] is None:
        objects[-1][1] = colour


def _relation(objects: Sequence[Sequence], trail: Sequence[tuple[str, object]]) -> Relation | None:
    """The first relation stated, with "below" and "behind" turned round."""
    position = next((i for i, (category, _) in enumerate(trail) if category == "cue"), None)
    if position is None:
        return None
    before = [index for category, index in trail[:position] if category == "object"]
    after = [index for category, index in trail[position:] if category == "object"]
    if not before and len(after) >= 2:  # 左边是甲，右边是乙
        first, second = after[:2]
    elif before and after and sum(category == "cue" for category, _ in trail) == 1:  # 乙的左边有甲
        first, second = after[0], before[-1]
    elif len(before) >= 2:  # 甲在乙的左边
        first, second = before[-2:]
    elif before and after:  # 甲在左边，乙在右边
        first, second = before[0], after[0]
    else:
        return None
    one, relation, other = objects[first][0], trail[position][1], objects[second][0]
    if one == other:
        return None
    turned = {"below": "above", "behind": "in front"}
    return (other, turned[relation], one) if relation in turned else (one, relation, other)
