"Reading hidden states: all rows that were asked for, or a clear error that names the file. The oracle is the matrix that a test wrote itself."
import copy, hashlib, json, math, os, pickle, random, struct, subprocess, sys, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from tracebook.extract import PUBLISHED_MODELS, HiddenStates, fetch_artefacts, verify_folder

DTYPES = dict(bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32)
CATEGORIES = ["Plan", "Verify", "Answer", "Wait, <b>"]


def shard_name(k): return f"hidden_states_layer7_shard{k:05d}.safetensors"

def sha(data): return hashlib.sha256(data).hexdigest()

def layout(rng, sizes, n_steps=4):
    "Samples of these sizes with random steps, in order and without overlaps."
    samples, at = [], 0
    for i, n in enumerate(sizes):
        marks = sorted(rng.randrange(n + 1) for _ in range(2 * rng.randrange(n_steps + 1)))
        steps = [dict(token_start=a, token_end=b, category=rng.choice(CATEGORIES), macro="m", segment=rng.choice(["thought", "solution"])) for a, b in zip(marks[::2], marks[1::2])]
        samples.append(dict(global_offset=at, steps=steps, num_tokens=n, id=f"s{i}"))
        at += n
    return samples

def write(folder, matrix, cuts, samples, bare=False, **more):
    "A folder whose shards end at `cuts`; `bare`: with the certain keys alone."
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for k, (a, b) in enumerate(zip([0, *cuts], cuts)):
        data = save({"hidden_states": matrix[a:b].clone()})
        (folder / shard_name(k)).write_bytes(data)
        shards.append(dict(file=shard_name(k), token_start=a, token_end=b) | ({} if bare else dict(sha256=sha(data), nbytes=len(data))))
    if bare: samples = [dict(global_offset=s["global_offset"], steps=[dict(token_start=x["token_start"], token_end=x["token_end"]) for x in s["steps"]]) for s in samples]
    index = json.dumps(dict(samples=samples)).encode()
    full = dict(schema="tracebook/representations/1", model="m/M", layer=7, stage="resid_post", hidden_dim=matrix.shape[1], dtype=str(matrix.dtype)[6:], num_tokens=len(matrix),
        num_samples=len(samples), num_steps=sum(len(s["steps"]) for s in samples), complete=True, index_sha256=sha(index))
    (folder / "index.json").write_bytes(index)
    (folder / "config.json").write_text(json.dumps(({} if bare else full) | dict(shards=shards) | more))
    return folder

def standard(folder, dtype=torch.bfloat16, **more):
    rng = random.Random(5)
    matrix = torch.randn(30, 4, generator=torch.Generator().manual_seed(5)).to(dtype)
    samples = layout(rng, [7, 0, 12, 11])
    write(folder, matrix, [5, 5, 16, 18, 30], samples, **more)
    return matrix, samples

def same(a, b): return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))

def edit(folder, **changes):
    "Change the config: functions of it, by name of the file."
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))

def edit_shard(folder, k, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["shards"][k].update(changes)
    path.write_text(json.dumps(config))

def edit_sample(folder, change):
    "Change the index, and take the hash of it away."
    path, config = folder / "index.json", json.loads((folder / "config.json").read_text())
    index = json.loads(path.read_text())
    change(index["samples"])
    path.write_text(json.dumps(index))
    for key in ("index_sha256", "num_samples", "num_steps"): config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))


# ---- the same rows as the matrix
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bare", [False, True])
def test_rows_samples_steps(tmp_path, dtype, bare):
    matrix, samples = standard(tmp_path, DTYPES[dtype], bare=bare)
    hs = HiddenStates(tmp_path, verify="sha256")
    assert (len(hs), hs.num_tokens, hs.hidden_dim, hs.dtype) == (4, 30, 4, DTYPES[dtype])
    assert hs.stage == ("unknown" if bare else "resid_post") and [s["global_offset"] for s in hs.samples] == [s["global_offset"] for s in samples]
    for a in range(31):
        for b in range(a, 31): assert same(hs.read(a, b), matrix[a:b])
    ends = [s["global_offset"] + s["num_tokens"] for s in samples]
    for i, (s, e) in enumerate(zip(samples, ends)):
        for k in (i, i - 4, np.int64(i)): assert same(hs[k], matrix[s["global_offset"]:e])
        for j, x in enumerate(s["steps"]):
            for k in (j, j - len(s["steps"])): assert same(hs.step(i, k), matrix[s["global_offset"] + x["token_start"]:s["global_offset"] + x["token_end"]])
    assert [len(x) for x in hs] == [7, 0, 12, 11] == [len(x) for x in hs[:]] and [len(x) for x in hs[::-2]] == [11, 0]

@settings(max_examples=80, deadline=None)
@given(st.data())
def test_stitching_equals_the_matrix(tmp_path_factory, data):
    n, d = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 5))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=8))) + [n]
    sizes, rng = [], random.Random(data.draw(st.integers(0, 1000)))
    while sum(sizes) < n: sizes.append(rng.randint(0, n - sum(sizes)))
    matrix = torch.randn(n, d).to(data.draw(st.sampled_from(list(DTYPES.values()))))
    samples = layout(rng, sizes)
    hs = HiddenStates(write(tmp_path_factory.mktemp("cut"), matrix, cuts, samples, bare=data.draw(st.booleans())))
    for _ in range(10):
        a = data.draw(st.integers(0, n))
        b = data.draw(st.integers(a, n))
        assert same(hs.read(a, b), matrix[a:b])
    assert all(same(x, matrix[s["global_offset"]:s["global_offset"] + s["num_tokens"]]) for x, s in zip(hs, samples))
    want = [matrix[s["global_offset"] + x["token_start"]:s["global_offset"] + x["token_end"]] for s in samples for x in s["steps"]]
    assert all(same(hs.step(i, j), w) for (i, j), w in zip([(i, j) for i, s in enumerate(samples) for j in range(len(s["steps"]))], want))
    size = data.draw(st.integers(1, 9))
    got = [b for b, _ in hs.rows(block_rows=size)]
    assert same(torch.cat(got) if got else matrix[:0], torch.cat([matrix[:0], *want])) and all(len(b) == size for b in got[:-1])
    assert hs.verify().ok

def test_a_copy_not_a_view(tmp_path):
    matrix, _ = standard(tmp_path)
    hs = HiddenStates(tmp_path)
    hs.read(0, 4).zero_(); hs[0].zero_(); next(iter(hs.rows()))[0].zero_()
    assert same(hs.read(0, 30), matrix)
    assert same(pickle.loads(pickle.dumps(hs)).read(3, 20), matrix[3:20])

def test_more_shards_than_stay_mapped(tmp_path):
    matrix = torch.randn(200, 2)
    hs = HiddenStates(write(tmp_path, matrix, list(range(1, 201)), layout(random.Random(1), [200])))
    assert same(hs.read(0, 200), matrix) and same(hs[0], matrix) and len(hs._open) <= 64

@pytest.mark.parametrize("a, b", [(-1, 3), (3, 2), (0, 31), (31, 31), (10 ** 30, 10 ** 30)])
def test_rows_outside(tmp_path, a, b):
    standard(tmp_path)
    with pytest.raises(ValueError, match="not among the 30 rows"): HiddenStates(tmp_path).read(a, b)

def test_numbers_outside(tmp_path):
    standard(tmp_path)
    hs = HiddenStates(tmp_path)
    for i in (4, -5):
        with pytest.raises(IndexError, match="of 4"): hs[i]
        with pytest.raises(IndexError, match="of 4"): hs.step(i, 0)
    with pytest.raises(IndexError, match="sample 1, step 99 of 3"): hs.step(1, 99)
    with pytest.raises(TypeError): hs[1.0]
    with pytest.raises(ValueError, match="choose size or sha256"): HiddenStates(tmp_path, verify="none")


