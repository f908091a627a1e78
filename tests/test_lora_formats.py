"""What merge_lora writes for other programs: adapters and whole transformers in the names of the original code."""

import json
import shutil
from pathlib import Path

from fastvideo.io.weights import write_weights
from fastvideo.models import merge_lora
from fastvideo.models.flux import Flux1
from fastvideo.models.lora import read_adapters
from fastvideo.models.original import join, original_names
from fastvideo.models.pretrained import load_with_lora, meta_transformer

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from test_lora import predict
from test_lora_files import Weights, effect, numbers, pipeline, write  # noqa: F401  (fixtures)

# Joined layers of which not all parts have adapters; one of them in each block, the others in one block.
LEFT_OUT = {"transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.add_q_proj"}
LEFT_OUT |= {f"single_transformer_blocks.{number}.proj_mlp" for number in range(3)}


def of_all_layers(model: Path | str, *only: str, rank: int | None = None) -> Weights:
    """Adapters in diffusers' names, of all layers but LEFT_OUT or of those with a name in `only`. Ranks and alphas
    differ, unless all have one rank.
    """
    found = {}
    layers = {k: m for k, m in meta_transformer(str(model)).named_modules() if isinstance(m, torch.nn.Linear)}
    for number, (layer, linear) in enumerate(layers.items()):
        if layer not in LEFT_OUT and (not only or layer.endswith(only)):
            own = rank or 2 + number % 3
            found[f"transformer.{layer}.lora_A.weight"] = numbers(own, linear.in_features)
            found[f"transformer.{layer}.lora_B.weight"] = numbers(linear.out_features, own)
            found[f"transformer.{layer}.alpha"] = torch.tensor(8.0 if rank else 1.0 + number % 4)
    return found


def convert(source: Path | str, base: Path | str, folder: Path, format: str, *flags: str) -> Path:
    """The file that merge_lora writes."""
    argv = ["--model_path", str(source), "--pretrained_model_name_or_path", str(base), "--output_dir", str(folder)]
    merge_lora.main([*argv, "--format", format, *flags])
    return next(folder.glob("*.safetensors"))


@pytest.fixture
def wide_flux(tiny_flux, tmp_path) -> Path:
    """A pipeline of FLUX.1's width with one block of each kind, but without weights."""
    folder = tmp_path / "wide"
    (folder / "transformer").mkdir(parents=True)
    config = json.loads((Path(tiny_flux) / "transformer/config.json").read_text())
    config |= {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128}
    (folder / "transformer/config.json").write_text(json.dumps(config | {"axes_dims_rope": [16, 56, 56]}))
    return folder


@pytest.mark.parametrize("format", ["lora_diffusers", "lora_kohya"])
def test_adapters_for_other_programs_act_in_diffusers_and_here_as_before(format, effect, tiny_flux, tmp_path):  # noqa: F811
    # diffusers takes the joined layer of single blocks apart in FLUX.1's width only, and drops layers outside blocks.
    double = (
        "attn.to_q",
        "attn.to_v",
        "attn.to_add_out",
        "add_k_proj",
        "net.2",
        "norm1.linear",
        "norm1_context.linear",
    )
    weights = of_all_layers(tiny_flux, *double, "0.proj_out")
    weights = {name: tensor for name, tensor in weights.items() if "single" not in name or "proj_out" in name}
    source = write(tmp_path / "source", weights)
    file = convert(source, tiny_flux, tmp_path / "other", format)
    before, after = read_adapters(source, Flux1()), read_adapters(file, Flux1())
    assert before.alphas.keys() == after.alphas.keys() and len(before.alphas) == 9
    for layer in before.alphas:
        torch.testing.assert_close(after.change_of(layer), before.change_of(layer))
    expected, _ = effect(source)
    for found in effect(file.parent):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_kohyas_adapters_add_to_the_weights_of_the_original_code_what_a_merge_adds(tiny_flux, tmp_path):
    """As ComfyUI adds them: alpha / rank · up down. Of all layers, joined and swapped ones too."""
    source = write(tmp_path / "source", of_all_layers(tiny_flux))
    plain, merged = (
        load_file(convert(model, tiny_flux, tmp_path / name, "original", "--dtype", "fp32"))
        for name, model in (("plain", tiny_flux), ("merged", source))
    )
    adapters, changed = load_file(convert(source, tiny_flux, tmp_path / "kohya", "lora_kohya")), set()
    assert merged.keys() == plain.keys()
    for name, tensor in plain.items():
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{layer}.alpha" in adapters and name.endswith(".weight"):
            down, up = (adapters.pop(f"{layer}.lora_{part}.weight") for part in ("down", "up"))
            tensor = tensor + adapters.pop(f"{layer}.alpha") / len(down) * up @ down
            changed.add(name)
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)
    assert not adapters and {"final_layer.adaLN_modulation.1.weight", "single_blocks.2.linear1.weight"} < changed


