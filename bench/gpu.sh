#!/usr/bin/env bash
# Build, tests, sanitizers and benchmarks on a machine with a GPU, in one call of under ten minutes; no network is needed.
#   bench/gpu.sh --pack       on a machine with apt and PyPI: what the other one may lack, into build/travel (ignored by git);
#                             what STAGES=build made here before goes with it, for PREBUILT=1 there (same Python version)
#   bench/gpu.sh              every stage; a failed one does not stop the next. Exit status 1 if any failed
#   bench/gpu.sh --dry-run    the stages, their limits and what they would run with
# STAGES="build cpp" chooses stages, MODELS="llama-3.2-1b llama-3.1-8b" shapes of random models (LAYERS of them, in
# MODEL_DIR), BUDGET seconds in all (570; more for a slow machine), ARCH CUDA architectures, PYTHON the interpreter. What was found goes to $OUT/gpu.json, the
# end of the logs to $OUT/gpu.log ($OUT: bench/results).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
MODELS=${MODELS:-llama-3.2-1b}
work=$root/build/gpu
MODEL_DIR=${MODEL_DIR:-$work/models}
tree=$work/tree site=$work/site logs=$work/logs results=$work/results travel=$root/build/travel
OUT=${OUT:-$root/bench/results}

all=(env build cpp python memcheck racecheck kernels ops model steps peers latency throughput coserve)
declare -A limit=([env]=40 [build]=240 [cpp]=70 [python]=80 [memcheck]=60 [racecheck]=45 [kernels]=60 [ops]=45 [model]=60
                  [steps]=50 [peers]=90 [latency]=60 [throughput]=60 [coserve]=110)
if [ "$BUDGET" -gt 570 ]; then
  for name in "${all[@]}"; do limit[$name]=$((limit[$name] * BUDGET / 570)); done
fi
read -ra chosen <<<"${STAGES:-${all[*]}}"

# Families of tests/cpp whose kernels run under the sanitizers, cheap ones first.
suites=(RmsNorm Rotary SiluMul Rows Elementwise KvWrite AdamW Sgd SumSquares Optimizer Sampling LinearTest CrossEntropy Lora
        Attention AttentionBackward)

wheels=(gguf jinja2 markupsafe rich markdown-it-py mdurl pygments tokenizers safetensors pytest pluggy iniconfig packaging
        hypothesis sortedcontainers pyyaml tqdm scikit-build-core pathspec pybind11 nanobind ninja pytest-xdist execnet)

PATH=$PATH:/usr/local/cuda/bin
export PATH PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The interpreter's own cmake and ninja, if it has them.
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH

architecture() {
  local capability
  if [ -n "${ARCH:-}" ]; then echo "$ARCH"; return; fi
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
  case $capability in
    "" | 90) echo 90a-real ;;
    *) echo "$capability-real" ;;
  esac
}

# cuBLASLt: flexcore loads it by name; the pip packages keep it in a folder that the loader does not know.
cublaslt() {
  "$PYTHON" - <<'PY'
import pathlib, sys
roots = [pathlib.Path(p) for p in sys.path if p.endswith("-packages")]
found = sorted(f for root in roots for f in root.glob("nvidia/**/libcublasLt.so.1[23]"))
found += sorted(pathlib.Path("/usr/local/cuda/lib64").glob("libcublasLt.so.1[23]"))
print(found[-1] if found else "")
PY
}

pack() {
  set -e
  rm -rf "$travel"
  mkdir -p "$travel/debs" "$travel/wheels"
  (cd "$travel/debs" && apt-get -q download libgtest-dev libbenchmark-dev libbenchmark1debian 2>&1 | grep -v '^W: Download')
  for deb in "$travel"/debs/*.deb; do dpkg -x "$deb" "$travel"; done
  rm -rf "${travel:?}"/{debs,usr/share,usr/src}
  # pip matches the platform's number exactly, so every usual one is named.
  platforms=()
  for number in 17 27 28 34; do platforms+=(--platform "manylinux_2_${number}_x86_64"); done
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 \
    --abi none "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any \
    -d "$travel/wheels" "${wheels[@]}" 2>&1 | grep -v '^WARNING: Location' || true
  if [ "$(find "$travel/wheels" -name '*.whl' | wc -l)" != "${#wheels[@]}" ]; then
    echo "wheels: not all of ${wheels[*]}" >&2
    exit 1
  fi
  if [ -x "$tree/bench/flexcore_bench" ]; then
    mkdir -p "$travel/built/tree/tests/cpp" "$travel/built/tree/bench" "$travel/built/site"
    cp "$tree/tests/cpp/flexcore_tests" "$travel/built/tree/tests/cpp"
    cp "$tree/bench/flexcore_bench" "$travel/built/tree/bench"
    cp -r "$site"/flexcore* "$travel/built/site"
    rm -rf "$travel"/built/site/flexcore/{lib,include}
    strip "$travel"/built/tree/*/{cpp/flexcore_tests,flexcore_bench} 2>/dev/null || true
  fi
  { git rev-parse HEAD; git diff --quiet HEAD || echo "with changes"; } | paste -sd' ' >"$travel/commit"
  du -sm "$travel" | awk '{print $1 " MB in build/travel"; exit $1 > 50}'
}

