#!/usr/bin/env bash
# The whole path on toy images, on two cores: environment, images, features, centers, labels, training, probes, table; then
# a text tower on the images' captions, classes by their names, images by captions.
#   bash tools/quickstart.sh          everything lands in quickstart/; a second run goes on where the first one stopped
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage="start"
trap 'code=$?; [ $code -eq 0 ] || echo "quickstart stopped in the stage \"$stage\" (exit code $code): see the message above; the same command goes on from there" >&2' EXIT
began=$SECONDS
stage() {
  stage=$1
  printf '\n[%d:%02d] %s\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$stage"
}

stage "environment"
bash tools/setup_env.sh
# One thread a process: two on two cores wait for each other as soon as anything else runs.
export PATH="$PWD/.venv/bin:$PATH" DS_ACCELERATOR=cpu GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1
[ "$(uname)" = Linux ] || unset GLOO_SOCKET_IFNAME # elsewhere the loopback has another name
began=$SECONDS

dir=quickstart
train_tars="$dir/data/train/*.tar"
test_tars="$dir/data/test/*.tar"

stage "images: scenes of handwritten digits, as tars"
python tools/make_toy_shards.py --output_dir $dir/data --num_train 4000 --num_test 1000

stage "features: a patch dictionary, learnt from the training images"
# 128 features, the encoder's embedding width: the centers then start the head.
features() {
  python tools/extract_features.py --patch_size 10 --dictionary_size 512 --patch_features 128 --whitening_power 0.5 \
    --images_to_fit 1000 --workers 1 "$@"
}
features --shards "$train_tars" --output_dir $dir/features/train --model builtin:patches
features --shards "$test_tars" --output_dir $dir/features/test --model builtin:$dir/features/train/patches.npz

stage "centers: spherical k-means"
python tools/cluster.py --features $dir/features/train --output_dir $dir/centers --k 200

stage "labels: the 8 nearest centers of every image"
python tools/assign_labels.py --features $dir/features/train --centers $dir/centers --output_dir $dir/labels --top 8
python tools/inspect_clusters.py --shards "$train_tars" --labels $dir/labels --centers $dir/centers --output $dir/clusters.html

stage "training: two ranks, the centers split between them"
train() {
  # A free port: another run on this machine may have the launcher's usual one.
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  deepspeed --num_accelerators 2 --master_port "$port" mlcd_ds/train.py --deepspeed_config ds_configs/cpu.json \
    --shards "$train_tars" --model vit_toy --image_size 24 --resume auto "$@"
}
train --labels $dir/labels --centers $dir/centers --output_dir $dir/run \
  --scale 24 --margin 0 --sample_rate 1.0 --head_lr_scale 3 --epochs 15 --warmup_steps 50 \
  --crop_scale_min 0.8 --noflip --workers 0 --save_every_steps 200

stage "probes: multi-label mean average precision on test scenes of digits that no training scene has"
probe() {
  python tools/linear_probe.py --train_shards "$train_tars" --test_shards "$test_tars" --model "$1" --output "$dir/results/$2.json"
}
probe "features:$dir/features/train+$dir/features/test" features
probe "untrained:$dir/run" untrained
probe "run:$dir/run" trained

stage "captions: a small byte-pair encoding of them, and a text tower fitted to the encoder, which stays as it is (LiT)"
[ -f $dir/tokenizer.json ] || python tools/train_tokenizer.py --shards "$train_tars" --output $dir/tokenizer.json
train --objective clip --tokenizer $dir/tokenizer.json --text_model text_toy --init_from $dir/run --lock_image \
  --output_dir $dir/lit --steps 60 --warmup_steps 6 --crop_scale_min 0.8 --noflip --workers 0

stage "classes by their names, and images by captions, of the test scenes"
python tools/zero_shot.py --model run:$dir/lit --root $dir --datasets data --output_dir $dir/results/texts
python tools/retrieval.py --model run:$dir/lit --root $dir --datasets data --output_dir $dir/results/texts

stage "results"
python tools/results_table.py \
  --results "input features=$dir/results/features.json,untrained encoder=$dir/results/untrained.json,trained encoder=$dir/results/trained.json"
echo "Expected: about 0.84, 0.60 and 0.71; chance is 0.16. No true class took part in the training."
echo "Clusters: $dir/clusters.html  (sizes, cosines, purity, nearest images: open it in a browser)"
echo "Texts:    $dir/results/texts/  (60 steps of LiT, to see the path; docs/evaluation.md has a longer one)"
echo "Curves:   .venv/bin/tensorboard --logdir $dir/run/tensorboard"
echo "Encoder:  $dir/run/checkpoints/  (every tool reads it as run:$dir/run)"
