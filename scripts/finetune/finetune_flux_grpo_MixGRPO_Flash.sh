#!/usr/bin/env bash
# MixGRPO-Flash: past the window, second-order DPM-Solver++ on 40 % of the steps; the window moves every 20 iterations.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm mix_grpo_flash
flag experiment_name MixGRPO_Flash
flag output_dir outputs/MixGRPO_Flash
launch "$@"
