"""LoRA files, ours and those of other programs: which file a path means, what it holds, and how strongly it acts.

A file is used if diffusers' own converter (lora_state_dict of the model's pipeline) understands every tensor in it, if
need be after a change of prefix. It then acts as the pipeline's load_lora_weights makes it act: W + alpha / rank · B A
in every layer. Layers outside the blocks in kohya's names, which that function ignores, act too. All other files are
refused.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.cli import FlagError
from fastvideo.models.family import Family

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
LORA_CONFIG = "lora_config.json"  # DanceGRPO writes alpha and rank into this file beside LORA_FILE
PEFT_CONFIG = "adapter_config.json"  # peft writes its LoraConfig into this file beside the adapters

# A layer's name, then the name of one of its tensors: A (down), B (up) or alpha.
_TENSOR = re.compile(r"(.+?)\.(?:(?:lora_[AB]|lora_down|lora_up|lora\.down|lora\.up|down|up)\.weight|alpha)")
# Prefixes of peft, ComfyUI and others. Which layer is meant is certain if one of FLUX's parts follows, under the name
# that it has in diffusers or in the original code. XLabs' names (processor) stay as they are: diffusers knows them.
_PEFT = "base_model.model."
_PREFIX = r"(?:base_model\.model\.)?(?:transformer\.|(?:model\.)?diffusion_model\.)?"
_PART = (
    r"(?:(?:single_)?transformer_blocks|time_(?:text|guidance)_embed|norm_out|x_embedder|context_embedder|proj_out|"
    r"(?:double|single)_stream_modulation\w*)"
)
_DIFFUSERS = re.compile(rf"{_PREFIX}({_PART}\..+)")
_ORIGINAL = re.compile(rf"{_PREFIX}((?:double|single)_blocks\.\d+\.(?!processor\.).+)")
# Layers that adapters of one family alone have, by the transformer's class, in any naming: by them a file for the other
# family is told.
_FAMILIES = {
    "FluxTransformer2DModel": (
        "FLUX.1",
        r"single_transformer_blocks\.\d+\.attn\.to_[qkv]\.|proj_mlp|norm1(_context)?\.linear|\.ff(_context)?\.net\.|"
        r"_mod[._]lin",
    ),
    "Flux2Transformer2DModel": (
        "FLUX.2",
        r"to_qkv_mlp_proj|\.ff(_context)?\.linear_(in|out)|stream_modulation",
    ),
}
_TEXT_ENCODER = re.compile(r"text_encoder|lora_te")
# Settings of a LoraConfig that are read below, or that don't matter once the adapters are trained. Others must have
# their default: they change what the adapters compute.
_KNOWN_SETTINGS = set(
    "r lora_alpha rank_pattern alpha_pattern use_rslora init_lora_weights lora_dropout target_modules exclude_modules "
    "layers_to_transform layers_pattern base_model_name_or_path revision task_type peft_type peft_version auto_mapping "
    "inference_mode runtime_config qalora_group_size loftq_config eva_config corda_config lora_ga_config".split()
)


def lora_file(path: str | Path, field: str = "model_path") -> Path | None:
    """The file of adapters that a path means: itself, LORA_FILE in a folder, or the only .safetensors file of a folder.

    None: the path means something else. Raises FlagError about the setting `field` if a folder holds several adapters.
    """
    path = Path(path)
    if path.is_file():
        return path if path.name == LORA_FILE or _names_adapters(path) else None
    if (path / LORA_FILE).is_file():
        return path / LORA_FILE
    found = [] if (path / "config.json").exists() else [p for p in path.glob("*.safetensors") if _names_adapters(p)]
    if len(found) > 1:
        raise FlagError(field, path, f"holds {len(found)} LoRA files, none of them named {LORA_FILE}; give one of them")
    return found[0] if found else None


def find_lora(path: str | Path, field: str) -> Path:
    """`lora_file`. Raises FlagError about the setting `field` if there is none."""
    file = lora_file(path, field)
    if file is None:
        problem = f"no LoRA file; give a .safetensors file with adapters, or a folder with {LORA_FILE}"
        raise FlagError(field, path, problem)
    return file


def _names_adapters(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return any(re.search(r"lora|lokr_|hada_", name) for name in file.keys())  # noqa: SIM118  (no iterator)
    except (OSError, SafetensorError):
        return False


@dataclass(frozen=True)
class Adapters:
    """Adapters of a transformer's linear layers.

    weights: `{layer}.lora_A.weight` [rank, inputs] and `{layer}.lora_B.weight` [outputs, rank].
    alphas: layer -> alpha. refuse: raises FlagError about the file.
    """

    weights: dict[str, torch.Tensor]
    alphas: dict[str, float]
    refuse: Callable[[str], None]

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> rank."""
        return {layer: len(self.weights[f"{layer}.lora_A.weight"]) for layer in self.alphas}

    def scale(self, layer: str) -> float:
        """alpha / rank."""
        return self.alphas[layer] / self.ranks[layer]

    def change_of(self, layer: str) -> torch.Tensor:
        """alpha / rank · B A, [outputs, inputs] in float32."""
        a, b = (self.weights[f"{layer}.{part}.weight"].float() for part in ("lora_A", "lora_B"))
        return self.scale(layer) * (b @ a)

    def check_fit(self, transformer: ModelMixin) -> None:
        """Raises FlagError unless all adapters fit layers of the transformer, which may be on the meta device."""
        layers = {name: m for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
        for layer, rank in self.ranks.items():
            if layer not in layers:
                self.refuse(f"{layer} is no linear layer of the base model")
            inputs, outputs = layers[layer].in_features, layers[layer].out_features
            for part, expected in {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}.items():
                shape = tuple(self.weights[f"{layer}.{part}.weight"].shape)
                if shape != expected:
                    self.refuse(f"made for another base model: {layer}.{part} is {shape}, expected {expected}")

    def start_of(self, layers: set[str], rank: int, alpha: float) -> dict[str, torch.Tensor]:
        """Weights with which new adapters of these layers act as these ones, named as in a transformer whose adapter is
        `default`. Raises FlagError about the file if it has other layers or ranks.
        """
        if layers != self.ranks.keys():
            some = sorted(layers ^ self.ranks.keys())[0]
            where = "only in the file" if some in self.ranks else "not in the file"
            self.refuse(f"its layers aren't those of --lora_target_modules: {some} is {where}")
        for layer, own in self.ranks.items():
            if own != rank:
                self.refuse(f"{layer} has rank {own}, --lora_rank is {rank}")
        found = {}
        for layer in layers:
            factor = self.alphas[layer] / alpha  # of alpha / rank, with equal ranks
            found[f"{layer}.lora_A.default.weight"] = self.weights[f"{layer}.lora_A.weight"].float()
            found[f"{layer}.lora_B.default.weight"] = self.weights[f"{layer}.lora_B.weight"].float() * factor
        return found

    def put_into(self, transformer: ModelMixin) -> None:
        """Adds the adapters, switched on, to a transformer that they fit."""
        some = next(iter(self.ranks))
        common = {"r": self.ranks[some], "lora_alpha": self.alphas[some]}

        def others(values: Mapping[str, float], usual: float) -> dict[str, float]:
            # peft takes a key for a pattern that may match the end of a name.
            return {f"^{re.escape(layer)}": value for layer, value in values.items() if value != usual}

        transformer.load_lora_adapter(
            self.weights,
            prefix=None,
            metadata={
                **common,
                "rank_pattern": others(self.ranks, common["r"]),
                "alpha_pattern": others(self.alphas, common["lora_alpha"]),
                "target_modules": list(self.ranks),
            },
        )


def read_adapters(file: Path, family: Family, field: str = "model_path") -> Adapters:
    """Reads a LoRA file in any naming that load_lora_weights of the family's pipeline understands.

    The same layers with the prefixes of peft or ComfyUI, or without any, are read too. Alpha comes from the file's
    `.alpha` tensors, its metadata, or PEFT_CONFIG or LORA_CONFIG beside it; without any, it is the rank, as in
    diffusers. Raises FlagError about the setting `field` for a file that isn't understood in full.
    """

    def refuse(problem: str) -> None:
        problem = " ".join(problem.split())
        raise FlagError(field, file, f"this LoRA file can't be used: {problem[:200]}{'…' * (len(problem) > 200)}")

    try:
        stored = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "null"))
        if not isinstance(metadata, dict | None):
            raise ValueError(f"{LORA_ADAPTER_METADATA_KEY} in its metadata holds no settings")
    except (OSError, SafetensorError, ValueError) as error:
        return refuse(f"it isn't readable: {error}")
    own, _ = _FAMILIES[family.transformer.__name__]
    for other, layers in _FAMILIES.values():
        if other != own and (named := next(filter(re.compile(layers).search, stored), None)):
            refuse(f"it was made for {other}, and the model is {own}: {named} is a layer of {other}")
    tensors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in stored.items():
        if _TEXT_ENCODER.match(name):
            refuse(f"it has adapters of a text encoder too ({name}), but only the transformer's are taken here")
        usual = _usual_name(name)
        if not (match := _TENSOR.fullmatch(usual)):
            refuse(f"{name} is neither lora_A, lora_B nor alpha of a layer")
        if not tensor.is_floating_point():
            refuse(f"{name} holds {tensor.dtype}, which no adapter is trained in")
        if not tensor.float().isfinite().all():
            refuse(f"{name} has values that aren't finite")
        if usual in tensors[match[1]]:
            refuse(f"{usual} is in it twice, in different namings")
        tensors[match[1]][usual] = tensor
    weights, alphas = {}, {}
    for layer, parts in tensors.items():  # one layer at a time, because the converter drops some layers silently
        for name, tensor in _convert(layer, parts, family, refuse).items():
            if name in weights or name in alphas:
                refuse(f"{name} is in it twice, in different namings")
            (alphas if name.endswith(".alpha") else weights)[name] = tensor
    layers = list(dict.fromkeys(name.partition(".lora_")[0] for name in weights))
    if not layers:
        refuse("it is empty")
    if any(name.startswith(_PEFT) for name in stored) and not (file.parent / PEFT_CONFIG).is_file():
        refuse(f"peft's names, but no {PEFT_CONFIG} beside it, so alpha is unknown")
    for layer in layers:
        parts = [weights.get(f"{layer}.{part}.weight") for part in ("lora_A", "lora_B")]
        if not all(part is not None and part.ndim == 2 and part.numel() for part in parts):
            refuse(f"{layer} needs a lora_A and a lora_B of 2 dimensions")
    ranks = {layer: len(weights[f"{layer}.lora_A.weight"]) for layer in layers}
    found = []
    if alphas:
        found.append({name.removesuffix(".alpha"): float(alpha) for name, alpha in alphas.items()})
    if metadata is not None:
        own = {key.removeprefix("transformer."): value for key, value in metadata.items()}
        found.append(_alphas_of_settings(own, ranks, refuse))
    for name in (PEFT_CONFIG, LORA_CONFIG):
        if (file.parent / name).is_file():
            found.append(_alphas_of_settings(_settings_beside(file.parent / name, refuse), ranks, refuse))
    given = found[0] if found else {layer: float(rank) for layer, rank in ranks.items()}
    if given.keys() != ranks.keys():
        refuse("some layers have an alpha, others don't")
    for other in found[1:]:
        if differing := [layer for layer in ranks if not math.isclose(other[layer], given[layer], rel_tol=1e-4)]:
            layer = differing[0]
            refuse(f"its statements of alpha differ: {given[layer]:g} and {other[layer]:g} for {layer}")
    return Adapters(weights, given, refuse)


