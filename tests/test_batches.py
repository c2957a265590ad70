"Packing, batches, checks and joined samples against slow and plain code."
import copy
import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings, strategies as st
from rich.console import Console

from tracebook.masking import PROBLEMS, collate, diff_masks, drift, join_sampled, mask_stats, pack, tokenize_chat, tokenize_chats, verify
from tracebook.sources import sample_traces
from tracebook.tokens import make_tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHAT = [dict(role="user", content="Is 91 prime?"), dict(role="assistant", content="No, 7*13."), dict(role="user", content="And 97?"), dict(role="assistant", content="Yes.")]
TEXTS = st.text(max_size=40).filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t))
fixed = settings(max_examples=35, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tok():
    out = make_tokenizer(sample_traces()["response"])
    out.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    out.chat_template = TEMPLATE
    return out


def row(ids, trained, weights=None):
    "One document, written by hand."
    out = dict(input_ids=list(ids), labels=[i if t else -100 for i, t in zip(ids, trained)], assistant_masks=[int(t) for t in trained], position_ids=list(range(len(ids))))
    return out if weights is None else out | dict(loss_weights=[w if t else 0. for w, t in zip(weights, trained)])


@st.composite
def documents(draw, least=1, most=12, longest=20, weighted=False):
    out = []
    for n in draw(st.lists(st.integers(1, longest), min_size=least, max_size=most)):
        ids, trained = draw(st.lists(st.integers(0, 50), min_size=n, max_size=n)), draw(st.lists(st.booleans(), min_size=n, max_size=n))
        out.append(row(ids, trained, draw(st.lists(st.sampled_from([.5, 1., -1.]), min_size=n, max_size=n)) if weighted else None))
    return out


def slow_bins(lengths, room, strategy):
    "Every bin asked, in order: the definition."
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [b for b in bins if sum(lengths[j] for j in b) + lengths[i] <= room]
        if not fits: bins.append([i])
        elif strategy == "ffd": fits[0].append(i)
        else: max(fits, key=lambda b: sum(lengths[j] for j in b)).append(i)
    return bins


@given(docs=documents(least=0, most=30), room=st.integers(20, 60), strategy=st.sampled_from(["ffd", "bfd"]))
@fixed
def test_pack_is_the_slow_one(docs, room, strategy):
    packed = pack(docs, room, strategy)
    assert packed["rows"][:] == slow_bins([len(d["input_ids"]) for d in docs], room, strategy)


@pytest.mark.parametrize("strategy", ["ffd", "bfd"])
def test_pack_many(strategy):
    lengths = np.random.default_rng(0).integers(1, 100, 400).tolist()
    packed = pack([row([1] * n, [True] * n) for n in lengths], 128, strategy)
    assert packed["rows"][:] == slow_bins(lengths, 128, strategy)


@given(docs=documents(weighted=True), room=st.integers(20, 60))
@fixed
def test_packed_columns(docs, room):
    packed = pack(docs, room)
    weighted = any(w not in (0, 1) for d in docs for w in d["loss_weights"])
    assert ("loss_weights" in packed.column_names) == weighted
    assert sorted(itertools.chain(*packed["rows"])) == list(range(len(docs)))
    for r in packed:
        assert r["input_ids"] == [x for i in r["rows"] for x in docs[i]["input_ids"]]
        assert r["labels"] == [x for i in r["rows"] for x in [-100, *docs[i]["labels"][1:]]]
        assert r["assistant_masks"] == [int(x != -100) for x in r["labels"]]
        assert r["position_ids"] == [k for i in r["rows"] for k in range(len(docs[i]["input_ids"]))]
        assert r["seq_lengths"] == [len(docs[i]["input_ids"]) for i in r["rows"]]
        assert r["cu_seqlens"] == [0, *itertools.accumulate(r["seq_lengths"])] and r["cu_seqlens"][-1] == len(r["input_ids"]) <= room
        if weighted: assert r["loss_weights"] == [x for i in r["rows"] for x in [0, *docs[i]["loss_weights"][1:]]]
    assert {p.code for p in verify(packed)} <= {"nothing_trained"}


@given(docs=documents(least=2), data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_a_table_is_a_list(docs, data):
    "The same rows as a list, a table, a shuffled view of it and a table of several chunks."
    order = data.draw(st.permutations(range(len(docs))))
    table, listed = Dataset.from_list(docs).select(order), [docs[i] for i in order]
    for f in (verify, lambda d: mask_stats(d).__repr__(), lambda d: pack(d, 30)[:], lambda d: {k: v.tolist() if hasattr(v, "tolist") else v for k, v in collate(d).items()}): assert f(table) == f(listed)
    both = concatenate_datasets([table, Dataset.from_list(docs)])
    assert pack(both, 30)[:] == pack(listed + docs, 30)[:]
    assert mask_stats(both.with_format("numpy")).trained == 2 * mask_stats(docs).trained


def test_pack_refuses():
    docs = [row([1, 2], [1, 1]), row([1, 2, 3], [1, 1, 1])]
    with pytest.raises(ValueError, match="example 1 has 3 tokens"): pack(docs, 2)
    with pytest.raises(ValueError, match="example 0 has no token"): pack([row([], [])], 2)
    with pytest.raises(ValueError, match="unknown"): pack(docs, 4, "wrapped")
    with pytest.raises(ValueError, match="labels has 1"): pack([dict(input_ids=[1, 2], labels=[1])], 4)
    with pytest.raises(ValueError, match="row 1 has no loss_weights"): pack([row([1], [1], [.5]), row([1], [1])], 4)
    for n in (0, -1, True, 2.5, None):
        with pytest.raises(ValueError, match="give a number of tokens"): pack(docs, n)


def test_ids_and_labels_are_enough():
    docs = [dict(input_ids=[1, 2], labels=[1, 2]), dict(input_ids=[3, 4, 5], labels=[3, 4, 5])]
    packed = pack(docs, 5)
    assert packed[0] == dict(input_ids=[3, 4, 5, 1, 2], labels=[-100, 4, 5, -100, 2], assistant_masks=[0, 1, 1, 0, 1], position_ids=[0, 1, 2, 0, 1], seq_lengths=[3, 2], cu_seqlens=[0, 3, 5], rows=[1, 0])
    assert verify(docs) == verify(packed) == []
    assert collate(docs)["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_rows_with_the_same_room():
    "Of rows that are equally full, the first."
    docs = [row([1] * n, [1] * n) for n in (5, 5, 5, 2, 2)]
    for strategy in ("ffd", "bfd"): assert pack(docs, 7, strategy)["rows"][:] == [[0, 3], [1, 4], [2]]


def test_pack_keeps_the_description(tok):
    data = tokenize_chats(tok, [CHAT, CHAT[:2]])
    assert pack(data, 200).info.description == data.info.description != ""


@given(docs=documents(weighted=True), multiple=st.sampled_from([None, 1, 8]), pad=st.integers(0, 9))
@fixed
def test_collate_pads(docs, multiple, pad):
    batch = collate(docs, pad_to_multiple_of=multiple, pad_token_id=pad)
    width, longest = batch["input_ids"].shape[1], max(len(d["input_ids"]) for d in docs)
    assert width == (longest if multiple is None else -(-longest // multiple) * multiple)
    for i, d in enumerate(docs):
        n = len(d["input_ids"])
        assert batch["input_ids"][i].tolist() == d["input_ids"] + [pad] * (width - n)
        assert batch["labels"][i].tolist() == d["labels"] + [-100] * (width - n)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (width - n)
        assert batch["position_ids"][i].tolist() == list(range(width))
        if "loss_weights" in batch: assert batch["loss_weights"][i].tolist() == d["loss_weights"] + [0] * (width - n)
    assert ("loss_weights" in batch) == any(w not in (0, 1) for d in docs for w in d["loss_weights"])
    assert all(v.dtype == (torch.float32 if k == "loss_weights" else torch.int64) for k, v in batch.items())


@given(docs=documents(), room=st.integers(20, 50), multiple=st.sampled_from([None, 16]))
@fixed
def test_collate_without_padding(docs, room, multiple):
    packed = pack(docs, room)
    batch = collate(packed, multiple, padding_free=True)
    sizes = [n for r in packed["seq_lengths"] for n in r]
    rest = -sum(sizes) % (multiple or 1)
    sizes += [rest] * (rest > 0)
    assert batch["input_ids"].shape == (1, sum(sizes)) and "attention_mask" not in batch
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, *itertools.accumulate(sizes)]
    assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == max(sizes) and isinstance(batch["max_length_q"], int)
    assert batch["position_ids"][0].tolist() == [k for n in sizes for k in range(n)]
    assert all(batch["labels"][0, k] == -100 for k in batch["cu_seq_lens_q"][:-1].tolist())


def test_collate_takes_labels_of_first_tokens_out():
    "Two rows whose first token is trained: alone it does no harm, in one row it would leak."
    docs = [row([1, 2], [1, 1]), row([3, 4], [1, 1])]
    assert collate(docs)["labels"].tolist() == [[1, 2], [3, 4]]
    assert collate(docs, padding_free=True)["labels"].tolist() == [[-100, 2, -100, 4]]


def test_collate_refuses():
    with pytest.raises(ValueError, match="no rows"): collate([])
    with pytest.raises(ValueError, match="more than max_length=1"): collate([row([1, 2], [1, 1])], max_length=1)
    with pytest.raises(ValueError, match="give a number"): collate([row([1, 2], [1, 1])], pad_to_multiple_of=0)
    assert collate([row([1, 2], [1, 1])], max_length=5)["input_ids"].shape == (1, 5)


@pytest.fixture(scope="module")
def models():
    from transformers import AutoModelForCausalLM, Qwen3Config
    def make(dtype, attention):
        torch.manual_seed(0)
        config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    return {(d, a): make(d, a) for d in (torch.float32, torch.float64) for a in ("eager", "sdpa")}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("shape", [dict(), dict(pad_to_multiple_of=32), dict(padding_free=True), dict(padding_free=True, pad_to_multiple_of=64)])
def test_packed_logits_are_separate_logits(models, attention, dtype, close, shape):
    model, rng = models[dtype, attention], np.random.default_rng(1)
    if attention == "eager": close = max(close, 1e-6) # its softmax has 32 bits
    docs = [row(rng.integers(0, 64, n).tolist(), [True] * n) for n in (17, 1, 9, 9, 3, 12, 1, 1)]
    packed = pack(docs, 24)
    assert len(packed) > 2
    batch = collate(packed, **shape)
    run = lambda **more: model(**{k: v for k, v in (batch | more).items() if k != "labels"}).logits
    def error(logits):
        starts, worst = [0, *itertools.accumulate(len(r) for r in packed["input_ids"])], 0.
        for k, r in enumerate(packed):
            for a, b, i in zip(r["cu_seqlens"], r["cu_seqlens"][1:], r["rows"]):
                found = logits[0, starts[k] + a:starts[k] + b] if "padding_free" in shape else logits[k, a:b]
                worst = max(worst, (found - model(torch.tensor([docs[i]["input_ids"]])).logits[0]).abs().max().item())
        return worst
    assert error(run()) < close
    assert error(run(attention_mask=torch.ones_like(batch["input_ids"]))) > 1e-2
    assert error(run(use_cache=True)) > 1e-2


def test_losses_agree(models):
    "The mean over trained tokens, computed from each document alone."
    model, rng = models[torch.float64, "sdpa"], np.random.default_rng(2)
    docs = [row(rng.integers(0, 64, n).tolist(), (rng.random(n) < .6).tolist()) for n in (17, 9, 8, 3, 12)]
    total, n = 0., 0
    with torch.no_grad():
        for d in docs:
            logits, labels = model(torch.tensor([d["input_ids"]])).logits[0], torch.tensor(d["labels"])
            total += torch.nn.functional.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100, reduction="sum").item()
            n += (labels[1:] != -100).sum().item()
        for batch in (collate(docs), collate(docs, padding_free=True), collate(pack(docs, 20)), collate(pack(docs, 30, "bfd"), padding_free=True)): assert model(**batch).loss.item() == pytest.approx(total / n, abs=1e-6)


def planted(tok):
    "(code, data) with one fault each."
    enc = tokenize_chat(tok, CHAT)
    first, last = enc.assistant_masks.index(1), len(enc) - 1
    def changed(**changes):
        out = copy.deepcopy(enc)
        for name, (at, value) in changes.items(): getattr(out, name)[at] = value
        return out
    weighted = pack([tokenize_chat(tok, CHAT, eot=.5)] * 2, 400)
    packed = pack([enc, enc], 400)
    edit = lambda data, **new: [dict(r, **{k: f(r) for k, f in new.items()}) for r in data]
    yield "length", dict(input_ids=[1, 2], labels=[1])
    yield "label", changed(labels=(first, enc.input_ids[first] + 1))
    yield "mask", changed(assistant_masks=(first, 0))
    yield "mask", changed(assistant_masks=(0, 1))
    yield "weight", changed(loss_weights=(first, 0.))
    yield "weight", changed(loss_weights=(0, 1.))
    yield "weight", changed(loss_weights=(first, float("inf")))
    yield "weight", edit(weighted, loss_weights=lambda r: [float("nan") if w == .5 else w for w in r["loss_weights"]])
    yield "positions", changed(position_ids=(last, 3))
    yield "positions", edit(packed, position_ids=lambda r: list(range(len(r["input_ids"]))))
    yield "positions", dict(input_ids=[1, 2], labels=[1, 2], position_ids=[1, 2])
    yield "first_label", edit(packed, labels=lambda r: r["input_ids"], assistant_masks=lambda r: [1] * len(r["input_ids"]))
    yield "attention_mask", edit(packed, attention_mask=lambda r: [1] * len(r["input_ids"]))
    yield "documents", edit(packed, seq_lengths=lambda r: r["seq_lengths"][:-1])
    yield "documents", edit(packed, seq_lengths=lambda r: [r["seq_lengths"][0] - 1, r["seq_lengths"][1] + 1])
    yield "documents", edit(packed, cu_seqlens=lambda r: [1, *r["cu_seqlens"][1:]])
    yield "documents", edit(packed, cu_seqlens=lambda r: r["cu_seqlens"][:-1])
    yield "documents", edit(packed, cu_seqlens=lambda r: [])
    yield "documents", edit(packed, seq_lengths=lambda r: [0, *r["seq_lengths"]], cu_seqlens=lambda r: [0, *r["cu_seqlens"]])
    yield "nothing_trained", row([1, 2], [0, 0])
    yield "offsets", changed(offsets=(last, (0, 1)))
    yield "offsets", changed(offsets=(last, (len(enc.text), len(enc.text) + 1)))
    yield "messages", changed(message_ids=(2, 3))
    yield "outside", changed(labels=(3, enc.input_ids[3]), assistant_masks=(3, 1), loss_weights=(3, 1.))
    yield "missing", changed(labels=(first, -100), assistant_masks=(first, 0), loss_weights=(first, 0.))
    yield "tokens", changed(input_ids=(2, 5))


def test_each_fault_is_found(tok):
    seen = set()
    for code, data in planted(tok):
        problems = verify(data, tok)
        assert code in {p.code for p in problems}, (code, problems)
        assert all(p.code in PROBLEMS and p.message for p in problems) and len(problems) <= 2
        seen.add(code)
    assert seen == set(PROBLEMS)


def test_a_fault_is_found_in_its_row(tok):
    good = [tokenize_chat(tok, CHAT) for _ in range(5)]
    bad = copy.deepcopy(good)
    bad[3].labels[-3] = 7
    assert verify(good, tok) == []
    assert [(p.row, p.code) for p in verify(bad)] == [(3, "label")]
    table = lambda encs: Dataset.from_list([{k: e[k] for k in e.keys()} for e in encs])
    assert [(p.row, p.code) for p in verify(table(bad).select([4, 3, 0]))] == [(1, "label")]
    mixed = [dict(input_ids=[1, 2], labels=[1]), *[{k: e[k] for k in ("input_ids", "labels")} for e in bad]]
    assert [(p.row, p.code) for p in verify(mixed)] == [(0, "length"), (4, "label")]


@pytest.mark.parametrize("options", [dict(), dict(sanitize=True), dict(boundary="inside"), dict(boundary="overlap"), dict(train_on="all"), dict(eot=-.5), dict(trailing=.3, generation_prompt=.2), dict(max_length=30, truncation="left"), dict(max_length=30, truncation="right"), dict(sanitize=True, max_length=21, truncation="right")])
@given(texts=st.lists(st.one_of(TEXTS, st.sampled_from(["<|im_end|>", "a <|im_start|>b", "e\u0301", "🙂", ""])), min_size=2, max_size=4))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_what_we_make_is_right(tok, options, texts):
    chat = [dict(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(texts)]
    assert {p.code for p in verify(tokenize_chat(tok, chat, **options), tok)} <= {"nothing_trained"}


def test_a_run_ends_with_its_row():
    assert mask_stats([row([1, 2], [0, 1]), row([3], [1]), row([4, 5, 6], [1, 0, 1])]).runs == 4


@given(docs=documents(least=0, weighted=True))
@fixed
def test_stats_in_plain_python(docs):
    stats, labels = mask_stats(docs), [[x != -100 for x in d["labels"]] for d in docs]
    weights = [w for d in docs for w, x in zip(d["loss_weights"], d["labels"]) if x != -100]
    assert stats.rows == len(docs) and stats.tokens == sum(map(len, labels)) and stats.trained == sum(map(sum, labels))
    assert stats.runs == sum(k for r in labels for k, _ in itertools.groupby(r))
    assert stats.empty == [i for i, r in enumerate(labels) if not any(r)]
    assert stats.longest == max(map(len, labels), default=0)
    assert stats.shares.tolist() == pytest.approx([sum(r) / len(r) for r in labels])
    assert stats.weights == (pytest.approx((min(weights), max(weights), sum(weights))) if weights else None)
    if docs: assert (stats.length_quantiles[0], stats.length_quantiles[100]) == (min(map(len, labels)), max(map(len, labels)))
    assert f"{stats.trained:,} trained" in repr(stats)


@given(ids=st.lists(st.integers(0, 200), max_size=30), data=st.data())
@fixed
def test_diff_is_symmetric(tok, ids, data):
    a, b = (row(ids, data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), data.draw(st.lists(st.sampled_from([.5, 1.]), min_size=len(ids), max_size=len(ids)))) for _ in range(2))
    x, y = diff_masks(a, b, tok), diff_masks(b, a, tok)
    assert (x.both, x.only_a, x.only_b, x.neither, x.other_weight) == (y.both, y.only_b, y.only_a, y.neither, y.other_weight)
    swap = dict(only_a="only_b", only_b="only_a")
    assert [r._replace(kind=swap.get(r.kind, r.kind)) for r in x.runs] == y.runs
    kinds = [("neither", "only_a", "only_b", "both")[(p != 0) + 2 * (q != 0)] if not p or not q or p == q else "other_weight" for p, q in zip(a["loss_weights"], b["loss_weights"])]
    assert [k for r in x.runs for k in [r.kind] * (r.end - r.start)] == kinds
    assert diff_masks(a, a, tok).same and x.same == (a["loss_weights"] == b["loss_weights"])


@given(text=TEXTS)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_diff_shows_the_whole_text(tok, text):
    chat = [dict(role="user", content=text), dict(role="assistant", content="[/INST] <b>" + text)]
    d = diff_masks(tokenize_chat(tok, chat), tokenize_chat(tok, chat, train_on="none"))
    assert "".join(r.text for r in d.runs) == tokenize_chat(tok, chat).text
    with open("/dev/null", "w") as nowhere:
        console = Console(file=nowhere, record=True, width=10_000)
        d.show(console)
        assert "[/INST]·<b>" in console.export_text()
    assert "[/INST]·&lt;b&gt;" in d._repr_html_() and "<b>" not in d._repr_html_()


def test_diff_refuses(tok):
    with pytest.raises(ValueError, match="token 1 is 2 in one and 3"): diff_masks(([1, 2], [1, 2]), ([1, 3], [1, 3]), tok)
    with pytest.raises(ValueError, match="one has 2 tokens, the other 1"): diff_masks(([1, 2], [1, 2]), ([1], [1]), tok)
    with pytest.raises(ValueError, match="the second masking has no ids and labels"): diff_masks(([1], [1]), dict(input_ids=[1]), tok)
    with pytest.raises(ValueError, match="give the tokenizer"): diff_masks(([1], [1]), ([1], [1]))


@given(parts=st.lists(st.tuples(st.lists(st.integers(0, 300), max_size=10), st.sampled_from([True, False, .5, -1., 0])), max_size=5), chances=st.booleans())
@fixed
def test_joined_ids_are_what_came(tok, parts, chances):
    before = copy.deepcopy(parts)
    joined = join_sampled([(ids, w, [-.1] * len(ids)) if chances else (ids, w) for ids, w in parts], tok)
    assert joined.input_ids == [i for ids, _ in parts for i in ids] and parts == before
    assert joined.loss_weights == [float(w) for ids, w in parts for _ in ids]
    assert joined.labels == [i if w else -100 for ids, w in parts for i in ids]
    assert joined.segment_ids == [k for k, (ids, _) in enumerate(parts) for _ in ids]
    assert joined.logprobs == [-.1 if chances else None] * len(joined) and joined.position_ids == list(range(len(joined)))
    assert {len(joined[k]) for k in joined.keys()} == {len(joined)}
    if len(joined): assert {p.code for p in verify(joined)} <= {"nothing_trained"} and pack([joined], 50)["input_ids"][:] == [joined.input_ids]


@given(text=TEXTS)
@fixed
def test_texts_do_not_drift(tok, text):
    ids = tok.encode(text + "<|im_end|>" + text)
    assert drift(tok, ids) == (len(ids), len(ids), 0, None, 0, True)


def places(tok, ids):
    "(first byte, id) of each token of a byte-level vocabulary, from the bytes that it spells."
    at, out = 0, set()
    for i in ids:
        out.add((at, i))
        at += len(tok.added_tokens_decoder[i].content.encode()) if i in tok.added_tokens_decoder else len(tok.convert_ids_to_tokens(i))
    return out


@given(parts=st.lists(st.one_of(TEXTS, st.sampled_from(["pri", "me number", " is", " not", "<|im_", "end|>", "<|im_end|>", "🙂"])), max_size=6))
@fixed
def test_drift_by_place(tok, parts):
    ids = [i for p in parts for i in tok.encode(p)]
    again, found = tok.encode(tok.decode(ids)), drift(tok, ids)
    lost = sorted(places(tok, ids) - places(tok, again))
    assert found[:3] == (len(ids), len(again), len(lost)) and found.same_text
    assert (found.first is None) == (not lost) and found.share == (len(lost) / len(ids) if ids else 0)
    if lost: assert sum(at < lost[0][0] for at, _ in places(tok, ids)) == found.first


def test_drift_of_a_long_text(tok):
    "Cut every seven characters; the same tokens come again at many other places."
    text = "".join(sample_traces()["response"])[:5000]
    ids = [i for k in range(0, len(text), 7) for i in tok.encode(text[k:k + 7])]
    lost = places(tok, ids) - places(tok, tok.encode(text))
    assert drift(tok, ids).changed == len(lost) > len({i for _, i in lost} - set(tok.encode(text)))


def test_bytes_that_are_no_text(tok):
    "A piece of a character has no text, so it cannot come back."
    broken = tok.encode("🙂")[:1] + tok.encode(" is 91")
    found = drift(tok, broken)
    assert not found.same_text or found.changed
    assert found.first == 0 and found.changed == 1


def test_a_tokenizer_that_joins_accents():
    "Each accent that is joined again is a change of its own, and what follows it is none."
    from tokenizers.normalizers import NFC
    joining = make_tokenizer(sample_traces()["response"])
    joining.backend_tokenizer.normalizer = NFC()
    apart = [joining.convert_tokens_to_ids(c) for c in "eÌģ"] # the letter, and the two bytes of U+0301
    assert joining.decode(apart) == "e\u0301"
    words, k = joining.encode(" is 91 prime and"), 20
    found = drift(joining, (apart + words) * k)
    assert (found.changed, found.first, found.same_text) == (3 * k, 0, False)


def test_generators_are_read_once(tok):
    docs = [row([1, 2], [1, 1]), row([1], [1])]
    assert verify(iter(docs)) == [] and mask_stats(iter(docs)).tokens == 3 and pack(iter(docs), 4)["seq_lengths"][:] == [[2, 1]]
    bad = tokenize_chat(tok, CHAT)
    bad.message_ids[0] = 3
    assert [p.code for p in verify(e for e in [bad])] == ["messages"]
    with pytest.raises(ValueError, match="no input_ids"): verify(dict(train=Dataset.from_list(docs)))
