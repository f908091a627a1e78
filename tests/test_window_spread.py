"""The figure that shows how far samples spread for early and late windows."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import PROMPTS, ROOT
from PIL import Image

sys.path.append(str(ROOT / "benchmarks"))
import window_spread  # noqa: E402


def test_early_windows_spread_samples_more_than_late_ones(tiny_flux, prompts_file, tmp_path):
    output = tmp_path / "spread.png"
    argv = ["--pretrained_model_name_or_path", tiny_flux, "--prompts_file", str(prompts_file), "--prompts", "2"]
    argv += "--h 32 --w 32 --sampling_steps 8 --group_size 2 --samples 5 --windows 5 0".split()
    found = window_spread.main([*argv, "--output", str(output)])
    assert found == json.loads(output.with_suffix(".json").read_text()) and found["windows"] == [0, 5]
    assert [part["prompt"] for part in found["prompts"]] == list(PROMPTS[:2])
    for part in found["prompts"]:
        early, late = part["mean_distance"]
        assert early > 1.2 * late > 0 and np.shape(part["points"]) == (11, 2)
    with Image.open(output) as image:
        assert image.width > 1500
    again = window_spread.main([*argv, "--batch_size", "2", "--output", str(output)])
    for part, other in zip(found["prompts"], again["prompts"], strict=True):
        assert part["mean_distance"] == pytest.approx(other["mean_distance"], rel=1e-4)


def test_a_tuned_model_that_is_not_there_is_named(tiny_flux, refused):
    with refused("--model_path nope: no such file or folder"):
        window_spread.main(["--pretrained_model_name_or_path", tiny_flux, "--model_path", "nope"])


def test_principal_components_are_the_directions_of_largest_variance():
    values = torch.zeros(40, 6)
    values[:, 3], values[:, 1] = torch.linspace(-5, 5, 40), torch.linspace(-1, 1, 40).repeat(2)[::2]
    points, shares = window_spread.principal_components(values + 7)
    assert points[:, 0].abs().allclose(values[:, 3].abs(), atol=0.2) and shares[0] > shares[1] > 0
    assert float(shares.sum()) == pytest.approx(1)
    covariance = np.cov(points.T.numpy())
    assert abs(covariance[0, 1]) < 1e-3


@pytest.mark.parametrize(
    ("flag", "text"),
    [("--windows 21", "--windows 21: choose from 0 to 20"), ("--samples 1", "--samples 1: a distance needs 2")],
)
def test_bad_flags_are_one_line(flag, text, capsys):
    with pytest.raises(SystemExit) as stop:
        window_spread.main(flag.split())
    assert stop.value.code == 2 and text in capsys.readouterr().err
