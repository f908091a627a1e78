"""Output that can't be written is one line with status 2, before the slow part; a disk that fills up leaves no part."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

from fastvideo.data_preprocess import preprocess_flux_embedding
from fastvideo.eval import eval_reward, report
from fastvideo.io import files
from fastvideo.models import merge_lora
from fastvideo.sample import sample_flux

import make_tiny_flux
import pytest
import torch
from conftest import TINY
from diffusers import FluxTransformer2DModel
from PIL import Image
from test_window_spread import window_spread


@pytest.fixture
def commands(tmp_path, tiny_flux, prompts_file) -> dict[str, tuple[Callable, str, str]]:
    """{name: (command with an output to append, its flag, name of a file or folder as output)}."""
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "manifest.json").write_text(json.dumps([{"image": "0.png", "prompt": "a red circle"}]))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    (tmp_path / "run/args.json").write_text("{}")
    short = ["--baseline", "--total_sampling_steps", "2"]
    small = ["--pretrained_model_name_or_path", tiny_flux, "--h", "32", "--w", "32"]
    texts = ["--prompts_file", str(prompts_file)]
    lines = {
        "sampling": (sample_flux.main, "output_dir", "s", [*small, *texts, *short]),
        "evaluation": (
            eval_reward.main, "output_json", "x.json",
            ["--manifest", str(tmp_path / "manifest.json"), "--reward_model_type", "jpeg_compressibility"],
        ),
        "report": (report.main, "output_dir", "r", ["--run_dir", str(tmp_path / "run")]),
        "schedules": (report.main, "schedules", "s.png", []),
        "preprocessing": (
            preprocess_flux_embedding.main, "output_dir", "e",
            ["--model_path", tiny_flux, "--prompt_dir", str(prompts_file)],
        ),
        "spread": (
            window_spread.main, "output", "w.png",
            [*small, *texts, "--sampling_steps", "6", "--windows", "0", "--samples", "2", "--prompts", "1"],
        ),
        "prompts": (make_tiny_flux.main, "prompts", "p", []),
        "tiny_flux": (make_tiny_flux.main, "output_dir", "t", ["--device", "cpu"]),
    }  # fmt: skip
    return {
        name: (lambda output, main=main, argv=argv, flag=flag: main([*argv, f"--{flag}", str(output)]), flag, end)
        for name, (main, flag, end, argv) in lines.items()
    }


NAMES = ["sampling", "evaluation", "report", "schedules", "preprocessing", "spread", "prompts", "tiny_flux"]


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_cannot_be_written_is_refused_before_the_slow_part(
    commands, tmp_path, refused, monkeypatch, name
):
    def slow(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", slow)
    monkeypatch.setattr(make_tiny_flux, "make_pipeline", slow)
    run, flag, end = commands[name]
    (tmp_path / "file").write_text("")
    for place in (Path("/proc/none"), tmp_path / "file"):  # nobody may write there; a file where a folder is wanted
        with refused(f"--{flag} {place / end}: "):
            run(place / end)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tiny_flux"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_no_part_of_a_file(commands, tmp_path, refused, monkeypatch, name):
    synced = []

    def full(number: int) -> None:
        synced.append(number)
        if len(synced) > 1:  # the first is the check before the work
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", full)
    run, flag, end = commands[name]
    with refused(f"--{flag} {tmp_path}/out/{end}: can't be written: No space left on device"):
        run(tmp_path / "out" / end)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".tmp", ".pt", ".png")
                and path.parent != tmp_path]  # fmt: skip


def test_a_merge_that_cannot_be_written_leaves_nothing_and_its_files_have_the_usual_mode(
    train, tmp_path, tiny_flux, refused, monkeypatch
):
    lora = train(use_lora=True, lora_rank=2, max_train_steps=1).checkpoints[-1]
    argv = ["--model_path", str(lora), "--output_dir"]
    (tmp_path / "file").write_text("")
    for place in ("/proc/none", tmp_path / "file"):
        with refused(f"--output_dir {place}: "):
            merge_lora.main([*argv, str(place)])
    merge_lora.main([*argv, str(tmp_path / "merged")])
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert modes == {(tmp_path / "file").stat().st_mode & 0o777}

    def full(path: Path, *_) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(merge_lora, "write_weights", full)
    before = sorted(tmp_path.iterdir())
    with refused(f"--output_dir {tmp_path}/full: can't be written"):
        merge_lora.main([*argv, str(tmp_path / "full")])
    assert sorted(tmp_path.iterdir()) == before


def test_a_device_that_is_not_here_is_refused(refused, tmp_path):
    assert not torch.cuda.is_available() or torch.cuda.device_count() < 9
    argv = ["--pretrained_model_name_or_path", str(TINY), "--baseline", "--h", "32", "--w", "32"]
    argv += ["--output_dir", str(tmp_path / "s"), "--device"]
    for device in ("cuda:9", "gpu", "-1", "cuda:x"):
        with refused(f"--device {device}: choose from auto, cpu"):
            sample_flux.main([*argv, device])