# ---- the card's rule
def by_the_card(folder, i, j):
    "Global start and end, first shard that overlaps, local slice, stop."
    config, index = (json.loads((folder / n).read_text()) for n in ("config.json", "index.json"))
    sample = index["samples"][i]
    start, end = (sample["global_offset"] + sample["steps"][j][k] for k in ("token_start", "token_end"))
    for shard in config["shards"]:
        if shard["token_start"] < end and shard["token_end"] > start:
            with safe_open(folder / shard["file"], framework="pt") as f: return f.get_slice("hidden_states")[start - shard["token_start"]:end - shard["token_start"]]

def test_the_card_where_no_sample_straddles(tmp_path):
    matrix, samples = torch.randn(60, 3), layout(random.Random(3), [20, 15, 25])
    hs = HiddenStates(write(tmp_path, matrix, [35, 60], samples))
    asked = [(i, j) for i, s in enumerate(samples) for j, x in enumerate(s["steps"]) if x["token_end"] > x["token_start"]]
    assert len(asked) >= 3 and all(same(hs.step(i, j), by_the_card(tmp_path, i, j)) for i, j in asked)

def test_a_straddling_step(tmp_path):
    matrix, steps = torch.randn(10, 3), [dict(token_start=1, token_end=9)]
    write(tmp_path, matrix, [3, 5, 7, 10], [dict(global_offset=0, steps=steps, num_tokens=10)], bare=True)
    assert len(by_the_card(tmp_path, 0, 0)) == 2 and same(HiddenStates(tmp_path).step(0, 0), matrix[1:9])


# ---- streams
def slow_rows(matrix, samples, pooling, keep):
    "What a stream must hold, one step after the other."
    out = []
    for i, s in enumerate(samples):
        for j, x in enumerate(s["steps"]):
            a, b = x["token_start"], x["token_end"]
            if not keep(x) or a == b: continue
            spans = dict(all=[(t, t + 1) for t in range(a, b)], mean=[(a, b)], first=[(a, a + 1)], last=[(b - 1, b)])[pooling]
            for p, q in spans:
                rows = matrix[s["global_offset"] + p:s["global_offset"] + q]
                out.append((i, j, p, q, x["category"], x["macro"], x["segment"], rows.double().mean(0) if pooling == "mean" else rows[0]))
    return out

@pytest.mark.parametrize("pooling", ["all", "mean", "first", "last"])
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_streams(tmp_path, pooling, size):
    rng = random.Random(11)
    matrix, samples = torch.randn(120, 3).bfloat16(), layout(rng, [30, 1, 0, 50, 39], 6)
    hs = HiddenStates(write(tmp_path, matrix, [10, 33, 34, 90, 120], samples))
    for asked in (dict(), dict(category="Plan"), dict(category=["Plan", "Verify"], segment="thought"), dict(macro={"m"}, segment="solution")):
        want = slow_rows(matrix, samples, pooling, lambda x: all(x[k] == v or not isinstance(v, str) and x[k] in v for k, v in asked.items()))
        stream = hs.rows(**asked, pooling=pooling, block_rows=size)
        got = []
        for block, labels in stream:
            assert {len(v) for v in labels.values()} == {len(block)} and 0 < len(block) <= size
            got += [(*x, r) for *x, r in zip(*labels.values(), block)]
        assert [tuple(map(str, g[:-1])) for g in got] == [tuple(map(str, w[:-1])) for w in want] and stream.num_rows == len(want) and len(stream) == -(-len(want) // size)
        assert all(g[-1].dtype == w[-1].dtype and torch.allclose(g[-1], w[-1], rtol=1e-12, atol=0) for g, w in zip(got, want))
        assert stream.empty == sum(x["token_start"] == x["token_end"] and all(x[k] == v or not isinstance(v, str) and x[k] in v for k, v in asked.items()) for s in samples for x in s["steps"])
        assert [len(b) for b, _ in stream] == [len(b) for b, _ in stream] # again

def test_means_do_not_depend_on_blocks_or_shards(tmp_path):
    matrix, samples = torch.randn(5000, 3) * 1e4, [dict(global_offset=0, num_tokens=5000, steps=[dict(token_start=3, token_end=4900), dict(token_start=4900, token_end=4950)])]
    means = [torch.cat([b for b, _ in HiddenStates(write(tmp_path / str(k), matrix, cuts, samples)).rows(pooling="mean", block_rows=size)])
        for k, (cuts, size) in enumerate([([5000], 1), ([5000], 100), ([1, 1100, 1101, 5000], 1), (list(range(100, 5001, 100)), 2)])]
    assert all(same(m, means[0]) for m in means)
    exact = [[math.fsum(matrix[a:b, k].tolist()) / (b - a) for k in range(3)] for a, b in ((3, 4900), (4900, 4950))]
    assert torch.allclose(means[0], torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-12)

def test_streams_refuse(tmp_path):
    standard(tmp_path)
    hs = HiddenStates(tmp_path)
    for kwargs, says in [(dict(category="Guess"), "no step has category.*there are"), (dict(segment=["thought", "dream"]), "no step has segment.*dream"), (dict(pooling="max"), "choose all"), (dict(block_rows=0), "at least one row")]:
        with pytest.raises(ValueError, match=says): hs.rows(**kwargs)
    with pytest.raises(IndexError): hs.rows(samples=[9])
    assert list(hs.rows(samples=[])) == []

def test_labels_that_are_numbers_or_absent(tmp_path):
    matrix = torch.randn(6, 2)
    steps = [dict(token_start=0, token_end=2, category=3), dict(token_start=2, token_end=4), dict(token_start=4, token_end=6, category=None)]
    hs = HiddenStates(write(tmp_path, matrix, [6], [dict(global_offset=0, num_tokens=6, steps=steps)]))
    assert same(next(iter(hs.rows(3)))[0], matrix[:2]) and next(iter(hs.rows()))[1]["category"].tolist() == [3, 3, None, None, None, None]


# ---- foreign folders and parts of folders
def test_certain_keys_alone(tmp_path):
    standard(tmp_path, bare=True)
    hs = HiddenStates(tmp_path)
    assert {"config.json: stage", "config.json: model", "config.json: shards[].sha256", "index.json: samples[].num_tokens", "index.json: samples[].steps[].category"} <= set(hs.missing)
    assert hs.stage == "unknown" and hs.facts()["model"] is None and "unknown" in hs._repr_html_() and verify_folder(tmp_path).ok

def test_gaps_between_samples_and_any_order(tmp_path):
    matrix = torch.randn(20, 2)
    samples = [dict(global_offset=12, num_tokens=5, steps=[]), dict(global_offset=0, num_tokens=4, steps=[dict(token_start=1, token_end=4)]), dict(global_offset=4, num_tokens=0, steps=[])]
    hs = HiddenStates(write(tmp_path, matrix, [20], samples))
    assert same(hs[0], matrix[12:17]) and same(hs[1], matrix[:4]) and len(hs[2]) == 0 and hs.verify().unclaimed == 11

@pytest.mark.parametrize("change", [dict(num_tokens=10 ** 9), dict(num_tokens={"a": 1}), dict(num_samples="3"), dict(num_steps=None), dict(num_tokens=True)])
def test_counts_of_others_are_doubts(tmp_path, change):
    matrix, _ = standard(tmp_path, bare=True, **change)
    hs = HiddenStates(tmp_path)
    assert same(hs.read(0, 30), matrix) and len(hs.doubts) == 1 and hs.doubts[0].startswith(f"config.json: {next(iter(change))} is") and "doubtful" in str(verify_folder(tmp_path)) and verify_folder(tmp_path).ok
    edit(tmp_path, schema="tracebook/representations/1")
    with pytest.raises(ValueError, match=next(iter(change))): HiddenStates(tmp_path)

@pytest.mark.parametrize("sizes", [[7, 0, 12, 12], [8, 0, 12, 11], [7, 0, 1, 11], [None, 0, 12, 11], [7.0, 0, 12, 11], ["7", [], {}, True], [2 ** 63] * 4])
def test_sizes_of_others_are_doubts(tmp_path, sizes):
    matrix, samples = standard(tmp_path, bare=True)
    edit_sample(tmp_path, lambda s: [x.update(num_tokens=n) for x, n in zip(s, sizes)])
    hs = HiddenStates(tmp_path)
    assert len(hs.doubts) == 1 and "num_tokens is" in hs.doubts[0] and [len(x) for x in hs] == [7, 0, 12, 11]
    edit(tmp_path, schema="tracebook/representations/1")
    with pytest.raises(ValueError, match="index.json: samples"): HiddenStates(tmp_path)

def test_keys_of_others_are_left_alone(tmp_path):
    matrix, _ = standard(tmp_path, bare=True)
    edit(tmp_path, schema=17, layer="last", model=["x"], dtype="torch.bfloat16", total={"a": [1.5, None]})
    assert same(HiddenStates(tmp_path).read(0, 30), matrix)

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_readable_by_brute_force(tmp_path_factory, data):
    n = data.draw(st.integers(1, 30))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6))) + [n]
    rng, sizes = random.Random(data.draw(st.integers(0, 99))), []
    while sum(sizes) < n: sizes.append(rng.randint(0, n - sum(sizes)))
    matrix, samples = torch.randn(n, 2), layout(rng, sizes)
    folder = write(tmp_path_factory.mktemp("part"), matrix, cuts, samples)
    gone = data.draw(st.sets(st.integers(0, len(cuts) - 1)))
    for k in gone: (folder / shard_name(k)).unlink()
    there = np.ones(n, bool)
    for k in gone: there[[0, *cuts][k]:cuts[k]] = False
    hs = HiddenStates(folder, partial=True)
    assert hs.absent == tuple(shard_name(k) for k in sorted(gone))
    assert hs.readable.tolist() == [i for i, s in enumerate(samples) if there[s["global_offset"]:s["global_offset"] + s["num_tokens"]].all()]
    for i, s in enumerate(samples):
        rows = matrix[s["global_offset"]:s["global_offset"] + s["num_tokens"]]
        if i in hs.readable: assert same(hs[i], rows)
        else:
            with pytest.raises(FileNotFoundError, match=r"hidden_states_layer7_shard\d+.safetensors: not there"): hs[i]
    assert sum(len(b) for b, _ in hs.rows(samples=hs.readable)) == sum(x["token_end"] - x["token_start"] for i in hs.readable for x in samples[i]["steps"])

