#!/bin/bash
# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
# Submits one gin file to a GKE cluster of TPU slices through XPK.
#
#   CLUSTER=my-cluster IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/mergejax \
#     TPU=v5litepod-256 SLICES=2 docs/launch/xpk.sh \
#     --gin_file=gin/runs/branch_train_merge.gin --gin.MODEL_DIR=/shared/out ...
#
# IMAGE: has mergejax with its extras [data,tpu]. TPU and SLICES: how many chips,
#   and how many slices; experts of `branch` go to different slices first.
set -euo pipefail
: "${CLUSTER:?the cluster}" "${IMAGE:?a container image with mergejax}"
printf -v arguments '%q ' "$@"
xpk workload create --cluster="$CLUSTER" \
  --workload="${WORKLOAD:-mergejax-$(date +%s)}" --docker-image="$IMAGE" \
  --tpu-type="${TPU:-v5litepod-256}" --num-slices="${SLICES:-1}" \
  --command="mergejax train --multiprocess $arguments"
