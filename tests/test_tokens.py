"Spans of characters as spans of tokens against counting bytes; four new words for tokenizers and models of several kinds; counting in tables."
import copy
import json
import os
import pickle
import random
import re
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from tracebook import tokens as tokens_module
from tracebook.compress import compress_trace, find_evictions
from tracebook.memento import MEMENTO_TOKENS, TokenBlock, build_memento, parse, parse_memento_ids
from tracebook.sources import sample_traces
from tracebook.stats import TOKEN_COLUMNS, block_table, measure, summarize, trace_table
from tracebook.tokens import (RELATED_WORDS, _with_markers, add_memento_tokens, load_tokenizer, make_tokenizer, memento_token_ids,
    token_counter, tokenize_trace, tokenizer_hash, tokenizer_name)
from tracebook.trace import PHI4, QWEN3, ContextPolicy, Span, Trace

T, E, B, b, S, s = MEMENTO_TOKENS
ROLES = dict(zip(MEMENTO_TOKENS, ("think_start", "think_end", "block_start", "block_end", "summary_start", "summary_end")))
CORPUS = list(sample_traces()["response"])[:6]
SHARED = os.environ.get("TRACEBOOK_SHARED")
real = pytest.mark.skipif(not SHARED, reason="TRACEBOOK_SHARED is not set: no real tokenizer and no real outputs at hand")
check = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


# ---------------------------------------------------------------------------------------------------- tokenizers

def fast(model, trainer, post=None, decoder=None, pre=None, norm=None, **names):
    "A small tokenizer of any kind."
    t = Tokenizer(model)
    for part, value in dict(normalizer=norm, pre_tokenizer=pre, decoder=decoder).items():
        if value is not None: setattr(t, part, value)
    if trainer is not None: t.train_from_iterator(CORPUS, trainer)
    if post is not None: t.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=t, clean_up_tokenization_spaces=False, **names)


def byte_level(post=None, norm=None, prefix=False, vocab=600):
    "Byte-level BPE."
    return fast(models.BPE(), trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False), post, decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=prefix), norm)


def unigram(prepend="always", norm=None):
    "As T5 and the newer Llama-2: Metaspace, an unknown word, a BOS that must not show up."
    pieces = {"<unk>": 0, "<s>": 0, "▁": -4} | {c: -8 for c in sorted(set("".join(CORPUS)) - {" "})} | dict.fromkeys(("▁the", "▁block", "▁start", "▁is", "ing", "er", "in", "sum", "mary", "▁a", "><|"), -6)
    return fast(models.Unigram(list(pieces.items()), 0), None, processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
        decoders.Metaspace(prepend_scheme=prepend), pre_tokenizers.Metaspace(prepend_scheme=prepend), norm, unk_token="<unk>", bos_token="<s>") # not trained: training is not repeatable


def llama():
    "As the older Llama-2: a normalizer that turns spaces into ▁ and puts one in front, byte fallback."
    norm = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
    return fast(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True), trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False, max_token_length=12), None, decoder, None, norm, unk_token="<unk>", bos_token="<s>")


def wordpiece():
    "As BERT: lower case, accents gone, white space gone."
    letters = sorted(set("".join(CORPUS).lower()) - set(" \n"))
    words = ["[UNK]", "[CLS]", "[SEP]", *letters, *("##" + c for c in letters), "the", "block", "end", "##ing", "##er", "sum", "##mary", "start"]
    return fast(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"), None, processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)), decoders.WordPiece(),
        pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(lowercase=True), unk_token="[UNK]")


def preset():
    "Somebody left truncation and padding switched on in the file."
    t = byte_level()
    t.backend_tokenizer.enable_truncation(3)
    t.backend_tokenizer.enable_padding(length=12)
    return PreTrainedTokenizerFast(tokenizer_object=t.backend_tokenizer)


ROBERTA = lambda: processors.RobertaProcessing(("a", 1), ("b", 2), trim_offsets=True, add_prefix_space=True)
NEOX = lambda: processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
KINDS = dict(plain=byte_level, trim=lambda: byte_level(processors.ByteLevel(trim_offsets=True)), neox=lambda: byte_level(NEOX(), normalizers.NFC()), roberta=lambda: byte_level(ROBERTA(), prefix=True),
    nfc=lambda: byte_level(norm=normalizers.NFC()), nfkc=lambda: byte_level(norm=normalizers.NFKC()), lower=lambda: byte_level(norm=normalizers.Lowercase()), collapse=lambda: byte_level(norm=normalizers.Replace(Regex(" {2,}"), " ")),
    unigram=unigram, unigram_nfkc=lambda: unigram("never", normalizers.NFKC()), llama=llama, wordpiece=wordpiece, preset=preset, byt5=ByT5Tokenizer)


@cache
def shared(name, markers=False):
    "A tokenizer that is not to be changed, with or without the markers."
    tokenizer = make(name) if markers else KINDS[name]()
    if markers: add_memento_tokens(tokenizer)
    return tokenizer


def make(name): return copy.deepcopy(shared(name))


@cache
def qwen(with_markers=False):
    tokenizer = AutoTokenizer.from_pretrained(f"{SHARED}/tokenizers/qwen3")
    if with_markers: add_memento_tokens(tokenizer)
    return tokenizer


class Chars(PreTrainedTokenizer):
    "A tokenizer in Python: a token a character of Latin-1, of `fold` of it."
    fold = staticmethod(str)
    @property
    def vocab_size(self): return 256
    def get_vocab(self): return {chr(i): i for i in range(256)} | self.added_tokens_encoder
    def _tokenize(self, text): return list(self.fold(text))
    def _convert_token_to_id(self, token): return ord(token) if len(token) == 1 and ord(token) < 256 else 63
    def _convert_id_to_token(self, i): return chr(i)
    def convert_tokens_to_string(self, tokens): return "".join(tokens)


class Lower(Chars): fold = staticmethod(str.lower)


class Bytes(Chars):
    "One or two bytes a token, as they come; what is no character is decoded as U+FFFD, as tiktoken does."
    size = 1
    def _tokenize(self, text): return [text.encode()[i:i + self.size].hex() for i in range(0, len(text.encode()), self.size)]
    def _convert_token_to_id(self, token): return int(token, 16) + 256 * (len(token) == 4)
    def _convert_id_to_token(self, i): return f"{i:02x}" if i < 256 else f"{i - 256:04x}"
    @property
    def vocab_size(self): return 256 + 65536
    def get_vocab(self): return self.added_tokens_encoder
    def convert_tokens_to_string(self, tokens): return "".join(tokens) if any("<" in t for t in tokens) else bytes.fromhex("".join(tokens)).decode(errors="replace")


class Pairs(Bytes): size = 2


def bytes_of_ids(tokenizer, ids):
    "The bytes of each token of a byte-level tokenizer, by the table of GPT-2."
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [x for x in range(256) if x not in printable]
    table = {chr(x): x for x in printable} | {chr(256 + i): x for i, x in enumerate(others)}
    added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items()}
    return [added[i].encode() if i in added else bytes(table[c] for c in tokenizer.convert_ids_to_tokens(i)) for i in ids]


def places_by_bytes(text, pieces):
    "(starts, ends) of tokens whose bytes are those of the text."
    owner, at, out = [i for i, c in enumerate(text) for _ in c.encode()], 0, []
    assert b"".join(pieces) == text.encode()
    for piece in pieces:
        out.append((owner[at], owner[at + len(piece) - 1] + 1))
        at += len(piece)
    return [a for a, _ in out], [z for _, z in out]