def test_an_index_alone(tmp_path):
    standard(tmp_path, bare=True)
    for p in tmp_path.glob("*.safetensors"): p.unlink()
    with pytest.raises(FileNotFoundError, match=shard_name(0)): HiddenStates(tmp_path)
    hs = HiddenStates(tmp_path, partial=True)
    assert (hs.hidden_dim, hs.dtype, len(hs.absent), hs.readable.tolist()) == (None, None, 5, [1])
    with pytest.raises(ValueError, match="no hidden_dim"): hs.read(0, 0)
    assert verify_folder(tmp_path, partial=True).ok and not verify_folder(tmp_path).ok

def test_claims_of_absent_shards_cost_nothing(tmp_path):
    "A terabyte of rows that are not there: nothing is allocated for them."
    standard(tmp_path, bare=True)
    edit_shard(tmp_path, 4, token_end=2 ** 40, file="gone.safetensors")
    edit_sample(tmp_path, lambda s: s[3]["steps"].append(dict(token_start=0, token_end=2 ** 39, category="far")))
    hs = HiddenStates(tmp_path, partial=True)
    assert hs.num_tokens == 2 ** 40 and hs.readable.tolist() == [0, 1] and hs.rows("far").num_rows == 2 ** 39
    for ask in (lambda: hs[3], lambda: hs.step(3, -1), lambda: hs.read(0, 2 ** 40), *(lambda p=p: list(hs.rows("far", pooling=p)) for p in ("mean", "first", "last")), lambda: next(iter(hs.rows("far")))):
        with pytest.raises(FileNotFoundError, match="gone.safetensors: not there"): ask()

def test_incomplete(tmp_path):
    matrix, _ = standard(tmp_path, complete=False)
    with pytest.raises(ValueError, match="config.json: complete is False"): HiddenStates(tmp_path)
    assert same(HiddenStates(tmp_path, partial=True).read(0, 30), matrix)
    edit(tmp_path, complete=0)
    with pytest.raises(ValueError, match="config.json: complete is 0"): HiddenStates(tmp_path, partial=True)

def test_a_file_that_changes_under_the_reader(tmp_path):
    standard(tmp_path)
    hs = HiddenStates(tmp_path)
    os.truncate(tmp_path / shard_name(0), 20)
    with pytest.raises(ValueError, match=shard_name(0) + ": changed"): hs.read(0, 2)


# ---- folders that lie
def raw_header(folder, k, text, extra=b""):
    "Give a shard another header, and no hash."
    data = (folder / shard_name(k)).read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    text = text if isinstance(text, bytes) else text.encode()
    (folder / shard_name(k)).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n:] + extra)
    edit_shard(folder, k, nbytes=len(text) + 8 + len(data) - 8 - n + len(extra))

def header(shape="[5,4]", dtype="BF16", offsets="[0,40]", name="hidden_states", more=""): return f'{{"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}{more}}}'

def outside(folder):
    path = folder.parent / "outside.safetensors"
    path.write_bytes((folder / shard_name(0)).read_bytes())
    return path

def linked(folder, k, to):
    (folder / shard_name(k)).unlink()
    (folder / shard_name(k)).symlink_to(to)

def raw_config(folder, change): (folder / "config.json").write_text(change((folder / "config.json").read_text()))

