"""Relatives of FLUX.1-dev, and the files in which they come: single files, shards, variants, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from fastvideo import train_grpo_flux
from fastvideo.models import merge_lora
from fastvideo.models.flux import Flux1
from fastvideo.models.lora import LORA_FILE
from fastvideo.models.original import original_names
from fastvideo.models.pretrained import (
    load_text_encoders,
    load_transformer,
    load_vae,
    load_with_lora,
    meta_transformer,
)
from fastvideo.sample import sample_flux
from fastvideo.sample.sample_flux import load_tuned

import pytest
import torch
from conftest import base_weights, same_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lora import predict
from test_lora_files import DIFFUSERS, write

FLUX_1 = {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24}
FLUX_1 |= {"joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56]}
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def with_parts(model: str, folder: Path, *parts: str) -> Path:
    """A pipeline whose `parts` are copies that may be changed; the others are links."""
    folder.mkdir()
    for path in Path(model).iterdir():
        if path.name in parts:
            shutil.copytree(path, folder / path.name)
        else:
            (folder / path.name).symlink_to(path.resolve())
    return folder


@pytest.fixture
def single_file(tiny_flux, tmp_path) -> Path:
    """The tiny transformer as flux1-dev.safetensors is: in the original names."""
    argv = ["--model_path", tiny_flux, "--output_dir", str(tmp_path / "single"), "--format", "original"]
    merge_lora.main([*argv, "--dtype", "fp32"])
    return tmp_path / "single" / merge_lora.ORIGINAL_FILE


@pytest.fixture
def pipeline_with(tiny_flux, tmp_path) -> Callable[[Path | None], str]:
    """pipeline_with(file) -> the tiny pipeline with this file in place of the transformer's weights."""

    def make(file: Path | None) -> str:
        folder = with_parts(tiny_flux, tmp_path / f"with {file.name if file else 'nothing'}", "transformer")
        (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
        if file:
            shutil.copy(file, folder / "transformer" / file.name)
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("guidance", "parameters", "tensors"), [(True, 11_901_408_320, 780), (False, 11_891_178_560, 776)]
)
def test_the_transformers_of_dev_krea_kontext_and_of_schnell_have_the_weights_of_the_published_files(
    guidance, parameters, tensors, tiny_flux, tmp_path
):
    folder = with_parts(tiny_flux, tmp_path / "flux_1", "transformer")
    config = json.loads((folder / "transformer/config.json").read_text()) | FLUX_1 | {"guidance_embeds": guidance}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    transformer = meta_transformer(str(folder))
    assert sum(parameter.numel() for parameter in transformer.parameters()) == parameters
    assert len(original_names(transformer)) == tensors
    assert sum(map(len, original_names(transformer).values())) == len(transformer.state_dict())


def test_a_single_file_in_the_original_names_trains_as_the_same_weights_in_diffusers_names(
    single_file, pipeline_with, train, tiny_flux
):
    folder = pipeline_with(single_file)
    assert same_weights(dict(load_transformer(folder).named_parameters()), base_weights(tiny_flux))
    settings = {"use_lora": True, "lora_rank": 2, "max_train_steps": 1}
    run = train("single", pretrained_model_name_or_path=folder, **settings)
    assert run.numbers() == train(**settings).numbers()
    merged = single_file.parents[1] / "merged"
    merge_lora.main(["--model_path", str(run.checkpoints[0]), "--output_dir", str(merged), "--dtype", "fp32"])
    expected = load_with_lora(tiny_flux, run.checkpoints[0])
    torch.testing.assert_close(predict(load_transformer(str(merged))), predict(expected), rtol=1e-4, atol=1e-5)


def test_a_tuned_model_may_be_a_single_file_also_with_the_prefix_of_other_programs(single_file, tiny_flux, tmp_path):
    weights = load_file(single_file)
    others = {"vae.decoder.conv_in.weight": torch.zeros(2), "text_encoders.t5xxl.shared.weight": torch.zeros(2)}
    save_file(others | {f"model.diffusion_model.{k}": v for k, v in weights.items()}, tmp_path / "all.safetensors")
    for file in (single_file, tmp_path / "all.safetensors"):
        found = load_tuned(tiny_flux, str(file), torch.float32)
        assert same_weights(found.state_dict(), base_weights(tiny_flux))


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_with_a_variant_alone_loads(variant, shards, tiny_flux, tmp_path):
    folder = with_parts(tiny_flux, tmp_path / "variant", *PARTS)
    for part in PARTS:
        (file,) = (folder / part).glob("*.safetensors")
        weights = {k: v.to(torch.float16 if variant == "fp16" else torch.bfloat16) for k, v in load_file(file).items()}
        file.unlink()
        stem, names = file.stem, list(weights)
        if not shards:
            save_file(weights, file.with_name(f"{stem}.{variant}.safetensors"), {"format": "pt"})
            continue
        places = {k: f"{stem}.{variant}-0000{1 + (i > 4)}-of-00002.safetensors" for i, k in enumerate(names)}
        for place in set(places.values()):
            chosen = {k: v for k, v in weights.items() if places[k] == place}
            save_file(chosen, file.with_name(place), {"format": "pt"})
        index = file.with_name(f"{stem}.safetensors.index.{variant}.json")
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    for load in (load_transformer, load_vae):
        found, wanted = load(str(folder)).state_dict(), load(tiny_flux).state_dict()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)
    for part in ("text_encoder", "text_encoder_2"):
        found, wanted = (load_text_encoders(str(model)).components[part].state_dict() for model in (folder, tiny_flux))
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name].float(), tensor.float(), rtol=1e-2, atol=1e-3)


