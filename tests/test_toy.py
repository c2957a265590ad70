"The toy's world, its tokenizer, its training and its model."
import json
import math
import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tracebook import toy
from tracebook.attention import visible_until
from tracebook.generate import generate_memento
from tracebook.memento import MEMENTO_TOKENS, build_memento, parse, parse_memento_ids
from tracebook.sources import COLUMNS, load_traces
from tracebook.tokens import add_memento_tokens, memento_token_ids, tokenize_trace, tokenizer_hash
from tracebook.toy import (Share, check_toy, check_toy_text, evaluate_toy, load_toy, main, toy_batch, toy_config, toy_tokenizer, toy_traces, train_toy)

TINY = dict(sequences=48, batch_size=4, blocks=2, evaluate=4, progress=False,
    shape=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16))


@pytest.fixture(scope="module")
def loaded(): return load_toy()


def told(digits):
    "The response with these digits, written the slow way."
    total, pairs = 0, []
    for block in digits:
        text = ""
        for d in block:
            total += d
            text += f"+{d}={f'{total:03}'[::-1]}"
        pairs.append((text, f"{total:03}"[::-1]))
    return build_memento(pairs, f"{total:03}")


def by_hand(text):
    "The digits of a response."
    return [[int(c) for c in text_of[1::6]] for text_of in (t.text_of(p.block) for t in [parse(text)] for p in t.pairs)]


@pytest.mark.parametrize("blocks", [1, 2, 10, 22])
def test_rows_are_written_right(blocks):
    for row in toy_traces(30, seed=blocks, blocks=blocks):
        assert row["response"] == told(by_hand(row["response"]))
        assert row["problem"] == f"Σ{blocks}"
        trace = parse(row["response"])
        assert trace.issues == () and len(trace.pairs) == blocks and all(p.is_complete for p in trace.pairs)
        assert check_toy(row["response"], blocks) is None


def test_rows_are_ordinary():
    rows = toy_traces(7, seed=2)
    assert rows.column_names == [*COLUMNS.names, "steps"]
    assert load_traces(rows).column_names == COLUMNS.names
    assert rows.data.schema.field("steps").type == toy.STEPS_TYPE
    assert len(toy_traces(0)) == 0 and toy_traces(0).column_names == rows.column_names


def test_rows_depend_on_seed_and_place_alone():
    assert toy_traces(3, seed=5).to_list() == toy_traces(8, seed=5).to_list()[:3]
    assert toy_traces(3, seed=5)["response"][:] != toy_traces(3, seed=6)["response"][:]
    assert toy._draw(2, 0, 1).ravel().tolist() == [int(x >> 11) % 10 for x in np.random.PCG64(0).random_raw(10).tolist()]


def test_rows_of_any_size_only_within_limits():
    for bad in (0, -1, 23):
        with pytest.raises(ValueError, match="between 1 and 22"): toy_traces(1, blocks=bad)
    with pytest.raises(ValueError, match="at least 0"): toy_traces(-1)


def test_many_rows_are_quick():
    start = time.perf_counter()
    assert len(toy_traces(20_000)) == 20_000
    assert time.perf_counter() - start < 15


def test_steps_cover_what_they_say():
    macro = dict(digit="input", partial_sum="sum", carry="sum", memento="memento", answer="answer")
    for row in toy_traces(10, seed=1):
        text, total, expected = row["response"], 0, []
        for block in by_hand(text):
            for d in block:
                expected += [("digit", str(d)), ("carry" if total % 10 + d >= 10 else "partial_sum", f"{total + d:03}"[::-1])]
                total += d
            expected.append(("memento", f"{total:03}"[::-1]))
        expected.append(("answer", f"{total:03}"))
        assert [(s["category"], text[s["start"]:s["end"]]) for s in row["steps"]] == expected
        assert all(s["macro"] == macro[s["category"]] for s in row["steps"])
        trace = parse(text)
        inside = [(p.memento[1], p.memento[2]) for p in trace.pairs]
        assert [(s["start"], s["end"]) for s in row["steps"] if s["category"] == "memento"] == inside


def test_steps_are_tokens(loaded):
    row = toy_traces(1)[0]
    tokens = tokenize_trace(loaded[1], row["response"])
    for s in row["steps"]:
        assert tokens.index(s["end"]) - tokens.index(s["start"]) == s["end"] - s["start"]