S0, S2 = shard_name(0), shard_name(2)
HOSTILE = {
    "escape": (lambda f: edit_shard(f, 0, file="../outside.safetensors"), r"config.json: shards\[0\].file is '../outside"),
    "deep escape": (lambda f: edit_shard(f, 0, file="a/../../outside.safetensors"), r"config.json: shards\[0\].file"),
    "absolute": (lambda f: edit_shard(f, 0, file=str(outside(f))), r"config.json: shards\[0\].file"),
    "backslash": (lambda f: edit_shard(f, 0, file="..\\outside.safetensors"), r"config.json: shards\[0\].file"),
    "drive": (lambda f: edit_shard(f, 0, file="C:outside.safetensors"), r"config.json: shards\[0\].file"),
    "NUL": (lambda f: edit_shard(f, 0, file="a\0.safetensors"), r"config.json: shards\[0\].file"),
    "terminal code": (lambda f: edit_shard(f, 0, file="\x1b[2J.safetensors"), r"config.json: shards\[0\].file"),
    "pickle": (lambda f: edit_shard(f, 0, file="hidden_states.pt"), r"config.json: shards\[0\].file"),
    "hidden": (lambda f: edit_shard(f, 0, file=".a.safetensors"), r"config.json: shards\[0\].file"),
    "no name": (lambda f: edit_shard(f, 0, file=None), r"config.json: shards\[0\].file is None"),
    "long name": (lambda f: edit_shard(f, 0, file="é" * 130 + ".safetensors"), r"config.json: shards\[0\].file"),
    "link out": (lambda f: linked(f, 0, outside(f)), S0 + ": leads out of the folder"),
    "link to a link out": (lambda f: ((f / "x").symlink_to(outside(f)), linked(f, 0, f / "x")), S0 + ": leads out of the folder"),
    "link to itself": (lambda f: linked(f, 0, f / S0), S0),
    "link to a device": (lambda f: linked(f, 0, "/dev/zero"), S0 + ": leads out of the folder"),
    "pipe": (lambda f: ((f / S0).unlink(), os.mkfifo(f / S0)), S0 + ": not a regular file"),
    "folder": (lambda f: ((f / S0).unlink(), (f / S0).mkdir()), S0 + ": not a regular file"),
    "config link out": (lambda f: ((f / "config.json").rename(f.parent / "c.json"), (f / "config.json").symlink_to(f.parent / "c.json")), "config.json: leads out"),
    "index link out": (lambda f: ((f / "index.json").rename(f.parent / "i.json"), (f / "index.json").symlink_to(f.parent / "i.json")), "index.json: leads out"),
    "same file twice": (lambda f: edit_shard(f, 1, file=S0), f"config.json: shards name {S0} twice"),
    "dtype of the config": (lambda f: edit(f, dtype="float16"), "config.json: dtype is 'float16'"),
    "dtype of a shard": (lambda f: (save_file({"hidden_states": torch.zeros(11, 4).half()}, f / S2)), S2),
    "dtype of a shard, no hash": (lambda f: raw_header(f, 0, header(dtype="F16")), f"the shards differ.*{S0}"),
    "integers": (lambda f: raw_header(f, 0, header(dtype="I16")), S0 + ": dtype is 'I16'"),
    "doubles": (lambda f: raw_header(f, 0, header(dtype="F64", shape="[5,1]")), S0 + ": dtype is 'F64'"),
    "width": (lambda f: edit(f, hidden_dim=5), "config.json: hidden_dim is 5"),
    "width as a float": (lambda f: edit(f, hidden_dim=4.0), "config.json: hidden_dim is 4.0"),
    "width of a shard": (lambda f: raw_header(f, 0, header(shape="[10,2]")), S0 + ": 10 rows"),
    "rows of a shard": (lambda f: raw_header(f, 0, header(shape="[4,5]")), S0 + ": 4 rows"),
    "rows beyond the file": (lambda f: raw_header(f, 0, header(shape="[1099511627776,4]")), S0 + ": 40 bytes of numbers"),
    "rows that overflow": (lambda f: raw_header(f, 0, header(shape="[4611686018427387909,4]")), S0 + ": 40 bytes of numbers"),
    "offsets beyond the file": (lambda f: raw_header(f, 0, header(offsets="[0,400]")), S0 + ": 40 bytes of numbers"),
    "offsets inside": (lambda f: raw_header(f, 0, header(offsets="[8,48]"), b"\0" * 8), S0 + ": 48 bytes of numbers"),
    "negative offset": (lambda f: raw_header(f, 0, header(offsets="[-40,0]")), S0),
    "shape with true": (lambda f: raw_header(f, 0, header(shape="[true,20]")), S0 + ": shape is"),
    "shape with floats": (lambda f: raw_header(f, 0, header(shape="[5.0,4]")), S0 + ": shape is"),
    "negative shape": (lambda f: raw_header(f, 0, header(shape="[-5,-4]")), S0 + ": shape is"),
    "three axes": (lambda f: raw_header(f, 0, header(shape="[5,2,2]")), S0 + ": shape is"),
    "one axis": (lambda f: raw_header(f, 0, header(shape="[20]")), S0 + ": shape is"),
    "other key": (lambda f: raw_header(f, 0, header(name="weight")), S0 + ": holds"),
    "two tensors": (lambda f: raw_header(f, 0, header(more=',"x":{"dtype":"BF16","shape":[0,4],"data_offsets":[40,40]}')), S0 + ": holds"),
    "key twice": (lambda f: raw_header(f, 0, header(more=',"hidden_states":{"dtype":"BF16","shape":[5,4],"data_offsets":[0,40]}')), S0 + ": key 'hidden_states' appears twice"),
    "header bomb": (lambda f: raw_header(f, 0, "[" * 100_000), S0 + ": the JSON is nested"),
    "many tensors": (lambda f: raw_header(f, 0, "{" + ",".join(f'"{k}":{{}}' for k in range(100_000)) + "}"), S0 + ": the JSON holds more"),
    "header with NaN": (lambda f: raw_header(f, 0, header(shape="[NaN,4]")), S0 + ": NaN"),
    "header of a list": (lambda f: raw_header(f, 0, "[]"), S0 + ": the JSON is"),
    "header of nothing": (lambda f: raw_header(f, 0, ""), S0),
    "metadata of numbers": (lambda f: raw_header(f, 0, header(more=',"__metadata__":{"a":1}')), S0),
    "giant header": (lambda f: (f / S0).write_bytes(struct.pack("<Q", 2 ** 63) + (f / S0).read_bytes()[8:]), S0 + ": a header of 9,223,372,036,854,775,808 bytes"),
    "header past the end": (lambda f: (f / S0).write_bytes(struct.pack("<Q", 10_000) + (f / S0).read_bytes()[8:]), S0 + ": a header of 10,000"),
    "cut off": (lambda f: os.truncate(f / S0, (f / S0).stat().st_size - 1), S0),
    "cut off in the header": (lambda f: os.truncate(f / S0, 30), S0),
    "empty file": (lambda f: os.truncate(f / S0, 0), S0),
    "longer": (lambda f: (f / S0).write_bytes((f / S0).read_bytes() + b"\0"), S0),
    "absent": (lambda f: (f / S2).unlink(), S2 + ": not there"),
    "no index": (lambda f: (f / "index.json").unlink(), "index.json: not there"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: not there"),
    "overlap": (lambda f: edit_shard(f, 2, token_start=4), r"config.json: shards\[2\] has the rows \[4, 16\); it must begin at row 5"),
    "gap": (lambda f: edit_shard(f, 2, token_start=6), r"config.json: shards\[2\]"),
    "from row 1": (lambda f: edit_shard(f, 0, token_start=1), r"config.json: shards\[0\]"),
    "backwards": (lambda f: edit_shard(f, 0, token_end=-5), r"config.json: shards\[0\].token_end is -5"),
    "true": (lambda f: edit_shard(f, 0, token_start=False), r"config.json: shards\[0\].token_start is False"),
    "float": (lambda f: edit_shard(f, 0, token_end=5.0), r"config.json: shards\[0\].token_end is 5.0"),
    "text": (lambda f: edit_shard(f, 0, token_end="5"), r"config.json: shards\[0\].token_end is '5'"),
    "huge": (lambda f: edit_shard(f, 4, token_end=2 ** 70), r"config.json: shards\[4\].token_end is"),
    "shards out of order": (lambda f: edit(f, shards=json.loads((f / "config.json").read_text())["shards"][::-1]), r"config.json: shards\[0\]"),
    "last shard not named": (lambda f: edit(f, shards=json.loads((f / "config.json").read_text())["shards"][:-1]), "config.json: num_tokens is 30, but the folder has 18"),
    "shards as an object": (lambda f: edit(f, shards={}), "config.json: shards is {}; it must be a list"),
    "a shard of null": (lambda f: edit(f, shards=[None]), r"config.json: shards\[0\] is None"),
    "nbytes": (lambda f: edit_shard(f, 0, nbytes=1), S0 + ".*nbytes in config.json is 1"),
    "nbytes as a float": (lambda f: edit_shard(f, 0, nbytes=float((f / S0).stat().st_size)), S0 + ".*nbytes"),
    "sha256 as a number": (lambda f: edit_shard(f, 0, sha256=7), S0 + ": sha256 in config.json is 7"),
    "num_samples": (lambda f: edit(f, num_samples=5), "config.json: num_samples is 5, but the folder has 4"),
    "num_steps": (lambda f: edit(f, num_steps=0), "config.json: num_steps is 0"),
    "num_tokens": (lambda f: edit(f, num_tokens=31), "config.json: num_tokens is 31"),
    "num_tokens true": (lambda f: edit(f, num_tokens=True), "config.json: num_tokens is True"),
    "stage": (lambda f: edit(f, stage=["resid_post"]), "config.json: stage is"),
    "later version": (lambda f: edit(f, schema="tracebook/representations/2"), "config.json: schema is"),
    "index of another folder": (lambda f: (f / "index.json").write_text((f / "index.json").read_text() + " "), "index.json: its sha256"),
    "config NaN": (lambda f: raw_config(f, lambda t: t.replace('"layer": 7', '"layer": NaN')), "config.json: NaN"),
    "config Infinity": (lambda f: raw_config(f, lambda t: t.replace('"layer": 7', '"layer": -Infinity')), "config.json: -Infinity"),
    "config 1e999": (lambda f: raw_config(f, lambda t: t.replace('"layer": 7', '"layer": 1e999')), "config.json: 1e999"),
    "config key twice": (lambda f: raw_config(f, lambda t: '{"complete": true,' + t[1:]), "config.json: key 'complete' appears twice"),
    "config bomb": (lambda f: raw_config(f, lambda t: '{"a":' * 100_000 + "1" + "}" * 100_000), "config.json: the JSON is nested deeper"),
    "config half closed": (lambda f: raw_config(f, lambda t: "[" * 100_000), "config.json: the JSON is nested deeper"),
    "config with digits": (lambda f: raw_config(f, lambda t: t.replace('"layer": 7', '"layer": ' + "7" * 5000)), "config.json: "),
    "config a list": (lambda f: raw_config(f, lambda t: "[]"), "config.json: the JSON is"),
    "config empty": (lambda f: raw_config(f, lambda t: ""), "config.json: "),
    "config no UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json: "),
    "config UTF-16": (lambda f: (f / "config.json").write_bytes((f / "config.json").read_text().encode("utf-16")), "config.json: "),
    "sample beyond the end": (lambda f: edit_sample(f, lambda s: s[3].update(num_tokens=12)), r"index.json: samples\[3\]"),
    "samples overlap": (lambda f: edit_sample(f, lambda s: s[0].update(num_tokens=8)), r"index.json: samples\[0\]"),
    "sample offset": (lambda f: edit_sample(f, lambda s: s[3].update(global_offset=20)), r"index.json: samples\[3\]"),
    "negative sample offset": (lambda f: edit_sample(f, lambda s: s[0].update(global_offset=-1)), r"index.json: samples\[0\].global_offset is -1"),
    "sample offset true": (lambda f: edit_sample(f, lambda s: s[0].update(global_offset=False)), r"index.json: samples\[0\].global_offset is False"),
    "sample offset float": (lambda f: edit_sample(f, lambda s: s[2].update(global_offset=7.0)), r"index.json: samples\[2\].global_offset is 7.0"),
    "sample offset huge": (lambda f: edit_sample(f, lambda s: s[3].update(global_offset=2 ** 63)), r"index.json: samples\[3\].global_offset"),
    "one sample without size": (lambda f: edit_sample(f, lambda s: s[2].pop("num_tokens")), r"index.json: samples\[2\].num_tokens is missing"),
    "sample without offset": (lambda f: edit_sample(f, lambda s: s[2].pop("global_offset")), r"index.json: samples\[2\].global_offset is missing"),
    "sample without steps": (lambda f: edit_sample(f, lambda s: s[2].pop("steps")), r"index.json: samples\[2\].steps is missing"),
    "sample of null": (lambda f: edit_sample(f, lambda s: s.append(None)), r"index.json: samples\[4\] is None"),
    "step beyond its sample": (lambda f: edit_sample(f, lambda s: s[2]["steps"].append(dict(token_start=3, token_end=13))), r"index.json: samples\[2\].steps\[\d\] has the tokens \[3, 13\)"),
    "step backwards": (lambda f: edit_sample(f, lambda s: s[2]["steps"].append(dict(token_start=3, token_end=2))), r"index.json: samples\[2\].steps\[\d\] has the tokens \[3, 2\)"),
    "negative step": (lambda f: edit_sample(f, lambda s: s[2]["steps"].append(dict(token_start=-3, token_end=2))), r"index.json: samples\[2\].steps\[\d\].token_start is -3"),
    "step true": (lambda f: edit_sample(f, lambda s: s[2]["steps"].append(dict(token_start=0, token_end=True))), r"token_end is True"),
    "step float": (lambda f: edit_sample(f, lambda s: s[2]["steps"].append(dict(token_start=0., token_end=2))), r"token_start is 0.0"),
    "step of null": (lambda f: edit_sample(f, lambda s: s[2]["steps"].append(None)), r"index.json: samples\[2\].steps\[\d\] is None"),
    "category of lists": (lambda f: edit_sample(f, lambda s: s[2]["steps"].append(dict(token_start=0, token_end=2, category=[1]))), r"category is \[1\]"),
}

