"Masks against the rule written out, in every form that a model takes; what a model would misread is refused."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config, Phi3Config, Qwen3Config

from tracebook.attention import check_attention_mask, join_visible_until, kv_occupancy, memento_mask, model_masks, slice_visible_until, visible_until
from tracebook.memento import parse_memento_ids
from tracebook.trace import PHI4, QWEN3, VANILLA, ContextPolicy

IDS = dict(block_start=1, block_end=2, summary_start=3, summary_end=4)
POLICIES = [VANILLA, QWEN3, PHI4, ContextPolicy(1), ContextPolicy(2), ContextPolicy(0, keep_last_block_for_answer=True), ContextPolicy(0, restart=True)]
SHAPE = dict(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)
FAMILIES = dict(llama=LlamaConfig(**SHAPE), qwen3=Qwen3Config(**SHAPE, head_dim=16), phi=Phi3Config(**SHAPE, pad_token_id=0), olmo=Olmo3Config(**SHAPE | dict(num_key_value_heads=2), sliding_window=6, pad_token_id=0))
tokens = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def column(ids, policy=QWEN3, **kw): return visible_until(parse_memento_ids(ids, IDS), len(ids), policy, **kw)


def rule(until, documents=None, window=None):
    "Query by query, key by key."
    n = len(until)
    seen = lambda q, k: k <= q < until[k] and (documents is None or documents[q] == documents[k]) and (window is None or q - k < window)
    return torch.tensor([[bool(seen(q, k)) for k in range(n)] for q in range(n)])


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: AutoModelForCausalLM.from_config(c, dtype=torch.float64, attn_implementation="sdpa").eval() for name, c in FAMILIES.items()}


@torch.no_grad()
def logits(model, ids, mask=None, **kw): return model(input_ids=torch.tensor(ids if isinstance(ids[0], list) else [ids]), attention_mask=mask, use_cache=False, **kw).logits


@settings(max_examples=150, deadline=None)
@given(ids=tokens, policy=st.sampled_from(POLICIES), window=st.none() | st.integers(1, 9), sees=st.booleans())
def test_the_rule(ids, policy, window, sees):
    until = column(ids, policy, summary_end_sees_block=sees)
    want = rule(until.tolist(), window=window)
    assert torch.equal(memento_mask(until, window=window, format="bool")[0, 0], want)
    additive = memento_mask(until, window=window, dtype=torch.bfloat16)[0, 0]
    assert torch.equal(additive == 0, want) and (additive[~want] == torch.finfo(torch.bfloat16).min).all()
    assert want.diagonal().all()
    if window is None: assert want.sum(1).tolist() == kv_occupancy(until).occupancy.tolist()


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(tokens, min_size=1, max_size=4), policy=st.sampled_from(POLICIES), extra=st.integers(0, 5))
def test_documents_and_padding(parts, policy, extra):
    columns = [column(p, policy) for p in parts]
    row, documents = join_visible_until(columns)
    n = len(row)
    mask = memento_mask(row, document_ids=documents, pad_to=n + extra, format="bool")[0, 0]
    assert torch.equal(mask[:n, :n], rule(row.tolist(), documents.tolist()))
    at = 0
    for c in columns:
        assert torch.equal(mask[at:at + len(c), at:at + len(c)], rule(c.tolist())) and not mask[at:at + len(c), :at].any()
        at += len(c)
    assert torch.equal(mask[n:], torch.eye(n + extra, dtype=torch.bool)[n:])
    together = memento_mask(columns, format="bool")
    for i, c in enumerate(columns): assert torch.equal(together[i, 0, :len(c), :len(c)], rule(c.tolist())) and torch.equal(together[i, 0, len(c):], torch.eye(together.shape[-1], dtype=torch.bool)[len(c):])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), ids=tokens, policy=st.sampled_from(POLICIES))
def test_cuts_are_slices(data, ids, policy):
    start = data.draw(st.integers(0, len(ids)))
    end = data.draw(st.integers(start, len(ids)))
    until = column(ids, policy)
    if start < end: assert torch.equal(memento_mask(slice_visible_until(until, start, end), format="bool")[0, 0], memento_mask(until, format="bool")[0, 0, start:end, start:end])
    assert len(slice_visible_until(until, start, end)) == end - start


@settings(max_examples=60, deadline=None)
@given(lag=st.lists(st.integers(1, 6), min_size=1, max_size=40), documents=st.data())
def test_columns_and_documents_in_any_order(lag, documents):
    "Columns with many runs, and documents that come back, go another way through the code."
    until = torch.arange(len(lag)) + torch.tensor(lag)
    docs = documents.draw(st.lists(st.integers(0, 3), min_size=len(lag), max_size=len(lag)))
    assert torch.equal(memento_mask(until, document_ids=docs, format="bool")[0, 0], rule(until.clamp(max=len(lag)).tolist(), docs))


