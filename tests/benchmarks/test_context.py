"Context and compression: python -m pytest tests/benchmarks --slow -q."
import gc
import time
from bisect import bisect_left, bisect_right

import numpy as np
import pytest
import torch

from tracebook.attention import kv_occupancy, memento_mask, visible_until
from tracebook.compress import compress_trace
from tracebook.memento import parse_memento_ids
from tracebook.sources import make_traces
from tracebook.trace import QWEN3

pytestmark = pytest.mark.slow
IDS = dict(block_start=151669, block_end=151670, summary_start=151671, summary_end=151672)
N_TRACES, N_TOKENS = 10_000, 10_000


class TokenByToken:
    "A state machine that is called for each token and keeps what is in the cache, as a serving loop does; right for nested blocks too."
    def __init__(self, keep):
        self.blocks, self.open, self.free, self.waiting, self.current = [], [], [], [], None
        self.keep, self.at, self.cache, self.peak, self.area = keep, -1, [], 0, 0

    def step(self, token):
        self.at += 1
        self.cache.append(self.at)
        size = len(self.cache)
        self.peak, self.area = max(self.peak, size), self.area + size
        if token == IDS["block_start"]:
            self.open.append(len(self.blocks))
            self.blocks.append([self.at, None])
        elif token == IDS["block_end"] and self.open:
            self.blocks[self.open[-1]][1] = self.at
            self.free.append(self.open.pop())
        elif token == IDS["summary_start"] and self.free:
            self.current = max(self.free)
            self.free.remove(self.current)
        elif token == IDS["summary_end"] and self.current is not None:
            self.waiting.append(self.current)
            self.current = None
            if len(self.waiting) > self.keep:
                start, end = self.blocks[self.waiting.pop(0)]
                del self.cache[bisect_right(self.cache, start):bisect_left(self.cache, end)]


def tokens(rng, n=N_TOKENS):
    "Random ids with some nine blocks and mementos of the sizes of OpenMementos."
    ids = rng.integers(0, 151_000, n)
    at = 20
    while at + 1500 < n:
        block, memento = rng.integers(600, 1100), rng.integers(100, 250)
        ids[[at, at + block, at + block + 1, at + block + memento]] = list(IDS.values())
        at += block + memento + 1
    return ids


def test_occupancy(benchmark, row):
    "From token ids to peak, area and mean, for ten thousand traces."
    rng = np.random.default_rng(0)
    some = [tokens(rng) for _ in range(200)]

    def ours():
        found = []
        for i in range(N_TRACES):
            ids = some[i % len(some)]
            curve = kv_occupancy(visible_until(parse_memento_ids(ids, IDS), N_TOKENS, QWEN3))
            found.append((curve.peak, curve.auc, curve.mean))
        return found

    def usual():
        found = []
        for ids in some[:20]:
            machine = TokenByToken(0)
            for token in ids.tolist(): machine.step(token)
            found.append((machine.peak, machine.area, machine.area / N_TOKENS))
        return found

    times = []
    for _ in range(4):
        start = time.perf_counter()
        theirs = usual()
        times.append(time.perf_counter() - start)
    seconds = min(times) * N_TRACES / 20
    mine = benchmark.pedantic(ours, rounds=3)
    assert mine[:20] == theirs
    what = f"peak, area and mean of {N_TRACES:,} traces of {N_TOKENS:,} tokens"
    row(what, f"{benchmark.stats['min']:.2f} s", f"a call for each token: {seconds:.0f} s (from 20 traces)", seconds / benchmark.stats["min"], "at least 25, and 2 s")
    assert seconds / benchmark.stats["min"] >= 25


def test_compress_is_linear(benchmark, row):
    "50 MB and 100 MB of traces."
    half = make_traces(1950)["response"]
    whole = list(half) * 2
    benchmark.pedantic(lambda: compress_trace(whole), rounds=5, warmup_rounds=1)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        compress_trace(half)
        times.append(time.perf_counter() - start)
    size, twice, once = sum(map(len, whole)) / 1e6, benchmark.stats["min"], min(times)
    row(f"`compress_trace`, {size:.0f} MB of traces", f"{twice:.2f} s", f"half of it: {once:.2f} s", twice / once, "at most 2.5")
    assert twice / once <= 2.5


@pytest.fixture
def no_collections():
    "Collections of garbage come at certain numbers of objects: of two runs, one may have one more, and that is no question of length."
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("policy", ["qwen3", "phi4"])
def test_compress_one_long_trace(benchmark, row, policy, no_collections):
    "One trace of 50 MB, and one of 100 MB."
    pair = "<|block_start|>" + "14 = 2*7. " * 380 + "<|block_end|><|summary_start|>" + "14 is composite. " * 38 + "<|summary_end|>\n"
    half, whole = ("<think>" + pair * n + "</think>14" for n in (11_000, 22_000))
    benchmark.pedantic(lambda: compress_trace(whole, policy=policy), rounds=3, warmup_rounds=1)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        compress_trace(half, policy=policy)
        times.append(time.perf_counter() - start)
    twice, once = benchmark.stats["min"], min(times)
    row(f"`compress_trace`, one trace of {len(whole) / 1e6:.0f} MB, {policy}", f"{twice:.2f} s", f"half of it: {once:.2f} s", twice / once, "at most 2.5")
    assert twice / once <= 2.5


def test_additive_mask(benchmark, row):
    "The mask of 8,192 tokens beside one torch.where over the same shape."
    until = visible_until(parse_memento_ids(tokens(np.random.default_rng(0), 8192), IDS), 8192, QWEN3)
    seen, low = memento_mask(until, format="bool"), torch.finfo(torch.float32).min
    ways = dict(ours=lambda: memento_mask(until), where=lambda: torch.where(seen, 0., low))
    assert torch.equal(ways["ours"](), ways["where"]())
    times = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            start = time.perf_counter()
            made = way()
            times[name].append(time.perf_counter() - start)
            del made
    benchmark.pedantic(ways["ours"], rounds=2)
    ours, where = (min(times[name]) for name in ways)
    row("additive mask of 8,192 tokens", f"{ours * 1000:.0f} ms", f"one `torch.where` over the same shape: {where * 1000:.0f} ms", ours / where, "at most 2")
    assert ours <= 2 * where
