#!/bin/bash
set -euo pipefail
cd /shared/work || exit 2

cat > imagenet-lt.hosts <<'END'
node1 slots=8
node2 slots=8
END
cat > imagenet-lt.env <<'END'
NCCL_SOCKET_IFNAME=eth0
END
export DS_ENV_FILE=imagenet-lt.env
exec paco-keep-running --restarts 20 -- \
    deepspeed --hostfile imagenet-lt.hosts --master_port 29500 --module paco_ds.train \
    --config imagenet_lt_resnet50 --output /shared/runs/imagenet-lt --set data.shards=/shared/imagenet_lt --set step.micro_batches=16 --expect-ranks 16