def some_ids(n=48, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    while len(out) < n: out += [1, *rng.integers(5, 30, 5), 2, 3, *rng.integers(5, 30, 2), 4]
    return [int(i) for i in out[:n]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.label)
def test_hidden_is_without_influence(models, family, policy):
    "What a query may not see, by any way through the layers, does not change its logits."
    model, ids = models[family], some_ids()
    until = column(ids, policy)
    direct = rule(until.tolist()).double()
    reach = torch.linalg.matrix_power(direct, len(model.model.layers)) > 0
    masks = model_masks(model, until, dtype=torch.float64)
    before = logits(model, ids, masks)[0]
    for k in (2, 12, 22):
        changed = [*ids[:k], 31 - ids[k] % 3, *ids[k + 1:]]
        moved = (logits(model, changed, masks)[0] - before).abs().amax(1) > 0
        assert moved[k] and not (moved & ~reach[:, k]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_never_is_causal(models, family):
    model, ids = models[family], some_ids()
    torch.testing.assert_close(logits(model, ids, model_masks(model, column(ids, VANILLA), dtype=torch.float64)), logits(model, ids), atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_separate(models, family):
    model, parts = models[family], [some_ids(33, 1), some_ids(20, 2), some_ids(7, 3)]
    row, documents = join_visible_until([column(p) for p in parts])
    positions = torch.tensor([[i for p in parts for i in range(len(p))]])
    masks = check_attention_mask(model, model_masks(model, row, document_ids=documents, pad_to=64, dtype=torch.float64), torch.cat([positions, torch.arange(4)[None]], 1))
    packed = logits(model, sum(parts, []) + [0] * 4, masks, position_ids=torch.cat([positions, torch.arange(4)[None]], 1))[0]
    assert packed.isfinite().all()
    for p, got in zip(parts, packed[:60].split([len(p) for p in parts])): torch.testing.assert_close(got, logits(model, p, model_masks(model, column(p), dtype=torch.float64))[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["additive", "bool", "zeros and ones", "integers", "three dimensions", "flex"])
def test_right_or_refused(models, family, implementation, form):
    "No form of a mask gives other logits without a word."
    model, ids = models[family], some_ids()
    until = column(ids)
    mask = dict(additive=lambda: memento_mask(until, dtype=torch.float64), bool=lambda: memento_mask(until, format="bool"), flex=lambda: memento_mask(until, format="flex")).get(form, lambda: {"zeros and ones": torch.Tensor.double, "integers": torch.Tensor.long, "three dimensions": lambda m: m[0]}[form](memento_mask(until, format="bool")))()
    want = logits(model, ids, memento_mask(until, dtype=torch.float64))
    model.set_attn_implementation(implementation)
    try: check_attention_mask(model, mask)
    except ValueError as e: assert "memento_mask" in str(e)
    else:
        torch.testing.assert_close(logits(model, ids, mask), want, atol=1e-6, rtol=0)  # eager computes its softmax in float32
        assert form == "additive" or (form, implementation) == ("bool", "sdpa")
    finally: model.set_attn_implementation("sdpa")


def test_flex_is_dense():
    "The rule that flex attention gets, and what a model makes of it."
    ids = some_ids(130)
    row, documents = join_visible_until([column(ids[:70]), column(ids[70:])])
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"], dtype=torch.float32, attn_implementation="sdpa").eval()
    positions = torch.tensor([[*range(70), *range(60)]])
    dense = logits(model, ids, memento_mask(row, document_ids=documents), position_ids=positions)
    model.set_attn_implementation("flex_attention")
    block = check_attention_mask(model, memento_mask(row, document_ids=documents, format="flex"), positions)
    torch.testing.assert_close(logits(model, ids, block, position_ids=positions), dense, atol=1e-4, rtol=0)


@pytest.mark.cuda
def test_flex_on_a_gpu_forward_and_backward():
    "On a CPU flex attention has no backward pass."
    ids = some_ids(300)
    until = column(ids)
    config = LlamaConfig(**SHAPE | dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)) # heads of 64: the compiled kernel wants 16 at least
    model, found = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").to("cuda"), []
    for implementation, mask in (("sdpa", memento_mask(until, device="cuda")), ("flex_attention", memento_mask(until, format="flex", device="cuda"))):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        given = torch.tensor([ids], device="cuda")
        loss = model(input_ids=given, labels=given, attention_mask=mask, use_cache=False).loss
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (dense, dense_grads), (flex, flex_grads) = found
    assert flex == pytest.approx(dense, rel=1e-3)
    assert (flex_grads - dense_grads).norm() < 1e-2 * dense_grads.norm()


def test_refusals(models):
    until = column(some_ids())
    assert "model_masks" in _refused(models["olmo"], memento_mask(until))
    assert "leave attention_mask out" in _refused(models["qwen3"], torch.ones(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert "gaps" in _refused(models["qwen3"], None, torch.tensor([[0, 1, 5, 6]]))
    assert _refused(models["qwen3"], None, torch.tensor([[0, 1, 2, 0, 1, 2]])) is None
    for bad in (dict(format="dense"), dict(dtype=torch.int64), dict(format="bool", dtype=torch.float32), dict(window=0), dict(document_ids=[1, 2])):
        with pytest.raises(ValueError): memento_mask(until, **bad)
    with pytest.raises(ValueError, match="token 0 could not see itself"): memento_mask(torch.zeros(3, dtype=torch.long))


def _refused(model, mask, positions=None):
    try: check_attention_mask(model, mask, positions)
    except ValueError as e: return str(e)
