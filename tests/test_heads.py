"""Heads and search: each row of the table of functions with values worked out by hand, and the algorithm against a naive one.

Upstream is SimpleBerry/LLaMA-O1, `online_train.py` at 53265e0; what it does otherwise stands in each test's docstring.
"""
import json
import math
import random
from collections import Counter
from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Trainer

from tracebook import heads as H
from tracebook.heads import *
from tracebook.masking import collate
from tracebook.sources import sample_traces
from tracebook.thoughts import THOUGHT_TOKENS, ThoughtTree, parse_thoughts, value_to_rating_token
from tracebook.tokens import make_tokenizer

POSITIVE, NEGATIVE = ("<start_of_rating><%s_rating><end_of_rating>" % r for r in ("positive", "negative"))


def node_text(father, local, said, rating=""): return f"<start_of_father_id>{father}<end_of_father_id><start_of_local_id>{local}<end_of_local_id><start_of_thought>{said}<end_of_thought>{rating}"


def pears():
    "0 problem, 1 good step, 2 critic of 1, 3 bad step, 4 conclusion below 1."
    tree = ThoughtTree.build("3 bags of 4 pears. How many pears?")
    one = tree.add(tree.root, " 3*4=<<3*4=12>>12 ", value=log(.9))
    tree.add(one, " 12 < 13, and right.", type="critic", rating="unknown")
    tree.add(tree.root, " 3+4=7 ", value=log(.2))
    tree.add(one, " \\box{12}", type="conclusion", value=log(.5))
    return tree


TEXTS = [node_text(-1, 0, "<problem>3 bags of 4 pears. How many pears?", POSITIVE), node_text(0, 1, " 3*4=<<3*4=12>>12 ", POSITIVE),
         node_text(1, 2, "<critic> 12 < 13, and right.", "<start_of_rating><unknown_rating><end_of_rating>"), node_text(0, 3, " 3+4=7 ", NEGATIVE), node_text(1, 4, "<conclusion> \\box{12}", POSITIVE)]


@pytest.fixture(scope="module")
def tok():
    out = make_tokenizer([pears().to_text(), *sample_traces()["response"][:3]], 500)
    add_thought_tokens(out)
    return out

def shape(tok): return dict(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=.3, pad_token_id=0, bos_token_id=None, eos_token_id=None)

@pytest.fixture(scope="module")
def qwen(tok):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**shape(tok), intermediate_size=64, num_key_value_heads=2, head_dim=8)).eval()

@pytest.fixture(scope="module")
def gpt2(tok):
    "Learned positions: whoever pads without saying so is found out."
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=.3, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()

@pytest.fixture(scope="module")
def gemma2(tok):
    "The family of the published base, here with a window that is shorter than a prompt."
    torch.manual_seed(2)
    return Gemma2ForCausalLM(Gemma2Config(**shape(tok), intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=24)).eval()

@pytest.fixture(params=["qwen", "gpt2", "gemma2"])
def model(request): return request.getfixturevalue(request.param)


# ---- strings

def test_hints_and_actions():
    "Upstream gives a conclusion the hint of critics, and tells the answer 'None'."
    assert META_ACTIONS == ("<expansion>", "<problem>", "<critic>", "<refine>", "<conclusion>")
    assert HINTS == {
        "rationale": "<hint> Try generate a reasonable rationale solution that can got final answer {GT}</hint>",
        "divide_and_conquer": "<hint> Try divide the problem into smaller easier sub-problems and solve them divide-and-conquer. </hint>",
        "critic": "<hint> Point out the potential flaws in the current solution. </hint>",
        "refine": "<hint> Try to refine the current solution for higher quality. </hint>",
        "conclusion": r"<hint> Try to summarize the current solution and draw a conclusion. Final answer should bracket in \box{answer} </hint>"}
    assert [hint_for(m, "{12}") for m in ("", *META_ACTIONS)] == [HINTS["rationale"].replace("{GT}", "{12}")] * 2 + [HINTS[k] for k in ("divide_and_conquer", "critic", "refine", "conclusion")]
    assert hint_for("expansion") == ""


def test_value_to_rating_token():
    "Upstream writes <unknow_rating>, and overflows above 709."
    for value, name in ((0, "positive"), (-.1, "positive"), (log(.5), "positive"), (log(.5) - 1e-9, "negative"), (-5, "negative"), (-math.inf, "negative"), (.001, "unknown"), (math.nan, "unknown"), (1e9, "unknown")):
        assert value_to_rating_token(value) == f"<{name}_rating>"


def test_path_to_string():
    "Upstream doubles the root's header: its text holds it already."
    tree = pears()
    assert path_to_string(None) == ""
    assert path_to_string(tree.root) == TEXTS[0]
    assert path_to_string(tree.nodes[2]) == "\n".join(TEXTS[:3])
    assert path_to_string(parse_thoughts(tree.to_text()).nodes[2]) == "\n".join(TEXTS[:3])


def test_tree_to_string():
    "Upstream ends a leaf with a newline, so that siblings are parted by blank lines."
    tree = pears()
    assert tree_to_string(tree.root) == "\n".join(TEXTS[i] for i in (0, 1, 2, 4, 3))
    assert tree_to_string(tree.nodes[1]) == "\n".join(TEXTS[i] for i in (1, 2, 4))
    assert selection_head_template(tree) == tree_to_string(tree.root) + "\n<start_of_father_id>"


def test_problem_declaration_template():
    "Upstream makes it the text of the root."
    assert problem_declaration_template("1+1?") == node_text(-1, 0, "<problem>1+1?")
    assert parse_thoughts(problem_declaration_template("1+1?")).root.text == "1+1?"


