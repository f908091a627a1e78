"""The registry of rewards: names, mixes and weights; entries against models, documentation and download script."""

import inspect
import re
import subprocess
import sys
from dataclasses import asdict, fields
from importlib import import_module
from types import SimpleNamespace

from fastvideo.cli import FlagErrors
from fastvideo.io.devices import DTYPES
from fastvideo.models import reward_model
from fastvideo.models.reward_model.custom import FunctionReward
from fastvideo.models.reward_model.shapes import ShapesRewardModel
from fastvideo.models.reward_model.spec import (
    MIXES,
    REWARDS,
    SHARED,
    File,
    Reward,
    RewardConfig,
    RewardSpecConfig,
    resolve_reward_spec,
)
from fastvideo.models.reward_model.unified_reward import QUESTIONS
from fastvideo.models.reward_model.utils import build_reward_models, check_reward_files

import pytest
from conftest import ROOT
from PIL import Image
from reward_checkpoints import PICK_SCORE_FOLDER

DEFAULTS = {
    **asdict(RewardSpecConfig()),
    "reward_model": "shapes",
    "hps_path": "hps_ckpt/nothing.pt",
    "image_reward_score_dir": "nowhere",
    "reward_batch_size": 4,
}


def config(**changes):
    return SimpleNamespace(**{**DEFAULTS, **changes})


@pytest.mark.parametrize(
    "names,expected",
    [
        ("shapes", {"shapes": 1}),
        ("hpsv2_clip_score", {"hpsv2": 1, "clip_score": 1}),
        ("multi_reward", {"hpsv2": 1, "image_reward": 1, "pick_score": 1}),
        ("all", {"hpsv2": 1, "image_reward": 1, "clip_score": 1, "pick_score": 1}),
        ("hpsv2,image_reward:0.5", {"hpsv2": 1, "image_reward": 0.5}),
        (" jpeg_compressibility:2 , shapes:6 ", {"jpeg_compressibility": 2, "shapes": 6}),
        ("shapes,hpsv2:0", {"shapes": 1, "hpsv2": 0}),
        ("my.rewards:brightness", {"my.rewards:brightness": 1}),
        ("rewards:brightness:0.25,shapes:0.75", {"rewards:brightness": 0.25, "shapes": 0.75}),
    ],
)
def test_names_mixes_and_lists_give_normalised_weights(names, expected):
    total = sum(expected.values())
    found = resolve_reward_spec(config(reward_model=names))
    assert found == pytest.approx({name: weight / total for name, weight in expected.items()})


def test_mixes_take_unified_reward_in_when_there_is_a_url():
    found = resolve_reward_spec(config(reward_model="multi_reward", unified_reward_url="http://localhost:1"))
    assert list(found) == ["hpsv2", "image_reward", "pick_score", "unified_reward"]


def test_weight_flags_count_where_the_list_gives_no_weight():
    found = resolve_reward_spec(config(reward_model="hpsv2,pick_score,clip_score:1", hps_weight=2, clip_score_weight=9))
    assert found == pytest.approx({"hpsv2": 0.5, "pick_score": 0.25, "clip_score": 0.25})


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"reward_model": "hps"},
            "reward_model 'hps': unknown reward; choose from hpsv2, .*multi_reward.*; did you mean hpsv2\\?",
        ),
        ({"reward_model": "shapes,"}, "empty name"),
        ({"reward_model": ""}, "empty name"),
        ({"reward_model": None}, "empty name"),
        ({"reward_model": "shapes,shapes:2"}, "shapes is named twice"),
        ({"reward_model": "multi_reward,hpsv2"}, "hpsv2 is named twice"),
        ({"reward_model": "multi_reward:2"}, "weigh the parts of multi_reward one by one"),
        ({"reward_model": "shapes:"}, "'' is not a weight"),
        ({"reward_model": "shapes:much"}, "'much' is not a weight"),
        ({"reward_model": "shapes:-1"}, "weight -1.0 of shapes must be a finite number >= 0"),
        ({"reward_model": "shapes:nan"}, "weight nan of shapes"),
        ({"reward_model": "shapes:inf"}, "weight inf of shapes"),
        ({"reward_model": "my.rewards:f:nan"}, "weight nan of my.rewards:f"),
        ({"reward_model": "hpsv2", "hps_weight": -1}, "hps_weight: weight -1.0 of hpsv2"),
        ({"reward_model": "hpsv2:0,shapes:0"}, "the weights of hpsv2, shapes are all 0"),
    ],
)
def test_wrong_names_and_weights_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve_reward_spec(config(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"reward_model": "hpsv2"}, "hps_path hps_ckpt/nothing.pt: no such file; the HPSv2 checkpoint"),
        ({"reward_model": "image_reward"}, "image_reward_score_dir nowhere/model_large.pth: no such file; BLIP"),
        (
            {"reward_model": "image_reward", "image_reward_mode": "overall", "image_reward_path": "./ImageReward.pt"},
            "image_reward_path ./ImageReward.pt: no such file",
        ),
        ({"reward_model": "image_reward", "image_reward_mode": "best"}, "image_reward_mode 'best': choose from"),
        (
            {"reward_model": "image_reward", "image_reward_mode": "overall", "image_reward_med_config": "med.json"},
            "image_reward_med_config med.json: no such file",
        ),
        (
            {"reward_model": "clip_score", "clip_score_path": "/no/where.bin"},
            "clip_score_path /no/where.bin: no",
        ),
        ({"reward_model": "pick_score", "pick_score_path": ""}, "pick_score_path: not given"),
        ({"reward_model": "unified_reward"}, "unified_reward_url: not given"),
        ({"reward_device": "gpu"}, "reward_device gpu: choose from cpu"),
        ({"reward_device": "cuda:64"}, "reward_device cuda:64: choose from cpu"),
        ({"granular_start_weights": [1, 2]}, "granular_start_weights .* one for each of binding, form, clean"),
        ({"reward_model": "no_such_module:reward"}, "no module 'no_such_module'"),
        ({"reward_model": "math:no_such_function"}, "math has no 'no_such_function'"),
        ({"reward_model": "math:pi"}, "pi is not callable"),
    ],
)
def test_what_a_reward_lacks_is_said_before_anything_loads(changes, message):
    with pytest.raises(ValueError, match=message):
        check_reward_files(config(**changes))
    with pytest.raises(ValueError, match=message):
        build_reward_models(config(**changes), "cpu")


