"""Small corpora in the layouts in which they are published, written out by hand: nothing here is the library's.

Each function fills a folder and returns it. Lines are the publishers' own where a few are public, else of their form.
"""

from __future__ import annotations

from pathlib import Path


def put(path: Path, content: str | bytes = b"\xff\xd8 any bytes: readers do not open images") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


# --- Flickr8k-CN ------------------------------------------------------------------------------------------------------

ZHC = ("667626_18933d713e.jpg#zhc#0 一个穿着泳装的女人躺在海水里。\n"
       "3637013_c675de7705.jpg#zhc#0 一对恋人在公园河边拥抱。\n"
       "10815824_2997e03d76.jpg#zhc#0 马场一个小女孩牵着一匹马在火堆旁边。\n"
       "667626_18933d713e.jpg#zhc#1 女人躺在水里。\n")


def flickr8k(folder: Path) -> Path:
    put(folder / "data/flickr8ktrain.txt", "667626_18933d713e\n")
    put(folder / "data/flickr8kval.txt", "3637013_c675de7705\n")
    put(folder / "data/flickr8ktest.txt", "10815824_2997e03d76\n")
    put(folder / "data/flickr8kzhc.caption.txt", ZHC)
    put(folder / "data/flickr8kzhb.caption.txt", "667626_18933d713e.jpg#zhb#0 女人在海中。\n"
                                                 "2258277193_586949ec62.jpg.1#zhb#0 人们在等待地铁\n"
                                                 "3637013_c675de7705.jpg#zhb#0 对。\n"
                                                 "10815824_2997e03d76.jpg#zhb#0 马。")
    put(folder / "data/flickr8kzhg.caption.txt", "10815824_2997e03d76.jpg#zhg#1 一个女孩和她的马站在火灾。\n"
                                                 "667626_18933d713e.jpg#zhg#0 在海中的女人。\n")
    put(folder / "data/flickr8kzhmtest.captions.txt", "10815824_2997e03d76.jpg#zhm#0 一个女孩和她的马。\n")
    for identity in ("667626_18933d713e", "3637013_c675de7705", "10815824_2997e03d76"):
        put(folder / f"Flicker8k_Dataset/{identity}.jpg")
    return folder


# --- Flickr30k-CN -----------------------------------------------------------------------------------------------------

def flickr30k(folder: Path) -> Path:
    """The release of Renmin University."""
    for name, identity, text in (
            ("flickr30kzhbbosontrain", "1000092795",
             "1000092795#zhb#0 两个 年轻人 在 外面 。\n1000092795#zhb#1 两个 人 穿 T 恤\n"),
            ("flickr30kzhbbosonval", "1018148011", "1018148011#zhb#0 一群 人 站 着 。\n"),
            ("flickr30kzhmbosontest", "1007129816", "1007129816#zhm#0 一个:m 戴:v 帽子:n 的:uj 男人:n 。:wj\n")):
        put(folder / name / "ImageSets" / f"{name}.txt", identity + "\n")
        put(folder / name / "TextData" / f"seg.{name}.caption.txt", text)
        put(folder / "flickr30k-images" / f"{identity}.jpg")
    return folder


def flickr30k_cna(folder: Path) -> Path:
    """The second release, with a tab and with a space."""
    put(folder / "train/flickr30k_cna_train.txt", "6228559981 一个孩子跑过喷泉。\n6228559981\t孩子在 喷泉边。\n")
    put(folder / "val/flickr30k_cna_val.txt", "17.jpg\t一只狗。\n")
    put(folder / "flickr30k_cn_test.txt", "18 一只猫。\n")
    for identity in (6228559981, 17, 18):
        put(folder / f"flickr30k-images/{identity}.jpg")
    return folder


# --- AIC-ICC ----------------------------------------------------------------------------------------------------------

TRAIN = "caption_train_annotations_20170902.json"
AIC = r"""[{"url": "http://m4.biz.itc.cn/pic/new/n/71/65/Img8296571_n.jpg",
 "image_id": "8f00f3d0f1008e085ab660e70dffced16a8259f6.jpg",
 "caption": ["\u4e24\u4e2a\u8863\u7740\u4f11\u95f2\u7684\u4eba", "\u9053\u8def\u4e0a\u6709\u4e00\u4e2a\u4eba"]},
 {"url": "", "image_id": "b96ff46ba5b1cbe5bb4cc32b566431132ca71a64.jpg", "caption": ["\u4e00\u4e2a\u4eba"]}]"""