pieces = st.sampled_from([*" \t\n\r\x00\u00a0\u3000\u2028abAB<>|`é\u0301\u0338\u0323ﬁ½\u00ad😀\u200dก\u0e33א\ufffd\ufeff", "  ", "    ", "\n  ", " the", "block", "e\u0301", "<|im_end|>", "<THINK>", "<|block_", "</s>", "<s>", "<unk>", "[UNK]", *MEMENTO_TOKENS])
texts = st.lists(pieces, max_size=10).map("".join)
plain_texts = st.one_of(texts, st.text(st.characters(exclude_categories=["Cs"]), max_size=12))


def tiles(text, cuts):
    "Spans that tile a text, some of them empty."
    at = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    return [Span("gap", a, z) for a, z in zip(at, at[1:])]


# ---------------------------------------------------------------------------------------------------- which token covers what

@pytest.mark.parametrize("name", ["plain", "trim", "preset", "byt5"])
@pytest.mark.parametrize("markers", [False, True])
@check
@given(text=plain_texts)
@example(text="  <|block_start|>x")
@example(text=" <|block_start|>x")
@example(text="a\n    b \n")
@example(text=" ")
def test_places_are_those_of_the_bytes(name, markers, text):
    "Starts and ends of a byte-level tokenizer without a normalizer, from the bytes of its tokens alone."
    if name == "byt5": assume(not re.search("</s>|<unk>|<pad>|<extra_id", text)) # these swallow white space, see below
    tokenizer = shared(name, markers)
    tokens = tokenize_trace(tokenizer, text)
    ids = tokens.ids.tolist()
    if name == "byt5":
        added = tokenizer.added_tokens_decoder
        spelled = [str(added[i]).encode() if i in added else bytes([i - 3]) for i in ids]
    else: spelled = bytes_of_ids(tokenizer, ids)
    assert (tokens.starts.tolist(), tokens.ends.tolist()) == places_by_bytes(text, spelled)
    assert tokens.uncovered == 0


