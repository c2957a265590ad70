"Speed and memory against a named peer in the same run: python -m pytest tests/benchmarks --slow -q."
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tracebook.memento import parse_memento
from tracebook.sources import COLUMNS, make_traces, sample_traces
from tracebook.stats import trace_table

pytestmark = pytest.mark.slow
N_TRACES = 20_000
BLOCKS, SUMMARIES, THINKING = (re.compile(p, re.DOTALL) for p in (
    r"<\|block_start\|>(.*?)<\|block_end\|>", r"<\|summary_start\|>(.*?)<\|summary_end\|>", r"<think>(.*?)</think>"))


def usual_parse(text):
    "Three lazy expressions and a split, everything stripped."
    blocks, summaries = ([m.strip() for m in p.findall(text)] for p in (BLOCKS, SUMMARIES))
    thinking = THINKING.search(text)
    return blocks, summaries, thinking.group(1) if thinking else "", text.split("</think>")[-1].strip()


def best(f, repeat=3):
    "Least seconds of some runs."
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def corpus():
    "Real outputs where they are at hand, else the bundled sample; about 36 MB."
    shared = os.environ.get("TRACEBOOK_SHARED")
    file = Path(shared or ".")/"data"/"memento_outputs.jsonl"
    texts = [json.loads(l)["response"] for l in file.open(encoding="utf-8")] if shared and file.exists() else list(sample_traces()["response"])
    return texts * (36_000_000 // sum(map(len, texts)))


def test_parse(benchmark, row):
    texts = corpus()
    size = sum(map(len, texts)) / 1e6

    def ours():
        for t in texts: parse_memento(t)

    def usual():
        for t in texts: usual_parse(t)

    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    mine, theirs = benchmark.stats["min"], best(usual)
    row("`parse_memento`, spans and issues", f"{size / mine:.0f} MB/s", f"three expressions and a split: {size / theirs:.0f} MB/s", theirs / mine, "at least 4, and 300 MB/s")
    assert theirs / mine >= 4


@pytest.mark.parametrize("name, unit", [("blocks never closed", "<|block_start|>" + "x" * 200), ("closing tags in open blocks", "<|block_start|>" + "x" * 100 + "</think>")])
def test_linear(benchmark, row, name, unit):
    n = 8000
    half, whole = unit * (n // 2), unit * n
    benchmark.pedantic(lambda: parse_memento(whole), rounds=7, warmup_rounds=1)
    twice, once = benchmark.stats["min"], best(lambda: parse_memento(half), 7)
    row(f"{len(whole) / 1e6:.1f} MB of {name}", f"{twice * 1000:.0f} ms", f"half of it: {once * 1000:.0f} ms", twice / once, "at most 2.5")
    assert twice / once <= 2.5


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    "Generated traces in a Parquet file, written a thousand at a time."
    path = tmp_path_factory.mktemp("bench")/"traces.parquet"
    made = make_traces(N_TRACES).data.table
    with pq.ParquetWriter(path, COLUMNS) as writer:
        for at in range(0, N_TRACES, 1000): writer.write_table(made.slice(at, 1000))
    return path


def read(path):
    "Merely the column as Python strings."
    for batch in pq.ParquetFile(path).iter_batches(128, columns=["response"]): batch.column(0).to_pylist()


def usual_loop(path):
    "Stream rows, three expressions, strip, split."
    for batch in pq.ParquetFile(path).iter_batches(128, columns=["response", "domain", "source"]):
        for r in batch.to_pylist():
            blocks, summaries, *_ = usual_parse(r["response"])
            dict(domain=r["domain"], source=r["source"], n_blocks=len(blocks), block_chars=sum(map(len, blocks)), summ_chars=sum(map(len, summaries)),
                 block_words=sum(len(b.split()) for b in blocks), summ_words=sum(len(s.split()) for s in summaries))


def test_trace_table(benchmark, row, parquet):
    ways = dict(words=lambda: trace_table(parquet, progress=False), bare=lambda: trace_table(parquet, words=False, progress=False),
                two=lambda: trace_table(parquet, workers=2, progress=False), read=lambda: read(parquet))
    rounds = [{k: best(f, 1) for k, f in ways.items()} for _ in range(6)]  # in turn, so that a slow minute is slow for all
    with_words, without, two, reading = (min(r[k] for r in rounds) for k in ways)
    benchmark.pedantic(ways["words"], rounds=2)
    usual = best(lambda: usual_loop(parquet), 1)
    what = f"`trace_table`, {N_TRACES:,} traces of 26 KB"
    row(what, f"{with_words:.2f} s", f"the usual loop: {usual:.1f} s", usual / with_words, "at least 5")
    row(what, f"{with_words:.2f} s", f"only reading the column: {reading:.2f} s", with_words / reading, "at most 2.5")
    row(f"{what}, without words", f"{without:.2f} s", f"only reading the column: {reading:.2f} s", without / reading, "at most 1.3")
    row(f"{what}, two workers", f"{two:.2f} s", f"one: {with_words:.2f} s", with_words / two, "at least 1.6")
    assert usual / with_words >= 5
    assert with_words / reading <= 2.5
    assert without / reading <= 1.3
    assert with_words / two >= 1.6 or os.cpu_count() < 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the memory counts of Linux")
def test_memory(row, parquet, tmp_path):
    "Peak memory of a process that measures a quarter of the rows, and all of them."
    part = tmp_path/"part.parquet"
    with pq.ParquetWriter(part, COLUMNS) as writer:
        for g in range(5): writer.write_table(pq.ParquetFile(parquet).read_row_group(g))
    # getrusage would count what this process held when it forked, so the kernel's own count for the new program is taken
    code = "import sys; from tracebook.stats import trace_table; trace_table(sys.argv[1], progress=False); print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    quarter, whole = (int(subprocess.run([sys.executable, "-c", code, str(p)], capture_output=True, text=True, check=True).stdout) / 1000 for p in (part, parquet))
    row(f"peak memory of the process, {N_TRACES:,} traces", f"{whole:.0f} MB", f"{N_TRACES // 4:,} traces: {quarter:.0f} MB", whole / quarter, "about 1")
    assert whole / quarter <= 1.2
