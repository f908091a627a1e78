"""--sp_size: processes that compute each picture together give the samples, scores and updates of one process."""

import re

from fastvideo.data_preprocess.preprocess_flux_embedding import embed_prompts
from fastvideo.models.pretrained import check_sequence_split

import numpy as np
import pytest
import torch
from conftest import Run, assert_same_update, torchrun
from PIL import Image
from test_engines import LORA, UNEVEN, assert_same_numbers

SHARED = UNEVEN | {"image_log_steps": 1, "prompts_per_iteration": 2}


@pytest.fixture
def together(flags, tmp_path, subprocess_environment):
    """together(name, processes, flag=value, ...) -> the Run of these processes."""

    def run(name: str, processes: int, **given) -> Run:
        environment = subprocess_environment | {"NOTES": str(tmp_path)}
        done = torchrun(flags(output_dir=tmp_path / name, **given), environment, processes=processes)
        assert done.returncode == 0, done.stderr[-4000:]
        return Run(tmp_path / name)

    return run


def grids(run: Run) -> list[np.ndarray]:
    paths = sorted((run.folder / "images").iterdir())
    return [np.asarray(Image.open(path)).astype(int) for path in paths]


@pytest.fixture(scope="module")
def twelve_tokens(tiny_flux, prompts_file, tmp_path_factory):
    """Embeddings of 12 tokens, which two and four processes can divide. The tiny model's own length is 14."""
    return embed_prompts(tiny_flux, prompts_file, tmp_path_factory.mktemp("twelve"), max_sequence_length=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes,given",
    [
        (2, {}),
        (4, {}),
        (2, {"parallel": "fsdp", "gradient_checkpointing": True}),
        pytest.param(4, {"sp_size": 4}, marks=pytest.mark.long),
        pytest.param(4, {"parallel": "fsdp"}, marks=pytest.mark.long),
    ],
)
def test_processes_that_share_a_sequence_give_the_numbers_of_one(train, together, twelve_tokens, processes, given):
    common = SHARED | {"data_json_path": twelve_tokens}
    alone, shared = train(**common), together("shared", processes, **common | {"sp_size": 2} | given)
    assert_same_numbers(alone, shared)
    assert_same_update(alone, shared)
    for line in shared.metrics:
        assert line["ratio_first_deviation"] <= 1e-6
    for one, other in zip(grids(alone), grids(shared), strict=True):
        assert np.abs(one - other).max() <= 1  # rounding may move a value to the next


@pytest.mark.long
def test_adapters_and_the_divergence_from_the_base_model_are_shared_too(train, together):
    settings = {**SHARED, **LORA, "ref_kl_coeff": 0.1}
    assert_same_numbers(train(**settings), together("shared", 2, **settings, sp_size=2))


@pytest.mark.long
def test_fp8_steps_are_shared_too(train, together):
    settings = SHARED | {"rollout_precision": "fp8_emulated", "fp8_steps": "all"}
    alone, shared = train(**settings), together("shared", 2, **settings, sp_size=2)
    assert_same_numbers(alone, shared)
    drift = [run.metrics[0]["rollout_drift_latents"] for run in (alone, shared)]
    assert drift[1] == pytest.approx(drift[0], rel=1e-3) and drift[0] > 0


@pytest.mark.long
def test_a_frozen_copy_and_edge_probabilities_are_shared_too(train, together):
    settings = {
        "algorithm": "branch_grpo", "sampling_steps": 5, "tree_split_points": [0, 2], "num_generations": 4,
        "tree_fusion": "probability", "ref_kl_coeff": 0.1, "prompts_per_iteration": 2, "learning_rate": 1e-6,
        "reward_model": "custom_rewards:rough_brightness",
    }  # fmt: skip
    assert_same_numbers(train(**settings), together("shared", 4, **settings, sp_size=2))


@pytest.mark.long
def test_bf16_trains_where_norms_return_float32(flags, tmp_path, subprocess_environment):
    """The rounded gradient points in the direction of float32's, with two processes as well as with one."""
    gradients = {}
    for name, sp_size, precision in (("exact", 1, "no"), ("alone", 1, "bf16"), ("shared", 2, "bf16")):
        given = {"mixed_precision": precision, "sp_size": sp_size, "reward_model": "custom_rewards:by_place"}
        argv = flags(**SHARED | given, output_dir=tmp_path / name, max_train_steps=1)
        done = torchrun(argv, subprocess_environment, "tests/autocast_like_cuda.py", processes=sp_size)
        assert done.returncode == 0, done.stderr[-4000:]
        run = Run(tmp_path / name)
        assert run.metrics[0]["ratio_first_deviation"] <= 1e-6
        gradients[name] = run.gradient()
    alone, shared = (
        float(torch.nn.functional.cosine_similarity(gradients[name], gradients["exact"], dim=0))
        for name in ("alone", "shared")
    )
    assert shared > alone - 0.1 and alone > 0.4
    assert 0.4 < gradients["shared"].norm() / gradients["exact"].norm() < 2.5


@pytest.mark.slow
def test_a_picture_is_scored_once(together, tmp_path):
    together("shared", 4, **SHARED | {"reward_model": "custom_rewards:noted_brightness"}, sp_size=2)
    scored = {path.name: len(path.read_text().splitlines()) for path in tmp_path.glob("scored_by_*")}
    assert scored == {"scored_by_0": 8 + 2, "scored_by_2": 8}  # in 2 iterations, and before the run


@pytest.mark.long
def test_a_checkpoint_goes_on_with_another_sp_size(train, together):
    settings = SHARED | {"max_train_steps": 4, "checkpointing_steps": 2, "image_log_steps": 0}
    whole, shared = train("whole", **settings), together("shared", 2, **settings, sp_size=2)
    for name, rest in {
        "two": together("two", 2, **settings, sp_size=2, resume_from_checkpoint=whole.checkpoints[0]),
        "data": together("data", 2, **settings, resume_from_checkpoint=shared.checkpoints[0]),
    }.items():
        assert [line["step"] for line in rest.metrics] == [3, 4], name
        for line, other in zip(rest.metrics, whole.metrics[2:], strict=True):
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3), name
            assert line["reward"] == pytest.approx(other["reward"], rel=1e-3), name


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [None, "3"])
def test_processes_that_do_not_make_whole_groups_are_refused(train, capsys, monkeypatch, world_size, tmp_path):
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(SystemExit) as stop:
        train("out", sp_size=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "--sp_size 2" in line and f"which is {world_size or 1}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "height,text_tokens,parts,named",
    [(32, 16, 3, "4 attention heads"), (24, 16, 4, "9 image tokens (--h 24 --w 24)"), (32, 18, 4, "18 text tokens")],
)
def test_what_can_not_be_dealt_out_is_refused(tiny_flux, height, text_tokens, parts, named):
    check_sequence_split(tiny_flux, 32, 32, 16, 4)
    with pytest.raises(ValueError, match=f"sp_size {parts}: must divide the {re.escape(named)}"):
        check_sequence_split(tiny_flux, height, height, text_tokens, parts)


@pytest.mark.slow
def test_prompts_of_an_odd_length_are_refused_before_models_are_loaded(
    flags, tiny_flux, prompts_file, tmp_path, subprocess_environment
):
    index = embed_prompts(tiny_flux, prompts_file, tmp_path / "odd", max_sequence_length=13)
    done = torchrun(flags(data_json_path=index, sp_size=2), subprocess_environment)
    assert done.returncode != 0
    assert "train_grpo_flux.py: error: --sp_size 2: must divide the 13 text tokens" in done.stderr.splitlines()