@pytest.mark.parametrize("norm", [None, normalizers.NFC(), normalizers.NFKC()], ids=["raw", "nfc", "nfkc"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("post", ["bytes", "neox", "roberta"])
def test_trimming_offsets_changes_nothing(norm, prefix, post):
    "A post-processor that trims offsets does not touch the ids, so it must not move tokens (GPT-2, RoBERTa, GPT-NeoX, OLMo)."
    whole = byte_level(norm=norm, prefix=prefix, vocab=400)
    add_memento_tokens(whole)
    trimmed = copy.deepcopy(whole)
    trimmed.backend_tokenizer.post_processor = dict(bytes=processors.ByteLevel(trim_offsets=True), neox=NEOX(), roberta=ROBERTA())[post]
    rng, parts = random.Random(0), [" ", "  ", "\n", "\n   ", "\t", "a", " the", "\u00a0", "\u0301", "e\u0301", "😀", T, B, b]
    samples = ["", " ", "   ", f"\n    {B}x", f"{T} ", "e\u0301 ", *("".join(rng.choices(parts, k=rng.randint(1, 7))) for _ in range(150))]
    wrong = [(t, got.starts.tolist(), want.starts.tolist()) for t, got, want in zip(samples, tokenize_trace(trimmed, samples), tokenize_trace(whole, samples)) if (got.starts.tolist(), got.ends.tolist()) != (want.starts.tolist(), want.ends.tolist())]
    assert min(wrong, key=lambda w: len(w[0]), default=None) is None, f"{len(wrong)} of {len(samples)} texts"


@pytest.mark.parametrize("markers", [False, True])
@pytest.mark.parametrize("name", KINDS)
@check
@given(text=texts, cuts=st.lists(st.integers(0, 40), max_size=4))
@example(text="e\u0301 ", cuts=[1])
@example(text="<|block_end|>\u0338x", cuts=[13])
@example(text=" \n<think>\u200d", cuts=[2, 9])
def test_every_token_is_in_one_span(name, markers, text, cuts):
    "Whatever a tokenizer does to a text: the ids are its own, spans that tile the text tile the tokens, and the odd cases are counted right."
    tokenizer = shared(name, markers)
    try: tokens = tokenize_trace(tokenizer, text)
    except ValueError as e:
        assert name == "byt5" and "cannot place the tokens" in str(e) and re.search("</s>|<unk>|<pad>", text)
        return
    starts, ends, spans = tokens.starts.tolist(), tokens.ends.tolist(), tiles(text, cuts)
    assert tokens.ids.tolist() == tokenizer.encode(text, add_special_tokens=False, truncation=False, padding=False)
    assert starts == sorted(starts) and all(0 <= a <= z <= len(text) and a < len(text) for a, z in zip(starts, ends))
    found = tokens.token_spans(spans)
    assert [x.start for x in found] + [len(tokens)] == [0] + [x.end for x in found]
    for span, x in zip(spans, found): assert list(range(x.start, x.end)) == [i for i, a in enumerate(starts) if span.start <= a < span.end]
    assert [x.kind for x in found] == [x.kind for x in spans]
    assert tokens.straddlers(spans).tolist() == [i for i, (a, z) in enumerate(zip(starts, ends)) if any(a < x.end < z for x in spans)]
    assert tokens.uncovered == len(text) - len(set().union(*(range(a, z) for a, z in zip(starts, ends))))
    assert token_counts(name, markers)([text]) == [len(tokens)]


@cache
def token_counts(name, markers): return token_counter(shared(name, markers))


@pytest.mark.parametrize("name", ["nfc", "nfkc", "neox"])
@check
@given(st.lists(st.sampled_from(["a", "e", "e\u0301", "A\u030a", "o\u0302\u0323", ">\u0338", " ", "\n", "é", "😀", "ὼ", "q\u0301\u0301", "x"]), max_size=8))
def test_normalized_characters_stay_in_their_cluster(name, clusters):
    "A letter and its accents become one character or several; their tokens start at the letter or at an accent of it."
    text, form = "".join(clusters), "NFKC" if name == "nfkc" else "NFC"
    clean = [unicodedata.normalize(form, c).encode() for c in clusters]
    assume(b"".join(clean).decode() == unicodedata.normalize(form, text))
    tokenizer = shared(name)
    tokens = tokenize_trace(tokenizer, text)
    begins, owner = np.cumsum([0, *map(len, clusters)]).tolist(), [i for i, c in enumerate(clean) for _ in c]
    first = np.cumsum([0, *map(len, clean)]).tolist()
    at = 0
    for start, piece in zip(tokens.starts.tolist(), bytes_of_ids(tokenizer, tokens.ids.tolist())):
        k = owner[at]
        assert begins[k] <= start < begins[k + 1]
        if at == first[k]: assert start == begins[k]
        at += len(piece)
    spans = [Span("gap", a, z) for a, z in zip(begins, begins[1:])]
    assert [x.size for x in tokens.token_spans(spans)] == [sum(owner[i] == k for i in np.cumsum([0, *map(len, bytes_of_ids(tokenizer, tokens.ids.tolist()))])[:-1].tolist()) for k in range(len(clusters))]


def test_nfc_by_hand():
    tokens = tokenize_trace(make("nfc"), "cafe\u0301s")
    assert tokens.starts.tolist()[-3:] == [3, 3, 5] and tokens.uncovered in (0, 1)
    assert tokens.token_spans([Span("gap", 0, 4), Span("gap", 4, 6)])[1].size == 1 # the accent has no token of its own
    assert len(tokens.straddlers([Span("gap", 0, 4), Span("gap", 4, 6)])) == (0 if tokens.uncovered else 2)


def test_bytes_of_one_character_go_together():
    tokens = tokenize_trace(make("plain"), "a😀b")
    assert tokens.starts.tolist() == [0, 1, 1, 1, 1, 2] and tokens.ends.tolist() == [1, 2, 2, 2, 2, 3]
    assert [tuple(x[1:3]) for x in tokens.token_spans(tiles(tokens.text, [1, 2]))] == [(0, 1), (1, 5), (5, 6)]
    assert tokens.index(2) == 5 and tokens.index(3) == 6 and tokens.index(np.array([[0, 1], [2, 3]])).tolist() == [[0, 1], [5, 6]]


def test_a_token_over_a_border_belongs_where_it_starts():
    tokenizer = make_tokenizer(["|><|" * 50], 300)
    text = f"{T}{B}ab{b}{S}c{s}{E}"
    tokens, trace = tokenize_trace(tokenizer, text), parse(text)
    over = [i for i, (a, z) in enumerate(zip(tokens.starts, tokens.ends)) if any(a < x.end < z for x in trace.spans)]
    assert tokens.straddlers(trace.spans).tolist() == over and len(over) == 2
    spans = [x for c, x in zip(trace.spans, trace.to_token_spans(tokens)) if c.end == text.index(S)]
    assert spans[0].kind == "marker" and spans[0].end == over[1] + 1 # the end of the block's marker has it


@check
@given(st.lists(st.one_of(texts, texts.map(parse)), max_size=8), st.sampled_from(["plain", "neox", "unigram", "byt5", "wordpiece"]))
def test_many_are_as_one_by_one(items, name):
    tokenizer = shared(name, True)
    assume(name != "byt5" or not any(re.search("</s>|<unk>|<pad>", getattr(x, "text", x)) for x in items))
    for got, item in zip(tokenize_trace(tokenizer, items), items, strict=True):
        want = tokenize_trace(tokenizer, item)
        assert got.text == want.text == getattr(item, "text", item) and got.tokenizer == want.tokenizer
        assert all(np.array_equal(getattr(got, k), getattr(want, k)) and getattr(got, k).dtype == np.int64 for k in ("ids", "starts", "ends"))


def test_kinds_of_input():
    tokenizer = shared("plain", True)
    assert tokenize_trace(tokenizer, []) == [] and tokenize_trace(tokenizer, ()) == []
    assert [m.text for m in tokenize_trace(tokenizer, (t for t in ("a", parse("b"))))] == ["a", "b"]
    empty = tokenize_trace(tokenizer, "")
    assert (len(empty), empty.uncovered, empty.straddlers([Span("answer", 0, 0)]).tolist(), empty.index(0)) == (0, 0, [], 0)
    assert parse("").to_token_spans(empty) == () and parse("").to_token_blocks(empty) == []
    assert empty.token_spans([]) == () and empty.token_evictions([]) == []
    for items, item in ((["a", None], 1), ([b"a"], 0), (["a", "b", 3], 2), ([["a"]], 0)):
        with pytest.raises(TypeError, match=f"item {item}: expected a str or a Trace"): tokenize_trace(tokenizer, items)
    assert tokenize_trace(tokenizer, "\x00a\x00").starts.tolist() == [0, 1, 2]
    back = pickle.loads(pickle.dumps(tokenize_trace(tokenizer, "ab c")))
    assert back.text == "ab c" and len(back) == len(tokenize_trace(tokenizer, "ab c"))


@pytest.mark.parametrize("name", ["plain", "nfc", "neox", "unigram", "llama", "wordpiece", "byt5"])
def test_lone_surrogates(name):
    "Work, or an error that names the trouble and its place; never a complaint about types from inside."
    tokenizer = shared(name)
    for call in (lambda: tokenize_trace(tokenizer, ["fine", "a\ud800b"]), lambda: tokenize_trace(tokenizer, "a\ud800b"), lambda: tokenize_trace(tokenizer, parse("a\ud800b")), lambda: token_counter(tokenizer)(["fine", "a\ud800b"])):
        try: out = call()
        except ValueError as e: assert "surrogate" in str(e) and re.search(r"item 1|(offset|position) 1", str(e)), e
        else:
            last = out[-1] if isinstance(out, list) else out
            assert last == 3 or last.starts.tolist() == [0, 1, 2]


def test_large_texts_and_many_texts(monkeypatch, caplog):
    tokenizer, rng = shared("neox", True), random.Random(0)
    large = "".join(rng.choices(["The fox ", "12*34=408.\n", "    é", "e\u0301", "😀", B, b], k=160_000))
    tokens = tokenize_trace(tokenizer, large)
    assert len(large) > 1_000_000 and tokens.token_spans(tiles(large, [500_000]))[1].end == len(tokens)
    calls = []
    counted = type("Counted", (PreTrainedTokenizerFast,), {"__call__": lambda self, *a, **k: calls.append(len(a[0])) or PreTrainedTokenizerFast.__call__(self, *a, **k)})
    plain = counted(tokenizer_object=make("plain").backend_tokenizer, model_max_length=5)
    many = [f"text {i} of many" for i in range(5000)]
    maps, counts = tokenize_trace(plain, many), token_counter(plain)(many)
    assert [len(m) for m in maps] == counts == [len(x) for x in plain(many, add_special_tokens=False, verbose=False)["input_ids"]]
    assert sum(n > 100 for n in calls) == 3 and len(calls) < 8 # ours, the counter's and the check's; a few probes at most
    assert "longer than" not in caplog.text
    monkeypatch.setattr(tokens_module, "_AT_ONCE", 100)
    again = tokenize_trace(plain, many[:50] + ["x" * 300, ""])
    assert [len(m) for m in again] == token_counter(plain)(many[:50] + ["x" * 300, ""]) and [m.text for m in again[:50]] == many[:50]
    assert all(np.array_equal(p.ids, q.ids) and np.array_equal(p.starts, q.starts) for p, q in zip(again[:50], maps))


def test_settings_in_the_tokenizer_do_not_matter():
    "Truncation, padding, BOS: the text is tokenized as a whole and alone."
    want = tokenize_trace(make("plain"), "a long enough text")
    for tokenizer in (make("preset"), byte_level(processors.TemplateProcessing(single="Ġ $A Ġ", special_tokens=[("Ġ", 220)]))):
        got = tokenize_trace(tokenizer, ["a long enough text", "b"])
        assert got[0].ids.tolist() == want.ids.tolist() and len(got[1]) == 1
        assert token_counter(tokenizer)(["a long enough text", "b"]) == [len(want), 1]
        assert len(add_memento_tokens(tokenizer).added) == 6
    for pad in ("[PAD]", "{", "}"):
        tokenizer = make("plain")
        tokenizer.backend_tokenizer.enable_truncation(3, stride=1)
        tokenizer.backend_tokenizer.enable_padding(length=9, pad_token=pad)
        assert tokenizer_hash(tokenizer) == tokenizer_hash(shared("plain")), pad


# ---------------------------------------------------------------------------------------------------- tokenizers in Python

@pytest.mark.parametrize("kind", [ByT5Tokenizer, Chars, Bytes])
def test_slow_tokenizers(kind):
    tokenizer = kind()
    done = add_memento_tokens(tokenizer)
    assert done.added == MEMENTO_TOKENS and add_memento_tokens(tokenizer).added == ()
    text = build_memento([("a  b\n", " c "), ("\td", "e")], " é \n")
    trace, tokens = parse(text), tokenize_trace(tokenizer, text)
    assert trace.to_token_blocks(tokens) == parse_memento_ids(tokens.ids, memento_token_ids(tokenizer))
    for span, x in zip(trace.spans, trace.to_token_spans(tokens), strict=True):
        assert tokenizer.decode(tokens.ids[x.start:x.end], skip_special_tokens=False, clean_up_tokenization_spaces=False) == trace.text_of(span)
    assert token_counter(tokenizer)([text, ""]) == [len(tokens), 0]
    assert tokenizer_name(tokenizer) == kind.__name__ and re.fullmatch("[0-9a-f]{12}", tokenizer_hash(tokenizer))


@pytest.mark.parametrize("kind", [Bytes, Pairs])
@check
@given(text=st.text(st.sampled_from("ab é€😀\n\ufffd"), max_size=8))
@example(text="a€")
@example(text="😀é")
def test_slow_tokenizers_of_bytes(kind, text):
    "Tokens that hold part of a character, or the end of one and the beginning of the next, start where their first byte is."
    tokenizer = kind()
    try: tokens = tokenize_trace(tokenizer, text)
    except ValueError as e: assert "\ufffd" in text and "cannot place the tokens" in str(e)
    else: assert tokens.starts.tolist() == places_by_bytes(text, [text.encode()[i:i + kind.size] for i in range(0, len(text.encode()), kind.size)])[0]


def test_slow_tokenizers_of_characters():
    tokens = tokenize_trace(CanineTokenizer(), "aé 😀\x00")
    assert tokens.ids.tolist() == [97, 233, 32, 0x1F600, 0] and tokens.starts.tolist() == [0, 1, 2, 3, 4]


def test_slow_tokenizers_that_lose_text_say_so():
    assert len(tokenize_trace(Lower(), "abc")) == 3
    for text, at in (("abC", 2), ("a€", 1)):
        with pytest.raises(ValueError, match=f"cannot place the tokens of Lower.*offset {at}.*fast tokenizer"): tokenize_trace(Lower(), text)


def test_slow_tokenizers_and_swallowed_white_space():
    "ByT5's own special tokens swallow the white space around them: what is swallowed has no token, or the error says where it was lost."
    for text in ("x </s>y", "x  </s>\n y", "x</s>\n\n", " \n</s>x"):
        try: tokens = tokenize_trace(ByT5Tokenizer(), text)
        except ValueError as e: assert re.search("cannot place the tokens .* offset [0-6]", str(e))
        else: assert tokens.starts[-1] in (text.index("</s>"), text.rindex(text.strip()[-1]), text.index("</s>") + 4)


def test_slow_tokenizers_take_linear_time():
    import time
    def seconds(n):
        start = time.perf_counter()
        tokenize_trace(shared("byt5"), "naïve text\n" * n)
        return time.perf_counter() - start
    assert min(seconds(2000) for _ in range(3)) < 4 * min(seconds(1000) for _ in range(3))


# ---------------------------------------------------------------------------------------------------- blocks

bodies = st.lists(st.sampled_from([B, b, S, s] * 3 + ["x", " ", "\n", "\n   ", "é", "e\u0301", "\u0301", "\u0338", "😀", "ab ", "<", "|>", "<|block_", "``"]), max_size=16).map("".join)
whole = st.lists(st.tuples(st.sampled_from(["", " x", "\n  y\n", "\u0338"]), st.sampled_from(["", " z "])), max_size=3).map(lambda ps: "".join(f"{B}{x}{b}{g}{S}{x}{s}{g}" for x, g in ps))


@pytest.mark.parametrize("name", [k for k in KINDS if k != "collapse"])
@check
@given(head=st.sampled_from(["", " ", "\n ", "e\u0301"]), opened=st.booleans(), first=whole, body=bodies, closed=st.booleans(), tail=bodies, policy=st.sampled_from([QWEN3, PHI4, ContextPolicy(1), ContextPolicy(2, mask_delimiters=True)]))
@example(head=" ", opened=False, first="", body=f"{B}x{b}{S}y{s}", closed=True, tail="", policy=PHI4)
@example(head="", opened=True, first="", body=f"\n   {B}\n   x{b}\n  {S} y{s}\n ", closed=True, tail=" ", policy=QWEN3)
def test_blocks_are_those_in_the_ids(name, head, opened, first, body, closed, tail, policy):
    "The bridge from the text finds what a serving engine finds in the ids, markers in the answer left alone; and evictions follow."
    text = head + (T if opened else "") + first + body + (E + tail if closed else "")
    trace = parse(text, dialect="memento", nesting="stack", pairing="vllm")
    assume(opened or closed)
    assume(not {i.code for i in trace.issues} & {"think_close_in_block", "think_close_in_summary"}) # a quotation in text, a tag in ids
    tokenizer = shared(name, True)
    tokens = tokenize_trace(tokenizer, trace)
    blocks = trace.to_token_blocks(tokens)
    assert blocks == parse_memento_ids(tokens.ids, memento_token_ids(tokenizer))
    spans = trace.to_token_spans(tokens)
    assert [x.start for x in spans] + [len(tokens)] == [0] + [x.end for x in spans]
    whole_block = policy.mask_delimiters
    want = [((k.block_start, k.block_end + 1) if whole_block else (k.block_start + 1, k.block_end)) + (at + 1, i) for i, (k, at) in enumerate(zip(blocks, policy.evictions(blocks))) if at is not None]
    assert [tuple(e) for e in tokens.token_evictions(find_evictions(trace, policy))] == want


@pytest.mark.parametrize("swallow", [dict(lstrip=True), dict(rstrip=True), dict(lstrip=True, rstrip=True)], ids="+".join)
def test_markers_that_swallow_white_space(swallow):
    "Added tokens with lstrip or rstrip are one token all the same (as Phi's are); their places are those in the ids."
    tokenizer = make("plain")
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False, **swallow) for m in MEMENTO_TOKENS], special_tokens=True)
    assert add_memento_tokens(tokenizer).added == ()
    trace = parse(build_memento([(" a ", " b "), ("c", "d")], "\nx"))
    tokens = tokenize_trace(tokenizer, trace)
    assert trace.to_token_blocks(tokens) == parse_memento_ids(tokens.ids, memento_token_ids(tokenizer))