def test_numbers_are_unique():
    "get_max_node_id_in_tree: upstream recurses without end, or gives a number twice."
    tree = pears()
    tree.add(tree.nodes[4], " a "), tree.add(tree.root, " b ")
    assert [n.local_id for n in tree] == [*range(7)] and tree.next_id == 7


def test_policy_head_template():
    tree, opened = pears(), "<start_of_father_id>1<end_of_father_id><start_of_local_id>5<end_of_local_id><start_of_thought>"
    assert policy_head_template(tree.nodes[1], 5) == "\n".join([*TEXTS[:2], opened])
    assert policy_head_template(tree.nodes[1], 5, "<critic>", HINTS["critic"]) == "\n".join([TEXTS[0], TEXTS[1] + HINTS["critic"], opened + "<critic>"])
    assert policy_head_template(None, 0, hint="<hint> x </hint>") == "<hint> x </hint>\n" + opened.replace(">1<", ">-1<").replace(">5<", ">0<")
    with pytest.raises(ValueError, match="choose"): policy_head_template(None, 0, "<guess>")


def test_value_head_template():
    "Upstream puts a newline before the root."
    tree = pears()
    assert value_head_template(tree.nodes[2]) == "\n".join([*TEXTS[:2], node_text(1, 2, "<critic> 12 < 13, and right.")]) + "<start_of_rating>"
    assert value_head_template(tree.root) == node_text(-1, 0, "<problem>3 bags of 4 pears. How many pears?") + "<start_of_rating>"


def test_clean_generated_text():
    "Upstream cuts the last character where the tag is absent."
    for text, want in (("abc<end_of_thought> d <end_of_thought>", "abc"), ("abc", "abc"), ("abc<end_of_though", "abc<end_of_though"), ("", ""), ("<end_of_thought>", "")):
        assert clean_generated_text(text) == want


def test_deep_trees():
    "No recursion, and a path in time proportional to its length."
    tree = ThoughtTree.build("Count.")
    for i in range(50_000): tree.add(i, f" {i} ", value=0)
    assert path_to_string(tree.nodes[-1]) == tree_to_string(tree.root)
    assert path_to_string(tree.nodes[-1]).count("\n") == 50_000
    assert [*path_strings(pears())] == [path_to_string(n) for n in pears()]


def test_malformed_trees_have_strings():
    tree = parse_thoughts(" ".join([node_text("x", "y", " a "), node_text(9, 1, " b ", "<start_of_rating>good<end_of_rating>"), node_text(1, 1, " c ", POSITIVE), node_text(-1, 0, "<problem>p")]))
    for n in tree: assert value_head_template(n) in path_to_string(n) and "None" not in policy_head_template(n, 7)
    assert path_to_string(tree.nodes[3]).endswith(POSITIVE) and path_to_string(tree.nodes[1]).endswith("<unknown_rating><end_of_rating>")


# ---- tokens

def test_add_thought_tokens():
    tok = make_tokenizer(sample_traces()["response"][:3], 400)
    with pytest.raises(ValueError, match="add_thought_tokens"): thought_token_ids(tok)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape(tok), intermediate_size=64))
    before = model.get_input_embeddings().weight.detach().clone()
    done = add_thought_tokens(tok, model)
    assert done.added == THOUGHT_TOKENS and done.resized == (400, 415) and [*done.ids.values()] == [*range(400, 415)] == [*thought_token_ids(tok).values()]
    rows = model.get_input_embeddings().weight.detach()
    assert torch.equal(rows[:400], before)
    means = [before[tok(" " + w).input_ids].mean(0) for w in ("critic", "flaw", "check")]
    assert abs(float((rows[done.ids["<critic>"]] - sum(means) / 3).std()) - .01) < .006
    assert model.config.rating_token_ids == [done.ids["<positive_rating>"], done.ids["<negative_rating>"]]
    assert add_thought_tokens(tok, model)[1:5:3] == ((), ())
    assert torch.equal(rows, model.get_input_embeddings().weight)
    assert tok("a<critic>b").input_ids[1] == done.ids["<critic>"]


# ---- heads

def slow_value(model, tok, node):
    with torch.no_grad(): scores = model(tok(value_head_template(node), return_tensors="pt").input_ids).logits[0, -1]
    good, bad = (exp(float(scores[tok.convert_tokens_to_ids(f"<{r}_rating>")])) for r in ("positive", "negative"))
    return log(good / (good + bad))


@pytest.mark.parametrize("size", [1, 2, 8])
def test_value_heads(model, tok, size):
    "Upstream reads position -2 of every row, padded or not."
    tree = pears()
    want = [slow_value(model, tok, n) for n in tree]
    assert compute_value_heads(model, tok, tree.nodes, batch_size=size) == pytest.approx(want, abs=1e-4)
    assert compute_value_head(model, tok, tree.nodes[2]) == pytest.approx(want[2], abs=1e-4)
    assert model.training is False and compute_value_heads(model, tok, []) == []


def slow_candidate(model, prompt, ids):
    "Mean log-probability, entropy and varentropy, token by token."
    sums = np.zeros(3)
    for k, i in enumerate(ids):
        with torch.no_grad(): scores = model(torch.tensor([[*prompt, *ids[:k]]])).logits[0, -1].double().tolist()
        top = max(scores)
        total = sum(exp(s - top) for s in scores)
        logs = [s - top - log(total) for s in scores]
        entropy = -sum(exp(l) * l for l in logs)
        sums += logs[i], entropy, sum(exp(l) * (l + entropy) ** 2 for l in logs)
    return sums / len(ids)


