"""Our operations beside PyTorch's own, alternating in one run, at the shapes of preset `mid`, float32, on the host's cores.

    python3 benches/peers/ops.py --python REF/bin/python [--rounds 5] [--only rms_norm,linear]

Each round runs every contender once per operation, in turn, so that what else the machine does hits both alike; the
table gives medians, and those of the per-round ratios. Ours is `cargo bench --bench ops -- --worker`, which also says
what the machine could do in that round (the limit: see the top of `benches/ops.rs`); PyTorch's is `torch_worker.py`.
"""
import argparse, statistics
import protocol

parser = argparse.ArgumentParser()
parser.add_argument("--python", required=True, help="a Python with torch 2 (CPU)")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--only", help="names of operations, by commas")
args = parser.parse_args()

us = protocol.ours("ops")
torch = protocol.Worker([args.python, __file__.replace("ops.py", "torch_worker.py")])
print("| op | shape | limit ms | ours ms | of the limit | torch ms | ratio |\n|---|---|---|---|---|---|---|", flush=True)
for case in us.ready["cases"]:
    op, shape = case.split(":")
    if args.only and op not in args.only.split(","):
        continue
    us.run(case), torch.run(case)  # warm-up
    rounds = [(us.ask(case), torch.run(case)) for _ in range(args.rounds)]
    median = lambda f: statistics.median(f(our["limit"], our["seconds"], their) for our, their in rounds)
    print(f"| {op} | {shape} | {1e3 * median(lambda limit, our, _: limit):.3f} | {1e3 * median(lambda _, our, their: our):.3f} "
          f"| {100 * median(lambda limit, our, _: limit / our):.0f}% | {1e3 * median(lambda _, our, their: their):.3f} "
          f"| {median(lambda _, our, their: their / our):.2f} |", flush=True)