def test_checker_finds_planted_faults():
    rng, names = random.Random(0), dict(digit="digit", partial_sum="partial_sum", carry="partial_sum", memento="memento", answer="answer")
    row = toy_traces(1, seed=8)[0]
    text = row["response"]
    kind = {i: names[s["category"]] for s in row["steps"] for i in range(s["start"], s["end"])}
    for at in range(len(text)):
        if kind.get(at) == "digit": bad = rng.choice("x=\0é")
        else: bad = rng.choice([c for c in "0123456789=x<" if c != text[at]])
        fault = check_toy(text[:at] + bad + text[at + 1:])
        assert (fault.start, fault.what, fault.found) == (at, kind.get(at, "layout"), bad)
        assert fault.expected == ("0-9" if kind.get(at) == "digit" else text[at])


def test_checker_finds_another_digit_at_its_sum():
    row = toy_traces(1, seed=8)[0]
    text, first, after = row["response"], row["steps"][0], row["steps"][1]
    other = text[:first["start"]] + str((int(text[first["start"]]) + 1) % 10) + text[first["end"]:]
    assert (check_toy(other).start, check_toy(other).what, check_toy(other).block) == (after["start"], "partial_sum", 0)


def test_checker_sees_both_ends():
    text = toy_traces(1)[0]["response"]
    assert check_toy("") == (0, "layout", None, "<", "")
    assert check_toy(text + "\n") == (len(text), "layout", None, "", "\n")
    assert check_toy(text[:-1]).found == "" and check_toy(text[:-1]).what == "answer"
    assert check_toy(text, 9).what == check_toy(text, 11).what == "layout"
    assert check_toy("\ud800" + text).start == 0


def test_tokenizer_round_trip():
    tokenizer = toy_tokenizer()
    for row in toy_traces(5):
        ids = tokenizer.encode(row["response"])
        assert tokenizer.decode(ids) == row["response"] and len(ids) == len(toy._layout(10).pieces)
        assert tokenize_trace(tokenizer, row["response"]).uncovered == 0
    assert tokenizer.decode(tokenizer.encode(MEMENTO_TOKENS[2] + "1" + MEMENTO_TOKENS[0]), skip_special_tokens=True) == "1<think>"
    done = add_memento_tokens(tokenizer)
    assert done.added == () and [done.special[m] for m in MEMENTO_TOKENS] == [False, False, True, True, True, True]


@pytest.mark.parametrize("text", ["What is 2+2?", "x", "12 13", "1\r\n", "<|block_start", "é", "+8=8٠", "<unk>", "𝟘", "\0", "\ud800"])
def test_tokenizer_refuses_other_text(text, loaded, tmp_path):
    for tokenizer in (toy_tokenizer(), loaded[1]):
        for ask in (tokenizer, tokenizer.encode, tokenizer.tokenize, lambda t: tokenizer(["1", t]), lambda t: tokenizer("1", t), lambda t: tokenizer(["1", t], is_split_into_words=True), check_toy_text):
            with pytest.raises(ValueError, match="not of the toy's world"): ask(text)
        with pytest.raises(ValueError, match="not of the toy's world"): tokenizer.apply_chat_template([dict(role="user", content=text)])
    if text != "\ud800":
        with pytest.raises(Exception): AutoTokenizer.from_pretrained(Path(toy.__file__).parent / "toy_model")(text)


def test_tokenizer_refuses_other_roles():
    with pytest.raises(Exception, match="user and assistant only"): toy_tokenizer().apply_chat_template([dict(role="system", content="1")], tokenize=False)


@pytest.mark.parametrize("blocks", [1, 10])
def test_batches_are_the_rows(blocks):
    tokenizer, batch = toy_tokenizer(), toy_batch(3, seed=4, blocks=blocks)
    for ids, row in zip(batch["input_ids"].tolist(), toy_traces(3, seed=4, blocks=blocks)):
        chat = [dict(role="user", content=row["problem"]), dict(role="assistant", content=row["response"])]
        assert ids == tokenizer.apply_chat_template(chat, return_dict=False)