def test_policy_head_against_a_loop(model, tok):
    "Upstream shifts the scores by one, and divides by 0 where nothing was written."
    tree = pears()
    found = compute_policy_head(model, tok, tree.nodes[1], 4, "<refine>", hint=HINTS["refine"], max_new_tokens=5, seed=4)
    prompt = tok(policy_head_template(tree.nodes[1], 5, "<refine>", HINTS["refine"])).input_ids
    slow = [slow_candidate(model, prompt, c.ids) for c in found]
    for c, (logprob, entropy, varentropy) in zip(found, slow): assert (c.logprob, c.entropy, c.varentropy) == pytest.approx((logprob, entropy, varentropy), abs=1e-3)
    total = sum(exp(x[0]) for x in slow)
    assert [c.probability for c in found] == pytest.approx([exp(x[0]) / total for x in slow], abs=1e-4)
    assert {c.type for c in found} == {"refine"} and all(c.state == "<refine>" + c.text for c in found)


def test_company_makes_no_difference(model, tok):
    nodes = [*pears().nodes, *pears().nodes[1:]]
    one = [compute_policy_heads(model, tok, [n], 2, max_new_tokens=4, seed=1, batch_size=1)[0] for n in nodes]
    all_ = compute_policy_heads(model, tok, nodes, 2, max_new_tokens=4, seed=1, batch_size=8)
    assert [[c.ids for c in cs] for cs in one] == [[c.ids for c in cs] for cs in all_]
    assert [c.logprob for cs in one for c in cs] == pytest.approx([c.logprob for cs in all_ for c in cs], abs=1e-4)
    other = compute_policy_heads(model, tok, nodes, 2, max_new_tokens=4, seed=2)
    assert [[c.ids for c in cs] for cs in one] != [[c.ids for c in cs] for cs in other]




def forced(model, tok, text, monkeypatch, **more):
    "The candidate of a model that writes a text, whatever it thinks."
    ids = iter(tok(text).input_ids)
    def call(self, _, scores):
        self.notes.append(torch.zeros(3, len(scores)))
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([next(ids)]), 0)
    with monkeypatch.context() as m:
        m.setattr(H._Sampler, "__call__", call)
        return compute_policy_head(model, tok, pears().nodes[1], 1, max_new_tokens=len(tok(text).input_ids), **more)[0]


@pytest.mark.parametrize("written, kind, text, complete", [
    (" 12 pears<end_of_thought>", "expansion", " 12 pears", True), ("<end_of_thought>", "expansion", "", True), (" 12 pears", "expansion", " 12 pears", False),
    ("<critic> so?<end_of_thought>", "critic", " so?", True), (" a<start_of_father_id>", "expansion", " a", False), (" a<positive_rating>", "expansion", " a", False),
    (" a <critic> b<end_of_thought>", "expansion", " a <critic> b", True), ("<expansion><refine> b<end_of_thought>", "refine", " b", True)])
def test_what_is_written(qwen, tok, monkeypatch, written, kind, text, complete):
    "A thought ends at its end; what cannot stand in a thought ends it too, and is told."
    c = forced(qwen, tok, written, monkeypatch)
    assert (c.type, c.text, c.complete, len(c.ids)) == (kind, text, complete, len(tok(written).input_ids))
    tree = pears()
    back = parse_thoughts((tree.add(tree.root, c.text, type=c.type, value=-1), tree)[1].to_text())
    assert (back.nodes[-1].type, back.nodes[-1].text) == (kind, text)


def test_settings_of_the_model_are_set_aside(qwen, tok):
    node = pears().nodes[1]
    want = compute_policy_head(qwen, tok, node, 2, max_new_tokens=4)
    kept = dict(repetition_penalty=3., top_k=1, temperature=.1, no_repeat_ngram_size=2, min_length=900)
    old = {k: getattr(qwen.generation_config, k) for k in kept}
    try:
        for k, v in kept.items(): setattr(qwen.generation_config, k, v)
        assert compute_policy_head(qwen, tok, node, 2, max_new_tokens=4) == want
    finally:
        for k, v in old.items(): setattr(qwen.generation_config, k, v)


def test_sampling_follows_the_temperature():
    "Frequencies against softmax(scores / T)."
    scores, T, n = torch.tensor([[1., 0., -1., -torch.inf]]), 1.5, 4000
    sampler = H._Sampler([str(i) for i in range(n)], T)
    drawn = sampler(None, scores.repeat(n, 1)).argmax(1)
    want = (scores[0] / T).softmax(0)
    assert torch.bincount(drawn, minlength=4).div(n).tolist() == pytest.approx(want.tolist(), abs=.03)
    p = scores[0, :3].double().softmax(0).tolist()
    entropy = -sum(x * log(x) for x in p)
    assert sampler.notes[0][1:, 0].tolist() == pytest.approx([entropy, sum(x * (log(x) + entropy) ** 2 for x in p)], abs=1e-5)
    with pytest.raises(ValueError, match="above 0"): compute_policy_heads(None, None, [], temperature=0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(90, 400), seed=st.integers(0, 5))
