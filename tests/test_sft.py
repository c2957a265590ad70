"Traces as training data against plain-Python oracles: by character for weights, by ids for what can be seen, by text for everything else."
import io
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings, strategies as st

from tracebook.attention import visible_until
from tracebook.cli import main
from tracebook.masking import KINDS, Unverified, prepare_sft, to_chat, tokenize_completion
from tracebook.memento import MEMENTO_TOKENS, build_memento, parse, parse_memento_ids
from tracebook.sources import sample_traces, sample_zoo
from tracebook.tokens import load_tokenizer, make_tokenizer, memento_token_ids, tokenizer_hash

PLAIN = """{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
OPENING, CLOSED = (PLAIN.replace("assistant\n{% endif", f"assistant\n{x}{{% endif") for x in ("<think>\n", "<think>\n\n</think>\n\n"))
THINK = PLAIN.replace("{{ m.content }}", "{% if m.role == 'assistant' and '</think>' in m.content %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') }}\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}")
DROPPING = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
T, t, B, b, S, s = MEMENTO_TOKENS
CLEAN = build_memento([("one two three", "one"), ("four five six", "four")], "\n\nThe answer.")
TEXTS = st.one_of(st.text(max_size=30), st.sampled_from(["", " ", "\n", "\n\nx", "é", "e\u0301", "👩‍👩‍👧", "a\r\nb", "```py\n  x = 1\n```", "<|im_end|>", "</think>", " [x] ", "<|block_start|>"])).filter(lambda x: not any("\ud800" <= c <= "\udfff" for c in x))
ASCII = st.text("ab 1=\n.", max_size=25)


@pytest.fixture(scope="module")
def tok():
    out = make_tokenizer(sample_traces()["response"])
    out.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"], special_tokens=True)
    out.chat_template = PLAIN
    return out


def spelled(tok, ids): return tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

def trained(row, tok): return spelled(tok, [i for i in row["labels"] if i != -100])

def prompt_of(tok, problem, template=PLAIN): return tok.apply_chat_template([dict(role="user", content=problem)], chat_template=template, add_generation_prompt=True, tokenize=False)

@st.composite
def traces(draw, texts=ASCII):
    "[(kind, text)] of a trace: markers with what they delimit."
    out = [("other", "<think>" + draw(texts))]
    for _ in range(draw(st.integers(0, 4))):
        out.append(("block", B + draw(texts) + b))
        out.append(("other", draw(texts)))
        if draw(st.integers(0, 3)): out += [("memento", S + draw(texts) + s), ("other", draw(texts))]
    return out + [("other", "</think>"), ("answer", draw(texts))]


# ---- to_chat

def test_to_chat_under_map():
    rows = Dataset.from_list([dict(problem=" p\n", response=CLEAN + " ", domain="math"), dict(problem="", response="", domain=None)])
    want = [dict(messages=[dict(role="user", content=r["problem"]), dict(role="assistant", content=r["response"])]) for r in rows]
    assert rows.map(to_chat, remove_columns=rows.column_names).to_list() == want
    assert rows.map(to_chat, batched=False).to_list() == [{**r, **w} for r, w in zip(rows, want)]
    assert list(rows.to_iterable_dataset().map(to_chat, remove_columns=rows.column_names)) == want
    for bad in (dict(problem="x"), dict(response="x"), dict(problem=None, response="x"), dict(problem="x", response=3), {}):
        with pytest.raises(ValueError, match="has no"): to_chat(bad)
    with pytest.raises(ValueError, match="batched=False"): rows.map(to_chat, batched=True)

# ---- a completion

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=TEXTS, response=TEXTS, eot=st.sampled_from(["trained", "masked"]))
def test_a_completion_is_what_was_written(tok, problem, response, eot):
    enc = tokenize_completion(tok, [dict(role="user", content=problem)], response, eot=eot)
    prompt = prompt_of(tok, problem)
    assert enc.text == prompt + response + "<|im_end|>" == spelled(tok, enc.input_ids)
    assert trained(enc, tok) == response + "<|im_end|>" * (eot == "trained")
    n = len(tok(prompt, add_special_tokens=False)["input_ids"])  # the prompt has the tokens that it has alone
    assert enc.input_ids[:n] == tok(prompt, add_special_tokens=False)["input_ids"] and set(enc.labels[:n]) <= {-100}
    assert (response == "" or enc.labels[n] != -100) and enc.report["straddlers"] == 0 and enc.position_ids == list(range(len(enc)))
    assert all(label in (-100, i) for label, i in zip(enc.labels, enc.input_ids)) and set(enc.message_ids) <= {0, 1}

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=traces(TEXTS.filter(lambda x: "think>" not in x)), lead=st.sampled_from(["", "\n", " "]), gap=st.sampled_from(["", "\n", "\n\n", " "]))
def test_what_the_prompt_supplies_is_taken_once(tok, pieces, lead, gap):
    response = lead + "<think>" + gap + "".join(x for _, x in pieces).removeprefix("<think>")
    enc = tokenize_completion(tok, [dict(role="user", content="x")], response, chat_template=OPENING)
    assert enc.text.startswith(prompt_of(tok, "x", OPENING)) and enc.text.count("<think>") == 1
    rest = response.lstrip().removeprefix("<think>")
    assert trained(enc, tok) == rest.removeprefix("\n") + "<|im_end|>"
    assert "the prompt supplies" in enc.report["notes"][0]
    with pytest.raises(Unverified) as e: tokenize_completion(tok, [dict(role="user", content="x")], response, chat_template=CLOSED)
    assert e.value.code == "prefill_conflict"

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(response=ASCII.filter(bool), spans=st.lists(st.tuples(st.integers(0, 24), st.integers(1, 25), st.sampled_from([0., .5, 2., -1.])), max_size=3), weight=st.sampled_from([0., 1., .25]))
def test_weights_of_spans_by_character(tok, response, spans, weight):
    spans = [x for x in spans if x[0] < x[1] <= len(response)]
    chars = [weight] * len(response)
    for start, end, w in spans: chars[start:end] = [w] * (end - start)
    enc = tokenize_completion(tok, "Q: x\nA:", response, spans=spans, weight=weight)
    at, want = 0, []
    for i in enc.input_ids:
        place = at - len("Q: x\nA:")
        want.append(0. if place < 0 else chars[place] if place < len(chars) else 1.)
        at += len(spelled(tok, [i]))
    assert enc.loss_weights == want and enc.assistant_masks == [int(w != 0) for w in want]

@pytest.mark.parametrize("code, prompt, completion, template", [("prefill_conflict", "x", "<think>a</think>b", CLOSED), ("prefill_conflict", "x", "No.", OPENING), ("prefill_conflict", "x", "<thinking>a</thinking>", OPENING),
    ("dropped_by_template", "x", "No.", PLAIN.replace("m.content", "m.content[0].text")), ("no_end_token", "x", "No.", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"), ("template_raises", "x", "No.", "{% if messages | length == 1 %}{{ raise_exception('no') }}{% endif %}" + PLAIN)])
def test_what_does_not_go_together_is_refused_by_name(tok, code, prompt, completion, template):
    with pytest.raises(Unverified) as e: tokenize_completion(tok, [dict(role="user", content=prompt)], completion, chat_template=template)
    assert e.value.code == code

def test_other_ways_to_call_it_wrongly(tok):
    chat = [dict(role="user", content="x")]
    for kw, match in ((dict(truncation="turns"), "error or left or right"), (dict(boundary="x"), "boundary"), (dict(eot="x"), "eot"), (dict(weight=float("nan")), "finite"), (dict(spans=[(0, 9, 1)]), "does not lie"), (dict(max_length=2), "max_length is 2")):
        with pytest.raises(ValueError, match=match): tokenize_completion(tok, chat, "No.", **kw)
    with pytest.raises(ValueError, match="list of one message"): tokenize_completion(tok, [], "No.")
    assert spelled(tok, tokenize_completion(tok, chat, "</think>No.", chat_template=OPENING).input_ids).endswith("<think>\n</think>No.<|im_end|>")  # closes what the prompt opened

@pytest.mark.parametrize("truncation", ["left", "right"])
def test_a_cut_keeps_what_it_keeps(tok, truncation):
    whole = tokenize_completion(tok, "Q: x\nA:", CLEAN)
    for n in (1, 5, len(whole) - 1, len(whole) + 1):
        enc = tokenize_completion(tok, "Q: x\nA:", CLEAN, max_length=n, truncation=truncation)
        keep = slice(None, n) if truncation == "right" else slice(max(len(whole) - n, 0), None)
        assert (enc.input_ids, enc.labels, enc.loss_weights) == (whole.input_ids[keep], whole.labels[keep], whole.loss_weights[keep])

def test_a_tokenizer_that_puts_a_space_before_every_text():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE(unk_token="?"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace(prepend_scheme="always")
    bpe.train_from_iterator(sample_traces()["response"], trainers.BpeTrainer(vocab_size=600, special_tokens=["?"], show_progress=False))
    spaced = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
    spaced.add_tokens(["</s>"], special_tokens=True)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
    enc = tokenize_completion(spaced, [dict(role="user", content="one")], "two three", chat_template=template)
    assert enc.input_ids == spaced("user: one</s>answer:two three</s>", add_special_tokens=False)["input_ids"]

def test_templates_of_trl(tok):
    trl = pytest.importorskip("trl")
    seen = Counter()
    for path in sorted((Path(trl.__file__).parent/"chat_templates").glob("*.jinja")):
        if "training" in path.name: continue
        template = path.read_text(encoding="utf-8")
        wise = make_tokenizer(["a"], 300)
        wise.add_tokens(sorted(set(re.findall(r"<\|[\w_]+\|>|<｜[^｜<>]+｜>|<\w+_of_\w+>|<turn\|>|<\|\w+>", template))), special_tokens=True)
        wise.eos_token = wise.bos_token = "</s>"
        try: enc = tokenize_completion(wise, [dict(role="user", content="x")], CLEAN, chat_template=template)
        except Unverified as e: seen[e.code] += 1; continue
        prompt = wise.apply_chat_template([dict(role="user", content="x")], chat_template=template, add_generation_prompt=True, tokenize=False)
        assert enc.text.startswith(prompt)
        whole = prompt + CLEAN.removeprefix("<think>\n" if prompt.endswith("<think>\n") else "")
        assert enc.text.startswith(whole) and spelled(wise, [i for i in enc.labels if i != -100]) == enc.text[len(prompt):] and enc.spans[-1].field == "eot"
        seen["done"] += 1
    assert seen["done"] >= 30 and set(seen) <= {"done", "prefill_conflict", "no_end_token", "template_raises", "dropped_by_template"}

# ---- a data set

@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=traces(), weights=st.dictionaries(st.sampled_from(KINDS), st.sampled_from([0., 1., .5, 2.])), template=st.sampled_from([PLAIN, OPENING]))
def test_weights_by_kind_against_characters(tok, pieces, weights, template):
    response = "".join(x for _, x in pieces)
    chars = [weights.get(kind, 1.) for kind, text in pieces for _ in text] + [1.] * len("<|im_end|>")
    data = prepare_sft([dict(problem="x", response=response)], tok, weights=weights, chat_template=template)
    row, own = data[0], data.tokenizer
    prompt = prompt_of(tok, "x", template)
    text = spelled(own, row["input_ids"])
    assert text == prompt + response.removeprefix("<think>" if prompt.endswith("<think>\n") else "").removeprefix("\n" if prompt.endswith("<think>\n") else "") + "<|im_end|>"
    at, want = 0, []
    for i in row["input_ids"]:
        want.append(0. if at < len(prompt) else chars[len(chars) - (len(text) - at)])
        at += len(spelled(own, [i]))
    got = row.get("loss_weights") or [float(m) for m in row["assistant_masks"]]
    assert got == want and row["labels"] == [i if w else -100 for i, w in zip(row["input_ids"], want)]
    assert ("loss_weights" in row) == (not set(weights.values()) <= {0., 1.})
    counted = Counter()
    at = 0
    kinds = [kind for kind, x in pieces for _ in x] + ["eot"] * len("<|im_end|>")
    for i, w in zip(row["input_ids"], want):
        if w: counted[kinds[len(kinds) - (len(text) - at)]] += 1
        at += len(spelled(own, [i]))
    assert data.ledger.by_field == counted

@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=traces(TEXTS.filter(lambda x: "think>" not in x and "block" not in x)), policy=st.sampled_from(["qwen3", "phi4", "vanilla"]), template=st.sampled_from([PLAIN, OPENING, THINK]), problem=st.sampled_from(["x", f"what is {B}?"]))
def test_visible_until_against_the_ids(tok, pieces, policy, template, problem):
    think = "template" if template == THINK else "keep"
    try: data = prepare_sft([dict(problem=problem, response="".join(x for _, x in pieces))], tok, visible_until=True, policy=policy, think=think, chat_template=template)
    except Unverified: assert think == "template"; return
    row, own = data[0], data.tokenizer
    ids = {k: v for k, v in memento_token_ids(own).items() if "think" not in k}
    prompt = len(own(prompt_of(own, problem, template), add_special_tokens=False)["input_ids"])
    blocks = parse_memento_ids(row["input_ids"], ids, prompt, "adjacent")
    assert row["visible_until"] == visible_until(blocks, len(row["input_ids"]), policy).tolist()
    assert len(blocks) == sum(kind == "block" for kind, _ in pieces)

@pytest.mark.parametrize("truncation", ["left", "right"])
@pytest.mark.parametrize("policy", ["qwen3", "phi4"])
def test_who_sees_whom_is_the_same_after_a_cut(tok, truncation, policy):
    rows = [dict(problem="x", response=CLEAN)]
    def seen(row):
        until, at = np.array(row["visible_until"]), np.arange(len(row["visible_until"]))
        return (at[None] <= at[:, None]) & (at[:, None] < until[None])
    whole = seen(prepare_sft(rows, tok, visible_until=True, policy=policy)[0])
    for n in range(3, len(whole), 4):
        short = prepare_sft(rows, tok, visible_until=True, policy=policy, max_length=n, truncation=truncation)
        part = whole[:n, :n] if truncation == "right" else whole[-n:, -n:]
        for row in short: assert (seen(row) == part).all()
        assert len(short) == 1 or short.ledger.emptied

def test_every_malformed_trace_is_used(tok):
    zoo = [dict(problem="x", response=r["response"]) for r in sample_zoo()]
    data = prepare_sft(zoo, tok, visible_until=True, weights=dict(block=.5))
    assert data["row"][:] == list(range(len(zoo))) and data.ledger.rows == len(zoo)
    for row, want in zip(data, zoo): assert trained(row, data.tokenizer) == want["response"] + "<|im_end|>"
    assert data.ledger.issues == Counter(code for r in zoo for code in {i.code for i in parse(r["response"]).issues})

def test_the_response_through_the_template(tok):
    rows = sample_traces().select(range(4))
    data = prepare_sft(rows, tok, think="template", chat_template=THINK)
    for row, r in zip(data, rows): assert trained(row, data.tokenizer).replace("\n", "") == r["response"].replace("\n", "") + "<|im_end|>"
    with pytest.raises(Unverified) as e: prepare_sft(rows, tok, think="template", chat_template=DROPPING)
    assert e.value.code == "dropped_by_template" and "row 0" in str(e.value) and "keep" in str(e.value)
    assert len(prepare_sft(rows, tok, think="keep", chat_template=DROPPING)) == 4
    assert data.ledger.by_field.keys() == {"block", "memento", "answer", "other", "eot"}

def test_the_callers_tokenizer_stays_as_it_was(tok):
    before = tokenizer_hash(tok), len(tok), tok.chat_template, dict(tok.get_vocab())
    data = prepare_sft([dict(problem="x", response=CLEAN)], tok)
    assert before == (tokenizer_hash(tok), len(tok), tok.chat_template, dict(tok.get_vocab())) and data.tokenizer is not tok
    assert len(memento_token_ids(data.tokenizer)) == 6
    assert prepare_sft([dict(problem="x", response=CLEAN)], data.tokenizer, add_tokens=False).tokenizer is data.tokenizer
    with pytest.raises(ValueError, match="add_memento_tokens.*add_tokens=True"): prepare_sft([dict(problem="x", response=CLEAN)], tok, add_tokens=False)

def test_rows_are_counted(tok):
    rows = [dict(problem="x", response=CLEAN), dict(problem=None, response="y"), dict(problem="x", response="b" * 400), dict(problem="x", response="", domain="d")]
    data = prepare_sft(rows, tok, on_bad="skip", max_length=100, eot="masked")
    ledger = data.ledger
    assert data["row"][:] == [0] and ledger.rows == 4 and [r[:2] for r in ledger.refused] == [(1, "no_problem"), (2, "too_long")]
    assert sum(ledger.emptied.values()) == 1 and ledger.examples == 2 and ledger.trained == sum(data[0]["assistant_masks"])
    for bad, match in ((rows[1], "row 0: the row has no 'problem'"), (rows[2], "row 0: there are")):
        with pytest.raises(ValueError, match=match): prepare_sft([bad], tok, max_length=100)
    about = json.loads(data.info.description)
    assert about["ledger"]["refused"][0][0] == 1 and about["tokenizer_hash"] == tokenizer_hash(data.tokenizer) and about["visible_until"] is None and about["added_tokens"]

def test_sources_and_batches(tok, tmp_path):
    rows = [dict(cot=CLEAN.replace("one", str(i)), problem=str(i), domain="math") for i in range(150)]
    (tmp_path/"a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "not json\n")
    with pytest.warns(UserWarning): data = prepare_sft(tmp_path/"a.jsonl", tok, column_map=dict(response="cot"))
    assert data["row"][:] == list(range(150)) and set(data["domain"]) == {"math"} and data.ledger.unreadable[0][1] == "not_json"
    same = prepare_sft(Dataset.from_list(rows), tok, column_map=dict(response="cot"))
    stream = prepare_sft(Dataset.from_list(rows).to_iterable_dataset(), tok, column_map=dict(response="cot"), limit=70)
    assert same[:] == data[:] and stream[:] == data[:70]
    one = tokenize_completion(same.tokenizer, [dict(role="user", content="149")], rows[149]["cot"])
    assert (data[149]["input_ids"], data[149]["labels"]) == (one.input_ids, one.labels)

@pytest.mark.parametrize("name", ["sft", "sft.jsonl"])
def test_round_trip(tok, tmp_path, name):
    rows, kw = sample_traces().select(range(8)), dict(weights=dict(block=.5), visible_until=True)
    plain = prepare_sft(rows, tok, **kw)
    for _ in range(2):  # ours may be written again
        data = prepare_sft(rows, tok, out=tmp_path/name, **kw)
        assert data[:] == plain[:] and data.ledger == plain.ledger
    if name == "sft":
        again, kept = datasets.load_from_disk(str(tmp_path/name)), load_tokenizer(tmp_path/name/"tokenizer")
        about = json.loads(again.info.description)
        assert again[:] == plain[:] and os.listdir(tmp_path) == ["sft"]
    else:
        again, kept, about = [json.loads(x) for x in (tmp_path/name).read_text().splitlines()], load_tokenizer(tmp_path/"sft.tokenizer"), json.loads((tmp_path/"sft.meta.json").read_text())
        assert again == plain.to_list() and sorted(os.listdir(tmp_path)) == ["sft.jsonl", "sft.meta.json", "sft.tokenizer"]
    assert tokenizer_hash(kept) == about["tokenizer_hash"] and kept.chat_template == tok.chat_template
    assert about["visible_until"]["settings"]["keep_last_n_blocks"] == 0 and about["ledger"]["rows"] == 8 and about["versions"]["tracebook"]

def test_nothing_is_half_written(tok, tmp_path):
    rows = [dict(problem="x", response=CLEAN)] * 100 + [dict(problem=None, response=CLEAN)]
    for name in ("a", "a.jsonl"):
        with pytest.raises(ValueError, match="row 100"): prepare_sft(rows, tok, out=tmp_path/name)
        with pytest.raises(ValueError, match="nothing is written"): prepare_sft(rows[-1:], tok, out=tmp_path/name, on_bad="skip")
    assert not os.listdir(tmp_path)
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"x").write_text("x"); (tmp_path/"file").write_text("x"); (tmp_path/"b.tokenizer").write_text("x")
    for out, match in (("mine", "not overwritten"), ("file", "is a file"), ("none/a", "no folder"), ("b.jsonl", "not overwritten")):
        with pytest.raises((ValueError, OSError), match=match): prepare_sft(rows[:1], tok, out=tmp_path/out)
    assert (tmp_path/"mine"/"x").read_text() == (tmp_path/"file").read_text() == (tmp_path/"b.tokenizer").read_text() == "x" and not (tmp_path/"b.jsonl").exists()
    prepare_sft(rows[:1], tok, out=tmp_path/"c")
    with pytest.raises(ValueError): prepare_sft(rows, tok, out=tmp_path/"c")
    assert len(datasets.load_from_disk(str(tmp_path/"c"))) == 1

@pytest.mark.parametrize("kw, match", [(dict(think="strip"), "keep or template"), (dict(on_bad="x"), "on_bad"), (dict(truncation="turns"), "truncation"), (dict(weights=dict(x=1)), "choose block"), (dict(weights=dict(block=float("inf"))), "finite"), (dict(max_length=0), "from 1 on"), (dict(visible_until=True, policy="x"), "policy"), (dict(eot="x"), "eot"), (dict(limit=-1), "limit")])
def test_wrong_settings(tok, kw, match):
    with pytest.raises(ValueError, match=match): prepare_sft([dict(problem="x", response=CLEAN)], tok, **kw)

def test_real_outputs_with_the_tokenizer_of_qwen3():
    shared = os.environ.get("TRACEBOOK_SHARED")
    if not shared: pytest.skip("real material lies in TRACEBOOK_SHARED")
    rows, qwen = [json.loads(x) for x in open(f"{shared}/data/memento_outputs.jsonl")], load_tokenizer(f"{shared}/tokenizers/qwen3")
    data = prepare_sft(rows, qwen, visible_until=True, weights=dict(block=0))
    for row, r in zip(data, rows):
        text = spelled(data.tokenizer, row["input_ids"])
        assert text == prompt_of(qwen, r["problem"], qwen.chat_template) + r["response"] + "<|im_end|>"
        trace = parse(r["response"])
        n, ids = len(row["input_ids"]), data.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == row["input_ids"]
        assert row["visible_until"] == visible_until(parse_memento_ids(ids, memento_token_ids(data.tokenizer)), n, "qwen3").tolist()
        inside = sum(1 for until in row["visible_until"] if until < n)
        assert inside > 0 and trace.mementos and all(spelled(data.tokenizer, [i for i in row["labels"] if i != -100]).count(m) == len(trace.mementos) for m in (S, s))

# ---- the command

@pytest.fixture
def call(tok, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tok.save_pretrained("bpe")
    (tmp_path/"a.jsonl").write_text(json.dumps(dict(problem="x", response=CLEAN)) + "\n" + json.dumps(dict(response=CLEAN)) + "\n")
    def run(*args, stdin=b""):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False))
        capfd.readouterr()
        code = main([str(a) for a in args])
        return code, *capfd.readouterr()
    return run

def test_the_command_sft(call, tmp_path):
    code, out, err = call("sft", "--tokenizer", "bpe", "--out", "d", "--weights", "block=0,memento=.5", "--policy", "phi4")
    assert code == 0 and not err and "24" in out and "memento" in out and str(tmp_path/"d") in out
    data = datasets.load_from_disk("d")
    assert {"loss_weights", "visible_until"} <= set(data.column_names) and len(data) == 24 and json.loads(data.info.description)["visible_until"]["policy"] == "keep 0, markers go"
    code, out, err = call("sft", "a.jsonl", "--tokenizer", "bpe", "--out", "e")
    assert code == 1 and err.startswith("tracebook: error: row 1: the row has no 'problem'") and err.count("\n") == 1 and not (tmp_path/"e").exists()
    code, out, err = call("sft", "a.jsonl", "--tokenizer", "bpe", "--out", "e", "--skip-bad")
    assert code == 0 and "row 1 refused" in out and not err
    code, out, err = call("sft", "-", "--tokenizer", "bpe", "--out", "f.jsonl", "--json", "--column-map", "response=cot", stdin=json.dumps(dict(problem="x", cot=CLEAN)).encode())
    assert code == 0 and not err and json.loads(out)["rows"] == 1 and json.loads(out)["path"] == str(tmp_path/"f.jsonl")
    (tmp_path/"t.jinja").write_text(OPENING)
    code, out, err = call("sft", "--tokenizer", "bpe", "--out", "g", "--limit", 2, "--chat-template", "t.jinja")
    assert code == 0 and "2 traces: the prompt supplies '<think>\\n'" in out
    (tmp_path/"t.jinja").write_text(DROPPING)
    code, out, err = call("sft", "--tokenizer", "bpe", "--out", "h", "--think", "template", "--chat-template", "t.jinja")
    assert code == 1 and "dropped_by_template" in err and err.count("\n") == 1

def test_the_command_template(call, tmp_path):
    code, out, err = call("template", "bpe")
    assert code == 0 and not err and "<|im_end|>" in out and "inline" in out
    code, out, err = call("template", "bpe", "--json")
    assert code == 0 and json.loads(out)["end_of_turn"] == "<|im_end|>"
    (tmp_path/"t.jinja").write_text(OPENING)
    assert "<think>" in call("template", "bpe", "--chat-template", "t.jinja")[1]

@pytest.mark.parametrize("args, code", [(["sft", "--help"], 0), (["template", "--help"], 0), (["sft", "--out", "x"], 2), (["sft", "--tokenizer", "bpe"], 2), (["template"], 2), (["sft", "--tokenizer", "bpe", "--out", "x", "--weights", "a=1"], 2),
    (["sft", "--tokenizer", "bpe", "--out", "x", "--weights", "block=nan"], 2), (["sft", "--tokenizer", "none", "--out", "x"], 1), (["template", "none"], 1), (["sft", "missing.jsonl", "--tokenizer", "bpe", "--out", "x"], 1), (["sft", "--tokenizer", "bpe", "--out", "a.jsonl/x"], 1),
    (["sft", "--tokenizer", "bpe", "--out", "bpe"], 1), (["sft", "--tokenizer", "bpe", "--out", "x", "--max-length", "0"], 2), (["template", "bpe", "--chat-template", "none"], 1)], ids=lambda x: " ".join(x) if isinstance(x, list) else str(x))
def test_how_it_ends(call, args, code):
    got, out, err = call(*args)
    assert got == code and "Traceback" not in err and (bool(out), bool(err)) == (code == 0, code != 0)
    if code == 1: assert err.startswith("tracebook: error: ") and err.count("\n") == 1

def test_no_escape_code_comes_out(call, tmp_path):
    bad = "a\x1b[31m\x07\x9b\x7f"
    (tmp_path/"b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (dict(problem=bad, response=bad + CLEAN, domain=bad), dict(response=bad), {bad: 1})))
    (tmp_path/"t.jinja").write_text(PLAIN + bad)
    for args in (["sft", "b.jsonl", "--tokenizer", "bpe", "--out", "x", "--skip-bad"], ["sft", "b.jsonl", "--tokenizer", "bpe", "--out", "y"], ["sft", "b.jsonl", "--tokenizer", "bpe", "--out", "x" + bad, "--skip-bad", "--json"], ["sft", "b.jsonl", "--tokenizer", bad, "--out", "x"],
        ["sft", "b.jsonl", "--tokenizer", "bpe", "--weights", bad, "--out", "x"], ["template", "bpe", "--chat-template", "t.jinja"], ["template", "bpe", "--chat-template", "t.jinja", "--json"], ["template", bad]):
        code, out, err = call(*args)
        assert code in (0, 1, 2) and not set("\x1b\x07\x9b\x7f") & set(out + err), args
