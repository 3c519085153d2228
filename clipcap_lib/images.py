"""Image files in, upright RGB squares out, and what of them is kept to find copies. Light: worker processes import it.

The files are downloads and not to be trusted: formats that call other programs are not opened, absurd sizes not decoded.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import stat
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from clipcap_lib.config import on_one_line

JPEG_QUALITY = 92
LARGEST = 60_000_000  # pixels: a photo of a corpus is far smaller; anything larger is left out
LARGEST_FILE = 256 * 2 ** 20  # bytes: more than so many pixels take without compression
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # whatever the file is called; of several frames the first
THUMBNAIL = 16  # pixels a side: enough to tell drawn scenes apart, and 256 bytes an image

_TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                         Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                         Image.Transpose.ROTATE_90), start=2))  # by Exif's number of how an image is stored; 1 is upright

for _plugin in ("Bmp", "Gif", "Jpeg", "Png", "Tiff", "WebP"):
    # otherwise the first image makes Pillow import all the formats it knows, which takes longer than a worker's start
    importlib.import_module(f"PIL.{_plugin}ImagePlugin")

EMPTY_FILE = "image file is empty"
TOO_LARGE = "image is absurdly large"
UNREADABLE = "image cannot be read"


class ImageError(ValueError):
    """An image file that is left out. `reason` is one of three phrases, so that it can be counted; `detail` says more."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises ImageError where there are absurdly many, or they cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for a writer
            raise ImageError(UNREADABLE, "not a file")
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length > LARGEST_FILE:
                raise ImageError(TOO_LARGE, f"{length} bytes")
            return file.read()
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(UNREADABLE, getattr(error, "strerror", None) or str(error)) from error


def read_square(content: bytes, size: int) -> Image.Image:
    """The bytes of an image file -> RGB (size, size): upright, squashed, the first frame, transparency on white.

    16 bits a channel become the upper 8. Of a JPEG of more than twice the size only a part of the detail is decoded: pixels
    differ slightly from those of a whole image squashed. Raises ImageError on what is empty, absurdly large or no image.
    """
    if not content:
        raise ImageError(EMPTY_FILE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Exif that is cut off, say: the image is read or it is not
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > LARGEST:
                    raise ImageError(TOO_LARGE, f"{image.width} x {image.height} pixels")
                if _ends_in_zeros(image.format, content):
                    raise ImageError(UNREADABLE, "its end is missing")
                image.draft("RGB", (2 * size, 2 * size))  # lets the JPEG decoder skip detail that is thrown away below
                return as_seen(image).resize((size, size), Image.Resampling.BICUBIC)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(TOO_LARGE, str(error).partition(",")[0]) from error
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise ImageError(UNREADABLE, f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from error
    except Exception as error:  # decoders of broken files raise what they like: struct.error, SyntaxError, KeyError ..
        raise ImageError(UNREADABLE, on_one_line(error)) from error


def _ends_in_zeros(kind: str, content: bytes) -> bool:
    """Whether zeros stand where the end of a file should be: a download that broke off. They decode to grey or black.

    Of GIF and packed TIFF the decoders see it; of pixels that are not packed nothing can be told.
    """
    if not content.endswith(bytes(2)):
        return False
    if kind in ("JPEG", "MPO"):  # the markers of the end and of a scan, neither of which can stand within coded pixels
        return content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda")
    if kind == "PNG":
        return content.rfind(b"IEND") < content.rfind(b"IDAT")
    if kind == "WEBP":  # its length stands in its head
        return content[:8 + int.from_bytes(content[4:8], "little")].endswith(bytes(32))
    return False


def as_seen(image: Image.Image) -> Image.Image:
    """An image of any mode as a viewer shows it: upright, RGB, transparency on white, 16 bits as their upper 8.

    Exif that is damaged says nothing. Raises what Pillow raises where pixels cannot be read. The image stays as it is.
    """
    image.load()  # what fails below is then no fault of the pixels
    turn = None
    with suppress(Exception):  # ImageOps.exif_transpose copies every image, and writes all of its Exif again
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:
        turned = image.transpose(turn)  # with all that is said of the image, its orientation as well: it is upright now
        turned.info = {name: value for name, value in image.info.items() if name == "transparency"}
        image = turned
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB; Pillow's own conversion cuts 16 bits at 255 and uncovers hidden pixels."""
    if image.mode in ("RGB", "L"):
        plain = image if "transparency" not in image.info else image.convert("RGBA")
    elif image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        # 16-bit greys come as I;16 or I; floats are in [0, 1] or in [0, 255] by custom
        top = 65535 if image.mode.startswith("I") and (image.mode != "I" or values.max() > 255) else (
            1 if image.mode == "F" and values.max() <= 1 else 255)
        plain = Image.fromarray((np.clip(values / top, 0, 1) * 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        plain = image.convert("RGBA")
    else:
        plain = image
    if plain.mode == "RGBA":
        plain = Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain)
    return plain if plain.mode == "RGB" else plain.convert("RGB")


def jpeg(image: Image.Image) -> bytes:
    """The image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def look(content: bytes, square: Image.Image) -> tuple[str, np.ndarray]:
    """What is kept of a file, and of the square that `read_square` made of it, to find copies.

    A digest of the bytes, equal only for the same file, and a thumbnail (THUMBNAIL, THUMBNAIL) uint8, grey, which is near
    for the same picture at another size or quality.
    """
    small = square.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return hashlib.sha256(content).hexdigest()[:32], np.asarray(small)


def bare_jpeg(path: Path, size: int) -> bytes:
    """Decode, squash and encode, and nothing else: the plain twin that `bench prepare` measures against."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))
        square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return jpeg(square)
