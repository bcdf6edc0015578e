#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, its driver and PyTorch, without cargo: runs what scripts/gpu_build.sh built, the tests on the
# card, under NVIDIA's compute-sanitizer where it is installed, then the benches with PyTorch beside ours. Ends within nine minutes
# with one Markdown table, which it also leaves with its log in $OUT, or else in target/gpu-check.
#
#   scripts/gpu_check.sh                                 the Python with PyTorch is python3, or what PYTHON names
#   VARFT_BENCH_DEVICE=emulated scripts/gpu_check.sh     without a card: shows that this script runs, on the emulated device
set -uo pipefail
cd "$(dirname "$0")/.."

# Seconds: of all, and of each stage.
ALL=520
DOCTOR=20 TESTS=150 SANITIZER=90
# Of one group of tests: what hangs is ended, and the rest goes on. The last ones are larger.
GROUP=40 LARGE=80

PYTHON="${PYTHON:-python3}"
DEVICE="${VARFT_BENCH_DEVICE:-cuda}"
results="${OUT:-target/gpu-check}"
mkdir -p "$results"
log="$results/gpu_check.log"
BINARIES="$(mktemp -d)"
rows="$BINARIES/rows"
said="$BINARIES/said"
trap 'rm -rf "$BINARIES"' EXIT
: >"$log"
failed=0

die() { echo "gpu_check: $*" >&2; exit 1; }
row() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" | tee -a "$rows"; }
# The seconds that a deadline leaves, at most so many.
within() { local left=$(($1 - SECONDS)); echo $((left < $2 ? left : $2)); }
# Runs a command for so many seconds; what it says is in $said and in the log.
limited() {
  local seconds="$1" status=0
  shift
  timeout -k 3 "$seconds" "$@" >"$said" 2>&1 || status=$?
  { echo "== $* (status $status)"; cat "$said"; } >>"$log"
  return "$status"
}

for tool in timeout awk "$PYTHON"; do
  command -v "$tool" >/dev/null || die "$tool is missing"
done
[ -f target/gpu/programs.tar.xz ] || die "target/gpu is missing: run scripts/gpu_build.sh on a machine with cargo, and take target/gpu along"
"$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' target/gpu/programs.tar.xz "$BINARIES" ||
  die "target/gpu/programs.tar.xz cannot be unpacked"
for program in varft test-ops test-contract test-graphs test-parity test-train bench-ops bench-steps; do
  [ -x "$BINARIES/$program" ] || die "$program is not in target/gpu/programs.tar.xz: run scripts/gpu_build.sh again"
done

# The vendor's products: PyTorch brings a library of them where the system has none.
libraries="$("$PYTHON" - <<'PY' 2>/dev/null
import importlib.util, pathlib
roots = importlib.util.find_spec("nvidia").submodule_search_locations
print(":".join(str(file.parent) for root in roots for file in sorted(pathlib.Path(root).glob("*/lib/libcublasLt.so.*"))))
PY
)"
[ -z "$libraries" ] || export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries"
export CARGO_MANIFEST_DIR="$PWD" CARGO_BIN_EXE_varft="$BINARIES/varft"
export VARFT_TEST_DEVICE="$DEVICE" VARFT_BENCH_DEVICE="$DEVICE"
# For the python tool of a whole run; without these packages varft looks for an environment itself.
if [ -z "${VARFT_PYTHON:-}" ] && "$PYTHON" -c 'import cv2, numpy, PIL' 2>/dev/null; then
  VARFT_PYTHON="$(command -v "$PYTHON")"
  export VARFT_PYTHON
fi

# ---- the machine ----

card="$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -1)"
limited "$DOCTOR" "$BINARIES/varft" doctor --dir "$results"
gpu="$(sed -n 's/^[a-z]* *gpu *//p' "$said")"
row doctor gpu "${gpu:-not finished in $DOCTOR s}"
if [ "$DEVICE" = cuda ]; then
  case "$gpu" in "" | none*) die "no card to run on: ${gpu:-varft doctor did not end} (VARFT_BENCH_DEVICE=emulated shows what runs without one)" ;; esac
fi

# ---- tests ----

# A program of tests, the tests of it that are meant, their name in the table, and their seconds.
tests() {
  local seconds status=0
  seconds="$(within "$tests_end" "$4")"
  if [ "$seconds" -lt 2 ]; then
    row "tests on $DEVICE" "$3" "not run: no time left"
    return
  fi
  limited "$seconds" "$BINARIES/test-$1" "$2" || status=$?
  case "$status" in
    0) row "tests on $DEVICE" "$3" "$(sed -n 's/^test result: \(ok\)\. \([0-9]* passed\).*/\1: \2/p' "$said")" ;;
    124 | 137) row "tests on $DEVICE" "$3" "not finished in $seconds s"; failed=1 ;;
    *) row "tests on $DEVICE" "$3" "FAILED: $(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$said" | tr '\n' ' ')(status $status)"; failed=1 ;;
  esac
}
modules="$("$BINARIES/test-ops" --list 2>/dev/null | sed -n 's/::.*: test$//p' | sort -u)"
tests_end=$((SECONDS + TESTS))
for module in $modules; do tests ops "$module::" "$module" "$GROUP"; done
tests parity cuda_kernels parity "$GROUP"
tests graphs '' graphs "$GROUP"
tests train emulated:: train "$LARGE"
tests contract cuda_kernels contract "$LARGE"

# ---- compute-sanitizer ----

sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)"
if [ "$DEVICE" != cuda ]; then
  row compute-sanitizer "" "not run: no card"
elif [ -z "$sanitizer" ]; then
  row compute-sanitizer "" "not run: it is not installed"
else
  sanitizer_end=$((SECONDS + SANITIZER))
  for module in $modules; do
    for tool in memcheck racecheck; do
      seconds="$(within "$sanitizer_end" 20)"
      if [ "$seconds" -lt 3 ]; then
        row "compute-sanitizer $tool" "$module" "not run: no time left"
        continue
      fi
      status=0
      limited "$seconds" "$sanitizer" --tool "$tool" --error-exitcode 99 "$BINARIES/test-ops" "$module::" --test-threads=1 || status=$?
      summary="$(sed -n 's/^=* *\(ERROR SUMMARY\|RACECHECK SUMMARY\): //p' "$said" | tail -1)"
      case "$status" in
        0) row "compute-sanitizer $tool" "$module" "ok: ${summary:-no summary}" ;;
        124 | 137) row "compute-sanitizer $tool" "$module" "nothing found in $seconds s, not finished" ;;
        *) row "compute-sanitizer $tool" "$module" "FAILED: ${summary:-status $status}"; failed=1 ;;
      esac
    done
  done
fi

# ---- benches, and the table ----

report="$results/gpu_check.md"
{
  echo "**${card:-no card}**, $(date -u +%Y-%m-%d); $(head -1 target/gpu/manifest 2>/dev/null || echo 'no manifest')."
  echo "Targets are those of an NVIDIA H200. Times as fast: above 1 ours is faster."
  [ "$DEVICE" = cuda ] || echo "**Not measured on a GPU**: device $DEVICE beside PyTorch on the processor, to show that this runs. The figures mean nothing."
  echo
  "$PYTHON" benches/peers/gpu_ops.py --ops "$BINARIES/bench-ops" --steps "$BINARIES/bench-steps" --before "$rows" \
    --budget "$(within "$ALL" "$ALL")" 2> >(tee -a "$log" >&2)
} >"$report" || failed=1
echo
cat "$report"
exit "$failed"
