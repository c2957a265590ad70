"Generation with eviction against one pass under the dense mask."
import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, JambaConfig, LlamaConfig, MambaConfig, MistralConfig, Olmo3Config, Phi3Config, PhiConfig, Qwen3Config,
    GenerationConfig, LogitsProcessor, StoppingCriteria, StaticCache)

from tracebook.attention import kv_bytes_per_token, kv_occupancy, visible_until
from tracebook.generate import MementoDecoding, generate_memento
from tracebook.memento import parse_memento_ids
from tracebook.sources import sample_traces
from tracebook.tokens import add_memento_tokens, make_tokenizer, memento_token_ids
from tracebook.trace import PHI4, QWEN3, VANILLA, ContextPolicy

torch.set_num_threads(1)
TOK = make_tokenizer(sample_traces()["response"], 300)
BARE = make_tokenizer(sample_traces()["response"], 300)
add_memento_tokens(TOK)
MARKS = memento_token_ids(TOK)
B, b, S, e = (MARKS[k] for k in ("block_start", "block_end", "summary_start", "summary_end"))
COMMON = dict(vocab_size=len(TOK), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    pad_token_id=0, eos_token_id=None, bos_token_id=None, max_position_embeddings=4096, initializer_range=.5)
W = 7
FAMILIES = dict(
    llama=(LlamaConfig, {}), qwen3=(Qwen3Config, {}), phi3=(Phi3Config, {}), olmo3=(Olmo3Config, dict(sliding_window=W, layer_types=["sliding_attention", "full_attention"])),
    phi=(PhiConfig, dict(num_key_value_heads=4)), mistral=(MistralConfig, dict(sliding_window=W)), gemma2=(Gemma2Config, dict(sliding_window=W, query_pre_attn_scalar=8)),
    gemma3=(Gemma3TextConfig, dict(sliding_window=W, query_pre_attn_scalar=8, layer_types=["full_attention", "sliding_attention"])))
POLICIES = dict(vanilla=VANILLA, qwen3=QWEN3, phi4=PHI4, keep1=ContextPolicy(1), keep2=ContextPolicy(2, mask_delimiters=True), last=ContextPolicy(0, keep_last_block_for_answer=True), restart=ContextPolicy(0, restart=True))
_models = {}

def model_of(name, dtype=torch.float64, attn="sdpa"):
    key = name, dtype, attn
    if key not in _models:
        torch.manual_seed(0)
        kind, more = FAMILIES[name]
        config = kind(**COMMON | more)
        if dtype == torch.float32: config.initializer_range = .3
        _models[key] = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if name == "gemma2" else attn).to(dtype).eval()
    return _models[key]

class Script(LogitsProcessor):
    def __init__(self, texts, start): self.texts, self.start = texts, start
    def __call__(self, ids, scores):
        out = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(self.texts): out[row, text[min(ids.shape[1] - self.start, len(text) - 1)]] = 0
        return out

def write(model, prompts, texts, policy, **more):
    start = max(map(len, prompts))
    more.setdefault("logits_processor", [Script(texts, start)])
    out = generate_memento(model, TOK, prompts, policy, max_new_tokens=more.pop("max_new_tokens", max(map(len, texts))), output_logits=True, **more)
    for o, p, t in zip(out, prompts, texts):
        n = min(len(t), len(o.generated))
        assert o.ids.tolist()[:len(p)] == list(p) and o.prompt_length == len(p)
        assert o.generated.tolist()[:n] == t[:n]
    return out

def dense(model, ids, until):
    config, n, at = model.config, len(ids), torch.arange(len(ids))
    see = (at <= at[:, None]) & (at[:, None] < until)
    window = getattr(config, "sliding_window", None) or n
    near = see & (at[:, None] - at < window)
    bias = lambda s: torch.zeros(n, n, dtype=model.dtype).masked_fill(~s, torch.finfo(model.dtype).min)[None, None]
    types = set(getattr(config, "layer_types", None) or ())
    mask = dict(full_attention=bias(see), sliding_attention=bias(near)) if len(types) == 2 else bias(near)
    with torch.no_grad(): return model(input_ids=ids[None], position_ids=at[None], attention_mask=mask).logits[0]

