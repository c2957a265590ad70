"""Spectra of all cells against the usual loop and against one product: python -m pytest tests/benchmarks/test_spectra.py --slow -q.

SPECTRA_ROWS and SPECTRA_WIDTH make it smaller for a trial; limits hold for 200,000 rows of width 1,024.
"""
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tracebook.spectral import METRICS, Spectrum, metrics_row, spectral_metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone")]
ROWS, WIDTH = int(os.environ.get("SPECTRA_ROWS", 200_000)), int(os.environ.get("SPECTRA_WIDTH", 1024))
MACROS, BINS, POOLS = 8, 10, ("all", "mean", "first", "last")


def seconds(f):
    "CPU time of the process, and what the call returned."
    start = time.process_time()
    value = f()
    return time.process_time() - start, value


def make_folder(folder, rows, width, seed=0, trace=2000, shard=50_000):
    "Traces of 2,000 tokens in steps of 10 to 70, eight categories with means of their own, eigenvalues 1/i."
    rng, gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    samples, labels = [], np.empty(rows, np.int64)
    for i, at in enumerate(range(0, rows, trace)):
        ends = np.cumsum(rng.integers(10, 70, trace // 10))
        ends = np.append(ends[ends < trace], trace)
        kinds = rng.integers(0, MACROS, len(ends))
        steps = [dict(token_start=int(a), token_end=int(b), category=f"c{k}", macro=f"c{k}", segment="thought" if a < .9 * trace else "solution") for a, b, k in zip([0, *ends], ends, kinds)]
        for s, k in zip(steps, kinds): labels[at + s["token_start"]:at + s["token_end"]] = k
        samples.append(dict(id=f"trace {i}", global_offset=at, num_tokens=trace, steps=steps))
    rotation = torch.linalg.qr(torch.randn(width, width, generator=gen))[0]
    scale, means, shards = torch.arange(1, width + 1) ** -.5, torch.randn(MACROS, width, generator=gen) * .05, []
    for k, at in enumerate(range(0, rows, shard)):
        n = min(shard, rows - at)
        block = (torch.randn(n, width, generator=gen) * scale) @ rotation + means[torch.from_numpy(labels[at:at + n])]
        save_file({"hidden_states": block.bfloat16()}, folder/f"s{k}.safetensors")
        shards.append(dict(file=f"s{k}.safetensors", token_start=at, token_end=at + n))
    (folder/"config.json").write_text(json.dumps(dict(shards=shards)))
    (folder/"index.json").write_text(json.dumps(dict(samples=samples)))
    return samples


def groups_of(samples):
    "(segment, category, bin) of every pooled and unpooled row, and the pooled matrices, as the usual script has them."
    steps = [(x["global_offset"], x["num_tokens"], s) for x in samples for s in x["steps"]]
    size = np.array([s["token_end"] - s["token_start"] for *_, s in steps])
    step = np.repeat(np.arange(len(steps)), size)
    start, T = np.array([s["token_start"] for *_, s in steps]), np.array([t for _, t, _ in steps])
    token = start[step] + np.arange(len(step)) - np.repeat(np.cumsum(size) - size, size)
    segment, macro = (np.array([s[k] for *_, s in steps]) for k in ("segment", "macro"))
    pooled = np.minimum(BINS - 1, np.floor(BINS * (start + size / 2) / T)).astype(int)
    tokens = (segment[step], macro[step], np.floor(BINS * (token + .5) / T[step]).astype(int))
    return step, size, {pool: tokens if pool == "all" else (segment, macro, pooled) for pool in POOLS}


def masks(segment, macro, bin):
    "Every group of the files, with its place there: (file, kind, segment, group, bin)."
    def levels(file, here, b):
        yield (file, "global", None, "global", b), here
        for x in np.unique(macro[here]): yield (file, "macro", None, x, b), here & (macro == x)
        for y in np.unique(segment[here]):
            yield (file, "segments", y, y, b), here & (segment == y)
            for x in np.unique(macro[here & (segment == y)]): yield (file, "segments_macro", y, x, b), here & (segment == y) & (macro == x)
    yield from levels("basic_metrics", np.ones(len(bin), bool), None)
    for b in range(BINS): yield from levels("depth_profile", bin == b, b)


class Timed:
    "A solver that adds up its time."
    def __init__(self, solve): self.solve, self.seconds = solve, 0.

    def __call__(self, X):
        took, value = seconds(lambda: self.solve(X))
        self.seconds += took
        return value


def loop(folder, samples, solve, only=lambda key: True):
    "Select the rows of a group, decompose, next group; groups of the same rows once."
    from tracebook.extract import HiddenStates
    hs, (step, size, labels), out = HiddenStates(folder), groups_of(samples), {}
    Z = hs.read(0, hs.num_tokens)
    last = np.cumsum(size)
    rows = dict(all=Z, first=Z[last - size], last=Z[last - 1], mean=torch.from_numpy(np.add.reduceat(Z.float().numpy(), last - size, axis=0, dtype=np.float64) / size[:, None]))
    for pool in POOLS:
        done = {}
        for key, mask in masks(*labels[pool]):
            if not only(key): continue
            if (rows_of := mask.tobytes()) in done: out[pool, *key] = out[done[rows_of]]; continue
            done[rows_of] = (pool, *key)
            X = rows[pool][torch.from_numpy(mask)].double()
            X = X - X.mean(0)
            out[pool, *key] = Spectrum(solve(X).numpy(), n=len(X), d=WIDTH, method="svd") if len(X) else None
    return out


def test_speed(benchmark, row, tmp_path):
    "All that the call does counts: planning, reading, sweep, two routes, sensitivity, writing."
    samples, times, found = make_folder(tmp_path/"states", ROWS, WIDTH), {}, {}
    def turn():
        times["ours"], found["ours"] = seconds(lambda: spectral_metrics(tmp_path/"states", tmp_path/"out", n_bins=BINS, progress=False))
        found["solver"] = Timed(torch.linalg.svdvals)
        times["loop"], found["loop"] = seconds(lambda: loop(tmp_path/"states", samples, found["solver"]))
    benchmark.pedantic(turn, rounds=1)
    m = found["ours"]
    entries = {(pool, at["file"], at["kind"], at["segment"], at["group"], at["bin"]): e for pool in POOLS for at, e in m.entries(pool) if at["file"] in ("basic_metrics", "depth_profile")}
    worst = 0.
    for key, s in found["loop"].items():
        want = metrics_row(s)
        for name in METRICS:
            if name in ("alpha_stderr", "rankme_garrido", "mean_norm2_share") or want.get(name) is None: continue
            worst = max(worst, abs(entries[key][name] / float(want[name]) - 1))
    only = lambda key: key[1] == "macro" and key[3] == "c0" and key[4] in (None, 0, 1, 2)
    some, full = (Timed(f) for f in (torch.linalg.svdvals, lambda X: torch.linalg.svd(X, full_matrices=False)[1]))
    for solver in (some, full): loop(tmp_path/"states", samples, solver, only)
    ratio = full.seconds / some.seconds
    times["full"] = times["loop"] + found["solver"].seconds * (ratio - 1)
    assert entries.keys() >= found["loop"].keys()
    distinct = {id(s): s.n for s in found["loop"].values() if s is not None}
    floor, fewest = product(ROWS), [min(n, WIDTH) for n in distinct.values() if n > 1]
    floor += sum(eigen(k) for k in fewest)
    what, says = f"`spectral_metrics`, {ROWS:,} rows of width {WIDTH:,}, {len(fewest)} groups of four poolings", lambda t: f"{t:.1f} s"
    row(what, says(times["ours"]), f"rows of a group, `svdvals`, next group: {says(times['loop'])}; metrics differ by {worst:.0e} at most", times["loop"] / times["ours"], "at least 3.5")
    row(what, says(times["ours"]), f"the same with a full SVD: about {says(times['full'])}, as a decomposition takes {ratio:.1f} times as long on a category and three of its cells", times["full"] / times["ours"], "at least 7")
    row(what, says(times["ours"]), f"one float64 product of the rows and one `eigvalsh` a group: {says(floor)}", times["ours"] / floor, "at most 1.6")
    assert worst <= 1e-6
    if (ROWS, WIDTH) != (200_000, 1024): return
    assert times["loop"] >= 3.5 * times["ours"]
    assert times["full"] >= 7 * times["ours"]
    assert times["ours"] <= 1.6 * floor


def product(rows):
    "Seconds of one float64 Gram product over so many rows, nothing else."
    A, M = torch.randn(2048, WIDTH, dtype=torch.float64), torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    some = min(seconds(lambda: [M.addmm_(A.T, A) for _ in range(4)])[0] for _ in range(3))
    return some / 4 * rows / 2048


def eigen(k, known={}):
    "Seconds of one `eigvalsh` of so many rows and columns, measured in steps of 64."
    k = min(-(-k // 64) * 64, WIDTH)
    if k not in known:
        A = torch.randn(k, k, dtype=torch.float64)
        G = A @ A.T
        known[k] = min(seconds(lambda: torch.linalg.eigvalsh(G))[0] for _ in range(3))
    return known[k]


MEMORY = """
    import gc, json, re, sys, threading, time
    from pathlib import Path
    import torch
    from tracebook.extract import HiddenStates
    from tracebook.spectral import spectral_metrics
    torch.set_num_threads(1)
    held = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    spectral_metrics(sys.argv[1], sys.argv[3], progress=False)
    states = HiddenStates(sys.argv[2])  # with its index, which is in memory
    gc.collect()
    before, most, on = held(), 0, True
    def watch():
        global most
        while on:
            most = max(most, held())
            time.sleep(.001)
    thread = threading.Thread(target=watch)
    thread.start()
    spectral_metrics(states, sys.argv[4], progress=False, counts=[64, 256])
    on = False
    thread.join()
    print(json.dumps([before, most]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory(benchmark, row, tmp_path):
    "Peak of memory that is not a file in memory, for four times the rows."
    script, found = tmp_path/"memory.py", {}
    script.write_text(textwrap.dedent(MEMORY))
    make_folder(tmp_path/"small", 4000, 256)
    def measure():
        for n in (40_000, 160_000):
            make_folder(tmp_path/str(n), n, 256, trace=500) # enough traces for all groups of the intervals
            done = subprocess.run([sys.executable, script, tmp_path/"small", tmp_path/str(n), tmp_path/f"a{n}", tmp_path/f"b{n}"], capture_output=True, text=True,
                env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent.parent), OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="100000"))
            assert done.returncode == 0, done.stderr[-2000:]
            before, most = json.loads(done.stdout.splitlines()[-1])
            found[n] = most - before
    benchmark.pedantic(measure, rounds=1)
    few, many = found.values()
    row("peak memory of `spectral_metrics`, 160,000 rows of width 256", f"{many / 1e6:.0f} MB", f"40,000 rows: {few / 1e6:.0f} MB", many / few, "at most 1.5")
    assert many <= 1.5 * few