stage_env() {
  nvidia-smi
  nvcc --version | tail -n 2
  "${CXX:-g++}" --version | head -n 1
  # Only what is missing is taken from the wheels: two versions of one package stop an installation.
  local missing=()
  mapfile -t missing < <("$PYTHON" bench/gpu_report.py --missing-wheels --travel "$travel" | grep .)
  if [ ${#missing[@]} -gt 0 ]; then
    echo "from wheels: ${missing[*]##*/}"
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "${missing[@]}" || return 1
  fi
  "$PYTHON" bench/gpu_report.py --machine "$results/machine.json" --nvcc "$(command -v nvcc)" --travel "$travel"
  nvidia-smi -L >/dev/null  # without a GPU this is the stage's failure
}

stage_build() {
  if [ -n "${PREBUILT:-}" ]; then
    mkdir -p "$tree" && cp -r "$travel/built/tree/." "$tree" && cp -r "$travel/built/site/." "$site" || return 1
    "$PYTHON" -c 'import flexcore; print("built before:", flexcore.__file__)'
    return
  fi
  local defines=(FLEXCORE_CUDA=ON FLEXCORE_BUILD_TESTS=ON "CMAKE_CUDA_ARCHITECTURES=$(architecture)") options=() define
  local config=$travel/usr/lib/x86_64-linux-gnu/cmake
  if [ -d "$config/GTest" ]; then defines+=("GTest_DIR=$config/GTest"); fi
  if [ -d "$config/benchmark" ]; then defines+=(FLEXCORE_BUILD_BENCH=ON "benchmark_DIR=$config/benchmark"); fi
  for define in "${defines[@]}"; do options+=("-Ccmake.define.$define"); done
  CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)} "$PYTHON" -m pip -v install . --no-build-isolation --no-deps --no-index --upgrade \
    --target "$site" "-Cbuild-dir=$tree" "${options[@]}"
}

tests() { FLEXCORE_TEST_DEVICE=cuda "$tree/tests/cpp/flexcore_tests" --gtest_brief=1 "$@"; }

# Several processes: they share the GPU, and an error that spoils a context takes fewer tests with it.
stage_cpp() {
  local shards=4 i status=0 jobs=()
  for ((i = 0; i < shards; ++i)); do
    GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$i tests "--gtest_output=json:$results/cpp$i.json" >"$logs/cpp$i" 2>&1 &
    jobs+=($!)
  done
  for ((i = 0; i < shards; ++i)); do
    wait "${jobs[i]}" || status=1
    cat "$logs/cpp$i"
  done
  return $status
}

# Those of the server, the guides and the datasets ask nothing of a device.
stage_python() {
  local options=() name
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then options=(-n 8); fi
  for name in server_faults server_load server_openai server_page server_schema readme rules stub datasets traces tokenizer; do
    options+=("--ignore=tests/python/test_$name.py")
  done
  FLEXCORE_DEVICE=cuda "$PYTHON" -m pytest -q -p no:cacheprovider "${options[@]}" "--junitxml=$results/python.xml" \
    --durations=10 tests/python
}

# sanitize TOOL SECONDS: each family in its own process with its own share of the time.
sanitize() {
  command -v compute-sanitizer || return 1
  local share=$(($2 / 6)) end=$((SECONDS + $2 - 8)) status=0 suite code left
  : >"$results/$1.tsv"
  for suite in "${suites[@]}"; do
    code=124 left=$((end - SECONDS))
    if [ $left -gt 0 ]; then
      FLEXCORE_TEST_DEVICE=cuda timeout -k 2 $((share < left ? share : left)) compute-sanitizer --tool "$1" --error-exitcode 99 --print-limit 10 \
        "$tree/tests/cpp/flexcore_tests" --gtest_brief=1 "--gtest_filter=$suite.*:*/$suite.*"
      code=$?
    fi
    printf '%s\t%s\n' "$suite" "$code" >>"$results/$1.tsv"
    case $code in
      0) ;;
      124 | 137) echo "$1 $suite: out of time" ;;
      *) echo "$1 $suite: exit status $code"; status=1 ;;
    esac
  done
  return $status
}
stage_memcheck() { sanitize memcheck "${limit[memcheck]}"; }
stage_racecheck() { sanitize racecheck "${limit[racecheck]}"; }