def test_no_label_on_prompt_and_digits():
    tokenizer, batch, row = toy_tokenizer(), toy_batch(1), toy_traces(1)[0]
    prompt = len(tokenizer.apply_chat_template([dict(role="user", content="Σ10")], add_generation_prompt=True, return_dict=False))
    tokens = tokenize_trace(tokenizer, row["response"])
    silent = {prompt + tokens.index(s["start"]) for s in row["steps"] if s["category"] == "digit"} | set(range(prompt))
    labels, ids = batch["labels"][0].tolist(), batch["input_ids"][0].tolist()
    assert labels == [-100 if i in silent else x for i, x in enumerate(ids)]
    assert len(silent) == prompt + 50


@pytest.mark.parametrize("blocks", [1, 3, 10])
def test_mask_is_that_of_visible_until(blocks):
    batch = toy_batch(1, blocks=blocks)
    ids = batch["input_ids"][0].tolist()
    until = visible_until(parse_memento_ids(ids, memento_token_ids(toy_tokenizer())), len(ids), "qwen3")
    seen = batch["attention_mask"][0, 0] == 0
    for q in range(len(ids)):
        assert seen[q].tolist() == [k <= q and q < u for k, u in enumerate(until.tolist())]
    assert batch["attention_mask"].min() == torch.finfo(torch.float32).min


def test_training_lowers_the_loss_and_can_be_interrupted(tmp_path):
    plan, path = toy._Plan(0, 48, 4, 2e-3, 2, TINY["shape"]), tmp_path / "a" / "checkpoint.pt"
    path.parent.mkdir()
    run = toy._new_run(plan)
    for _ in range(7): run.step()
    run.save(path)
    card, whole = train_toy(tmp_path / "a", **TINY), train_toy(tmp_path / "b", **TINY)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert card["loss"] == whole["loss"] and card["final_loss"] < card["loss"][0]["labels"] - .1
    assert json.loads((tmp_path / "a/card.json").read_text()) == json.loads(json.dumps(card))
    with pytest.raises(ValueError, match="seed=0 .now 1."): train_toy(tmp_path / "a", **TINY, seed=1)
    assert train_toy(tmp_path / "a", **TINY, seed=1, resume=False)["final_loss"] != card["final_loss"]
    model, tokenizer = load_toy(folder=tmp_path / "b")
    assert model.config.hidden_size == 32 and tokenizer_hash(tokenizer) == tokenizer_hash(toy_tokenizer())


def test_training_leaves_the_random_numbers_of_torch_alone(tmp_path):
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    train_toy(tmp_path, **TINY | dict(sequences=4))
    assert torch.rand(1) == first


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    run = toy._new_run(toy._Plan(0, 8, 4, 2e-3, 1, TINY["shape"]))
    run.save(tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("the disk is gone")))
    run.step()
    with pytest.raises(OSError): run.save(tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_bad_settings_are_refused(tmp_path):
    for bad in (dict(sequences=0), dict(batch_size=0), dict(checkpoint_every=0)):
        with pytest.raises(ValueError, match="at least 1"): train_toy(tmp_path, **TINY | bad)
    with pytest.raises(ValueError, match="holds no finished toy"): load_toy(folder=tmp_path)
    with pytest.raises(SystemExit): main(["--train"])


@pytest.mark.parametrize("right, n", [(0, 1), (1, 1), (9, 10), (1999, 2000), (2000, 2000), (137, 200)])
def test_share_is_wilson(right, n):
    share, z = Share.of(right, n), 1.959963984540054
    for p in (share.lo, share.hi): # the ends solve (p - right / n)^2 = z^2 p (1 - p) / n
        assert math.isclose((p - right / n) ** 2, z * z * p * (1 - p) / n, abs_tol=1e-12)
    assert 0 <= share.lo <= share.value <= share.hi <= 1 and share.n == n and share.value == float(Fraction(right, n))


def test_share_of_nothing():
    assert math.isnan(Share.of(0, 0).value) and Share.of(0, 0)[1:] == (0., 1., 0)


def test_scores_count_what_they_say():
    tokenizer, ids = toy_tokenizer(), toy_batch(6, 3)["input_ids"]
    ends = (ids[0] == tokenizer.convert_tokens_to_ids("<|summary_end|>")).nonzero()[:, 0]
    ids[0, ends[3] - 1] = tokenizer.convert_tokens_to_ids("9") # the fourth memento is wrong
    ids[1, -2] = tokenizer.convert_tokens_to_ids("=") # the answer is wrong, all mementos are right
    ids[2, ends[0] - 6] = tokenizer.convert_tokens_to_ids("9") # the last figure of the last sum of the first block
    ids[3, 11] = tokenizer.convert_tokens_to_ids("=") # no digit
    score = toy._score(ids, 10)
    assert score.mementos[::3] == (43 / 45, 45) and score.chains[::3] == (2 / 6, 6)
    alone = [check_toy(tokenizer.decode(x[7:-1])) is None for x in ids]
    assert alone == [False] * 4 + [True] * 2


def test_loads_quickly_and_offline():
    code = "import socket\ndef no(*a, **k): raise OSError('no network')\nsocket.socket.connect = no\nfrom tracebook.toy import load_toy\nimport time; s = time.perf_counter(); m, t = load_toy(); print(time.perf_counter() - s)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "0"})
    assert float(out.stdout) < 2, out.stdout


def test_what_is_shipped(loaded):
    folder = Path(toy.__file__).parent / "toy_model"
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "card.json", "README.md"} <= {f.name for f in folder.iterdir()}
    assert sum(f.stat().st_size for f in folder.iterdir()) < 2.5e6 and not (folder / "checkpoint.pt").exists()
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert card["parameters"] == loaded[0].num_parameters()
    for scores in card["scores"].values():
        assert scores["mementos"]["value"] >= .999 and scores["chains"]["value"] >= .99 and scores["chains"]["n"] >= 2000
    assert tokenizer_hash(loaded[1]) == tokenizer_hash(toy_tokenizer()) and loaded[0].dtype == torch.float32


