"""The decode loop on a GPU: a step is one CUDA graph, and the host looks at it every few steps.

sample.generate calls it for a model on a GPU; what it returns, and why a completion depends on its prompt, the
seed and its id alone, is said there. What differs from the loop on a CPU is who knows what. There the host sees
every token. Here a step of SmolLM2 is some 300 kernels of a few microseconds, less than the host needs to start
them, so everything that a step needs lies on the device (Slots), a step changes it in place, its kernels are
recorded once and replayed with one call, and the host reads which rows have ended every CHECK_EVERY steps.

    step        draw a token for each row, write it down, mark the rows that ended, advance the others
    Graphs      the first step of a batch size runs as it stands (which compiles the kernels), the second is recorded
    Engine      cache, state and graphs of a model, kept between calls: an RL step is one call, and recording is half of it
    decode_all  admits prompts, replays, collects the rows that ended and moves the last rows into their places

Rows: graphs exist for powers of two, and rows beyond the living ones rest. A resting row costs little: it reads
one position of the cache, and the weights are read anyway. A row that ends between two looks rests too.

A step reads the weights and each row's own keys and values: SmolLM2 in bfloat16 at 256 rows of 1000 positions
0.27 + 5.9 GB, 1.4 ms at 4.3 TB/s. What is left out: paging, one kernel for a whole layer.
"""

import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from engines.batch import begin_batch, draw_tokens, prefill
from kernels import add_rmsnorm, decode_attention, philox_uniform, rope_write, swiglu
from model import KVCache

ROOM = 128  # the cache's length and the uniforms of a row are rounded up to this: prompts differ in every call
KEEP_SHARE = 0.25  # of a GPU's memory: what a larger cache takes is given back after the call, for training needs it
CHECK_EVERY = 8  # steps between two looks: a row that has ended rests for half as many on average


@dataclass
class Slots:
    """What the rows of the batch are at; row r of the KV cache is row r here.

    hidden [R,D]: the last token's state; tokens [R,T+1] int64, logprob [R,T+1] float32: by position, the last column
    takes what resting rows write; draws [R,N,2] float64: the uniforms of the n-th new token; length, first, limit [R]
    int64: tokens so far, of the prompt, at most; running, stopped [R] bool: has not ended, ended by a stop id.
    """

    hidden: torch.Tensor
    tokens: torch.Tensor
    logprob: torch.Tensor
    draws: torch.Tensor
    length: torch.Tensor
    first: torch.Tensor
    limit: torch.Tensor
    running: torch.Tensor
    stopped: torch.Tensor


def empty_slots(model, rows, T, longest_draw):
    def zeros(*shape, dtype=torch.int64):
        return torch.zeros(rows, *shape, dtype=dtype, device=model.head.device)

    return Slots(zeros(model.cfg.hidden_size, dtype=model.head.dtype), zeros(T + 1), zeros(T + 1, dtype=torch.float32),
                 zeros(longest_draw, 2, dtype=torch.float64), zeros(), zeros(), zeros(), zeros(dtype=torch.bool),
                 zeros(dtype=torch.bool))


def rows_of_graph(n):
    """The power of two that holds n rows."""
    return 1 << max(0, n - 1).bit_length()


def rotary_tables(model, T):
    """cos, sin [T,d] float32."""
    return [table[:, 0] for table in model._positions(T, model.head.device)]


def decode_step(model, token, cache, length, tables=None):
    """As model.decode, without an integer that the host would have to know: token [B], length [B] (tokens already
    there), tables: rotary_tables of the cache's length -> hidden [B,D]. Ten launches a layer on a GPU."""
    cfg, B = model.cfg, len(token)
    tables = tables or rotary_tables(model, cache.k.shape[3])
    seen = length + 1

    def attend(i):
        return lambda q: decode_attention(q, cache.k[i], cache.v[i], seen, window=cfg.window(i), **model.scoring)

    if cfg.family.gemma:  # norms on both sides of each product: PyTorch's operations, our attention
        def write_and_attend(i):
            def of_layer(q, k, v):
                rows = torch.arange(B, device=token.device)
                cache.k[i][rows, :, length], cache.v[i][rows, :, length] = k[:, 0], v[:, 0]
                return attend(i)(q[:, 0]).view(B, 1, -1)

            return of_layer

        here = tuple(table[length][:, None, None] for table in tables)
        return model._run(token[:, None], here, write_and_attend)[:, 0]

    x, change = model.embed(token), None
    for i, layer in enumerate(model.layers):
        x, y = add_rmsnorm(x, change, layer.attn_norm.weight, cfg.rms_norm_eps)
        qkv = layer.qkv(y)
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        qkv = qkv.view(B, -1, cfg.head_dim)
        if layer.q_norm is not None:
            H, K = cfg.num_attention_heads, cfg.num_key_value_heads
            q, k, v = qkv.split([H, K, K], 1)
            qkv = torch.cat([layer.q_norm(q), layer.k_norm(k), v], 1)
        q = rope_write(qkv, *tables, length, cache.k[i], cache.v[i])
        x, y = add_rmsnorm(x, layer.out(attend(i)(q).view(B, -1)), layer.mlp_norm.weight, cfg.rms_norm_eps)
        change = layer.down(swiglu(layer.gate_up(y)))
    return add_rmsnorm(x, change, model.norm.weight, cfg.rms_norm_eps)[1]


