"""PyTorch's operations as a bench worker (see `protocol.py`): a case is an operation and its shape, as `benches/work.toml`
names them; the answer is the seconds of one run.

`BENCH_DEVICE` is `cpu` (float32) or `cuda` (bfloat16, with what our kernels keep in float32 in float32 too). Each case runs
over several sets of operands, so that no cache holds what a run begins with, as ours does; results are kept until their set
comes round again. A backward pass is timed without its forward pass. Three cases more than ours have: `NAME/deterministic`
(under `use_deterministic_algorithms`), and for the loss `NAME/products`, its three products alone.
"""
import os
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from protocol import serve, timed

DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
CUDA = DEVICE == "cuda"
FLOAT = torch.bfloat16 if CUDA else torch.float32
if not CUDA:
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "2")))
torch.manual_seed(0)
torch.set_default_device(DEVICE)
torch.utils.deterministic.fill_uninitialized_memory = False  # a check of its own, which would be timed
COLD, MOST_SETS = 160 << 20, 1000  # bytes of operands before the first come again, and sets
BURST = 0.005 if CUDA else 0.02  # seconds of a measurement
MOST_RUNS = 200  # of one, on a card
# What is in a card's cache goes, and while it does so the host gets ahead with its launches.
flush = torch.empty((512 << 20) if CUDA else 0, dtype=torch.uint8)
rand32 = lambda *shape: torch.rand(*shape) * 2 - 1
rand = lambda *shape: rand32(*shape).to(FLOAT)


def backward(f, *inputs):
    """The backward pass of `f(inputs)` alone; gradients come out fresh."""
    for x in inputs:
        x.requires_grad_()
    with torch.enable_grad():
        y = f(*inputs)
    dy = rand(*y.shape)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


# An operation: its shape in, what runs it on one set of operands out, and the operands of that set.

def linear(m, k, n):
    x, w = rand(m, k), rand(n, k)
    return lambda: F.linear(x, w), x, w


def linear_gated(m, k, n):
    x, w = rand(m, k), rand(2 * n, k)

    def step():
        gate, up = F.linear(x, w).chunk(2, -1)
        return F.silu(gate) * up
    return step, x, w


def linear_backward_input(m, k, n):
    dy, w = rand(m, n), rand(n, k)
    return lambda: dy @ w, dy, w


def linear_backward_weight(m, k, n):
    dy, x = rand(m, n), rand(m, k)
    if CUDA:  # not added to what is there, and rounded: PyTorch's own way with bfloat16 weights
        return lambda: dy.T @ x, dy, x
    dw = torch.zeros(n, k)
    return lambda: dw.addmm_(dy.T, x), dy, x, dw


def linear_backward_bias(m, n):
    dy, db = rand(m, n), torch.zeros(n)
    return lambda: db.add_(dy.sum(0, dtype=torch.float32)), dy


def pixels(images, side):
    return torch.randint(0, 256, (images, side * 14, side * 14, 3), dtype=torch.uint8)


def cut(p):
    """Normalised patches `[patches, 1176]` in the order of the reference's processor."""
    n, grid = len(p), p.shape[1] // 14
    x = ((p.permute(0, 3, 1, 2) * (1 / 255) - 0.5) / 0.25).to(FLOAT)
    x = x.view(n, 3, grid // 2, 2, 14, grid // 2, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return x[:, :, :, :, :, :, None].expand(*x.shape[:6], 2, 14, 14).reshape(n * grid * grid, 1176)


def patch_embed(images, side, n):
    p, w = pixels(images, side), rand(n, 1176)
    return lambda: F.linear(cut(p), w), p, w


def patch_embed_backward_weight(images, side, n):
    # PyTorch has kept the patches; ours makes them from the pixels once more.
    x, dy = cut(pixels(images, side)), rand(images * side * side, n)
    if CUDA:
        return lambda: dy.T @ x, x, dy
    dw = torch.zeros(n, 1176)
    return lambda: dw.addmm_(dy.T, x), x, dy, dw


def scored(logits, targets):
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


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
    return loss_forward_backward(m, h, v, lambda logits, targets: F.cross_entropy(logits.float(), targets))


def grpo_forward_backward(m, h, v):
    old, advantage = rand32(m), rand32(m)

    def loss(logits, targets):
        ratio = (scored(logits, targets) - old).exp()
        return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).mean()
    return loss_forward_backward(m, h, v, loss)


def three_products(m, h, v):
    x, w, dlogits = rand(m, h), rand(v, h), rand(m, v)
    return lambda: (F.linear(x, w), dlogits @ w, dlogits.T @ x), x, w, dlogits


def attend(q, k, v, **options):
    """PyTorch's attention; on a card by its FlashAttention-2 backend and no other."""
    if not CUDA:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options)


