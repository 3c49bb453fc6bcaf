#!/usr/bin/env bash
# Trains on all hosts of a TPU VM slice; run it from a machine with gcloud:
#
#   launch/tpu-vm.sh NAME ZONE --config configs/base_config.yaml data.path=gs://... training.output_dir=gs://...
#
# It copies this repository to every host, installs it, and starts the same command everywhere, which finds the others by
# itself. Until the run is done, a start that was stopped or came too early (exit code 75), or was lost, is started again.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,8p' "$0" >&2; exit 2; }
name=$1 zone=$2
shift 2
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"; }

tar -czf /tmp/l1_jax.tgz --exclude=.git --exclude=.venv -C "$(dirname "$0")/.." .
gcloud compute tpus tpu-vm scp /tmp/l1_jax.tgz "$name":/tmp/ --zone "$zone" --worker=all
on_all 'mkdir -p ~/l1_jax && tar -xzf /tmp/l1_jax.tgz -C ~/l1_jax && cd ~/l1_jax && python3 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'

for _ in $(seq "${MAX_RESTARTS:-50}"); do
    code=0
    on_all "cd ~/l1_jax && .venv/bin/python scripts/train.py --resume --join-timeout 1800 $(printf '%q ' "$@")" || code=$?
    [ "$code" -ne 0 ] && [ "$code" -ne 2 ] || exit "$code"
    echo "exit code $code: starting again from the newest checkpoint" >&2
    sleep 30
done
exit "$code"
