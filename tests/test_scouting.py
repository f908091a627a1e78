"""Scouting: candidates sampled in few steps, of which the best and the worst are sampled in full and trained."""

import math
import re

from fastvideo import train_grpo_flux
from fastvideo.cli import parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.eval.plots import plan_plots
from fastvideo.models.family import LatentShape
from fastvideo.models.pretrained import meta_vae
from fastvideo.rollout_plan import describe
from fastvideo.runtime.memory import predict_memory
from fastvideo.runtime.scoring import Scoring
from fastvideo.utils.sampling_utils import Noise
from fastvideo.utils.scouting import Scouted, at_random, extremes, rank_correlation

import numpy as np
import pytest
import torch
from conftest import TINY, Run, assert_same_update, same_weights, torchrun

NAN = math.nan
SCOUTS = {"scouts": 8, "scout_steps": 2, "reward_model": "custom_rewards:rough_brightness", "learning_rate": 1e-5}
MIX, V_GRPO = {"algorithm": "mix_grpo", "init_same_noise": False}, {"algorithm": "v_grpo"}


def config(**given) -> GRPOConfig:
    return GRPOConfig.create(data_json_path="unused", reward_model="shapes", **given)


# --- which candidates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores,count,expected",
    [
        ([0.5, 0.9, 0.1, 0.7, 0.3, 0.6], 4, [1, 2, 3, 4]),
        ([0.5, 0.9, 0.1, 0.7, 0.3, 0.6], 3, [1, 2, 3]),  # one more of the best
        ([0.5, NAN, 0.1, 0.7, 0.3, NAN], 4, [0, 2, 3, 4]),  # failed ones are left out
        ([NAN, NAN, 0.2, NAN, 0.1, 0.3], 4, [0, 2, 4, 5]),  # too few have a score: the first failed one fills up
        ([NAN] * 6, 4, [0, 1, 2, 3]),
        ([0.4] * 6, 4, [0, 1, 4, 5]),  # of equal ones the first count as better
    ],
)
def test_the_best_and_the_worst_are_picked_in_the_order_of_their_numbers(scores, count, expected):
    assert extremes(np.array(scores), count).tolist() == expected


def test_random_picks_depend_on_seed_iteration_and_prompt_and_not_on_scores():
    settings = config(algorithm="v_grpo", scouts=9, num_generations=3, scout_pick="random")

    def picks(number: int, scores: np.ndarray) -> np.ndarray:
        return Scouted.of(settings, number, {"a": scores}, {"a": np.ones(9)}).picks

    rng = np.random.default_rng(0)
    first, second = (picks(number, rng.random((40, 9))) for number in (1, 2))
    assert np.array_equal(first, picks(1, rng.random((40, 9)))) and not np.array_equal(first, second)
    assert (np.diff(first) > 0).all() and len(np.unique(first)) == 9 and len(np.unique(first, axis=0)) > 20
    some = np.array([NAN, 1, NAN, 2, NAN, 3])
    assert {*at_random(some, 3, rng)} == {1, 3, 5} and {*at_random(some, 4, rng)} > {1, 3, 5}


@pytest.mark.parametrize("mix,expected", [("advantage_aggr", [0, 1, 3, 5]), ("reward_aggr", [0, 1, 3, 4])])
def test_candidates_are_ranked_by_what_trains_them(mix, expected):
    """Two models on different scales: advantages are added, or the weighted rewards, in which the second decides."""
    scores = {"small": np.array([[0.9, 0.5, 0.4, 0.1, 0.5, NAN]]), "large": np.array([[50.0, 70, 45, 10, 30, 20]])}
    weights = {name: np.full(6, 0.5) for name in scores}
    settings = config(algorithm="v_grpo", scouts=6, num_generations=4, gradient_accumulation_steps=2,
                      multi_reward_mix=mix)  # fmt: skip
    scouted = Scouted.of(settings, 1, scores, weights)
    assert np.isnan(scouted.rewards[0, 5]) == (mix == "reward_aggr")  # where one failed score fails the picture
    assert scouted.picks.tolist() == [expected]


