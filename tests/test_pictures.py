"""Opening of picture files: named formats only, as a person sees them, or one line that says what is wrong."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

from fastvideo.eval import eval_reward
from fastvideo.eval.plots import read_picture
from fastvideo.io import pictures
from fastvideo.io.pictures import open_picture
from fastvideo.models.reward_model.image_reward import ComponentScorer

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

# Halves of different colours, so that turning shows.
HALVES = Image.new("RGB", (8, 4), "red")
HALVES.paste("blue", (0, 0, 4, 4))


def saved(image: Image.Image, kind: str = "PNG", **how: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    buffer.seek(0)
    return buffer


def pixels(source: Path | io.BytesIO) -> np.ndarray:
    image = open_picture(source)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_the_usual_formats_are_read_whatever_the_name_says(kind, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(saved(HALVES, kind, **({"lossless": True} if kind == "WEBP" else {})).getvalue())
    difference = np.abs(pixels(path).astype(int) - np.asarray(HALVES))
    assert difference.mean() < (30 if kind == "JPEG" else 1e-9)


def test_a_picture_is_read_as_a_person_sees_it():
    turned = Image.Exif()
    turned[0x0112] = 3  # by 180 degrees
    assert np.array_equal(pixels(saved(HALVES, exif=turned)), np.asarray(HALVES)[:, ::-1])
    hidden = HALVES.convert("RGBA")
    hidden.putalpha(0)
    assert (pixels(saved(hidden)) == 255).all()  # white, not the colours below
    hidden.putalpha(255)
    assert np.array_equal(pixels(saved(hidden)), np.asarray(HALVES))
    palette = HALVES.quantize(2)
    clear = palette.getpixel((0, 0))
    assert np.array_equal(pixels(saved(palette)), np.asarray(HALVES))
    assert (pixels(saved(palette, transparency=clear))[:, :4] == 255).all()
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert np.array_equal(pixels(saved(Image.fromarray(ramp)))[..., 0].ravel(), np.arange(256))
    assert np.abs(pixels(saved(HALVES.convert("CMYK"), "JPEG")).astype(int) - np.asarray(HALVES)).mean() < 30


def bomb() -> bytes:
    """A PNG of 100,000 × 100,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


WHOLE = saved(HALVES.resize((200, 200))).getvalue()
REFUSED = {
    "PostScript": (saved(HALVES, "EPS").getvalue(), "none of PNG, JPEG, WEBP, BMP"),
    "a format that isn't named": (saved(HALVES, "TIFF").getvalue(), "none of PNG"),
    "text": (b"no picture", "none of PNG"),
    "an empty file": (b"", "none of PNG"),
    "a truncated file": (WHOLE[:150], "not a readable picture: "),
    "a broken chunk": (WHOLE[:60] + b"x" + WHOLE[61:], "not a readable picture: "),
    "a bomb": (bomb(), "pixels"),
    "an animation": (
        saved(HALVES, save_all=True, append_images=[HALVES.rotate(180)]).getvalue(),
        "an animation of 2 frames",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_any_other_file_is_refused_with_one_line_and_starts_no_program(case, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("an interpreter was started"))
    content, problem = REFUSED[case]
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^not a readable picture: .*{problem}|^{problem}") as refusal:
        open_picture(path)
    assert "\n" not in str(refusal.value)
    assert read_picture(path) is None  # a report leaves it out
    with pytest.raises(ValueError, match="not a readable picture"):
        ComponentScorer(None, "clip").inference_rank("a prompt", [path])


def test_a_picture_larger_than_the_limit_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 31)
    with pytest.raises(ValueError, match="8×4 pixels, at most 31 are read"):
        open_picture(saved(HALVES))


def test_an_evaluation_of_files_that_are_no_pictures_ends_before_rewards_load(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(eval_reward, "build_reward_models", lambda *_, **__: pytest.fail("rewards were loaded"))
    picture = tmp_path / "picture.png"
    picture.write_bytes(REFUSED["PostScript"][0])
    with refused(f"--image {picture}: not one picture could be read; .*: not a readable picture: none of PNG"):
        eval_reward.main(["--image", str(picture), "--prompt", "p", "--reward_model_type", "jpeg_compressibility"])
    with refused(r"--prompt 'caf.udce9': isn't UTF-8 text"):  # what Python makes of a byte in Latin-1
        eval_reward.main(["--image", str(picture), "--prompt", "caf\udce9"])
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with refused(f"--image {path}: .*: not a readable picture: a folder or a device"):
            eval_reward.main(["--image", str(path), "--prompt", "p", "--reward_model_type", "jpeg_compressibility"])
    manifest = tmp_path / "manifest.json"
    for text in ("[" * 100_000, r'[{"image": "picture.png", "prompt": "half a pair \ud83d"}]'):
        manifest.write_text(text)
        with refused(f"--manifest {manifest}: not a JSON file"):
            eval_reward.main(["--manifest", str(manifest), "--reward_model_type", "jpeg_compressibility"])
    manifest.write_text(json.dumps([{"image": "gone.png", "prompt": "a"}, {"image": "picture.png", "prompt": "b"}]))
    with refused(f"--manifest {manifest}: not one picture could be read; {picture}: not a readable picture"):
        eval_reward.main(["--manifest", str(manifest), "--reward_model_type", "jpeg_compressibility"])
