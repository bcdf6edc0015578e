"""Our engine and trainer beside their peers, alternating in one run, at preset `mid`, float32, two cores.

    python3 benches/peers/peers.py --python REF/bin/python [--llama BUILD/bin --gguf f32.gguf] [--rounds 5] [--only decode:1,vision:8]

Each round runs every contender once per case, in turn, so that what else the machine does hits all of them alike; the
table gives medians and the median of the per-round ratios. Ours is `cargo bench --bench steps -- --worker`.
"""
import argparse, json, re, statistics, subprocess
import protocol

CASES = ["decode:1", "decode:8", "decode:32", "prompt:1", "prompt:8", "vision:8", "train:4", "grpo:8"]
parser = argparse.ArgumentParser()
parser.add_argument("--python", required=True, help="a Python with transformers 5 and torch 2 (CPU)")
parser.add_argument("--llama", help="folder of llama-batched-bench")
parser.add_argument("--gguf", help="the text model of preset mid in float32")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--only", default=",".join(CASES))
args = parser.parse_args()


def llama(case):
    """llama.cpp has text only: the same 300 tokens and 128 new ones without the image."""
    name, batch = case.split(":")
    out = subprocess.run(
        [f"{args.llama}/llama-batched-bench", "-m", args.gguf, "-c", "16384", "-b", "2048", "-ub", "512", "-npp", "300",
         "-ntg", "128", "-npl", batch, "-t", "2", "-tb", "2", "-fa", "on", "--output-format", "jsonl"],
        capture_output=True, text=True).stdout
    row = json.loads(re.findall(r"^\{.*\}$", out, re.M)[-1])
    return row["t_tg"] * 127 / 128 if name == "decode" else row["t_pp"]


ours = protocol.ours("steps")
reference = protocol.Worker([args.python, __file__.replace("peers.py", "reference_worker.py")])
rows = {}
for case in args.only.split(","):
    for contender in (ours.run, reference.run):
        contender(case)  # warm-up
    seconds = {"ours": [], "transformers": [], "llama.cpp": []}
    text_case = "text-" + case
    compare_text = args.llama and case.split(":")[0] in ("decode", "prompt")
    if compare_text:
        seconds["ours, text"] = []
    for _ in range(args.rounds):
        seconds["ours"].append(ours.run(case))
        seconds["transformers"].append(reference.run(case))
        if compare_text:
            seconds["ours, text"].append(ours.run(text_case))
            seconds["llama.cpp"].append(llama(case))
    rows[case] = {k: v for k, v in seconds.items() if v}
    print(case, {k: round(statistics.median(v), 4) for k, v in rows[case].items()}, flush=True)

print("\n| case | ours s | transformers s | ratio | ours, text s | llama.cpp s | ratio |\n|---|---|---|---|---|---|---|")
for case, s in rows.items():
    median = lambda k: f"{statistics.median(s[k]):.4f}" if k in s else ""
    ratio = lambda a, b: f"{statistics.median(y / x for x, y in zip(s[a], s[b])):.2f}" if a in s and b in s else ""
    print(f"| {case} | {median('ours')} | {median('transformers')} | {ratio('ours', 'transformers')} "
          f"| {median('ours, text')} | {median('llama.cpp')} | {ratio('ours, text', 'llama.cpp')} |")
