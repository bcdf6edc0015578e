"""Our operations, rollouts and training beside PyTorch's on a card, alternating in one run, and beside what the card can do.

    python3 benches/peers/gpu_ops.py --ops BENCH --steps BENCH [--budget 240] [--before ROWS] [--only linear,rms_norm]

BENCH are the programs of `benches/ops.rs` and `benches/steps.rs`; both sides have the shapes of `benches/work.toml`. PyTorch is
that of the Python which runs this. Each round runs both once, in turn, timed by the card's own clock over a burst, on operands
that no cache holds; medians count. The limit of a case is its operations over the rate of a large product, or its bytes over
that of a large copy, whichever takes longer, each rate the better one of both sides'. What takes too long or fails is said,
and the rest goes on. `VARFT_BENCH_DEVICE=emulated` shows without a card that all of this runs; the figures say nothing then.

Prints one Markdown table, with the rows (`what | case | result`, by tabs) of the file `--before` first.
"""
import argparse, os, statistics, sys, time
from pathlib import Path
import protocol

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--ops", required=True, help="the program of benches/ops.rs")
parser.add_argument("--steps", required=True, help="the program of benches/steps.rs")
parser.add_argument("--before", help="a file of rows that come first")
parser.add_argument("--budget", type=float, default=240, help="seconds for all of it")
parser.add_argument("--patience", type=float, default=40, help="seconds for one case of an operation")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--only", help="names of operations or steps, by commas")
args = parser.parse_args()

BEGUN = time.monotonic()
STEPS_SHARE = 0.35  # of the budget, which the steps keep for themselves
DEVICE = os.environ.get("VARFT_BENCH_DEVICE", "cuda")
EMULATED = DEVICE != "cuda"
left = lambda: args.budget - (time.monotonic() - BEGUN)
wanted = lambda case: not args.only or case.split(":")[0] in args.only.split(",")


class Side:
    """A worker that is started again after it has failed."""

    def __init__(self, name, command, env, patience):
        self.name, self.command, self.env, self.patience = name, command, env, patience
        self.worker, self.why = None, None
        self.start()

    def start(self):
        try:
            self.worker = protocol.Worker(self.command, self.env, self.patience)
            self.ready = self.worker.ready
        except protocol.Ended as e:
            self.worker, self.why = None, str(e)

    def ask(self, case):
        """The answer, or None with the reason in `why`."""
        if self.worker is None:
            return None
        try:
            return self.worker.ask(case)
        except protocol.Ended as e:
            self.worker.end()
            why = str(e)
            self.start()
            self.why = why if self.worker else self.why
            return None

    def end(self):
        if self.worker is not None:
            self.worker.end()
            self.worker = None


def short(text):
    """A reason as a cell of the table."""
    return " ".join(text.replace("|", "/").split())[:110]


def verdict(value, least):
    """A cell of a measured value beside the least one that will do."""
    if EMULATED:
        return "not run: no card"
    return f"{value:.2f} **{'win' if value >= least else 'short'}**"


def targets(op, shape, share, against):
    """The targets of a case: pairs of what is asked for and the cell that says whether it holds. `share`: of the limit;
    `against(peer)`: how many times as fast as PyTorch's case of that suffix."""
    tokens = int(shape.split("x")[0])
    of_copy = lambda: [("85% of the copy bandwidth", verdict(share, 0.85))]
    if op in ("linear", "linear_gated"):
        return of_copy() if tokens <= 8 else [("0.9 of cuBLAS", against("", 0.9))]
    if op in ("attention_causal", "attention_prefill", "attention_windows", "attention_full"):
        return [("PyTorch's FlashAttention-2", against("", 1.0))]
    if op in ("attention_causal_backward", "attention_windows_backward", "attention_full_backward"):
        return [("0.7 of PyTorch's", against("", 0.7)), ("the deterministic one", against("/deterministic", 1.0))]
    if op == "grpo_forward_backward":
        return [("within 1.25 of its three products", against("/products", 0.8))]
    if op == "patch_embed":
        return [("5 times PyTorch's", against("", 5.0))]
    memory_bound = ("attention_decode", "kv_cache", "rms_norm", "rope", "swiglu", "gelu", "embedding", "rows_", "cast", "sample_",
                    "norm", "adamw", "linear_backward_bias")
    return of_copy() if op.startswith(memory_bound) else []