def _usual_name(name: str) -> str:
    """A tensor's name with the prefix that diffusers' converter expects."""
    name = re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name)  # of an adapter's own state_dict
    if match := _DIFFUSERS.fullmatch(name):
        return f"transformer.{match[1]}"
    if match := _ORIGINAL.fullmatch(name):
        return f"diffusion_model.{match[1]}".replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")
    return name


def _convert(
    layer: str, tensors: dict[str, torch.Tensor], family: Family, refuse: Callable[[str], None]
) -> dict[str, torch.Tensor | float]:
    """The tensors of one layer in diffusers' naming, without `transformer.`; alphas are floats.

    A layer of kohya's may become several; those whose lora_A is 0 are left out, they only fill the joined layer. The
    converter multiplies its weights by alpha / rank; alpha is then the rank.
    """
    alpha = None
    try:
        found = family.pipelines[0].lora_state_dict(dict(tensors), return_alphas=True)
        if not isinstance(found, tuple):  # FLUX.2's converter knows the alphas of kohya's names alone
            found = (found, None if any(".lora_down." in name for name in tensors) else {})
        converted, alphas = found
        alphas = None if alphas is None else {name: float(alpha) for name, alpha in alphas.items()}
        if "final_layer" in layer and f"{layer}.alpha" in tensors:  # which the converter throws away
            alpha = float(tensors[f"{layer}.alpha"])
    except Exception as error:  # half a dozen types for a naming that the converters don't know
        refuse(f"diffusers can't read {layer}: {type(error).__name__} {error}")
    converted = convert_unet_state_dict_to_peft(converted)
    if layer.startswith(("lora_unet_", "diffusion_model.")):  # outside the blocks the converter leaves out the prefix
        converted = {f"transformer.{name.removeprefix('transformer.')}": tensor for name, tensor in converted.items()}
    matches = [re.fullmatch(r"(transformer\..+)\.lora_[AB]\.weight", name) for name in converted]
    if not matches or not all(matches):
        name = family.pipelines[0].__name__
        refuse(f"{layer} isn't named as {name}.load_lora_weights wants it (transformer.… or lora_unet_…)")
    layers = list(dict.fromkeys(match[1] for match in matches))
    if alphas is None:
        ranks = {name: float(len(converted[f"{name}.lora_A.weight"])) for name in layers}
        alphas = {f"{name}.alpha": rank if alpha is None else alpha for name, rank in ranks.items()}
    if not all(math.isfinite(value) and value > 0 for value in alphas.values()):
        refuse(f"the alpha of {layer} isn't above 0")
    if len(layers) > 1:
        unused = tuple(f"{name}." for name in layers if not converted[f"{name}.lora_A.weight"].any())
        converted, alphas = (
            {name: value for name, value in part.items() if not name.startswith(unused)} for part in (converted, alphas)
        )
    return {name.removeprefix("transformer."): value for name, value in (converted | alphas).items()}


