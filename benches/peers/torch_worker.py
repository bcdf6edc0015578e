"""PyTorch's operations as a bench worker (see `protocol.py`): a case is an operation and its shape, as `benches/ops.rs`
names them; the answer is the seconds of one run.

Each runs over several sets of operands, so that no cache holds what a run begins with, as ours does; results are kept
until their set comes round again. A backward pass is timed without its forward pass.
"""
import os
import torch
import torch.nn.functional as F
from protocol import serve, timed

torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
torch.manual_seed(0)
COLD = 160 << 20  # bytes of operands before the first come again
BURST = 0.02  # seconds of a measurement
STRIPS = [8, 8, 4]  # a side of 20 patches in windows of 8
rand = lambda *shape: torch.rand(*shape) * 2 - 1


def backward(f, *inputs):
    """The backward pass of `f(inputs)` alone; gradients come out fresh."""
    for x in inputs:
        x.requires_grad_()
    with torch.enable_grad():
        y = f(*inputs)
    dy = rand(*y.shape)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


# An operation: its shape in, what runs it on one set of operands out, and the bytes of that set.

def linear(m, k, n):
    x, w = rand(m, k), rand(n, k)
    return lambda: F.linear(x, w), x, w


def linear_backward_input(m, k, n):
    dy, w = rand(m, n), rand(n, k)
    return lambda: dy @ w, dy, w


def linear_backward_weight(m, k, n):
    dy, x, dw = rand(m, n), rand(m, k), torch.zeros(n, k)
    return lambda: dw.addmm_(dy.T, x), dy, x, dw


def pixels(images, patches):
    side = round(patches**0.5) * 14
    return torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8)


def cut(p):
    """Normalised patches `[patches, 1176]` in the order of the reference's processor."""
    n, grid = len(p), p.shape[1] // 14
    x = (p.permute(0, 3, 1, 2) * (1 / 255) - 0.5) / 0.25
    x = x.view(n, 3, grid // 2, 2, 14, grid // 2, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return x[:, :, :, :, :, :, None].expand(*x.shape[:6], 2, 14, 14).reshape(n * grid * grid, 1176)


def patch_embed(images, patches, n):
    p, w = pixels(images, patches), rand(n, 1176)
    return lambda: F.linear(cut(p), w), p, w


def patch_embed_backward_weight(images, patches, n):
    # PyTorch has kept the patches; ours makes them from the pixels once more.
    x, dy, dw = cut(pixels(images, patches)), rand(images * patches, n), torch.zeros(n, 1176)
    return lambda: dw.addmm_(dy.T, x), x, dy, dw


def scored(logits, targets):
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


def head(m, h, v):
    return rand(m, h), rand(v, h), torch.randint(0, v, (m,))


def logprobs(m, h, v):
    x, w, targets = head(m, h, v)
    return lambda: scored(F.linear(x, w), targets), x, w


def loss_forward_backward(m, h, v, loss):
    x, w, targets = head(m, h, v)
    x.requires_grad_(), w.requires_grad_()

    @torch.enable_grad()
    def step():
        loss(F.linear(x, w), targets).backward()  # gradients add up, as ours do
    return step, x, w


def nll_forward_backward(m, h, v):
    return loss_forward_backward(m, h, v, F.cross_entropy)


def grpo_forward_backward(m, h, v):
    old, advantage = rand(m), rand(m)

    def loss(logits, targets):
        ratio = (scored(logits, targets) - old).exp()
        return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).mean()
    return loss_forward_backward(m, h, v, loss)


causal = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def qkv(n, tokens, heads, kv_heads, hd):
    return rand(n, heads, tokens, hd), rand(n, kv_heads, tokens, hd), rand(n, kv_heads, tokens, hd)


def attention_causal(*shape):
    q, k, v = qkv(*shape)
    return lambda: causal(q, k, v), q, k, v


def attention_causal_backward(*shape):
    x = qkv(*shape)
    return backward(causal, *x), *x