def check(model, out, policy, sees=True, tol=1e-9, prompt="causal"):
    if model.config._attn_implementation == "eager": tol = max(tol, 2e-5) # softmax in float32
    ids, P = out.ids, out.prompt_length
    blocks = parse_memento_ids(ids, MARKS, P if prompt == "ignore" else 0)
    until = visible_until(blocks, len(ids), policy, sees)
    if prompt == "causal" and not policy.restart: until = until.clamp(min=P)
    assert torch.equal(until, out.visible_until)
    want = dense(model, ids, until)[P - 1:-1]
    rows = torch.ones(len(want), dtype=bool)
    if policy.restart: # inside mementos the logits are those of a view that still has the block
        for x in blocks:
            if x.summary_end is not None: rows[max(x.summary_start - P + 1, 0):max(x.summary_end - P + 1, 0)] = False
    assert (out.logits[rows] - want[rows]).abs().max() < tol, (out.logits - want).abs().max()
    in_cache = replace(policy, restart=False, mask_delimiters=True) if policy.restart else policy
    until = visible_until(blocks, len(ids), in_cache, sees and not policy.restart)
    if prompt == "causal" and not policy.restart: until = until.clamp(min=P)
    curve = kv_occupancy(until, P)
    full = "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()) and getattr(model.config, "sliding_window", None)
    if not full: assert out.curve.occupancy.tolist() == curve.occupancy[P - 1:].tolist()
    assert torch.equal(out.predicted.occupancy, curve.occupancy)
    window = getattr(model.config, "sliding_window", None)
    if window and not policy.restart:
        measured = out.curve.occupancy if full else out.curve.windowed
        assert measured.tolist() == curve.windowed(window).occupancy[P - 1:].tolist()
    if not full:
        assert (out.curve.peak, out.curve.auc) == (curve.peak, curve.auc)
        assert [x for x in out.evictions.tolist() if x[0] >= P] == [x for x in curve.evictions.tolist() if x[0] >= P]
        assert out.kept.tolist() == torch.nonzero(until > len(ids) - 1).ravel().tolist()

def regular(seed, n_blocks=4):
    r = random.Random(seed)
    word = lambda k: [r.randrange(5, 250) for _ in range(k)]
    out = word(r.randrange(3))
    for _ in range(n_blocks): out += [B, *word(r.randrange(1, 11)), b, *word(r.randrange(2)), S, *word(r.randrange(1, 5)), e, *word(r.randrange(3))]
    return out + word(r.randrange(1, 6))

def odd(seed, n=60):
    r = random.Random(seed)
    return [r.choice((B, b, S, e)) if r.random() < .4 else r.randrange(5, 250) for _ in range(n)]

def prompt(seed, n=None):
    r = random.Random(1000 + seed)
    return [r.randrange(5, 250) for _ in range(n or r.randrange(1, 9))]

MAIN = ("llama", "qwen3", "phi3", "olmo3") # all policies; the other families a few
CASES = [(f, p) for f in FAMILIES for p in POLICIES if f in MAIN or p in ("phi4", "restart")]

@pytest.mark.parametrize("family,policy", CASES)
def test_single_equals_dense(family, policy):
    model = model_of(family)
    for sees, text in ((True, regular(1, 3)), (False, odd(2, 40))): check(model, write(model, [prompt(3)], [text], POLICIES[policy], summary_end_sees_block=sees)[0], POLICIES[policy], sees)

@pytest.mark.parametrize("family,policy", CASES)
def test_batch_equals_dense(family, policy):
    model = model_of(family)
    texts = [regular(5, 2), odd(6, 40), regular(7, 3)]
    outs = write(model, [prompt(8, 4), prompt(9, 9), prompt(10, 2)], texts, POLICIES[policy])
    for o in outs: check(model, o, POLICIES[policy])

@pytest.mark.parametrize("family", ["qwen3", "olmo3"])
def test_batch_equals_single_and_eager(family):
    for attn in ("sdpa", "eager"):
        model, prompts, texts = model_of(family, attn=attn), [prompt(8, 4), prompt(9, 9), prompt(10, 2)], [regular(5, 3), odd(6), regular(7, 5)]
        n = max(map(len, texts))
        outs = write(model, prompts, texts, PHI4)
        for p, t, o in zip(prompts, texts, outs):
            alone = write(model, [p], [t], PHI4, max_new_tokens=n)[0]
            assert torch.equal(alone.ids, o.ids) and (alone.logits - o.logits).abs().max() < (1e-9 if attn == 'sdpa' else 2e-5)
            assert alone.curve.occupancy.tolist() == o.curve.occupancy.tolist() and alone.kept.tolist() == o.kept.tolist()
            check(model, o, PHI4)