def _alphas_of_settings(settings: Any, ranks: dict[str, int], refuse: Callable[[str], None]) -> dict[str, float]:
    """Layer -> alpha by the settings of a peft LoraConfig, which must agree with the ranks of the weights."""
    defaults, alphas = LoraConfig().to_dict(), {}
    try:
        acting = {n: v for n, v in settings.items() if n not in _KNOWN_SETTINGS and v and v != defaults.get(n)}
        if settings.get("init_lora_weights") not in (True, False, None, "gaussian"):  # others change the base model
            acting["init_lora_weights"] = settings["init_lora_weights"]
        patterns = [settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
        if not all(re.fullmatch(r"\^?[\w.\\]+\$?", key) for pattern in patterns for key in pattern):
            raise ValueError("a pattern is no layer's name")
        for layer, rank in ranks.items():
            stated, alpha = (
                pattern.get(get_pattern_key(pattern, layer), settings[usual])
                for pattern, usual in zip(patterns, ("r", "lora_alpha"), strict=True)
            )
            if stated != rank:
                raise ValueError(f"{layer} has rank {rank}, its settings say {stated}")
            if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
                raise ValueError(f"alpha {alpha!r} is no number above 0")
            alphas[layer] = float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        refuse(f"its settings of rank and alpha aren't understood: {type(error).__name__} {error}")
    for name, value in acting.items():
        refuse(f"it was trained with {name} {value}, which isn't supported")
    return alphas


def _settings_beside(file: Path, refuse: Callable[[str], None]) -> Any:
    """The settings in PEFT_CONFIG or LORA_CONFIG, as those of a peft LoraConfig."""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        if file.name == PEFT_CONFIG:
            return given
        given = given.get("lora_params", given)
        rank, alpha = (
            next((given[name] for name in names if name in given), None)
            for names in (("lora_rank", "rank", "r"), ("lora_alpha", "alpha"))
        )
        return {"r": rank, "lora_alpha": alpha}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return refuse(f"{file.name} beside it holds no settings of rank and alpha: {error!r}")


def save_lora(folder: Path, weights: dict[str, torch.Tensor], transformer: ModelMixin, family: Family) -> None:
    """Writes adapters to LORA_FILE. weights: named as in the transformer, with its adapter `default`.

    Alpha is written as `.alpha` tensors, which all programs read, if the family's pipeline in diffusers does; else into
    the metadata, which only diffusers reads. It refuses a file that has both.
    """
    settings = transformer.peft_config["default"]
    named = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
    if family.alpha_tensors:
        alpha = torch.tensor(float(settings.lora_alpha))
        named |= {f"{name.partition('.lora_A.')[0]}.alpha": alpha.clone() for name in named if ".lora_A." in name}
        metadata = None
    else:
        metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.to_dict().items()}
    save = family.pipelines[0].save_lora_weights
    save(folder, transformer_lora_layers=named, transformer_lora_adapter_metadata=metadata)


def read_trained_lora(file: Path) -> dict[str, torch.Tensor]:
    """The adapters that `save_lora` wrote, without alpha, named as in a transformer whose adapter is `default`."""
    stored = {k.removeprefix("transformer."): v for k, v in load_file(file).items() if not k.endswith(".alpha")}
    return {re.sub(r"\.(lora_[AB])\.", r".\1.default.", name): tensor for name, tensor in stored.items()}
