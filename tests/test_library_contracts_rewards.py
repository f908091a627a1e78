"""Contracts with libraries of the rewards: one test per private or version-dependent name that our code relies on.

An upgrade that changes such a name fails here, and the message gives the library's version and the file to change.
"""

import importlib
import inspect
import sys
from importlib.metadata import version
from types import ModuleType

from fastvideo.models.reward_model.image_reward_compat import bert_tokenizer, import_image_reward
from fastvideo.models.reward_model.loading import check_tokenizer

import pytest
import torch
from reward_checkpoints import PICK_SCORE_FOLDER, make_bert_tokenizer, narrow_architectures


def changed(distribution: str, what: str, where: str) -> str:
    """The failure message."""
    return f"{distribution} {version(distribution)}: {what}; see fastvideo/models/reward_model/{where}.py"


# --- image-reward -----------------------------------------------------------------------------------------------------


def image_reward(module: str) -> ModuleType:
    import_image_reward()
    return importlib.import_module(f"ImageReward{module}")


def test_image_reward_imports_its_trainer_at_the_top_level_under_this_name():
    assert "from .ReFL import" in inspect.getsource(image_reward("")), changed(
        "image-reward", "no import of ReFL to replace by an empty module", "image_reward_compat"
    )


def test_image_reward_s_blip_gets_its_tokenizer_from_init_tokenizer():
    module = image_reward(".models.BLIP.blip_pretrain")
    assert "init_tokenizer()" in inspect.getsource(module.BLIP_Pretrain), changed(
        "image-reward", "BLIP_Pretrain doesn't call init_tokenizer()", "image_reward_compat"
    )


def test_image_reward_has_its_own_bert_base_class():
    bert = image_reward(".models.BLIP.med").BertPreTrainedModel
    assert bert.__module__.startswith("ImageReward"), changed(
        "image-reward", "BertPreTrainedModel isn't its own class, so methods would be added to transformers'",
        "image_reward_compat",
    )  # fmt: skip


@pytest.fixture(scope="module")
def image_reward_models(all_narrow_files, tmp_path_factory):
    """(BLIPScore, ImageReward) of the package, narrow."""
    folder = all_narrow_files / "image_reward_ckpt"
    with pytest.MonkeyPatch.context() as patch:
        narrow_architectures(patch, tmp_path_factory.mktemp("architectures"))
        package = import_image_reward(str(folder / "bert-base-uncased"))
        med_config = str(folder / "med_config.json")
        yield package.BLIPScore(med_config=med_config), package.ImageReward(med_config=med_config, device="cpu")


@pytest.mark.parametrize("name", ["blip", "preprocess"])
def test_image_reward_s_blip_scorer_holds(image_reward_models, name):
    assert hasattr(image_reward_models[0], name), changed("image-reward", f"no BLIPScore.{name}", "image_reward")


@pytest.mark.parametrize("name", ["blip", "mlp", "mean", "std", "preprocess"])
def test_image_reward_s_model_holds(image_reward_models, name):
    assert hasattr(image_reward_models[1], name), changed("image-reward", f"no ImageReward.{name}", "image_reward")


@pytest.mark.parametrize("name", ["visual_encoder", "vision_proj", "text_encoder", "text_proj", "tokenizer"])
def test_image_reward_s_blip_holds(image_reward_models, name):
    assert hasattr(image_reward_models[0].blip, name), changed(
        "image-reward", f"no BLIP_Pretrain.{name}", "image_reward"
    )


def test_image_reward_s_text_encoder_reads_text_without_a_picture_in_mode_text(image_reward_models):
    encoder, ones = image_reward_models[0].blip.text_encoder, torch.ones(1, 5, dtype=torch.long)
    hidden = encoder(ones, attention_mask=ones, mode="text").last_hidden_state
    assert hidden.shape[:2] == (1, 5), changed(
        "image-reward", f"mode 'text' gives {tuple(hidden.shape)}", "image_reward"
    )


def test_image_reward_s_aesthetic_head_takes_the_width_of_the_features():
    mlp = image_reward(".models.AestheticScore").MLP
    assert mlp(8)(torch.zeros(2, 8)).shape == (2, 1), changed(
        "image-reward", "MLP(width) scores no [n, width]", "image_reward"
    )


def test_image_reward_s_download_takes_an_address_and_a_folder():
    parameters = list(inspect.signature(image_reward("").ImageReward_download).parameters)
    assert parameters == ["url", "root"], changed("image-reward", f"ImageReward_download{parameters}", "image_reward")


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["apply_chunking_to_forward", "prune_linear_layer"])
def test_transformers_still_has_what_image_reward_s_bert_imports(name):
    from transformers import modeling_utils, pytorch_utils

    assert callable(getattr(pytorch_utils, name, None) or getattr(modeling_utils, name, None)), changed(
        "transformers", f"neither pytorch_utils nor modeling_utils has {name}", "image_reward_compat"
    )