def test_truncation_leaves_whole_nodes(tok, limit, seed):
    rng, tree = random.Random(seed), ThoughtTree.build("Count.")
    for i in range(40): tree.add(i, " x" * rng.randint(0, 12), value=-1)
    last = tree.nodes[-1]
    whole = [policy_head_template(last, 41), value_head_template(last)]
    prompts = [H._prompts(tok, [last], limit, lambda p, i: H._policy_pieces(p, 41), 2)[0], H._prompts(tok, [last], limit, lambda p, i: H._value_pieces(p), 1)[0]]
    for text, prompt in zip(whole, prompts):
        got = tok.decode(prompt.ids)
        ids = tok(text).input_ids
        starts = [k for k, i in enumerate(ids) if i == tok.convert_tokens_to_ids("<start_of_father_id>")]
        best = next(k for k in starts if len(ids) - k <= limit) # as many nodes as fit
        assert text.endswith(got) and got.startswith("<start_of_father_id>") and prompt.ids == ids[best:] and prompt.dropped == starts.index(best)


def test_first_token_of_a_tokenizer(tok):
    "A BOS is put before each row, and counts."
    import copy
    from tokenizers import processors
    with_bos = copy.deepcopy(tok)
    with_bos.add_special_tokens(dict(bos_token="<s>"))
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", with_bos.bos_token_id)])
    row, plain = (tokenize_policy_predict(pears().nodes[2], t) for t in (with_bos, tok))
    assert row["input_ids"][0].tolist() == [with_bos.bos_token_id, *plain["input_ids"][0].tolist()]
    assert torch.equal(row["target"], plain["target"])
    got, = thought_rows([pears()], with_bos)
    assert got["input_ids"][0] == with_bos.bos_token_id and got["labels"][0] == -100 and -100 not in got["labels"][1:]


# ---- rows

def test_tokenize_policy_predict(tok):
    "Upstream tokenizes the target alone, with a BOS of its own."
    tree = pears()
    for side in ("left", "right"):
        out = tokenize_policy_predict(tree.nodes, tok, padding_side=side)
        assert [*out] == ["input_ids", "attention_mask", "target", "target_attention_mask"]
        for i, n in enumerate(tree):
            text = tok.decode(out["input_ids"][i][out["attention_mask"][i] == 1])
            said = tok.decode(out["target"][i][out["target_attention_mask"][i] == 1])
            assert (text, said) == (policy_head_template(n.parent, n.local_id) + n.tag + n.text, n.tag + n.text)
        pad = out["attention_mask"][0] == 0
        assert bool(pad[0]) == (side == "left") and bool(pad[-1]) == (side == "right")
    assert tok.decode(tokenize_policy_predict(tree.nodes[3], tok, end=True)["target"][0]) == " 3+4=7 <end_of_thought>"


def test_tokenize_value_predict(tok):
    tree = pears()
    out = tokenize_value_predict(tree.nodes, tok)
    assert [*out] == ["value_input_ids", "value_attention_mask"]
    for i, n in enumerate(tree): assert tok.decode(out["value_input_ids"][i][out["value_attention_mask"][i] == 1]) == value_head_template(n) + "<positive_rating>"


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_passes(model, tok, side):
    "Batch 1 equals batch 8, against loops. Upstream is right for batch 1 or left padding, and reads ratings one token late."
    nodes = [*pears().nodes, *pears().nodes[1:4]]
    policy, value = tokenize_policy_predict(nodes, tok, padding_side=side), tokenize_value_predict(nodes, tok, padding_side=side)
    with torch.no_grad():
        got, rated = forward_policy_predict(model, policy), forward_value_predict(model, value)
        ones = [forward_policy_predict(model, tokenize_policy_predict([n], tok, padding_side=side))[0] for n in nodes]
        ones_rated = torch.cat([forward_value_predict(model, tokenize_value_predict([n], tok)) for n in nodes])
    loss = forward_policy_predict(model, policy).sum() + forward_value_predict(model, value).sum()
    assert torch.autograd.grad(loss, model.get_input_embeddings().weight)[0].abs().sum() > 0
    assert rated.shape == (8, 2) and torch.allclose(rated, ones_rated, atol=1e-3)
    assert rated.log_softmax(1)[:, 0].tolist() == pytest.approx([slow_value(model, tok, n) for n in nodes], abs=1e-3)
    for i, n in enumerate(nodes):
        there = policy["target_attention_mask"][i] == 1
        assert torch.allclose(got[i][there], ones[i], atol=1e-3) and not got[i][~there].any()
        ids = tok(policy_head_template(n.parent, n.local_id) + n.tag + n.text, return_tensors="pt").input_ids
        with torch.no_grad(): logs = model(ids).logits[0].log_softmax(-1)
        k = int(there.sum())
        assert got[i][there].tolist() == pytest.approx([float(logs[j - 1, ids[0, j]]) for j in range(ids.shape[1] - k, ids.shape[1])], abs=1e-3)


def test_rating_ids(qwen, tok):
    batch = tokenize_value_predict(pears().nodes, tok)
    plain = dict(batch)
    with pytest.raises(ValueError, match="add_thought_tokens"): forward_value_predict(qwen, plain)
    qwen.config.rating_token_ids = batch.rating_ids
    try: assert torch.equal(forward_value_predict(qwen, plain), forward_value_predict(qwen, batch))
    finally: del qwen.config.rating_token_ids


def learnt(row, tok): return tok.decode([i for i in row["labels"] if i != -100])


