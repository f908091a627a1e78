#!/usr/bin/env bash
# MixGRPO-Flash*: the window stays on the first 4 steps, the rest is compressed to 20 %.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm mix_grpo_flash_star
flag experiment_name MixGRPO_Flash_star
flag output_dir outputs/MixGRPO_Flash_star
launch "$@"
