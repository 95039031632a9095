#!/usr/bin/env bash
# Makes every file of results/ on this machine, from one commit:
#
#     bash results/reproduce.sh            about 70 minutes on two cores with AVX2, 40 with AVX-512
#     bash results/reproduce.sh --quick    the same on few images, in minutes; results/ is not touched
#     bash results/reproduce.sh --gpu      what needs a GPU; about 6 minutes on an H200
#
# Each run's folder lies in runs/reproduce-CODE/, by a digest of the code. What is complete there is
# not made again, and an interrupted run is resumed, so the same command continues. CNN runs on fewer
# images stand for those that would take hours here: their rows say so.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

fail() { # message
    echo "reproduce.sh: error: $1" >&2
    exit 2
}

case "$*" in
"" | --quick | --gpu) ;;
-h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' results/reproduce.sh && exit ;;
*) fail "no such arguments: $* (--help shows the usage)" ;;
esac
command -v $python >/dev/null ||
    fail "there is no $python: make it with the README's first command, or name one in PYTHON="
export WANDB_MODE=disabled

quick= data=cifar10
if [ "${1:-}" = --quick ]; then
    quick="--train-size 64 --epochs 2" data=auto folder=runs/reproduce-quick
    export VGG16_WEIGHTS=${VGG16_WEIGHTS:-random}
    rm -rf $folder
elif ! git rev-parse HEAD >/dev/null 2>&1; then
    fail "not a git checkout, so there is no commit to name: clone the repository, or use --quick"
elif [ -n "$(git status --porcelain)" ]; then
    fail "commit your changes first, so that the results name their code"
else
    code=$(git rev-parse HEAD:common HEAD:csrc HEAD:train_fc.py HEAD:train_cnn.py HEAD:bench.py |
        git hash-object --stdin)
    folder=runs/reproduce${1:-}-${code:0:7}
fi

# minutes, name, command
jobs="
1.6 fc                      train_fc.py
1.6 fc-seed1                train_fc.py --seed 1
1.6 fc-seed2                train_fc.py --seed 2
1.6 fc-seed3                train_fc.py --seed 3
1.6 fc-seed4                train_fc.py --seed 4
0.6 fc-window               train_fc.py --stop-rule window
1.8 fc-synthetic            train_fc.py --data synthetic --test-data cifar10
0.2 fc-closed-form          train_fc.py --init closed-form --epochs 0
1.6 fc-closed-form-trained  train_fc.py --init closed-form
1.5 fc-linear               train_fc.py --model linear
0.2 fc-linear-closed-form   train_fc.py --model linear --init closed-form --epochs 0
1   fc-separable            train_fc.py --model separable
0.2 fc-separable-closed-form train_fc.py --model separable --init closed-form --epochs 0
15  cnn-fixed               train_cnn.py --train-size 20000 --flip fixed
16  bench                   bench.py --runs 30 --peers --fc $folder/fc/best.pt --cnn $folder/cnn-fixed/best.pt
2.5 cnn                     train_cnn.py --train-size 3000
2.5 cnn-fixed-3000          train_cnn.py --train-size 3000 --flip fixed
10  cnn-fixed-perceptual    train_cnn.py --train-size 3000 --flip fixed --perceptual --vgg-size 32 --compare $folder/cnn-fixed-3000/best.pt
2   ladder                  -m results.ladder $folder
"

[ "${1:-}" != --gpu ] || jobs="
0.6 fc                      train_fc.py
0.4 fc-separable            train_fc.py --model separable
0.5 cnn                     train_cnn.py
0.5 cnn-fixed               train_cnn.py --flip fixed
3.5 bench                   bench.py --runs 30 --device cuda --fc $folder/fc/best.pt --cnn $folder/cnn-fixed/best.pt
1.8 cnn-fixed-perceptual    train_cnn.py --flip fixed --perceptual --precision bf16 --compare $folder/cnn-fixed/best.pt
"

left() { # minutes of the jobs that are not complete
    while read -r minutes name _; do
        [ -z "$name" ] || [ -e "$folder/$name/complete" ] || echo "$minutes"
    done <<<"$jobs" | awk '{ sum += $1 } END { print sum + 0 }'
}

while read -r minutes name command <&3; do
    [ -n "$name" ] && [ ! -e "$folder/$name/complete" ] || continue
    echo "== $name: $python $command (about $(left) minutes left)"
    case $command in
    train_*) # of a flag that is given twice, the last one counts
        [[ $command = *--data* ]] || command="$command --data $data"
        [[ $command = *"--epochs 0"* ]] && few=${quick% --epochs 2} || few=$quick
        [ -z "$quick" ] || few="$few --test-data same --dry-run"
        $python $command $few --out "$folder/$name" --resume auto
        ;;
    bench*) $python $command ${quick:+--dry-run} --out "$folder/$name" ;;
    *) $python $command ;;
    esac
    mkdir -p "$folder/$name" && touch "$folder/$name/complete"
done 3<<<"$jobs"

[ -n "$quick" ] || $python -m results.tables "$folder"
