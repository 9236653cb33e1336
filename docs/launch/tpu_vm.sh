#!/bin/bash
# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
# Runs one gin file on every host of a Cloud TPU slice.
#
#   NAME=my-slice ZONE=us-east5-a docs/launch/tpu_vm.sh \
#     --gin_file=gin/runs/text_to_text.gin --gin.MODEL_DIR=/shared/out ...
#
# NAME and ZONE: of the slice. MERGEJAX: the folder of a checkout with its
#   environment on every host. MODEL_DIR and the data must lie on a file system
#   that all hosts share (Filestore, a mounted bucket).
set -euo pipefail
: "${NAME:?the name of the TPU slice}" "${ZONE:?its zone}"
MERGEJAX=${MERGEJAX:-\$HOME/mergejax}
printf -v arguments '%q ' "$@"
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
  --command="cd $MERGEJAX && .venv/bin/mergejax train --multiprocess $arguments"