@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "olmo3"])
def test_float32(family):
    model = model_of(family, torch.float32)
    for name in ("qwen3", "restart"):
        for o in write(model, [prompt(1, 4), prompt(2, 3)], [regular(1), odd(3)], POLICIES[name]): check(model, o, POLICIES[name], tol=1e-4)

def test_plain_causal_differs():
    model = model_of("qwen3")
    o = write(model, [prompt(3)], [regular(1)], QWEN3)[0]
    causal = dense(model, o.ids, torch.full((len(o.ids),), len(o.ids)))[o.prompt_length - 1:-1]
    assert (o.logits - causal).abs().max() > .1

@pytest.mark.parametrize("family", ["qwen3", "olmo3"])
def test_random_markers(family):
    model, names = model_of(family), list(POLICIES)
    for seed in range(12):
        policy = POLICIES[names[seed % len(names)]]
        sees, where = bool(seed & 1), ("causal", "mask", "ignore")[seed % 3]
        prompts = [odd(300 + seed, 5 + seed % 7), odd(400 + seed, 12)]
        for o in write(model, prompts, [odd(seed), odd(100 + seed)], policy, summary_end_sees_block=sees, prompt_blocks=where): check(model, o, policy, sees, prompt=where)

@pytest.mark.parametrize("family", ["qwen3", "olmo3"])
@pytest.mark.parametrize("where", ["causal", "mask", "ignore"])
def test_blocks_in_the_prompt(family, where):
    model = model_of(family)
    whole = regular(11, 4)
    for name, policy in POLICIES.items():
        if policy.restart and where == "causal": continue
        for cut in ((20, whole.index(S) + 2), (whole.index(e) + 1, whole.index(b) + 1))[family == "olmo3"]:
            o = write(model, [whole[:cut]], [whole[cut:]], policy, prompt_blocks=where)[0]
            check(model, o, policy, prompt=where)

def test_sampling_time_logits_of_restart():
    model, policy = model_of("qwen3"), POLICIES["restart"]
    o = write(model, [prompt(3)], [regular(1)], policy)[0]
    P = o.prompt_length
    for n in range(P, len(o.ids)): # the view at the time: what is complete then
        until = visible_until(parse_memento_ids(o.ids[:n], MARKS), n, policy)
        assert (dense(model, o.ids[:n], until)[-1] - o.logits[n - P]).abs().max() < 1e-9

@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_restart_is_separate_documents(family):
    "Each block with what stayed before it is a document of its own, at its old positions; inside its memento it gives the logits of the first reading."
    model = model_of(family)
    r = random.Random(1)
    word = lambda k: [r.randrange(5, 250) for _ in range(k)]
    text = word(2) + [i for k in range(4) for i in (B, *word(3 + k), b, S, *word(2), e, *word(k % 2))] + word(3) # words between a block and its memento would stay, and have seen the block
    o = write(model, [prompt(3)], [text], POLICIES["restart"])[0]
    n, P = len(o.ids), o.prompt_length
    whole = dense(model, o.ids, o.visible_until)
    for x in o.blocks:
        at = torch.tensor([j for j in range(x.summary_end + 1) if o.visible_until[j] >= n or x.block_start <= j <= x.block_end])
        causal = torch.full((len(at), len(at)), torch.finfo(model.dtype).min, dtype=model.dtype).triu(1)[None, None]
        with torch.no_grad(): logits = model(input_ids=o.ids[at][None], position_ids=at[None], attention_mask=causal).logits[0]
        for j, row in zip(at.tolist(), logits):
            if j < x.block_start: continue
            want = whole[j] if j < x.summary_start else o.logits[j + 1 - P] if j < x.summary_end else None
            assert want is None or (row - want).abs().max() < 1e-9, j
    assert len(o.blocks) == 4

@pytest.mark.cuda
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "olmo3"])
def test_on_a_gpu(family):
    "What a GPU writes is compared with one pass on the CPU."
    model = model_of(family, torch.float32)
    gpu = copy.deepcopy(model).to("cuda")
    for name in ("qwen3", "phi4", "restart"):
        for o in write(gpu, [prompt(1, 4), prompt(2, 3)], [regular(1), odd(3)], POLICIES[name]): check(model, replace(o, logits=o.logits.cpu()), POLICIES[name], tol=1e-3)