@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders(tmp_path, name):
    folder = tmp_path / "folder"
    standard(folder)
    assert HiddenStates(folder).num_tokens == 30
    damage, says = HOSTILE[name]
    damage(folder)
    for partial in (False, True)[:1 if name == "absent" else 2]:
        with pytest.raises((ValueError, OSError), match=says) as e: HiddenStates(folder, partial=partial)
        assert len(str(e.value)) < 700 and "\x1b" not in str(e.value)
    report = verify_folder(folder)
    assert not report.ok and "\x1b" not in str(report) and report.checks[0].problems

def test_links_inside_the_folder_are_followed(tmp_path):
    matrix, _ = standard(tmp_path)
    (tmp_path / S0).rename(tmp_path / "blob")
    (tmp_path / S0).symlink_to("blob")
    (tmp_path.parent / "alias").symlink_to(tmp_path)
    assert same(HiddenStates(tmp_path.parent / "alias").read(0, 30), matrix)

def test_no_folder(tmp_path):
    for path in (tmp_path / "none", tmp_path / "a\x1b[2J", __file__):
        with pytest.raises(FileNotFoundError, match="there is no folder") as e: HiddenStates(path)
        assert "\x1b" not in str(e.value)

def test_limits_of_size(tmp_path):
    standard(tmp_path)
    with pytest.raises(ValueError, match="index.json: .* more than max_json=800"):
        edit(tmp_path, shards=json.loads((tmp_path / "config.json").read_text())["shards"][:1], num_tokens=5)
        HiddenStates(tmp_path, max_json=800)
    with pytest.raises(ValueError, match="config.json: .* more than max_json=10"): HiddenStates(tmp_path, max_json=10)

def test_a_sparse_giant_costs_nothing(tmp_path):
    "A file of a terabyte with a header of 90 MB of zeros: refused by what it says, without reading it."
    standard(tmp_path)
    with (tmp_path / S0).open("r+b") as f:
        f.write(struct.pack("<Q", 10 ** 11))
        f.truncate(2 * 10 ** 11)
    edit_shard(tmp_path, 0, nbytes=2 * 10 ** 11)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=S0 + ": a header of 100,000,000,000"): HiddenStates(tmp_path)
    os.truncate(tmp_path / "index.json", 10 ** 12)
    with pytest.raises(ValueError, match=S0): HiddenStates(tmp_path)
    assert time.perf_counter() - start < 5

