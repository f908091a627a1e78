import sys
from types import SimpleNamespace

from fastvideo.models.reward_model.shapes import ShapesRewardModel
from fastvideo.models.reward_model.utils import REWARDS, build_reward_models, check_reward_files, resolve_reward_spec

import pytest
from PIL import Image
from reward_checkpoints import PICK_SCORE_FOLDER

DEFAULTS = dict(
    reward_model="shapes",
    hps_weight=1.0,
    clip_score_weight=1.0,
    image_reward_weight=1.0,
    pick_score_weight=1.0,
    unified_reward_weight=1.0,
    reward_server=None,
    hps_path="hps_ckpt/nothing.pt",
    hps_clip_path=None,
    clip_score_path="hf-hub:apple/DFN5B-CLIP-ViT-H-14-384",
    clip_score_http_proxy=None,
    clip_score_https_proxy=None,
    image_reward_path="ImageReward-v1.0",
    image_reward_med_config=None,
    image_reward_score_dir="nowhere",
    image_reward_mode="granular",
    pick_score_path="yuvalkirstain/PickScore_v1",
    pick_score_http_proxy=None,
    pick_score_https_proxy=None,
    unified_reward_url=None,
    unified_reward_default_question_type="semantic",
    unified_reward_num_workers=1,
    granular_start_weights=[0.5, 0.3, 0.2],
    granular_end_weights=[0.2, 0.5, 0.3],
    granular_schedule="linear",
    granular_gamma=None,
    reward_batch_size=4,
    reward_device=None,
    reward_dtype="fp32",
)


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
            "--reward_model 'hps': unknown reward; choose from hpsv2, .*multi_reward",
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
        ({"reward_model": "hpsv2", "hps_weight": -1}, "--hps_weight: weight -1.0 of hpsv2"),
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
        ({"reward_model": "hpsv2"}, "--hps_path hps_ckpt/nothing.pt: no such file; the HPSv2 checkpoint"),
        ({"reward_model": "image_reward"}, "--image_reward_score_dir nowhere/model_large.pth: no such file; BLIP"),
        (
            {"reward_model": "image_reward", "image_reward_mode": "overall", "image_reward_path": "./ImageReward.pt"},
            "--image_reward_path ./ImageReward.pt: no such file",
        ),
        ({"reward_model": "image_reward", "image_reward_mode": "best"}, "--image_reward_mode 'best': choose from"),
        (
            {"reward_model": "image_reward", "image_reward_mode": "overall", "image_reward_med_config": "med.json"},
            "--image_reward_med_config med.json: no such file",
        ),
        (
            {"reward_model": "clip_score", "clip_score_path": "/no/where.bin"},
            "--clip_score_path /no/where.bin: no",
        ),
        ({"reward_model": "pick_score", "pick_score_path": ""}, "--pick_score_path is empty"),
        ({"reward_model": "unified_reward"}, "--unified_reward_url is empty"),
        ({"reward_device": "gpu"}, "--reward_device gpu: choose from cpu"),
        ({"reward_device": "cuda:64"}, "--reward_device cuda:64: choose from cpu"),
        ({"granular_start_weights": [1, 2]}, "--granular_start_weights .* one for each of binding, form, clean"),
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
    assert REWARDS["shapes"].components == shapes.component_names == ("binding", "form", "clean")
    assert REWARDS["shapes"].checks == shapes.check_names == ("right",)


def test_rewards_run_where_reward_device_says(narrow_rewards):
    paths = {"pick_score_path": str(narrow_rewards / PICK_SCORE_FOLDER)}
    for device, wanted in ((None, "meta"), ("cpu", "cpu")):
        models, _ = build_reward_models(config(reward_model="pick_score", reward_device=device, **paths), "meta")
        model = models["PickScoreRewardModel"]
        assert model.device == wanted and {p.device.type for p in model.model.parameters()} == {wanted}


def test_registry_and_real_models_name_the_same_components():
    from fastvideo.models.reward_model.image_reward import COMPONENTS

    assert REWARDS["image_reward"].components == COMPONENTS
    assert [name for name, reward in REWARDS.items() if reward.checks] == ["shapes"]  # the others answer no question


def test_a_custom_reward_is_a_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def brightness(images, prompts):\n    return [image.convert('L').getpixel((0, 0)) for image in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    models, weights = build_reward_models(config(reward_model="my_rewards:brightness"), "cpu")
    assert weights == {"brightness": 1.0}
    assert models["brightness"]([Image.new("L", (2, 2), 7)], ["x"]) == [7]


def test_an_import_error_inside_a_custom_reward_is_shown_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        check_reward_files(config(reward_model="broken_rewards:reward"))


def test_tiny_rewards_import_no_scorer_packages():
    import subprocess

    code = (
        "import sys; from types import SimpleNamespace; from fastvideo.models.reward_model.utils import *;"
        f"build_reward_models(SimpleNamespace(**{config()!r}.__dict__), 'cpu');"
        "print([m for m in ('open_clip', 'ImageReward', 'transformers', 'httpx', 'hpsv2') if m in sys.modules])"
    ).replace("namespace(", "SimpleNamespace(")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
