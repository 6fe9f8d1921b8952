#!/usr/bin/env bash
# What a machine with a GPU shows in ten minutes, without a network: installs this checkout, runs the GPU tests, those
# of the kernels on small shapes under compute-sanitizer too, times the kernels against the memory, training steps of
# DiT-S/2 and DiT-B/2 (bf16 autocast, with and without torch.compile) and a whole training, and prints the tables last.
#
#   benchmarks/gpu.sh [FOLDER]          results, logs and report.md go there; default runs/gpu
#
# torch and what the `train` and `bench` extras name have to be installed; peers that are not are reported by name.
# Every part has a time limit, and what an interrupted part had measured is kept. Variables, with their defaults:
#   PYTHON=python3  DEVICE=cuda  MODELS="dit-s2 dit-b2"  BATCH=256  SCALE=default  TIME=600 (seconds)
#   TESTS="tests/kernels tests/ops tests/gradients"  INSTALL=1  SANITIZER=compute-sanitizer
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
python=${PYTHON:-python3} device=${DEVICE:-cuda} models=${MODELS:-dit-s2 dit-b2} batch=${BATCH:-256}
scale=${SCALE:-default} tests=${TESTS:-tests/kernels tests/ops tests/gradients} install=${INSTALL:-1}
sanitizer=${SANITIZER:-compute-sanitizer}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
end=$((SECONDS + ${TIME:-600} - 15)) # the rest is for the report
summary=""

# part NAME SECONDS COMMAND...: run it for at most so long, as far as there is time left; go on if it fails
part() {
  local name=$1 limit=$2 begin=$SECONDS left=$((end - SECONDS)) status=0 word
  shift 2
  limit=$((limit < left ? limit : left))
  if ((limit <= 0)); then
    summary+="| $name | no time left | |"$'\n'
    return 1
  fi
  echo "== $name (at most $limit s)"
  # The suite ends in order when it is told to; what does not end then is killed.
  timeout --kill-after=15 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) word="done" ;;
    5) word="nothing of it at this scale" ;;
    124 | 137) word="stopped at its limit" ;;
    *) word="failed with status $status, see $name.log" ;;
  esac
  summary+="| $name | $word | $((SECONDS - begin)) s |"$'\n'
  return "$status"
}

# bench NAME SECONDS OPTION...: a part of the suite, with a JSON file of its own
bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m pytest benchmarks/bench_suite.py -q -p no:cacheprovider \
    --device "$device" --scale "$scale" --batch "$batch" --no-memory --results "$out" --machine "$name" "$@"
}

if ((install)); then
  part install 90 "$python" -m pip --disable-pip-version-check install --no-build-isolation --no-deps -e . ||
    { tail -n 20 "$out/install.log"; exit 1; }
fi
rm -f "$out"/*.json
export DIFFMTL_TEST_DEVICE=$device
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n 4)
# shellcheck disable=SC2086
part tests 110 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" $tests
# After the tests, whose builds of the kernels it finds in Triton's cache. Of a block that PyTorch's allocator keeps for
# later, the sanitizer could not tell the tensor's end, and the driver's answers about pointers that are not its own,
# which PyTorch asks for, are no errors.
if command -v "$sanitizer" >/dev/null; then
  large="4096 or 4097 or 4099 or 97 or 1200 or 1500 or beyond_32_bits"
  part sanitizer 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --error-exitcode 1 --report-api-errors no \
    "$python" -m pytest -q -p no:cacheprovider tests/kernels -k "not ($large)"
else
  summary+="| sanitizer | $sanitizer not found | |"$'\n'
fi
bench roofline 100 -k fused
for model in $models; do
  bench "step_$model" 110 -k "full and not compile" --models "$model"
done
for model in $models; do
  bench "compiled_$model" 110 -k "full and compile" --models "$model"
done
bench weights 40 -k "Nash and weights" --no-compile
bench end_to_end 60 -k "fixed" --no-compile

shopt -s nullglob
files=("$out"/*.json)
if ((${#files[@]})); then
  "$python" -m diffmtl_fast.cli bench report "${files[@]}" --out "$out" >"$out/report.log" 2>&1 ||
    { tail -n 5 "$out/report.log"; exit 1; }
  cat "$out/report.md"
fi
printf '\n| part | | time |\n|---|---|---|\n%s' "$summary"
((${#files[@]})) || { echo "Nothing was measured."; exit 1; }
[[ $summary != *failed* ]]