def step(model, cache, slots, stops, n, draw, tables=None):
    """A token for every row 0..n-1 that is running, and the state after it; in place, nothing leaves the device.
    stops [V] bool; tables as in decode_step; draw(hidden [n,D], uniform [n,2]) -> token [n], logprob [n]."""
    rows = torch.arange(n, device=stops.device)
    at, live = slots.length[:n], slots.running[:n]
    token, logprob = draw(slots.hidden[:n], slots.draws[rows, torch.where(live, at - slots.first[:n], 0)])
    column = torch.where(live, at, slots.tokens.shape[1] - 1)
    slots.tokens[rows, column], slots.logprob[rows, column] = token, logprob
    stopped = live & stops[token]
    running = live & ~stopped & (at + 1 < slots.limit[:n])
    slots.hidden[:n] = decode_step(model, token, cache, torch.where(running, at, 0), tables)
    slots.stopped[:n] |= stopped
    slots.length[:n] += live
    slots.running[:n] = running


class Graphs:
    """run(n, *setting) does `step(n, *setting)`: on a GPU from the third time on as a replay of what was recorded the second
    time. On a CPU it is the step itself, so that the tests need no GPU. Graphs share their scratch memory (they never run side
    by side); a call begins with its largest batch, so the largest is recorded first and the others fit into what it took."""

    def __init__(self, step, device):
        self.step, self.device, self.graphs, self.pool = step, device, {}, None

    def run(self, *key):
        if self.device.type != "cuda" or key not in self.graphs:
            self.graphs[key] = None
            return self.step(*key)
        if self.graphs[key] is None:
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.pool):
                self.step(*key)  # recorded, not run
            self.pool = self.graphs[key].pool()
        self.graphs[key].replay()


class Engine:
    """What the device holds for one model: cache and state of `rows` rows of T tokens, the stop ids, and the graphs, which hold
    the addresses of all of it and of the weights. A graph is for a batch size and a sampler (temperature, top_k, top_p, min_p:
    constants of its kernels); seeds, prompts, limits and stop ids are data. It does not hold the model, under whose weak
    reference it is kept: what a step does is given to the graphs for the length of a call."""

    def __init__(self, model, rows, T, longest_draw):
        self.device, self.rows, self.T, self.longest_draw = model.head.device, rows, T, longest_draw
        self.weights = addresses(model)
        self.cache = KVCache(model.cfg, rows, T, self.device, model.head.dtype)
        self.state = empty_slots(model, rows, T, longest_draw)
        self.stops = torch.zeros(model.cfg.vocab_size, dtype=torch.bool, device=self.device)
        # Rotary tables that the graphs read: a longer prompt makes the model build others, and these must not be freed then.
        self.tables = rotary_tables(model, T)
        self.graphs = Graphs(None, self.device)

    def fits(self, model, rows, T, longest_draw):
        room = self.rows >= rows and self.T >= T and self.longest_draw >= longest_draw
        return room and self.weights == addresses(model)


_engines = WeakKeyDictionary()  # model -> its Engine


def addresses(model):
    """Where the weights lie, in which dtype: an optimizer changes them in place, loading or moving a model elsewhere."""
    return [(p.data_ptr(), p.dtype, p.device) for p in model.parameters()]