def test_thought_rows(tok):
    tree = pears()
    rows = {k: thought_rows([tree, tree.to_text(), dict(text=tree.to_text())], tok, k) for k in ("pretrain", "policy", "value")}
    assert {k: len(r) for k, r in rows.items()} == dict(pretrain=3, policy=12, value=9) and rows["value"].left_out == {"no rating, or an unknown one": 3}
    for r in rows["pretrain"]: assert r["labels"] == r["input_ids"] and tok.decode(r["input_ids"]) == tree.to_text()
    assert [learnt(r, tok) for r in rows["policy"]][:4] == [n.tag + n.text for n in tree.nodes[1:]]
    assert [(learnt(r, tok), r["node"]) for r in rows["value"]][:3] == [("<positive_rating>", 1), ("<negative_rating>", 3), ("<positive_rating>", 4)]
    for r in rows["value"]: assert r["labels"][-1] == r["input_ids"][-1] and set(r["labels"][:-1]) == {-100}
    for r in rows["policy"]: assert tok.decode(r["input_ids"]) == policy_head_template(tree.nodes[r["node"]].parent, r["node"]) + learnt(r, tok)
    short = thought_rows([tree], tok, "policy", max_length=60)
    assert all(len(r["input_ids"]) <= 60 and learnt(r, tok) == tree.nodes[r["node"]].tag + tree.nodes[r["node"]].text for r in short)
    assert thought_rows([tree], tok, max_length=20).left_out == {"does not fit into 20 tokens": 1}
    broken = parse_thoughts(tree.to_text().replace(" 3+4=7 <end_of_thought>", " 3+4=7 ").replace(" 12 < 13, and right.", ""))
    assert thought_rows([broken], tok, "policy", end=True).left_out == {"a thought without its end": 1}
    assert [learnt(r, tok) for r in thought_rows([broken], tok, "policy")] == [" 3*4=<<3*4=12>>12 ", "<critic>", " 3+4=7 ", "<conclusion> \\box{12}"]
    assert [learnt(r, tok) for r in thought_rows([broken], tok, "policy", end=True)][1] == "<critic><end_of_thought>"
    assert len(thought_rows([tree] * 800, tok, "policy")) == 3200 and len(thought_rows([], tok)) == 0
    with pytest.raises(ValueError, match="choose pretrain"): thought_rows([tree], tok, "chat")
    with pytest.raises(TypeError, match="item 0"): thought_rows([3], tok)


def test_no_hint_is_ever_learnt(tok):
    "Hints belong to prompts; upstream keeps them out of rows too."
    hinted = pears().to_text().replace(POSITIVE, POSITIVE + HINTS["critic"])
    tree = parse_thoughts(hinted)
    assert tree.nodes[1].hint
    for kind in ("pretrain", "policy", "value"):
        for row in thought_rows([tree], tok, kind): assert "hint>" not in tok.decode(row["input_ids"])
    assert "hint>" not in tok.decode(tokenize_policy_predict(tree.nodes, tok)["input_ids"][2])


def test_published_arguments(tmp_path):
    for devices, accumulated in ((1, 8), (2, 4), (8, 1), (16, 1)): assert H._published(devices)["gradient_accumulation_steps"] == accumulated
    a = published_arguments(tmp_path, use_cpu=True)
    assert a.per_device_train_batch_size * a.gradient_accumulation_steps * max(torch.cuda.device_count(), 1) == 8
    assert (a.learning_rate, a.seed, a.adam_beta1, a.adam_beta2, a.adam_epsilon, a.lr_scheduler_type, a.num_train_epochs, a.per_device_eval_batch_size) == (5e-5, 42, .9, .999, 1e-8, "cosine", 1, 8)
    assert published_arguments(tmp_path, use_cpu=True, learning_rate=1e-3).learning_rate == 1e-3


@pytest.mark.parametrize("kind", ["pretrain", "policy", "value"])
def test_rows_train(tok, tmp_path, kind):
    torch.manual_seed(0)
    pupil = LlamaForCausalLM(LlamaConfig(**{**shape(tok), "initializer_range": .02}, intermediate_size=64))
    a = published_arguments(tmp_path, use_cpu=True, max_steps=25, learning_rate=1e-2, gradient_accumulation_steps=1, per_device_train_batch_size=4, logging_steps=5, save_strategy="no", disable_tqdm=True)
    trainer = Trainer(pupil, a, train_dataset=thought_rows([pears()], tok, kind), data_collator=collate)
    trainer.train()
    losses = [float(x["loss"]) for x in trainer.state.log_history if "loss" in x]
    assert losses[-1] < .7 * losses[0]


# ---- search

def test_sampling_meta_action():
    "Upstream keeps the first draw of a node for ever."
    tree = ThoughtTree.build("p")
    step = tree.add(tree.root, " a ", value=log(.8))
    tree.add(tree.root, " b ", value=log(.2)), tree.add(step, " c", type="critic", value=log(.5)), tree.add(step, " d", type="critic")
    M = transition_matrix(tree)
    assert M[1].tolist() == pytest.approx([math.e / (math.e + 4)] + [1 / (math.e + 4)] * 4)
    assert M[0].tolist() == pytest.approx([(sqrt(math.e) if k == 2 else 1) / (sqrt(math.e) + 4) for k in range(5)])
    assert M[2:].tolist() == [[.2] * 5] * 3
    assert transition_matrix(tree, "mean")[1, 0] == pytest.approx(exp(.5) / (exp(.5) + 4))
    drawn = Counter(sampling_meta_action(step, 6000, 3))
    assert [drawn[a] / 6000 for a in META_ACTIONS] == pytest.approx(M[0].tolist(), abs=.02)
    generator = np.random.default_rng(0)
    assert sampling_meta_action(step, 8, generator) != sampling_meta_action(step, 8, generator)
    assert set(sampling_meta_action(step, 50, 0, actions=["critic", "<refine>"])) == {"<critic>", "<refine>"}


