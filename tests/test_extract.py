"Writing hidden states: what is in the files, whose tokens they are, and what is left after a crash."
import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import (AutoModelForCausalLM, Gemma2Config, GemmaConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, Olmo3Config, OPTConfig, PhiConfig,
    Qwen3Config, T5Config, T5ForConditionalGeneration)

from tracebook import extract
from tracebook.extract import PUBLISHED_MODELS, BadStates, HiddenStates, Manifest, extract_hidden_states, merge_extractions
from tracebook.sources import UnreadableRows, sample_traces
from tracebook.tokens import make_tokenizer, tokenize_trace
from tracebook.toy import load_toy, toy_traces

TEXTS = sample_traces()["response"][:]
TOK = make_tokenizer(TEXTS, 400, "a test tokenizer")
TOK.chat_template = "{% for m in messages %}Q: {{ m['content'] | trim }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
SHAPE = dict(vocab_size=len(TOK), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None, initializer_range=.1, max_position_embeddings=512)
GPT = dict(vocab_size=len(TOK), n_embd=32, n_layer=3, n_head=4, n_positions=512, bos_token_id=None, eos_token_id=None)
KINDS = dict(llama=(LlamaConfig, SHAPE), qwen3=(Qwen3Config, SHAPE | dict(head_dim=8)), gemma=(GemmaConfig, SHAPE | dict(head_dim=8)), olmo3=(Olmo3Config, SHAPE | dict(sliding_window=16, layer_types=["sliding_attention", "sliding_attention", "full_attention"])), phi=(PhiConfig, SHAPE))
OTHERS = dict(gpt2=(GPT2Config, GPT), neox=(GPTNeoXConfig, SHAPE), opt=(OPTConfig, SHAPE | dict(ffn_dim=48, word_embed_proj_dim=32)), gemma2=(Gemma2Config, SHAPE | dict(head_dim=8, sliding_window=16)), mistral=(MistralConfig, SHAPE | dict(sliding_window=16)))
QUIET = dict(progress=False)


def make(kind, **more):
    "A random model."
    config, shape = (KINDS | OTHERS)[kind]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**shape | more)).eval()


def some_rows(n=9, seed=0, most=400):
    "Rows of uneven length, some with steps of their own."
    r, out = random.Random(seed), []
    for i in range(n):
        text = TEXTS[r.randrange(len(TEXTS))][:r.randrange(5, most)]
        row = dict(id=f"r{i}", problem=f"  What is {i} + {i}? ", response=text)
        if i % 2:
            cuts = sorted(r.sample(range(len(text) + 1), min(6, len(text))))
            row["steps"] = [dict(start=a, end=b, category=r.choice(["plan", "carry out"]), macro="work") for a, b in zip(cuts[::2], cuts[1::2])]
        out.append(row)
    return out


ROWS = some_rows()


@pytest.fixture(scope="module")
def llama(): return make("llama")


def run(model, rows, folder, **more): return extract_hidden_states(model, rows, folder, **dict(dict(tokenizer=TOK, **QUIET), **more))
def read(folder, name): return json.loads((Path(folder)/f"{name}.json").read_text(encoding="utf-8"))
def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.suffix != ".log"}
def matrix(folder):
    "All rows, the shards one after the other as the card says."
    shards = read(folder, "config")["shards"]
    parts = [load_file(Path(folder)/s["file"])["hidden_states"] for s in shards]
    assert [len(p) for p in parts] == [s["token_end"] - s["token_start"] for s in shards]
    return torch.cat(parts) if parts else torch.zeros(0, read(folder, "config")["hidden_dim"])


def fed(row, chat=True):
    "Prompt and response in tokens, the plain way."
    prompt = f"Q: {row['problem'].strip()}\nA:" if chat and row.get("problem") else ""
    return [TOK.encode(x, add_special_tokens=False) if x else [] for x in (prompt, row["response"])]


@torch.no_grad()
def alone(model, prompt, response):
    "(hidden states by transformers, the last one before the norm; after the norm) of the response, one trace by itself."
    out = []
    for tied in (False, True):
        model.config.tie_last_hidden_states = tied
        out.append(model(torch.tensor([prompt + response]), output_hidden_states=True, use_cache=False).hidden_states)
    model.config.tie_last_hidden_states = True
    return [h[0, len(prompt):] for h in out[0]], out[1][-1][0, len(prompt):]


def expected(model, rows, chat=True):
    pairs = [alone(model, *fed(r, chat)) for r in rows]
    return [torch.cat(x) for x in zip(*(p[0] for p in pairs))], torch.cat([p[1] for p in pairs])


def close(a, b, tol=1e-5): return float((a - b).abs().max()) <= tol * max(1, float(b.abs().max()))


# what is stored

@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_transformers(tmp_path, kind):
    "Every layer: bit for bit where a sample is alone, within 1e-5 packed and in rectangles."
    model, rows = make(kind), some_rows(6, 1, 300)
    every, final = expected(model, rows)
    ways = dict(alone=dict(max_tokens_per_batch=1), bucketed=dict(max_tokens_per_batch=600, packing=False), packed=dict(max_tokens_per_batch=600, packing=True))
    for way, more in ways.items():
        same = torch.equal if way == "alone" else close
        done = run(model, rows, tmp_path/way, layers=["embeddings", "all"], dtype="float32", **more)
        assert [f.name for f in done.folders] == ["embeddings", "layer_0", "layer_1", "layer_2"]
        for folder, states in zip(done.folders, every): assert same(matrix(folder), states), (way, folder.name)
        done = run(model, rows, tmp_path/f"{way} normed", stage="final_norm", dtype="float32", **more)
        assert same(matrix(done.folder), final)
        config = read(done.folder, "config")
        assert (config["stage"], config["layer"], config["hf_index"]) == ("final_norm", 2, 3)
        assert config["extraction"]["packing"] == ("packed" if way == "packed" else "bucketed") and config["extraction"]["parity"]["ok"]
    described = [read(f, "config") for f in run(model, rows, tmp_path/"alone", layers=["embeddings", "all"], dtype="float32", max_tokens_per_batch=1).folders]
    assert [(c["layer"], c["stage"], c["hf_index"]) for c in described] == [(None, "embeddings", 0), (0, "resid_post", 1), (1, "resid_post", 2), (2, "resid_post", None)]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders(tmp_path, kind):
    model, rows = make(kind), some_rows(4, 2, 200)
    every, final = expected(model, rows)
    for stage, states in (("resid_post", every[-1]), ("final_norm", final), ("embeddings", every[0])):
        if kind == "opt" and stage == "resid_post": states = torch.cat([opt_last(model, r) for r in rows])  # its norm is inside of what transformers records
        assert close(matrix(run(model, rows, tmp_path/stage, stage=stage, dtype="float32").folder), states), stage