def test_the_rank_correlation_is_spearmans():
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([10, 30, 20, 40])) == pytest.approx(0.8)  # 1 − 6·2/60
    assert rank_correlation(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    # Equal values share the mean of their ranks: 1, 2.5, 2.5, 4 against 1, 2, 3, 4 is 4.5/√(4.5·5).
    assert rank_correlation(np.array([0, 5, 5, 9]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / math.sqrt(22.5))
    assert rank_correlation(np.array([1, NAN, 3, 4]), np.array([1, 9, NAN, 2])) == pytest.approx(1)
    for unknown in ([5, 5, 5], [NAN, NAN, 1], [NAN, NAN, NAN]):
        assert math.isnan(rank_correlation(np.array(unknown), np.array([1, 2, 3])))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def noted(monkeypatch) -> dict[str, list]:
    """What a run does: its rollouts (plan, initial latents, noise, result), its picks, and its scoring."""
    seen: dict[str, list] = {"rollouts": [], "scouted": [], "progress": []}
    sample, pick, compute = train_grpo_flux.rollout, Scouted.of, Scoring.compute

    def rollout(plan, latents, prompts, velocity, noise, *rest):
        result = sample(plan, latents, prompts, velocity, noise, *rest)
        seen["rollouts"].append((plan, latents, noise, result.latents))
        return result

    def of(*given):
        seen["scouted"].append(pick(*given))
        return seen["scouted"][-1]

    def computed(self, images, prompts, models, metadata, **progress):
        found = compute(self, images, prompts, models, metadata=metadata, **progress)
        seen["progress"].append((len(images), progress, next(iter(found.values()))))
        return found

    monkeypatch.setattr(train_grpo_flux, "rollout", rollout)
    monkeypatch.setattr(Scouted, "of", of)
    monkeypatch.setattr(Scoring, "compute", computed)
    return seen


@pytest.mark.parametrize("algorithm", [MIX, V_GRPO, {**MIX, "algorithm": "mix_grpo_flash"}], ids=str)
def test_trained_samples_have_the_noise_of_the_picked_candidates(train, noted, algorithm):
    run = train(**SCOUTS, **algorithm, train_batch_size=2)
    for number, (line, scouted) in enumerate(zip(run.metrics, noted["scouted"], strict=True), start=1):
        (scouts, start, _, drawn), (plan, picked, noise, samples) = noted["rollouts"][2 * number - 2 : 2 * number]
        assert (scouts.pictures, plan.pictures) == (8, 4) and scouted.picks.shape == (2, 4)
        assert (np.diff(scouted.rewards.take(scouted.picks[0])) != 0).any()
        chosen = torch.from_numpy(scouted.picks)[:, :, None, None]
        assert torch.equal(picked, start.unflatten(0, (2, 8)).take_along_dim(chosen, 1).flatten(0, 1))
        whole = Noise(714, number, range(2), noise.shape)  # of candidates 0 … 7
        for stream in (1, len(plan)):
            expected = whole(stream, 8).unflatten(0, (2, 8)).take_along_dim(chosen, 1).flatten(0, 1)
            assert torch.equal(noise(stream, 4), expected)
        if plan.draws:  # no noise on the way: a sample is its candidate's picture, drawn more finely
            drawn = drawn.unflatten(0, (2, 8)).take_along_dim(chosen, 1)
            apart = (samples.unflatten(0, (2, 4, 1)) - drawn[:, None]).flatten(3).norm(dim=3)
            own = apart.diagonal(dim1=1, dim2=2)
            assert own.mean() < 0.7 * apart.mean()
        assert line["nfe"] == 2 * (plan.evaluations + 8 * 2) and line["images"] == 2 * 4
        assert line["seconds_total"] > line["seconds_scout"] > 0 and line["ratio_first_deviation"] <= 1e-6
        assert -1 <= line["scout_rank_correlation"] <= 1 and line["scout_failed_rewards"] == 0
    (scouts, progress, rough), (samples, later, fine) = noted["progress"][-2:]
    assert (scouts, samples) == (16, 8)
    assert all(place[name] == 2 for place in (progress, later) for name in ("curr_step", "total_steps"))
    rough, fine = np.take_along_axis(rough.reshape(2, 8), scouted.picks, 1), fine.reshape(2, 4)
    expected = np.mean([rank_correlation(a, b) for a, b in zip(rough, fine, strict=True)])
    assert line["scout_rank_correlation"] == pytest.approx(expected)
    plots = {plot.name: plot for plot in plan_plots(run.metrics, {})}
    assert [panel.title for panel in plots["scouts"].panels] == ["reward of the candidates", "rank correlation"]
    assert "scout" in plots["seconds"].panels[0].series


def test_without_scouts_nothing_is_scouted(train, noted):
    line = train(**V_GRPO, max_train_steps=1).metrics[0]
    assert not noted["scouted"] and len(noted["rollouts"]) == 1 and not [name for name in line if "scout" in name]


@pytest.mark.slow
def test_processes_batches_and_restarts_change_nothing(train, flags, tmp_path, subprocess_environment):
    settings = {**SCOUTS, **MIX, "max_train_steps": 2, "checkpointing_steps": 1, "prompts_per_iteration": 2}
    whole = train("whole", **settings)
    done = torchrun(flags(**settings, parallel="ddp", output_dir=tmp_path / "two"), subprocess_environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_update(Run(tmp_path / "two"), whole)
    small = train("small", **settings, rollout_batch_size=3, train_micro_batch_size=1)
    assert_same_update(small, whole)
    for other in (Run(tmp_path / "two"), small):
        ranks = [[line["scout_rank_correlation"] for line in run.metrics] for run in (other, whole)]
        assert ranks[0] == pytest.approx(ranks[1])
    rest = train("rest", **settings, resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[1:] and same_weights(rest.weights(), whole.weights())


def test_candidates_without_a_score_are_not_picked_and_count_as_failures(train, noted, capsys):
    given = {**SCOUTS, **V_GRPO, "reward_model": "custom_rewards:first_of_each_batch_fails", "max_train_steps": 1}
    line = train(**given).metrics[0]
    assert 0 not in noted["scouted"][0].picks and line["scout_failed_rewards"] == line["failed_rewards"] == 1
    with pytest.raises(SystemExit):
        train(**given, max_reward_failures=1)
    assert "more scores failed in iteration 1" in (said := capsys.readouterr().err) and "1 scout_failed_rewards" in said


# --- before a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,problem",
    [
        ("--scouts 24", "scouts 24: .* differ in their initial noise alone; give --no_init_same_noise"),
        ("--algorithm branch_grpo --scouts 24", "scouts 24: --algorithm branch_grpo starts .* choose from .*v_grpo"),
        ("--algorithm grpo_merge --scouts 24", "scouts 24: --algorithm grpo_merge starts all samples"),
        ("--algorithm v_grpo --scouts 12", "scouts 12: must be more than --num_generations 12"),
        ("--algorithm v_grpo --scouts 24 --scout_steps 26", "scout_steps 26: at most --sampling_steps 25"),
        ("--algorithm v_grpo --scouts 24 --granular_progress batch_index", "granular_progress batch_index: not with"),
        ("--algorithm v_grpo --scout_steps 4", "scout_steps 4: goes with --scouts"),
        ("--algorithm v_grpo --scout_pick random", "scout_pick random: goes with --scouts"),
    ],
)
def test_what_cannot_be_scouted_is_refused(flags, problem, refused):
    with refused(f"--{problem}"):
        train_grpo_flux.main(["--data_json_path", "unused", "--reward_model", "shapes", *flags.split()])


def test_the_plan_of_the_candidates_and_their_cost_are_shown_before_a_run():
    text = describe(config(algorithm="mix_grpo", init_same_noise=False, scouts=24, rollout_precision="fp8"), 1)
    assert "; and all for candidates" in text
    assert "iteration: 300; and 144 for candidates" in text
    assert "24 candidates per prompt are sampled and scored first; 12 of them, the best and the worst" in text
    assert len(re.findall(r"dpmpp order \d +rows +24", text)) == 6
    argv = f"--pretrained_model_name_or_path {TINY} --data_json_path unused --reward_model shapes --h 32 --w 32"
    argv = [*argv.split(), "--algorithm", "v_grpo", "--train_micro_batch_size", "1", "--scouts"]
    few, many = (predict_memory(parse_dataclass(GRPOConfig, [*argv, n]), 1)["activations"] for n in ("100", "200"))
    shape = LatentShape.of(meta_vae(str(TINY)), 32, 32)
    assert (many - few) * 2**30 == pytest.approx(100 * shape.tokens * shape.channels * 4 * 5)
