#!/usr/bin/env bash
# What a machine with a GPU shows in ten minutes, without a network: installs this checkout, runs the GPU tests, times
# the kernels against the memory, training steps of DiT-S/2 and DiT-B/2 (bf16 autocast) with their peak memory, the
# weights and a whole training; then, in what time is left, steps under torch.compile and the kernels' tests under
# compute-sanitizer. Prints the tables last. Ends with status 1 if a required part, one of those named before "then",
# is missing or was cut.
#
#   benchmarks/gpu.sh [FOLDER]          results, logs and report.md go there; default runs/gpu
#
# `make gpu` installs what it needs, once, with a network, and runs it. An environment of your own needs torch, what the
# `bench` and `test` extras name, scikit-build-core and pybind11; the script then compiles and installs the checkout.
# Peers that are not installed are reported by name.
# Every part has a time limit, and what an interrupted part had measured is kept. All that there is to measure, and the
# whole suite, natively and with CUDA graphs, take some hours:
#
#   TIME=14400 SCALE=full BATCH="256 64" MODELS="dit-s2 dit-b2 dit-l2 unet" TESTS=tests benchmarks/gpu.sh FOLDER
#
# Variables, with their defaults:
#   PYTHON=python3  DEVICE=cuda  MODELS="dit-s2 dit-b2"  BATCH=256  SCALE=default  TIME=600 (seconds)
#   TESTS="tests/kernels tests/ops tests/gradients tests/train/test_synchronisation.py"  INSTALL=1  SANITIZER=compute-sanitizer
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
python=${PYTHON:-python3} device=${DEVICE:-cuda} scale=${SCALE:-default} install=${INSTALL:-1}
read -ra models <<<"${MODELS:-dit-s2 dit-b2}"
read -ra batches <<<"${BATCH:-256}"
batch=${batches[0]}
read -ra tests <<<"${TESTS:-tests/kernels tests/ops tests/gradients tests/train/test_synchronisation.py}"
sanitizer=${SANITIZER:-compute-sanitizer}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
time=${TIME:-600}
end=$((SECONDS + time - 15)) # the rest is for the report
summary="" missing="" failed=0

# part KIND NAME SECONDS COMMAND...: run it for at most so long, as far as there is time left; go on if it fails
part() {
  local kind=$1 name=$2 limit=$3 begin=$SECONDS left=$((end - SECONDS)) status=0 word
  shift 3
  [[ $kind == optional ]] || limit=$((limit * time / 600 + 1)) # what is said below is for ten minutes
  limit=$((limit < left ? limit : left))
  if ((limit <= 0)); then
    word="no time left"
    status=124
  else
    echo "== $name (at most $limit s)"
    # The suite ends in order when it is told to; what does not end then is killed.
    timeout --kill-after=15 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    case $status in
      0) word="done" ;;
      5) word="nothing of it at this scale" ;;
      124 | 137) word="stopped at its limit" ;;
      *) word="failed with status $status, see $name.log" failed=1 ;;
    esac
  fi
  summary+="| $name | $kind | $word | $((SECONDS - begin)) s |"$'\n'
  [[ $kind == optional ]] || ((status == 0)) || missing+="${missing:+; }$name ($word)"
  return "$status"
}

# bench KIND NAME SECONDS OPTION...: a part of the suite, with a JSON file of its own
files=()
bench() {
  local kind=$1 name=$2 limit=$3
  shift 3
  rm -f "$out/$name.json"
  part "$kind" "$name" "$limit" "$python" -m pytest benchmarks/bench_suite.py -q -p no:cacheprovider \
    --device "$device" --scale "$scale" --batch "$batch" --results "$out" --machine "$name" "$@"
  [[ -s $out/$name.json ]] && files+=("$out/$name.json")
}

# What is left is for the optional parts in equal shares.
optional=$((${#models[@]} + 1))
share() {
  echo $(((end - SECONDS) / optional))
}

ready='
import importlib.util as found, sys, torch
missing = [name for name in ("diffusers", "hypothesis", "pytest", "pytest_benchmark", "triton") if not found.find_spec(name)]
if missing: sys.exit(f"not installed: {missing}")
if sys.argv[1] == "cuda" and not torch.cuda.is_available(): sys.exit(f"PyTorch {torch.__version__} finds no GPU")
'
"$python" -c "$ready" "$device" || { echo "The first lines of benchmarks/gpu.sh say what has to be installed."; exit 2; }

rm -f "$out/report.md"
if ((install)); then
  part required install 40 "$python" -m pip --disable-pip-version-check install --no-build-isolation --no-deps -e . ||
    { tail -n 20 "$out/install.log"; exit 1; }
fi
export DIFFMTL_TEST_DEVICE=$device
workers=()
cores=$(nproc)
((cores >= 8)) && "$python" -c "import xdist" 2>/dev/null && workers=(-n 4)
part required tests 110 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" "${tests[@]}"
bench required roofline 80 --groups ops --no-memory
for model in "${models[@]}"; do
  for batch in "${batches[@]}"; do
    name=step_$model
    ((${#batches[@]} == 1)) || name+=_$batch
    bench required "$name" $((180 / ${#models[@]} / ${#batches[@]})) --groups step --models "$model"
  done
done
batch=${batches[0]}
bench required weights 25 --groups weights --no-compile --no-memory
bench required end_to_end 55 --groups training --no-compile --no-memory

for model in "${models[@]}"; do
  bench optional "compiled_$model" "$(share)" --groups compiled --models "$model" --no-memory
  ((optional--))
done
# Of a block that PyTorch's allocator keeps for later, the sanitizer could not tell the tensor's end, and the driver's
# answers about pointers that are not its own, which PyTorch asks for, are no errors.
if command -v "$sanitizer" >/dev/null; then
  large="4096 or 4097 or 4099 or 97 or 1200 or 1500 or beyond_32_bits"
  part optional sanitizer "$(share)" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --error-exitcode 1 \
    --report-api-errors no "$python" -m pytest -q -p no:cacheprovider tests/kernels -k "not ($large)"
else
  summary+="| sanitizer | optional | $sanitizer not found | |"$'\n'
fi

if ((${#files[@]})); then
  "$python" -m benchmarks report "${files[@]}" --out "$out" >"$out/report.log" 2>&1 ||
    { tail -n 5 "$out/report.log"; exit 1; }
  cat "$out/report.md"
fi
printf '\n| part | | | time |\n|---|---|---|---|\n%s' "$summary"
[[ -z $missing ]] || printf '\nINCOMPLETE, required parts are missing: %s.\n' "$missing"
((${#files[@]})) || echo "Nothing was measured."
[[ -z $missing ]] && ((!failed))
