"""LoRA files of other programs: each acts as FluxPipeline makes it act, or is refused with one line."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from fastvideo.cli import FlagError
from fastvideo.models import merge_lora, pretrained
from fastvideo.models.flux import Flux1
from fastvideo.models.lora import LORA_CONFIG, LORA_FILE, PEFT_CONFIG, find_lora, read_trained_lora, save_lora
from fastvideo.models.pretrained import load_transformer, load_with_lora
from fastvideo.sample import sample_flux

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_lora import predict

RANK, WIDTH = 4, 128
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
# diffusers' name of a layer -> (inputs, outputs)
LAYERS = {
    f"{DOUBLE}.attn.to_q": (WIDTH, WIDTH),
    f"{DOUBLE}.attn.to_out.0": (WIDTH, WIDTH),
    f"{DOUBLE}.ff.net.2": (4 * WIDTH, WIDTH),
    f"{SINGLE}.proj_out": (5 * WIDTH, WIDTH),
}
# The same for layers of the original FLUX code, whose names kohya and ComfyUI use. One layer has query, key and value.
ORIGINAL = {
    "double_blocks.0.img_attn.qkv": (WIDTH, 3 * WIDTH),
    "double_blocks.0.img_attn.proj": (WIDTH, WIDTH),
    "single_blocks.0.linear2": (5 * WIDTH, WIDTH),
}
Weights = dict[str, torch.Tensor]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.15


def adapters(
    down: str,
    up: str,
    name: Callable[[str], str] = "transformer.{}".format,
    layers: dict[str, tuple[int, int]] = LAYERS,
    rank: int = RANK,
) -> Weights:
    """Strong adapters of layers, whose names `name` changes."""
    found = {}
    for layer, (inputs, outputs) in layers.items():
        found[f"{name(layer)}.{down}.weight"] = numbers(rank, inputs)
        found[f"{name(layer)}.{up}.weight"] = numbers(outputs, rank)
    return found


def with_alpha(weights: Weights, *alphas: float) -> Weights:
    """Adds `.alpha` tensors, the given ones in turn."""
    layers = list(dict.fromkeys(name.partition(".lora_")[0] for name in weights))
    return weights | {f"{x}.alpha": torch.tensor(float(alphas[i % len(alphas)])) for i, x in enumerate(layers)}


DIFFUSERS = adapters("lora_A", "lora_B")
KOHYA = with_alpha(adapters("lora_down", "lora_up", lambda x: "lora_unet_" + x.replace(".", "_"), ORIGINAL), 1, 16)
READ = {
    "diffusers": DIFFUSERS,
    "half precision": {name: tensor.half() for name, tensor in DIFFUSERS.items()},
    "diffusers with alpha": with_alpha(DIFFUSERS, 16),
    "another alpha and rank in each layer": with_alpha(
        DIFFUSERS | {k: v for k, v in adapters("lora_A", "lora_B", rank=2).items() if "attn" in k}, 16, 1, 3
    ),
    "older diffusers": adapters("lora.down", "lora.up"),
    "kohya": KOHYA,
    "ComfyUI": with_alpha(adapters("lora_down", "lora_up", "diffusion_model.{}".format, ORIGINAL), 1, 16),
    "OneTrainer": with_alpha(
        adapters(
            "lora_down",
            "lora_up",
            lambda x: "lora_transformer_" + x.replace(".", "_"),
            {layer: sizes for layer, sizes in LAYERS.items() if "attn" in layer},
        ),
        16,
    ),
    "xlabs": adapters(
        "down",
        "up",
        "double_blocks.0.processor.{}".format,
        {"qkv_lora1": (WIDTH, 3 * WIDTH), "proj_lora1": (WIDTH, WIDTH)},
    ),
}


def write(folder: Path, weights: Weights, name: str = LORA_FILE, metadata: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    text = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / name, {"format": "pt"} | text)
    return folder / name


@pytest.fixture(scope="module")
def pipeline(tiny_flux) -> FluxPipeline:
    return FluxPipeline.from_pretrained(tiny_flux)


@pytest.fixture
def effect(tiny_flux, pipeline) -> Callable[[Path], tuple[torch.Tensor, torch.Tensor]]:
    """effect(path) -> how the velocity moves with our loading, and with FluxPipeline's."""

    def measure(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        base = predict(pipeline.transformer)
        ours = predict(load_with_lora(tiny_flux, path)) - base
        pipeline.load_lora_weights(path)
        theirs = predict(pipeline.transformer) - base
        pipeline.unload_lora_weights()
        return ours, theirs

    return measure


@pytest.mark.parametrize("naming", READ)
def test_a_file_acts_as_strongly_as_in_the_pipeline_of_diffusers(naming, effect, tmp_path):
    ours, theirs = effect(write(tmp_path, READ[naming]))
    assert theirs.norm() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prefix", ["", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "base_model.model.transformer."]
)
@pytest.mark.parametrize("layers", [LAYERS, ORIGINAL], ids=["names of diffusers", "names of the original code"])
def test_a_prefix_that_diffusers_does_not_take_changes_nothing(prefix, layers, tiny_flux, tmp_path):
    known = DIFFUSERS if layers is LAYERS else adapters("lora_down", "lora_up", "diffusion_model.{}".format, layers)
    expected = predict(load_with_lora(tiny_flux, write(tmp_path / "a", known)))
    file = write(
        tmp_path / "b", adapters("lora_A", "lora_B", f"{prefix}{{}}".format, layers), "adapter_model.safetensors"
    )
    (file.parent / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    assert torch.equal(predict(load_with_lora(tiny_flux, file.parent)), expected)


def in_metadata(**settings) -> dict:
    return {
        f"transformer.{k}": v for k, v in ({"r": RANK, "lora_alpha": 8, "target_modules": ["to_q"]} | settings).items()
    }


@pytest.mark.parametrize(
    ("weights", "metadata", "beside"),
    [
        (DIFFUSERS, in_metadata(), {}),
        (DIFFUSERS, None, {LORA_CONFIG: {"lora_params": {"lora_rank": RANK, "lora_alpha": 8}}}),
        (DIFFUSERS, None, {LORA_CONFIG: {"rank": RANK, "alpha": 8}}),
        (DIFFUSERS, None, {PEFT_CONFIG: {"r": RANK, "lora_alpha": 8, "target_modules": ["to_q"]}}),
        (with_alpha(DIFFUSERS, 8), in_metadata(), {LORA_CONFIG: {"lora_rank": RANK, "lora_alpha": 8}}),
    ],
    ids=["metadata, as our older checkpoints", "DanceGRPO's lora_config.json", "at its top", "peft", "three times"],
)
def test_alpha_is_found_wherever_it_is_stated(weights, metadata, beside, tiny_flux, tmp_path):
    plain = predict(load_with_lora(tiny_flux, write(tmp_path / "alpha", with_alpha(DIFFUSERS, 8))))
    file = write(tmp_path / "lora", weights, metadata=metadata)
    for name, settings in beside.items():
        (file.parent / name).write_text(json.dumps(settings))
    assert torch.equal(predict(load_with_lora(tiny_flux, file.parent)), plain)


def changed(**tensors: torch.Tensor) -> Weights:
    """DIFFUSERS with other tensors of one layer; None: without."""
    layer = f"transformer.{DOUBLE}.attn.to_q"
    named = {f"{layer}.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in (DIFFUSERS | named).items() if tensor is not None}


TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
REFUSED = {
    "peft without its settings": (adapters("lora_A", "lora_B", "base_model.model.{}".format), "so alpha is unknown"),
    "the same layer in two namings": (DIFFUSERS | adapters("lora_A", "lora_B", str), "twice, in different namings"),
    "whole numbers": (changed(lora_A__weight=torch.ones(RANK, WIDTH).int()), "lora_A.weight holds torch.int32"),
    "rank 0": (
        changed(lora_A__weight=torch.zeros(0, WIDTH), lora_B__weight=torch.zeros(WIDTH, 0)),
        "needs a lora_A and a lora_B",
    ),
    "a layer of another naming": (DIFFUSERS | adapters("lora_A", "lora_B", "unet.{}".format), "isn't named as"),
    "text encoder": (DIFFUSERS | {f"{TEXT}.lora_A.weight": numbers(4, 64)}, "text encoder"),
    "kohya's text encoder": ({"lora_te1_text_model_x.lora_down.weight": numbers(4, 64)}, "text encoder"),
    "DoRA": (changed(lora_magnitude_vector=numbers(WIDTH)), "lora_magnitude_vector is neither"),
    "kohya's DoRA": (KOHYA | {"lora_unet_x.dora_scale": numbers(1)}, "dora_scale is neither"),
    "a bias": (changed(lora_B__bias=numbers(WIDTH)), "lora_B.bias is neither"),
    "a norm": (DIFFUSERS | {f"transformer.{DOUBLE}.attn.norm_q.weight": numbers(32)}, "norm_q.weight is neither"),
    "LoKr": ({"lora_unet_double_blocks_0_img_attn_proj.lokr_w1": numbers(4, 4)}, "lokr_w1 is neither"),
    "FLUX.2's": (
        {"transformer.transformer_blocks.0.ff.linear_in.lora_A.weight": numbers(4, 64)},
        "made for FLUX.2, and the model is FLUX.1",
    ),
    "NaN": (changed(lora_A__weight=torch.full((RANK, WIDTH), math.nan)), "lora_A.weight has values that aren't finite"),
    "no B": (changed(lora_B__weight=None), "needs a lora_A and a lora_B"),
    "another width": (
        changed(lora_A__weight=numbers(RANK, 3072)),
        r"another base model: .*\(4, 3072\), expected \(4, 128\)",
    ),
    "a layer that isn't there": (
        DIFFUSERS | adapters("lora_A", "lora_B", lambda layer: f"transformer.{layer}".replace(".0.", ".18.", 1)),
        "18.* is no linear layer of the base model",
    ),
    "alpha of some layers": (changed(alpha=torch.tensor(8.0)), "some layers have an alpha"),
    "alpha 0": (with_alpha(DIFFUSERS, 0), "isn't above 0"),
    "an alpha of two numbers": (with_alpha(DIFFUSERS, 8) | changed(alpha=torch.ones(2)), "diffusers can't read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_in_full_is_refused_before_a_model_is_loaded(case, tiny_flux, tmp_path, monkeypatch):
    weights, problem = REFUSED[case]
    monkeypatch.setattr(pretrained, "load_transformer", lambda *_: pytest.fail("the base model was loaded"))
    with pytest.raises(FlagError, match=f"^model_path .*LoRA file can't be used: .*{problem}") as refusal:
        load_with_lora(tiny_flux, write(tmp_path, weights).parent)
    assert len(str(refusal.value)) - len(str(tmp_path)) < 330 and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("metadata", "beside", "problem"),
    [
        (in_metadata(use_dora=True), {}, "use_dora True, which isn't supported"),
        (in_metadata(bias="all"), {}, "bias all"),
        (in_metadata(init_lora_weights="pissa"), {}, "init_lora_weights pissa"),
        (in_metadata(new_in_peft_9={"scale": 2}), {}, "new_in_peft_9"),
        (in_metadata(r=8), {}, "has rank 4, its settings say 8"),
        (in_metadata(alpha_pattern={"(a+)+$": 1}), {}, "no layer's name"),
        (in_metadata(), {LORA_CONFIG: {"rank": RANK, "alpha": 4}}, "statements of alpha differ: 8 and 4"),
        (None, {LORA_CONFIG: {"rank": 128, "alpha": 256}}, "has rank 4, its settings say 128"),
        (None, {PEFT_CONFIG: {"r": RANK, "lora_alpha": 8, "use_dora": True}}, "use_dora True"),
        *((in_metadata(lora_alpha=alpha), {}, f"alpha {alpha}") for alpha in (0, -8, True, math.inf)),
        (None, {LORA_CONFIG: {"rank": RANK}}, "alpha None is no number"),
        (None, {LORA_CONFIG: [RANK, 8]}, "holds no settings"),
        ([RANK, 8], {}, "in its metadata holds no settings"),
    ],
)
def test_settings_that_change_the_effect_or_contradict_are_refused(metadata, beside, problem, tiny_flux, tmp_path):
    file = write(tmp_path / "lora", DIFFUSERS, metadata=metadata)
    for name, settings in beside.items():
        (file.parent / name).write_text(json.dumps(settings))
    with pytest.raises(FlagError, match=problem):
        load_with_lora(tiny_flux, file)


def test_rank_stabilised_lora_acts_by_alpha_over_the_root_of_the_rank(effect, tmp_path):
    ours, theirs = effect(write(tmp_path, DIFFUSERS, metadata=in_metadata(use_rslora=True)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_our_checkpoints_act_in_diffusers_as_in_training_and_name_alpha_for_other_programs(effect, tiny_flux, tmp_path):
    trained = load_transformer(tiny_flux)
    pretrained.add_lora(trained, RANK, 2 * RANK, ["to_q", "to_out.0"], seed=1)
    weights = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    for parameter in weights.values():
        parameter.data = numbers(*parameter.shape)
    moved = predict(trained) - predict(load_transformer(tiny_flux))
    save_lora(tmp_path / "new", weights, trained, Flux1())
    stored = load_file(tmp_path / "new" / LORA_FILE)
    alphas = {name: float(stored.pop(name)) for name in list(stored) if name.endswith(".alpha")}
    assert set(alphas.values()) == {2.0 * RANK} and len(alphas) == len(stored) / 2
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["to_q", "to_out.0"]).to_dict()
    settings["target_modules"] = sorted(settings["target_modules"])
    write(tmp_path / "old", stored, metadata={f"transformer.{k}": v for k, v in settings.items() if v is not None})
    for folder in ("new", "old"):
        for found in effect(tmp_path / folder):
            torch.testing.assert_close(found, moved, rtol=1e-4, atol=1e-4)
        read = read_trained_lora(tmp_path / folder / LORA_FILE)
        assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in read)


def test_a_path_means_the_file_itself_or_the_only_one_of_a_folder(tmp_path):
    style = write(tmp_path, DIFFUSERS, "my_style.safetensors")
    assert find_lora(style, "model_path") == find_lora(tmp_path, "model_path") == style
    write(tmp_path, {"x": torch.zeros(1)}, "no_lora.safetensors")
    assert find_lora(tmp_path, "model_path") == style
    write(tmp_path, DIFFUSERS, "other.safetensors")
    with pytest.raises(FlagError, match="holds 2 LoRA files"):
        find_lora(tmp_path, "model_path")
    assert find_lora(write(tmp_path, DIFFUSERS).parent, "model_path").name == LORA_FILE


def test_the_commands_take_any_lora_file_or_refuse_it_in_one_line(tiny_flux, tmp_path, refused):
    (tmp_path / "p.txt").write_text("a red circle\n")
    sampling = f"--pretrained_model_name_or_path {tiny_flux} --prompts_file {tmp_path}/p.txt --h 32 --w 32".split()
    sampling += ["--total_sampling_steps", "2", "--device", "cpu", "--output_dir"]
    good, bad = write(tmp_path / "a", READ["kohya"], "style.safetensors"), write(tmp_path / "b", REFUSED["LoKr"][0])
    cut = write(tmp_path / "c", DIFFUSERS)
    cut.write_bytes(cut.read_bytes()[:1000])
    assert sample_flux.main([*sampling, str(tmp_path / "good"), "--model_path", str(good)]).exists()
    merging = ["--pretrained_model_name_or_path", tiny_flux, "--dtype", "fp32", "--output_dir"]
    merge_lora.main([*merging, str(tmp_path / "merged"), "--model_path", str(good)])
    merged, expected = load_transformer(str(tmp_path / "merged")), load_with_lora(tiny_flux, good)
    torch.testing.assert_close(predict(merged), predict(expected), rtol=1e-4, atol=1e-4)
    for file in (bad, cut):
        with refused(rf"--model_path {file}: this LoRA file can't be used"):
            sample_flux.main([*sampling, str(tmp_path / "refused"), "--model_path", str(file.parent)])
        with refused(rf"--model_path {file}: this LoRA file can't be used"):
            merge_lora.main([*merging, str(tmp_path / "refused"), "--model_path", str(file.parent)])
    assert not (tmp_path / "refused").exists()