def test_tensors_are_really_shorter():
    model, sizes = model_of("qwen3"), []
    class Spy(StoppingCriteria):
        def __call__(self, ids, scores, **kw):
            sizes.append([layer.keys.shape[-2] for layer in decoding.run.cache.layers])
            assert decoding.run.cache.nbytes == sizes[-1][0] * int(kv_bytes_per_token(model, torch.float64))
            return torch.zeros(len(ids), dtype=bool)
    text, p = regular(1), prompt(3)
    decoding = MementoDecoding(QWEN3, MARKS)
    ids = torch.tensor([p])
    out = model.generate(ids, max_new_tokens=len(text), custom_generate=decoding, logits_processor=[Script([text], len(p))], stopping_criteria=[Spy()])
    assert out[0].tolist() == p + text # a drop-in for generate
    o = decoding.outputs(TOK)[0]
    assert [s[0] for s in sizes] == o.curve.occupancy[:-1].tolist() and all(len(set(s)) == 1 for s in sizes)
    assert min(np.diff([s[0] for s in sizes])) < 0

@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "phi", "olmo3", "gemma2", "mistral"])
def test_vanilla_is_generate(family):
    model = model_of(family, torch.float32)
    prompts = [prompt(1, 5), prompt(2, 5)]
    ids = torch.tensor(prompts)
    for kw in (dict(do_sample=False), dict(do_sample=True, temperature=.8, top_k=20), dict(do_sample=True, top_p=.9, repetition_penalty=1.3, eos_token_id=list(range(60, 80)))):
        torch.manual_seed(7)
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, pad_token_id=0, **kw)
        got = generate_memento(model, TOK, prompts, VANILLA, 40, seed=7, **kw)
        for w, g in zip(want.tolist(), got):
            n = len(g.ids)
            assert g.ids.tolist() == w[:n] and set(w[n:]) <= {0}
            assert g.finish_reason == ("eos" if n < 45 or w[-1] in kw.get("eos_token_id", []) else "length")
            assert g.text == TOK.decode(w[5:n - (g.finish_reason == "eos")])

def test_left_padding_is_generate():
    model, prompts = model_of("qwen3"), [prompt(1, 5), prompt(2, 2), prompt(3, 9)]
    got = generate_memento(model, TOK, prompts, VANILLA, 20)
    for p, g in zip(prompts, got): assert g.ids.tolist() == model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=int), max_new_tokens=20)[0].tolist()

def test_seed_leaves_random_state_alone():
    model = model_of("qwen3")
    torch.manual_seed(1); a = torch.rand(1)
    torch.manual_seed(1); x = generate_memento(model, TOK, [1, 2], max_new_tokens=5, seed=3, do_sample=True); assert torch.equal(torch.rand(1), a)
    assert torch.equal(x.ids, generate_memento(model, TOK, [1, 2], max_new_tokens=5, seed=3, do_sample=True).ids)

def test_rows_end_at_different_times():
    model, eos = model_of("olmo3"), 251
    texts = [regular(1)[:10] + [eos], regular(2), regular(3)[:25] + [eos]]
    outs = write(model, [prompt(8, 4), prompt(9, 9), prompt(10, 2)], texts, QWEN3, eos_token_id=eos)
    assert [o.finish_reason for o in outs] == ["eos", "length", "eos"] and [len(o.generated) for o in outs] == list(map(len, texts))
    for o in outs: check(model, o, QWEN3)
    assert outs[0].text == TOK.decode(outs[0].generated[:-1]) and outs[0].generated[-1] == eos

@pytest.mark.parametrize("rows", [1, 3])
def test_block_cap(rows):
    model = model_of("qwen3")
    class Never(LogitsProcessor): # opens a block at once, and never ends one
        def __call__(self, ids, scores):
            scores = scores.clone(); scores[:, [b, S, e]] = -torch.inf
            if ids.shape[1] == start: scores[:, B] = torch.inf
            else: scores[:, B] = -torch.inf
            return scores
    prompts = [prompt(k, 2 + k) for k in range(rows)]
    start = max(map(len, prompts))
    outs = generate_memento(model, TOK, prompts, replace(QWEN3, max_block_tokens=6), 20, logits_processor=[Never()])
    for o in outs:
        g = o.generated.tolist()
        assert g[0] == B and g[7] == b and b not in g[8:] and o.blocks[0][:2] == (o.prompt_length, o.prompt_length + 7)
    uncapped = generate_memento(model, TOK, prompts, QWEN3, 20, logits_processor=[Never()])
    assert all(b not in o.generated for o in uncapped)