stage_kernels() {
  "$PYTHON" -m flexcore bench kernels --plan --json "$results/plan.json" >/dev/null || return 1
  "$tree/bench/flexcore_bench" --device cuda --json "$results/kernels.json"
}

stage_model() {
  local model
  for model in $MODELS; do
    "$PYTHON" bench/random_model.py "${model%%:*}" "$MODEL_DIR/$model" ${LAYERS:+--num-layers $LAYERS} || return 1
  done
}

stage_ops() { "$PYTHON" bench/gpu_profile.py ops ${OPS:-} --json "$results/ops.json"; }

stage_steps() {
  local model status=0
  for model in $MODELS; do
    "$PYTHON" bench/gpu_profile.py steps "$MODEL_DIR/$model" --json "$results/steps-$model.json" ${PARTS:+--parts $PARTS} || status=1
  done
  return $status
}

# transformers and PEFT on the same models.
stage_peers() {
  local model status=0
  for model in $MODELS; do
    "$PYTHON" bench/gpu_peers.py "$MODEL_DIR/$model" --json "$results/peers-$model.json" || status=1
  done
  return $status
}

bench() {  # bench NAME VERB OPTION...: for every model
  local name=$1 model status=0
  shift
  for model in $MODELS; do
    echo "$name, $model"
    "$PYTHON" -m flexcore bench "$@" --model "$MODEL_DIR/$model" --device cuda --max-num-batched-tokens 2048 \
      --json "$results/$name-$model.json" || status=1
  done
  return $status
}
stage_latency() {
  bench latency latency --input-len 128 1024 --batch-size 1 16 64 --num-iters 3 &&
    bench latency-eager latency --input-len 128 --batch-size 1 16 64 --num-iters 3 --enforce-eager
}
stage_throughput() { bench throughput throughput --num-prompts 128 --train-steps 8; }
stage_coserve() { bench coserve coserve --seconds 4 --shares 0.1 0.5 0.8 --policies hybrid temporal:64; }

run_stage() {  # run_stage NAME SECONDS: in a process of its own, so that it can be stopped
  local name=$1 seconds=$2 begin=$SECONDS status outcome
  printf '\n== %s (at most %d s)\n' "$name" "$seconds"
  timeout -k 5 "$seconds" "$BASH" "$root/bench/gpu.sh" --stage "$name" "$seconds" >"$logs/$name.log" 2>&1
  status=$?
  case $status in
    0) outcome=ok ;;
    124 | 137) outcome="out of time" ;;
    *) outcome=failed ;;
  esac
  tail -n "$([ $status = 0 ] && echo 4 || echo 25)" "$logs/$name.log"
  printf '%s\t%s\t%s\t%s\n' "$name" "$outcome" "$status" "$((SECONDS - begin))" >>"$results/stages.tsv"
  echo "== $name: $outcome, $((SECONDS - begin)) s"
  [ $status = 0 ]
}

main() {
  local failed=0 name left seconds
  rm -rf "$logs" "$results"
  mkdir -p "$logs" "$results" "$site" "$OUT"
  for name in "${chosen[@]}"; do
    left=$((BUDGET - SECONDS - 5))
    seconds=$((limit[$name] < left ? limit[$name] : left))
    if [ $seconds -lt 5 ]; then
      printf '%s\tnot run\t\t0\n' "$name" >>"$results/stages.tsv"
      echo "== $name: no time left"
      failed=1
      continue
    fi
    run_stage "$name" "$seconds" || failed=1
  done
  "$PYTHON" bench/gpu_report.py --results "$results" --logs "$logs" --out "$OUT" || failed=1
  return $failed
}

for name in "${chosen[@]}"; do
  if [ -z "${limit[$name]:-}" ]; then
    echo "STAGES: no stage $name; there are ${all[*]}" >&2
    exit 2
  fi
done
FLEXCORE_CUBLASLT=${FLEXCORE_CUBLASLT:-$(cublaslt)}
export FLEXCORE_CUBLASLT
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

case ${1:-} in
  "") main ;;
  --pack) pack ;;
  --stage)
    limit[$2]=$3
    "stage_$2"
    ;;
  --dry-run)
    echo "architecture $(architecture), python $(command -v "$PYTHON"), cuBLASLt ${FLEXCORE_CUBLASLT:-not found}, budget $BUDGET s"
    echo "travel: $([ -d "$travel" ] && cat "$travel/commit" || echo "nothing packed (bench/gpu.sh --pack)")"
    for name in "${chosen[@]}"; do printf '%-11s at most %3d s\n' "$name" "${limit[$name]}"; done
    ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
