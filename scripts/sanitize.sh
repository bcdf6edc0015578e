#!/usr/bin/env bash
# Runs every op, and the emulator's own tests, with AddressSanitizer in place of the emulator's checks of loads and stores: it sees
# what those cannot, the ends of a thread's own arrays through pointers and the emulator's own mistakes. Undefined behaviour
# in kernels is reported by every build (kernels/emulator/undefined.cpp). Arguments go to the tests, such as a name.
set -euo pipefail
cd "$(dirname "$0")/.."

# Stacks are switched by hand, which the check for use after return cannot follow; what the process holds at its end is no leak.
export ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=0
export VARFT_SANITIZE=address
cargo test --release --locked --test ops "$@"
