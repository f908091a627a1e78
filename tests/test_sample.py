"""Sampling: noise depends on the prompt only; all kinds of models, hybrid inference, restarts, processes, layouts."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from fastvideo.cli import parse_dataclass
from fastvideo.io.devices import torch_dtype
from fastvideo.io.files import write_bytes
from fastvideo.io.processes import Processes, processes
from fastvideo.models import merge_lora
from fastvideo.models.lora import LORA_FILE
from fastvideo.models.pretrained import load_transformer
from fastvideo.sample import sample_flux
from fastvideo.sample.sample_flux import SampleConfig, main

import numpy as np
import pytest
import torch
from conftest import TIME_LIMIT
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save_file
from test_checkpoints import wait_for

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "data/tiny_flux")
PROMPTS = [
    "a red circle left of a blue square on a black background",
    'a "quoted" / slashed\\ <b>prompt</b> & more',
    "🙂 emoji, ünïcödé",
    "a green square above a yellow triangle on a white background, " * 32 + "2,000 characters",
]


def command(folder: Path, name: str, *more: object) -> list[str]:
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
    base = [] if "--model_path" in more else ["--baseline"]
    return [str(x) for pair in ((f"--{k}", v) for k, v in fixed.items()) for x in pair] + base + [str(x) for x in more]


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


def diffusers_picture(pipe: FluxPipeline, entry: dict, **more: object) -> np.ndarray:
    """FluxPipeline's own picture for an entry's prompt and seed."""
    settings = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.5}
    settings["max_sequence_length"] = pipe.tokenizer_2.model_max_length
    generator = torch.Generator("cpu").manual_seed(entry["seed"])
    return np.asarray(pipe(entry["prompt"], generator=generator, **settings, **more).images[0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_hybrid_the_pictures_are_diffusers_own_for_the_seeds_in_the_manifest(tmp_path, dtype):
    manifest = main(command(tmp_path, "out", "--dtype", dtype))
    entries = json.loads(manifest.read_text(encoding="utf-8"))
    assert [entry["prompt"] for entry in entries] == PROMPTS and [entry["index"] for entry in entries] == [0, 1, 2, 3]
    assert all(set(entry) == {"image", "prompt", "seed", "index"} for entry in entries)
    pipe = FluxPipeline.from_pretrained(TINY, dtype=torch_dtype(dtype))
    for entry in entries:
        with Image.open(manifest.parent / entry["image"]) as image:
            assert np.array_equal(np.asarray(image), diffusers_picture(pipe, entry))
            assert image.text["prompt"] == entry["prompt"]


def test_defaults_are_the_papers_and_flags_of_the_reference_work():
    config = SampleConfig(model_path="x")
    size = (config.h, config.w, config.total_sampling_steps, config.guidance_scale, config.max_sequence_length)
    assert size == (1024, 1024, 50, None, 512)  # None: 3.5 for FLUX.1, see test_flux2.py
    for none in ("-1", "0"):
        argv = ["--flux_baseline_model_dir", "here", "--mix_sampling_steps", none, "--model_path", "x"]
        reference = parse_dataclass(SampleConfig, argv)
        assert (reference.pretrained_model_name_or_path, reference.tuned_steps) == ("here", 50)


@pytest.mark.parametrize(
    ("settings", "models"),
    [
        ({"model_path": "run/best"}, ["50 steps of run/best"]),
        ({"model_path": "run/best", "mix_sampling_steps": 30}, ["30 steps of run/best, then 20 steps of base model B"]),
        ({"model_path": "run/best", "mix_fraction": [0.0, 1.0]}, ["50 steps of base model B", "50 steps of run/best"]),
        ({"model_path": "run/best", "baseline": True}, ["50 steps of base model B"]),
    ],
)
def test_a_run_says_which_model_takes_which_steps(settings, models):
    config = SampleConfig(pretrained_model_name_or_path="B", **settings)
    assert [run.models for run in config.runs()] == models


def test_the_script_samples_the_published_weights_if_they_are_there_and_else_only_a_named_model(tmp_path):
    """As in MixGRPO's README: weights in mix_grpo_ckpt/, then the script without a flag."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    cleared = {k: v for k, v in os.environ.items() if k not in ("HOSTFILE", "MODEL_PATH", "NPROC_PER_NODE")}

    def passed(*flags: str, **environment: str) -> SampleConfig:
        script = ["bash", str(tmp_path / "scripts/inference/inference_flux.sh"), *flags]
        given = {**cleared, "PYTHON_BIN": str(python), **environment}
        words = subprocess.run(script, env=given, check=True, capture_output=True, text=True).stdout.split()
        return parse_dataclass(SampleConfig, words[2:])

    assert passed("--baseline").tuned_steps == 0
    with pytest.raises(SystemExit):
        passed()
    published = tmp_path / "mix_grpo_ckpt/diffusion_pytorch_model.safetensors"
    published.parent.mkdir()
    published.touch()
    assert passed().model_path == "mix_grpo_ckpt/diffusion_pytorch_model.safetensors" and passed().tuned_steps == 50
    assert passed("--mix_sampling_steps", "30", "--seed", "617").tuned_steps == 30
    assert passed("--baseline").tuned_steps == 0
    assert passed("--model_path", "a").model_path == passed(MODEL_PATH="a").model_path == "a"


