#!/usr/bin/env bash
# Builds what scripts/gpu_check.sh runs on a machine with an NVIDIA GPU: the tests that run there, the benches, and varft itself,
# with kernels by the pinned nvcc. No GPU and no driver are needed here. Everything lies in target/gpu/: the programs, stripped, in
# one archive (they share most of their bytes, the kernels), and a manifest. Take that folder and the repository's files to the
# other machine (x86-64 Linux, a system library no older than this one's).
set -euo pipefail
cd "$(dirname "$0")/.."

TESTS=(ops contract graphs parity train)
BENCHES=(ops steps)
MOST_MIB=56 # repository and archive together

die() { echo "gpu_build: $*" >&2; exit 1; }

[ "$(uname -sm)" = "Linux x86_64" ] || die "this machine is $(uname -sm): the binaries are for x86-64 Linux, build them there"
for tool in cargo python3 strip git; do
  command -v "$tool" >/dev/null || die "$tool is missing: install it"
done
NVCC="$(python3 scripts/kernels.py --nvcc)"
export NVCC

built="$(mktemp)"
programs="$(mktemp -d)"
trap 'rm -rf "$built" "$programs"' EXIT
cargo build --release --locked --message-format=json-render-diagnostics --bin varft "${TESTS[@]/#/--test=}" \
  "${BENCHES[@]/#/--bench=}" >"$built"

# Kind, name and path of each program that cargo made.
python3 - "$built" <<'PY' >"$programs/made"
import json, sys
for line in open(sys.argv[1]):
    m = json.loads(line)
    if m.get("reason") == "compiler-artifact" and m.get("executable"):
        print(m["target"]["kind"][0], m["target"]["name"], m["executable"])
PY
take() { # kind, name, as
  local path
  path="$(awk -v kind="$1" -v name="$2" '$1 == kind && $2 == name { print $3 }' "$programs/made" | tail -1)"
  [ -n "$path" ] || die "cargo made no $1 $2"
  strip -o "$programs/$3" "$path"
}
take bin varft varft
for t in "${TESTS[@]}"; do take test "$t" "test-$t"; done
for b in "${BENCHES[@]}"; do take bench "$b" "bench-$b"; done
rm "$programs/made"

rm -rf target/gpu
mkdir -p target/gpu
python3 - "$programs" target/gpu/programs.tar.xz <<'PY'
import lzma, pathlib, sys, tarfile
# The window is larger than any program, so that what two have in common is stored once.
window = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 48 << 20}]
with lzma.open(sys.argv[2], "w", filters=window) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
    for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
        archive.add(path, path.name)
PY
{
  echo "commit $(git rev-parse HEAD)$(git diff --quiet HEAD || echo ', with changes')"
  echo "built $(date -u +%Y-%m-%d) with $(rustc --version), $("$NVCC" --version | sed -n 's/^Cuda compilation tools, //p')"
  echo "system library $(ldd --version | sed -n '1s/.* //p')"
  (cd "$programs" && sha256sum *)
} >target/gpu/manifest

archive="$(stat -c %s target/gpu/programs.tar.xz)"
files="$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb 2>/dev/null | awk '$2 == "total" { s += $1 } END { print s }')"
all=$(((archive + files + 1048575) / 1048576))
cat target/gpu/manifest
(cd "$programs" && stat -c '%10s %n' *)
echo "archive $((archive >> 20)) MiB, repository $((files >> 20)) MiB, together $all of at most $MOST_MIB MiB"
[ "$all" -le "$MOST_MIB" ] || die "too large to take along"
