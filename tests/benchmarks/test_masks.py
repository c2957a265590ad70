"Loss masks against two tokenizations a turn and against no mask at all: python -m pytest tests/benchmarks/test_masks.py --slow -q."
import gc
import json
import os
import time
from pathlib import Path

import pytest

from tracebook.chat import _TEMPLATES
from tracebook.masking import tokenize_chat, tokenize_chats
from tracebook.sources import sample_traces

pytestmark = pytest.mark.slow
PAIRS, TOKENS, N_CHATS = 50, 10_000, 256


@pytest.fixture(scope="module")
def tok():
    "Qwen3's tokenizer with the template of Qwen2.5, which changes no history."
    trl = pytest.importorskip("trl")
    folder = Path(os.environ.get("TRACEBOOK_SHARED") or "")/"tokenizers"/"qwen3"
    if not os.environ.get("TRACEBOOK_SHARED") or not folder.exists(): pytest.skip("needs the tokenizer of Qwen3 in TRACEBOOK_SHARED/tokenizers/qwen3")
    from transformers import PreTrainedTokenizerFast
    text = lambda token: token["content"] if isinstance(token, dict) else token
    config = json.loads((folder/"tokenizer_config.json").read_text(encoding="utf-8"))
    named = {k: text(config[k]) for k in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(k)}
    out = PreTrainedTokenizerFast(tokenizer_file=str(folder/"tokenizer.json"), clean_up_tokenization_spaces=False, **named)
    out.chat_template = (Path(trl.__file__).parent/"chat_templates"/"qwen2_5.jinja").read_text(encoding="utf-8")
    return out


def chat_of(pairs, words, at=0):
    "A chat of so many pairs of turns with so many words each, out of the bundled traces."
    text = " ".join(sample_traces()["response"]).split()
    said = lambda k: " ".join(text[(at + k * words) % len(text):][:words])
    return [dict(role=role, content=said(2 * i + j)) for i in range(pairs) for j, role in enumerate(("user", "assistant"))]


def ids_of(tok, chat, prompt=False): return tok.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=True, return_dict=False)


def prefix_differences(tok, chat):
    "Ids and labels by two tokenizations a turn; the newline after the end token is trained too."
    ids = ids_of(tok, chat)
    labels = [-100] * len(ids)
    for i, m in enumerate(chat):
        if m["role"] != "assistant": continue
        start, stop = len(ids_of(tok, chat[:i], True)), len(ids_of(tok, chat[:i + 1]))
        labels[start:stop] = ids[start:stop]
    return ids, labels


def in_turn(ways, rounds):
    "Seconds of each way in each round; one after the other, so that a slow minute is slow for all, and without collections of garbage."
    times = {name: [] for name in ways}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
    finally: gc.enable()
    return times


def test_one_chat(benchmark, row, tok):
    "50 pairs of turns, all answers trained."
    chat = chat_of(PAIRS, 47)
    ours = lambda: tokenize_chat(tok, chat)
    enc, (ids, labels) = ours(), prefix_differences(tok, chat)
    newline = tok.convert_tokens_to_ids("Ċ")
    ends = [i for i, (x, y) in enumerate(zip(labels, labels[1:] + [-100])) if x != -100 and y == -100]
    assert len(ends) == PAIRS and all(labels[i] == newline for i in ends)
    assert enc.input_ids == ids and enc.labels == [-100 if i in set(ends) else x for i, x in enumerate(labels)]
    assert tokenize_chat(tok, chat, trailing=True).labels == labels
    assert .9 * TOKENS < len(ids) < 1.1 * TOKENS
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    few = in_turn(dict(ours=ours, prefixes=lambda: prefix_differences(tok, chat)), 4)
    many = in_turn(dict(ours=ours, plain=lambda: tok.apply_chat_template(chat, tokenize=True)), 40)
    faster, slower = min(few["prefixes"]) / min(few["ours"]), min(many["ours"]) / min(many["plain"])
    what, here = f"`tokenize_chat`, {PAIRS} pairs of turns, {len(ids):,} tokens", f"{min(many['ours']) * 1000:.1f} ms"
    row(what, here, f"two tokenizations a turn: {min(few['prefixes']) * 1000:.0f} ms", faster, "at least 20")
    row(what, here, f"plain `apply_chat_template`, no mask: {min(many['plain']) * 1000:.1f} ms", slower, "at most 1.6")
    assert faster >= 20
    assert slower <= 1.6


def test_a_new_shape(benchmark, row, tok):
    "50 pairs of turns in a shape that was not seen before: the chat up to each turn is rendered four times, so this grows with the square of the turns."
    chat = chat_of(PAIRS, 47)
    def cold():
        _TEMPLATES.clear()
        return tokenize_chat(tok, chat)
    assert cold().labels == tokenize_chat(tok, chat).labels
    benchmark.pedantic(cold, rounds=2, warmup_rounds=1)
    times = in_turn(dict(cold=cold, warm=lambda: tokenize_chat(tok, chat), plain=lambda: tok.apply_chat_template(chat, tokenize=True)), 10)
    first, warm, plain = (min(times[k]) for k in ("cold", "warm", "plain"))
    what, here = f"`tokenize_chat`, {PAIRS} pairs of turns, a shape seen for the first time", f"{first * 1000:.0f} ms"
    row(what, here, f"a shape that is known: {warm * 1000:.1f} ms", first / warm, "at most 12")
    row(what, here, f"plain `apply_chat_template`, no mask: {plain * 1000:.1f} ms", first / plain, "at most 20")
    assert first / warm <= 12
    assert first / plain <= 20


def test_many_chats(benchmark, row, tok):
    "256 chats of 1 to 4 pairs of turns with 20 to 179 words each, one by one and together; the tokenizer has use of a second core."
    chats = [chat_of(1 + i * 7 % 4, 20 + i * 37 % 160, i * 101) for i in range(N_CHATS)]
    together, single = lambda: tokenize_chats(tok, chats, progress=False), lambda: [tokenize_chat(tok, c) for c in chats]
    data, one = together(), single()
    assert list(data["input_ids"]) == [e.input_ids for e in one] and list(data["labels"]) == [e.labels for e in one]
    benchmark.pedantic(together, rounds=2, warmup_rounds=1)
    times = in_turn(dict(together=together, single=single), 8)
    faster = min(times["single"]) / min(times["together"])
    row(f"`tokenize_chats`, {N_CHATS} chats, {data.ledger.tokens:,} tokens", f"{N_CHATS / min(times['together']):,.0f} rows/s", f"a loop over `tokenize_chat`: {N_CHATS / min(times['single']):,.0f} rows/s", faster, "at least 1.6")
    assert faster >= 1.6 or os.cpu_count() < 2