def test_every_way_to_name_a_tuned_model_gives_its_pictures(tmp_path, tuned, refused):
    expected = main(command(tmp_path, "folder", "--model_path", tuned))
    pipeline, checkpoint, bare = tmp_path / "pipeline", tmp_path / "checkpoint-1-0", tmp_path / "mix_grpo_ckpt"
    shutil.copytree(TINY, pipeline)
    shutil.copytree(tuned, pipeline / "transformer", dirs_exist_ok=True)
    shutil.copytree(tuned, checkpoint / "ema")
    bare.mkdir()
    weights = shutil.copy(
        Path(tuned) / "diffusion_pytorch_model.safetensors", bare
    )  # without config.json, as published
    for number, path in enumerate((pipeline, checkpoint / "ema", bare, weights)):
        manifest = main(command(tmp_path, f"out{number}", "--model_path", path))
        assert largest_difference(manifest, expected) == 0, path
    assert largest_difference(main(command(tmp_path, "base", "--model_path", TINY)), expected) > 3
    save_file({"a": torch.zeros(1)}, weights)
    with refused(r"--model_path .*model.safetensors: wrong weights in .*: .* is missing, a is unknown"):
        main(command(tmp_path, "wrong", "--model_path", weights))


def test_checkpoints_of_a_run_and_their_averages_are_sampled_as_diffusers_does(tmp_path, train, capsys, random_flux):
    """Without a base model, with the one that the checkpoint was trained from. Another one is named in a warning."""
    given = {"learning_rate": 3e-2, "ema_decay": 0.5, "max_train_steps": 1}
    lora = train(use_lora=True, lora_rank=4, lora_alpha=8, **given).checkpoints[-1]
    whole = train(**{**given, "learning_rate": 1e-3}).checkpoints[-1]
    found = []
    for number, path in enumerate((whole, whole / "ema", lora, lora / "ema", lora / LORA_FILE)):
        unnamed = ("--pretrained_model_name_or_path", "None") if number % 2 else ()
        manifest = main(command(tmp_path, f"out{number}", "--model_path", path, *unnamed))
        note = f"note: --pretrained_model_name_or_path is {TINY}, the base model of {whole if number < 2 else lora}"
        said = capsys.readouterr().err
        assert (note in said) == bool(unnamed) and "another base model" not in said
        pipe = FluxPipeline.from_pretrained(TINY, dtype=torch.float32)
        if number < 2:
            pipe.transformer = FluxTransformer2DModel.from_pretrained(path)
        else:
            pipe.load_lora_weights(path)
        (first, *_) = json.loads(manifest.read_text())
        assert np.abs(pixels(manifest)[0] - diffusers_picture(pipe, first)).max() <= 1, path
        found.append(pixels(manifest)[0].tobytes())
    assert len(set(found[:4])) == 4 and found[4] == found[2]
    main(command(tmp_path, "other", "--model_path", lora / "ema", "--pretrained_model_name_or_path", random_flux))
    assert (
        f"warning: --model_path {lora}: was trained from another base model ({TINY}) than "
        f"--pretrained_model_name_or_path {random_flux}\n" in capsys.readouterr().err
    )