def aic(folder: Path) -> Path:
    put(folder / TRAIN, AIC)
    put(folder / "caption_validation_annotations_20170910.json", '[{"image_id": "c.jpg", "caption": ["一只狗"]}]')
    for name in ("8f00f3d0f1008e085ab660e70dffced16a8259f6", "b96ff46ba5b1cbe5bb4cc32b566431132ca71a64"):
        put(folder / f"caption_train_images_20170902/{name}.jpg")
    put(folder / "caption_validation_images_20170910/c.jpg")
    return folder


# --- Hualu Cup --------------------------------------------------------------------------------------------------------

def hualu_cup(folder: Path) -> Path:
    put(folder / "train.csv", 'images,captions\n0001.jpg,一个男人在打电话\n0002.jpg,一只狗\n0001.jpg,"男人,在街上"\n')
    for name in ("train/0001.jpg", "train/0002.jpg", "board-a/a2.jpg", "board-a/a1.JPG", "board-b/b1.jpg"):
        put(folder / name)
    put(folder / "board-a/Thumbs.db")
    return folder


# --- COCO-CN ----------------------------------------------------------------------------------------------------------

A, B, C, D = (f"COCO_{part}2014_{number:012d}" for part, number in
              (("train", 101), ("val", 7), ("val", 217153), ("train", 9)))
COCO = "coco-cn-version1805v1.1"


def coco(folder: Path) -> Path:
    """Without its extension."""
    for split, identity in (("train", A), ("val", B), ("test", C)):
        put(folder / COCO / f"coco-cn_{split}.txt", identity + "\n")
    put(folder / COCO / "imageid.human-written-caption.txt",
        f"{A}#0\t一只长颈鹿。\n{B}#0\t一辆火车 停着。\n{C}#0\t两个人。\n{A}#1\t草地上的长颈鹿。\n")
    put(folder / COCO / "imageid.human-written-caption.bosonseg.txt",
        f"{A}#0\t一 只 长颈鹿 。\n{B}#0\t一 辆 火车 停 着 。\n{C}#0\t两 个 人 。\n{A}#1\t草地 上 的 长颈鹿 。\n")
    put(folder / COCO / "imageid.human-written-tags.txt", f"{A} 长颈鹿 草地\n{C} 男人 女人 手机 男人\n")
    put(folder / COCO / "imageid.manually-translated-caption.txt", f"{C}#0\t一个男人和一个女人。\n")
    put(folder / COCO / "imageid.machine-translated-caption.bosonseg.txt",
        f"{A}#zhb#0 一个:m 长颈鹿:n 吃:v 树:n\n{A}#zhb#1 长颈鹿:n 在:p 外面:f 10:30:m\n"
        f"{B}#zhb#0 一 辆 火车\n{C}#0\t两个:m 人:n\n")
    for part, identity in (("train2014", A), ("val2014", B), ("val2014", C), ("train2014", D)):
        put(folder / part / f"{identity}.jpg")
    return folder


def coco_extended(folder: Path) -> Path:
    """With the extension of 2020, one of whose images is in the test split."""
    put(coco(folder) / "coco-cn_ext.icap2020.txt",
        f"{C}#0\t一个男人和一个女人穿着军装玩手机。\n{D}#0\t一个比萨。\n{A}#0\t动物园里。\n")
    return folder


# --- tables of one's own ----------------------------------------------------------------------------------------------

def own_csv(folder: Path) -> Path:
    put(folder / "own.csv", "file,caption,split\na.jpg,一只狗,train\n"
                            'b.png,"猫,在睡",val\nsub/c.webp,鸟,test\na.jpg,狗,train\n')
    for name in ("a.jpg", "b.png", "sub/c.webp"):
        put(folder / name)
    return folder


def own_jsonl(folder: Path) -> Path:
    put(folder / "own.jsonl", '{"file": "a.jpg", "captions": ["一只狗", "狗"], "split": "train"}\n'
                              '{"file": "b.png", "caption": "\\u732b", "split": "val"}\n'
                              '{"file": "sub/c.webp", "caption": "鸟", "split": "test"}\n')
    for name in ("a.jpg", "b.png", "sub/c.webp"):
        put(folder / name)
    return folder