def test_strings_with_brackets_are_no_nesting(tmp_path):
    matrix, _ = standard(tmp_path, note="[" * 1000 + '"{\\' * 50)
    assert same(HiddenStates(tmp_path).read(0, 30), matrix)

def test_quotes_in_linear_time(tmp_path):
    standard(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": "' + b'\\"' * 2_000_000)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="config.json: "): HiddenStates(tmp_path)
    assert time.perf_counter() - start < 5

def test_labels_and_names_are_shown_as_text(tmp_path):
    evil = '<script>x</script>\x1b[2J" onload="x'
    standard(tmp_path, model=evil, stage=evil)
    edit_sample(tmp_path, lambda s: s[2]["steps"].append(dict(token_start=0, token_end=1, category=evil, macro=evil)))
    hs = HiddenStates(tmp_path)
    shown = repr(hs) + hs._repr_html_() + str(verify_folder(tmp_path))
    assert "\x1b" not in shown and "<script" not in hs._repr_html_() and hs.stage == evil and len(next(iter(hs.rows(evil)))[0]) == 1
    with pytest.raises(ValueError) as e: hs.rows("none")
    assert "\x1b" not in str(e.value)


# ---- fuzzing
VALUES = [-1, 0, 1, 2, 5, 29, 30, 31, 2 ** 31, 2 ** 63, 2 ** 64, 10 ** 30, 4300 * "9", True, False, None, 1.0, 5.0, 1e300, -0.0, "", "x", "5", [], {}, [[]], [None], {"a": 1}, "../x.safetensors", "index.json", "\0", "\ud800",
    "bfloat16", "float16", shard_name(0), shard_name(1), shard_name(9), "a" * 300]

def places(x, out):
    "All (container, key) of a JSON value, without recursion."
    stack = [x]
    while stack:
        for key, v in (lambda c: list(c.items()) if isinstance(c, dict) else list(enumerate(c)))(c := stack.pop()):
            out.append((c, key))
            if isinstance(v, (dict, list)): stack.append(v)
    return out

def damage_json(rng, text):
    "One change of the structure."
    try: x = json.loads(text.decode())
    except ValueError: return text # damaged already
    if not (isinstance(x, (dict, list)) and (found := places(x, []))): return b"{}"
    c, key = rng.choice(found)
    kind = rng.randrange(7)
    if kind < 3: c[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 3: del c[key]
    elif kind == 4: d, other = rng.choice(found); c[key], d[other] = copy.deepcopy(d[other]), copy.deepcopy(c[key])
    elif kind == 5 and isinstance(c, list): c.insert(rng.randrange(len(c) + 1), copy.deepcopy(c[key]))
    elif kind == 5: c[rng.choice(["x", "num_tokens", "steps", "dtype"])] = copy.deepcopy(c[key])
    elif isinstance(v := c[key], int) and not isinstance(v, bool): c[key] = v + rng.choice([-1, 1, 2, -5, 100])
    return json.dumps(x).encode()

def damage_bytes(rng, data):
    "One change of the bytes."
    if not data: return b"\0"
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    some = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
    i0 = min(i, len(data) - 1)
    return rng.choice([lambda: data[:i0] + bytes([data[i0] ^ 1 << rng.randrange(8)]) + data[i0 + 1:], lambda: data[:i0] + bytes([rng.randrange(256)]) + data[i0 + 1:], lambda: data[:i], lambda: data[:i] + data[j:],
        lambda: data[:i] + some + data[i:], lambda: data[:j] + data[i:j] + data[j:], lambda: data + some, lambda: data[:i] + rng.choice([b"NaN", b"1e999", b"-1", b"true", b"[[[[", b'"', b"\\", b"\0"]) + data[j:],
        lambda: struct.pack("<Q", rng.choice([0, 1, 7, 8, len(data), len(data) - 8, 2 ** 31, 2 ** 63, 10 ** 8])) + data[8:], lambda: b"\0" * len(data)])()

def gentle(rng, files):
    "One change that a reader may well take: of numbers in a shard, of the borders of a step or sample, of a label, of a key that nobody needs."
    name = rng.choice(sorted(files))
    if name.endswith(".safetensors") and len(files[name]) > 100:
        i = len(files[name]) - 1 - rng.randrange(8)
        files[name] = files[name][:i] + bytes([rng.randrange(256)]) + files[name][i + 1:]
        return
    x = json.loads(files["index.json"])
    s = rng.choice(x["samples"])
    target = rng.choice([s, *s["steps"]])
    key = rng.choice(sorted(k for k in target if k != "steps"))
    if isinstance(target[key], int) and key != "id": target[key] += rng.choice([-1, 1])
    elif rng.random() < .5: target[key] = rng.choice(["x", None, 3, "\ud800", "<b>"])
    else: del target[key]
    files["index.json"] = json.dumps(x, indent=rng.choice([None, 3])).encode()

def damage(rng, files, folder):
    "One change: of bytes, of structure, or of which files there are."
    name, kind = rng.choice(sorted(files)), rng.random()
    if kind < .45 and name.endswith(".json"): files[name] = damage_json(rng, files[name]) if rng.random() < .8 else damage_bytes(rng, files[name])
    elif kind < .85: files[name] = damage_bytes(rng, files[name])
    elif kind < .9: files.pop(name)
    elif kind < .95: files[name] = files[rng.choice(sorted(files))]
    else: files[name] = rng.choice(["folder", "link out", "link in", "pipe", "link to itself"])

def put(folder, files, old):
    "Write a folder anew; what is not bytes is something else than a file."
    for p in list(folder.iterdir()):
        if p.name in files and files[p.name] is old.get(p.name): continue
        p.rmdir() if p.is_dir() and not p.is_symlink() else p.unlink()
    for name, data in files.items():
        path = folder / name
        if isinstance(data, bytes):
            if not path.exists(): path.write_bytes(data)
        elif data == "folder": path.mkdir()
        elif data == "pipe": os.mkfifo(path)
        else: path.symlink_to({"link out": "/etc/passwd", "link in": "index.json", "link to itself": name}[data])

def whole(hs):
    "Everything that a reader can be asked for."
    rows = [hs.read(0, hs.num_tokens), *hs, *(hs.step(i, j) for i, s in enumerate(hs.samples) for j in range(len(s["steps"])))]
    return rows + [torch.cat([torch.zeros(0, hs.hidden_dim or 0), *(b.float() for b, _ in hs.rows(pooling=p, block_rows=7))]) for p in ("all", "mean", "first", "last")] + [hs.readable, repr(hs), hs._repr_html_(), hs.missing]

def raw_rows(folder, config, width):
    "The rows of a folder by plain reading: the last bytes of each file, one after the other."
    return b"".join((folder / s["file"]).read_bytes()[-n:] if (n := (s["token_end"] - s["token_start"]) * width) else b"" for s in config["shards"])

def fuzz(tmp_path, cases, seed):
    "Either the same rows as before, or an error of ours; how many of each."
    folder, counts = tmp_path / "f", dict(same=0, refused=0, other=0)
    matrix, samples = standard(folder)
    good = {p.name: p.read_bytes() for p in folder.iterdir()}
    ours, was = whole(HiddenStates(folder)), good
    for case in range(cases):
        rng, files = random.Random(seed * 1_000_003 + case), dict(good)
        hashed = rng.random() < .5 # one damage under hashes, or several without
        if not hashed:
            config = json.loads(good["config.json"])
            for c in (config, *config["shards"]):
                for key in rng.sample(sorted(c), rng.randrange(len(c))) if c is config else ["sha256", "nbytes"]:
                    if key != "shards": c.pop(key, None)
            config.pop("index_sha256", None)
            files["config.json"] = json.dumps(config).encode()
        for _ in range(0 if hashed else rng.randint(0, 3)): gentle(rng, files)
        for _ in range(1 if hashed else rng.choice([0, 0, 1, 2])):
            if all(isinstance(v, bytes) for v in files.values()): damage(rng, files, folder)
        put(folder, files, was)
        was, partial = files, rng.random() < .3
        if case % 5 == 0: str(verify_folder(folder, partial)) # never raises
        try:
            hs = HiddenStates(folder, partial=partial, verify="sha256" if hashed else "size")
            got = whole(hs)
        except (ValueError, OSError) as e:
            if "UnicodeEncodeError" in type(e).__name__ or not any(n in str(e) for n in (".json", ".safetensors", "shards differ")): raise AssertionError(f"case {case} of seed {seed}: {e!r}") from e
            counts["refused"] += 1
            continue
        except BaseException as e: raise AssertionError(f"case {case} of seed {seed}: {e!r}") from e
        index = json.loads(files["index.json"])["samples"]
        want = [(s["global_offset"] + x["token_start"], s["global_offset"] + x["token_end"]) for s in index for x in s["steps"]]
        assert len(hs) == len(index) and [len(r) for r in got[1 + len(index):-8]] == [b - a for a, b in want], f"case {case} of seed {seed}"
        assert got[0].view(torch.uint8).numpy().tobytes() == raw_rows(folder, hs.config, got[0].element_size() * hs.hidden_dim), f"case {case} of seed {seed}"
        assert all(torch.equal(r.view(torch.uint8), got[0][a:b].contiguous().view(torch.uint8)) for r, (a, b) in zip(got[1 + len(index):-8], want)), f"case {case} of seed {seed}"
        equal = len(got) == len(ours) and all(same(a, b) for a, b in zip(got[:-8], ours[:-8]))
        assert equal or not hashed, f"case {case} of seed {seed}: other rows under hashes"
        counts["same" if equal else "other"] += 1
    return counts

def test_fuzz(tmp_path):
    counts = fuzz(tmp_path, 400, 1)
    assert min(counts.values()) > 20, counts

@pytest.mark.slow
def test_fuzz_long(tmp_path):
    counts = fuzz(tmp_path, 10_000, 2)
    print(counts)
    assert min(counts.values()) > 500, counts


# ---- verify
def test_verify_finds_each_damage(tmp_path):
    matrix, _ = standard(tmp_path)
    ticks = []
    found = HiddenStates(tmp_path).verify(lambda done, total: ticks.append((done, total)))
    assert found.ok and found.hashed == 5 and ticks[-1][0] == ticks[-1][1] == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    for k in range(5):
        data = bytearray((tmp_path / shard_name(k)).read_bytes())
        if k == 1: continue # no rows
        data[-1] ^= 1
        (tmp_path / shard_name(k)).write_bytes(data)
    problems = verify_folder(tmp_path).checks[0].problems
    assert [p.split(":")[0] for p in problems] == [shard_name(k) for k in (0, 2, 3, 4)]
    with pytest.raises(ValueError, match=shard_name(4)): HiddenStates(tmp_path).verify()
    with pytest.raises(ValueError, match=shard_name(0)): HiddenStates(tmp_path, verify="sha256")

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_verify_finds_what_is_not_finite(tmp_path, value, dtype):
    matrix = torch.randn(30, 4).to(dtype)
    matrix[[13, 14, 29], 2] = value
    write(tmp_path, matrix, [10, 30], layout(random.Random(1), [7, 0, 12, 11]))
    report = verify_folder(tmp_path)
    assert report.checks[0].non_finite == 3 and "3 rows are not finite; the first is row 13, sample 2, token 6" in str(report)

def test_journal(tmp_path):
    standard(tmp_path)
    shards = json.loads((tmp_path / "config.json").read_text())["shards"]
    journal = tmp_path / "journal.jsonl"
    lines = ['{"fingerprint": "x"}', *map(json.dumps, shards)]
    for text, n in [("\n".join(lines) + "\n", 5), ("\n".join(lines), 5), ("\n".join(lines[:3]) + '\n{"file', 2), ("", 0), ("\n".join([json.dumps(shards[0] | dict(sha256="0")), *lines]), 5)]:
        journal.write_text(text)
        assert HiddenStates(tmp_path).verify().journalled == n
    for bad in [json.dumps(shards[0] | dict(token_end=6)), json.dumps(shards[2] | dict(sha256="0" * 64)), '{"file": "x", "file": "y"}', "{", '{"x": NaN}', "[" * 10_000, "[]"]:
        journal.write_text(bad + "\n" + "\n".join(lines[2:3]) + "\n")
        with pytest.raises(ValueError, match="journal.jsonl"): HiddenStates(tmp_path).verify()
        assert HiddenStates(tmp_path).num_tokens == 30
    for k in (0, 1): (tmp_path / f"journal.rank0000{k}-of-00002.jsonl").write_text("\n".join(lines[1 + 2 * k:3 + 2 * k]) + "\n")
    journal.write_text("")
    assert HiddenStates(tmp_path).verify().journalled == 4
    journal.unlink(); journal.symlink_to("/etc/passwd")
    assert "journal.jsonl: leads out" in str(verify_folder(tmp_path))

def test_layers(tmp_path):
    matrix = torch.randn(30, 4)
    for k in (0, 2, 10): write(tmp_path / f"layer_{k}", matrix + k, [30], layout(random.Random(1), [7, 0, 12, 11]), layer=k)
    write(tmp_path / "embeddings", matrix, [30], layout(random.Random(1), [7, 0, 12, 11]))
    layers = HiddenStates.open_layers(tmp_path, verify="sha256")
    assert list(layers) == [0, 2, 10, "embeddings"] and all(same(hs.read(0, 30), matrix + (k if type(k) is int else 0)) for k, hs in layers.items())
    assert verify_folder(tmp_path).ok and len(verify_folder(tmp_path).checks) == 4
    assert list(HiddenStates.open_layers(tmp_path / "layer_10")) == [10] and list(HiddenStates.open_layers(tmp_path / "embeddings")) == [7]
    edit(tmp_path / "embeddings", layer={}, stage="embeddings")
    assert list(HiddenStates.open_layers(tmp_path / "embeddings")) == ["embeddings"]
    write(tmp_path / "layer_2", matrix, [30], layout(random.Random(2), [8, 0, 11, 11]))
    with pytest.raises(ValueError, match="layer_2: its samples are not those of layer_0"): HiddenStates.open_layers(tmp_path)
    assert not verify_folder(tmp_path).ok and "layer_2" in str(verify_folder(tmp_path))
    (tmp_path / "x").mkdir(); (tmp_path / "x" / "layer_1").symlink_to(tmp_path / "layer_0")
    with pytest.raises(ValueError, match="layer_1: leads out"): HiddenStates.open_layers(tmp_path / "x")
    assert not verify_folder(tmp_path / "x").ok


# ---- fetching
class Hub(BaseHTTPRequestHandler):
    "A hub of one data set, which breaks off and refuses where it is told to."
    protocol_version, files, log, drops, refuse = "HTTP/1.1", {}, [], {}, {}

    def log_message(self, *args): pass
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)

    def send(self, data, status=200, **headers):
        self.send_response(status)
        for k, v in (headers | {"Content-Length": len(data)}).items(): self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        return data

    def answer(self, body):
        where = self.headers.get("Range")
        self.log.append((self.command, self.path, where))
        if "/api/datasets/" in self.path:
            listed = [dict(type="file", path=n, size=len(d), oid=hashlib.sha1(d).hexdigest()) for n, d in self.files.items()]
            said = listed if "/tree/" in self.path else dict(id="a/b", sha="1" * 40, siblings=[dict(rfilename=n) for n in self.files], private=False, gated=False, disabled=False, tags=[], downloads=0, likes=0)
            return self.wfile.write(self.send(json.dumps(said).encode(), Content_Type="application/json"))
        name = self.path.split("/resolve/", 1)[-1].split("/", 1)[-1].split("?")[0]
        if refused := self.refuse.get(name): self.refuse[name] -= 1
        if name not in self.files or refused: return self.wfile.write(self.send(b"", 404, X_Error_Code="EntryNotFound"))
        data, start = self.files[name], int(where.split("=")[1].split("-")[0]) if where else 0
        more = dict(Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}") if where else {}
        rest = self.send(data[start:], 206 if where else 200, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit="1" * 40, Accept_Ranges="bytes", **more)
        if not body: return
        if self.drops.get(name):
            self.drops[name] -= 1
            self.wfile.write(rest[:len(rest) // 2])
            self.close_connection = True
        else: self.wfile.write(rest)

@contextmanager
def hub(files):
    "Serve files at an address of this machine until the block ends."
    handler = type("OneHub", (Hub,), dict(files=files, log=[], drops={}, refuse={}))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(.05,), daemon=True)
    thread.start()
    try: yield handler, f"http://127.0.0.1:{server.server_port}"
    finally: server.shutdown(); server.server_close(); thread.join(5)

CHILD = """
import json, sys
import huggingface_hub.constants as c
c.DOWNLOAD_CHUNK_SIZE = 1 << 12 # a break in a small file then leaves a beginning to go on from
from tracebook.extract import fetch_artefacts
out = []
for args, kwargs in json.loads(sys.argv[1]):
    try: out.append({k: str(v) for k, v in fetch_artefacts(*args, max_workers=1, **kwargs).items()})
    except Exception as e: out.append(f"{type(e).__name__}: {e}")
print("\\n" + json.dumps(out))
"""

def fetch(endpoint, tmp_path, *calls):
    "Calls of `fetch_artefacts` in a process that knows this hub only."
    env = os.environ | dict(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="127.0.0.1", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(calls)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])

def below(folder): return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file() and ".cache" not in p.parts)

