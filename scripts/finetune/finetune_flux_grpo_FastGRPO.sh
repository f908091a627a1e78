#!/usr/bin/env bash
# The name that the reference's README uses for MixGRPO.
exec bash "$(dirname "${BASH_SOURCE[0]}")/finetune_flux_grpo_MixGRPO.sh" "$@"