@pytest.fixture
def pipelines(monkeypatch) -> list[sample_flux.HybridPipeline]:
    """The pipelines that were loaded."""
    found, load = [], sample_flux.HybridPipeline

    def recorded(*args):
        found.append(load(*args))
        return found[-1]

    monkeypatch.setattr(sample_flux, "HybridPipeline", recorded)
    return found


def test_hybrid_inference_with_adapters_holds_one_model_and_switches_them_off(tmp_path, train, pipelines):
    adapters = train(use_lora=True, lora_rank=4, learning_rate=3e-2, max_train_steps=1).checkpoints[-1]
    given = ("--model_path", adapters, "--mix_fraction")
    base, quarter, tuned = (main(command(tmp_path, f"f{f}", *given, f)) for f in (0, 0.25, 1))
    merged = [p for p in pipelines if p.tuned is not None]
    assert len(merged) == 2 and all(p.base is p.tuned is p.pipe.transformer for p in merged)
    assert largest_difference(base, main(command(tmp_path, "base"))) == 0
    assert min(largest_difference(quarter, base), largest_difference(quarter, tuned)) > 1

    pipe = FluxPipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.load_lora_weights(adapters)

    def after_step(pipe, step, _timestep, tensors):
        if step == 0:
            pipe.disable_lora()
        return tensors

    (first, *_) = json.loads(quarter.read_text())
    assert np.abs(pixels(quarter)[0] - diffusers_picture(pipe, first, callback_on_step_end=after_step)).max() <= 1
    sweep = main(command(tmp_path, "sweep", *given, "0.25,0,1"))  # each has the adapters
    for steps, expected in ((1, quarter), (0, base), (4, tuned)):
        assert largest_difference(sweep.parent / f"mix_{steps}_4/manifest.json", expected) == 0


def test_batch_size_does_not_change_the_pictures(tmp_path):
    one, three = (main(command(tmp_path, f"b{n}", "--batch_size", n, "--images_per_prompt", 2)) for n in (1, 3))
    assert len(pixels(one)) == 8
    assert largest_difference(one, three) <= 1


def test_seeds_prompts_and_repeats_have_their_own_noise(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0]] * 2))
    settings = ("--images_per_prompt", 2, "--total_sampling_steps", 2)
    manifests = [main(command(tmp_path, f"s{seed}", "--seed", seed, *settings)) for seed in (0, 1)]
    seeds = [entry["seed"] for manifest in manifests for entry in json.loads(manifest.read_text())]
    pictures = {picture.tobytes() for manifest in manifests for picture in pixels(manifest)}
    assert len(set(seeds)) == len(pictures) == 8