def test_files_that_are_no_model_to_train_are_refused_in_one_line(
    single_file, pipeline_with, flags, refused, prompts_file, tmp_path, tiny_flux
):
    (tmp_path / "flux1-dev-Q4_0.gguf").write_bytes(b"GGUF")
    weights = load_file(single_file)
    eight_bit = {name: w.to(torch.float8_e4m3fn) if w.ndim == 2 else w for name, w in weights.items()}
    save_file(eight_bit, tmp_path / "flux1-dev-fp8.safetensors")
    style = write(tmp_path / "style", DIFFUSERS, "style.safetensors")
    short = {name: w for name, w in weights.items() if "img_in" not in name or "bias" not in name}
    save_file(short, tmp_path / "short.safetensors")
    gguf = pipeline_with(None)
    shutil.copy(tmp_path / "flux1-dev-Q4_0.gguf", Path(gguf) / "transformer")
    two = pipeline_with(single_file)
    shutil.copy(single_file, Path(two) / "transformer/other.safetensors")
    for model, problem in (
        (tmp_path / "flux1-dev-Q4_0.gguf", "GGUF holds rounded weights"),
        (gguf, "GGUF holds rounded weights"),
        (tmp_path / "flux1-dev-fp8.safetensors", "holds rounded weights .*F8_E4M3.* give the model in bf16"),
        (pipeline_with(tmp_path / "flux1-dev-fp8.safetensors"), "holds rounded weights"),
        (single_file, "one file, without VAE .* transformer/"),
        (pipeline_with(tmp_path / "short.safetensors"), "img_in.bias is missing$"),
        (two, "both in transformer/"),
        (Path(tiny_flux) / "transformer", f"this is a part of a pipeline; give the pipeline's folder, {tiny_flux}$"),
        (style, "these are LoRA adapters; .*--lora_init"),
        (write(tmp_path / "lora", DIFFUSERS, LORA_FILE).parent, "these are LoRA adapters"),
    ):
        with refused(f"--pretrained_model_name_or_path {model}: .*{problem}"):
            train_grpo_flux.main(flags(pretrained_model_name_or_path=model, prompts_file=prompts_file))


def test_kontext_trains_is_evaluated_and_samples_as_a_text_to_image_model(train, tiny_flux, prompts_file, tmp_path):
    """Its own pipeline would draw pictures of about a megapixel, whatever --h and --w say."""
    folder = with_parts(tiny_flux, tmp_path / "kontext")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "FluxKontextPipeline"}
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps(index | {"image_encoder": [None, None]}))
    settings = {"max_train_steps": 1, "eval_steps": 1, "eval_prompts": prompts_file, "prompts_file": prompts_file}
    run = train(pretrained_model_name_or_path=folder, **settings)
    assert any((run.folder / "evaluation").rglob("*.png"))
    pictures = []
    sizes = "--h 32 --w 32 --total_sampling_steps 2 --device cpu"
    for model in (folder, tiny_flux):
        argv = f"--baseline --prompts_file {prompts_file} --output_dir {tmp_path}/{Path(model).name}_pictures {sizes}"
        argv += f" --pretrained_model_name_or_path {model}"
        manifest = sample_flux.main(argv.split())
        pictures.append(Image.open(manifest.parent / json.loads(manifest.read_text())[0]["image"]))
    assert pictures[0].size == (32, 32) and pictures[0].tobytes() == pictures[1].tobytes()


def test_prompts_of_schnell_have_256_tokens_though_its_tokenizer_declares_512(schnell_flux, random_flux, tmp_path):
    for model, length in ((schnell_flux, 256), (random_flux, 512)):
        folder = with_parts(model, tmp_path / str(length), "tokenizer_2")
        config = folder / "tokenizer_2/tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 512}))
        embeds = Flux1().encode_prompts(load_text_encoders(str(folder)), ["a red circle"])["prompt_embeds"]
        assert embeds.shape[1] == length


def test_noisy_steps_of_a_few_step_model_are_warned_of_with_a_way_out(flags, schnell_flux, tiny_flux, capsys):
    def warned(**given: object) -> bool:
        capsys.readouterr()
        train_grpo_flux.main(flags(dry_run=True, **given))
        return "tends to blur" in capsys.readouterr().err

    assert warned(pretrained_model_name_or_path=schnell_flux)
    assert not warned(pretrained_model_name_or_path=schnell_flux, algorithm="awm")
    assert not warned(pretrained_model_name_or_path=schnell_flux, sampling_steps=16)
    assert not warned(pretrained_model_name_or_path=tiny_flux)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"group_size": 4}, "--group_size 4: .* two more must follow them: at most 2 .*, or --sampling_steps 6"),
        (
            {"algorithm": "flow_grpo", "flow_grpo_fast_steps": 3},
            "--flow_grpo_fast_steps 3: at most 2 .*, or --sampling_steps 5",
        ),
        ({"algorithm": "grpo_merge", "eta_step_list": [0, 3]}, "--eta_step_list .*0 to 2 with --sampling_steps 4"),
        (
            {"algorithm": "branch_grpo", "tree_split_points": [0, 3]},
            "--tree_split_points .*0 to 2 with --sampling_steps 4",
        ),
    ],
    ids=["window", "fast steps", "active steps", "splits"],
)
def test_what_does_not_fit_into_few_steps_says_what_does(given, problem, flags, refused):
    with refused(problem):
        train_grpo_flux.main(flags(sampling_steps=4, **given))