@torch.no_grad()
def opt_last(model, row):
    prompt, response = fed(row)
    seen = []
    hook = model.model.decoder.layers[-1].register_forward_hook(lambda m, a, o: seen.append(o if isinstance(o, torch.Tensor) else o[0]))
    model(torch.tensor([prompt + response]), use_cache=False)
    hook.remove()
    return seen[0][0, len(prompt):]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_files(tmp_path, llama, dtype):
    "The bytes are those that safetensors itself would write; the dtype is one of storage only."
    done = run(llama, ROWS, tmp_path, dtype=dtype, shard_size=3000)
    config = read(tmp_path, "config")
    assert config["dtype"] == dtype and config["extraction"]["compute_dtype"] == "float32" and config["complete"] is True
    assert close(matrix(tmp_path).float(), expected(llama, ROWS)[0][-1].to(getattr(torch, dtype)).float(), .01 if dtype != "float32" else 1e-5)
    for s in config["shards"]:
        data = (tmp_path/s["file"]).read_bytes()
        with safe_open(tmp_path/s["file"], "pt") as file: assert list(file.keys()) == ["hidden_states"]
        assert data == save(load_file(tmp_path/s["file"]))
        assert (s["nbytes"], s["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (done.num_samples, done.num_tokens, done.hidden_dim, done.shards) == (len(ROWS), config["num_tokens"], 32, len(config["shards"]))


def test_the_head_is_never_called(tmp_path, llama):
    def never(*args): raise AssertionError("the head was called")
    hook = llama.lm_head.register_forward_pre_hook(never)
    run(llama, ROWS, tmp_path)
    hook.remove()


def test_the_model_is_as_it_was(tmp_path):
    model = make("llama").train()
    layers, norm = model.model.layers, model.model.norm
    run(model, ROWS, tmp_path/"a", layers=0, attn_implementation="eager")
    assert model.training and model.model.layers is layers and model.model.norm is norm and len(layers) == 3 and model.config._attn_implementation == "sdpa"
    assert read(tmp_path/"a", "config")["extraction"]["attn"] == "eager"
    model.model.layers[1].forward = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError): run(model, ROWS, tmp_path/"b", packing=False)
    assert model.training and not [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()) if "tracebook" in h.__module__]  # transformers leaves some of its own


def test_blocks_that_are_not_needed_are_not_computed(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(extract, "_choose_packing", lambda *args: (False, False, dict(ok=True)))
    calls = []
    hook = llama.model.layers[2].register_forward_pre_hook(lambda *args: calls.append(1))
    run(llama, ROWS, tmp_path/"a", layers=[0, 1])
    assert not calls
    run(llama, ROWS, tmp_path/"b", layers=[-1])
    assert calls
    hook.remove()


# tokens and steps

def test_index(tmp_path, llama):
    run(llama, ROWS, tmp_path, dtype="float32", shard_size="10kB")
    config, index = read(tmp_path, "config"), read(tmp_path, "index")
    at = steps = 0
    for i, (row, s) in enumerate(zip(ROWS, index["samples"], strict=True)):
        prompt, response = fed(row)
        assert (s["id"], s["row"], s["global_offset"], s["num_tokens"], s["prompt_tokens"], s["truncated"]) == (row["id"], i, at, len(response), len(prompt), 0)
        assert s["text_sha256"] == hashlib.sha256(row["response"].encode()).hexdigest()
        assert s["token_ids_sha256"] == hashlib.sha256(np.array(response, "<i8").tobytes()).hexdigest()
        tokens, text = tokenize_trace(TOK, row["response"]), row["response"]
        stands = [next((i for i in range(a, b) if not text[i].isspace()), a) for a, b in zip(tokens.starts.tolist(), tokens.ends.tolist())]
        for j, step in enumerate(s["steps"]):
            if "steps" in row: assert (step["char_start"], step["char_end"], step["category"], step["macro"]) == tuple(row["steps"][j][k] for k in ("start", "end", "category", "macro"))
            mine = [k for k, a in enumerate(stands) if step["char_start"] <= a < step["char_end"]]  # the rule, one token after the other
            assert list(range(step["token_start"], step["token_end"])) == mine
            assert (dict(step=j, reason="no_token") in s["alignment"]["unaligned"]) == (not mine)
        assert s["alignment"]["total_chars"] == len(row["response"]) >= s["alignment"]["aligned_chars"]
        at, steps = at + len(response), steps + len(s["steps"])
    assert (config["num_tokens"], config["num_samples"], config["num_steps"]) == (at, len(ROWS), steps)
    assert index["schema"] == "tracebook/index/1" and config["schema"] == "tracebook/representations/1"


def test_the_rule_of_the_card(tmp_path, llama):
    "Global start and end from the sample's offset and the step; the first shard that overlaps; a local slice; stop."
    run(llama, some_rows(25), tmp_path, dtype="float32", shard_size="60kB", max_tokens_per_batch=64)
    config, index, whole = read(tmp_path, "config"), read(tmp_path, "index"), matrix(tmp_path)
    assert len(config["shards"]) > 3
    n = 0
    for sample in index["samples"]:
        for step in sample["steps"]:
            start, end = sample["global_offset"] + step["token_start"], sample["global_offset"] + step["token_end"]
            for shard in config["shards"]:
                if shard["token_end"] <= start or shard["token_start"] >= end: continue
                with safe_open(tmp_path/shard["file"], "pt") as file:
                    found = file.get_slice("hidden_states")[max(start, shard["token_start"]) - shard["token_start"]:min(end, shard["token_end"]) - shard["token_start"]]
                break
            else: found = whole[:0]
            assert torch.equal(found, whole[start:end])
            n += 1
    assert n == config["num_steps"] > 20


def test_prompt(tmp_path, llama):
    "The template renders the problem and never sees the response; without a problem, or with chat=False, the response is alone."
    rows = [dict(problem=" Odd? ", response="  7 is odd.\n\n"), dict(response=" 7 ")]
    run(llama, rows, tmp_path/"a", dtype="float32")
    assert [s["prompt_tokens"] for s in read(tmp_path/"a", "index")["samples"]] == [len(TOK.encode("Q: Odd?\nA:")), 0]
    assert close(matrix(tmp_path/"a"), expected(llama, rows)[0][-1])
    run(llama, rows, tmp_path/"b", dtype="float32", chat=False)
    assert close(matrix(tmp_path/"b"), expected(llama, rows, chat=False)[0][-1])
    assert not close(matrix(tmp_path/"a")[:3], matrix(tmp_path/"b")[:3])
    with pytest.raises(ValueError, match="give chat=False"): run(llama, rows, tmp_path/"c", tokenizer=make_tokenizer(TEXTS, 300))


def test_reasoning_is_not_opened_twice(tmp_path, llama):
    tok = make_tokenizer(TEXTS, 400)
    tok.chat_template = "{{ messages[0]['content'] }}<think>\n{% if extra is defined %}{{ extra }}{% endif %}"
    for response, opened in (("<think>\nHm</think>x", False), ("Hm</think>x", True)):
        run(llama, [dict(problem="p", response=response)], tmp_path/str(opened), tokenizer=tok)
        assert read(tmp_path/str(opened), "index")["samples"][0]["prompt_tokens"] == len(tok.encode("p<think>\n" if opened else "p"))
    run(llama, [dict(problem="p", response="x")], tmp_path/"more", tokenizer=tok, chat=dict(extra="!"))
    assert read(tmp_path/"more", "index")["samples"][0]["prompt_tokens"] == len(tok.encode("p<think>\n!"))


def test_beginning_of_text(tmp_path, llama):
    "A tokenizer that begins every text with a token of its own gets it where there is no template."
    from tokenizers.processors import TemplateProcessing
    tok = make_tokenizer(TEXTS, 390)
    tok.add_special_tokens(dict(bos_token="<s>"))
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.bos_token_id)])
    run(llama, [dict(problem="p", response="x y")], tmp_path, tokenizer=tok, chat=False)
    sample, = read(tmp_path, "index")["samples"]
    assert (sample["prompt_tokens"], sample["num_tokens"]) == (1, len(tok.encode("x y")) - 1)