def test_meta_compute_policy_head(qwen, tok):
    "Upstream gives all children the probability of the last one, and drops those beyond the second."
    found = meta_compute_policy_head(qwen, tok, pears().nodes[1], 4, seed=1, max_new_tokens=3)
    assert len(found) == 4 and len({c.probability for c in found}) > 1
    assert [c.probability for c in found] == pytest.approx([exp(c.logprob) / sum(exp(d.logprob) for d in found) for c in found])
    metas = sampling_meta_action(pears().nodes[1], 4, 1)
    assert all(m == "<expansion>" or c.type == m.strip("<>") for m, c in zip(metas, found))


def test_puct_scores():
    "Upstream takes a softmax of probabilities, multiplies by noise, and has no prior before the first visit."
    assert puct_scores([0, 0], [.9, .1], [0, 0], [0, 0]) == pytest.approx([1.26, .14])
    assert puct_scores([.5, .2], [.3, .1], [2, 1], [1, 3]) == pytest.approx([.5 + 1.4 * .75 * 2 / 3 + .1, .2 + 1.4 * .25 * 2 / 2 + .3])
    assert puct_scores([.5, .2], [0, 0], [0, 0], [0, 0]) == pytest.approx([1.2, .9])


SCRIPT = {"2+3*4?": [(" 3*4=12 ", .6, .5), (" 2+3=5 ", .4, .6)], " 3*4=12 ": [(" \\box{14}", .5, .3), (" \\box{24}", .5, .3)], " 2+3=5 ": [(" \\box{20}", .7, .3), (" \\box{9}", .3, .3)]}


def scripted(script):
    "A policy and a value from {thought: [(next thought, p, value)]}."
    values = {t: v for new in script.values() for t, _, v in new}
    def policy(nodes, metas, n):
        seen, out = Counter({k: len(k.children) for k in nodes}), []
        for node in nodes:
            out.append([Candidate(t, logprob=log(p)) for t, p, _ in script[node.text][seen[node]:seen[node] + n]])
            seen[node] += n
        return out
    return dict(policy=policy, value=lambda nodes: [log(values[n.text]) for n in nodes])


HAND = dict(full_at=2, leaves=1, actions=["<expansion>"], patience=None)


def test_search_by_hand():
    """The run of the chapter: visits and means after each simulation.

    Upstream discounts logarithms, and the first visit discards the prior value."""
    want = [(1, 0, 0, .45, .5, .6), (2, 1, 0, .63, .7, .6), (3, 1, 1, .42, .7, .3), (4, 2, 1, .5175, 2.3 / 3, .3), (5, 3, 1, .576, .8, .3)]
    for k, row in enumerate(want, 1):
        tree = search(problem="2+3*4?", simulations=k, verifier=box_verifier("14"), **scripted(SCRIPT), **HAND)
        infos = [n.info for n in tree.nodes[:3]]
        assert [*(i["visits"] for i in infos), *(i["mean"] for i in infos)] == pytest.approx(row, abs=1e-5)
    assert best_leaf(tree).text == " \\box{14}" and search_report(tree) == (5, 7, 1, 3, 0, 0, 0)
    assert tree.nodes[3].value == 0 and tree.nodes[4].value == pytest.approx(log(1e-6)) and tree.root.value is None


def test_patience_begins_anew():
    "Upstream counts successes over all problems."
    for _ in range(2):
        tree = search(problem="2+3*4?", simulations=50, verifier=box_verifier("14"), **scripted(SCRIPT), **HAND | dict(patience=1))
        assert search_report(tree).simulations == 2 and search_report(tree).successful == 1


def naive(script, grades, simulations, full_at, candidates, discount, scale=lambda q: q):
    "The search again, with recursion and dictionaries."
    nodes = {(): dict(text="root", N=0, Q=1., p=1., grade=None, kids=[], root=True)}
    def pick(kids):
        total, P = sum(nodes[k]["N"] for k in kids), sum(nodes[k]["p"] for k in kids)
        return max(kids, key=lambda k: (scale(nodes[k]["Q"]) + 1.4 * nodes[k]["p"] / P * sqrt(total + 1) / (1 + nodes[k]["N"]), -k[-1]))
    def simulate(at):
        n = nodes[at]
        if n["grade"] is not None: v = n["Q"]
        elif len(n["kids"]) >= full_at: v = discount * simulate(pick(n["kids"]))
        else:
            for _ in range(candidates):
                k = len(n["kids"])
                text, p, value = script(n["text"], k)
                g = grades(text)
                nodes[*at, k] = dict(text=text, N=0, Q=value if g is None else 1. if g else 1e-6, p=p, grade=g, kids=[], root=False)
                n["kids"].append((*at, k))
            v = discount * nodes[pick(n["kids"])]["Q"]
        n["N"] += 1
        n["Q"] += (v - n["Q"]) / (n["N"] + (not n["root"]))
        return v
    for _ in range(simulations): simulate(())
    return {n["text"]: (n["N"], n["Q"]) for n in nodes.values()}


def endless(seed):
    "A policy, a value and grades for a tree without an end, from a hash of the path."
    rng = lambda text, what: random.Random(f"{seed}{text}{what}").random()
    script = lambda text, k: (f"{text}.{k}", .05 + rng(f"{text}.{k}", "p"), .05 + .9 * rng(f"{text}.{k}", "v"))
    grades = lambda text: None if rng(text, "g") < .7 else rng(text, "h") < .4
    def policy(nodes, metas, n):
        seen, out = Counter({k: len(k.children) for k in nodes}), []
        for node in nodes:
            out.append([Candidate(t, logprob=log(p)) for t, p, _ in (script(node.text, seen[node] + j) for j in range(n))])
            seen[node] += n
        return out
    value = lambda nodes: [log(script(*n.text.rsplit(".", 1))[2]) for n in nodes]
    return script, grades, dict(policy=policy, value=value, verifier=lambda n: grades(n.text))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), full_at=st.integers(1, 5), candidates=st.integers(1, 3), n=st.integers(1, 60), scale=st.sampled_from(["probability", "log"]))