def test_hybrid_inference_lies_between_the_models_and_meets_them_at_its_ends(tmp_path, tuned):
    base = main(command(tmp_path, "base", "--baseline", "--model_path", tuned))
    alone = main(command(tmp_path, "tuned", "--model_path", tuned))
    never, half, always = (
        main(command(tmp_path, f"mix{n}", "--model_path", tuned, "--mix_fraction", n, "--batch_size", 4))
        for n in (0, 0.5, 1)
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

    def recorded(path, dtype, field="pretrained_model_name_or_path"):
        transformer = load(path, dtype, field)
        transformer.register_forward_pre_hook(lambda *_: calls.append("tuned" if path == tuned else "base"))
        return transformer

    monkeypatch.setattr(sample_flux, "load_transformer", recorded)
    main(command(tmp_path, "out", "--model_path", tuned, "--mix_sampling_steps", 3, "--batch_size", 2))
    assert calls == ["tuned", "tuned", "tuned", "base"] * 2


def test_a_sweep_over_shares_loads_once_and_gives_the_pictures_of_single_runs(tmp_path, tuned, monkeypatch):
    loaded = []
    load = sample_flux.load_transformer
    monkeypatch.setattr(
        sample_flux, "load_transformer", lambda *args, **more: loaded.append(args) or load(*args, **more)
    )
    sweep = main(command(tmp_path, "sweep", "--model_path", tuned, "--mix_fraction", "0,0.5,1"))
    assert len(loaded) == 2  # base and tuned
    rows = json.loads(sweep.read_text())
    assert [(row["mix_fraction"], row["mix_sampling_steps"]) for row in rows] == [(0, 0), (0.5, 2), (1, 4)]
    assert [row["manifest"] for row in rows] == [f"mix_{n}_4/manifest.json" for n in (0, 2, 4)]
    for row in rows:
        steps, share = row["mix_sampling_steps"], row["mix_fraction"]
        single = main(command(tmp_path, f"one{steps}", "--model_path", tuned, "--mix_fraction", share))
        assert largest_difference(sweep.parent / row["manifest"], single) == 0
    again = main(command(tmp_path, "sweep", "--model_path", tuned, "--mix_fraction", "0.5"))  # has its own folder
    assert again == sweep.parent / "manifest.json"


def test_offloading_changes_no_picture_and_leaves_nothing_behind(tmp_path, tuned, monkeypatch, pipelines):
    """Only a GPU shows the effect. This test checks the call of diffusers, and that the base model gets its memory."""
    hybrid = ("--model_path", tuned, "--mix_fraction", "0,0.5")
    expected = main(command(tmp_path, "none", *hybrid))
    asked = []

    def record(kind: type, name: str) -> None:
        call = getattr(kind, name)

        def recorded(self, *args, **more):
            asked.append((name, self))
            return call(self, *args, **more)

        monkeypatch.setattr(kind, name, recorded)

    record(FluxPipeline, "enable_model_cpu_offload")
    record(FluxPipeline, "enable_group_offload")
    record(FluxTransformer2DModel, "enable_group_offload")
    for how, name in (("model", "enable_model_cpu_offload"), ("sequential", "enable_group_offload")):
        sweep = main(command(tmp_path, how, *hybrid, "--cpu_offload", how))
        for steps in (0, 2):
            manifest = f"mix_{steps}_4/manifest.json"
            assert largest_difference(sweep.parent / manifest, expected.parent / manifest) == 0
        assert (name, pipelines[-1].pipe) in asked
    _, by_model, by_layer = pipelines
    assert by_model.base_hook.hook.prev_module_hook.model is by_model.pipe.text_encoder_2
    assert ("enable_group_offload", by_layer.base) in asked


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloading_on_a_gpu_leaves_the_base_model_alone_there(tmp_path, tuned, monkeypatch, pipelines):
    load, found = sample_flux.load_transformer, set()

    def recorded(path, dtype, field="pretrained_model_name_or_path"):
        transformer = load(path, dtype, field)
        if path == TINY:
            transformer.register_forward_hook(lambda *_: found.add(where()))
        return transformer

    def where() -> tuple[str, ...]:
        hybrid = pipelines[-1]
        parts = (hybrid.pipe.text_encoder, hybrid.pipe.text_encoder_2, hybrid.tuned, hybrid.base)
        return tuple(next(part.parameters()).device.type for part in parts)

    monkeypatch.setattr(sample_flux, "load_transformer", recorded)
    hybrid = ("--model_path", tuned, "--mix_fraction", "0,0.5", "--cpu_offload", "model", "--device", "cuda")
    main(command(tmp_path, "out", *hybrid))
    assert found == {("cpu", "cpu", "cpu", "cuda")}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloading_on_a_gpu_keeps_less_memory_there(tmp_path, tuned, how):
    hybrid = ("--model_path", tuned, "--mix_fraction", "0.5", "--device", "cuda", "--dtype", "fp32")
    peaks, manifests = [], []
    for name in ("none", how):
        gc.collect()  # frees the memory of the previous run
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        manifests.append(main(command(tmp_path, name, *hybrid, "--cpu_offload", name)))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0]
    assert largest_difference(*manifests) <= 1