def test_streamer():
    model, seen = model_of("qwen3"), []
    class Streamer:
        def put(self, x): seen.extend(x.reshape(-1).tolist())
        def end(self): seen.append("end")
    o = write(model, [prompt(3)], [regular(1)], QWEN3, streamer=Streamer())[0]
    assert seen == [*o.ids.tolist(), "end"]

def test_stop_string_and_messages():
    model, text = model_of("qwen3"), TOK("hello there", add_special_tokens=False)["input_ids"]
    o = write(model, [prompt(3)], [[*text, *text]], QWEN3, stop_strings=["there"])[0]
    assert o.finish_reason == "stop" and o.text == "hello there"
    tok = make_tokenizer(sample_traces()["response"], 300); add_memento_tokens(tok)
    tok.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    a = generate_memento(model, tok, [dict(role="user", content="Hi")], max_new_tokens=3)
    assert tok.decode(a.ids[:a.prompt_length]) == "user: Hi\nassistant: "
    c = generate_memento(model, tok, [[dict(role="user", content="Hi")], "Hello"], max_new_tokens=3)
    assert isinstance(c, list) and torch.equal(c[0].ids, a.ids)
    assert len(generate_memento(model, tok, "Hi", max_new_tokens=3, num_return_sequences=2, do_sample=True, seed=0)) == 2

def test_trace_and_repr():
    model = model_of("qwen3")
    o = write(model, [prompt(3)], [regular(1)], QWEN3)[0]
    assert len(o.trace.blocks) == 4 and o.trace.text == o.text and "4 blocks" in repr(o) and "<details" in o._repr_html_()
    assert o.curve.sawtooth().points[-1] == (len(o.ids), int(o.curve.occupancy[-1]))
    assert "measured" in repr(o.curve)

def test_refusals():
    model = model_of("qwen3")
    bad = lambda match, *a, m=model, t=TOK, p="Hi", **kw: pytest.raises(ValueError, generate_memento, m, t, p, *a, **kw).match(match)
    bad("beam search", num_beams=2)
    for c in ("static", "quantized", "offloaded", "dynamic"): bad("cache", cache_implementation=c)
    bad("use_cache", use_cache=False)
    bad("beam search", generation_config=GenerationConfig(num_beams=3))
    bad("leave it out", attention_mask=torch.ones(1, 2))
    bad("assistant_model", assistant_model=model)
    bad("output_scores", output_scores=True)
    bad("add_memento_tokens", t=BARE)
    bad("no tokens", p="")
    bad("no prompt", p=[])
    bad("empty, or mixes", p=[[]])
    bad("token id 9999", p=[1, 9999])
    bad("not int", p=3)
    bad("no chat template", p=[dict(role="user", content="x")])
    bad("unknown", "gpt")
    bad("prompt_blocks", prompt_blocks="x")
    bad("starts with a cache of its own", past_key_values=StaticCache(model.config, max_cache_len=64))
    with pytest.raises(ValueError, match="tru_temp"): generate_memento(model, TOK, "Hi", tru_temp=1)
    big = make_tokenizer(sample_traces()["response"], 600); add_memento_tokens(big)
    bad("makes room", t=big, p=[1])
    tiny = dict(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    for config in (MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=2, state_size=4), JambaConfig(**tiny | dict(vocab_size=400), attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, use_mamba_kernels=False, num_experts=2)):
        bad("state|layers of type", m=AutoModelForCausalLM.from_config(config), p=[1])
    long = AutoModelForCausalLM.from_config(Phi3Config(**COMMON | dict(original_max_position_embeddings=16, max_position_embeddings=64), rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.] * 4, long_factor=[2.] * 4)))
    bad("more than 16 tokens", m=long, p=[1, 2], max_new_tokens=30)
    generate_memento(long, TOK, [1, 2], max_new_tokens=10)
