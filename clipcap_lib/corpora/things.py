"""What the drawn scenes are made of: kinds of objects, colours, sizes and backgrounds, each with its Chinese words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of object: how it is named, counted, placed and how wide it is."""

    words: tuple[str, ...]  # nouns, the usual one first; a word with 小 is not used of a big one, nor 大 of a small one
    measures: tuple[str, ...]  # measure words, the usual one first
    verbs: tuple[str, ...]  # what it does in "...着" (existential) and "...在" (locative); empty: only 有 and 在
    place: str = "ground"  # "ground" or "air": where in the picture it stands
    aspect: float = 1.0  # width / height of its drawing
    backgrounds: tuple[str, ...] = ()  # the only ones it stands on; empty: see `stands_on`
    coco: bool = False  # common in the COCO-CN miniature and on board B, rare elsewhere

    @property
    def chinese(self) -> str:
        return self.words[0]


@dataclass(frozen=True)
class Background:
    """One background and the phrases that say that something is there."""

    words: tuple[str, ...]  # nouns by which the parser knows it, the usual one first
    phrases: tuple[str, ...]  # location phrases, ready to stand before 有 or after 在
    indoor: bool = False  # no vehicles, houses, trees or large animals
    coco: bool = False

    @property
    def chinese(self) -> str:
        return self.words[0]


_WATER = ("sea", "beach")

KINDS: dict[str, Kind] = {
    "dog": Kind(("狗", "小狗", "狗狗"), ("只", "条"), ("站", "坐"), aspect=1.15),
    "cat": Kind(("猫", "小猫", "猫咪"), ("只",), ("坐",), aspect=0.85),
    "bird": Kind(("鸟", "小鸟", "鸟儿"), ("只",), ("飞",), "air", 1.2),
    "fish": Kind(("鱼", "小鱼", "鱼儿"), ("条",), ("游",), aspect=1.4, backgrounds=_WATER),
    "butterfly": Kind(("蝴蝶",), ("只",), ("飞",), "air", 1.15),
    "car": Kind(("汽车", "轿车", "小汽车"), ("辆",), ("停",), aspect=1.6),
    "boat": Kind(("船", "小船", "帆船"), ("艘", "条"), ("停",), aspect=1.0, backgrounds=_WATER),
    "airplane": Kind(("飞机", "客机"), ("架",), ("飞",), "air", 1.5),
    "house": Kind(("房子", "小屋", "房屋"), ("座", "栋"), (), aspect=1.0),
    "tree": Kind(("树", "大树", "树木"), ("棵",), ("长",), aspect=0.8),
    "flower": Kind(("花", "花朵", "鲜花"), ("朵",), ("开",), aspect=0.7),
    "ball": Kind(("球", "皮球"), ("个",), ("放",), aspect=1.0),
    "umbrella": Kind(("伞", "雨伞"), ("把",), ("放",), aspect=1.0),
    "balloon": Kind(("气球",), ("个", "只"), ("飘",), "air", 0.62),
    "cup": Kind(("杯子", "水杯"), ("个", "只"), ("放",), aspect=1.1),
    "chair": Kind(("椅子", "座椅"), ("把",), ("放",), aspect=0.7),
    "giraffe": Kind(("长颈鹿",), ("只", "头"), ("站",), aspect=0.7, coco=True),
    "elephant": Kind(("大象", "小象"), ("头", "只"), ("站",), aspect=1.3, coco=True),
    "pizza": Kind(("比萨", "比萨饼"), ("块", "个"), ("放",), aspect=0.95, coco=True),
    "banana": Kind(("香蕉",), ("根",), ("放",), aspect=1.3, coco=True),
    "teddy bear": Kind(("玩具熊", "小熊"), ("个", "只"), ("坐",), aspect=0.85, coco=True),
    "traffic light": Kind(("红绿灯", "交通灯"), ("个", "盏"), ("立",), aspect=0.45, coco=True),
}
OUTDOORS = ("car", "airplane", "house", "tree", "giraffe", "elephant", "traffic light", "boat")
AFLOAT = ("boat", "fish", "bird", "airplane", "balloon", "ball", "butterfly", "umbrella")
LARGE = ("house", "tree", "car", "boat", "elephant", "giraffe", "chair", "umbrella")  # can stand behind others

COLOURS: dict[str, str] = {"red": "红", "blue": "蓝", "green": "绿", "yellow": "黄", "white": "白", "black": "黑",
                           "purple": "紫", "orange": "橙"}
NUMBERS = {1: "一", 2: "两", 3: "三"}

BACKGROUNDS: dict[str, Background] = {
    "grass": Background(("草地", "草坪", "草原"), ("草地上", "草坪上")),
    "beach": Background(("沙滩", "海滩", "海边"), ("沙滩上", "海滩上", "海边")),
    "snow": Background(("雪地", "雪里", "雪中"), ("雪地上", "雪地里")),
    "street": Background(("街道", "马路", "街上", "路上"), ("街道上", "马路上", "街上")),
    "night": Background(("夜空", "星空", "夜色", "夜晚"), ("夜空下", "星空下", "夜色中")),
    "room": Background(("房间", "屋里", "室内"), ("房间里", "屋里", "室内"), indoor=True),
    "sea": Background(("海面", "大海", "海上", "海里"), ("海面上", "大海上", "海上")),
    "desert": Background(("沙漠",), ("沙漠里", "沙漠中", "沙漠上")),
    "kitchen": Background(("厨房",), ("厨房里", "厨房中"), indoor=True, coco=True),
    "court": Background(("球场", "操场"), ("球场上", "操场上"), coco=True),
}


def stands_on(kind: str, background: str) -> bool:
    """Whether a kind of object is drawn on a background: no train in the kitchen, no chair on the sea."""
    if KINDS[kind].backgrounds:
        return background in KINDS[kind].backgrounds
    if background == "sea":
        return kind in AFLOAT
    return not (BACKGROUNDS[background].indoor and kind in OUTDOORS)