def test_search_against_a_naive_one(seed, full_at, candidates, n, scale):
    script, grades, answers = endless(seed)
    tree = search(problem="root", simulations=n, leaves=1, patience=None, full_at=full_at, candidates=candidates, value_scale=scale, **answers)
    want = naive(script, grades, n, full_at, candidates, .9, log if scale == "log" else lambda q: q)
    assert {k.text: k.info["visits"] for k in tree} == {k: v[0] for k, v in want.items()}
    assert [k.info["mean"] for k in tree] == pytest.approx([want[k.text][1] for k in tree])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), leaves=st.integers(1, 6), first=st.integers(1, 30), noise=st.sampled_from([0., .1]))
def test_resumed_equals_uninterrupted(seed, leaves, first, noise):
    answers, more = endless(seed)[2], dict(leaves=leaves, patience=None, seed=seed, noise=noise)
    whole = search(problem="root", simulations=40, **answers, **more)
    half = search(problem="root", simulations=first, **answers, **more)
    again = search(problem=ThoughtTree.from_dict(json.loads(json.dumps(half.to_dict()))), simulations=40, **answers)
    assert again.to_dict() == whole.to_dict() == search(problem="root", simulations=40, **answers, **more).to_dict()


def test_virtual_loss_batches():
    "Several leaves in one call; the visits of children add up to those of their parent."
    _, _, answers = endless(3)
    sizes = []
    def policy(nodes, metas, n): sizes.append(len({k.index for k in nodes})); return answers["policy"](nodes, metas, n)
    tree = search(problem="root", simulations=60, leaves=4, patience=None, **answers | dict(policy=policy))
    assert max(sizes) > 1 and len(sizes) < 45
    for n in tree:
        if n.children and n.info["visits"]: assert 0 < n.info["visits"] - sum(c.info["visits"] for c in n.children) <= 3 # 2, 4, 6 children: three expansions


def test_virtual_loss_by_hand():
    """Two leaves at a time. While node 1 is under way it scores .5/2 + .84*sqrt(2)/2 = .844, so node 2 (.6 + .56*sqrt(2) = 1.392) is next.

    Then leaf 3 is under way: node 1 scores .7*2/3 + .84*2/3 = 1.027 against .86, leaf 3 .5 + .7*sqrt(2)/2 = .995 against .990 for
    leaf 4, so the round ends with one path."""
    sizes, answers = [], scripted(SCRIPT)
    def value(nodes): sizes.append(len(nodes)); return answers["value"](nodes)
    for n, visits, means in ((2, [3, 1, 1, 0, 0, 0, 0], [.42, .7, .3]), (4, [4, 2, 1, 1, 0, 0, 0], [.5175, 2.3 / 3, .3])):
        tree = search(problem="2+3*4?", simulations=n, verifier=box_verifier("14"), **answers | dict(value=value), **HAND | dict(leaves=2))
        assert [k.info["visits"] for k in tree] == visits
        assert [k.info["mean"] for k in tree.nodes[:3]] == pytest.approx(means, abs=1e-5)
    assert sizes == [2, 4, 2, 4]


def test_search_refuses():
    _, _, answers = endless(0)
    tree = search(problem="root", simulations=3, **answers)
    tree.add(0, " by hand ", value=-1)
    with pytest.raises(ValueError, match="not made by the search"): search(problem=tree, **answers)
    with pytest.raises(ValueError, match="a model and its tokenizer"): search(problem="x")
    with pytest.raises(ValueError, match="no problem"): search(**answers)
    with pytest.raises(ValueError, match="holds no search"): search(problem=pears(), **answers)
    with pytest.raises(TypeError, match="no setting depth"): search(problem="x", depth=3, **answers)
    with pytest.raises(ValueError, match="at most 0"): search(problem="x", **answers | dict(value=lambda nodes: [.5] * len(nodes)))
    with pytest.raises(ValueError, match="at most 0"): search(problem="x", **answers | dict(value=lambda nodes: [math.nan] * len(nodes)))
    with pytest.raises(ValueError, match="one candidate"): search(problem="x", **answers | dict(policy=lambda nodes, metas, n: []))
    with pytest.raises(ValueError, match="may say True"): search(problem="x", **answers | dict(verifier=lambda n: "maybe"))


def test_search_with_a_model(qwen, tok):
    asked = dict(simulations=7, seed=5, full_at=2, heads=dict(max_new_tokens=5), verifier=box_verifier("14"))
    tree = search(qwen, tok, "2+3*4?", **asked)
    assert search(qwen, tok, "2+3*4?", **asked).to_dict() == tree.to_dict()
    half = search(qwen, tok, "2+3*4?", **asked | dict(simulations=2))
    assert search(qwen, tok, ThoughtTree.from_dict(json.loads(json.dumps(half.to_dict()))), **asked).to_dict() == tree.to_dict()
    assert "hint>" not in tree.to_text() and [n.text for n in parse_thoughts(tree.to_text())] == [n.text for n in tree]
    assert search_report(tree).broken_off > 0 and search_report(tree).cut == 0
    deep = search(qwen, tok, "2+3*4?", **asked | dict(heads=dict(max_new_tokens=5, max_length=70, hints=False)), candidates=1)
    assert search_report(deep).cut > 0 # whole nodes were left out of prompts, and it is told


# ---- experience