@pytest.fixture
def published(tmp_path):
    "A small tree as it is published, with files that nobody should want."
    source, files = tmp_path / "source", {}
    rng, matrix = random.Random(5), torch.randn(3000, 16).bfloat16()
    for model in ("qwen3-4b-thinking-2507", "olmo-3-7b-think"):
        write(source / model, matrix, [1000, 2500, 3000], layout(rng, [1500, 1500]), bare=True)
        files |= {f"annotated_traces_reprs/{model}/{p.name}": p.read_bytes() for p in (source / model).iterdir()}
        files |= {f"annotated_traces_reprs/{model}/extraction_1.log": b"x", f"annotated_traces_reprs/{model}/weights.pkl": b"x", f"annotated_traces_reprs/{model}/sub/config.json": b"{}"}
        files |= {f"spectral_metrics/{model}/pool_{p}/basic_metrics.json": b"{}" for p in ("all", "mean")}
    return matrix, files | {"README.md": b"x", "annotated_traces_reprs/../../evil/config.json": b"{}", "spectral_metrics/../pool_all/evil.json": b"{}", "/etc/config.json": b"{}"}

def test_fetch(tmp_path, published):
    matrix, files = published
    model, shard = "qwen3-4b-thinking-2507", f"annotated_traces_reprs/qwen3-4b-thinking-2507/{shard_name(1)}"
    a, b, c, d = (str(tmp_path / x) for x in "abcd")
    with hub(files) as (server, endpoint):
        server.drops[shard] = 2
        got = fetch(endpoint, tmp_path, [["Qwen/Qwen3-4B-Thinking-2507"], dict(local_dir=a)], [[model, "states", b], {}], [[[model, "olmo-3-7b-think"]], dict(local_dir=c)],
            [[None, "states", d], dict(shards=1)], [["gpt2"], {}], [["olmo-3-7b-think-dpo"], dict(local_dir=a)], [[model, "logs"], dict(local_dir=a)], [["me/Qwen3-4B-thinking-2507"], dict(local_dir=a, repo_id="me/mine")])
        log = list(server.log)
    assert got[0] == {model: f"{a}/spectral_metrics/{model}"} == got[7] and below(a) == [f"spectral_metrics/{model}/pool_{p}/basic_metrics.json" for p in ("all", "mean")]
    assert got[1] == {model: f"{b}/annotated_traces_reprs/{model}"} and below(got[1][model]) == ["config.json", *(shard_name(k) for k in range(3)), "index.json"]
    assert same(HiddenStates(got[1][model]).read(0, 3000), matrix)
    ranges = [where for what, path, where in log if what == "GET" and path.endswith(shard)]
    assert ranges[0] is None and len(ranges) == 3 and all(r and int(r.split("=")[1][:-1]) > 10_000 for r in ranges[1:]), ranges # went on in the middle
    assert sorted(got[2]) == ["olmo-3-7b-think", model] and len(below(c)) == 4
    assert sorted(got[3]) == ["olmo-3-7b-think", model] and len(below(d)) == 6 and HiddenStates(got[3][model], partial=True).absent == (shard_name(1), shard_name(2))
    assert "ValueError: model 'gpt2' is not among the published ones" in got[4] and all(n in got[4] for n in PUBLISHED_MODELS)
    assert "has no metrics of olmo-3-7b-think-dpo" in got[5] and "choose states or metrics" in got[6]
    assert not any("evil" in path or "pkl" in path or "README" in path or "/sub/" in path for _, path, _ in log) and not list(tmp_path.rglob("evil*"))