def test_layers_outside_the_blocks_are_read_back_from_kohyas_names(tiny_flux, tmp_path):
    """FluxPipeline.load_lora_weights ignores them."""
    outside = ("x_embedder", "context_embedder", "norm_out.linear", "embedder.linear_1", "embedder.linear_2")
    source = write(tmp_path / "source", of_all_layers(tiny_flux, *outside))
    file = convert(source, tiny_flux, tmp_path / "kohya", "lora_kohya")
    before, after = read_adapters(source, Flux1()), read_adapters(file, Flux1())
    assert before.alphas.keys() == after.alphas.keys() and len(before.alphas) == 9
    for layer in before.alphas:
        torch.testing.assert_close(after.change_of(layer), before.change_of(layer))
    torch.testing.assert_close(*(predict(load_with_lora(tiny_flux, path)) for path in (source, file)))


def test_diffusers_takes_query_key_and_value_of_single_blocks_apart_again(wide_flux, tmp_path):
    weights = of_all_layers(wide_flux, "single_transformer_blocks.0.attn.to_q", "0.attn.to_v", rank=2)
    file = convert(write(tmp_path / "source", weights), wide_flux, tmp_path / "kohya", "lora_kohya")
    found = FluxPipeline.lora_state_dict(file)
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight" in found  # zeros
    for name in ("to_q", "to_k", "to_v", "proj_mlp"):
        layer = f"transformer.single_transformer_blocks.0.{'' if name == 'proj_mlp' else 'attn.'}{name}"
        a, b = found[f"{layer}.lora_A.weight"], found[f"{layer}.lora_B.weight"]
        if name in ("to_q", "to_v"):
            before = [weights[f"{layer}.lora_{part}.weight"] for part in "BA"]
            torch.testing.assert_close(b @ a, 4 * before[0] @ before[1])  # alpha / rank = 8 / 2
        else:
            assert not b.any() and not a.any()


@pytest.mark.parametrize("guidance", [True, False])
def test_weights_in_the_original_names_are_what_diffusers_converts_back(wide_flux, guidance):
    """Of FLUX.1's rows, which diffusers' converter takes for granted, but narrow."""
    config = wide_flux / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": guidance}))
    transformer, random = meta_transformer(str(wide_flux)), torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(len(tensor), *[2] * (tensor.ndim - 1), generator=random)
        for name, tensor in transformer.state_dict().items()
    }
    names = original_names(transformer)
    original = {name: join(name, [weights[part] for part in parts]) for name, parts in names.items()}
    assert any("guidance_in" in name for name in original) == guidance
    back = convert_flux_transformer_checkpoint_to_diffusers(original)
    assert not original and back.keys() == weights.keys()  # it takes out what it has converted
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


@pytest.mark.long
def test_from_single_file_loads_what_was_written_bit_for_bit(wide_flux, tmp_path):
    transformer, random = meta_transformer(str(wide_flux)), torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    place = wide_flux / "transformer/diffusion_pytorch_model.safetensors"
    write_weights(place, shapes, torch.bfloat16, lambda name: torch.rand(shapes[name], generator=random))
    file = convert(wide_flux, wide_flux, tmp_path / "original", "original")
    loaded = FluxTransformer2DModel.from_single_file(
        str(file), config=str(wide_flux), subfolder="transformer", torch_dtype=torch.bfloat16
    )
    expected, found = load_file(place), loaded.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_written_is_refused_in_one_line(tiny_flux, tmp_path, refused):
    for format in ("diffusers", "lora_kohya"):
        with refused(f"--model_path {tiny_flux}: no LoRA file"):
            convert(tiny_flux, tiny_flux, tmp_path / "out", format)
        whole = Path(tiny_flux) / "transformer"
        with refused(f"--model_path {whole}: has all weights and no adapters.*; --format original fits it"):
            convert(whole, tiny_flux, tmp_path / "out", format)
    with refused("--model_path .*nowhere: no such file or folder"):
        convert(tmp_path / "nowhere", tiny_flux, tmp_path / "out", "original")
    shutil.copytree(Path(tiny_flux) / "transformer", tmp_path / "full")
    file = tmp_path / "full/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"proj_out.bias": weights["proj_out.bias"] * torch.nan}, file)
    with refused(f"--model_path {tmp_path}/full: wrong weights: proj_out.bias has values that aren't finite"):
        convert(tmp_path / "full", tiny_flux, tmp_path / "out", "original")
    file.unlink()
    torch.save(weights, tmp_path / "full/diffusion_pytorch_model.bin")
    with refused("--model_path .*full: "):
        convert(tmp_path / "full", tiny_flux, tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()