@check
@given(st.lists(st.tuples(st.sampled_from(["", "x", " y "]), st.sampled_from(["", "m"])), max_size=5), st.sampled_from([QWEN3, PHI4, ContextPolicy(1), ContextPolicy(2, mask_delimiters=True), ContextPolicy(restart=True)]))
def test_blocks_of_compressed_traces(pairs, policy):
    compressed = compress_trace(parse(build_memento(pairs, "z")), policy=policy)
    tokens = tokenize_trace(shared("plain", True), compressed)
    assert compressed.to_token_blocks(tokens) == parse_memento_ids(tokens.ids, memento_token_ids(shared("plain", True)))


def test_blocks_need_single_tokens():
    trace = parse(build_memento([("a", "b")], "c"))
    with pytest.raises(ValueError, match=r"'<\|block_start\|>' at 8 is not one token.*add_memento_tokens"): trace.to_token_blocks(tokenize_trace(make("plain"), trace))
    with pytest.raises(ValueError, match=r"<\|block_start\|>.*add_memento_tokens"): memento_token_ids(make("plain"))
    for call in (Trace.to_token_spans, Trace.to_token_blocks):
        with pytest.raises(ValueError, match="tokens of another text"): call(trace, tokenize_trace(shared("plain", True), trace.text + " "))
    assert parse("no markers").to_token_blocks(tokenize_trace(make("plain"), "no markers")) == []
    answer = parse(f"{T}x{E}said {B}q{b}")
    assert answer.to_token_blocks(tokenize_trace(make("plain"), answer)) == [] # quoted in the answer: no marker
    nested = parse(f"{T}{B}a{B}b{b}c{b}{S}d{s}{E}", nesting="stack", pairing="vllm")
    assert nested.to_token_blocks(tokenize_trace(shared("plain", True), nested)) == [TokenBlock(1, 7, None, None), TokenBlock(3, 5, 8, 10)]


