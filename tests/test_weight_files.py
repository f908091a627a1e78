"""Damaged or foreign weights of FLUX models: one line that names the flag and what is wrong, before anything slow."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from fastvideo import train_grpo_flux
from fastvideo.models.pretrained import check_transformer, load_text_encoders, load_transformer, load_vae
from fastvideo.sample import sample_flux

import pytest
import torch
from safetensors.torch import load_file, save_file

PARTS = {
    "transformer": load_transformer,
    "vae": load_vae,
    "text_encoder": load_text_encoders,
    "text_encoder_2": load_text_encoders,
}
WIDTHS = {"transformer": "num_attention_heads", "vae": "latent_channels", "text_encoder": "hidden_size"}
WIDTHS["text_encoder_2"] = "d_model"
Weights = dict[str, torch.Tensor]


def split(path: Path) -> None:
    """Splits a file of weights into two, as large models are stored, and loses the second."""
    weights = load_file(path)
    path.unlink()
    names = {name: f"{path.stem}-0000{1 + (i > 4)}-of-00002.safetensors" for i, name in enumerate(weights)}
    first = {name: weights[name] for name, file in names.items() if "00001" in file}
    save_file(first, path.with_name(f"{path.stem}-00001-of-00002.safetensors"), {"format": "pt"})
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def other_weights(change: Callable[[Weights, str], Weights]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        weights = load_file(path)
        save_file(change(weights, next(name for name in sorted(weights) if weights[name].ndim == 2)), path)

    return apply


def other_width(path: Path) -> None:
    config = path.with_name("config.json")
    settings = json.loads(config.read_text())
    name = WIDTHS[path.parent.name]
    config.write_text(json.dumps(settings | {name: 2 * settings[name]}))


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:2000]), "damaged|header|Unable to load"),
    "a lost shard": (split, "00002-of-00002"),
    "no JSON": (lambda path: path.with_name("config.json").write_text('{"a":'), "not a valid JSON file"),
    "of another width": (other_width, r"expected .*shape|has shape .*, expected"),
    "a missing weight": (
        other_weights(lambda w, name: {k: v for k, v in w.items() if k != name}),
        r"weight is missing$",
    ),
    "a prefix": (
        other_weights(lambda w, _: {f"module.{k}": v for k, v in w.items()}),
        r"is missing, module\..* is unknown, and",
    ),
    "no weights": (other_weights(lambda w, name: {}), "weight is missing, and|bias is missing, and"),
    "NaN": (other_weights(lambda w, name: w | {name: w[name] * torch.nan}), "values that aren't finite"),
}


@pytest.fixture
def damaged(tiny_flux, tmp_path) -> Callable[[str, str], str]:
    """damaged(part, damage) -> a pipeline whose part has the damage. The other parts are links."""

    def make(part: str, damage: str) -> str:
        folder = tmp_path / f"{part} {damage}"
        folder.mkdir()
        for path in Path(tiny_flux).iterdir():
            (folder / path.name).symlink_to(path.resolve())
        (folder / part).unlink()
        (folder / part).mkdir()
        for path in (Path(tiny_flux) / part).iterdir():
            (folder / part / path.name).write_bytes(path.read_bytes())
        DAMAGE[damage][0](next((folder / part).glob("*.safetensors")))
        return str(folder)

    return make


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_part_of_a_pipeline_is_named_and_never_filled_up_with_random_numbers(part, damaged):
    for damage, (_, problem) in DAMAGE.items():
        folder = damaged(part, damage)
        with pytest.raises(ValueError, match=problem) as refusal:
            PARTS[part](folder)
        assert str(refusal.value).startswith(f"pretrained_model_name_or_path {folder}: "), damage
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400 + len(folder), damage


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "config.json",
            {"axes_dims_rope": [8, 8, 8]},
            "axes_dims_rope .8, 8, 8., not 3 even numbers that add up to 32",
        ),
        (
            "diffusion_pytorch_model.safetensors.index.json",
            {"weight_map": {}},
            "index.json isn't readable.*names no file",
        ),
        ("diffusion_pytorch_model.bin", [1], "AttributeError"),
    ],
)
def test_files_that_only_look_like_a_transformer_are_refused_in_one_line(name, content, problem, damaged):
    folder = damaged("transformer", "NaN")
    file, weights = (
        Path(folder) / "transformer" / name,
        Path(folder) / "transformer/diffusion_pytorch_model.safetensors",
    )
    if name.endswith(".json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | content if file.exists() else content))
    else:
        weights.unlink()
        torch.save(content, file)
    with pytest.raises(ValueError, match=f"^pretrained_model_name_or_path {folder}: .*{problem}") as refusal:
        check_transformer(folder)
        load_transformer(folder)
    assert "\n" not in str(refusal.value)


def test_training_refuses_damaged_weights_before_it_loads_rewards(flags, damaged, refused, prompts_file, monkeypatch):
    monkeypatch.setattr(train_grpo_flux, "Scoring", lambda *_: pytest.fail("rewards were loaded"))
    damages = [(part, "truncated") for part in PARTS]
    for part, damage in [*damages, ("transformer", "a prefix"), ("vae", "a prefix"), ("vae", "a lost shard")]:
        folder = damaged(part, damage)
        with refused(f"--pretrained_model_name_or_path {folder}: "):
            train_grpo_flux.main(flags(pretrained_model_name_or_path=folder, prompts_file=prompts_file))


def test_a_tuned_model_that_cannot_be_used_is_refused_before_the_folder_of_pictures_exists(
    tiny_flux, schnell_flux, damaged, refused, tmp_path
):
    (tmp_path / "p.txt").write_text("a red circle\n")
    flags = f"--pretrained_model_name_or_path {tiny_flux} --prompts_file {tmp_path}/p.txt --output_dir {tmp_path}/out"

    def sample(model: object) -> None:
        sample_flux.main(
            [*flags.split(), "--h", "32", "--w", "32", "--total_sampling_steps", "2", "--model_path", str(model)]
        )

    for damage, (_, problem) in DAMAGE.items():
        if damage != "NaN":
            with refused(f"--model_path .*({problem})"):
                sample(damaged("transformer", damage))
    with refused("--model_path .*: has guidance_embeds False"):
        sample(schnell_flux)
    weights = load_file(Path(tiny_flux) / "transformer/diffusion_pytorch_model.safetensors")
    file = tmp_path / "tuned.safetensors"
    for change, problem in (
        ({f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, "is missing, _orig_mod.* is unknown"),
        ({name: tensor for name, tensor in weights.items() if "proj_out.bias" not in name}, "proj_out.bias is missing"),
    ):
        save_file(change, file)
        with refused(f"--model_path {file}: wrong weights in .*: .*{problem}"):
            sample(file)
    torch.save(weights, tmp_path / "tuned.bin")
    with refused("--model_path .*tuned.bin: is no .safetensors file, and other files may hold code"):
        sample(tmp_path / "tuned.bin")
    assert not (tmp_path / "out").exists()
    save_file({name: tensor * (torch.nan if "proj_out.bias" in name else 1) for name, tensor in weights.items()}, file)
    with refused("--model_path .*proj_out.bias has values that aren't finite"):  # known when all weights are read
        sample(file)


def test_checkpoints_of_earlier_versions_load_whose_config_has_fsdp_s_name_of_the_class(tiny_flux, tmp_path):
    shutil.copytree(f"{tiny_flux}/transformer", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"_class_name": f"FSDP{config['_class_name']}"}))
    assert type(load_transformer(str(tmp_path / "checkpoint"))).__name__ == config["_class_name"]
