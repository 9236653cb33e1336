#!/bin/bash
# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
# Runs one gin file on the GPUs of several nodes under Slurm.
#
#   sbatch --nodes=4 docs/launch/slurm.sh \
#     --gin_file=gin/runs/text_to_text.gin --gin.MODEL_DIR=/shared/out ...
#
# One task a GPU: JAX finds its GPU, its number and the first node by Slurm's
#   variables. Submit the same command again to continue a run.
#SBATCH --job-name=mergejax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
set -euo pipefail
srun --kill-on-bad-exit=1 .venv/bin/mergejax train --multiprocess "$@"