def test_hub_names_are_left_to_the_loaders():
    check_reward_files(config(reward_model="clip_score,pick_score"))
    check_reward_files(config(reward_model="image_reward"), evaluation=True)


def test_tiny_rewards_are_built_with_their_schedule():
    models, weights = build_reward_models(
        config(reward_model="shapes:3,jpeg_compressibility", granular_schedule="exponential", granular_gamma=3.0), "cpu"
    )
    assert weights == {"ShapesRewardModel": 0.75, "JpegCompressibilityRewardModel": 0.25}
    assert models.keys() == weights.keys() and all(models[name].name == name for name in models)
    shapes = models["ShapesRewardModel"]
    assert isinstance(shapes, ShapesRewardModel) and (shapes.schedule, shapes.gamma) == ("exponential", 3.0)
    assert shapes.component_names == ("binding", "form", "clean") and shapes.check_names == ("right",)


def test_rewards_run_where_reward_device_says(narrow_rewards):
    paths = {"pick_score_path": str(narrow_rewards / PICK_SCORE_FOLDER)}
    for device, wanted in ((None, "meta"), ("cpu", "cpu")):
        models, _ = build_reward_models(config(reward_model="pick_score", reward_device=device, **paths), "meta")
        model = models["PickScoreRewardModel"]
        assert model.device == wanted and {p.device.type for p in model.model.parameters()} == {wanted}


def model_class(entry):
    module, name = entry.model.split(":")
    return getattr(import_module(f"fastvideo.models.reward_model.{module}"), name)


@pytest.mark.parametrize("key", REWARDS)
def test_an_entry_fits_its_model_and_the_settings(key):
    entry = REWARDS[key]
    taken = inspect.signature(model_class(entry)).parameters
    assert entry.arguments.keys() <= taken.keys() and set(entry.decisive) <= entry.arguments.keys()
    required = {name for name, parameter in taken.items() if parameter.default is parameter.empty}
    assert required <= {*entry.arguments, *SHARED}
    assert bool(entry.mode) == ("mode" in taken)
    evaluated = {field.name for field in fields(RewardConfig)}
    settings = {field.name for field in fields(RewardSpecConfig)}
    assert {*entry.arguments.values(), *(file.field for file in entry.files)} <= evaluated  # evaluation needs them too
    assert {*filter(None, (entry.weight, entry.mode)), *SHARED.values()} <= settings
    assert entry.files or not entry.download


def test_choices_of_flags_are_what_the_code_knows():
    choices = {field.name: field.metadata.get("choices") for field in fields(RewardSpecConfig)}
    assert choices["reward_dtype"] == list(DTYPES)
    assert choices["unified_reward_default_question_type"] == list(QUESTIONS)


def test_the_registry_is_read_without_torch_and_without_a_model():
    """Every command line imports the registry, also for --help."""
    code = "import sys, fastvideo.models.reward_model.spec; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "numpy", "PIL", "transformers", "diffusers", "open_clip", "ImageReward", "httpx"}


