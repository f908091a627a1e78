"""Sampling: noise that belongs to the prompt, hybrid inference, restarts, settings that don't mix, processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fastvideo.models.flux import load_transformer
from fastvideo.sample import sample_flux
from fastvideo.sample.sample_flux import SampleConfig, main, sample

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "data/tiny_flux")
PROMPTS = [
    "a small red circle at the left on a blue background",
    'a "quoted" / slashed\\ <b>prompt</b> & more',
    "🙂 emoji, ünïcödé",
    "a large green square in the center on a white background",
]


def flags(folder: Path, name: str, *more: object) -> list[str]:
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    fixed = {
        "pretrained_model_name_or_path": TINY,
        "prompts_file": prompts,
        "output_dir": folder / name,
        "h": 32,
        "w": 32,
    }
    fixed |= {"total_sampling_steps": 4, "device": "cpu"}
    return [str(x) for pair in ((f"--{k}", v) for k, v in fixed.items()) for x in pair] + [str(x) for x in more]


def pixels(manifest: Path) -> list[np.ndarray]:
    entries = json.loads(manifest.read_text(encoding="utf-8"))
    return [np.asarray(Image.open(manifest.parent / entry["image"])).astype(int) for entry in entries]


def largest_difference(a: Path, b: Path) -> int:
    return max(int(np.abs(x - y).max()) for x, y in zip(pixels(a), pixels(b), strict=True))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> str:
    """A checkpoint folder with a transformer that differs from the base model's."""
    transformer = load_transformer(TINY)
    with torch.no_grad():
        transformer.proj_out.weight.mul_(1.3)
    path = tmp_path_factory.mktemp("run") / "checkpoint-60-0"
    transformer.save_pretrained(path)
    return str(path)


def test_without_hybrid_the_pictures_are_diffusers_own_for_the_seeds_in_the_manifest(tmp_path):
    manifest = main(flags(tmp_path, "out"))
    entries = json.loads(manifest.read_text(encoding="utf-8"))
    assert [entry["prompt"] for entry in entries] == PROMPTS and [entry["index"] for entry in entries] == [0, 1, 2, 3]
    assert all(set(entry) == {"image", "prompt", "seed", "index"} for entry in entries)
    pipe = FluxPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    for entry in entries:
        generator = torch.Generator("cpu").manual_seed(entry["seed"])
        settings = {
            "height": 32,
            "width": 32,
            "num_inference_steps": 4,
            "guidance_scale": 3.5,
            "max_sequence_length": 16,
        }
        expected = pipe(entry["prompt"], generator=generator, **settings).images[0]
        with Image.open(manifest.parent / entry["image"]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(expected))
            assert image.text["prompt"] == entry["prompt"]


def test_batch_size_does_not_change_the_pictures(tmp_path):
    one, three = (main(flags(tmp_path, f"b{n}", "--batch_size", n, "--images_per_prompt", 2)) for n in (1, 3))
    assert len(pixels(one)) == 8
    assert largest_difference(one, three) <= 1


def test_seeds_prompts_and_repeats_have_their_own_noise(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0]] * 2))
    settings = ("--images_per_prompt", 2, "--total_sampling_steps", 2)
    manifests = [main(flags(tmp_path, f"s{seed}", "--seed", seed, *settings)) for seed in (0, 1)]
    seeds = [entry["seed"] for manifest in manifests for entry in json.loads(manifest.read_text())]
    pictures = {picture.tobytes() for manifest in manifests for picture in pixels(manifest)}
    assert len(set(seeds)) == len(pictures) == 8


def test_hybrid_inference_lies_between_the_models_and_meets_them_at_its_ends(tmp_path, tuned):
    base = main(flags(tmp_path, "base", "--baseline", "--model_path", tuned))
    alone = main(flags(tmp_path, "tuned", "--model_path", tuned))
    never, half, always = (
        main(flags(tmp_path, f"mix{n}", "--model_path", tuned, "--mix_sampling_steps", n, "--batch_size", 4))
        for n in (0, 2, 4)
    )
    assert largest_difference(never, base) <= 1
    assert largest_difference(always, alone) <= 1
    assert (
        largest_difference(half, base) > 3
        and largest_difference(half, alone) > 3
        and largest_difference(base, alone) > 3
    )


def test_hybrid_inference_runs_the_tuned_model_first_in_every_batch(tmp_path, tuned, monkeypatch):
    calls = []
    load = sample_flux.load_transformer

    def recorded(path, dtype):
        transformer = load(path, dtype)
        transformer.register_forward_pre_hook(lambda *_: calls.append("tuned" if path == tuned else "base"))
        return transformer

    monkeypatch.setattr(sample_flux, "load_transformer", recorded)
    main(flags(tmp_path, "out", "--model_path", tuned, "--mix_sampling_steps", 3, "--batch_size", 2))
    assert calls == ["tuned", "tuned", "tuned", "base"] * 2