causal = lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True)


def qkv(n, tokens, heads, kv_heads, hd):
    return rand(n, heads, tokens, hd), rand(n, kv_heads, tokens, hd), rand(n, kv_heads, tokens, hd)


def attention_causal(*shape):
    q, k, v = qkv(*shape)
    return lambda: causal(q, k, v), q, k, v


def attention_causal_backward(*shape):
    x = qkv(*shape)
    return backward(causal, *x), *x


def attention_prefill(n, queries, context, heads, kv_heads, hd):
    q, (_, k, v) = rand(n, heads, queries, hd), qkv(n, context, 1, kv_heads, hd)
    mask = causal_lower_right(queries, context)
    if not CUDA:  # its own class has no grouped heads there
        mask = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
    return lambda: attend(q, k, v, attn_mask=mask, enable_gqa=True), q, k, v


def attention_decode(n, context, heads, kv_heads, hd):
    # The query heads of a key head as rows of one product: faster here than `enable_gqa`, and the same result.
    q, (_, k, v) = rand(n, kv_heads, heads // kv_heads, hd), qkv(n, context, 1, kv_heads, hd)
    return lambda: attend(q, k, v), k, v


def windows(images, side, heads, hd):
    """Windows of one size in one batch, which is kinder than the reference's loop over windows."""
    strips = [min(8, side - at) for at in range(0, side, 8)]
    sizes = [a * b for a in strips for b in strips]
    return [qkv(images * sizes.count(s), s, heads, heads, hd) for s in sorted(set(sizes))]


def attention_windows(*shape):
    groups = windows(*shape)
    return lambda: [attend(*x) for x in groups], *sum(groups, ())


def attention_windows_backward(*shape):
    groups = windows(*shape)
    each = [backward(attend, *x) for x in groups]
    return lambda: [f() for f in each], *sum(groups, ())


def attention_full(images, side, heads, hd):
    x = qkv(images, side * side, heads, heads, hd)
    return lambda: attend(*x), *x


def attention_full_backward(images, side, heads, hd):
    x = qkv(images, side * side, heads, heads, hd)
    return backward(attend, *x), *x


def kv_cache_write(tokens, held, heads, hd):
    rows, slots = rand(tokens, held, hd), torch.arange(tokens)
    k, v = rows[:, held - 2 * heads:held - heads], rows[:, held - heads:]
    keys, values = torch.zeros(tokens, heads, hd).to(FLOAT), torch.zeros(tokens, heads, hd).to(FLOAT)
    return lambda: (keys.index_copy_(0, slots, k), values.index_copy_(0, slots, v)), k, v, keys, values


def kv_cache_gather(tokens, held, heads, hd):
    k, v, slots = rand32(tokens, heads, hd), rand32(tokens, heads, hd), torch.arange(tokens)
    return lambda: (k.index_select(0, slots).to(FLOAT), v.index_select(0, slots).to(FLOAT)), k, v, k


def rope_into_pages(tokens, heads, kv_heads, hd):
    rows, slots = rand(tokens, heads + 2 * kv_heads, hd), torch.arange(tokens)
    turn, keys = rope(tokens, heads + kv_heads, heads + 2 * kv_heads, hd)[0], torch.zeros(tokens, kv_heads, hd, dtype=FLOAT)
    values = torch.zeros_like(keys)

    def step():
        turned = turn()
        keys.index_copy_(0, slots, turned[:, heads:])
        values.index_copy_(0, slots, rows[:, heads + kv_heads:])
        return turned
    return step, rows, rows


def rms_norm(rows, cols):
    x, w = rand(rows, cols), rand(cols)
    return lambda: F.rms_norm(x, (cols,), w, 1e-6), x


def rms_norm_backward(rows, cols):
    x, w = rand(rows, cols), rand(cols)
    return backward(lambda x, w: F.rms_norm(x, (cols,), w, 1e-6), x, w), x, x


def rope(rows, turned, held, hd):
    """As transformers does it."""
    x, cos, sin = rand(rows, held, hd), rand(rows, 1, hd), rand(rows, 1, hd)

    def turn():
        heads = x[:, :turned]
        a, b = heads.chunk(2, -1)
        return heads * cos + torch.cat((-b, a), -1) * sin
    return turn, x


def rope_tables(rows, hd):
    """As transformers does it: angles on three axes, of which each pair takes its own."""
    positions, inverse = torch.arange(rows).expand(3, rows).float(), 1e6 ** (-torch.arange(0, hd, 2) / hd)
    a = 3 * hd // 16
    sections = [hd // 2 - 2 * a, a, a]

    def tables():
        angles = positions[:, :, None] * inverse
        own = torch.cat([part[i] for i, part in enumerate(angles.split(sections, -1))], -1)
        return own.cos(), own.sin()
    return tables, positions


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
    return lambda: dtable.index_add_(0, ids, dy.float()), dy, dtable


def rows_gather(rows, width):
    x, index = rand(rows, width), torch.randperm(rows)
    return lambda: x.index_select(0, index), x


def rows_scatter_add(rows, width):
    x, y, index = rand(rows, width), rand(rows, width), torch.arange(rows).flip(0)
    return lambda: y.index_add_(0, index, x), x, y


def cast(elements):
    x = rand32(elements)
    return lambda: x.to(torch.bfloat16), x


def sampler(choose, temperature):
    def case(rows, v):
        logits = rand32(rows, v) * 8

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


def norm(n):
    g = rand32(n)
    return lambda: torch.nn.utils.get_total_norm([g]), g


def adamw(n):
    p = torch.nn.Parameter(rand32(n))
    p.grad = rand32(n)
    optimizer = torch.optim.AdamW([p], lr=1e-6, weight_decay=0.0, fused=True)
    weights = torch.zeros(n, dtype=FLOAT) if CUDA else None

    def step():
        optimizer.step()
        if CUDA:
            weights.copy_(p)
    return step, p, p, p, p


OPS = {f.__name__: f for f in (
    linear, linear_gated, linear_backward_input, linear_backward_weight, linear_backward_bias, patch_embed,
    patch_embed_backward_weight,
    logprobs, nll_forward_backward, grpo_forward_backward, attention_causal, attention_causal_backward, attention_prefill,
    attention_decode, attention_windows, attention_windows_backward, attention_full, attention_full_backward,
    kv_cache_write, kv_cache_gather, rope_into_pages, rms_norm, rms_norm_backward, rope, rope_tables, swiglu,
    swiglu_backward, gelu, gelu_backward, embedding, embedding_backward, rows_gather, rows_scatter_add, cast, norm, adamw)}
OPS |= {"sample_greedy": sampler(lambda x, logp: x.argmax(-1, keepdim=True), 1),
        "sample_temperature": sampler(lambda x, logp: torch.multinomial(logp.exp(), 1), 0.7),
        "sample_top_k_50": sampler(top_k, 1), "sample_top_p_0.9": sampler(top_p, 1),
        "grpo_forward_backward/products": three_products}


class Case:
    """The sets of operands of one operation."""

    def __init__(self, op, shape):
        self.name = (op.split("/")[0], shape)
        self.deterministic = op.endswith("/deterministic")
        op = OPS[op.removesuffix("/deterministic")]
        make = lambda: op(*map(int, shape.split("x")))
        run, *operands = make()
        sets = min(MOST_SETS, -(-COLD // sum(x.nbytes for x in operands)))
        self.runs = [run] + [make()[0] for _ in range(sets - 1)]
        self.results = [None] * sets
        self.next, self.times = 0, 3
        self.seconds()
        self.times = min(MOST_RUNS if CUDA else 10_000, max(3 if CUDA else 2, int(BURST / self.seconds())))

    def once(self):
        self.next = (self.next + 1) % len(self.runs)
        self.results[self.next] = self.runs[self.next]()

    def seconds(self):
        """Of one run: on a card the mean of a burst by its own clock, otherwise the least of one, since other work can only add."""
        torch.use_deterministic_algorithms(self.deterministic)
        if not CUDA:
            return min(timed(self.once) for _ in range(self.times))
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        first.record()
        for _ in range(self.times):
            self.once()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / self.times


def rates():
    """Bytes a second of a large copy, read and written, and operations a second of a large product."""
    size, side = (1 << 30, 8192) if CUDA else (1 << 26, 1024)
    a, b = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    x, y = rand(side, side), rand(side, side)
    copy, product = Case.__new__(Case), Case.__new__(Case)
    for case, run in ((copy, lambda: b.copy_(a)), (product, lambda: x @ y)):
        case.runs, case.results, case.next, case.times, case.deterministic = [run], [None], 0, 5, False
        case.seconds()
    best = lambda case: min(case.seconds() for _ in range(3))
    return dict(copies=2 * size / best(copy), flops=2 * side**3 / best(product))


held = {}  # of one operation and shape, by what is asked of it


@torch.no_grad()
def run(op, shape):
    name = (op.split("/")[0], shape)
    if any(case.name != name for case in held.values()):
        held.clear()  # frees the old operands first
        if CUDA:
            torch.cuda.empty_cache()  # for the other side, which needs the card's memory too
    if op not in held:
        held[op] = Case(op, shape)
    return held[op].seconds()


with torch.no_grad():
    known = dict(torch=torch.__version__, name=torch.cuda.get_device_name() if CUDA else "cpu", **rates())
serve(run, **known)
