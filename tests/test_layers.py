"""Imports point downwards: a module imports only from lower layers, or from its own without a circle. Imports inside
functions and under TYPE_CHECKING count."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [  # lowest first; a name covers a module, or all modules of a package that no other name covers
    "torchvision_repair cli familiar_flags reference_flags config family_defaults io utils.steps "
    "models.reward_model.spec models.reward_model.granular",
    "utils.picture_measures dataset models.family models.flux models.flux2 models.float8 models.float8_kernel "
    "models.int8 models.lora models.original models.pretrained models.speed",
    "utils rollout_plan",
    "models.reward_model",
    "runtime",
    "train train_grpo_flux torchrun __main__ sample eval data_preprocess models.reward_model.server models.merge_lora",
]


def modules() -> dict[str, Path]:
    """Name without `fastvideo.` -> file."""
    package = ROOT / "fastvideo"
    files = {path.relative_to(package).with_suffix(""): path for path in package.rglob("*.py")}
    return {".".join(name.parts): path for name, path in files.items() if name.name != "__init__"}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of this package that a file imports, at any place in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix("fastvideo.") for name in names if name.startswith("fastvideo.")}
    return found & known.keys()


def layer(module: str) -> int:
    """The layer of the longest name in LAYERS that covers the module."""
    names = {name: i for i, names in enumerate(LAYERS) for name in names.split()}
    covering = [name for name in names if f"{module}.".startswith(f"{name}.")]
    assert covering, f"{module} belongs to no layer"
    return names[max(covering, key=len)]


def test_every_import_points_to_a_lower_layer_or_its_own() -> None:
    known = modules()
    upwards = [f"{a} -> {b}" for a, path in known.items() for b in imports(path, known) if layer(b) > layer(a)]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {name: imports(path, known) for name, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_nothing_in_the_package_leans_on_test_tools() -> None:
    tools = ("unittest", "pytest", "hypothesis")
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            )
            assert not any(name.split(".")[0] in tools for name in names), path