def test_generated_ids_are_not_tokenized_again(tmp_path, llama):
    text = "12 + 12 = 24"
    ids = [TOK.encode(c)[0] for c in text]  # one token a character, which the tokenizer would not do
    assert ids != TOK.encode(text)
    run(llama, [dict(response=text, response_ids=ids, steps=[dict(start=3, end=7, category="c", macro="m")])], tmp_path, dtype="float32")
    sample, = read(tmp_path, "index")["samples"]
    assert (sample["num_tokens"], sample["steps"][0]["token_start"], sample["steps"][0]["token_end"]) == (12, 3, 7)
    assert close(matrix(tmp_path), alone(llama, [], ids)[0][-1])
    with pytest.warns(UnreadableRows): run(llama, [dict(response="abc", response_ids=ids), dict(response="ok")], tmp_path/"b")


def test_rows_without_steps(tmp_path, llama):
    "Blocks and mementos are the steps, or sentences where there are none."
    rows = [dict(response="<think>\n<|block_start|>1 + 1 = 2<|block_end|><|summary_start|>2<|summary_end|></think>Two."), dict(response="One. Two. Three.")]
    run(llama, rows, tmp_path)
    found = [[(s["category"], r["response"][s["char_start"]:s["char_end"]].strip()) for s in x["steps"]] for r, x in zip(rows, read(tmp_path, "index")["samples"])]
    assert [x for x in found[0] if x[0] in ("block", "memento")] == [("block", "1 + 1 = 2"), ("memento", "2")]
    assert {c for c, _ in found[1]} == {"sentence"} and len(found[1]) == 3


def test_max_length(tmp_path, llama):
    "What is beyond is not computed, and what was lost is said: a causal model's states of the rest do not change."
    rows = some_rows(5, 3, 600)
    with pytest.warns(UserWarning, match="lost the end"): done = run(llama, rows, tmp_path, dtype="float32", max_length=40)
    samples = read(tmp_path, "index")["samples"]
    whole, at = [alone(llama, *fed(r))[0][-1] for r in rows], 0
    for r, s, w in zip(rows, samples, whole):
        prompt, response = fed(r)
        assert s["num_tokens"] == min(len(response), 40 - len(prompt)) and s["truncated"] == len(response) - s["num_tokens"]
        assert close(matrix(tmp_path)[at:at + s["num_tokens"]], w[:s["num_tokens"]])
        at += s["num_tokens"]
        for j, step in enumerate(s["steps"]):
            assert step["token_end"] <= s["num_tokens"]
            if step["char_end"] > max((e for e in tokenize_trace(TOK, r["response"]).ends[:s["num_tokens"]]), default=0): assert any(u["step"] == j for u in s["alignment"]["unaligned"])
    assert done.truncated == sum(s["truncated"] > 0 for s in samples) == read(tmp_path, "config")["num_truncated"] > 0
    with pytest.warns(UserWarning, match="lost the end"): run(llama, [dict(response="1 " * 900)], tmp_path/"b", chat=False)  # the model has 512 positions
    assert read(tmp_path/"b", "config")["num_tokens"] == 512
    with pytest.raises(ValueError, match="the prompt has"): run(llama, rows, tmp_path/"c", max_length=3, unreadable="raise")


# rows of all kinds

