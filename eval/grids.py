"""Images laid out side by side, as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

#: Images are shown about this wide, in pixels: small ones enlarged by a whole factor, large ones reduced.
SHOWN = 128
_GAP, _MARGIN, _LABEL, _TEXT = 4, 12, 128, 14


def strip(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Images (n, height, width, 3) in one row with transparent gaps of a pixel: uint8 (height, n·width + n − 1, 4)."""
    count, height, width, _ = images.shape
    row = np.zeros((height, count * (width + 1) - 1, 4), np.uint8)
    for column, image in enumerate(images):
        row[:, column * (width + 1) : column * (width + 1) + width] = np.pad(
            image, ((0, 0), (0, 0), (0, 1)), constant_values=255
        )
    return row


def reduced(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Images no wider than ``SHOWN``, with shape (n, height, width, 3); small ones as they are."""
    if images.shape[2] <= SHOWN:
        return images
    size = (SHOWN, max(1, round(images.shape[1] * SHOWN / images.shape[2])))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images])


def enlarged(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """An image (height, width, 3) repeated pixel by pixel, the largest whole factor that stays within ``SHOWN``."""
    factor = max(1, SHOWN // image.shape[1])
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def png(image: npt.NDArray[np.uint8]) -> bytes:
    """An image (height, width, 3 or 4) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def data_uri(image: npt.NDArray[np.uint8]) -> str:
    """An image (height, width, 3 or 4) as a ``data:`` address."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")


def labelled_grid(
    rows: Sequence[npt.NDArray[np.uint8]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> npt.NDArray[np.uint8]:
    """A contact sheet with labels on white, for a README: uint8 (height, width, 3).

    Args:
        rows: images (columns, height, width, 3) of each row, all of one shape.
        row_labels: one a row, at the left.
        column_labels: one a column, above.
    """
    tiles = [[enlarged(image) for image in reduced(row)] for row in rows]
    height, width = tiles[0][0].shape[:2]
    sheet = Image.new(
        "RGB",
        (
            2 * _MARGIN + _LABEL + len(column_labels) * (width + _GAP) - _GAP,
            2 * _MARGIN + 2 * _TEXT + len(rows) * (height + _GAP) - _GAP,
        ),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    left, top = _MARGIN + _LABEL, _MARGIN + 2 * _TEXT
    for column, label in enumerate(column_labels):
        x = left + column * (width + _GAP) + width // 2
        draw.text((x, _MARGIN + _TEXT // 2), label, fill="black", font=font, anchor="mm")
    for number, (row, label) in enumerate(zip(tiles, row_labels, strict=True)):
        y = top + number * (height + _GAP)
        draw.text((_MARGIN, y + height // 2), label, fill="black", font=font, anchor="lm")
        for column, tile in enumerate(row):
            sheet.paste(Image.fromarray(tile), (left + column * (width + _GAP), y))
    return np.asarray(sheet)