def attention_decode(n, context, heads, kv_heads, hd):
    # The query heads of a key head as rows of one product: faster here than `enable_gqa`, and the same result.
    q, (_, k, v) = rand(n, kv_heads, heads // kv_heads, hd), qkv(n, context, 1, kv_heads, hd)
    return lambda: F.scaled_dot_product_attention(q, k, v), k, v


def windows(images, patches, heads, hd):
    """Windows of one size in one batch, which is kinder than the reference's loop over windows."""
    sizes = [a * b for a in STRIPS for b in STRIPS]
    assert sum(sizes) == patches
    return [qkv(images * sizes.count(s), s, heads, heads, hd) for s in sorted(set(sizes))]


def attention_windows(*shape):
    groups = windows(*shape)
    return lambda: [F.scaled_dot_product_attention(*x) for x in groups], *sum(groups, ())


def attention_windows_backward(*shape):
    groups = windows(*shape)
    each = [backward(F.scaled_dot_product_attention, *x) for x in groups]
    return lambda: [f() for f in each], *sum(groups, ())


def attention_full(images, patches, heads, hd):
    x = qkv(images, patches, heads, heads, hd)
    return lambda: F.scaled_dot_product_attention(*x), *x


def attention_full_backward(images, patches, heads, hd):
    x = qkv(images, patches, heads, heads, hd)
    return backward(F.scaled_dot_product_attention, *x), *x


def kv_cache_write(tokens, heads, hd):
    k, v, slots = rand(tokens, heads, hd), rand(tokens, heads, hd), torch.arange(tokens)
    keys, values = torch.zeros(tokens, heads, hd), torch.zeros(tokens, heads, hd)
    return lambda: (keys.index_copy_(0, slots, k), values.index_copy_(0, slots, v)), k, v, keys, values


def rms_norm(rows, cols):
    x, w = rand(rows, cols), rand(cols)
    return lambda: F.rms_norm(x, (cols,), w, 1e-6), x


def rms_norm_backward(rows, cols):
    x, w = rand(rows, cols), rand(cols)
    return backward(lambda x, w: F.rms_norm(x, (cols,), w, 1e-6), x, w), x, x


def rope(rows, heads, hd):
    """As transformers does it."""
    x, cos, sin = rand(rows, heads, hd), rand(rows, 1, hd), rand(rows, 1, hd)

    def turn():
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin
    return turn, x


gate = lambda g, u: F.silu(g) * u


def swiglu(rows, i):
    g, u = rand(rows, i), rand(rows, i)
    return lambda: gate(g, u), g, u


def swiglu_backward(rows, i):
    g, u = rand(rows, i), rand(rows, i)
    return backward(gate, g, u), g, u


def gelu(rows, cols):
    x = rand(rows, cols)
    return lambda: F.gelu(x), x


def gelu_backward(rows, cols):
    x = rand(rows, cols)
    return backward(F.gelu, x), x


def embedding(tokens, v, h):
    ids, table = torch.randint(0, v, (tokens,)), rand(v, h)
    return lambda: F.embedding(ids, table), table


def embedding_backward(tokens, v, h):
    # Into the gradient that is there; a fresh one would have to be zeroed as a whole.
    ids, dy, dtable = torch.randint(0, v, (tokens,)), rand(tokens, h), torch.zeros(v, h)
    return lambda: dtable.index_add_(0, ids, dy), dy, dtable


def sampler(choose, temperature):
    def case(rows, v):
        logits = rand(rows, v) * 8

        def draw():
            logp = torch.log_softmax(logits / temperature if temperature != 1 else logits, -1)
            token = choose(logits, logp)
            return token, logp.gather(1, token)
        return draw, logits
    return case


def top_k(logits, logp):
    values, ids = logits.topk(50)
    return ids.gather(1, torch.multinomial(values.softmax(-1), 1))


def top_p(logits, logp):
    p, ids = logp.exp().sort(-1, descending=True)
    p[p.cumsum(-1) - p >= 0.9] = 0
    return ids.gather(1, torch.multinomial(p, 1))


def norm_and_adamw(n):
    p = torch.nn.Parameter(rand(n))
    p.grad = rand(n)
    optimizer = torch.optim.AdamW([p], lr=1e-6, weight_decay=0.0, fused=True)

    def step():
        torch.nn.utils.get_total_norm([p.grad])
        optimizer.step()
    return step, p, p, p, p


OPS = {f.__name__: f for f in (
    linear, linear_backward_input, linear_backward_weight, patch_embed, patch_embed_backward_weight, logprobs,
    nll_forward_backward, grpo_forward_backward, attention_causal, attention_causal_backward, attention_decode,
    attention_windows, attention_windows_backward, attention_full, attention_full_backward, kv_cache_write, rms_norm,
    rms_norm_backward, swiglu, swiglu_backward, gelu, gelu_backward, embedding, embedding_backward, norm_and_adamw)}
OPS |= {"rope_text": rope, "rope_vision": rope,
        "sample_greedy": sampler(lambda x, logp: x.argmax(-1, keepdim=True), 1),
        "sample_temperature": sampler(lambda x, logp: torch.multinomial(logp.exp(), 1), 0.7),
        "sample_top_k_50": sampler(top_k, 1), "sample_top_p_0.9": sampler(top_p, 1)}


class Case:
    """The sets of operands of one operation."""

    def __init__(self, op, shape):
        self.name = (op, shape)
        make = lambda: OPS[op](*map(int, shape.split("x")))
        run, *operands = make()
        sets = -(-COLD // sum(x.nbytes for x in operands))
        self.runs = [run] + [make()[0] for _ in range(sets - 1)]
        self.results = [None] * sets
        self.next, self.times = 0, 3
        self.times = max(2, int(BURST / self.seconds()))

    def once(self):
        self.next = (self.next + 1) % len(self.runs)
        self.results[self.next] = self.runs[self.next]()

    def seconds(self):
        """Of one run: the least of a burst, since other work can only add to it."""
        return min(timed(self.once) for _ in range(self.times))


ready = None


@torch.no_grad()
def run(op, shape):
    global ready
    if ready is None or ready.name != (op, shape):
        ready = None  # frees the old operands first
        ready = Case(op, shape)
    return ready.seconds()


serve(run, torch=torch.__version__)