@pytest.mark.long  # a minute of compilation on a CPU
def test_compiled_blocks_draw_the_same_pictures(tmp_path, tuned):
    hybrid = ("--model_path", tuned, "--mix_fraction", "0.5")
    plain, compiled = (main(command(tmp_path, f"c{n}", *hybrid, *more)) for n, more in enumerate([(), ("--compile",)]))
    assert largest_difference(plain, compiled) <= 1


def test_the_benchmark_layout_and_its_jpeg_files(tmp_path, capsys, refused):
    prompts = tmp_path / "benchmark"
    prompts.mkdir()
    for style, texts in {"anime": PROMPTS[:2], "photo": PROMPTS[1:3]}.items():
        (prompts / f"{style}.json").write_text(json.dumps(texts))
    argv = command(tmp_path, "out", "--prompts_file", prompts, "--image_format", "jpg")
    manifest = main(argv)
    entries = json.loads(manifest.read_text())
    assert [entry["image"] for entry in entries] == [f"{s}/0000{i}.jpg" for s in ("anime", "photo") for i in (0, 1)]
    assert [(entry["style"], entry["index"]) for entry in entries][1:3] == [("anime", 1), ("photo", 2)]
    assert entries[1]["prompt"] == entries[2]["prompt"] and entries[1]["seed"] != entries[2]["seed"]
    damaged = manifest.parent / "photo/00000.jpg"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-80])
    capsys.readouterr()
    main(argv)
    assert "1 sampled, 3 were there" in capsys.readouterr().out
    assert damaged.read_bytes() == before
    with refused("--prompts_file .*docs: no data set that"):
        main(command(tmp_path, "none", "--prompts_file", ROOT / "docs"))


def test_prompts_longer_than_the_model_takes_are_named(tmp_path, warned):
    path = tmp_path / "long.txt"
    path.write_text("a red circle\n" + "a red circle and " * 6, encoding="utf-8")
    with warned("takes 14 tokens of a prompt and doesn't see what follows in 1 prompt; .*'a red circle"):
        main(command(tmp_path, "out", "--prompts_file", path))


def test_a_restart_makes_only_what_is_missing_or_damaged(tmp_path, capsys, monkeypatch):
    argv = command(tmp_path, "out", "--batch_size", 3)
    manifest = main(argv)
    before = {path.name: path.read_bytes() for path in manifest.parent.iterdir()}
    (manifest.parent / "00000_0.png").unlink()
    truncated = manifest.parent / "00003_0.png"
    truncated.write_bytes(truncated.read_bytes()[:-60])
    (manifest.parent / "00002_0.png").write_bytes(before["00001_0.png"])  # a picture of another prompt
    capsys.readouterr()
    main(argv)
    assert "3 sampled, 1 were there" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in manifest.parent.iterdir()} == before

    monkeypatch.setattr(sample_flux, "HybridPipeline", None)  # nothing to do: nothing may be loaded
    main(argv)


def write_prompts(folder: Path, *prompts: str) -> None:
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")


def test_prompts_may_be_added_but_other_ones_in_the_same_folder_are_refused(tmp_path, capsys, refused):
    manifest = main(command(tmp_path, "out"))
    before = pixels(manifest)
    write_prompts(tmp_path, PROMPTS[0], "new", *PROMPTS[2:])
    with refused("--output_dir .*of other prompts: 00001_0.png; choose another folder"):
        main(command(tmp_path, "out"))
    write_prompts(tmp_path, *PROMPTS, "fifth")
    capsys.readouterr()
    main(command(tmp_path, "out"))
    assert "1 sampled, 4 were there" in capsys.readouterr().out
    write_prompts(tmp_path, *PROMPTS, "another fifth")
    with refused("--output_dir .*other prompts: 00004_0.png"):
        main(command(tmp_path, "out"))
    assert all(map(np.array_equal, pixels(manifest), [*before, pixels(manifest)[4]]))

    write_prompts(tmp_path, PROMPTS[0], "new", *PROMPTS[2:])
    capsys.readouterr()
    main(command(tmp_path, "out", "--overwrite"))
    assert "1 sampled, 3 were there" in capsys.readouterr().out
    assert json.loads(manifest.read_text())[1]["prompt"] == "new"
    main(command(tmp_path, "out"))