def compare(us, them, case, rates):
    """The row of an operation."""
    op, shape = case.split(":")
    what = f"{op} {shape}"
    if us.ask(case) is None:  # warm-up
        return [what, "", "", "", "", "", "", f"failed: {short(us.why)}"]
    peers = {"": them.ask(case)}
    if op.startswith("attention") and op.endswith("backward"):
        peers["/deterministic"] = them.ask(f"{op}/deterministic:{shape}")
    if op == "grpo_forward_backward":
        peers["/products"] = them.ask(f"{op}/products:{shape}")
    missing = {suffix: them.why for suffix, answer in peers.items() if answer is None}
    ours, theirs = [], {suffix: [] for suffix in peers if suffix not in missing}
    for _ in range(args.rounds):
        answer = us.ask(case)
        if answer is None:
            return [what, "", "", "", "", "", "", f"failed: {short(us.why)}"]
        ours.append(answer["seconds"])
        for suffix in list(theirs):
            their = them.ask(f"{op}{suffix}:{shape}")
            if their is None:
                missing[suffix] = them.why
                theirs.pop(suffix)
            else:
                theirs[suffix].append(their["seconds"])
    seconds = statistics.median(ours)
    arithmetic, memory = answer["flops"] / rates["flops"], answer["bytes"] / rates["copies"]
    limit = max(arithmetic, memory)
    ratio = lambda suffix: statistics.median(theirs[suffix]) / seconds
    against = lambda suffix, least: verdict(ratio(suffix), least) if suffix in theirs else f"not run: {short(missing[suffix])}"
    goals = targets(op, shape, memory / seconds, against)
    torch_ms = "; ".join(f"{1e3 * statistics.median(t):.4f}{' ' + s if s else ''}" for s, t in theirs.items())
    return [what, f"{1e3 * limit:.4f} ({'FLOPs' if arithmetic > memory else 'bytes'})", f"{1e3 * seconds:.4f}",
            f"{100 * limit / seconds:.0f}%", torch_ms or f"not run: {short(missing.get('', ''))}",
            "; ".join(f"{ratio(s):.2f}" for s in theirs),
            "; ".join(goal for goal, _ in goals), "; ".join(cell for _, cell in goals)]


def step(us, case, rates):
    """The row of a step of the whole model."""
    what = case.replace(":", " ")
    answers = []
    for _ in range(3):
        answer = us.ask(case)
        if answer is None:
            return [what, "", "", "", "", "", "", f"failed: {short(us.why)}"]
        answers.append(answer)
        if left() < 2 * answer["seconds"]:
            break
    answer = answers[-1]
    seconds = statistics.median(a["seconds"] for a in answers[1:] or answers)  # the first one is the warm-up
    arithmetic, memory = answer["flops"] / rates["flops"], answer["bytes"] / rates["copies"]
    limit = arithmetic + memory if answer["after"] else max(arithmetic, memory)
    goal = cell = ""
    if case == "decode:64":
        goal, cell = "within 1.35 of bytes over bandwidth", verdict(memory / seconds, 1 / 1.35)
    if case.split(":")[0] == "grpo":
        goal, cell = "45% of the product rate", verdict(arithmetic / seconds, 0.45)
    return [f"{what}, {answer['model']}", f"{1e3 * limit:.1f} ({'FLOPs' if arithmetic > memory else 'bytes'})",
            f"{1e3 * seconds:.1f}", f"{100 * limit / seconds:.0f}%", "", "", goal, cell]


def worker(binary, patience):
    return Side("ours", [binary, "--worker"], {"VARFT_BENCH_DEVICE": DEVICE}, patience)


def progress(row):
    print(f"[{time.monotonic() - BEGUN:5.0f} s] " + " | ".join(row), file=sys.stderr, flush=True)
    return row


def everything():
    """All rows of the table, and what stands above it."""
    rows, notes = [], []
    us = worker(args.ops, args.patience)
    command = [sys.executable, str(Path(__file__).with_name("torch_worker.py"))]
    them = Side("torch", command, {"BENCH_DEVICE": "cpu" if EMULATED else "cuda", "PYTHONUNBUFFERED": "1"}, args.patience)
    other = them.ready if them.worker else None
    notes.append(f"PyTorch {other['torch']} on {other['name']}." if other else f"PyTorch: not run: {short(them.why)}")
    if us.worker is None:
        return [progress(["operations and steps", "", "", "", "", "", "", f"failed: {short(us.why)}"])], notes
    mine = us.ready
    better = lambda what: max(mine[what], other[what] if other and not EMULATED else 0)
    rates = dict(flops=better("flops"), copies=better("copies"))
    tera = lambda of: f"{of['flops'] / 1e12:.0f} TFLOP/s, {of['copies'] / 1e12:.2f} TB/s"
    if not EMULATED:
        theirs = f"; PyTorch's {tera(other)}" if other else ""
        notes.append(f"Rates of large products and copies: ours {tera(mine)}{theirs}.")
    for case in filter(wanted, mine["cases"]):
        if left() < STEPS_SHARE * args.budget:
            rows.append(progress([case.replace(":", " "), "", "", "", "", "", "", "not run: no time left"]))
        else:
            rows.append(progress(compare(us, them, case, rates)))
    # Their memory is the steps' now.
    us.end()
    them.end()
    steps = worker(args.steps, max(args.patience, left()))
    if steps.worker is None:
        return rows + [progress(["steps", "", "", "", "", "", "", f"failed: {short(steps.why)}"])], notes
    for case in filter(wanted, steps.ready["cases"]):
        if left() < 5:
            rows.append(progress([case.replace(":", " "), "", "", "", "", "", "", "not run: no time left"]))
        else:
            steps.worker.patience = max(1, left())
            rows.append(progress(step(steps, case, rates)))
    steps.end()
    return rows, notes


rows, notes = everything()
before = Path(args.before).read_text().splitlines() if args.before else []
print("\n".join(notes) + "\n")
print("| what | limit ms | ours ms | of the limit | PyTorch ms | times as fast | target | result |\n|---|---|---|---|---|---|---|---|")
for line in before:
    what, case, result = line.split("\t")
    print(f"| {what} {case} | | | | | | | {result} |")
for row in rows:
    print("| " + " | ".join(row) + " |")