def test_the_table_in_the_docs_has_a_row_per_reward_with_its_keys():
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs/rewards.md").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row) == 6 and "`" in row[0]][1:]  # without the header
    named = {}
    for row in rows:
        for key in re.findall(r"`(\w+)`", row[0].partition(",")[0] if "mode" in row[0] else row[0]):
            named.setdefault(key, row[-1])
    assert named.keys() == REWARDS.keys()
    for key, entry in REWARDS.items():
        shown = re.findall(r"`([\w…]+)`", named[key])
        parts = {f"…_{part}" for part in (*entry.components, *entry.checks, *entry.details)}
        assert {model_class(entry).name, *parts} <= set(shown), key


def test_the_docs_name_every_mix():
    text = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    assert all(f"`{mix}`" in text for mix in MIXES)


@pytest.mark.parametrize("key", [key for key, entry in REWARDS.items() if entry.download])
def test_the_download_script_gets_what_an_entry_needs_to_where_its_flags_point(key):
    entry, defaults = REWARDS[key], RewardSpecConfig()
    command = ["bash", "scripts/huggingface/download_checkpoints.sh", entry.download, "--dry_run"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in entry.files:
        setting = getattr(defaults, file.field)
        if setting is None or setting == "ImageReward-v1.0":  # then the model looks into image_reward_score_dir
            continue
        wanted = f"{setting}/{file.name}" if file.name else setting.removeprefix("hf-hub:")
        assert wanted in listed, file


NEW_REWARD = """
class MadeUp:
    name = "MadeUp"

    def __init__(self, path, scale=2.0, batch_size=1, evaluation=False):
        self.settings = open(path).read(), scale, batch_size, evaluation

    def __call__(self, images, prompts):
        return [image.convert("RGB").getpixel((0, 0))[0] for image in images]
"""


def test_a_new_reward_is_one_file_and_one_entry(tmp_path, monkeypatch):
    (tmp_path / "made_up.py").write_text(NEW_REWARD)
    monkeypatch.setattr(reward_model, "__path__", [*reward_model.__path__, str(tmp_path)])
    files = (File("red_path", "the list of reds"),)
    entry = Reward("made_up:MadeUp", {"path": "red_path"}, weight="red_weight", files=files)
    monkeypatch.setitem(REWARDS, "made_up", entry)
    given = {"reward_model": "shapes,made_up", "red_path": str(tmp_path / "reds.txt"), "red_weight": 3.0}
    with pytest.raises(ValueError, match=r"red_path .*reds.txt: no such file; the list of reds belongs there$"):
        check_reward_files(config(**given))
    (tmp_path / "reds.txt").write_text("carmine")
    models, weights = build_reward_models(config(**given), "cpu", evaluation=True)
    assert weights == {"ShapesRewardModel": 0.25, "MadeUp": 0.75}
    assert models["MadeUp"].settings == ("carmine", 2.0, 4, True)
    assert models["MadeUp"]([Image.new("RGB", (2, 2), (7, 0, 0))], ["x"]) == [7]
    del given["red_weight"]  # an evaluation's settings have no weights
    assert resolve_reward_spec(config(**given)) == {"shapes": 0.5, "made_up": 0.5}


def test_another_setting_can_name_the_rewards_and_errors_name_it():
    given = config(held_out="shapes:2,jpeg_compressibility:2", reward_model="none of these")
    assert resolve_reward_spec(given, "held_out") == {"shapes": 0.5, "jpeg_compressibility": 0.5}
    assert list(build_reward_models(given, "cpu", field="held_out")[1].values()) == [0.5, 0.5]
    for wrong, message in (("hps", "^held_out 'hps': unknown"), ("math:pi", "^held_out math:pi: pi is not callable")):
        with pytest.raises(ValueError, match=message):
            check_reward_files(config(held_out=wrong), field="held_out")


def test_everything_that_rewards_lack_is_named_at_once():
    with pytest.raises(FlagErrors) as found:
        check_reward_files(config(reward_model="hpsv2,image_reward", image_reward_path="gone/ImageReward.pt"), True)
    assert [error.field for error in found.value.errors] == ["hps_path", "image_reward_path"]


def test_a_custom_reward_is_a_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def brightness(images, prompts):\n    return [image.convert('L').getpixel((0, 0)) for image in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    models, weights = build_reward_models(config(reward_model="my_rewards:brightness"), "cpu")
    assert weights == {"brightness": 1.0}
    assert models["brightness"]([Image.new("L", (2, 2), 7)], ["x"]) == [7]


def test_a_custom_reward_that_empties_its_lists_leaves_the_pictures_to_other_rewards(tmp_path, monkeypatch):
    (tmp_path / "greedy_reward.py").write_text(
        "def greedy(images, prompts):\n    return [images.pop() and prompts.pop() and 1.0 for _ in range(2)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    images, prompts = [Image.new("RGB", (8, 8))] * 2, ["a", "b"]
    assert FunctionReward("greedy_reward:greedy")(images, prompts) == [1.0, 1.0]
    assert len(images) == len(prompts) == 2


def test_an_import_error_inside_a_custom_reward_is_shown_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        check_reward_files(config(reward_model="broken_rewards:reward"))


def test_tiny_rewards_import_no_scorer_packages():
    code = (
        "import sys; from types import SimpleNamespace; from fastvideo.models.reward_model.utils import *;"
        f"build_reward_models(SimpleNamespace(**{config()!r}.__dict__), 'cpu');"
        "print([m for m in ('open_clip', 'ImageReward', 'transformers', 'httpx', 'hpsv2') if m in sys.modules])"
    ).replace("namespace(", "SimpleNamespace(")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