def test_unreadable_rows(tmp_path, llama):
    bad = [dict(problem="p"), "no row", dict(response=3), dict(response="a\ud800b"), dict(response="abc", steps=[dict(start=2, end=9, category="c", macro="m")]), dict(problem=5, response="x")]
    rows = [ROWS[0], *bad, ROWS[1]]
    with pytest.warns(UnreadableRows, match="6 rows could not be read"): done = run(llama, rows, tmp_path, dtype="float32")
    assert [u["row"] for u in done.unreadable] == [1, 2, 3, 4, 5, 6]
    assert [s["row"] for s in read(tmp_path, "index")["samples"]] == [0, 7]
    assert read(tmp_path, "config")["unreadable"]["count"] == 6 and "\ud800" not in json.dumps(read(tmp_path, "config"), ensure_ascii=False)
    assert close(matrix(tmp_path), expected(llama, [ROWS[0], ROWS[1]])[0][-1])
    with pytest.raises(ValueError, match="row 1: "): run(llama, rows, tmp_path/"b", unreadable="raise")
    with pytest.raises(ValueError, match="no row could be read; row 0"): run(llama, bad, tmp_path/"c")


def test_no_rows_and_empty_ones(tmp_path, llama):
    assert run(llama, [], tmp_path/"none")[2:5] == (0, 0, 0)
    rows = [dict(response=""), ROWS[0], dict(response=""), dict(response="")]
    assert run(llama, rows, tmp_path/"some").num_samples == 4
    assert [s["global_offset"] for s in read(tmp_path/"some", "index")["samples"]] == [0, 0, *[len(fed(ROWS[0])[1])] * 2]
    for name in ("none", "some"): assert read(tmp_path/name, "config")["complete"] and run(llama, [] if name == "none" else rows, tmp_path/name).complete


def test_hostile_words_are_data(tmp_path, llama):
    word = "../\x1b[31m\"<script>\u202e"
    rows = [dict(id="../../etc", response="a b", steps=[dict(start=0, end=1, category=word, macro=word)])]
    run(llama, rows, tmp_path)
    assert (tmp_path/"index.json").read_bytes().isascii()
    assert read(tmp_path, "index")["samples"][0]["steps"][0]["category"] == word
    assert {p.parent for p in tmp_path.rglob("*")} == {tmp_path}


def test_one_shot_stream_and_file(tmp_path, llama):
    run(llama, iter(ROWS), tmp_path/"a")
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    run(llama, tmp_path/"rows.jsonl", tmp_path/"b")
    a, b = files(tmp_path/"a"), files(tmp_path/"b")
    assert a == b


# the plan

@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 50), st.integers(1, 120))
@settings(max_examples=200, deadline=None)
def test_windows(sizes, most, least):
    "Shards cover all rows in order, none is too large, and no sample that fits into one lies in two."
    rows = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    windows = extract._windows(rows, most, least)
    cuts = [0] + [c for w in windows for c in w.cuts[1:]]
    assert cuts == sorted(set(cuts)) and cuts[-1] == rows[-1]
    assert all(b - a <= most for a, b in zip(cuts, cuts[1:]))
    assert not any(c for c in cuts for a, b in zip(rows, rows[1:]) if a < c < b and b - a <= most)
    assert [w.cuts[0] for w in windows[1:]] == [w.cuts[-1] for w in windows[:-1]]
    assert not windows or (windows[0].first, windows[-1].last) == (0, len(sizes)) and all(a.last == b.first for a, b in zip(windows, windows[1:]))
    assert [w.shard for w in windows] == np.cumsum([0] + [len(w.cuts) - 1 for w in windows])[:-1].tolist()
    assert all(rows[w.first] == w.cuts[0] and (rows[w.last] == w.cuts[-1]) for w in windows)
    for world in (1, 2, 3, 7): assert sum((extract._share(windows, extract._Parts(r, world)) for r in range(world)), []) == windows


