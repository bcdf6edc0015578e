"""What we save, transformers loads: every tensor under its name, and the numbers that we compute from them.

    REF/bin/python benches/peers/saved.py [--varft target/release/varft] [FOLDER ...]

A FOLDER is one that `varft init` wrote, or a run's checkpoint (`runs/NAME/checkpoints/step-N`); without any, one is made
with `varft init tiny` in each element type. transformers must miss no tensor of it and find none too many. Then a
conversation with two images goes through `varft inspect` and through transformers, both computing in float32: positions
must be equal, and the largest differences of everything else are printed. Exits with 1 where one is above 2e-4.
"""
import argparse, json, os, pathlib, subprocess, sys, tempfile, warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
TOLERANCE = 2e-4  # as in tests/parity.rs
ROOT = pathlib.Path(__file__).resolve().parents[2]


def picture(path, width, height):
    """A gradient under stripes."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x * 255 // width, y * 255 // height, (x + 2 * y) % 17 * 15) for y in range(height) for x in range(width)])
    image.save(path)


def conversation(work):
    picture(work / "a.png", 180, 260)
    picture(work / "b.png", 96, 64)
    shown = lambda name: {"type": "image", "image": name}
    said = lambda text: {"type": "text", "text": text}
    talk = [
        {"role": "user", "content": [shown("a.png"), said("What is written here?")]},
        {"role": "assistant", "content": [said("<answer> nothing </answer>")]},
        {"role": "user", "content": [shown("b.png"), said("And here? Don't say 5.")]},
    ]
    path = work / "talk.json"
    path.write_text(json.dumps(talk))
    return path


def load(folder):
    """The model, once transformers agrees about every name and shape."""
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        sys.exit(f"{folder}: transformers does not agree about its tensors: {wrong}")
    return model.eval()


def differences(model, ours):
    """The largest difference of each of our tensors from transformers' own."""
    ids, grid = ours["input_ids"], ours["image_grid_thw"]
    kinds = (ids == model.config.image_token_id).int()
    positions, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grid)
    if not torch.equal(positions, ours["position_ids"]):
        sys.exit("the positions differ")
    model.model.rope_deltas = None
    with torch.no_grad():
        embeds = model.model.visual(ours["pixel_values"], grid_thw=grid).pooler_output
        logits = model(input_ids=ids, pixel_values=ours["pixel_values"], image_grid_thw=grid, mm_token_type_ids=kinds).logits
    log_probs = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    theirs = dict(image_embeds=embeds, logits=logits, log_probs=log_probs)
    return {name: (ours[name] - t).abs().max().item() for name, t in theirs.items()}, logits.abs().max().item()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--varft", default=ROOT / "target/release/varft", help="the binary")
parser.add_argument("folders", nargs="*", metavar="FOLDER")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as work:
    work = pathlib.Path(work)
    varft = lambda *words: subprocess.run([args.varft, *words], check=True, stdout=subprocess.DEVNULL)
    folders = args.folders
    if not folders:
        folders = [work / dtype for dtype in ("f32", "bf16", "f16")]
        for folder in folders:
            varft("init", "tiny", folder, "--dtype", folder.name, "--seed", "3")
    talk, out = conversation(work), work / "inspected.safetensors"
    worst = 0.0
    for folder in folders:
        model = load(folder)
        varft("inspect", "--model", folder, talk, "--out", out)
        found, scale = differences(model, load_file(out))
        tensors, values = len(model.state_dict()), sum(p.numel() for p in model.parameters())
        figures = ", ".join(f"{name} {d:.1e}" for name, d in found.items())
        print(f"{folder}: {tensors} tensors, {values} values; largest differences: {figures}; largest logit {scale:.1f}", flush=True)
        worst = max(worst, *found.values())
if not worst <= TOLERANCE:
    sys.exit(f"differences of up to {worst:.1e} are more than {TOLERANCE:.0e}")