def engine_for(model, rows, T, longest_draw):
    """The model's engine, if it has room and the weights have not moved; else a new one, at least as large as the last."""
    up = lambda n: -(-n // ROOM) * ROOM  # noqa: E731
    old = _engines.get(model)
    if old is None or not old.fits(model, rows, T, longest_draw):
        room = rows, min(up(T), model.cfg.max_position_embeddings), up(longest_draw)
        if old is not None:
            room = tuple(map(max, room, (old.rows, old.T, old.longest_draw)))
        release(model)
        old = None  # its memory goes before the next one's is taken
        _engines[model] = Engine(model, *room)
    return _engines[model]


def release(model):
    """Give the memory of a model's engine back."""
    _engines.pop(model, None)


def too_large_to_keep(engine):
    if engine.device.type != "cuda":
        return False
    total = torch.cuda.get_device_properties(engine.device).total_memory
    return engine.cache.k.nbytes + engine.cache.v.nbytes > KEEP_SHARE * total


@torch.no_grad()
def decode_all(model, prompts, *, max_new_tokens, temperature, seed, stop_ids, sequence_ids=None, slots=128, top_k=0,
               top_p=1.0, min_p=0.0):
    """The contract of sample.decode_all."""
    begin = time.time()
    B = len(prompts)
    out, limit, ids, stops, queue = begin_batch(model, prompts, max_new_tokens, sequence_ids, stop_ids)
    longest_draw = int((limit - out.prompt_len).max()) if B else 1
    engine = engine_for(model, rows_of_graph(min(slots, B)), out.tokens.shape[1], longest_draw)
    engine.stops.copy_(stops)
    engine.state.running[:] = False  # a call that was broken off may have left some
    sampler = temperature, top_k, top_p, min_p

    def one_step(n, *sampler):
        def draw(hidden, uniform):
            return draw_tokens(model, hidden, uniform, *sampler)

        step(model, engine.cache, engine.state, engine.stops, n, draw, engine.tables)

    engine.graphs.step = one_step
    try:
        decode_queue(model, prompts, engine, sampler, seed, queue, min(slots, B), limit, ids, longest_draw, out)
    finally:
        engine.graphs.step = None
    if too_large_to_keep(engine):
        release(model)
    out.seconds = time.time() - begin
    used = int(out.length.max()) if B else 1
    out.tokens, out.logprob = out.tokens[:, :used].clone(), out.logprob[:, :used].clone()
    return out


def decode_queue(model, prompts, engine, sampler, seed, queue, places, limit, ids, longest_draw, out):
    """Decode the prompts of the queue in `places` rows of the engine, into the Rollouts `out`."""
    cache, state, device, n = engine.cache, engine.state, engine.device, 0
    seq = torch.zeros(engine.rows, dtype=torch.int64)  # which sequence a row holds: known to the host alone
    positions = torch.arange(longest_draw, device=device)
    while queue or n:
        if queue and places - n >= min(len(queue), max(1, places // 8)):
            new = [queue.popleft() for _ in range(min(len(queue), places - n))]
            at = slice(n, n + len(new))
            seq[at] = torch.tensor(new)
            state.first[at] = state.length[at] = out.prompt_len[new].to(device)
            state.limit[at], state.running[at], state.stopped[at] = limit[new].to(device), True, False
            state.draws[at, :longest_draw] = philox_uniform(seed, ids[new][:, None].to(device), positions)
            state.hidden[at] = prefill(model, [prompts[i] for i in new], cache, n)
            n += len(new)
        for _ in range(CHECK_EVERY):
            engine.graphs.run(rows_of_graph(n), *sampler)
        running, stopped, length = torch.stack([state.running, state.stopped, state.length])[:, :n].cpu()  # the one wait
        ended = (running == 0).nonzero()[:, 0]
        if len(ended):
            collect(out, state, seq, ended, stopped, length)
            alive = running.nonzero()[:, 0]
            n = len(alive)
            movers, holes = alive[alive >= n], ended[ended < n]
            cache.copy_rows(movers, holes, int(length.max()))
            for x in (seq, *vars(state).values()):
                x[holes] = x[movers]
            state.running[n:] = False


def collect(out, state, seq, ended, stopped, length):
    """Copy the rows that ended to the Rollouts `out`. ended: row numbers; stopped, length [n]: the host's copies."""
    where = ended.to(state.tokens.device)
    tokens, logprob = state.tokens[where].cpu(), state.logprob[where].cpu()
    for row, r in enumerate(ended.tolist()):
        i, n = int(seq[r]), int(length[r])
        new = slice(int(out.prompt_len[i]), n)
        out.tokens[i, new], out.logprob[i, new], out.length[i] = tokens[row, new], logprob[row, new], n
        out.finish_reason[i] = "stop" if stopped[r] else "length"
