"""Labelled grids of images."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 6
LABEL = 16  # pixels of a label's height


def sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], cell: int = 160) -> Image.Image:
    """Arrange rows of (title, [(label, image), …]) in one image; small images are enlarged without blurring."""
    columns = max(len(images) for _, images in rows)
    row_height = 2 * LABEL + cell + GAP
    page = Image.new("RGB", (GAP + columns * (cell + GAP), GAP + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(page)
    for number, (title, images) in enumerate(rows):
        top = GAP + number * row_height
        draw.text((GAP, top), title, fill="black", font=ImageFont.load_default(13))
        for column, (label, image) in enumerate(images):
            left = GAP + column * (cell + GAP)
            draw.text((left, top + LABEL), _fit(draw, label, cell), fill=(90, 90, 90), font=ImageFont.load_default(11))
            page.paste(_enlarge(image, cell), (left, top + 2 * LABEL))
    return page


def _enlarge(image: Image.Image, cell: int) -> Image.Image:
    method = Image.Resampling.NEAREST if image.width * 2 <= cell else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((cell, cell), method)


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    font = ImageFont.load_default(11)
    while text and draw.textlength(text, font) > width:
        text = text[:-2] + "…"
    return text
