"""The reference (transformers) as a bench worker (see `protocol.py`).

Cases, all at the shape of preset `mid` in float32 on two threads; each is run once per request and timed here:
    decode B     B prompts of 300 tokens with one 280x280 image each, 128 new tokens: seconds of the 127 tokens after
                 the first = (whole) - (one new token)
    prompt B     the same prompts, one new token, vision included
    vision B     the vision tower on B images of 280x280
    train        forward + backward of 4 sequences of 512 tokens with one image each
    grpo         one whole update (forward, backward, clipping, AdamW): 8 completions of 128 tokens on one 300-token prompt with an image,
                 the prompt and its image repeated for each completion, as TRL and the published trainer do
"""
import os, warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
from protocol import serve, timed
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
torch.manual_seed(0)
VISION_START, VISION_END, IMAGE = 8009, 8010, 8012
config = Qwen2_5_VLConfig(
    text_config=dict(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=4096, bos_token_id=8000, eos_token_id=8001,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12])),
    vision_config=dict(
        depth=8, hidden_size=320, intermediate_size=856, num_heads=4, out_hidden_size=512,
        fullatt_block_indexes=[3, 7], tokens_per_second=2),
    image_token_id=IMAGE, video_token_id=8013, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
model.set_attn_implementation("sdpa")
with torch.no_grad():
    model.lm_head.weight[8000:8014] = 0
generator = torch.Generator().manual_seed(1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)


def inputs(batch, tokens):
    ids = torch.randint(0, 8000, (batch, tokens), generator=generator)
    ids[:, 20], ids[:, 21:121], ids[:, 121] = VISION_START, IMAGE, VISION_END
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(400 * batch, 1176, generator=generator),
        image_grid_thw=torch.tensor([[1, 20, 20]] * batch), mm_token_type_ids=(ids == IMAGE).int())


def generate(i, new):
    with torch.no_grad():
        model.generate(**i, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=8000)


def run(case, batch):
    if case in ("decode", "prompt"):
        i = inputs(batch, 300)
        first = timed(lambda: generate(i, 1))
        if case == "prompt":
            return first
        return timed(lambda: generate(i, 128)) - first
    if case == "vision":
        i = inputs(batch, 300)
        with torch.no_grad():
            return timed(lambda: model.model.visual(i["pixel_values"], grid_thw=i["image_grid_thw"]))
    model.train()
    if case == "train":
        i = inputs(4, 512)
        labels = i["input_ids"].clone()
        labels[labels >= 8000] = -100

        def step():
            model.zero_grad(set_to_none=True)
            model(**i, labels=labels, use_cache=False).loss.backward()
    elif case == "grpo":
        one = inputs(1, 300)
        completions = torch.randint(0, 8000, (8, 128), generator=generator)
        ids = torch.cat([one["input_ids"].repeat(8, 1), completions], 1)
        advantages = torch.linspace(-1, 1, 8)[:, None]
        i = dict(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=one["pixel_values"].repeat(8, 1),
            image_grid_thw=one["image_grid_thw"].repeat(8, 1), mm_token_type_ids=(ids == IMAGE).int())

        def step():
            model.zero_grad(set_to_none=True)
            logits = model(**i, use_cache=False, logits_to_keep=129).logits[:, :-1]
            logps = torch.log_softmax(logits, -1).gather(2, completions[..., None])[..., 0]
            ratio = (logps - logps.detach()).exp()
            (-torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    else:
        raise ValueError(case)
    s = timed(step)
    model.eval()
    return s


serve(lambda case, size: run(case, int(size)), torch=torch.__version__)
