"""Cells: a folder of hidden states to metrics, against selection with numpy, closed forms, and itself in another order."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

from tracebook import spectral
from tracebook.extract import HiddenStates
from tracebook.spectral import *

@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close("all")


few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
POOLS = ("all", "mean", "first", "last")
SCHEMA = Draft202012Validator(metrics_schema())


# ---------------------------------------------------------------------------------------------------- helpers


def write(folder, matrix, samples, cuts=(), **config):
    "A folder of hidden states, cut into shards after the rows `cuts`."
    folder.mkdir(parents=True)
    ends = [0, *cuts, len(matrix)]
    said = [dict(file=f"hidden_states_layer3_shard{k:05d}.safetensors", token_start=a, token_end=b) for k, (a, b) in enumerate(zip(ends, ends[1:]))]
    for s in said: save_file({"hidden_states": matrix[s["token_start"] : s["token_end"]].clone()}, folder / s["file"])
    (folder / "config.json").write_text(json.dumps({"shards": said} | config))
    (folder / "index.json").write_text(json.dumps({"samples": samples}))
    return folder


def step(a, b, macro, segment="thought", category=None):
    return {"token_start": a, "token_end": b, "macro": macro, "category": category or f"{macro}-{a % 2}", "segment": segment}


def some_traces(rng, n=6, length=(5, 60), labels=("Plan", "Verify", "Answer")):
    "Samples with gaps before, between and after, steps without tokens, steps without a segment."
    samples, at = [], 0
    for i in range(n):
        T, steps, t = int(rng.integers(*length)), [], 0
        while t < T:
            a = min(T, t + int(rng.integers(0, 3)))
            b = min(T, a + int(rng.integers(0, 12)))
            kind = labels[int(rng.integers(len(labels)))]
            steps.append(step(a, b, kind, "solution" if a > 0.8 * T else ("thought", None)[int(rng.random() < 0.05)]))
            t = max(b, t + 1)
        gap = int(rng.integers(0, 3))
        samples.append({"id": f"trace {i}", "global_offset": at, "num_tokens": T, "steps": steps})
        at += T + gap
    return samples, at


def a_folder(path, seed=0, d=7, dtype=torch.float32, cuts=None, **more):
    rng = np.random.default_rng(seed)
    samples, rows = some_traces(rng, **more)
    matrix = torch.from_numpy(rng.normal(size=(rows, d)) * np.arange(1, d + 1) ** -0.7 + rng.normal(size=d)).to(dtype)
    return write(path, matrix, samples, sorted(set(rng.integers(1, rows, 3).tolist())) if cuts is None else cuts), matrix, samples


def brute(matrix, samples, bins):
    "Rows of every cell of every pooling, selected one step and one token at a time: {(pool, file, kind, segment, group, bin): rows}."
    Z, out = matrix.double().numpy(), {}
    def put(pool, row, macro, segment, b, micro):
        kinds = [("global", None, "global"), ("macro", None, macro), *([("segments", segment, segment), ("segments_macro", segment, macro)] if segment is not None else [])]
        for key in [("basic_metrics", "micro", None, micro, None), *(("basic_metrics", *k, None) for k in kinds), *(("depth_profile", *k, b) for k in kinds)]: out.setdefault((pool, *key), []).append(row)
    for x in samples:
        T, base = x["num_tokens"], x["global_offset"]
        for s in x["steps"]:
            a, b = s["token_start"], s["token_end"]
            if a == b: continue
            about = s["macro"], s["segment"]
            for t in range(a, b): put("all", Z[base + t], *about, math.floor(bins * (t + 0.5) / T + 1e-12), s["category"])
            rows = Z[base + a : base + b]
            where = min(bins - 1, math.floor(bins * ((a + b) / 2) / T + 1e-12))
            for pool, row in {"mean": rows.sum(0) / len(rows), "first": rows[0], "last": rows[-1]}.items(): put(pool, row, *about, where, s["category"])
    return {k: np.array(v) for k, v in out.items()}


def by_numpy(Z):
    "Metrics by a full SVD and the formulas."
    s = np.linalg.svd(Z - Z.mean(0), compute_uv=False)
    s = s[s > s[0] * math.sqrt(10 * Z.shape[1] * 2.2e-16)]
    l = s**2
    H = lambda p: math.exp(-float((p / p.sum() * np.log(p / p.sum())).sum()))
    return {"rankme": H(s), "effective_rank": H(l), "stable_rank": l.sum() / l[0], "participation_ratio": l.sum() ** 2 / (l**2).sum(), "trace": l.sum() / (len(Z) - 1)}


def entries(m): return {(pool, *(at[k] for k in ("file", "kind", "segment", "group", "bin"))): e for pool in m.pools for at, e in m.entries(pool) if at["count"] is None}


def texts(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def numbers(m):
    "Every number of the metrics in a flat form, without heads."
    return {(pool, *at.values(), k): v for pool in m.pools for at, e in m.entries(pool) for k, v in e.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def same_numbers(a, b, rel=1e-9):
    assert a.keys() == b.keys()
    for k in a: assert a[k] == pytest.approx(b[k], rel=rel, abs=1e-9), k


def run(source, out, **more): return spectral_metrics(source, out, progress=False, **({"n_bins": 4, "intervals": ()} | more))


def valid(m):
    for pool in m.pools:
        assert len(m[pool]) == 4 + (pool == "all")
        for value in m[pool].values(): SCHEMA.validate(value)


# ---------------------------------------------------------------------------------------------------- every cell


@pytest.mark.parametrize("d, length, dtype, bins", [(3, (20, 90), torch.float32, 4), (7, (5, 60), torch.bfloat16, 10), (40, (5, 60), torch.float16, 3), (5, (1, 4), torch.float32, 10)])
def test_every_cell(tmp_path, d, length, dtype, bins):
    "Thick and thin cells, all poolings, against rows selected one by one; as many entries as there are cells."
    folder, matrix, samples = a_folder(tmp_path / "states", d, d, dtype, length=length, n=9)
    m = run(folder, tmp_path / "out", n_bins=bins, groups="category")
    valid(m)
    want, found = brute(matrix, samples, bins), entries(m)
    assert {k for k, e in found.items() if e["n_rows"]} == want.keys()
    for key, Z in want.items():
        e = found[key]
        assert e["n_rows"] == len(Z)
        if len(Z) < 2 or e["rank"] == 0: assert e["rankme"] is None and e["reason"]["rankme"]; continue
        for name, value in by_numpy(Z).items(): assert e[name] == pytest.approx(value, rel=1e-8), (key, name)
        if key[1] == "basic_metrics" and key[2] != "segments_macro":
            s = np.linalg.svd(Z, compute_uv=False)
            p = s / s.sum() + 1e-7
            assert e["rankme_garrido"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-7)
            n = len(Z) * (Z.mean(0) ** 2).sum()
            assert e["mean_norm2_share"] == pytest.approx(n / (n + ((Z - Z.mean(0)) ** 2).sum()), rel=1e-8)
    counts = m["all"]["basic_metrics"]["counts"]
    assert counts["empty_steps"] == sum(s["token_start"] == s["token_end"] for x in samples for s in x["steps"])
    assert counts["unannotated_tokens"] == len(matrix) - len(want["all", "basic_metrics", "global", None, "global", None])
    macros = [Z for k, Z in want.items() if k[:3] == ("all", "basic_metrics", "macro")]
    within = sum(((Z - Z.mean(0)) ** 2).sum() for Z in macros)
    whole = np.concatenate(macros)
    assert m["all"]["basic_metrics"]["between_share"] == pytest.approx(1 - within / ((whole - whole.mean(0)) ** 2).sum(), abs=1e-9)


def test_steps_and_traces(tmp_path):
    folder, _, samples = a_folder(tmp_path / "states", 3)
    found = entries(run(folder, tmp_path / "out"))
    for macro in ("Plan", "Verify", "Answer"):
        mine = [(i, s) for i, x in enumerate(samples) for s in x["steps"] if s["macro"] == macro and s["token_end"] > s["token_start"]]
        for pool in POOLS:
            e = found[pool, "basic_metrics", "macro", None, macro, None]
            assert (e["n_steps"], e["n_traces"]) == (len(mine), len({i for i, _ in mine}))


def test_each_row_once(tmp_path, monkeypatch):
    "Rows of steps are read once, others not at all, whatever is asked for."
    folder, matrix, samples = a_folder(tmp_path / "states", 1, 4, n=8)
    times, read = np.zeros(len(matrix), int), HiddenStates.read
    def counted(self, a, b):
        times[a:b] += 1
        return read(self, a, b)
    monkeypatch.setattr(HiddenStates, "read", counted)
    run(folder, tmp_path / "out", intervals=("global", "macro"), seeds=(0, 1), svd=("global", "macro"))
    want = np.zeros(len(matrix), int)
    for x in samples:
        for s in x["steps"]: want[x["global_offset"] + s["token_start"] : x["global_offset"] + s["token_end"]] = 1
    assert (times == want).all()


# ---------------------------------------------------------------------------------------------------- order, shards, restarts


@settings(few, max_examples=5)
@given(st.integers(0, 10**6), st.sampled_from([3, 30]))
def test_order_and_shards(tmp_path_factory, seed, d):
    "Samples in another order, shards cut elsewhere: the same numbers, the same rows drawn."
    tmp, rng = tmp_path_factory.mktemp("order"), np.random.default_rng(seed)
    folder, matrix, samples = a_folder(tmp / "a", seed, d)
    parts, moved, at = [], [], 0
    for i in rng.permutation(len(samples)).tolist():
        x = samples[i]
        parts.append(matrix[x["global_offset"] : x["global_offset"] + x["num_tokens"]])
        moved.append(x | {"global_offset": at})
        at += x["num_tokens"]
    other = write(tmp / "b", torch.cat(parts), moved, sorted(set(rng.integers(1, at, 5).tolist())))
    a, b = (run(f, tmp / f"out {f.name}", counts=[2, 5, 9, 40], seeds=(0, 5)) for f in (folder, other))
    same_numbers(numbers(a), numbers(b))
    again = run(folder, tmp / "again", counts=[2, 5, 9, 40], seeds=(0, 5))
    assert texts(again.folder) == texts(a.folder)


def test_draws_are_bottom_k(tmp_path):
    "The sweep is made of the rows that BottomK would keep, category by category; nested."
    folder, matrix, samples = a_folder(tmp_path / "states", 5, 4, n=9)
    m, Z = run(folder, tmp_path / "out", counts=[3, 10, 30], seeds=(4,)), matrix.double().numpy()
    for macro, series in m["all"]["token_count_sweep"]["series"].items():
        want = BottomK(10**6, 4)
        for x in samples:
            for s in x["steps"]:
                if macro in ("global", s["macro"]): want.update(x["id"], np.arange(s["token_start"], s["token_end"]))
        base = {x["id"]: x["global_offset"] for x in samples}
        rows = [base[name] + place for _, name, place in want.rows]
        for e in series:
            if e["n_rows"] is None: assert e["count"] > len(rows); continue
            assert e["n_rows"] == e["count"]
            assert e["effective_rank"] == pytest.approx(by_numpy(Z[rows[: e["count"]]])["effective_rank"], rel=1e-8)
        assert max(e["n_rows"] or 0 for e in series) == max([c for c in (3, 10, 30) if c <= len(rows)], default=0)


def test_draws_of_traces(tmp_path):
    folder, matrix, samples = a_folder(tmp_path / "states", 6, 3, n=9)
    m, Z = run(folder, tmp_path / "out", counts=[1, 4, 9], unit="trace"), matrix.double().numpy()
    order = sorted(samples, key=lambda x: (int(row_keys(0, x["id"])[0]), x["id"]))
    order = [x for x in order if any(s["token_end"] > s["token_start"] for s in x["steps"])]
    for e, count in zip(m["all"]["token_count_sweep"]["series"]["global"], [1, 4, 9]):
        rows = [x["global_offset"] + t for x in order[:count] for s in x["steps"] for t in range(s["token_start"], s["token_end"])]
        if e["n_rows"] is None: continue
        assert e["n_rows"] == len(rows)
        assert e["rankme"] == pytest.approx(by_numpy(Z[rows])["rankme"], rel=1e-8)


def test_draws_of_steps(tmp_path):
    "Whole steps in the order of their keys; for pooled rows the same as rows."
    folder, matrix, samples = a_folder(tmp_path / "states", 6, 3, n=9)
    m, Z = run(folder, tmp_path / "out", counts=[1, 4, 9, 20], unit="step"), matrix.double().numpy()
    steps = [(int(row_keys(0, x["id"], j)[0]), x, s) for x in samples for j, s in enumerate(x["steps"]) if s["token_end"] > s["token_start"] and s["macro"] == "Plan"]
    for e in m["all"]["token_count_sweep"]["series"]["Plan"]:
        if e["n_rows"] is None: assert e["count"] > len(steps); continue
        rows = [x["global_offset"] + t for _, x, s in sorted(steps, key=lambda k: k[0])[: e["count"]] for t in range(s["token_start"], s["token_end"])]
        assert e["n_rows"] == len(rows)
        if len(rows) > 2: assert e["rankme"] == pytest.approx(by_numpy(Z[rows])["rankme"], rel=1e-8)
    assert {m[pool]["token_count_sweep"]["unit"] for pool in POOLS} == {"step"}
    same = run(folder, tmp_path / "rows", counts=[1, 4, 9, 20], unit="token")
    for pool in POOLS[1:]: assert m[pool]["token_count_sweep"] == same[pool]["token_count_sweep"] | {"source": m[pool]["token_count_sweep"]["source"]}


def test_duplicate_names_and_no_names(tmp_path):
    "Samples of one name are drawn as two; samples without a name by their number."
    _, matrix, samples = a_folder(tmp_path / "x", 8, 3)
    for i, x in enumerate(samples): x.pop("id") if i % 2 else x.update(id="same")
    samples[-1]["id"] = "same#2"
    m = run(write(tmp_path / "states", matrix, samples), tmp_path / "out", counts=[20])
    assert len(set(spectral._names_of(samples))) == len(samples)
    e = m["all"]["token_count_sweep"]["series"]["global"][0]
    assert e["n_rows"] == e["rank"] + 17 == 20


KILLED = """
    import os, sys
    from tracebook import spectral
    spectral._SAVE_EVERY, left, read = 0, int(sys.argv[3]), spectral.HiddenStates.read
    def dies(self, a, b):
        global left
        left -= 1
        if not left: os.kill(os.getpid(), 9)
        return read(self, a, b)
    spectral.HiddenStates.read = dies
    spectral.spectral_metrics(sys.argv[1], sys.argv[2], n_bins=4, intervals=("macro",), svd_rows="all", svd=("global", "macro"), progress=False)