def test_a_restart_makes_only_what_is_missing_or_damaged(tmp_path, capsys, monkeypatch):
    command = flags(tmp_path, "out", "--batch_size", 3)
    manifest = main(command)
    before = {path.name: path.read_bytes() for path in manifest.parent.iterdir()}
    (manifest.parent / "00000_0.png").unlink()
    truncated = manifest.parent / "00003_0.png"
    truncated.write_bytes(truncated.read_bytes()[:-60])
    (manifest.parent / "00002_0.png").write_bytes(before["00001_0.png"])  # a picture of another prompt
    capsys.readouterr()
    main(command)
    assert "3 pictures sampled, 1 were there" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in manifest.parent.iterdir()} == before

    monkeypatch.setattr(sample_flux, "HybridPipeline", None)  # nothing to do: nothing may be loaded
    main(command)


def test_an_edited_prompt_file_resamples_the_changed_prompts(tmp_path, capsys):
    main(flags(tmp_path, "out"))
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], "new", *PROMPTS[2:]]), encoding="utf-8")
    capsys.readouterr()
    manifest = main(flags(tmp_path, "out"))
    assert "1 pictures sampled, 3 were there" in capsys.readouterr().out
    assert json.loads(manifest.read_text())[1]["prompt"] == "new"


def test_other_settings_in_the_same_folder_are_refused_and_overwrite_replaces_them(tmp_path, tuned, capsys):
    manifest = main(flags(tmp_path, "out"))
    before = pixels(manifest)
    with pytest.raises(
        ValueError, match=r"--output_dir .*other settings: guidance_scale \(3.5 there, 2.0 now\); choose"
    ):
        main(flags(tmp_path, "out", "--guidance_scale", 2))
    with pytest.raises(ValueError, match="other settings: tuned_model"):
        main(flags(tmp_path, "out", "--model_path", tuned))
    assert all(map(np.array_equal, pixels(manifest), before))
    capsys.readouterr()
    main(flags(tmp_path, "out", "--model_path", tuned, "--overwrite"))
    assert "4 pictures sampled, 0 were there" in capsys.readouterr().out
    main(flags(tmp_path, "out", "--model_path", tuned))
    assert "0 pictures sampled, 4 were there" in capsys.readouterr().out


def test_a_retrained_model_at_the_same_path_is_noticed(tmp_path, tuned):
    path = tmp_path / "checkpoint-60-0"
    shutil.copytree(tuned, path)
    main(flags(tmp_path, "out", "--model_path", path))
    transformer = load_transformer(str(path))
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.01)
    transformer.save_pretrained(path)
    with pytest.raises(ValueError, match="other settings: tuned_model"):
        main(flags(tmp_path, "out", "--model_path", path))


def test_a_static_shift_replaces_the_scheduler_of_the_model(tmp_path):
    own, same, other = (
        main(flags(tmp_path, f"s{n}", *more)) for n, more in enumerate([(), ("--shift", 3), ("--shift", 1)])
    )
    assert largest_difference(own, same) == 0  # the tiny model's own shift is 3
    assert largest_difference(own, other) > 3


def test_the_manifest_names_pictures_relative_to_itself(tmp_path):
    manifest = main(flags(tmp_path, "out", "--output_json", tmp_path / "lists" / "m.json"))
    assert manifest == tmp_path / "lists" / "m.json"
    assert json.loads(manifest.read_text())[0]["image"] == "../out/00000_0.png"


def test_two_processes_give_the_same_pictures_and_manifest_as_one(tmp_path):
    one = main(flags(tmp_path, "one"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "fastvideo.sample.sample_flux", *flags(tmp_path, "two")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120)
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one.parent, tmp_path / "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--h", 33), "--h 33 --w 32: height and width must be multiples of 8"),
        (("--model_path", "/nowhere/checkpoint-1-0"), "--model_path /nowhere/checkpoint-1-0: no such folder"),
        (("--model_path", str(ROOT / "docs")), "--model_path .*docs: no folder transformer/ in it"),
        (
            ("--pretrained_model_name_or_path", "/nowhere/flux"),
            "--pretrained_model_name_or_path /nowhere/flux: no such",
        ),
        (("--prompts_file", "/nowhere/p.txt"), "--prompts_file /nowhere/p.txt: No such file"),
    ],
)
def test_bad_input_gives_one_line_before_sampling(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(flags(tmp_path, "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix_sampling_steps": 51, "model_path": "x"}, "--mix_sampling_steps 51: must be between 0 and"),
        ({"mix_sampling_steps": 10}, "--mix_sampling_steps: needs --model_path"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"seed": -1}, "--seed -1"),
        ({"shift": 0.0}, "--shift 0.0"),
        ({"dtype": "int8"}, "--dtype int8: choose from auto"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sample(SampleConfig(**settings))
