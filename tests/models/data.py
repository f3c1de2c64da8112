"""Real inputs for the real models: English sentences, photographs and rendered text lines out of installed packages.

Everything is drawn with fixed seeds, so that numbers of different runs and machines can be compared."""

import re
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CALIBRATION_PHOTOS = ("china.jpg", "rocket.jpg", "motorcycle_left.png", "coins.png", "grass.png", "page.png")
EVALUATION_PHOTOS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "flower.jpg", "grace_hopper.jpg"),
    *("camera.png", "motorcycle_right.png", "hubble_deep_field.jpg", "brick.png", "retina.jpg"),
)
PHOTO_FOLDERS = (("skimage", "data"), ("sklearn", "datasets/images"), ("matplotlib", "mpl-data/sample_data"))
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it; FileNotFoundError when it is not installed."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {name} is not installed; `make setup` installs it")
    return Path(spec.submodule_search_locations[0])


def english() -> str:
    """Python's own language reference, as pydoc carries it."""
    return "\n".join(topics[key] for key in sorted(topics))


def sentences() -> list[str]:
    """English sentences of 50 to 300 characters from the language reference and scikit-learn's data descriptions, shuffled."""
    descriptions = sorted((package_folder("sklearn") / "datasets" / "descr").glob("*.rst"))
    text = "\n\n".join([english(), *(p.read_text() for p in descriptions)])
    found = set()
    for paragraph in re.split(r"\n\s*\n", text):
        flat = re.sub(r"\s+", " ", paragraph).strip()
        found |= {s for s in re.split(r"(?<=[.!?]) ", flat) if 50 <= len(s) <= 300 and re.fullmatch(r"[A-Z][\w ,.'\"()-]+[.!?]", s)}
    ordered = sorted(found)
    np.random.default_rng(0).shuffle(ordered)
    return ordered


def photo(name: str) -> Image.Image:
    for package, folder in PHOTO_FOLDERS:
        path = package_folder(package) / folder / name
        if path.exists():
            return Image.open(path).convert("RGB")
    raise FileNotFoundError(f"photograph {name} is in none of {', '.join(p for p, _ in PHOTO_FOLDERS)}")


def photo_crops(names: tuple[str, ...], count: int, *, seed: int) -> np.ndarray:
    """[count, 3, 224, 224] float32: random square crops, half of them mirrored, normalised as ImageNet models expect."""
    rng = np.random.default_rng(seed)
    photos = [photo(n) for n in names]
    out = np.empty((count, 3, 224, 224), np.float32)
    for i in range(count):
        image = photos[i % len(photos)]
        side = int(min(image.size) * rng.uniform(0.45, 1.0))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[i] = ((np.asarray(crop, np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    return out


def text_lines(count: int, *, seed: int) -> tuple[np.ndarray, list[str]]:
    """([count, 3, 48, 320] float32 in about -1..1, texts): rendered English words, a little rotated, blurred and noisy."""
    folder = package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
    fonts = sorted(p.name for p in folder.iterdir() if re.match(r"(DejaVu(Sans|Serif)|STIXGeneral)", p.name) and "Display" not in p.name)
    words = re.findall(r"[A-Za-z0-9][\w.,:;()'-]*", english())
    rng = np.random.default_rng(seed)
    images, texts = np.zeros((count, 3, 48, 320), np.float32), list[str]()
    while len(texts) < count:
        first = int(rng.integers(0, len(words) - 8))
        text = " ".join(words[first : first + int(rng.integers(2, 5))])
        if not 6 <= len(text) <= 26 or not text.isascii():
            continue
        line = _text_line(text, ImageFont.truetype(str(folder / fonts[len(texts) % len(fonts)]), 32), rng)
        images[len(texts), :, :, : line.shape[1]] = line
        texts.append(text)
    return images, texts


def _text_line(text: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> np.ndarray:
    """[48, width <= 320] float32. The order of the draws is part of the protocol."""
    left, top, right, bottom = font.getbbox(text)
    paper, ink = int(rng.integers(150, 255)), int(rng.integers(0, 110))
    image = Image.new("L", (right - left + 16, max(bottom - top, 30) + 12), paper)
    ImageDraw.Draw(image).text((8 - left, 6 - top), text, font=font, fill=ink)
    image = image.rotate(float(rng.uniform(-1.5, 1.5)), resample=Image.Resampling.BICUBIC, fillcolor=paper)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.6))))
    width = min(320, int(image.width * 48 / image.height))
    pixels = np.asarray(image.resize((width, 48), Image.Resampling.BILINEAR), np.float32)
    return np.clip(pixels + rng.normal(0, 14, pixels.shape), 0, 255) / 127.5 - 1
