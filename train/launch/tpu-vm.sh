#!/usr/bin/env bash
# Fine-tunes on spot TPU VMs: asks for a queued resource, runs the same command on all of its machines, asks again
# after a preemption, and deletes the resource at the end. A preempted run resumes from its last checkpoint:
#
#   train/launch/tpu-vm.sh
#
# It needs the gcloud command with access to the project, the image of tpu.Dockerfile in the project's Artifact
# Registry, and an NFS share in the machines' network, such as one of Filestore. It waits until the run ends; if it is
# stopped, the same command continues.
set -euo pipefail

# --- Place 1 of 2: the machines, the image and the share, which is the folder /runs of each machine.
name=phi3-jax-finetune
project=my-project
zone=us-west4-a
accelerator=v5litepod-16
runtime=v2-alpha-tpuv5-lite
image=us-docker.pkg.dev/my-project/my-repository/phi3-jax-tpu:1
share=10.0.0.2:/runs

# --- Place 2 of 2: the command. Its settings, data and output are in /runs.
command=(phi3-jax finetune /runs/finetune.yaml --output-dir /runs/mine --mesh fsdp=16 --distributed)

# --- Nothing below needs a change.
tpus() {
  gcloud compute tpus "$@" --project="$project" --zone="$zone"
}

state() {
  tpus queued-resources describe "$name" --format='value(state.state)' 2>/dev/null || echo ABSENT
}

delete() {
  tpus queued-resources delete "$name" --force --quiet
}

# run: runs the command on all machines at a time, as root, because the device files of TPUs can be root's alone.
run() {
  local script
  script="set -e
    mountpoint -q /runs || {
      sudo apt-get install -y nfs-common
      sudo mkdir -p /runs
      sudo mount -t nfs $share /runs
    }
    sudo gcloud auth configure-docker ${image%%/*} --quiet
    sudo docker run --rm --privileged --net=host --user=root --stop-timeout=60 -v /runs:/runs \
      $image $(printf '%q ' "${command[@]}")"
  tpus tpu-vm ssh "$name" --worker=all --command="$script"
}

while true; do
  case "$(state)" in
    ABSENT)
      tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator" \
        --runtime-version="$runtime" --spot
      ;;
    ACTIVE)
      if run; then
        delete
        exit 0
      fi
      sleep 180  # the state of a preempted resource changes after its machines have stopped
      if [ "$(state)" = ACTIVE ]; then
        echo "the command failed, and its machines were not preempted" >&2
        delete
        exit 1
      fi
      ;;
    SUSPENDED)
      delete
      ;;
    FAILED)
      tpus queued-resources describe "$name" >&2
      exit 1
      ;;
    *)
      sleep 60  # it waits in the queue, is being made, or is being deleted
      ;;
  esac
done