def test_writes_right_chains(loaded):
    ids = toy._write(*loaded, 100, 1, 10, "qwen3")
    score = evaluate_toy(*loaded, n=100, seed=1)
    assert score.mementos.value >= .995 and score.chains.value >= .97
    texts = [loaded[1].decode(x[7:-1]) for x in ids]
    right = [t for t in texts if check_toy(t) is None]
    assert len(right) == round(100 * score.chains.value) and len(set(texts)) == 100
    digits = np.bincount(np.array([by_hand(t) for t in right]).ravel(), minlength=10) # the model's own
    assert digits.min() > 250


def test_same_seed_same_chains(loaded):
    once, again, other = (toy._write(*loaded, 1, seed, 10, "qwen3") for seed in (7, 7, 8))
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_chains_that_end_early_are_wrong(loaded, monkeypatch):
    ids, n = toy_batch(3, 4, 2)["input_ids"], 40 # the third one breaks off
    outs = [type("Out", (), dict(ids=row)) for row in (ids[0], ids[1], ids[2, :n])]
    monkeypatch.setattr(toy, "generate_memento", lambda *args, **kwargs: outs)
    written = toy._write(*loaded, 3, 0, 2, "qwen3")
    assert torch.equal(written[:2], ids[:2]) and set(written[2, n:].tolist()) == {loaded[1].pad_token_id}
    assert evaluate_toy(*loaded, n=3, blocks=2).chains[::3] == (2 / 3, 3)


@torch.inference_mode()
def test_it_is_the_model_that_was_trained_under_the_mask(loaded):
    model, tokenizer = loaded
    model = model.double()
    try:
        out = generate_memento(model, tokenizer, [dict(role="user", content="Σ10")], max_new_tokens=400, seed=5, output_logits=True, **toy.TOY_SAMPLING)
        dense = model(input_ids=out.ids[None], attention_mask=toy._mask(10, torch.float64)[:, :, :len(out.ids), :len(out.ids)], use_cache=False).logits[0]
    finally: model.float()
    assert (out.logits - dense[out.prompt_length - 1:-1]).abs().max() < 1e-9
    assert out.curve.occupancy.tolist() == out.predicted.occupancy[out.prompt_length - 1:].tolist()


def test_plain_generate_writes_its_blocks(loaded):
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template([dict(role="user", content="Σ10")], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=4, **toy.TOY_SAMPLING)
    assert tokenizer.decode(out[0, 7:]).startswith("<think>\n<|block_start|>+")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_thousand_chains(dtype):
    score = evaluate_toy(*load_toy(dtype), n=2000, seed=0)
    assert score.mementos.value >= .999 and score.chains.value >= .99