def test_transformers_tokenizer_keeps_blip_s_special_tokens(tmp_path):
    make_bert_tokenizer(tmp_path / "bert", 100)
    tokenizer = bert_tokenizer(str(tmp_path / "bert"))
    added = (tokenizer.bos_token, tokenizer.enc_token_id, len(tokenizer))
    assert added == ("[DEC]", 101, 102), changed(
        "transformers", f"special tokens became {added}", "image_reward_compat"
    )


def test_transformers_tokenizer_without_a_vocabulary_is_recognised():
    from transformers import BertTokenizer

    empty = BertTokenizer()
    with pytest.raises(OSError, match="no vocabulary"):
        check_tokenizer(empty, "nowhere")
        pytest.fail(changed("transformers", f"a tokenizer of {len(empty)} tokens passes for a whole one", "loading"))


@pytest.fixture(scope="module")
def clip_model(all_narrow_files):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(all_narrow_files / PICK_SCORE_FOLDER, output_loading_info=True)


@pytest.mark.parametrize("key", ["missing_keys", "mismatched_keys"])
def test_transformers_reports_weights_that_don_t_fit(clip_model, key):
    assert not clip_model[1].get(key, "absent"), changed("transformers", f"no empty {key} in the report", "pick_score")


@pytest.mark.parametrize("method", ["get_image_features", "get_text_features"])
def test_transformers_clip_gives_projected_features(clip_model, method):
    from fastvideo.models.reward_model.pick_score import _features

    model = clip_model[0]
    argument = (
        {"pixel_values": torch.zeros(1, 3, 224, 224)} if "image" in method else {"input_ids": torch.ones(1, 5).long()}
    )
    features = _features(getattr(model, method)(**argument))
    assert features.shape == (1, model.config.projection_dim), changed(
        "transformers", f"{method} gives {tuple(features.shape)}", "pick_score"
    )


def test_transformers_mask2former_asks_for_scipy_under_this_name():
    from transformers.models.mask2former import modeling_mask2former as module

    asks = 'requires_backends(self, ["scipy"])' in inspect.getsource(module.Mask2FormerLoss.__init__)
    assert asks and callable(module.requires_backends), changed("transformers", "no such check", "geneval")


# --- open_clip --------------------------------------------------------------------------------------------------------


def test_open_clip_reads_a_new_architecture_from_a_file():
    import open_clip

    assert callable(getattr(open_clip, "add_model_config", None)), changed(
        "open_clip_torch", "no add_model_config", "clip_score"
    )


@pytest.mark.parametrize("name", ["image_mean", "image_std", "image_interpolation", "image_resize_mode"])
def test_open_clip_takes_the_preprocessing_of_a_repository(name):
    import open_clip

    assert name in inspect.signature(open_clip.create_model_and_transforms).parameters, changed(
        "open_clip_torch", f"create_model_and_transforms takes no {name}", "clip_score"
    )


def test_open_clip_s_model_tells_its_picture_size_and_scale(narrow_rewards):
    import open_clip

    model = open_clip.create_model("ViT-H-14")
    assert tuple(model.visual.image_size) == (224, 224), changed("open_clip_torch", "no visual.image_size", "hps_score")
    assert model.logit_scale.shape == (), changed("open_clip_torch", "logit_scale is no number", "clip_base")


def test_open_clip_names_openai_s_normalisation():
    from open_clip import constants

    assert len(constants.OPENAI_DATASET_MEAN) == len(constants.OPENAI_DATASET_STD) == 3, changed(
        "open_clip_torch", "no three channels", "hps_score"
    )


# --- clip (clip-anytorch) ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai_clip(all_narrow_files):
    import clip

    return clip.load(str(all_narrow_files / "image_reward_ckpt" / "ViT-L-14.pt"), device="cpu", jit=False)[0]


def test_clip_loads_a_file_without_asking_for_its_sum(openai_clip):
    assert isinstance(openai_clip, torch.nn.Module), changed("clip-anytorch", "load() of a file", "image_reward")


@pytest.mark.parametrize("name", ["visual.input_resolution", "text_projection.shape"])
def test_clip_s_model_tells_its_sizes(openai_clip, name):
    found = openai_clip
    for part in name.split("."):
        found = getattr(found, part, None)
    assert found, changed("clip-anytorch", f"no {name}", "image_reward")


def test_clip_s_tokenizer_cuts_long_prompts():
    import clip

    shape = clip.tokenize(["long " * 200], truncate=True).shape
    assert shape == (1, 77), changed("clip-anytorch", f"tokenize gives {tuple(shape)}", "image_reward")


# --- huggingface_hub --------------------------------------------------------------------------------------------------


def test_the_hub_s_client_is_made_again_after_close_session(monkeypatch):
    from huggingface_hub import close_session, get_session

    first = get_session()
    close_session()
    assert get_session() is not first, changed(
        "huggingface_hub", "close_session keeps the client and its proxies", "loading"
    )


def test_the_hub_s_client_library_has_a_base_class_of_its_errors():
    from huggingface_hub import get_session

    library = sys.modules[type(get_session()).__module__.partition(".")[0]]
    assert issubclass(getattr(library, "HTTPError", int), Exception), changed(
        "huggingface_hub", f"its HTTP client is {library.__name__}, without HTTPError", "loading"
    )