def test_fetch_goes_on(tmp_path, published):
    matrix, files = published
    model, last, call = "olmo-3-7b-think", f"annotated_traces_reprs/olmo-3-7b-think/{shard_name(2)}", [["olmo-3-7b-think", "states", str(tmp_path / "a")], {}]
    with hub(files) as (server, endpoint):
        server.refuse[last] = 1
        first, second, third = fetch(endpoint, tmp_path, call, call, call)
        starts = [i for i, (_, path, _) in enumerate(server.log) if "/api/datasets/" in path and "/tree/" not in path and "/revision/" not in path]
        got = [{path.rsplit("/", 1)[-1] for what, path, _ in server.log[a:b] if what == "GET" and "/resolve/" in path} for a, b in zip(starts, [*starts[1:], None])]
    assert isinstance(first, str) and second == third and len(got) == 3 and set.union(*got) == {"config.json", "index.json", *(shard_name(k) for k in range(3))}
    assert shard_name(2) not in got[0] and shard_name(2) in got[1] and shard_name(0) not in got[1] and not got[2] # each file once, and only what was lacking
    assert same(HiddenStates(second[model]).read(0, 3000), matrix)

def test_a_part_that_is_none_is_refused_before_the_network_is_asked(tmp_path):
    with hub({}) as (server, endpoint):
        got = fetch(endpoint, tmp_path, [["olmo-3-7b-think", "logs", str(tmp_path / "a")], {}], [["gpt2", "logs", str(tmp_path / "a")], {}])
        assert all("choose states or metrics" in x for x in got) and not server.log