def test_no_manifest_names_pictures_that_an_unfinished_run_overwrote(tmp_path, tuned, monkeypatch):
    manifest = main(command(tmp_path, "out"))
    elsewhere = main(command(tmp_path, "out", "--output_json", tmp_path / "m.json"))
    keep, saved = sample_flux.Pictures.keep, []

    def stopped(*given):
        if saved:
            raise KeyboardInterrupt
        saved.append(keep(*given))

    monkeypatch.setattr(sample_flux.Pictures, "keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(command(tmp_path, "out", "--model_path", tuned, "--overwrite", "--output_json", elsewhere))
    assert saved and not manifest.exists() and not elsewhere.exists()


def test_other_settings_in_the_same_folder_are_refused_and_overwrite_replaces_them(tmp_path, tuned, capsys, refused):
    manifest = main(command(tmp_path, "out"))
    before = pixels(manifest)
    with refused(r"--output_dir .*other settings: guidance_scale \(3.5 there, 2.0 now\); choose"):
        main(command(tmp_path, "out", "--guidance_scale", 2))
    with refused("--output_dir .*other settings: tuned_model"):
        main(command(tmp_path, "out", "--model_path", tuned))
    assert all(map(np.array_equal, pixels(manifest), before))
    capsys.readouterr()
    main(command(tmp_path, "out", "--model_path", tuned, "--overwrite"))
    assert "4 sampled, 0 were there" in capsys.readouterr().out
    main(command(tmp_path, "out", "--model_path", tuned))
    assert "0 sampled, 4 were there" in capsys.readouterr().out


def claim(folder: Path, claimed: tuple[int, str], start: multiprocessing.Event, answers: multiprocessing.Queue) -> None:
    """claimed: number of steps in the settings, and the last prompt."""
    (steps, prompt), place = claimed, Processes(0, 1, "cpu")
    config = SampleConfig(output_dir=str(folder), baseline=True)
    pictures = sample_flux.plan_pictures(config, [("first", None, {}), (prompt, None, {})])
    start.wait()
    try:
        sample_flux.claim_folder(config, {"steps": steps}, pictures, place)
        answers.put(claimed)
    except ValueError as error:
        answers.put(str(error))


@pytest.mark.parametrize(
    ("claims", "before", "names", "message"),
    [
        ([(1, "a"), (2, "a")], [], ["sampling.json"], "holds pictures of other settings: steps"),
        ([(1, "a"), (1, "b")], [], ["sampling.json"], "holds pictures of other prompts: 00001_0.png"),
        ([(1, "a"), (1, "b")], ["first"], ["sampling.1.json", "sampling.json"], "of other prompts: 00001_0.png"),
    ],
)
def test_of_two_runs_that_claim_a_folder_at_once_with_other_pictures_one_is_refused(
    tmp_path, claims, before, names, message
):
    if before:  # both runs add pictures to a claimed folder
        config = SampleConfig(output_dir=str(tmp_path), baseline=True)
        pictures = sample_flux.plan_pictures(config, [(prompt, None, {}) for prompt in before])
        sample_flux.claim_folder(config, {"steps": 1}, pictures, Processes(0, 1, "cpu"))
    fork = multiprocessing.get_context("fork")
    start, answers = fork.Event(), fork.Queue()
    rivals = [fork.Process(target=claim, args=(tmp_path, claimed, start, answers)) for claimed in claims * 2]
    for rival in rivals:
        rival.start()
    start.set()
    found = [answers.get(timeout=TIME_LIMIT) for _ in rivals]
    for rival in rivals:
        rival.join()
    winners = [answer for answer in found if isinstance(answer, tuple)]
    assert len(winners) == 2 and len(set(winners)) == 1
    assert all(message in answer for answer in found if isinstance(answer, str))
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_machines_that_write_one_file_at_once_with_equal_process_numbers_do_not_meet(tmp_path, monkeypatch):
    """Containers on several machines often number their processes alike."""
    sync, path = os.fsync, tmp_path / "file"

    def meanwhile(number: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(socket, "gethostname", lambda: "elsewhere")
            write_bytes(path, b"other")
        assert path.read_bytes() == b"other"
        sync(number)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_bytes(path, b"this one")
    assert path.read_bytes() == b"this one" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("device", "expected"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_every_process_has_the_gpu_of_its_number_unless_one_is_named(monkeypatch, device, expected):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with processes(device) as here:
        assert here.device == expected


def test_a_retrained_model_at_the_same_path_is_noticed(tmp_path, tuned, refused):
    path = tmp_path / "checkpoint-60-0"
    shutil.copytree(tuned, path)
    main(command(tmp_path, "out", "--model_path", path))
    transformer = load_transformer(str(path))
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.01)
    transformer.save_pretrained(path)
    with refused("--output_dir .*other settings: tuned_model"):
        main(command(tmp_path, "out", "--model_path", path))


def test_a_static_shift_replaces_the_scheduler_of_the_model(tmp_path):
    own, same, other = (
        main(command(tmp_path, f"s{n}", *more)) for n, more in enumerate([(), ("--shift", 3), ("--shift", 1)])
    )
    assert largest_difference(own, same) == 0  # the tiny model's own shift is 3
    assert largest_difference(own, other) > 3


def test_the_manifest_names_pictures_relative_to_itself(tmp_path):
    manifest = main(command(tmp_path, "out", "--output_json", tmp_path / "lists" / "m.json"))
    assert manifest == tmp_path / "lists" / "m.json"
    assert json.loads(manifest.read_text())[0]["image"] == "../out/00000_0.png"


@pytest.mark.long
def test_a_killed_run_finished_by_two_runs_at_once_leaves_the_files_of_an_uninterrupted_one(tmp_path, tuned):
    """One process is killed; then the recipe runs on two processes, with the reference's flags, beside this one."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS * 10), encoding="utf-8")
    mix = ("--mix_sampling_steps", 2, "--total_sampling_steps", 4, "--seed", 617)
    weights = Path(tuned) / "diffusion_pytorch_model.safetensors"
    argv = command(tmp_path, "out", "--batch_size", 3, "--model_path", weights, *mix)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_BIN": sys.executable}
    folder, log = tmp_path / "out", tmp_path / "killed.log"
    with open(log, "w") as file:
        alone = [sys.executable, "-m", "fastvideo.sample.sample_flux", *argv]
        killed = subprocess.Popen(alone, cwd=ROOT, env=environment, stdout=file, stderr=file)
    wait_for(lambda: len(list(folder.glob("*.png"))) >= 3, killed, log)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (folder / "manifest.json").exists()

    names = {"pretrained_model_name_or_path": "flux_baseline_model_dir"}
    reference = [names.get(token[2:], token[2:]).join(("--", "")) if token[:2] == "--" else token for token in argv]
    recipe = subprocess.Popen(
        ["bash", "scripts/inference/inference_flux.sh", *reference],
        cwd=ROOT,
        env={**environment, "NPROC_PER_NODE": "2"},
    )
    wait_for(lambda: len(list(folder.glob("*.png"))) >= 10, recipe, log)
    main(argv)
    assert recipe.wait(TIME_LIMIT) == 0

    expected = main([*argv, "--output_dir", str(tmp_path / "uninterrupted")])
    files = [{p.name: p.read_bytes() for p in f.glob("[!.]*")} for f in (expected.parent, folder)]
    assert len(files[0]) == 42 and files[0] == files[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--h", 33), "--h 33: must be a multiple of 8"),
        (("--model_path", "/nowhere/checkpoint-1-0"), "--model_path /nowhere/checkpoint-1-0: no such file or folder"),
        (("--model_path", str(ROOT / "docs")), "--model_path .*docs: no checkpoint in it$"),
        (
            ("--pretrained_model_name_or_path", "/nowhere/flux"),
            "--pretrained_model_name_or_path /nowhere/flux: no such",
        ),
        (
            ("--pretrained_model_name_or_path", "data/flux2_klein/"),
            ".*data/flux2_klein/: no such folder; `bash scripts/huggingface/download_checkpoints.sh klein` gets it",
        ),
        (("--prompts_file", "/nowhere/p.txt"), "--prompts_file /nowhere/p.txt: No such file"),
    ],
)
def test_bad_input_gives_one_line_before_sampling(tmp_path, more, message, refused):
    with refused(message):
        main(command(tmp_path, "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_model_trained_with_another_guidance_says_so(tmp_path, train, capsys):
    run = train("run", max_train_steps=1, guidance_scale=2.0)
    for scale, said in ((3.5, True), (2.0, False)):
        main(command(tmp_path, f"out{scale}", "--model_path", run.checkpoints[-1], "--guidance_scale", scale))
        told = capsys.readouterr()
        line = f"was trained with --guidance_scale 2; here it draws with {scale:g}"
        assert (line in told.out + told.err) == said


def test_all_that_sampling_lacks_is_named_at_once(tmp_path, capsys):
    lacking = ("--prompts_file", "/nowhere/p.txt", "--pretrained_model_name_or_path", "/nowhere/flux")
    with pytest.raises(SystemExit):
        main(command(tmp_path, "out", *lacking))
    named = [line.partition("--")[2].split()[0] for line in capsys.readouterr().err.splitlines()]
    assert named == ["prompts_file", "pretrained_model_name_or_path"]


def test_a_path_in_a_run_without_a_model_is_refused_before_any_base_model_and_the_newest_checkpoint_named(
    tmp_path, refused
):
    (tmp_path / "run/checkpoint-2-0").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").touch()
    for name, problem in {
        "run": "no checkpoint in it",
        "run/metrics.jsonl": "is no .safetensors file, and other files may hold code",
        "run/checkpoint-3-0": "no such file or folder",
    }.items():
        path, advice = tmp_path / name, f"did you mean {tmp_path}/run/latest\\?"
        with refused(f"--model_path {path}: {problem}; {advice}"):
            main(command(tmp_path, "out", "--model_path", path, "--pretrained_model_name_or_path", "/nowhere"))
        with refused(f"--model_path {path}: {problem}; {advice}"):
            merge_lora.main(["--model_path", str(path), "--output_dir", str(tmp_path / "merged")])
    with refused("--model_path: not given; name a checkpoint"):
        merge_lora.main(["--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_path": None}, "^model_path: give the tuned model, or --baseline"),
        ({"model_path": None, "mix_sampling_steps": 10}, "^model_path: give the tuned model"),
        ({"mix_sampling_steps": 51}, "^mix_sampling_steps 51: must be between 1 and"),
        ({"mix_sampling_steps": -2}, "^mix_sampling_steps -2: must be between 1 and"),
        ({"mix_sampling_steps": 10, "baseline": True}, "^baseline: takes no share of --mix_sampling_steps 10"),
        ({"batch_size": 0}, "^batch_size 0"),
        ({"seed": -1}, "^seed -1"),
        ({"shift": 0.0}, "^shift 0.0"),
        ({"dtype": "int8"}, "^dtype int8: choose from auto"),
        ({"cpu_offload": "disk"}, "^cpu_offload disk: choose from none, model, sequential"),
        ({"cpu_offload": "sequential", "compile": True}, "^compile: its graphs can't move layers"),
        ({"mix_fraction": [0.2, 1.5]}, "^mix_fraction 0.2,1.5: must be between 0 and 1"),
        ({"mix_fraction": [0.5], "mix_sampling_steps": 3}, "^mix_fraction 0.5: give either this or --mix"),
        ({"mix_fraction": [0.8, 0.801]}, "two shares are the same number of --total_sampling_steps 50"),
        ({"mix_fraction": [0.009]}, "^mix_fraction 0.009: 0.009 is 0 of --total_sampling_steps 50"),
        ({"mix_fraction": [0.5, 0.995]}, "^mix_fraction 0.5,0.995: 0.995 is 50 of --total_sampling_steps 50"),
        ({"mix_fraction": [0.5, 0.8], "baseline": True}, "^baseline: takes no share"),
        (
            {"pretrained_model_name_or_path": "a", "flux_baseline_model_dir": "b"},
            "^flux_baseline_model_dir b: --pretrained_model_name_or_path is a; give one",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**{"model_path": "x", **settings})