def test_an_unknown_word_is_no_marker():
    "A tokenizer of words takes a marker between spaces for its unknown word, at exactly the place of the marker."
    words = Tokenizer(models.WordLevel(vocab={"[UNK]": 0, "a": 1, "x": 2, "y": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for names in (dict(unk_token="[UNK]"), {}): # transformers need not know which word it is
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(words.to_str()), **names)
        with pytest.raises(ValueError, match="not one token"): memento_token_ids(tokenizer)
        done = add_memento_tokens(tokenizer)
        assert done.added == MEMENTO_TOKENS and len(set(done.ids.values())) == 6


# ---------------------------------------------------------------------------------------------------- new words

@pytest.mark.parametrize("name", KINDS)
def test_each_marker_becomes_one_token(name, tmp_path):
    "One token each, wherever it stands; ordinary thinking tags, special markers; nothing new the second time, nor after saving."
    tokenizer = make(name)
    before = tokenizer_hash(tokenizer)
    done = add_memento_tokens(tokenizer)
    assert done.added == MEMENTO_TOKENS and done.initialised == () and done.resized is None and not done.untied
    assert done.special == {m: m in MEMENTO_TOKENS[2:] for m in MEMENTO_TOKENS} and set(done.ids) == set(ROLES.values())
    assert len(set(done.ids.values())) == 6 and memento_token_ids(tokenizer) == done.ids
    for m, role in ROLES.items():
        for text in (m, f"x{m}y", f"{m}{m}", f" {m} ", f"\n{m}\n", f"😀{m}é", f"{B}{m}{b}"):
            assert [i for i in tokenizer.encode(text, add_special_tokens=False) if i in done.ids.values()] == [done.ids[ROLES[x]] for x in re.findall(r"</?think>|<\|\w+\|>", text)], (m, text)
        assert m in repr(done)
    ids = [done.ids[r] for r in ROLES.values()]
    assert "".join(tokenizer.decode([i], skip_special_tokens=True) for i in ids).replace(" ", "") == T + E
    assert tokenizer_hash(tokenizer) != before
    again = add_memento_tokens(tokenizer)
    assert again.added == () and again.ids == done.ids and again.special == done.special
    tokenizer.save_pretrained(tmp_path)
    back = type(tokenizer).from_pretrained(tmp_path)
    assert add_memento_tokens(back)[:3] == (done.ids, (), done.special)
    assert tokenizer_hash(back) == tokenizer_hash(tokenizer) and tokenizer_name(back) == tmp_path.name
    sample = f"{T} a {B}b{b}\n{S}c{s}{E}d"
    assert back.encode(sample) == tokenizer.encode(sample)


@pytest.mark.parametrize("name, text, tags", [("lower", "x<THINK>y</Think>", 0), ("wordpiece", "x<THINK>y", 0), ("nfkc", "x＜think＞y", 0), ("unigram_nfkc", "＜/think＞", 0), ("nfc", "a</think>\u0338b", 1), ("nfc", "a<think>\u0338b", 1), ("llama", "x<think>y</think>", 2), ("llama", "x\n<think> y", 1)])
def test_thinking_tags_are_those_of_the_parser(name, text, tags):
    "A normalizer must neither make a tag of what is none in the text nor unmake one: in ids there is exactly what the parser sees."
    tokenizer = make(name)
    done = add_memento_tokens(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert sum(i in done.ids.values() for i in ids) == tags == sum(x.kind == "marker" for x in parse(text, dialect="memento").spans)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("there", [MEMENTO_TOKENS[:2], (T,), (B, b), (E, S), MEMENTO_TOKENS], ids=len)
def test_what_is_there_is_left_alone(special, there):
    tokenizer = make("plain")
    tokenizer.add_tokens([AddedToken(m, special=special, normalized=False) for m in there], special_tokens=special)
    before = {str(t): (i, t.special) for i, t in tokenizer.added_tokens_decoder.items()}
    done = add_memento_tokens(tokenizer)
    after = {str(t): (i, t.special) for i, t in tokenizer.added_tokens_decoder.items()}
    assert {k: after[k] for k in before} == before and set(done.added) == set(MEMENTO_TOKENS) - set(there)
    assert done.special == {m: special if m in there else m in MEMENTO_TOKENS[2:] for m in MEMENTO_TOKENS}
    assert tokenizer.decode(tokenizer.encode(f"{T}a{E}"), skip_special_tokens=True) == "".join(t for t in (T * (not done.special[T]), "a", E * (not done.special[E])))


def test_a_copy_gets_the_markers():
    tokenizer = make("nfc")
    before = tokenizer_hash(tokenizer), len(tokenizer), dict(vars(tokenizer))
    copied = _with_markers(tokenizer)
    assert copied is not tokenizer and len(copied) == len(tokenizer) + 6 and memento_token_ids(copied)
    assert (tokenizer_hash(tokenizer), len(tokenizer)) == before[:2] and vars(tokenizer).keys() == before[2].keys()
    assert _with_markers(copied) is copied


def test_errors_can_be_read():
    with pytest.raises(ValueError, match="init='zeros' is unknown; choose mean or normal"): add_memento_tokens(make("plain"), init="zeros")
    tokenizer = make("plain")
    tokenizer.split_special_tokens = True
    with pytest.raises(ValueError, match=r"does not make one token of <\|block_start\|>"): add_memento_tokens(tokenizer)


def test_vocabularies_with_holes():
    "New ids must not be those of other tokens, nor rows of theirs be written."
    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")} | {"zz": 29}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=letters, merges=[])))
    model = tiny("LlamaForCausalLM", 30)
    rows = model.get_input_embeddings().weight.detach().clone()
    try: done = add_memento_tokens(tokenizer, model)
    except ValueError as e: assert re.search("29|zz|taken|two tokens", str(e))
    else: assert 29 not in done.ids.values()
    assert torch.equal(model.get_input_embeddings().weight[29], rows[29])


# ---------------------------------------------------------------------------------------------------- vectors

def tiny(kind, n, **more):
    "A random model of one layer."
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    family = re.sub("ForCausalLM|LMHeadModel|Model", "", kind)
    size = dict(n_embd=64, n_layer=1, n_head=2) if family.startswith("GPT") else dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    if family == "GPTJ": size["rotary_dim"] = 8
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(vocab_size=n, **size, **more))
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None: torch.nn.init.normal_(head.bias)
    return model


def mean_of_words(tokenizer, role, rows):
    "By the book: the mean over words of the mean over the tokens of a word, as inside a sentence unless that takes more tokens."
    encode = lambda w: tokenizer.encode(w, add_special_tokens=False)
    return torch.stack([rows[min(encode(" " + w), encode(w), key=len)].float().mean(0) for w in RELATED_WORDS[role]]).mean(0)


FAMILIES = {f"{kind}{'+' * bool(pad)}{'' if tied is None else '-tied' if tied else '-untied'}": (kind, pad, {} if tied is None else dict(tie_word_embeddings=tied)) for kind, pad, tied in (
    ("Qwen3ForCausalLM", 0, True), ("Qwen3ForCausalLM", 0, False), ("Qwen3ForCausalLM", 40, True), ("Qwen3ForCausalLM", 40, False), ("Qwen3ForCausalLM", 3, False),
    ("GPT2LMHeadModel", 0, None), ("LlamaForCausalLM", 0, None), ("LlamaForCausalLM", 9, None), ("GPTJForCausalLM", 0, None), ("GPTJForCausalLM", 40, None), ("PhiForCausalLM", 2, None), ("GemmaForCausalLM", 0, None))}


@pytest.mark.parametrize("family, kind", [*((f, "plain") for f in FAMILIES), ("Qwen3ForCausalLM-untied", "unigram"), ("GPTJForCausalLM", "byt5")])
def test_rows_start_from_related_words(family, kind, tmp_path):
    "Mean of related words plus noise of 0.01; all other rows bit for bit; nothing shrinks; again: nothing happens; saved and loaded: neither."
    name, pad, more = FAMILIES[family]
    tokenizer = make(kind)
    fresh, n = copy.deepcopy(tokenizer), len(tokenizer)
    model = tiny(name, n + pad, **more)
    layers = lambda m: [x for x in (m.get_input_embeddings(), m.get_output_embeddings()) if x is not None]
    before = [x.weight.detach().clone() for x in layers(model)]
    bias = getattr(layers(model)[1], "bias", None)
    bias = None if bias is None else bias.detach().clone()
    tied = layers(model)[0].weight is layers(model)[1].weight
    done = add_memento_tokens(tokenizer, model)
    ids = [done.ids[r] for r in ROLES.values()]
    rows = max(n + pad, n + 6)
    assert done.initialised == MEMENTO_TOKENS and done.untied is not tied and done.resized == ((n + pad, rows) if pad < 6 else None)
    assert (layers(model)[0].weight is layers(model)[1].weight) is tied and model.config.vocab_size == rows
    for old, layer in zip(before, layers(model)):
        new = layer.weight.detach()
        assert new.shape == (rows, 64) and new.dtype == old.dtype
        others = [i for i in range(len(old)) if i not in ids]
        assert torch.equal(new[others], old[others])
        noise = torch.stack([new[done.ids[r]] - mean_of_words(fresh, r, old) for r in ROLES.values()])
        assert .0085 < float(noise.std()) < .0115 and abs(float(noise.mean())) < .002 and .005 < float(noise.std(1).min()) and float(noise.std(1).max()) < .015
        assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < .6 # each row has a noise of its own
    if bias is not None:
        new = layers(model)[1].bias.detach()
        assert torch.equal(new[:n], bias[:n]) and len(new) == rows
        for r in ROLES.values(): assert torch.isclose(new[done.ids[r]], mean_of_words(fresh, r, bias[:, None])[0], atol=1e-6)
    assert model(torch.tensor([tokenizer.encode(f"a{B}b", add_special_tokens=False)])).logits.shape[-1] == rows

    state = {k: v.clone() for k, v in model.state_dict().items()}
    same = lambda m: all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert add_memento_tokens(tokenizer, model)[3:6] == (None, (), False) and same(model)
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    loaded, reread = AutoModelForCausalLM.from_pretrained(tmp_path), type(tokenizer).from_pretrained(tmp_path)
    assert add_memento_tokens(reread, loaded)[1:5] == ((), done.special, None, ()) and same(loaded)
    again = add_memento_tokens(copy.deepcopy(fresh), loaded) # the model is trained, the tokenizer is the base model's
    assert again.added == MEMENTO_TOKENS and again.initialised == () and same(loaded)
    assert add_memento_tokens(tokenizer, loaded).initialised == () and same(loaded) # the tokenizer of this session, another copy of the model


def test_seeds_and_inits():
    rows = {}
    for key in (("mean", 0), ("mean", 1), ("normal", 0), ("normal", 1)):
        tokenizer, model = make("plain"), tiny("LlamaForCausalLM", len(shared("plain")))
        torch.manual_seed(int(key[1]) + 7)
        done = add_memento_tokens(tokenizer, model, *key)
        rows[key] = model.get_input_embeddings().weight.detach()[list(done.ids.values())].clone()
        twin = tiny("LlamaForCausalLM", len(shared("plain")))
        add_memento_tokens(make("plain"), twin, init=key[0], seed=key[1])
        assert torch.equal(rows[key], twin.get_input_embeddings().weight.detach()[list(done.ids.values())])
    assert not torch.equal(rows["mean", 0], rows["mean", 1]) and not torch.equal(rows["normal", 0], rows["normal", 1])
    assert .015 < float(rows["normal", 0].std()) < .025 # initializer_range of these models is 0.02


def test_half_precision_and_models_without_a_head():
    tokenizer, model = make("plain"), tiny("Qwen3ForCausalLM", len(shared("plain")), tie_word_embeddings=False).to(torch.bfloat16)
    old = model.get_output_embeddings().weight.detach().clone()
    done = add_memento_tokens(tokenizer, model)
    new = model.get_output_embeddings().weight.detach()
    assert new.dtype == torch.bfloat16 and torch.equal(new[:len(old)], old)
    noise = torch.stack([new[done.ids[r]].float() - mean_of_words(shared("plain"), r, old) for r in ROLES.values()])
    assert .008 < float(noise.std()) < .012
    bare = tiny("LlamaModel", len(shared("plain")))
    assert add_memento_tokens(make("plain"), bare)[3:6] == ((600, 606), MEMENTO_TOKENS, False)


def test_the_model_may_come_later():
    "A tokenizer that got its markers alone, then meets models with and without spare rows."
    tokenizer = make("plain")
    assert add_memento_tokens(tokenizer).added == MEMENTO_TOKENS
    for kind, rows in (("LlamaForCausalLM", 700), ("LlamaForCausalLM", 600), ("Qwen3ForCausalLM", 606)):
        model = tiny(kind, rows)
        done = add_memento_tokens(tokenizer, model)
        assert done.added == () and done.initialised == MEMENTO_TOKENS and add_memento_tokens(tokenizer, model).initialised == ()
        rows = model.get_input_embeddings().weight.detach()
        assert .005 < float((rows[done.ids["block_end"]] - mean_of_words(shared("plain"), "block_end", rows)).std()) < .015


def test_saved_tokenizers_and_models_without_spare_rows(tmp_path):
    "New rows are new, whoever added the tokens; rows that were there are kept, and the report says that they were not written."
    tokenizer = make("plain")
    add_memento_tokens(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    small, padded = tiny("LlamaForCausalLM", 600), tiny("LlamaForCausalLM", 700)
    assert add_memento_tokens(AutoTokenizer.from_pretrained(tmp_path), small).initialised == MEMENTO_TOKENS
    before = padded.get_input_embeddings().weight.detach().clone()
    done = add_memento_tokens(AutoTokenizer.from_pretrained(tmp_path), padded)
    assert done.initialised == () and torch.equal(padded.get_input_embeddings().weight, before) and "row written" not in repr(done)


def test_rows_of_thinking_tags_that_were_there_stay():
    tokenizer = make("plain")
    tokenizer.add_tokens([AddedToken(m, special=False, normalized=False) for m in (T, E)])
    model = tiny("Qwen3ForCausalLM", 700, tie_word_embeddings=False)
    before = model.get_input_embeddings().weight.detach().clone()
    done = add_memento_tokens(tokenizer, model)
    changed = (model.get_input_embeddings().weight != before).any(1).nonzero().ravel().tolist()
    assert done.initialised == done.added == MEMENTO_TOKENS[2:] and changed == [done.ids[ROLES[m]] for m in done.added]


def test_two_models_of_one_config():
    "Models that share a config object: the note in it must not keep new rows of the second from being written."
    config = transformers.LlamaConfig(vocab_size=600, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    first, second, tokenizer = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config), make("plain")
    assert add_memento_tokens(tokenizer, first).initialised == MEMENTO_TOKENS
    assert add_memento_tokens(tokenizer, second)[3:5] == ((600, 606), MEMENTO_TOKENS)


def test_no_row_is_ever_not_a_number():
    "A tokenizer of digits drops every related word; its new rows must be numbers all the same, or an error say what is wrong."
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("0123456789")}, merges=[])))
    model = tiny("LlamaForCausalLM", 10)
    try: add_memento_tokens(tokenizer, model)
    except ValueError as e: assert "block" in str(e) or "word" in str(e)
    assert not any(p.isnan().any() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- names and files

def test_names_and_hashes(tmp_path):
    plain = make("plain")
    assert tokenizer_hash(plain) == tokenizer_hash(make("plain")) == tokenizer_hash(copy.deepcopy(plain))
    different = [tokenizer_hash(make(k)) for k in KINDS if k != "preset"]
    assert len(set(different)) == len(different) and all(re.fullmatch("[0-9a-f]{12}", h) for h in different)
    folder = tmp_path/"my tokenizer"
    plain.save_pretrained(folder)
    loaded = load_tokenizer(folder)
    assert tokenizer_name(loaded) == "my tokenizer" and tokenizer_hash(loaded) == tokenizer_hash(plain)
    assert tokenizer_name(load_tokenizer(str(folder))) == "my tokenizer" and token_counter(folder).name == token_counter(str(folder)).name == "my tokenizer"
    hostile = make_tokenizer(["ab"], 257, name="<script>\x1b[31m")
    assert "\x1b" not in tokenizer_name(hostile) and "<script" not in tokenize_trace(hostile, "<script>&\x1b\u202e")._repr_html_()
    assert tokenizer_name(make_tokenizer(["ab"], 257, name="org/name")) == "org/name"


def test_python_tokenizers_of_one_vocabulary():
    "What tokenizes differently has another hash, also where the difference is in code."
    assert tokenizer_hash(Chars()) != tokenizer_hash(Lower())


@pytest.mark.parametrize("damage", [None, "{bad", "{}", dict(model=dict(type="BPE")), dict(model=dict(type="Newer")), dict(pre_tokenizer=dict(type="Newer")), dict(added_tokens=5)], ids=str)
def test_tokenizers_that_cannot_be_had(damage, tmp_path):
    "A file that is damaged, or written by a newer version of the library, is named like one that is not there."
    if damage is not None:
        make("plain").save_pretrained(tmp_path)
        file = tmp_path/"tokenizer.json"
        file.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(ValueError, match=f"cannot load the tokenizer.*{tmp_path.name}"): load_tokenizer(tmp_path)


def test_no_code_of_a_model_is_run(tmp_path):
    make("plain").save_pretrained(tmp_path)
    (tmp_path/"evil.py").write_text("open('ran', 'w'); Evil = None")
    (tmp_path/"tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="Evil", auto_map=dict(AutoTokenizer=["evil.Evil", "evil.Evil"]))))
    try: load_tokenizer(tmp_path)
    except ValueError as e: assert "cannot load" in str(e)
    assert not Path("ran").exists() and not (tmp_path/"ran").exists()


# ---------------------------------------------------------------------------------------------------- counting

@pytest.mark.parametrize("name", KINDS)
def test_counts_are_lengths(name):
    rng, tokenizer = random.Random(1), make(name)
    samples = ["", *("".join(rng.choices([" ", "\n", "a", " the", "é", "e\u0301", "😀", B, b, "\x00"], k=rng.randint(0, 12))) for _ in range(60))]
    count = token_counter(tokenizer)
    lengths = [len(tokenizer.encode(x, add_special_tokens=False, truncation=False, padding=False)) for x in samples]
    got = count(samples)
    assert got == lengths and all(type(n) is int for n in got) and count([]) == [] and count(tuple(samples)) == got
    assert (count.name, count.hash, count.markers, list(count.marker_tokens)) == (tokenizer_name(tokenizer), tokenizer_hash(tokenizer), False, [0] * 4)
    with_markers = token_counter(tokenizer, markers=True)
    assert with_markers(samples) == got and list(with_markers.marker_tokens) == count(list(MEMENTO_TOKENS[2:]))
    assert count.name in repr(count) and count.hash in repr(count) and repr(count) != repr(with_markers)


def test_what_cannot_be_counted():
    count = token_counter(make("plain"))
    for wrong, item in ((["a", None], 1), ([b"a"], 0)):
        with pytest.raises(TypeError, match=f"item {item}"): count(wrong)
    with pytest.raises(TypeError): count("one text is no list") # or else a count a character comes back


parts = st.sampled_from(["", " ", "x", "a b\n", "é 😀", "e\u0301", "```\n", "don't stop"])
pairs = st.lists(st.tuples(parts, parts, parts), min_size=1, max_size=3).map(lambda ps: f"{T}{''.join(f'{B}{x}{b}{g}{S}{y}{s}' for x, g, y in ps)}{E}")
responses = st.one_of(st.tuples(pairs, parts).map("".join), st.lists(st.one_of(parts, st.sampled_from(MEMENTO_TOKENS)), max_size=14).map("".join))


@settings(check, max_examples=60)
@given(st.lists(responses, max_size=5), st.booleans(), st.sampled_from(["plain", "neox", "wordpiece", "byt5"]), st.booleans())
def test_token_columns_are_plain_counting(rows, markers, name, has):
    "Both tables, by parsing and counting one text after the other."
    tokenizer = shared(name, has)
    size = lambda x: len(tokenizer.encode(x, add_special_tokens=False, truncation=False, padding=False))
    cost = dict(zip(("B", "b", "S", "s"), map(size, (B, b, S, s)))) if markers else dict.fromkeys("BbSs", 0)
    tables = measure([dict(response=r) for r in rows], count_tokens=cached_counter(name, has, markers))
    per_trace, per_block = [], []
    for r in rows:
        trace = parse(r)
        of = lambda x, k: size(trace.text_of(x)) + cost[k] + cost[k.lower()] * x.complete
        blocks, mementos = [of(x, "B") for x in trace.blocks], [of(x, "S") for x in trace.mementos]
        per_trace.append((sum(blocks), sum(mementos), sum(mementos) / sum(blocks) if mementos and sum(blocks) else None))
        both = [(of(p.block, "B"), of(p.memento, "S") if p.memento else None) for p in trace.pairs]
        per_block += [(x, y, y / x if x and y is not None else None) for x, y in both]
    for table, want, kind in zip(tables, (per_trace, per_block), ("trace", "block")):
        assert table.column_names[-3:] == TOKEN_COLUMNS[kind].names and table.schema.types[-3:] == TOKEN_COLUMNS[kind].types
        assert [tuple(r.values()) for r in table.select(TOKEN_COLUMNS[kind].names).to_pylist()] == want
        assert table.schema.metadata == {b"tokenizer": tokenizer_name(tokenizer).encode(), b"tokenizer_hash": tokenizer_hash(tokenizer).encode(), b"markers_counted": str(markers).encode()}


@cache
def cached_counter(name, has, markers): return token_counter(shared(name, has), markers)


def test_tables_and_their_metadata(tmp_path):
    "Compression under names of its own at each level; the same from Parquet, with threads, and one table at a time."
    count = cached_counter("plain", True, False)
    rows = [dict(response=r, domain="ab"[i % 2]) for i, r in enumerate(CORPUS * 4)]
    traces, blocks = measure(rows, count_tokens=count)
    assert {"trace_token_ratio_of_sums", "trace_ratio_of_sums"} <= set(traces.column_names) and {"block_token_ratio", "block_ratio"} <= set(blocks.column_names)
    assert not {"trace_token_ratio_of_sums"} & set(blocks.column_names) and "block_token_ratio" not in traces.column_names
    assert trace_table(rows, count).equals(traces, check_metadata=True) and block_table(rows, count).equals(blocks, check_metadata=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/"rows.parquet", row_group_size=5)
    for workers in (1, 3): assert all(x.equals(y, check_metadata=True) for x, y in zip(measure(tmp_path/"rows.parquet", count_tokens=count, workers=workers), (traces, blocks)))
    pq.write_table(traces, tmp_path/"table.parquet")
    assert pq.read_table(tmp_path/"table.parquet").schema.metadata[b"tokenizer_hash"] == count.hash.encode()
    summary = summarize(traces, blocks=blocks)
    assert summary.metrics.schema.metadata[b"tokenizer"] == count.name.encode()
    assert summary.get("all", "corpus_token_ratio_of_sums", "corpus")["median"] == pytest.approx(sum(traces["summ_tokens"].to_pylist()) / sum(traces["block_tokens"].to_pylist()))
    assert summary.get("all", "trace_token_ratio_of_sums")["median"] == pytest.approx(np.median(traces["trace_token_ratio_of_sums"].to_numpy()))
    assert summary.get("all", "block_token_ratio", "block")["median"] == pytest.approx(np.median(blocks["block_token_ratio"].drop_null().to_numpy()))
    for table in measure([], count_tokens=count): assert len(table) == 0 and table.schema.metadata[b"tokenizer_hash"] == count.hash.encode() and table.column_names[-3] == "block_tokens"
    for table in measure(rows[:1], count_tokens=lambda xs: [len(x) for x in xs]): assert not table.schema.metadata and table["block_tokens"].to_pylist()
    assert not set(measure(rows[:1])[0].column_names) & {"block_tokens", "summ_tokens", "trace_token_ratio_of_sums"}


def test_counts_agree_with_places():
    "With the markers as single tokens, the tokens of a block alone are those of the block inside its trace (bytes, no prefix)."
    tokenizer, count = shared("plain", True), cached_counter("plain", True, False)
    traces = [parse(r) for r in CORPUS]
    for trace, tokens in zip(traces, tokenize_trace(tokenizer, traces)):
        spans = trace.to_token_spans(tokens)
        assert [x.size for x in spans] == count([trace.text_of(x) for x in trace.spans]) and len(tokens.straddlers(trace.spans)) == 0
    got = trace_table([dict(response=t.text) for t in traces], cached_counter("plain", True, True))
    inside = [sum(k.block_end + 1 - k.block_start for k in t.to_token_blocks(tokenize_trace(tokenizer, t))) for t in traces]
    assert got["block_tokens"].to_pylist() == inside


# ---------------------------------------------------------------------------------------------------- the real thing

@real
def test_qwen_keeps_its_thinking_tags():
    tokenizer = AutoTokenizer.from_pretrained(f"{SHARED}/tokenizers/qwen3")
    n, before = len(tokenizer), tokenizer_hash(tokenizer)
    done = add_memento_tokens(tokenizer)
    assert done.added == MEMENTO_TOKENS[2:] and len(tokenizer) == n + 4 and tokenizer_hash(tokenizer) != before
    assert (done.ids["think_start"], done.ids["think_end"]) == (151667, 151668) and not done.special[T] and not done.special[E] and done.special[B]
    assert tokenizer.decode(tokenizer.encode(f"{T}a{B}b{b}{E}"), skip_special_tokens=True) == f"{T}ab{E}"
    assert add_memento_tokens(tokenizer).added == () and tokenizer_name(tokenizer) == "qwen3"


@real
def test_qwen_on_real_outputs():
    "Real traces: everything tiles, blocks are those in the ids, counts alone are counts inside."
    folder = Path(SHARED)/"data"
    rows = [json.loads(x) for f in ("memento_outputs.jsonl", "openthoughts_trace.jsonl") for x in (folder/f).open(encoding="utf-8")]
    traces = [parse(r.get("response") or r["cot"]) for r in rows]
    tokenizer = qwen(True)
    for trace, tokens in zip(traces, tokenize_trace(tokenizer, traces)):
        spans = trace.to_token_spans(tokens)
        assert [x.start for x in spans] + [len(tokens)] == [0] + [x.end for x in spans] and tokens.uncovered == 0
        assert trace.to_token_blocks(tokens) == parse_memento_ids(tokens.ids, memento_token_ids(tokenizer)) and len(tokens.straddlers(trace.spans)) == 0
        assert (tokens.starts.tolist(), tokens.ends.tolist()) == places_by_bytes(trace.text, bytes_of_ids(tokenizer, tokens.ids.tolist()))
        assert [x.size for x in spans] == [len(x) for x in tokenizer([trace.text_of(x) for x in trace.spans], add_special_tokens=False)["input_ids"]]
    assert sum(len(t.pairs) for t in traces) == 9
    without = qwen()
    for trace, tokens in zip(traces[:2], tokenize_trace(without, traces[:2])):
        spans = trace.to_token_spans(tokens)
        assert [x.start for x in spans] + [len(tokens)] == [0] + [x.end for x in spans] and len(tokens.straddlers(trace.spans)) > 0
    accents = tokenize_trace(tokenizer, f"{T}{B}cafe\u0301 x\u0323\u0301{b}")
    assert [x.kind for x in parse(accents.text).to_token_spans(accents)] and accents.starts.tolist() == sorted(accents.starts.tolist())