def line(worths, grade=""):
    "A path with these probabilities, and a grade at its end."
    tree = ThoughtTree.build("p")
    tree.root.info["mean"] = worths[0]
    for i, w in enumerate(worths[1:]): tree.add(i, f" {i} ", value=log(w))
    tree.nodes[-1].info["leaf_type"] = grade
    return tree


def test_rectify_values_from_leaf():
    "Upstream takes 0.0 for unset, counts ungraded leaves as failures, and averages means."
    tree = ThoughtTree.build("p")
    for parent, grade in ((0, ""), (1, "successful"), (1, "failed"), (1, ""), (0, "successful"), (0, "")):
        tree.add(parent, f" {len(tree)} ", value=-1).info["leaf_type"] = grade
    got = rectify_values_from_leaf(tree)
    want = [(.81 + .81e-6 + .9) / 3, (.9 + .9e-6) / 2, 1, 1e-6, None, 1, None]
    assert got[1:] == (3, 2)
    assert [v if v is None else exp(v) for v in got.values] == [w if w is None else pytest.approx(w) for w in want]
    assert [n.info["true_value_from_tree"] for n in tree] == got.values


def test_gae_by_hand():
    "Upstream sums towards the root, with a return for a reward."
    tree = line([.5, .6, .8, .7], "successful")
    assert [compute_gae_from_node(n, .9, .5) for n in tree.nodes[1:]] == pytest.approx([.1345, .21, .2])
    tree = line([.5, .6, .8, .7], "failed") # 1 becomes 0: -.8, .12-.36, .04-.108
    assert [compute_gae_from_node(n, .9, .5) for n in tree.nodes[1:]] == pytest.approx([-.068, -.24, -.8])
    tree = line([.5, .6, .8, .7]) # not graded: .9*.7-.8 = -.17, .12-.0765, .04+.45*.0435
    assert [compute_gae_from_node(n, .9, .5) for n in tree.nodes[1:]] == pytest.approx([.059575, .0435, -.17])


@settings(max_examples=50, deadline=None)
@given(worths=st.lists(st.floats(.01, 1), min_size=2, max_size=30), gamma=st.floats(0, 1), grade=st.sampled_from(["", "successful", "failed"]))
def test_gae_closed_forms(worths, gamma, grade):
    tree, T = line(worths, grade), len(worths) - 1
    end = {"": gamma * worths[-1], "successful": 1., "failed": 0.}[grade]
    one = [(end if t == T - 1 else gamma * worths[t + 1]) - worths[t] for t in range(T)]
    assert [compute_gae_from_node(n, gamma, 0) for n in tree.nodes[1:]] == pytest.approx(one)
    assert [compute_gae_from_node(n, gamma, 1) for n in tree.nodes[1:]] == pytest.approx([gamma ** (T - 1 - t) * end - worths[t] for t in range(T)], abs=1e-9)


def test_gae_where_a_path_forks():
    "Children are samples of one policy: the mean of their advantages stands for the future."
    tree = line([.5, .6])
    for grade in ("successful", "failed"): tree.add(1, f" {grade} ", value=-1).info["leaf_type"] = grade
    got = {x.node.index: x for x in collect_experience(tree, .9, .5)}
    assert [got[i].advantage for i in (1, 2, 3)] == pytest.approx([.9 * .6 - .5 + .45 * (.4 - .6) / 2, .4, -.6])
    assert [got[i].value_target for i in (1, 2, 3)] == pytest.approx([.6 + (.4 - .6) / 2, 1, 0])
    assert all(x.priority == abs(x.advantage) for x in got.values()) and 0 not in got


def test_gae_on_a_deep_tree():
    tree = line([.5] * 20_001, "successful")
    assert compute_gae_from_node(tree.nodes[1], 1, 1) == pytest.approx(.5)


def test_targets_are_probabilities():
    for seed in range(10):
        for x in collect_experience(search(problem="root", simulations=40, patience=None, **endless(seed)[2])): assert 0 <= x.value_target <= 1


def test_targets_are_probabilities_in_spite_of_rounding():
    tree = line([.5, .1])
    for said in "abc": tree.add(1, said, value=-1).info["leaf_type"] = "failed"
    assert .1 + (-.1 - .1 - .1) / 3 < 0
    assert collect_experience(tree, 1, 1)[0].value_target == 0


def test_experience_to_dataset(tok, qwen):
    tree = search(problem="2+3*4?", simulations=5, verifier=box_verifier("14"), **scripted(SCRIPT), **HAND)
    found = collect_experience(tree)
    rows = experience_to_dataset(found, tok)
    assert {*rows.column_names} == {"input_ids", "attention_mask", "target", "target_attention_mask", "value_input_ids", "value_attention_mask", "advantage", "value_target", "priority"} and len(rows) == 6
    one, two = tokenize_policy_predict([x.node for x in found], tok, padding_side="right"), tokenize_value_predict([x.node for x in found], tok, padding_side="right")
    for i, row in enumerate(rows):
        assert all(row[k.replace("input_ids", "attention_mask") if k != "target" else "target_attention_mask"] == [1] * len(row[k]) for k in ("input_ids", "target", "value_input_ids"))
        for name, batch in (("input_ids", one), ("target", one), ("value_input_ids", two)): assert row[name] == batch[name][i][:len(row[name])].tolist()
    assert rows["advantage"][:] == [x.advantage for x in found] and not rows.left_out
    assert len(experience_to_dataset([], tok)) == 0 and experience_to_dataset(found, tok, max_length=5).left_out == {"does not fit into 5 tokens": 6}
    assert qwen is not None