@given(st.lists(st.integers(1, 200), max_size=50), st.integers(1, 500), st.booleans())
@settings(max_examples=200, deadline=None)
def test_batches(sizes, budget, deterministic):
    sizes = np.array(sizes, int)
    for batches, packed in ((list(extract._bucketed(range(len(sizes)), sizes, budget, deterministic)), False), (list(extract._packed(range(len(sizes)), sizes, budget)), True)):
        assert sorted(i for b in batches for i in b.samples) == list(range(len(sizes)))
        for b in batches:
            assert b.cost <= budget or len(b.samples) == 1
            assert b.cost >= sum(sizes[i] for i in b.samples)
            if not packed: assert b.rows >= len(b.samples) and b.width >= max(sizes[i] for i in b.samples)
            if deterministic and not packed: assert b == b._replace(width=extract._bucket(int(sizes[b.samples[0]])), rows=max(1, budget // b.width))


def test_a_sample_larger_than_a_shard(tmp_path, llama):
    rows = [dict(response="1 "), dict(response="12 + 30 = 42. " * 12), dict(response="2 ")]
    run(llama, rows, tmp_path, dtype="float32", shard_size=20 * 128, chat=False)
    config, sizes = read(tmp_path, "config"), [len(fed(r, False)[1]) for r in rows]
    assert [s["token_end"] - s["token_start"] for s in config["shards"]] == [sizes[0], *[20] * (sizes[1] // 20), *([sizes[1] % 20] if sizes[1] % 20 else []), sizes[2]]
    assert [(s["first_sample"], s["last_sample"]) for s in config["shards"]] == [(0, 0), *[(1, 1)] * -(-sizes[1] // 20), (2, 2)]
    assert close(matrix(tmp_path), expected(llama, rows, False)[0][-1])


def test_several_layers_are_several_single_ones(tmp_path, llama):
    done = run(llama, ROWS, tmp_path/"all", layers=[0, 2, "embeddings"], shard_size="4kB", max_tokens_per_batch=100)
    for folder, one in zip(done.folders, ("embeddings", 0, 2)):
        assert files(folder) == files(run(llama, ROWS, tmp_path/str(one), layers=one, shard_size="4kB", max_tokens_per_batch=100).folder)
    assert done.folder == tmp_path/"all" and done.shards == 3 * len(read(done.folders[0], "config")["shards"])


def test_deterministic(tmp_path, llama):
    "The shape of a batch depends on the sample alone, so its bits do not change with the company."
    some = dict(deterministic=True, dtype="float32", max_tokens_per_batch=1000)
    run(llama, ROWS, tmp_path/"all", **some)
    samples, whole = read(tmp_path/"all", "index")["samples"], matrix(tmp_path/"all")
    for i in (0, 4, 7):
        run(llama, [ROWS[i]], tmp_path/str(i), **some)
        assert torch.equal(matrix(tmp_path/str(i)), whole[samples[i]["global_offset"]:][:samples[i]["num_tokens"]])
    with pytest.raises(ValueError, match="packing=False"): run(llama, ROWS, tmp_path/"x", deterministic=True, packing=True)


# going on

SMALL = dict(shard_size="14kB", max_tokens_per_batch=8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, llama):
    folder = tmp_path_factory.mktemp("whole")
    run(llama, ROWS, folder, **SMALL)
    assert len(read(folder, "config")["shards"]) >= 5
    return files(folder)


def broken_off(folder, whole, keep=3):
    "A folder as a crash leaves it, with so many finished shards."
    folder.mkdir(exist_ok=True)
    config = json.loads(whole["config.json"])
    for s in config["shards"][:keep]: (folder/s["file"]).write_bytes(whole[s["file"]])
    (folder/f".{config['shards'][keep]['file']}.tmp").write_bytes(b"half")
    (folder/"journal.jsonl").write_bytes(b"".join(whole["journal.jsonl"].splitlines(keepends=True)[:keep]))
    (folder/"config.json").write_text(json.dumps(config | dict(complete=False, shards=[])))
    return folder


def test_going_on(tmp_path, llama, whole):
    done = run(llama, ROWS, broken_off(tmp_path, whole), **SMALL)
    assert 0 < done.kept <= 3 and files(tmp_path) == whole
    assert (again := run(llama, ROWS, tmp_path, **SMALL)).kept == again.shards and files(tmp_path) == whole


def damage_journal(f): (f/"journal.jsonl").write_bytes((f/"journal.jsonl").read_bytes()[:-30])
def damage_line(f): (f/"journal.jsonl").write_bytes(b"\xff[" + (f/"journal.jsonl").read_bytes())
def foreign_line(f): (f/"journal.jsonl").write_bytes(b"[1]\n" + (f/"journal.jsonl").read_bytes())
def no_journal(f): (f/"journal.jsonl").unlink()
def no_shard(f): min(f.glob("hidden*")).unlink()
def short_shard(f): (p := max(f.glob("hidden*"))).write_bytes(p.read_bytes()[:-1])
def long_shard(f): (p := max(f.glob("hidden*"))).write_bytes(p.read_bytes() + b"x")
def other_bits(f): (p := sorted(f.glob("hidden*"))[1]).write_bytes(p.read_bytes()[:-1] + b"\x7f")
def a_link(f):
    p = min(f.glob("hidden*"))
    p.rename(f.parent/"elsewhere")
    p.symlink_to(f.parent/"elsewhere")


@pytest.mark.parametrize("harm", [damage_journal, damage_line, foreign_line, no_journal, no_shard, short_shard, long_shard, other_bits, a_link])
@pytest.mark.parametrize("complete", [False, True])
def test_damage_is_found_and_mended(tmp_path, llama, whole, harm, complete):
    folder = tmp_path/"a"
    folder.mkdir()
    if complete:
        for name, data in whole.items(): (folder/name).write_bytes(data)
    else: broken_off(folder, whole)
    harm(folder)
    run(llama, ROWS, folder, **SMALL)
    assert files(folder) == whole


def test_other_settings_are_refused_by_name(tmp_path, llama, whole):
    for name, data in whole.items(): (tmp_path/name).write_bytes(data)
    other = make("llama")
    with torch.no_grad(): other.model.embed_tokens.weight[5] += 1
    for word, args, more in (("dtype is 'bfloat16' there and 'float32' now", (llama, ROWS), dict(dtype="float32")), ("layer is 2 there and 1 now", (llama, ROWS), dict(layers=1)), ("stage is", (llama, ROWS), dict(stage="final_norm")),
            ("extraction.max_tokens_per_batch is 8 there and 9 now", (llama, ROWS), dict(max_tokens_per_batch=9)), ("extraction.packing", (llama, ROWS), dict(packing=True)), ("extraction.chat", (llama, ROWS), dict(chat=False)), ("extraction.shard_size", (llama, ROWS), dict(shard_size="15kB")),
            ("source.traces_sha256", (llama, [dict(ROWS[0], problem="other"), *ROWS[1:]]), {}), ("source.traces_sha256", (llama, [ROWS[0], dict(ROWS[1], steps=[]), *ROWS[2:]]), {}), ("num_samples is 9 there and 8 now", (llama, ROWS[:8]), {}), ("weights is", (other, ROWS), {}), ("extraction.attn", (llama, ROWS), dict(attn_implementation="eager"))):
        with pytest.raises(ValueError, match=word): run(*args, tmp_path, **SMALL | more)
    assert files(tmp_path) == whole
    run(llama, ROWS, tmp_path, **SMALL | dict(layers=1), resume=False)
    assert read(tmp_path, "config")["layer"] == 1 and not list(tmp_path.glob("*layer2*"))


def test_folders_that_are_not_ours(tmp_path, llama, whole):
    name = "hidden_states_layer2_shard00000.safetensors"
    (tmp_path/name).write_bytes(whole[name])
    with pytest.raises(ValueError, match="no config.json"): run(llama, ROWS, tmp_path)
    (tmp_path/name).unlink()
    (tmp_path/"config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"): run(llama, ROWS, tmp_path)
    (tmp_path/"notes.txt").write_text("mine")
    run(llama, ROWS, tmp_path, resume=False)
    assert (tmp_path/"notes.txt").read_text() == "mine" and read(tmp_path, "config")["complete"]


KILLS = """
    import os, random, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from pathlib import Path
    from tracebook.extract import extract_hidden_states
    from tracebook.toy import toy_traces
    ROWS = toy_traces(10)

    def go(folder): extract_hidden_states(None, ROWS, folder, layers=[0, 3], shard_size="200kB", max_tokens_per_batch=96, progress=False)

    def child(folder):
        if pid := os.fork(): return pid
        go(folder)
        os._exit(0)

    home, n, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    r = random.Random(seed)
    os.waitpid(child(home/"first"), 0)
    start = time.perf_counter()
    os.waitpid(child(home/"whole"), 0)
    whole, killed = time.perf_counter() - start, 0
    for i in range(n):
        pid = child(home/str(i))
        time.sleep(r.uniform(.05, .95) * whole)
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
        assert os.waitpid(child(home/str(i)), 0)[1] == 0
    print("killed", killed)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
@pytest.mark.parametrize("n", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path, n):
    script = tmp_path/"kills.py"
    script.write_text(textwrap.dedent(KILLS))
    (home := tmp_path/"home").mkdir()
    done = subprocess.run([sys.executable, script, home, str(n), str(n)], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 1
    for i in range(n): assert files(home/str(i)) == files(home/"whole")


# what goes wrong

def narrow(most):
    model = make("llama")
    forward = model.model.forward
    def limited(input_ids=None, **more):
        if input_ids.numel() > most: raise torch.OutOfMemoryError("no room")
        return forward(input_ids=input_ids, **more)
    model.model.forward = limited
    return model


@pytest.mark.parametrize("packing", [False, True])
def test_out_of_memory(tmp_path, llama, packing):
    most = max(sum(map(len, fed(r))) for r in ROWS)
    done = run(narrow(most), ROWS, tmp_path, dtype="float32", max_tokens_per_batch=5000, packing=packing)
    assert done.oom_splits > 0 and done.oom_splits == read(tmp_path, "config")["extraction"]["oom_splits"]
    assert close(matrix(tmp_path), expected(llama, ROWS)[0][-1])
    assert "out of memory" in next(tmp_path.glob("*.log")).read_text()


def test_a_sample_that_does_not_fit(tmp_path, llama):
    sizes = [sum(map(len, fed(r))) for r in ROWS]
    big = int(np.argmax(sizes))
    with pytest.raises(torch.OutOfMemoryError, match=rf"sample {big} \(id 'r{big}', row {big}\) with {sizes[big]:,} tokens.*max_length"): run(narrow(max(sizes) - 1), ROWS, tmp_path, **SMALL)
    assert not list(tmp_path.glob(".*.tmp")) and not read(tmp_path, "config")["complete"]
    run(llama, ROWS, tmp_path, **SMALL)
    assert read(tmp_path, "config")["complete"]


def test_other_errors_are_not_taken_for_memory(tmp_path):
    model = narrow(10 ** 6)
    run(model, ROWS[:1], tmp_path/"a")
    model.model.layers[2].register_forward_hook(lambda m, a, o: (_ for _ in ()).throw(RuntimeError("something else")) if o.numel() > 32 * 60 else None)
    with pytest.raises(RuntimeError, match="something else"): run(model, ROWS, tmp_path/"b")


def poisoned(word, value):
    "A model in which one token makes a number of the last block strange."
    model, token = make("llama"), TOK.encode(word)[0]
    seen = {}
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.update(ids=args[0]))
    def hook(m, args, out):
        where = (seen["ids"] == token).nonzero()
        if len(seen["ids"][0]) > 24 and len(where): out[where[0][0], where[0][1], 3] = value
        return out
    model.model.layers[-1].register_forward_hook(hook)
    return model


@pytest.mark.parametrize("value, dtype, says", [(float("nan"), "bfloat16", "NaN"), (float("-inf"), "float32", "infinite"), (-70000., "float16", "the largest number is 70,000, and float16 ends at 65,504"), (70000., "bfloat16", None)])
def test_numbers_that_are_none(tmp_path, llama, value, dtype, says):
    rows = [dict(id=f"s{i}", response="1 + 1 = 2. " * 20 + ("£" if i == 2 else "")) for i in range(4)]
    model = poisoned("£", value)
    if says is None:
        assert run(model, rows, tmp_path, dtype=dtype, max_tokens_per_batch=60).complete
        return
    at = TOK.encode(rows[2]["response"]).index(TOK.encode("£")[0])
    with pytest.raises(BadStates, match=f"id 's2', row 2.*, token {at} of the response, layer_2.*{says}"): run(model, rows, tmp_path, dtype=dtype, shard_size=12000, max_tokens_per_batch=30)
    assert not read(tmp_path, "config")["complete"] and not list(tmp_path.glob(".*.tmp")) and not (tmp_path/"index.json").exists()
    for name in (json.loads(l)["file"] for l in (tmp_path/"journal.jsonl").read_text().splitlines()): load_file(tmp_path/name)


def test_disk_full(tmp_path, llama, whole, monkeypatch):
    "Finished shards stay, half ones vanish, and the same call goes on."
    put, left = extract._Shard.put, [30_000]
    def full(self, at, data):
        left[0] -= len(data)
        if left[0] < 0: raise OSError(errno.ENOSPC, "No space left on device")
        put(self, at, data)
    monkeypatch.setattr(extract._Shard, "put", full)
    with pytest.raises(OSError, match="the disk is full. Finished shards are valid"): run(llama, ROWS, tmp_path, **SMALL)
    names = {p.name for p in tmp_path.glob("*hidden*")}
    assert names and names == {json.loads(l)["file"] for l in (tmp_path/"journal.jsonl").read_text().splitlines()} and not list(tmp_path.glob(".*.tmp"))
    assert all((tmp_path/n).read_bytes() == whole[n] for n in names)
    monkeypatch.setattr(extract._Shard, "put", put)
    assert run(llama, ROWS, tmp_path, **SMALL).kept == len(names) and files(tmp_path) == whole


def test_another_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="row 0: token .* but the model has embeddings for 300: this tokenizer belongs to another model"): run(make("llama", vocab_size=300), ROWS, tmp_path)
    with pytest.raises(ValueError, match="which tokenizer"): extract_hidden_states(make("llama"), ROWS, tmp_path/"b", **QUIET)


def test_a_model_whose_batches_are_wrong(tmp_path):
    model = make("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **more: forward(*args, **more)
    with pytest.raises(RuntimeError, match="packed as alone"): run(model, ROWS, tmp_path, packing=True)
    assert not (tmp_path/"config.json").exists()
    run(model, ROWS, tmp_path, packing=False)
    model.model.forward = lambda input_ids, **more: forward(input_ids.flip(0) if len(input_ids) > 1 else input_ids, **more)
    with pytest.raises(RuntimeError, match="in a batch as alone"): run(model, ROWS, tmp_path/"b")


def test_models_that_are_none(tmp_path):
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=400, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="no decoder"): run(t5, ROWS, tmp_path)
    with pytest.raises(ValueError, match="cannot load the model 'no/such-model'"): extract_hidden_states("no/such-model", ROWS, tmp_path, tokenizer=TOK, **QUIET)


@pytest.mark.parametrize("more, says", [(dict(dtype="int8"), "cannot be stored"), (dict(layers=3), "numbers from 0 to 2"), (dict(layers=[]), "at least one"), (dict(layers=True), "there is no True"), (dict(stage="logits"), "unknown"), (dict(stage="final_norm", layers=0), "middle layers"),
    (dict(max_tokens_per_batch=0), "at least one token"), (dict(max_length=0), "at least one token"), (dict(shard_size="huge"), "no size"), (dict(unreadable="ignore"), "choose skip or raise"), (dict(rank=2, world_size=2), "counted from 0"), (dict(root="x"), "not both"), (dict(compute_dtype="bfloat16"), "computes in torch.float32"),
    (dict(compute_dtype="nope"), "no type to compute in"), (dict(compute_dtype="int8"), "no type to compute in"), (dict(device="nope"), "device='nope' cannot be used"), (dict(device="meta"), "device='meta' cannot be used"), (dict(device="cuda:99"), "device='cuda:99' cannot be used"),
    (dict(attn_implementation="nope"), "attn_implementation='nope' cannot be used"), (dict(max_length=20.5), "a whole number of them")])
def test_settings_that_mean_nothing(tmp_path, llama, more, says):
    attention = llama.config._attn_implementation
    with pytest.raises(ValueError, match=says): run(llama, ROWS, tmp_path, **more)
    assert llama.config._attn_implementation == attention and not list(tmp_path.rglob("*.*"))


# by name, in a tree, by several processes

def test_by_name_and_in_a_tree(tmp_path, llama):
    place = tmp_path/"Tiny-Llama"
    llama.save_pretrained(place)
    TOK.save_pretrained(place)
    done = extract_hidden_states(place, ROWS, root=tmp_path/"tree", layers=[0, -1], compute_dtype="float32", dtype="float32", **QUIET)
    assert done.folder == tmp_path/"tree"/"annotated_traces_reprs"/"tiny-llama"
    assert close(matrix(done.folders[1]), expected(llama, ROWS)[0][-1]) and close(matrix(done.folders[0]), expected(llama, ROWS)[0][1])
    config = read(done.folders[0], "config")
    assert config["model"] == "Tiny-Llama" and str(tmp_path) not in json.dumps(config)
    assert matrix(extract_hidden_states(str(place), ROWS, tmp_path/"half", compute_dtype="bfloat16", **QUIET).folder).dtype == torch.bfloat16
    assert read(tmp_path/"half", "config")["extraction"]["compute_dtype"] == "bfloat16"


def test_a_tokenizer_by_name(tmp_path, llama):
    "A tokenizer may be named, whatever the model is."
    llama.save_pretrained(tmp_path/"model")
    TOK.save_pretrained(tmp_path/"words")
    run(llama, ROWS, tmp_path/"a")
    for name, model in dict(b=llama, c=tmp_path/"model", d=str(tmp_path/"model")).items():
        run(model, ROWS, tmp_path/name, tokenizer=tmp_path/"words" if name == "c" else str(tmp_path/"words"))
        assert torch.equal(matrix(tmp_path/name), matrix(tmp_path/"a")), name
    toy = str(Path(extract.__file__).parent/"toy_model")
    assert extract_hidden_states(None, toy_traces(1), tmp_path/"e", tokenizer=toy, **QUIET).num_tokens == 386


def test_one_matrix_and_several_are_not_mixed(tmp_path, llama):
    "A folder means one matrix, so neither may lie inside of the other, also not when a call begins again."
    run(llama, ROWS, tmp_path/"one")
    run(llama, ROWS, tmp_path/"several", layers=[0, "embeddings"])
    before = files(tmp_path)
    for resume in (True, False):
        with pytest.raises(ValueError, match="the matrix of one layer, and the folders of several"): run(llama, ROWS, tmp_path/"one", layers=[0, 1], resume=resume)
        with pytest.raises(ValueError, match="for each of several layers, such as embeddings"): run(llama, ROWS, tmp_path/"several", resume=resume)
    assert files(tmp_path) == before and sorted(p.name for p in (tmp_path/"one").glob("layer*")) == []
    assert run(llama, ROWS, tmp_path/"several", layers=[0, 1]).complete and list(HiddenStates.open_layers(tmp_path/"several")) == [0, 1, "embeddings"]


def test_published_names():
    assert PUBLISHED_MODELS == {"olmo-3-7b-think": "allenai/Olmo-3-7B-Think", "olmo-3-7b-think-sft": "allenai/Olmo-3-7B-Think-SFT", "olmo-3-7b-think-dpo": "allenai/Olmo-3-7B-Think-DPO",
        "qwen3-4b-thinking-2507": "Qwen/Qwen3-4B-Thinking-2507", "qwen3-4b-instruct-2507": "Qwen/Qwen3-4B-Instruct-2507"}
    with pytest.raises(ValueError, match="Olmo-3-7B-Think"): extract_hidden_states("olmo-3-7b-think", ROWS, "unused", **QUIET)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes(tmp_path, llama, whole, world, monkeypatch):
    "Each writes its share; together they are what one process writes."
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in random.Random(world).sample(range(world), world):
        monkeypatch.setenv("RANK", str(rank))
        done = run(llama, ROWS, tmp_path, **SMALL)
    assert done.complete and merge_extractions(tmp_path) is True
    assert {k: v for k, v in files(tmp_path).items() if "rank" not in k} == {k: v for k, v in whole.items() if k != "journal.jsonl"}
    assert run(llama, ROWS, tmp_path, **SMALL).kept == done.shards
    (tmp_path/read(tmp_path, "config")["shards"][0]["file"]).write_bytes(b"x")
    monkeypatch.setenv("RANK", "0")
    assert run(llama, ROWS, tmp_path, **SMALL).complete
    assert {k: v for k, v in files(tmp_path).items() if "rank" not in k} == {k: v for k, v in whole.items() if k != "journal.jsonl"}
    monkeypatch.delenv("WORLD_SIZE"), monkeypatch.delenv("RANK")
    assert run(llama, ROWS, tmp_path, **SMALL).complete


def test_parts_that_do_not_belong_together(tmp_path, llama):
    run(llama, ROWS, tmp_path, rank=0, world_size=2, **SMALL)
    assert merge_extractions(tmp_path) is False
    with pytest.raises(ValueError, match="dtype is"): run(llama, ROWS, tmp_path, rank=0, world_size=2, dtype="float32", **SMALL)
    with pytest.raises(ValueError, match="parts of 2 processes"): run(llama, ROWS, tmp_path, rank=0, world_size=3, **SMALL)
    with pytest.raises(ValueError, match="parts of 2 processes"): run(llama, ROWS, tmp_path, **SMALL)
    with pytest.raises(ValueError, match="is of another extraction"): run(llama, ROWS, tmp_path, rank=1, world_size=2, dtype="float32", **SMALL)
    with pytest.raises(ValueError, match="holds no part"): merge_extractions(tmp_path/"nowhere")


def test_the_default(tmp_path, monkeypatch):
    "The toy over its own traces, every step annotated by construction."
    monkeypatch.chdir(tmp_path)
    done = extract_hidden_states(progress=False)
    assert isinstance(done, Manifest) and done.folder == Path("hidden_states/tracebook-toy") and done.num_samples == 64
    index = read(done.folder, "index")
    assert {s["category"] for x in index["samples"] for s in x["steps"]} == {"digit", "partial_sum", "carry", "memento", "answer"}
    model, tok = load_toy()
    row, sample = toy_traces(64)[63], index["samples"][63]
    prompt = tok.apply_chat_template([dict(role="user", content=row["problem"])], tokenize=True, add_generation_prompt=True, return_dict=False)
    states = alone(model, prompt, tok.encode(row["response"]))[0][-1]
    assert close(matrix(done.folder)[sample["global_offset"]:].float(), states, .01)


def test_same_input_same_bytes(tmp_path, llama, whole):
    run(llama, ROWS, tmp_path, **SMALL)
    assert files(tmp_path) == whole
    config = (tmp_path/"config.json").read_text()
    keys = list(json.loads(config, object_pairs_hook=lambda pairs: [k for k, _ in pairs]))
    assert keys == sorted(keys) and "NaN" not in config


@pytest.mark.slow
def test_compiled(tmp_path, llama):
    run(llama, ROWS, tmp_path, dtype="float32", compile=True)
    assert close(matrix(tmp_path), expected(llama, ROWS)[0][-1]) and "forward" not in llama.model.layers[0].__dict__


@pytest.mark.cuda
def test_on_a_gpu(tmp_path):
    model = make("llama").cuda()
    for packing in (False, True):
        run(model, ROWS, tmp_path/str(packing), dtype="float32", packing=packing, max_tokens_per_batch=300)
        assert close(matrix(tmp_path/str(packing)), expected(model.cpu(), ROWS)[0][-1], 1e-4)
        model.cuda()


def test_no_step_loses_its_first_word(tmp_path):
    "The tokens of an annotated step spell at least the whole step, also where a tokenizer puts the space before a word into its token."
    rows = sample_traces("steps").select(range(4))
    whole = make_tokenizer(rows["response"], 2000, "another")
    assert any(whole.decode([i]).startswith(" ") and whole.decode([i]).strip() for i in range(len(whole)))
    run(make("llama", vocab_size=len(whole), num_hidden_layers=1, max_position_embeddings=16384), rows, tmp_path, tokenizer=whole, chat=False)
    n = 0
    for row, sample in zip(rows, read(tmp_path, "index")["samples"]):
        ids = whole.encode(row["response"], add_special_tokens=False)
        assert [(s["char_start"], s["char_end"]) for s in sample["steps"]] == [(s["start"], s["end"]) for s in row["steps"]]
        ends = [0]
        for s in sample["steps"]:
            text = row["response"][s["char_start"]:s["char_end"]]
            spelled = whole.decode(ids[s["token_start"]:s["token_end"]], clean_up_tokenization_spaces=False)
            assert s["token_start"] >= ends[-1]
            n += text in spelled and len(spelled.strip()) <= len(text) + 3
            ends.append(s["token_end"])
    assert n >= .97 * sum(map(len, rows["steps"]))  # the others begin or end inside of a token


def test_an_index_that_was_changed_is_found(tmp_path, llama):
    "One digit of one offset, in a folder of one process and in one of two."
    run(llama, ROWS, tmp_path/"one")
    for rank in (0, 1): run(llama, ROWS, tmp_path/"two", rank=rank, world_size=2)
    for folder in (tmp_path/"one", tmp_path/"two"):
        assert read(folder, "config")["index_sha256"] == hashlib.sha256((folder/"index.json").read_bytes()).hexdigest()
        hs, path = HiddenStates(folder), folder/"index.json"
        step = next(s for x in hs.samples for s in x["steps"] if s["token_end"] - s["token_start"] > 1)
        old, new = f'"token_end":{step["token_end"]},"token_start":{step["token_start"]}', f'"token_end":{step["token_end"] - 1},"token_start":{step["token_start"]}'
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(ValueError, match="index.json: its sha256"): HiddenStates(folder)


@pytest.mark.parametrize("words", [["--device", "nope"], ["--device", "cuda:99"], ["--attention", "nope"], ["--layers", "9"], ["--shard-size", "huge"], ["--model", "no/such-model"]])
def test_wrong_words_in_the_shell_are_no_fault_of_ours(tmp_path, capsys, words):
    from tracebook.cli import main
    assert main(["extract", "--limit", "1", "--out", str(tmp_path/"a"), *words]) == 1
    said = capsys.readouterr().err
    assert words[1] in said and "fault of tracebook" not in said and "Traceback" not in said