"""


def test_kill_and_resume(tmp_path):
    "SIGKILL at several places; the same call goes on, and the files are the same bytes."
    folder, *_ = a_folder(tmp_path / "states", 2, 4, n=8)
    options = {"intervals": ("macro",), "svd_rows": "all", "svd": ("global", "macro")}
    whole = texts(run(folder, tmp_path / "whole", **options).folder)
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    out, died = tmp_path / "out", []
    for reads in (7, 19):
        done = subprocess.run([sys.executable, script, folder, out, str(reads)], capture_output=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
        died.append(done.returncode)
        assert (out / "run.json").exists() and not (out / "pool_all").exists()
    assert died == [-signal.SIGKILL] * 2
    run(folder, out, **options)
    assert texts(out) == whole


@pytest.mark.parametrize("at", range(1, 40, 5))
def test_stop_anywhere(tmp_path, monkeypatch, at):
    "An exception at any read or any written file; what was done counts, and the bytes are the same."
    folder, *_ = a_folder(tmp_path / "states", 2, 4, n=5)
    whole, out = texts(run(folder, tmp_path / "whole").folder), tmp_path / "out"
    monkeypatch.setattr(spectral, "_SAVE_EVERY", 0)
    read, save, left = HiddenStates.read, spectral._save_bytes, [at]
    def count():
        left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(HiddenStates, "read", lambda self, a, b: (count(), read(self, a, b))[1])
        m.setattr(spectral, "_save_bytes", lambda path, write: (count(), save(path, write))[1])
        with pytest.raises(KeyboardInterrupt): run(folder, out)
    seen = []
    monkeypatch.setattr(HiddenStates, "read", lambda self, a, b: (seen.append(b - a), read(self, a, b))[1])
    run(folder, out)
    assert texts(out) == whole


def test_other_settings_are_refused(tmp_path):
    folder, matrix, samples = a_folder(tmp_path / "states", 2, 4)
    m = run(folder, tmp_path / "out")
    for more, name in (({"n_bins": 5}, "n_bins is 4 there and 5 now"), ({"poolings": ["all"]}, "poolings"), ({"seeds": (1,)}, "seeds"), ({"groups": "category"}, "groups"), ({"unit": "trace"}, "unit"), ({"intervals": "macro"}, "intervals")):
        with pytest.raises(ValueError, match=name): run(folder, tmp_path / "out", **more)
    other = write(tmp_path / "other", matrix, samples[:-1])
    with pytest.raises(ValueError, match="source is"): run(other, tmp_path / "out")
    before = texts(m.folder)
    assert texts(run(folder, tmp_path / "out").folder) == before
    (m.folder / "mine.txt").write_text("keep")
    assert run(folder, tmp_path / "out", resume=False, n_bins=5)["all"]["depth_profile"]["n_bins"] == 5
    assert (m.folder / "mine.txt").read_text() == "keep"


def test_settings_in_other_forms(tmp_path):
    "One is a list of one, numpy's numbers are numbers, twice is once."
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    m = run(folder, tmp_path / "out", seeds=0, counts=5, poolings="all", intervals="global")
    assert run(folder, tmp_path / "out", seeds=(0, np.int64(0)), counts=np.array([5]), poolings=("all",), intervals=["global"]).raw == m.raw


def test_intervals_by_width(tmp_path):
    "Made by default where they cost little."
    for d, some in ((4, True), (513, False)):
        m = spectral_metrics(a_folder(tmp_path / f"s{d}", 2, d, n=3)[0], tmp_path / f"o{d}", poolings="all", progress=False)
        for e in (m["all"]["basic_metrics"]["global"], *m["all"]["basic_metrics"]["macro"].values(), *m["all"]["basic_metrics"]["segments"].values()): assert ("ci" in e) == some


@pytest.mark.parametrize("kind", ["bins", "bins/macro", "segments_macro", "bins/segments_macro"])
def test_intervals_of_any_kind(tmp_path, kind):
    folder, *_ = a_folder(tmp_path / "states", 9, 4, n=12)
    m = run(folder, tmp_path / "out", intervals=(kind,), poolings="all")
    valid(m)
    for key, e in entries(m).items():
        mine = ("bins/" if key[-1] is not None else "") + key[2] == kind or (kind, key[1], key[2]) == ("bins", "depth_profile", "global")
        assert ("ci" in e) == mine, key


@pytest.mark.parametrize("lost", ["rows.bin", "sums.bin", "rows.bin short", "states.safetensors", "solved", "nothing"])
def test_checkpoint_is_damaged(tmp_path, monkeypatch, lost):
    "A stopped run whose checkpoint was damaged begins again, and says so; one whose is whole goes on."
    folder, *_ = a_folder(tmp_path / "states", 2, 4, n=8)
    whole, out = texts(run(folder, tmp_path / "whole").folder), tmp_path / "out"
    monkeypatch.setattr(spectral, "_SAVE_EVERY", 0)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(spectral, "_write_pool", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(folder, out)
    work, name = out / ".work", lost.split()[0]
    if lost == "solved": next(work.glob("solved_*.npz")).write_bytes(b"PK")
    elif lost.endswith("short"): (work / name).write_bytes((work / name).read_bytes()[:-4])
    elif lost == "states.safetensors": (work / name).write_bytes(b"x" * 99)
    elif lost != "nothing": (work / name).unlink()
    seen, read = [], HiddenStates.read
    monkeypatch.setattr(HiddenStates, "read", lambda self, a, b: (seen.append(b - a), read(self, a, b))[1])
    if lost == "nothing": run(folder, out)
    else:
        with pytest.warns(UserWarning, match="begins again"): run(folder, out)
    assert texts(out) == whole and bool(seen) == (lost != "nothing")


def test_checkpoint_is_dropped_for_good(tmp_path, monkeypatch):
    "Rows that waited are lost; the run that begins again is stopped before it has saved; nobody takes the old checkpoint for the new rows."
    folder, *_ = a_folder(tmp_path / "states", 2, 4, n=8)
    whole, out, put = texts(run(folder, tmp_path / "whole").folder), tmp_path / "out", spectral._Store.put
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(spectral, "_write_pool", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(folder, out)
    (out / ".work/rows.bin").unlink()
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="begins again"):
        left = [3]
        def dies(self, at, rows):
            left[0] -= 1
            if not left[0]: raise KeyboardInterrupt
            put(self, at, rows)
        m.setattr(spectral._Store, "put", dies)
        run(folder, out)
    run(folder, out)
    assert texts(out) == whole


def test_fewer_poolings_leave_nothing(tmp_path):
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    run(folder, tmp_path / "out", poolings=("all", "mean"))
    (tmp_path / "out/pool_all/mine.txt").write_text("keep")
    m = run(folder, tmp_path / "out", poolings=("first",), resume=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["pool_all", "pool_first", "run.json"]
    (tmp_path / "out/pool_all/mine.txt").unlink(), (tmp_path / "out/pool_all").rmdir()
    assert texts(m.folder) == texts(run(folder, tmp_path / "other", poolings=("first",)).folder)


def test_states_that_changed(tmp_path):
    "Shards without a hash in the config: other numbers are other states."
    folder, matrix, samples = a_folder(tmp_path / "states", 2, 4, cuts=())
    run(folder, tmp_path / "out")
    save_file({"hidden_states": matrix.flip(0).contiguous()}, folder / "hidden_states_layer3_shard00000.safetensors")
    with pytest.raises(ValueError, match="source is"): run(folder, tmp_path / "out")


def test_metrics_beside_the_states(tmp_path):
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    with pytest.raises(ValueError, match="holds the hidden states"): run(folder, folder)
    for wrong in (5, np.zeros((3, 4)), b"path"):
        with pytest.raises(ValueError, match="is no folder of hidden states"): run(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (folder / "run.json").exists()


@pytest.mark.parametrize("macros, bins", [(3, 40), (60, 4)])
def test_few_states_are_open(tmp_path, monkeypatch, macros, bins):
    "The order of the pass keeps few states open, whether there are many parts or many labels; the numbers do not depend on it."
    rng, most, absorb = np.random.default_rng(0), [0], spectral._absorb
    labels = [f"m{i}" for i in range(macros)]
    samples = [{"id": i, "global_offset": 400 * i, "num_tokens": 400, "steps": [step(5 * j, 5 * j + 5, labels[int(rng.integers(macros))], ("thought", "solution")[int(rng.integers(2))]) for j in range(80)]} for i in range(12)]
    folder = write(tmp_path / "s", torch.from_numpy(rng.normal(size=(4800, 2))).float(), samples)
    def counted(work, pool, states, *rest):
        absorb(work, pool, states, *rest)
        most[0] = max(most[0], len(states))
    monkeypatch.setattr(spectral, "_absorb", counted)
    m = run(folder, tmp_path / "out", n_bins=bins, poolings="all", counts=[4])
    assert most[0] <= 12 + 3 * min(macros, bins)
    for order in spectral._ORDERS:
        monkeypatch.setattr(spectral, "_ORDERS", (order,))
        same_numbers(numbers(run(folder, tmp_path / order[0], n_bins=bins, poolings="all", counts=[4])), numbers(m))


def test_run_json_is_damaged(tmp_path):
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    whole = texts(run(folder, tmp_path / "out").folder)
    for bad in (b"{", b"[]", b'{"settings": []}', b"\xff"):
        (tmp_path / "out/run.json").write_bytes(bad)
        with pytest.raises(ValueError, match="run.json is damaged.*resume=False"): run(folder, tmp_path / "out")
        run(folder, tmp_path / "out", resume=False)
        assert texts(tmp_path / "out") == whole


@pytest.mark.parametrize("name", ["basic_metrics.json", "sensitivity.json", "spectra_all.safetensors"])
@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_complete_but_for_a_file(tmp_path, name, how):
    "A file that was removed or damaged is made again; what a kill left over is removed."
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    whole, path = texts(run(folder, tmp_path / "out").folder), tmp_path / "out/pool_all" / name
    path.unlink() if how == "lost" else path.write_bytes(b"{")
    (tmp_path / "out/.work").mkdir()
    run(folder, tmp_path / "out")
    assert texts(tmp_path / "out") == whole
    (tmp_path / "out/.work").mkdir()
    run(folder, tmp_path / "out")
    assert not (tmp_path / "out/.work").exists()


def test_foreign_folder_is_not_overwritten(tmp_path):
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    (tmp_path / "out/pool_all").mkdir(parents=True)
    (tmp_path / "out/pool_all/basic_metrics.json").write_text("{}")
    for resume in (True, False):
        with pytest.raises(ValueError, match="not from here"): run(folder, tmp_path / "out", resume=resume)
    assert (tmp_path / "out/pool_all/basic_metrics.json").read_text() == "{}"


@pytest.mark.parametrize("bad", [{"poolings": ["median"]}, {"poolings": ["all", "all"]}, {"groups": "kind"}, {"n_bins": 0}, {"n_bins": 2.0}, {"n_bins": True}, {"poolings": ()}, {"poolings": None}, {"unit": "turn"}, {"preset": "garrido"}, {"counts": [0]}, {"counts": [1.5]}, {"seeds": ["0"]}, {"seeds": "0"}, {"counts": 0}, {"counts": "many"}, {"device": "cuda:77"}, {"device": "foo"}, {"device": "meta"}, {"trace_groups": 2**65}, {"seeds": 2**100}, {"svd": ["all"]}, {"svd": ["micro"]}, {"svd_rows": 1}, {"svd_rows": "some"}, {"intervals": ["depth"]}, {"intervals": 3}, {"trace_groups": 1}, {"root": "x"}])
def test_settings_that_cannot_be(tmp_path, bad):
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    with pytest.raises(ValueError): run(folder, tmp_path / "out", **bad)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- known spectra


def of_spectrum(path, eigenvalues, n, mean=0.0, dtype=torch.float32, seed=0, d=None):
    "A folder whose annotated tokens have exactly these eigenvalues: left vectors orthogonal to the ones."
    rng, k = np.random.default_rng(seed), len(eigenvalues)
    d = d or k
    left = np.linalg.qr(np.concatenate([np.ones((n, 1)), rng.normal(size=(n, k))], axis=1))[0][:, 1:]
    right = np.linalg.qr(rng.normal(size=(d, d)))[0][:, :k]
    Z = (left * np.sqrt(np.asarray(eigenvalues) * (n - 1))) @ right.T + mean * rng.normal(size=d)
    samples = [{"id": str(i), "global_offset": a, "num_tokens": min(50, n - a), "steps": [step(0, min(50, n - a), "ab"[i % 2])]} for i, a in enumerate(range(0, n, 50))]
    return write(path, torch.from_numpy(Z).to(dtype), samples, [n // 3])


@pytest.mark.parametrize("a", [0.5, 1, 2])
@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_power_law(tmp_path, a, dtype, rel):
    i = np.arange(1, 121.0)
    l = i**-a
    s = l**0.5
    H = lambda p: math.exp(-(p / p.sum() * np.log(p / p.sum())).sum())
    m = run(of_spectrum(tmp_path / "states", l, 1000, 1.0, dtype), tmp_path / "out", poolings=["all"], svd_rows="all")
    e = m["all"]["basic_metrics"]["global"]
    assert e["alpha"] == pytest.approx(a, rel=rel)
    assert e["rankme"] == pytest.approx(H(s), rel=rel)
    assert e["effective_rank"] == pytest.approx(H(l), rel=rel)
    assert e["stable_rank"] == pytest.approx(l.sum(), rel=rel)
    x = m["all"]["svd_vs_covariance"]["groups"]["global"]
    assert x["all_rows"] and x["n_rows"] == 1000
    assert x["max_sigma_rel_err"] <= x["error_bound"] and abs(x["delta"]["rankme_rel"]) < 1e-9
    assert abs(x["definition"]["rankme_rel"]) > 1e-4  # a mean was added


@pytest.mark.parametrize("r", [1, 7, 30])
def test_rank_r(tmp_path, r):
    m = run(of_spectrum(tmp_path / "states", np.ones(r), 400, 0.0, torch.float32, d=48), tmp_path / "out", poolings=["all"], n_bins=1)
    e = m["all"]["basic_metrics"]["global"]
    assert [e["rankme"], e["effective_rank"], e["participation_ratio"], e["stable_rank"]] == pytest.approx([r] * 4, rel=3e-5)


def test_isotropic(tmp_path):
    "Gaussian rows: the effective rank is the null beside it."
    Z = torch.from_numpy(np.random.default_rng(0).normal(size=(4000, 300))).float()
    samples = [{"id": str(i), "global_offset": 100 * i, "steps": [step(0, 100, "x")]} for i in range(40)]
    e = run(write(tmp_path / "states", Z, samples), tmp_path / "out", poolings=["all", "first"], n_bins=1)["all"]["basic_metrics"]["global"]
    assert e["isotropic_null"] == pytest.approx(300 * math.exp(-300 / (2 * 3999)))
    assert e["effective_rank"] == pytest.approx(e["isotropic_null"], rel=3e-3)
    assert e["participation_ratio"] == pytest.approx(300 * 4000 / 4300, rel=3e-3)


def test_triangles_are_the_svd(tmp_path):
    "Streaming QR over all rows equals the SVD of the rows within 1e-12 of each σ."
    folder, matrix, samples = a_folder(tmp_path / "states", 4, 6, n=12)
    m = run(folder, tmp_path / "out", svd_rows="all", svd=("global", "macro", "segments"))
    tensors, want = load_file(m.folder / "pool_all/spectra_all.safetensors"), brute(matrix, samples, 4)
    for key in m["all"]["svd_vs_covariance"]["groups"]:
        kind, _, x = key.partition("/")
        Z = want["all", "basic_metrics", kind, x if kind == "segments" else None, x or "global", None]
        for name, A in (("centered_svd", Z - Z.mean(0)), ("uncentered_svd", Z)):
            got, exact = tensors[f"svd/{key}/{name}"].numpy(), np.linalg.svd(A, compute_uv=False)
            k = min(len(got), len(exact), len(Z) - 1)
            assert got[:k] == pytest.approx(exact[:k], rel=1e-12)


# ---------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("d", [4, 50])
def test_intervals(tmp_path, d):
    "Thick and thin groups: the jackknife over groups of traces, from rows selected one by one."
    folder, matrix, samples = a_folder(tmp_path / "states", 9, d, n=12)
    found = entries(run(folder, tmp_path / "out", intervals=("global", "macro"), trace_groups=5))
    for pool, kind, group in (("all", "global", "global"), ("all", "macro", "Plan"), ("mean", "macro", "Verify")):
        parts = {}
        for x in samples:
            rows = brute(matrix, [x], 4).get((pool, "basic_metrics", kind, None, group, None))
            if rows is not None: parts.setdefault(group_of(x["id"], 5), []).append(rows)
        theta = [by_numpy(np.concatenate([r for k, rs in parts.items() if k != g for r in rs]))["rankme"] for g in parts]
        G = len(theta)
        se = math.sqrt((G - 1) / G * sum((t - np.mean(theta)) ** 2 for t in theta))
        e = found[pool, "basic_metrics", kind, None, group, None]
        t = {2: 12.7062047, 3: 4.3026527, 4: 3.1824463, 5: 2.7764451}[G]
        assert e["ci"]["rankme"] == pytest.approx([e["rankme"] - t * se, e["rankme"] + t * se], rel=1e-6)
        assert e["ci"]["alpha"] is None and "ci.alpha" in e["reason"] or d == 50
    assert "ci" not in found["all", "basic_metrics", "segments", "thought", "thought", None]


# ---------------------------------------------------------------------------------------------------- files


def test_everything_recomputes(tmp_path):
    "From the saved spectra, without the states, under another preset too."
    folder, *_ = a_folder(tmp_path / "states", 2, 30, n=9)
    m = run(folder, tmp_path / "out")
    for pool in POOLS:
        for at, e in m.entries(pool):
            if e["rankme"] is None: continue
            row = metrics_row(m.spectrum(e["spectrum"], pool))
            for name in METRICS:
                if name != "rankme_garrido" and e.get(name) is not None and row.get(name) is not None: assert float(row[name]) == pytest.approx(e[name], rel=1e-12), (at, name)
            if "rankme_garrido" in e: assert rankme(m.spectrum(e["spectrum"], pool, False), "garrido") == pytest.approx(e["rankme_garrido"], rel=1e-12)


def test_inequalities(tmp_path):
    folder, *_ = a_folder(tmp_path / "states", 2, 12, n=9)
    for e in entries(run(folder, tmp_path / "out")).values():
        if e["rankme"] is None: continue
        chain = [1, e["stable_rank"], e["participation_ratio"], e["effective_rank"], e["rankme"], e["rank"], min(e["n_rows"] - 1, 12)]
        assert all(a <= b * (1 + 1e-9) for a, b in zip(chain, chain[1:]))


def test_empty(tmp_path):
    "No samples; samples without steps; steps without tokens: files with reasons."
    Z = torch.zeros(6, 3)
    for name, samples in {"none": [], "bare": [{"global_offset": 0, "steps": []}], "empty": [{"global_offset": 0, "steps": [step(2, 2, "Plan")]}]}.items():
        m = run(write(tmp_path / name, Z, samples), tmp_path / f"out {name}", intervals=("global",))
        valid(m)
        e = m["mean"]["basic_metrics"]["global"]
        assert e["n_rows"] == 0 and e["reason"]["rankme"] == "no rows"
        assert m["all"]["basic_metrics"]["counts"] == {"empty_steps": int(name == "empty"), "unannotated_tokens": 6, "overlapping_tokens": 0, "nonfinite_rows": 0}
        for plot in (plot_categories, plot_depth, plot_sweep, plot_cells, plot_spectra): plot(m).canvas.draw()
        assert len(m["all"]["depth_profile"]["bins"]) == 4


def test_equal_rows_and_one_row(tmp_path):
    Z = torch.ones(40, 3)
    m = run(write(tmp_path / "s", Z, [{"global_offset": 0, "steps": [step(0, 39, "a"), step(39, 40, "b")]}]), tmp_path / "out")
    valid(m)
    macro = m["all"]["basic_metrics"]["macro"]
    assert (macro["a"]["reason"]["rankme"], macro["b"]["reason"]["rankme"]) == ("all rows are equal", "a single row")
    assert m["all"]["basic_metrics"]["between_share"] is None


def test_segments_with_slashes(tmp_path):
    "Labels that would make one path of two groups."
    rng, pairs = np.random.default_rng(0), [("thought", "a"), ("thought/macro", "a"), ("thought", "macro/a"), ("thought%2Fmacro", "a"), ("global", "global")]
    samples = [{"id": i, "global_offset": 20 * i, "num_tokens": 20, "steps": [step(0, 20, c, s)]} for i, (s, c) in enumerate(pairs)]
    matrix = torch.from_numpy(rng.normal(size=(100, 4))).float()
    m = run(write(tmp_path / "s", matrix, samples), tmp_path / "out", n_bins=1)
    for i, (s, c) in enumerate(pairs):
        e = m["all"]["basic_metrics"]["segments_macro"][s][c]
        assert e["effective_rank"] == pytest.approx(by_numpy(matrix[20 * i : 20 * i + 20].double().numpy())["effective_rank"], rel=1e-8)
        assert effective_rank(m.spectrum(e["spectrum"])) == pytest.approx(e["effective_rank"], rel=1e-12)


def test_hostile_labels(tmp_path):
    "Names that are keys of ours, markup, terminal codes, half a surrogate, numbers, nothing."
    names = ["global", "bins/0", "<script>", "\x1b[2J", "\ud800", "a/b", "", 7, None, "macro/global", "all", "segments/thought"]
    rng = np.random.default_rng(0)
    samples = [{"id": f"\x1b{i}", "global_offset": 20 * i, "steps": [{"token_start": 0, "token_end": 20, "category": c, "macro": c, "segment": None}]} for i, c in enumerate(names)]
    m = run(write(tmp_path / "s", torch.from_numpy(rng.normal(size=(20 * len(names), 4))).float(), samples), tmp_path / "out", groups="category")
    valid(m)
    assert set(m["all"]["basic_metrics"]["macro"]) == {"global", "bins/0", "<script>", "\x1b[2J", "\\ud800", "a/b", "", "7", "unlabelled", "macro/global", "all", "segments/thought"}
    assert {"global", "macro/global", "macro/macro/global"} <= m["all"]["token_count_sweep"]["series"].keys()
    for count in (None, m["all"]["token_count_sweep"]["counts"][0]):
        told = compare_models({"kind": m, "values": m}, "effective_rank", count=count)
        assert len({(r["kind"], r["segment"], r["group"]) for r in told}) == len(told) and {r["group"] for r in told if r["kind"] == "macro"} == set(m["all"]["basic_metrics"]["macro"])
        by = {(r["kind"], r["group"]): r["values"]["kind"] for r in told}
        assert by["global", "global"] != by["macro", "global"] != by["macro", "macro/global"]
    keys = [e["spectrum"] for _, e in m.entries("all")]
    assert len(set(keys)) == len(keys)
    for key in keys: m.spectrum(key)
    assert m["all"]["token_count_sweep"]["series"]["global"][0]["n_rows"] == m["all"]["token_count_sweep"]["counts"][0]
    assert "\x1b" not in repr(m)
    for plot in (plot_categories, plot_depth, plot_sweep, plot_cells, plot_spectra): plot(m).canvas.draw()


@pytest.mark.parametrize("d", [3, 90])
def test_not_finite(tmp_path, d):
    "Rows that are not finite are left out everywhere, counted and named; a step with one has no mean."
    folder, matrix, samples = a_folder(tmp_path / "states", 4, d, n=9)
    rng, steps = np.random.default_rng(1), [(x, s) for x in samples for s in x["steps"] if s["token_end"] > s["token_start"]]
    rows = sorted({x["global_offset"] + s[k] - (k == "token_end") for (x, s), k in zip([steps[i] for i in rng.choice(len(steps), 6)], ["token_start", "token_end"] * 3)})
    hurt = matrix.clone()
    for row, value in zip(rows, [torch.nan, torch.inf, -torch.inf] * 2): hurt[row, row % d] = value
    x, s = next((x, s) for x, s in steps if x["global_offset"] + s["token_start"] <= rows[0] < x["global_offset"] + s["token_end"])
    with pytest.warns(UserWarning, match=rf"left out.*: {len(rows)} rows, the first is row {rows[0]} \(sample {x['id']}, token {rows[0] - x['global_offset']}\)"): m = run(write(tmp_path / "hurt", hurt, samples), tmp_path / "out", intervals=("global",), counts=[5, 40], svd_rows="all")
    valid(m)
    want, found = brute(hurt, samples, 4), entries(m)
    for key, Z in want.items():
        if key[2] == "micro": continue
        Z, e = Z[np.isfinite(Z).all(1)], found[key]
        assert e["n_rows"] == len(Z), key
        if len(Z) > 1 and e["rank"]: assert e["effective_rank"] == pytest.approx(by_numpy(Z)["effective_rank"], rel=1e-8), key
    for pool in POOLS:
        lost = sum(not np.isfinite(r).all() for r in want[pool, "basic_metrics", "global", None, "global", None])
        assert m[pool]["basic_metrics"]["counts"]["nonfinite_rows"] == lost and lost <= len(rows)
    assert m["mean"]["basic_metrics"]["counts"]["nonfinite_rows"] > 0


def test_nothing_finite(tmp_path):
    Z, samples = torch.full((40, 3), torch.nan), [{"global_offset": 0, "steps": [step(0, 30, "a"), step(30, 40, "b")]}]
    with pytest.warns(UserWarning, match="left out .* 40 rows"): m = run(write(tmp_path / "s", Z, samples), tmp_path / "out", intervals=("global",), svd_rows="all")
    valid(m)
    for pool in POOLS: assert m[pool]["basic_metrics"]["global"]["reason"]["rankme"] == "no rows"


def test_overlapping_steps(tmp_path):
    "Steps of somebody else may overlap: their tokens are rows of both, and that is said."
    rng = np.random.default_rng(0)
    Z, samples = torch.from_numpy(rng.normal(size=(40, 3))).float(), [{"global_offset": 0, "num_tokens": 40, "steps": [step(0, 30, "a"), step(20, 36, "b"), step(25, 30, "a")]}]
    with pytest.warns(UserWarning, match="overlap: 15 tokens more"): m = run(write(tmp_path / "s", Z, samples), tmp_path / "out")
    valid(m)
    assert m["all"]["basic_metrics"]["counts"] | {"empty_steps": 0} == {"empty_steps": 0, "unannotated_tokens": 4, "overlapping_tokens": 15, "nonfinite_rows": 0}
    for key, Z in brute(Z, samples, 4).items():
        if key[2] != "micro" and len(np.unique(Z, axis=0)) > 1: assert entries(m)[key]["effective_rank"] == pytest.approx(by_numpy(Z)["effective_rank"], rel=1e-8)


def test_only_the_certain_keys(tmp_path):
    "A folder as others publish it: no names, no counts, no macro; the stage is unknown."
    rng, matrix = np.random.default_rng(0), torch.from_numpy(np.random.default_rng(1).normal(size=(90, 4))).bfloat16()
    samples = [{"global_offset": a, "steps": [{"token_start": 2, "token_end": 20, "category": "plan"}, {"token_start": 20, "token_end": 30, "category": "check"}]} for a in (0, 30, 60)]
    m = run(write(tmp_path / "s", matrix, samples), tmp_path / "out")
    valid(m)
    assert m["all"]["basic_metrics"]["source"]["stage"] == "unknown"
    assert set(m["all"]["basic_metrics"]["macro"]) == {"plan", "check"} and m["all"]["basic_metrics"]["segments"] == {}
    assert m.model == "out"


def test_some_poolings(tmp_path):
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    whole = numbers(run(folder, tmp_path / "whole"))
    for pools in (["all"], ["mean"], ["first", "last"]):
        m = run(folder, tmp_path / "-".join(pools), poolings=pools)
        assert m.pools == pools
        same_numbers(numbers(m), {k: v for k, v in whole.items() if k[0] in pools}, 1e-15)


def test_root(tmp_path):
    "The published tree, and several models side by side."
    for k, model in enumerate(("org/Some-Model", "org/Other")):
        _, matrix, samples = a_folder(tmp_path / f"x{k}", k, 4)
        m = spectral_metrics(write(tmp_path / f"states{k}", matrix, samples, model=model), root=tmp_path, progress=False, counts=[20])
        assert m.folder == tmp_path / "spectral_metrics" / model.split("/")[1].lower() and m.model == model
    models = load_models(tmp_path)
    assert list(models) == ["other", "some-model"]
    for count in (None, 20):
        told = {(r["kind"], r["group"]): r["values"] for r in compare_models(models, "effective_rank", "all", count)}
        assert told["global", "global"].keys() == {"other", "some-model"} and all(told["global", "global"].values())
    with pytest.raises(ValueError, match="'rank_me' is no metric; choose from rankme"): compare_models(models, "rank_me")
    table = metrics_table(models)
    assert set(table["model"].to_pylist()) == {"other", "some-model"}


def test_table(tmp_path):
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    m = run(folder, tmp_path / "out", intervals=("global",))
    rows = [r for r in metrics_table(m.folder, ("rankme", "alpha")).to_pylist() if (r["pool"], r["file"], r["kind"]) == ("all", "basic_metrics", "global")]
    e = m["all"]["basic_metrics"]["global"]
    assert [(r["metric"], r["value"]) for r in rows] == [("rankme", e["rankme"]), ("alpha", None)]
    assert [rows[0]["lo"], rows[0]["hi"]] == e["ci"]["rankme"] and "a fit needs 10" in rows[1]["reason"]


HOSTILE = {"nan": b'{"a": NaN}', "twice": b'{"a": 1, "a": 2}', "deep": b'{"a":' + b"[" * 10**5, "list": b"[1]", "empty": b"", "utf": b'{"a": "\xff"}', "cut": b'{"global": {'}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metrics(tmp_path, name):
    "Damage is named; the other files are read."
    pool = tmp_path / "m/pool_all"
    pool.mkdir(parents=True)
    (pool / "basic_metrics.json").write_bytes(HOSTILE[name])
    (pool / "depth_profile.json").write_text('{"bins": 3, "unknown": {"x": [1]}}')
    (pool / "more.json").write_text('{"y": 1}')
    m = load_metrics(tmp_path / "m")
    assert len(m.problems) == 1 and "basic_metrics.json" in m.problems[0]
    assert m["all"]["depth_profile"] == {"bins": 3, "unknown": {"x": [1]}} and m["all"]["more"] == {"y": 1}
    assert sorted(m.missing) == ["pool_all/svd_vs_covariance.json", "pool_all/token_count_sweep.json"]
    assert metrics_table(m).num_rows == 0 and list(m.entries("all")) == []


def test_no_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match="pool_all"): load_metrics(tmp_path)
    (tmp_path / "pool_all").mkdir()
    with pytest.raises(KeyError): load_metrics(tmp_path).spectrum()
    (tmp_path / "pool_all/basic_metrics.json").write_text("{}" + " " * 100)
    assert "max_json" in load_metrics(tmp_path, max_json=50).problems[0]


def _changed(value, path, new):
    at = value
    for k in path[:-1]: at = at[k]
    if new is None: del at[path[-1]]
    else: at[path[-1]] = new
    return value


DAMAGE = {
    "basic_metrics": [(("global", "rankme"), "much"), (("global",), None), (("macro", "Plan", "n_rows"), -1), (("counts", "more"), 1), (("conventions", "metrics", "rankme", "weights"), "tau"), (("segments",), []), (("hidden_dim",), 4.0), (("global", "n_rows"), 10**30), (("global", "rankme"), 10**400)],
    "depth_profile": [(("bins", 1, "macro"), []), (("bins", 0, "bin"), "first"), (("n_bins",), None), (("n_bins",), 10**12), (("n_bins",), 4.0), (("bins", 0, "bin"), 1.0)],
    "token_count_sweep": [(("series", "global"), {}), (("series", "Plan", 0, "effective_rank"), 0.5), (("unit",), "turn"), (("series", "Plan", 0, "count"), 10**25), (("series", "global", 0, "seed"), 2**100)],
    "svd_vs_covariance": [(("groups", "global", "delta"), None), (("pool",), "median")],
    "sensitivity": [(("changes", 0, "amount"), -1)],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_in_our_files(tmp_path, name):
    "What the schema forbids is named on loading, and only that file is lost."
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    m = run(folder, tmp_path / "out", poolings="all", counts=[5])
    path = m.folder / f"pool_all/{name}.json"
    whole = path.read_bytes()
    for where, new in DAMAGE[name]:
        path.write_text(json.dumps(_changed(json.loads(whole), where, new)))
        hurt = load_metrics(m.folder)
        assert len(hurt.problems) == 1 and hurt.problems[0].startswith(f"pool_all/{name}.json: at "), where
        assert set(hurt["all"]) == set(m["all"]) - {name}
        metrics_table(hurt)
        with pytest.raises(ValueError, match=f"pool_all/{name}.json: at "): hurt.file(name)
        for plot, needs in ((plot_categories, "basic_metrics"), (plot_depth, "depth_profile"), (plot_cells, "depth_profile"), (plot_sweep, "token_count_sweep"), (plot_spectra, "basic_metrics")):
            if needs != name: plot(hurt)
            else:
                with pytest.raises(ValueError, match=name): plot(hurt)


def test_files_in_the_wrong_place(tmp_path):
    "A file of ours under another name or in another folder, or bins that are not numbered, are damage."
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    m = run(folder, tmp_path / "out", poolings=("all", "mean"))
    pool = m.folder / "pool_all"
    for name, value in (("basic_metrics", m["all"]["depth_profile"]), ("depth_profile", m["all"]["basic_metrics"]), ("basic_metrics", m["mean"]["basic_metrics"]), ("more", m["all"]["basic_metrics"]),
        ("depth_profile", m["all"]["depth_profile"] | {"bins": []}), ("depth_profile", m["all"]["depth_profile"] | {"n_bins": 3}), ("depth_profile", m["all"]["depth_profile"] | {"bins": m["all"]["depth_profile"]["bins"][::-1]}), ("depth_profile", m["all"]["depth_profile"] | {"bin_edges": [0, 1]})):
        path = pool / f"{name}.json"
        whole = path.read_bytes() if path.exists() else None
        path.write_text(json.dumps(value))
        hurt = load_metrics(m.folder)
        assert len(hurt.problems) == 1 and hurt.problems[0].startswith(f"pool_all/{name}.json: it"), hurt.problems
        metrics_table(hurt)
        path.write_bytes(whole) if whole else path.unlink()
    assert not load_metrics(m.folder).problems


def test_wrong_arguments_of_tables_and_pictures(tmp_path):
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    m = run(folder, tmp_path / "out", poolings="all", counts=[5])
    for plot in (plot_depth, plot_sweep, plot_cells):
        for wrong in ("foo", "reason", "spectrum"):
            with pytest.raises(ValueError, match="is no metric; choose from rankme"): plot(m, wrong)
        for name in METRICS: plot(m, name).canvas.draw()
        plt.close("all")
    for call in (lambda: plot_categories(m, ["foo"]), lambda: plot_categories(m, []), lambda: metrics_table(m, ["foo"]), lambda: compare_models({"a": m}, "foo")):
        with pytest.raises(ValueError, match="is no metric"): call()
    plot_categories(m, "rankme"), plot_spectra(m, "global")
    assert metrics_table(m, "rankme") == metrics_table(m, ["rankme"]) and metrics_table(m, "rankme").num_rows
    assert compare_models({"a": m.folder}) == compare_models({"a": m})
    assert metrics_table({"a": m.folder}) == metrics_table({"a": m})
    with pytest.raises(ValueError, match="by name"): compare_models([m])
    for wrong in ({"pool": "x"}, {"count": 63}, {"count": "5"}):
        with pytest.raises(ValueError, match="none of the models has"): compare_models({"a": m}, **wrong)


def test_lost_files(tmp_path):
    "A missing file is an error that names it, where it is needed."
    folder, *_ = a_folder(tmp_path / "states", 2, 4)
    m = run(folder, tmp_path / "out", poolings="all")
    for name in ("depth_profile.json", "spectra_all.safetensors"): (m.folder / "pool_all" / name).unlink()
    m = load_metrics(m.folder)
    assert m.missing == ["pool_all/depth_profile.json", "pool_all/spectra_all.safetensors"] and not m.problems
    with pytest.raises(ValueError, match="pool_all/depth_profile.json is missing"): plot_depth(m)
    with pytest.raises(ValueError, match="spectra_all.safetensors cannot be read"): m.spectrum()
    (m.folder / "pool_all/spectra_all.safetensors").write_bytes(b"spectra")
    with pytest.raises(ValueError, match="spectra_all.safetensors cannot be read"): m.spectrum()
    save_file({"global/centered": torch.ones(3, 3)}, m.folder / "pool_all/spectra_all.safetensors")
    with pytest.raises(ValueError, match="no spectra"): m.spectrum()
    with pytest.raises(ValueError, match="pool_first/basic_metrics.json is missing"): plot_categories(m, pool="first")


def test_every_number_has_conventions(tmp_path):
    "What is in the files can be recomputed under the conventions that the same files state."
    folder, *_ = a_folder(tmp_path / "states", 2, 30, n=12)
    m = run(folder, tmp_path / "out", preset="reptrix", poolings=["all"])
    head, e = m["all"]["basic_metrics"]["conventions"], m["all"]["basic_metrics"]["global"]
    H = lambda p: math.exp(-float((p[p > 0] * np.log(p[p > 0])).sum()))
    for name in ("rankme", "rankme_garrido", "rankme_reptrix", "effective_rank"):
        c = head["metrics"][name]
        s = m.spectrum(centered=c["centered"]).sigma[: c.get("k")] ** (1 if c["weights"] == "sigma" else 2)
        assert H(s / s.sum() + c["eps"]) == pytest.approx(e[name], rel=1e-9)
    assert head["metrics"]["alpha"]["fit"] == [11, 100] and head["metrics"]["alpha"]["preset"] == "reptrix"
    assert e["isotropic_null_rankme"] == pytest.approx(isotropic_null(e["n_rows"], 30, "sigma")) and e["isotropic_null"] == pytest.approx(isotropic_null(e["n_rows"], 30))


# ---------------------------------------------------------------------------------------------------- sensitivity


def test_sensitivity_by_hand():
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(400, 20)).astype(np.float32)
    Z[7] *= 1000
    Z[:, 3] += 50
    told = {(r["change"], r["amount"]): r for r in sensitivity(Z, tokens=(0.0025,), dims=(1,))}
    for key, rows in {("as stored", 0): Z, ("rounded to bfloat16", 0): torch.from_numpy(Z).bfloat16().float().numpy(), ("tokens with the largest norms left out", 0.0025): np.delete(Z, 7, 0), ("largest dimensions left out", 1): np.delete(Z, np.argmax((Z.astype(float) ** 2).mean(0)), 1)}.items():
        assert told[key]["effective_rank"] == pytest.approx(by_numpy(rows.astype(np.float64))["effective_rank"], rel=1e-8)
        assert told[key]["effective_rank_rel"] == pytest.approx(told[key]["effective_rank"] / told["as stored", 0]["effective_rank"] - 1)
    assert [r["change"] for r in sensitivity(torch.zeros(3, 2).bfloat16(), dims=(1, 2))] == ["as stored", "tokens with the largest norms left out", "largest dimensions left out"]


@pytest.mark.slow
def test_toy_road(tmp_path):
    "From text to spectra, by one call."
    m = spectral_metrics(out_dir=tmp_path / "toy", progress=False)
    valid(m)
    assert m["all"]["basic_metrics"]["global"]["ci"]["rankme"]
