"""The compressor against an independent reading of the policies, the table of edge cases, and the properties it promises."""

import itertools
import pickle
import random
import re
import time

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import oracle_compress as oracle
from tracebook.compress import compress_report, compress_trace
from tracebook.memento import TokenBlock, build_memento, parse, parse_memento, parse_memento_ids
from tracebook.trace import PHI4, POLICIES, QWEN3, VANILLA, ContextPolicy, Span, Trace, traces_from_arrow, traces_to_arrow

T, E = "<think>", "</think>"
B, b = "<|block_start|>", "<|block_end|>"
S, s = "<|summary_start|>", "<|summary_end|>"
LETTERS = {"B": B, "b": b, "S": S, "s": s}
MARKERS = (T, E, B, b, S, s)
MARKER = re.compile(r"</?think>|<\|(?:block|summary)_(?:start|end)\|>")
FOR_ANSWER = ContextPolicy(0, keep_last_block_for_answer=True)
FOR_ANSWER_DROP = ContextPolicy(0, mask_delimiters=True, keep_last_block_for_answer=True)
RESTART = ContextPolicy(0, restart=True)
ALL_POLICIES = [ContextPolicy(k, mask_delimiters=mask) for k in (-1, 0, 1, 2, 3, 99) for mask in (False, True)] + [FOR_ANSWER, FOR_ANSWER_DROP, RESTART]
ALL_OPTIONS = [dict(pairing=p, nesting=n, fences=f) for p in ("adjacent", "vllm") for n in ("flat", "stack") for f in ("marker", "literal")]

check = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


# ---------------------------------------------------------------------------------------------------- texts

PLAIN = (
    "x", " ", "\n", "\r\n", "```", "`", "```py\nz=1\n```", "<", ">", "|", "<|", "</", "<t", "<thin", "think>", "</thin", "k>", "<|block_",
    "start|>", "<|block_start", "<|summary_end|", "|>", "\u00e9", "\u2028", "\U0001f600", "\x00", "\ufeff", "don't", "a < b", "\u3000", "\ud800",
)  # fmt: skip
QUOTES = (f"`{E}`", f'"{T}"', f"```\n{b}\n```", f"```{b}", f"the tag {E} ")

plain_pieces = st.sampled_from(PLAIN)
markers = st.sampled_from(MARKERS)
plain_texts = st.lists(plain_pieces, max_size=3).map("".join).filter(lambda text: not MARKER.search(text))


@st.composite
def tidy_pieces(draw):
    "The pieces of a text that follows the strict grammar."
    pieces = [draw(plain_texts)]
    for _ in range(draw(st.integers(1, 2))):
        pieces += [T, draw(plain_texts)]
        for block, memento in draw(st.lists(st.tuples(plain_texts, plain_texts), max_size=4)):
            pieces += [B, block, b, draw(plain_texts), S, memento, s, draw(plain_texts)]
        pieces += [E, draw(plain_texts)]
    return pieces


@st.composite
def damaged_pieces(draw):
    "A strict text with a few pieces lost, doubled or put in."
    pieces = draw(tidy_pieces())
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(pieces)))
        damage = draw(st.sampled_from(("lose", "lose", "double", "insert", "quote", "end")))
        if damage == "lose":
            del pieces[i : i + 1]
        elif damage == "double":
            pieces[i:i] = pieces[i : i + 1]
        elif damage == "insert":
            pieces.insert(i, draw(markers))
        elif damage == "quote":
            pieces.insert(i, draw(st.sampled_from(QUOTES)))
        else:
            del pieces[i:]
    return pieces


tidy_texts = tidy_pieces().map("".join)
damaged_texts = damaged_pieces().map("".join)
marker_soup = st.lists(st.one_of(markers, markers, plain_pieces, st.sampled_from(QUOTES)), max_size=18).map("".join)
block_soup = st.lists(st.sampled_from((B, b, S, s, B, b, S, s, "x", "yy")), max_size=24).map(lambda p: T + "".join(p))
texts = st.one_of(damaged_texts, marker_soup, block_soup, tidy_texts, st.text(st.characters(codec=None), max_size=20))
policies = st.sampled_from(ALL_POLICIES)
options = st.sampled_from(ALL_OPTIONS)


def random_texts(n, seed):
    "Marker texts without hypothesis: many of them, always the same."
    rng = random.Random(seed)
    pair = (B, b, S, s)
    for _ in range(n):
        style, pieces = rng.random(), []
        if style < 0.35:
            pieces = [rng.choice(MARKERS + ("x", " y", "\n", "<", *QUOTES)) for _ in range(rng.randint(0, 22))]
        else:
            pieces.append(rng.choice(("", "", "p", T, T, T, "pre" + T)))
            for _ in range(rng.randint(0, 6)):
                for marker in pair:
                    if rng.random() > 0.04:
                        pieces.append(marker)
                    pieces.append(rng.choice(("", "x", " y ", "\r\n", "z" * rng.randint(1, 9))))
                    if rng.random() < 0.04:
                        pieces.append(rng.choice(MARKERS + QUOTES))
                if rng.random() < 0.08:
                    pieces += [E, "mid", T]
            pieces.append(rng.choice((E, E, E, "", E + "the end", f"{E}you write {B}x{b}{S}y{s}.", f"{E}write {E}")))
            if rng.random() < 0.1:
                del pieces[rng.randint(0, len(pieces)) :]
        yield "".join(pieces)


# ---------------------------------------------------------------------------------------------------- helpers


def m(text):
    "Marker letters to markers; every other character stands for itself."
    return "".join(LETTERS.get(c, c) for c in text)


def keep(text, k, mask=True):
    return compress_trace(text, policy=ContextPolicy(k, mask_delimiters=mask))


def play(trace, policy):
    "(gone, evicted) by the oracle, for a trace as it is."
    mask = policy.mask_delimiters or policy.restart
    return oracle.play(len(trace.text), oracle.blocks_of_trace(trace), policy.keep_last_n_blocks, mask, policy.keep_last_block_for_answer)


def reference(text, policy):
    return oracle.compress(text, policy.keep_last_n_blocks, policy.mask_delimiters or policy.restart, policy.keep_last_block_for_answer)


def is_subsequence(small, big):
    rest = iter(big)
    return all(c in rest for c in small)


def pair_texts(trace):
    return [(trace.text_of(pair.block), trace.text_of(pair.memento)) for pair in trace.pairs]


def filled(spans):
    return [span for span in spans if span.end > span.start]


def same(one, other):
    "Equal in everything that a reader of the trace can see."
    parts = lambda trace: (trace.text, trace.spans, trace.issues, trace.dialect, trace.pairs, trace.answer, trace.sections)
    return parts(one) == parts(other)


def complete(trace):
    return sum(pair.is_complete for pair in trace.pairs)


def chunk(spans, text):
    return "".join(text[span.start : span.end] for span in spans)


CLEAN = {"missing_summary", "block_reopened", "unclosed_block"}


def is_clean(text):
    "Whether the reference promises that a result with dropped delimiters can be read again: see `test_dropping_twice_fails_where_...`."
    return not CLEAN & {issue.code for issue in parse(text).issues}


def reads_alike(text, policy):
    "Whether the result reads as the compressed trace does: no tag came about where a block was cut out, none was lost with it."
    trace = compress_trace(parse(text), policy=policy)
    again = parse(trace.text)
    return pair_texts(again) == pair_texts(trace) and again.answer == trace.answer and len(again.sections) == len(trace.sections)


# ---------------------------------------------------------------------------------------------------- (a) the table of edge cases

ONE = "<think>\nB x1 b\nS y1 s\n\nB x2 b\nS y2 s\n</think>\nEND"
FOUR = "<think>pre Bx1b mid Sy1s gap Bx2bSy2s tail</think>END"
SEVEN = "<think>Bx1bBx2bSy2sBx3bSy3s</think>END"
EIGHT = "<think>Bx1bBx2bSy2sSy3s</think>END"
TEN = "<think>Bx1bSy1s</think>mid<think>Bx2bSy2s</think>END"
CODE = "<think>\nB\n    x=1\n    y=2\nb\nS\n\ty=2\n s\n</think>\n```py\n    if x:\n        pop()\n```\n"
ANY = None  # both delimiters kept and dropped

CASES = [
    ("1", ONE, 0, True, "<think>\n\nS y1 s\n\n\nS y2 s\n</think>\nEND"),
    ("1", ONE, 0, False, "<think>\nBb\nS y1 s\n\nBb\nS y2 s\n</think>\nEND"),
    ("2", ONE, -1, ANY, ONE),
    ("2", ONE, 2, ANY, ONE),
    ("2", ONE, 3, ANY, ONE),
    ("2", ONE, 99, ANY, ONE),
    ("3", ONE, 1, True, "<think>\n\nS y1 s\n\nB x2 b\nS y2 s\n</think>\nEND"),
    ("3", ONE, 1, False, "<think>\nBb\nS y1 s\n\nB x2 b\nS y2 s\n</think>\nEND"),
    ("4", FOUR, 0, True, "<think>pre  mid Sy1s gap Sy2s tail</think>END"),
    ("4", FOUR, 0, False, "<think>pre Bb mid Sy1s gap BbSy2s tail</think>END"),
    ("4", FOUR, 1, True, "<think>pre  mid Sy1s gap Bx2bSy2s tail</think>END"),
    ("5", "<think>Bx1bSy1sBx2 not done", 0, True, "<think>Sy1sBx2 not done"),
    ("5", "<think>Bx1bSy1sBx2 not done", 0, False, "<think>BbSy1sBx2 not done"),
    ("5", "<think>Bx1bSy1sBx2 not done", 1, ANY, "<think>Bx1bSy1sBx2 not done"),
    ("6", "<think>Bx1 Bx2bSy2s</think>END", 0, True, "<think>Bx1 Sy2s</think>END"),
    ("6", "<think>Bx1 Bx2bSy2s</think>END", 0, False, "<think>Bx1 BbSy2s</think>END"),
    ("6", "<think>Bx1 Bx2bSy2s</think>END", 1, ANY, "<think>Bx1 Bx2bSy2s</think>END"),
    ("7", SEVEN, 1, True, "<think>Bx1bSy2sBx3bSy3s</think>END"),
    ("7", SEVEN, 1, False, "<think>Bx1bBbSy2sBx3bSy3s</think>END"),
    ("7", SEVEN, 0, True, "<think>Bx1bSy2sSy3s</think>END"),
    ("7", SEVEN, 2, ANY, SEVEN),
    ("8", EIGHT, 0, True, "<think>Bx1bSy2sSy3s</think>END"),
    ("8", EIGHT, 0, False, "<think>Bx1bBbSy2sSy3s</think>END"),
    ("8", EIGHT, 1, ANY, EIGHT),
    ("9", "<think>Bx1bSy1s</think>write </think> to end. END", 0, True, "<think>Sy1s</think>write </think> to end. END"),
    ("9", "<think>Bx1bSy1s</think>write </think> to end. END", 0, False, "<think>BbSy1s</think>write </think> to end. END"),
    ("10", TEN, 1, True, "<think>Sy1s</think>mid<think>Bx2bSy2s</think>END"),
    ("10", TEN, 1, False, "<think>BbSy1s</think>mid<think>Bx2bSy2s</think>END"),
    ("10", TEN, 0, True, "<think>Sy1s</think>mid<think>Sy2s</think>END"),
    ("10", TEN, 2, ANY, TEN),
    ("11", "Bx1bSy1s</think>END", 0, True, "Sy1s</think>END"),
    ("11", "Bx1bSy1s</think>END", 0, False, "BbSy1s</think>END"),
    ("11, again", "Sy1s</think>END", 0, ANY, "Sy1s</think>END"),
    ("12", "only text", 0, ANY, "only text"),
    ("13", "<think>Bx1bSy1s</think>you write BxbSys.", 0, True, "<think>Sy1s</think>you write BxbSys."),
    ("13", "<think>Bx1bSy1s</think>you write BxbSys.", 0, False, "<think>BbSy1s</think>you write BxbSys."),
    ("13", "<think>Bx1bSy1s</think>you write BxbSys.", 1, ANY, "<think>Bx1bSy1s</think>you write BxbSys."),
    ("14", "<think>B quote </think> here bSy1s</think>END", 0, True, "<think>Sy1s</think>END"),
    ("14", "<think>B quote </think> here bSy1s</think>END", 0, False, "<think>BbSy1s</think>END"),
    ("14, twin", "<think>B never </think>END", 0, ANY, "<think>B never </think>END"),
    ("14, memento", "<think>Bx1bS quote </think> here s</think>END", 0, True, "<think>S quote </think> here s</think>END"),
    ("16", "", 0, ANY, ""),
    ("17", "<think>BbSys</think>END", 0, True, "<think>Sys</think>END"),
    ("17", "<think>BbSys</think>END", 0, False, "<think>BbSys</think>END"),
    ("18", CODE, 1, ANY, CODE),
    ("18", CODE, 0, True, "<think>\n\nS\n\ty=2\n s\n</think>\n```py\n    if x:\n        pop()\n```\n"),
    ("18", CODE, 0, False, "<think>\nBb\nS\n\ty=2\n s\n</think>\n```py\n    if x:\n        pop()\n```\n"),
    ("19", "<think>B```\nb\n```bSys</think>END", 0, True, "<think>\n```bSys</think>END"),
    ("20", "<THINK>Bx1bSy1s</THINK>END", 0, True, "<THINK>Sy1s</THINK>END"),
    ("21", "<think></think>END", 0, ANY, "<think></think>END"),
    ("23", "<think>Bx1bSy1s<|block_sta", 0, True, "<think>Sy1s<|block_sta"),
    ("24", "<think> x1  y1 </think>END", 0, ANY, "<think> x1  y1 </think>END"),
    ("27", "<think>Bx1Sy1s</think>END", 0, ANY, "<think>Bx1Sy1s</think>END"),
    ("27, then a good pair", "<think>Bx1Sy1sBx2bSy2s</think>END", 0, True, "<think>Bx1Sy1sSy2s</think>END"),
    ("27, then a good pair", "<think>Bx1Sy1sBx2bSy2s</think>END", 1, ANY, "<think>Bx1Sy1sBx2bSy2s</think>END"),
    ("memento cut by the end", "<think>Bx1bSy1", 0, ANY, "<think>Bx1bSy1"),
    ("memento cut by the tag", "<think>Bx1bSy1</think>END", 0, ANY, "<think>Bx1bSy1</think>END"),
    ("memento cut by a block", "<think>Bx1bSy1Bx2bSy2s</think>END", 0, True, "<think>Bx1bSy1Sy2s</think>END"),
    ("memento cut by a memento", "<think>Bx1bSy1Sy2s</think>END", 0, ANY, "<think>Bx1bSy1Sy2s</think>END"),
    ("orphan first", "<think>SysBx1bSy1s</think>END", 0, True, "<think>SysSy1s</think>END"),
    ("stray ends", "<think>bsBx1 s x2bbSy1 b y2ss</think>s b", 0, True, "<think>bsbSy1 b y2ss</think>s b"),
    ("think reopened", "<think>Bx1<think>bS<think>s<think>Bx2bSy2s</think>END", 0, True, "<think>S<think>s<think>Sy2s</think>END"),
    ("open section after a closed one", "<think>Bx1bSy1s</think>mid<think>Bx2bSy2s", 0, True, "<think>Sy1s</think>mid<think>Bx2bSy2s"),
    ("text before", "pre <think>Bx1bSy1s</think>END", 0, True, "pre <think>Sy1s</think>END"),
    ("a block without a memento at the end", "<think>Bx1bSy1sBx2b</think>END", 0, True, "<think>Sy1sBx2b</think>END"),
    ("no count for blocks without mementos", "<think>Bx1bSy1sBx2bBx3b</think>END", 1, ANY, "<think>Bx1bSy1sBx2bBx3b</think>END"),
    ("pair over two sections", "<think>Bx1b</think>mid<think>Sy1s</think>END", 0, True, "<think></think>mid<think>Sy1s</think>END"),
    ("no line end at the end", "<think>Bx1bSy1s</think>", 0, True, "<think>Sy1s</think>"),
]  # fmt: skip
CASES = [(name, m(text), k, mask, m(wanted)) for name, text, k, both, wanted in CASES for mask in ((False, True) if both is ANY else (both,))]
IDS = [f"{name}, keep {k}, {'drop' if mask else 'delimiters'}" for name, _, k, mask, _ in CASES]


@pytest.mark.parametrize("name, text, k, mask, wanted", CASES, ids=IDS)
def test_oracle_on_the_table(name, text, k, mask, wanted):
    assert oracle.compress(text, k, mask) == wanted


@pytest.mark.parametrize("name, text, k, mask, wanted", CASES, ids=IDS)
def test_table_of_edge_cases(name, text, k, mask, wanted):
    policy = ContextPolicy(k, mask_delimiters=mask)
    assert compress_trace(text, policy=policy) == wanted
    assert compress_trace(parse(text), policy=policy).text == wanted
    report = compress_report(text, policy=policy)
    assert report.compressed.text == wanted and (report.chars_before, report.chars_after) == (len(text), len(wanted))
    if mask:
        assert compress_trace(text, keep_last_k=k) == wanted
        if k == 1:
            assert compress_trace(text) == wanted


@pytest.mark.parametrize("k, mask", [(0, False), (1, False), (0, True), (1, True)])
def test_line_endings_are_not_touched(k, mask):
    "Case 15: with CRLF or lone CR the result is the one of LF, each line end as it was."
    text = m(ONE)
    for end in ("\r\n", "\r", "\u2028", "\x0b"):
        assert keep(text.replace("\n", end), k, mask) == keep(text, k, mask).replace("\n", end)
    mixed = m("<think>\r\nBx\nb\rSy\r\ns\n</think>\r\nend\n\r")
    assert keep(mixed, 0) == m("<think>\r\n\rSy\r\ns\n</think>\r\nend\n\r")


@pytest.mark.parametrize("odd", ["\ufeff", "\x00", "\ud800", "\udfff", "\U0001f600", "e\u0301", "\u202e", "\ud83d\ude00"])
def test_odd_characters_stay(odd):
    "Case 26: offsets are code points, and nothing is normalised or decoded on the way."
    text = m(f"{odd}<think>{odd}B{odd}x{odd}b{odd}S{odd}y{odd}s{odd}B{odd}bS{odd}s{odd}</think>{odd}END{odd}")
    assert keep(text, 0) == m(f"{odd}<think>{odd}{odd}S{odd}y{odd}s{odd}S{odd}s{odd}</think>{odd}END{odd}")
    assert keep(text, 0, False) == m(f"{odd}<think>{odd}Bb{odd}S{odd}y{odd}s{odd}BbS{odd}s{odd}</think>{odd}END{odd}")
    assert keep(text, 1) == m(f"{odd}<think>{odd}{odd}S{odd}y{odd}s{odd}B{odd}bS{odd}s{odd}</think>{odd}END{odd}")
    assert keep(text, 2) == keep(text, -1) == text


def test_two_halves_of_an_emoji_are_two_characters():
    "A cut may bring the halves side by side; they are still two code points, as they came."
    text = m("<think>\ud83dBxb\ude00Sys</think>")
    got = keep(text, 0)
    assert list(got) == list(m("<think>\ud83d\ude00Sys</think>")) and len(got) == len(text) - len(m("Bxb"))


def test_serving_pairs_of_case_8():
    "x2 is summarised first, then x1: the older *summary* goes first, not the older block."
    text, trace = m(EIGHT), parse_memento(m(EIGHT), pairing="vllm")
    assert keep(trace, 0).text == m("<think>Sy2sSy3s</think>END")
    assert keep(trace, 0, False).text == m("<think>BbBbSy2sSy3s</think>END")
    assert keep(trace, 1).text == m("<think>Bx1bSy2sSy3s</think>END")
    assert keep(trace, 2).text == text
    assert keep(text, 0) != keep(trace, 0).text


def test_serving_pair_that_reaches_back_over_a_later_block():
    "x1 is summarised after x3: with keep 1 it is the newest."
    trace = parse_memento(m("<think>Bx1bBx2bSy2sSy1sBx3bSy3sBx4b</think>"), pairing="vllm")
    assert keep(trace, 1).text == m("<think>Sy2sSy1sBx3bSy3sBx4b</think>")
    trace = parse_memento(m("<think>Bx1bBx2bBx3bSy3sSy2sSy1s</think>"), pairing="vllm")
    assert keep(trace, 1).text == m("<think>Bx1bSy3sSy2sSy1s</think>")
    assert keep(trace, 2).text == m("<think>Bx1bBx2bSy3sSy2sSy1s</think>")


STACK = dict(pairing="vllm", nesting="stack")


@pytest.mark.parametrize(
    "text, k, mask, wanted",
    [
        ("<think>Bx1 Bx2bSy2s</think>END", 0, True, "<think>Bx1 Sy2s</think>END"),
        ("<think>Bx1Bx2bx3bSy2sSy1s</think>END", 0, True, "<think>Sy2sSy1s</think>END"),
        ("<think>Bx1Bx2bx3bSy2sSy1s</think>END", 0, False, "<think>BbSy2sSy1s</think>END"),
        ("<think>Bx1Bx2bx3bSy2sSy1s</think>END", 1, True, "<think>Bx1x3bSy2sSy1s</think>END"),
        ("<think>Bx1Bx2bx3bSy2sSy1s</think>END", 1, False, "<think>Bx1Bbx3bSy2sSy1s</think>END"),
        ("<think>Bx1Bx2bx3bSy2s</think>END", 0, True, "<think>Bx1x3bSy2s</think>END"),
        ("<think>Bx1Bx2bSy2sx3bSy1s</think>END", 0, True, "<think>Sy1s</think>END"),
        ("<think>Bx1Bx2bSy2sx3bSy1s</think>END", 0, False, "<think>BbSy1s</think>END"),
        ("<think>Bx1Bx2bSy2sx3bSy1s</think>END", 1, True, "<think>Bx1Sy2sx3bSy1s</think>END"),
        ("<think>Bx1SyszbSy1s</think>END", 0, True, "<think>Sy1s</think>END"),
        ("<think>Bx1bSyBx2bSzs", 0, True, "<think>Bx1bSySzs"),
        ("<think>Bx1bSy1BzbwsSvs</think>END", 0, True, "<think>Sy1wsSvs</think>END"),
        ("<think>Bx1bSy1BzbwsSvs</think>END", 1, True, "<think>Sy1BzbwsSvs</think>END"),
        ("<think>Bx1bBx2Sy1sx3bSy2s</think>END", 0, True, "<think>Sy2s</think>END"),
        ("<think>Bx1bBx2Sy1sx3bSy2s</think>END", 0, False, "<think>BbBbSy2s</think>END"),
        ("<think>Bx1bBx2Sy1sx3bSy2s</think>END", 1, True, "<think>Bx2Sy1sx3bSy2s</think>END"),
    ],
)
def test_nested_blocks(text, k, mask, wanted):
    "The whole range of an evicted block goes, nested blocks and mementos included."
    trace = parse_memento(m(text), **STACK)
    assert keep(trace, k, mask).text == m(wanted)
    assert keep(trace, -1, mask).text == m(text)


def test_options_of_the_reader_count():
    "A trace is used as it was read."
    text = m("<think>B\n```\nb\n```\nbSys</think>END")
    assert keep(parse_memento(text, fences="literal"), 0).text == m("<think>Sys</think>END")
    assert keep(parse_memento(text), 0).text == m("<think>\n```\nbSys</think>END")
    text = m("<THINK>Bx1bSy1s</think >you write BxbSys.")
    relaxed = keep(parse_memento(text, relaxed=True), 0)
    assert relaxed.text == m("<THINK>Sy1s</think >you write BxbSys.")
    assert relaxed.answer == m("you write BxbSys.")
    assert keep(text, 0) == m("<THINK>Sy1s</think >you write Sys.")


@pytest.mark.parametrize("text", [(B + "x" * 200) * 8000, T + (B + "x" * 100 + E) * 8000], ids=["25", "28"])
def test_hostile_texts_are_linear(text):
    start = time.process_time()
    assert keep(text, 0) == keep(text, 0, False) == text
    assert time.process_time() - start < 5


@pytest.mark.parametrize("policy", [ContextPolicy(0, mask_delimiters=True), ContextPolicy(2500), FOR_ANSWER], ids=str)
def test_many_blocks_are_linear(policy):
    n = 5_000
    pair, start = f"{B}x{b}{S}y{s}", time.process_time()
    report = compress_report(T + pair * n + E, policy=policy)
    k = 1 if policy.keep_last_block_for_answer else policy.keep_last_n_blocks
    gone = f"{S}y{s}" if policy.mask_delimiters else f"{B}{b}{S}y{s}"
    assert report.compressed.text == T + gone * (n - k) + pair * k + E
    assert time.process_time() - start < 4


# ---------------------------------------------------------------------------------------------------- (b) the settings


TRUNCATED = ["<think>Bx1bSy1sBx2bSy2sBx3", "<think>Bx1bSy1sBx2bSy2sBx3b", "<think>Bx1bSy1sBx2bSy2sBx3bSy3", "<think>Bx1bSy1sBx2bSy2sBx3</think>END"]


@pytest.mark.parametrize("k, left", [(-1, "12345"), (0, ""), (1, "5"), (2, "45"), (4, "2345"), (5, "12345"), (6, "12345")])
def test_keep_last_n_blocks(k, left):
    "-1: never; 0: each block when its memento ends; N: the N that were summarised last stay."
    text = m("<think>" + "".join(f"Bx{i}bSy{i}s" for i in range(1, 6)) + "</think>END")
    assert [t[1] for t, _ in pair_texts(parse(keep(text, k))) if t] == list(left)
    assert [t[1:] for t, _ in pair_texts(parse(keep(text, k, False)))] == [i if i in left else "" for i in "12345"]


def test_below_minus_one_is_an_error():
    for k in (-2, -99):
        with pytest.raises(ValueError):
            ContextPolicy(k)
        for text in (m(ONE), "", "only text", [], [m(ONE)], parse(m(ONE))):
            with pytest.raises(ValueError):
                compress_trace(text, keep_last_k=k)
            with pytest.raises(ValueError):
                compress_report(text, keep_last_k=k)


def test_mask_delimiters():
    "False (Qwen3, Olmo 3): only content goes. True (Phi): B, content and b go."
    text = m("<think>Bx1bSy1s</think>END")
    assert compress_trace(text, policy=QWEN3) == m("<think>BbSy1s</think>END")
    assert compress_trace(text, policy=PHI4) == m("<think>Sy1s</think>END")
    assert compress_trace(text, policy=VANILLA) == text
    assert (VANILLA.keep_last_n_blocks, QWEN3.keep_last_n_blocks, PHI4.keep_last_n_blocks) == (-1, 0, 0)
    assert (QWEN3.mask_delimiters, PHI4.mask_delimiters) == (False, True)
    assert POLICIES == {"vanilla": VANILLA, "qwen3": QWEN3, "phi4": PHI4}


def test_the_default_is_the_one_of_the_tutorial():
    "One block stays, and the delimiters of the others go."
    text = m("<think>Bx1bSy1sBx2bSy2sBx3bSy3s</think>END")
    wanted = m("<think>Sy1sSy2sBx3bSy3s</think>END")
    assert compress_trace(text) == compress_trace(text, 1) == compress_trace(text, keep_last_k=1) == wanted
    assert compress_report(text).policy == compress_report(text, 1).policy == ContextPolicy(keep_last_n_blocks=1, mask_delimiters=True)
    assert compress_report(text, 2).policy == ContextPolicy(keep_last_n_blocks=2, mask_delimiters=True)


def test_keep_last_block_for_answer():
    "A block waits for the next one to open; at the end of a trace the text is the one of keep 1."
    for text in map(m, (ONE, FOUR, TEN, CODE, "<think>Bx1bSy1s</think>END", "<think>Bx1bSy1sBx2bSy2s")):
        assert compress_trace(text, policy=FOR_ANSWER) == keep(text, 1, False)
        assert compress_trace(text, policy=FOR_ANSWER_DROP) == keep(text, 1)


@pytest.mark.parametrize("tail", ["Bx3", "Bx3b", "Bx3bSy3", "Bx3</think>END", "Bx3b</think>END", "Bx3Sy3s</think>END"])
def test_keep_last_block_for_answer_on_truncated_traces(tail):
    "A completed block goes as soon as the next one opens, whatever becomes of that one: here it is not keep 1."
    text = m("<think>Bx1bSy1sBx2bSy2s" + tail)
    assert compress_trace(text, policy=FOR_ANSWER_DROP) == m("<think>Sy1sSy2s" + tail) == keep(text, 0)
    assert compress_trace(text, policy=FOR_ANSWER) == m("<think>BbSy1sBbSy2s" + tail) == keep(text, 0, False)
    assert keep(text, 1) == m("<think>Sy1sBx2bSy2s" + tail)


def test_the_next_block_may_open_in_a_later_section():
    for text, wanted in [(TEN, "<think>Sy1s</think>mid<think>Bx2bSy2s</think>END"), ("<think>Bx1bSy1s</think>mid<think>Bx2</think>END", "<think>Sy1s</think>mid<think>Bx2</think>END"),
        ("<think>Bx1bSy1s</think>BxbSys", "<think>Bx1bSy1s</think>BxbSys"), ("<think>Bx1bSy1s</think><think>Bx2bSy2s", "<think>Bx1bSy1s</think><think>Bx2bSy2s")]:  # fmt: skip
        assert compress_trace(m(text), policy=FOR_ANSWER_DROP) == m(wanted)


def test_every_block_that_waits_goes():
    "Not at most one for each event: two blocks are summarised before the third opens."
    trace = parse_memento(m("<think>Bx1bBx2bSy2sSy1sBx3bSy3s</think>END"), pairing="vllm")
    assert compress_trace(trace, policy=FOR_ANSWER_DROP).text == m("<think>Sy2sSy1sBx3bSy3s</think>END")
    trace = parse_memento(m("<think>Bx1bBx2bSy2sSy1s</think>END"), pairing="vllm")
    assert compress_trace(trace, policy=FOR_ANSWER_DROP).text == trace.text


def test_restart_takes_the_delimiters():
    "It evicts B..b always; the memento is written again without the block, which a text does not show."
    for _, text, *_ in CASES:
        assert compress_trace(text, policy=RESTART) == keep(text, 0)
        assert compress_trace(text, policy=ContextPolicy(0, mask_delimiters=True, restart=True)) == keep(text, 0)


@pytest.mark.parametrize("text", ["<think>Bx1bSy1", "<think>Bx1bSy1</think>END", "<think>Bx1b</think>END", "<think>Bx1bSy1Bx2", "<think>Bx1bS"])
def test_only_the_end_of_a_memento_evicts(text):
    "`compact_on_summary_end`: the trigger is s, nothing else."
    for policy in ALL_POLICIES:
        assert compress_trace(m(text), policy=policy) == m(text)


def test_max_block_tokens_is_for_generation():
    for policy in (QWEN3, PHI4, ContextPolicy(1)):
        capped = ContextPolicy(policy.keep_last_n_blocks, mask_delimiters=policy.mask_delimiters, max_block_tokens=1)
        assert compress_trace(m(ONE), policy=capped) == compress_trace(m(ONE), policy=policy)


def test_mementos_never_go():
    "The code evicts the block only, whatever its comments say."
    for policy in ALL_POLICIES:
        for _, text, *_ in CASES:
            before, after = parse(text), compress_trace(parse(text), policy=policy)
            assert [before.text_of(x) for x in before.mementos] == [after.text_of(x) for x in after.mementos]


@pytest.mark.parametrize(
    "values, error",
    [
        (dict(keep_last_n_blocks=-2), ValueError),
        (dict(keep_last_n_blocks=1, keep_last_block_for_answer=True), ValueError),
        (dict(keep_last_n_blocks=-1, keep_last_block_for_answer=True), ValueError),
        (dict(keep_last_n_blocks=1, restart=True), ValueError),
        (dict(keep_last_n_blocks=-1, restart=True), ValueError),
        (dict(restart=True, keep_last_block_for_answer=True), ValueError),
        (dict(max_block_tokens=0), ValueError),
        (dict(max_block_tokens=-1), ValueError),
        (dict(keep_last_n_blocks=True), TypeError),
        (dict(keep_last_n_blocks=1.0), TypeError),
        (dict(keep_last_n_blocks="1"), TypeError),
        (dict(keep_last_n_blocks=None), TypeError),
        (dict(max_block_tokens=True), TypeError),
        (dict(max_block_tokens=2.5), TypeError),
        (dict(max_block_tokens="7"), TypeError),
    ],
)
def test_policies_that_mean_nothing(values, error):
    with pytest.raises(error):
        ContextPolicy(**values)


def test_policies_are_values():
    assert ContextPolicy() == ContextPolicy(0, False, False, False, None) == QWEN3
    assert len({VANILLA, QWEN3, PHI4, ContextPolicy(-1)}) == 3
    with pytest.raises(AttributeError):
        QWEN3.keep_last_n_blocks = 3
    for policy in ALL_POLICIES:
        line = policy.describe()
        assert isinstance(line, str) and line.strip() and "\n" not in line
    different = {VANILLA, *(policy for policy in ALL_POLICIES if policy.keep_last_n_blocks >= 0)}
    assert len({policy.describe() for policy in different}) == len(different)


def test_evictions():
    blocks = [(1, 5, 6, 9), (10, 12, 13, 15), (16, 18, 20, 25), (26, None, None, None)]
    assert QWEN3.evictions(blocks) == PHI4.evictions(blocks) == [9, 15, 25, None]
    assert ContextPolicy(1).evictions(blocks) == [15, 25, None, None]
    assert ContextPolicy(2).evictions(blocks) == [25, None, None, None]
    assert ContextPolicy(3).evictions(blocks) == VANILLA.evictions(blocks) == [None] * 4
    assert FOR_ANSWER.evictions(blocks) == [10, 16, 26, None]
    assert FOR_ANSWER.evictions(blocks[:3]) == [10, 16, None]
    assert QWEN3.evictions([]) == FOR_ANSWER.evictions(()) == []
    assert QWEN3.evictions([TokenBlock(0, 2, 3, 5)]) == [5]
    for broken in ((0, None, 3, 5), (0, 2, 3, None), (0, 2, None, None), (0, None, None, None)):
        for policy in ALL_POLICIES:
            assert policy.evictions([broken]) == [None]
    back = [(0, 1, 6, 7), (2, 3, 4, 5)]
    assert ContextPolicy(1).evictions(back) == [None, 7] and QWEN3.evictions(back) == [7, 5]


@check
@given(word=st.text("BbSsBbSsx", max_size=40), policy=policies, seed=st.randoms(use_true_random=False))
def test_evictions_equal_a_plain_queue(word, policy, seed):
    "On whatever the serving machine makes of random markers; the order in which blocks are given does not matter."
    ids = dict(block_start=1, block_end=2, summary_start=3, summary_end=4)
    blocks = parse_memento_ids([" BbSs".find(c) if c != "x" else 0 for c in word], ids)
    wanted, queue = {}, []
    for at, c in enumerate(word):
        done = [i for i, (_, end, _, last) in enumerate(blocks) if last == at and end is not None]
        queue += done
        n = 0 if policy.keep_last_block_for_answer else policy.keep_last_n_blocks
        if c == "B" if policy.keep_last_block_for_answer else done and n >= 0:
            while len(queue) > n:
                wanted[queue.pop(0)] = at
    assert policy.evictions(blocks) == [wanted.get(i) for i in range(len(blocks))]
    order = list(range(len(blocks)))
    seed.shuffle(order)
    assert policy.evictions([blocks[i] for i in order]) == [wanted.get(i) for i in order]


# ---------------------------------------------------------------------------------------------------- (c) the oracle


def test_random_texts_equal_the_oracle():
    "Four thousand texts, each with one of the policies."
    rng, dropped = random.Random(5), 0
    for text in random_texts(4000, seed=1):
        policy = rng.choice(ALL_POLICIES)
        got = compress_trace(text, policy=policy)
        assert got == reference(text, policy), (text, policy)
        dropped += len(got) < len(text)
    assert dropped > 700, "the texts are worth reading"


@check
@given(text=texts, policy=policies)
@example(text=m("<think>Bx1bSy1s</think><think>Bx2bSy2s"), policy=PHI4)
@example(text=m("<thiBbSysnk>Bx1bSy1s</think>"), policy=PHI4)
def test_any_text_equals_the_oracle(text, policy):
    assert compress_trace(text, policy=policy) == reference(text, policy)


def test_every_short_word_of_markers_equals_the_oracle():
    for length in range(5):
        for word in itertools.product(MARKERS, repeat=length):
            text = "p" + "x".join(word) + "q"
            for policy in (PHI4, QWEN3, FOR_ANSWER_DROP):
                assert compress_trace(text, policy=policy) == reference(text, policy), (text, policy)


@check
@given(text=texts)
def test_the_oracle_reads_the_blocks_that_the_parser_reads(text):
    assert oracle.blocks_of(text) == oracle.blocks_of_trace(parse_memento(text))


@check
@given(text=texts, policy=policies)
def test_a_trace_is_compressed_as_its_text_is(text, policy):
    assert compress_trace(parse(text), policy=policy).text == compress_trace(text, policy=policy)


# ---------------------------------------------------------------------------------------------------- (d) traces


def moved(trace, gone):
    "Offset in the input -> offset in the result."
    at, out = 0, []
    for is_gone in gone:
        out.append(at)
        at += not is_gone
    return [*out, at]


def check_trace(trace, policy):
    "Everything that is promised about `Trace -> Trace` and about the report, for one trace and one policy."
    text, mask = trace.text, policy.mask_delimiters or policy.restart
    gone, evicted = play(trace, policy)
    to = moved(trace, gone)
    report = compress_report(trace, policy=policy)
    result = report.compressed
    assert same(compress_trace(trace, policy=policy), result)

    # the text
    assert result.text == "".join(c for c, is_gone in zip(text, gone) if not is_gone)
    assert result.dialect == trace.dialect
    assert result.answer == trace.answer
    assert [tuple(x) for x in result.sections] == [("section", to[x.start], to[x.end], x.complete) for x in trace.sections]

    # the partition
    Trace(result.text, result.spans, result.issues, result.dialect, result.links)
    assert chunk(result.spans, result.text) == result.text
    left = [x for x in filled(trace.spans) if not gone[x.start]]
    went = [x for x in filled(trace.spans) if gone[x.start]]
    assert all(len(set(gone[x.start : x.end])) == 1 for x in filled(trace.spans))
    assert filled(result.spans) == [Span(x.kind, to[x.start], to[x.end], x.complete) for x in left]
    assert all(x.kind in ("block", "memento", "answer") for x in result.spans if x.size == 0)

    # the bookkeeping
    assert len(report.kept) == len(result.spans)
    for old, new in zip(report.kept, result.spans):
        assert (old.kind, old.size, old.complete) == (new.kind, new.size, new.complete) and trace.text_of(old) == result.text_of(new)
    assert [x.start for x in report.kept] == sorted(x.start for x in report.kept)
    assert filled(report.kept) == left and list(report.dropped) == went
    assert chunk(report.kept, text) == result.text
    assert isinstance(report.kept, tuple) and isinstance(report.dropped, tuple)

    # the pairs
    def inside(span, first, last):
        return first <= span.start - len(B) and span.end < last

    ranges = [(i, (first, last) if mask else (start, end)) for i, (first, start, end, last, _) in enumerate(oracle.blocks_of_trace(trace)) if evicted[i]]
    wanted, fates = [], []
    for i, pair in enumerate(trace.pairs):
        buried = any(inside(pair.block, *r) for j, r in ranges if j != i)
        fates.append((evicted[i], buried))
        if buried or evicted[i] and mask:
            continue
        block = Span("block", to[pair.block.start], to[pair.block.end], pair.block.complete)
        memento = pair.memento and Span("memento", to[pair.memento.start], to[pair.memento.end], pair.memento.complete)
        lost = memento and any(r[0] < pair.memento.start and pair.memento.end < r[1] for _, r in ranges)
        cut = memento and not lost and any(r[0] < pair.memento.start < r[1] or r[0] < pair.memento.end < r[1] for _, r in ranges)
        emptied = memento and memento.size < pair.memento.size and memento.size == 0  # all of it was a nested block
        wanted.append((block, [None] if lost else [memento, None] if cut or emptied else [memento]))
    assert [pair.index for pair in result.pairs] == list(range(len(result.pairs)))
    assert [pair.block for pair in result.pairs] == [block for block, _ in wanted]
    for pair, (_, mementos) in zip(result.pairs, wanted):
        assert pair.memento in mementos

    # the issues
    issues = [x for x in trace.issues if x.start == x.end or not all(gone[x.start : x.end])]
    assert set(result.issues) <= {x._replace(start=to[x.start], end=to[x.end]) for x in trace.issues}
    assert len(result.issues) <= len(trace.issues)
    for issue in issues:
        if issue.start < issue.end:
            assert issue._replace(start=to[issue.start], end=to[issue.end]) in result.issues
    assert [issue.code for issue in result.issues if issue.severity == "error"] == [x.code for x in trace.issues if x.severity == "error"]

    check_report(report, trace, policy, fates)
    return report


def check_report(report, trace, policy, fates):
    assert report.trace == trace and report.policy == policy
    assert (report.chars_before, report.chars_after) == (len(trace.text), len(report.compressed.text))
    if trace.text:
        assert report.percent == pytest.approx(100 * report.chars_after / report.chars_before) and 0 <= report.percent <= 100
    else:
        assert report.percent is None
    assert sum(x.size for x in report.kept) == report.chars_after
    assert sum(x.size for x in report.dropped) == report.chars_before - report.chars_after
    assert len(report.blocks) == len(trace.pairs)
    kept = []
    for fate, pair, (evicted, buried) in zip(report.blocks, trace.pairs, fates):
        assert fate.index == pair.index and fate.block_chars == pair.block.size
        assert fate.memento_chars == pair.memento.size if pair.memento else not fate.memento_chars
        assert fate.action == ("dropped" if evicted or buried else "kept")
        if evicted or buried:
            assert fate.reason in (["summarised"] if evicted else []) + (["inside"] if buried else [])
            continue
        reasons = []
        if pair.is_complete:
            kept.append(pair)
            reasons = ["vanilla" if policy.keep_last_n_blocks == -1 else "for_answer" if policy.keep_last_block_for_answer else "newest"]
        else:
            reasons += ["vanilla"] if policy.keep_last_n_blocks == -1 else []
            reasons += ["unclosed_block"] if not pair.block.complete else []
            reasons += ["no_memento"] if pair.memento is None else [] if pair.memento.complete else ["unclosed_memento"]
        assert fate.reason in reasons
    if policy.keep_last_n_blocks >= 0 and not policy.keep_last_block_for_answer:
        assert len(kept) == min(policy.keep_last_n_blocks, complete(trace)) or any(buried for _, buried in fates)


@check
@given(text=texts, policy=policies)
@example(text=m("<think>BBx2bSy2s</think>END"), policy=PHI4)
@example(text=m("<think>Bx1bSBx2bSy2s</think>END"), policy=PHI4)
def test_traces(text, policy):
    check_trace(parse(text), policy)


@settings(check, max_examples=80)
@given(text=st.one_of(block_soup, marker_soup, damaged_texts), opts=options, policy=policies)
@example(text=m("<think>Bx1bBx2Sy1x3bSy2s"), opts=ALL_OPTIONS[6], policy=PHI4)
@example(text=m("<think>Bx1bBx2Sy1x3bSy2s"), opts=ALL_OPTIONS[6], policy=QWEN3)
@example(text=m("<think>BbBbSsSs"), opts=ALL_OPTIONS[6], policy=QWEN3)
@example(text=m("<think>BBbbSys"), opts=ALL_OPTIONS[2], policy=PHI4)
@example(text=m("<think>BxbSBybSzs"), opts=ALL_OPTIONS[6], policy=PHI4)
def test_traces_read_in_other_ways(text, opts, policy):
    check_trace(parse_memento(text, **opts), policy)


def test_many_random_traces():
    rng = random.Random(9)
    for text in random_texts(500, seed=2):
        check_trace(parse_memento(text, **rng.choice(ALL_OPTIONS)), rng.choice(ALL_POLICIES))


@pytest.mark.parametrize("name, text, k, mask, wanted", CASES, ids=IDS)
def test_traces_of_the_table(name, text, k, mask, wanted):
    check_trace(parse(text), ContextPolicy(k, mask_delimiters=mask))


@check
@given(text=texts, policy=policies)
def test_flat_spans_are_the_old_ones_minus_the_dropped(text, policy):
    "Exactly, empty ones included; an emptied block stays where its delimiters stay."
    trace, mask = parse(text), policy.mask_delimiters or policy.restart
    gone, evicted = play(trace, policy)
    to = moved(trace, gone)
    dropped = {pair.block for pair, out in zip(trace.pairs, evicted) if out}
    wanted = []
    for i, span in enumerate(trace.spans):
        beside = [trace.spans[j] for j in (i - 1, i + 1) if 0 <= j < len(trace.spans)]
        if mask and (span in dropped or span.kind == "marker" and any(x in dropped for x in beside)):
            continue
        wanted.append(Span(span.kind, to[span.start], to[span.end], span.complete))
    result = compress_trace(trace, policy=policy)
    assert list(result.spans) == wanted
    blocks = [x for x in result.spans if x.kind == "block"]
    assert [pair.block for pair in result.pairs] == blocks and list(result.blocks) == blocks
    assert all(pair.memento is None or pair.memento in result.spans for pair in result.pairs)


def test_a_memento_without_its_block_is_not_paired_again():
    "Case 7: y2 lost x2, and x1 has no memento; the plain rule would bring them together."
    result = keep(parse(m(SEVEN)), 1)
    assert result.text == m("<think>Bx1bSy2sBx3bSy3s</think>END")
    assert pair_texts(result) == [("x1", None), ("x3", "y3")]
    assert pair_texts(parse(result.text)) == [("x1", "y2"), ("x3", "y3")]
    assert result.links is not None and result.links == tuple((p.block, p.memento) for p in result.pairs)
    assert [result.text_of(x) for x in result.mementos] == ["y2", "y3"]
    assert pair_texts(keep(parse(m(SEVEN)), 1, False)) == [("x1", None), ("", "y2"), ("x3", "y3")]


def test_pairs_of_a_clean_trace():
    trace = parse(m(ONE))
    assert pair_texts(keep(trace, 1)) == [(" x2 ", " y2 ")]
    assert pair_texts(keep(trace, 0)) == []
    assert pair_texts(keep(trace, 1, False)) == [("", " y1 "), (" x2 ", " y2 ")]
    assert pair_texts(keep(trace, 0, False)) == [("", " y1 "), ("", " y2 ")]
    assert [x.kind for x in keep(trace, 0, False).spans] == [x.kind for x in trace.spans]
    for k, mask in itertools.product((0, 1), (False, True)):
        result = keep(trace, k, mask)
        assert result.answer == "\nEND" and result.is_complete and not result.issues
        assert result.reasoning == result.text[len(T) : -len(E + "\nEND")]


@check
@given(text=texts, opts=options, policy=policies)
def test_compressed_traces_can_be_saved(text, opts, policy):
    result = compress_trace(parse_memento(text, **opts), policy=policy)
    assert pickle.loads(pickle.dumps(result)) == result
    if not re.search("[\ud800-\udfff]", text):
        assert Trace.from_json(result.to_json()) == result
        assert list(traces_from_arrow(traces_to_arrow([result]))) == [result]


@check
@given(text=texts, opts=options, policy=policies)
def test_the_input_is_not_changed(text, opts, policy):
    trace = parse_memento(text, **opts)
    before = pickle.dumps((trace.text, trace.spans, trace.issues, trace.dialect, trace.links))
    compress_report(trace, policy=policy)
    assert pickle.dumps((trace.text, trace.spans, trace.issues, trace.dialect, trace.links)) == before


def test_links_set_by_hand_are_followed():
    "The first block is linked to the last memento, the second to none."
    text = m("<think>Bx1bBx2bSy2sSy1s</think>END")
    trace = parse_memento(text)
    first, second = trace.blocks
    crossed = Trace(text, trace.spans, (), "memento", ((first, trace.mementos[1]), (second, None)))
    assert keep(crossed, 0).text == m("<think>Bx2bSy2sSy1s</think>END")
    assert pair_texts(keep(crossed, 0)) == [("x2", None)]
    assert pair_texts(keep(crossed, 0, False)) == [("", "y1"), ("x2", None)]
    check_trace(crossed, PHI4)
    check_trace(crossed, QWEN3)
    unlinked = Trace(text, trace.spans, (), "memento", ((first, None), (second, None)))
    assert keep(unlinked, 0).text == text
    assert keep(Trace(text, (Span("answer", 0, len(text)),)), 0).text == text


# ---------------------------------------------------------------------------------------------------- (e) properties


@check
@given(text=texts, policy=policies)
def test_never_writes_a_character(text, policy):
    got = compress_trace(text, policy=policy)
    assert len(got) <= len(text) and is_subsequence(got, text)


@check
@given(text=texts, opts=options, mask=st.booleans())
def test_identity(text, opts, mask):
    "For keep -1, and for keep >= the number of complete pairs."
    trace = parse_memento(text, **opts)
    n = complete(parse(text))
    assert n == oracle.complete_pairs(text)
    for k in (-1, n, n + 1, 99):
        assert keep(text, k, mask) == text
    for k in (-1, complete(trace), complete(trace) + 1, 99):
        result = keep(trace, k, mask)
        assert same(result, trace)
        report = compress_report(trace, policy=ContextPolicy(k, mask_delimiters=mask))
        assert list(report.kept) == list(trace.spans) and report.dropped == () and all(fate.action == "kept" for fate in report.blocks)


@check
@given(text=texts, opts=options)
def test_monotone(text, opts):
    "The less is kept, the shorter; what is dropped at a larger keep is dropped at a smaller one."
    trace = parse_memento(text, **opts)
    for source, n in ((text, complete(parse(text))), (trace, complete(trace))):
        read = (lambda x: x) if isinstance(source, str) else (lambda x: x.text)
        for mask in (False, True):
            results = [read(keep(source, k, mask)) for k in [*range(n + 1), -1]]
            for small, big in itertools.pairwise(results):
                assert len(small) <= len(big) and is_subsequence(small, big)
        for k in (*range(n + 1), -1):
            small, big = read(keep(source, k, True)), read(keep(source, k, False))
            assert len(small) <= len(big) and is_subsequence(small, big)
    small, big = compress_trace(text, policy=FOR_ANSWER_DROP), compress_trace(text, policy=FOR_ANSWER)
    assert is_subsequence(small, big)
    assert len(keep(text, 0)) <= len(small) and is_subsequence(keep(text, 0), small)


def lesser(k, j):
    "min, with -1 for no limit."
    return max(k, j) if -1 in (k, j) else min(k, j)


keeps = st.integers(-1, 4)


@settings(check, max_examples=80)
@given(text=texts, k=keeps, j=keeps)
def test_twice_with_delimiters_kept(text, k, j):
    "Idempotent on any text; composed, wherever the block that went did not hold the one closing tag of an open section."
    once = keep(text, k, False)
    assert keep(once, k, False) == once
    assert compress_trace(compress_trace(text, policy=FOR_ANSWER), policy=FOR_ANSWER) == compress_trace(text, policy=FOR_ANSWER)
    if len(parse(once).sections) == len(parse(text).sections):
        assert keep(once, j, False) == keep(text, lesser(k, j), False)


def test_many_twice_with_delimiters_kept():
    for text in random_texts(250, seed=3):
        for k in (0, 1, 2):
            once = keep(text, k, False)
            assert keep(once, k, False) == once
            if len(parse(once).sections) == len(parse(text).sections):
                for j in (0, 1, 2):
                    assert keep(once, j, False) == keep(text, min(j, k), False), (text, k, j)


def test_composition_on_strings_can_fail_even_with_delimiters_kept():
    "The second section is one only because a `</think>` follows, and that one is quoted in a block that goes."
    text = m("<think></think><think>Bx1 </think> bSy1sBx2bSy2s")
    once = keep(text, 1, False)
    assert once == m("<think></think><think>BbSy1sBx2bSy2s")
    assert keep(text, 0, False) == m("<think></think><think>BbSy1sBbSy2s")
    assert [len(parse(x).sections) for x in (text, once)] == [2, 1]
    assert keep(once, 0, False) == once != keep(text, 0, False)
    trace = parse(text)
    assert same(keep(keep(trace, 1, False), 0, False), keep(trace, 0, False))


@settings(check, max_examples=80)
@given(text=st.one_of(tidy_texts, damaged_texts), k=keeps, j=keeps)
def test_twice_with_dropped_delimiters_on_clean_traces(text, k, j):
    assume(is_clean(text) and reads_alike(text, ContextPolicy(k, mask_delimiters=True)))
    once = keep(text, k)
    assert keep(once, k) == once
    assert keep(once, j) == keep(text, lesser(k, j))


def test_many_twice_with_dropped_delimiters_on_clean_traces():
    clean = 0
    for text in random_texts(250, seed=4):
        for k in (0, 1, 2):
            if is_clean(text) and reads_alike(text, ContextPolicy(k, mask_delimiters=True)):
                clean += 1
                once = keep(text, k)
                assert keep(once, k) == once
                assert [keep(once, j) for j in (0, 1, 2)] == [keep(text, min(j, k)) for j in (0, 1, 2)]
    assert clean > 150


def test_dropping_twice_fails_where_a_block_without_a_memento_stands_before():
    "Case 7: read again, the orphaned memento of x2 goes to x1, and x1 is evicted; from the report or the trace it is not."
    text = m(SEVEN)
    once = keep(text, 1)
    assert once == m("<think>Bx1bSy2sBx3bSy3s</think>END")
    assert keep(once, 1) == m("<think>Sy2sBx3bSy3s</think>END") != once
    assert keep(once, 0) == m("<think>Sy2sSy3s</think>END") != keep(text, 0) == m("<think>Bx1bSy2sSy3s</think>END")
    trace = parse(text)
    assert keep(keep(trace, 1), 1).text == once
    assert keep(keep(trace, 1), 0).text == keep(text, 0)
    assert keep(compress_report(text, 1).compressed, 0).text == keep(text, 0)
    assert keep(keep(text, 1, False), 0, False) == keep(text, 0, False)


def test_dropping_twice_fails_where_a_tag_comes_about():
    "Two halves of a tag meet where a block was; a trace knows that it is none."
    text = m("<think>Bx1bSy1s</thiBx2bnk>Sy2sBx3bSy3s</think>END")
    once = keep(text, 1)
    assert once == m("<think>Sy1s</think>Sy2sBx3bSy3s</think>END")
    assert is_clean(text) and not reads_alike(text, ContextPolicy(1, mask_delimiters=True))
    assert keep(once, 0) == once != keep(text, 0)
    assert keep(keep(parse(text), 1), 0).text == keep(text, 0) == m("<think>Sy1s</think>Sy2sSy3s</think>END")


def check_twice(trace, k, j, mask):
    once = keep(trace, k, mask)
    assert same(keep(once, k, mask), once)
    assert same(keep(once, j, mask), keep(trace, lesser(k, j), mask))
    assert keep(once, j, mask).text == keep(trace, lesser(k, j), mask).text


@settings(check, max_examples=80)
@given(text=texts, opts=options, k=keeps, j=keeps, mask=st.booleans())
@example(text=m(SEVEN), opts={}, k=1, j=0, mask=True)
@example(text=m(EIGHT), opts=dict(pairing="vllm"), k=1, j=1, mask=True)
@example(text=m("<think>Bx1bBx2Sy1x3bSy2s"), opts=STACK, k=0, j=0, mask=False)
def test_twice_from_trace_to_trace(text, opts, k, j, mask):
    "On any text, delimiters kept or dropped, flat or nested: nothing is read again, so nothing is misread."
    trace = parse_memento(text, **opts)
    check_twice(trace, k, j, mask)
    for policy in (FOR_ANSWER, FOR_ANSWER_DROP, RESTART):
        once = compress_trace(trace, policy=policy)
        assert same(compress_trace(once, policy=policy), once)


def test_many_twice_from_trace_to_trace():
    rng = random.Random(13)
    for text in random_texts(500, seed=6):
        check_twice(parse_memento(text, **rng.choice(ALL_OPTIONS)), rng.randint(-1, 3), rng.randint(-1, 3), rng.random() < 0.7)


tails = st.lists(st.one_of(markers.filter(lambda x: x != T), plain_pieces, st.sampled_from((f"`{E}`", f"```\n{b}\n```"))), max_size=8).map("".join)


@check
@given(text=tidy_texts, tail=tails.filter(lambda tail: T not in tail), policy=policies)
def test_answers_are_not_touched(text, tail, policy):
    "Quoted markers and tags in the answer stay what they are, and change nothing before it."
    text += "."
    answer = parse(text).answer + tail
    assert compress_trace(text + tail, policy=policy) == compress_trace(text, policy=policy) + tail
    assert compress_trace(text + tail, policy=policy).endswith(E + answer)
    assert compress_trace(parse(text + tail), policy=policy).answer == answer


def test_answers_with_whole_quoted_traces():
    quoted = m("Write it so:\r\n```\n<|block_start|>x1b Sy1s BxbSyss BB bb </think> \n```\nand nothing else.")
    for policy in ALL_POLICIES:
        head = compress_trace(m("<think>Bx1bSy1sBx2bSy2s</think>"), policy=policy)
        assert compress_trace(m("<think>Bx1bSy1sBx2bSy2s</think>") + quoted, policy=policy) == head + quoted


# ---------------------------------------------------------------------------------------------------- (f) other dialects

OTHERS = [
    "", "only text", " \n\t", "<thinking>first</thinking>\nthen", "<thinking>never closed", "<think>first</think>then", "[THINK]first[/THINK]then", "<reasoning>x</reasoning>y",
    "\u25c1think\u25b7first\u25c1/think\u25b7then", "<|begin_of_thought|>x<|end_of_thought|><|begin_of_solution|>y<|end_of_solution|>", "<seed:think>x</seed:think>y", "</think>END", "a < b </think", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", OTHERS)
def test_other_dialects_come_back_unchanged(text):
    trace = parse(text)
    for policy in ALL_POLICIES:
        assert compress_trace(text, policy=policy) == text
        result = compress_trace(trace, policy=policy)
        assert same(result, trace) and result.dialect == trace.dialect
        report = compress_report(text, policy=policy)
        assert list(report.blocks) == [] and report.dropped == () and list(report.kept) == list(trace.spans)
        assert report.percent == (100 if text else None)
        assert same(report.trace, trace) and report.compressed.dialect == trace.dialect


@pytest.mark.parametrize("tag", ["thinking", "reasoning", "thought"])
def test_blocks_under_another_tag(tag):
    "With blocks it is Memento, whatever stands around them; no tag is invented."
    text = f"<{tag}>" + m("Bx1bSy1sBx2bSy2s") + f"</{tag}>END"
    assert compress_trace(text) == f"<{tag}>" + m("Sy1sBx2bSy2s") + f"</{tag}>END"


def test_a_trace_of_another_dialect_keeps_its_text():
    "Read as plain thinking, the markers of blocks are text."
    text = m("<think>Bx1bSy1s</think>END")
    trace = parse(text, dialect="think")
    assert trace.pairs == () and keep(trace, 0).text == text and same(keep(trace, 0), trace)


# ---------------------------------------------------------------------------------------------------- (g) the report


def test_report_of_a_trace():
    text = m("<think>\nB x1 b\nS y1 s\nBx2bBx3bSy3sBx4Sy4sBx5bSy5")
    report = compress_report(text, policy=ContextPolicy(0, mask_delimiters=True))
    assert [(f.index, f.action, f.reason, f.block_chars) for f in report.blocks] == [
        (0, "dropped", "summarised", 4), (1, "kept", "no_memento", 2), (2, "dropped", "summarised", 2), (3, "kept", "unclosed_block", 2), (4, "kept", "unclosed_memento", 2),
    ]  # fmt: skip
    assert [f.memento_chars or 0 for f in report.blocks] == [4, 0, 2, 2, 2]
    assert report.compressed.text == m("<think>\n\nS y1 s\nBx2bSy3sBx4Sy4sBx5bSy5")
    assert report.chars_before - report.chars_after == len(m("B x1 bBx3b"))
    assert report.percent == pytest.approx(100 * report.chars_after / len(text))
    assert [text[x.start : x.end] for x in report.dropped] == [B, " x1 ", b, B, "x3", b]


@pytest.mark.parametrize(
    "policy, reasons",
    [
        (VANILLA, ["vanilla"] * 3),
        (ContextPolicy(0), ["summarised"] * 3),
        (ContextPolicy(1), ["summarised", "summarised", "newest"]),
        (ContextPolicy(2), ["summarised", "newest", "newest"]),
        (ContextPolicy(3), ["newest"] * 3),
        (ContextPolicy(99, mask_delimiters=True), ["newest"] * 3),
        (FOR_ANSWER, ["summarised", "summarised", "for_answer"]),
        (RESTART, ["summarised"] * 3),
    ],
    ids=str,
)
def test_reasons(policy, reasons):
    report = compress_report(m("<think>Bx1bSy1sBx2bSy2sBx3bSy3s</think>END"), policy=policy)
    assert [fate.reason for fate in report.blocks] == reasons
    assert [fate.action for fate in report.blocks] == ["dropped" if r == "summarised" else "kept" for r in reasons]


def test_reason_inside():
    "x2 lies in x1, has no memento, and goes with it."
    trace = parse_memento(m("<think>Bx1Bx2bx3bSy1s</think>END"), nesting="stack")
    report = compress_report(trace, policy=PHI4)
    assert [(fate.action, fate.reason) for fate in report.blocks] == [("dropped", "summarised"), ("dropped", "inside")]
    assert report.compressed.text == m("<think>Sy1s</think>END") and report.compressed.pairs == ()
    report = compress_report(trace, policy=QWEN3)
    assert [(fate.action, fate.reason) for fate in report.blocks] == [("dropped", "summarised"), ("dropped", "inside")]
    assert report.compressed.text == m("<think>BbSy1s</think>END") and pair_texts(report.compressed) == [("", "y1")]


@pytest.mark.parametrize("policy", [PHI4, QWEN3])
def test_an_empty_block_inside_goes_with_the_one_around(policy):
    trace = parse_memento(m("<think>Bx1Bbx3bSy1s</think>END"), nesting="stack")
    report = compress_report(trace, policy=policy)
    assert [(fate.action, fate.reason) for fate in report.blocks] == [("dropped", "summarised"), ("dropped", "inside")]
    assert len(report.compressed.pairs) == (policy is QWEN3)


def test_what_is_empty_and_never_closed_stays_beside_what_goes():
    "Its start marker stays, so its span and its pair stay, also right before the start marker of a block that goes."
    result = keep(parse(m("<think>BBx2bSy2s</think>END")), 0)
    assert result.text == m("<think>BSy2s</think>END") and len(T + B) == 22
    assert [tuple(x) for x in result.spans[1:4]] == [("marker", 7, 22, True), ("block", 22, 22, False), ("marker", 22, 39, True)]
    assert [tuple(pair) for pair in result.pairs] == [(0, Span("block", 22, 22, False), None)]
    trace = parse(m("<think>Bx1bSBx2bSy2s</think>END"))
    assert [(x.block.complete, x.memento.complete) for x in trace.pairs] == [(True, False), (True, True)]
    result = keep(trace, 0)
    assert result.text == m("<think>Bx1bSSy2s</think>END")
    assert pair_texts(result) == [("x1", "")] and not result.pairs[0].memento.complete


def test_an_empty_block_is_dropped_too():
    "Case 17: with delimiters kept there is nothing to take, but the model has let go of it."
    report = compress_report(m("<think>BbSys</think>END"), policy=QWEN3)
    assert [(f.action, f.reason, f.block_chars, f.memento_chars) for f in report.blocks] == [("dropped", "summarised", 0, 1)]
    assert report.dropped == () and report.percent == 100
    report = compress_report(m("<think>BbSys</think>END"), policy=PHI4)
    assert [x.kind for x in report.dropped] == ["marker", "marker"]


def test_nothing_left_to_divide_by():
    "Case 16."
    report = compress_report("")
    assert (report.chars_before, report.chars_after, report.percent) == (0, 0, None)
    assert report.kept == report.dropped == () and list(report.blocks) == []
    assert report.compressed.text == "" and report.compressed.issues == ()


def test_a_report_shows_itself():
    for text in ("", m(ONE), "only text"):
        report = compress_report(text)
        assert repr(report) and len(repr(compress_report(m("<think>" + "Bx1bSy1s" * 200 + "</think>")))) < 100_000
        assert report.trace == parse(text)


# ---------------------------------------------------------------------------------------------------- (h) columns

COLUMN = [m(ONE), "", "only text", m(SEVEN), m(FOUR), "\ufeff" + m(TEN), m("<think>Bx1bSy1sBx2 not done")]


def check_column(column, wanted=COLUMN):
    for policy in (None, PHI4, QWEN3, FOR_ANSWER, VANILLA):
        got = compress_trace(column, policy=policy)
        assert type(got) is list and all(type(x) is str for x in got)
        assert got == [compress_trace(text, policy=policy) for text in wanted]
        reports = compress_report(column, policy=policy)
        assert type(reports) is list and [r.compressed.text for r in reports] == got
        assert [r.trace.text for r in reports] == wanted
    assert compress_trace(column, 0) == [compress_trace(text, 0) for text in wanted]
    assert compress_trace(column, keep_last_k=-1) == wanted


@pytest.mark.parametrize("make", [list, tuple], ids=["list", "tuple"])
def test_lists(make):
    check_column(make(COLUMN))
    assert compress_trace(make([])) == [] and compress_report(make([])) == []
    traces = [parse_memento(text, **STACK) for text in COLUMN]
    got = compress_trace(make(traces), 0)
    assert type(got) is list and got == [compress_trace(trace, 0) for trace in traces]
    assert compress_trace(make([COLUMN[0], traces[0]]), 0) == [compress_trace(COLUMN[0], 0), compress_trace(traces[0], 0)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_arrow_columns(kind):
    column = pa.array(COLUMN).cast(kind)
    check_column(column)
    check_column(column.slice(2, 3), COLUMN[2:5])
    check_column(pa.chunked_array([column.slice(0, 3), column.slice(3, 0), column.slice(3)]))
    check_column(pa.table({"response": column})["response"])
    check_column(pa.table({"response": column}).column(0))
    assert compress_trace(column.slice(0, 0)) == []
    assert compress_trace(pa.chunked_array([], pa.string())) == []


def test_datasets_columns():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"response": COLUMN, "source": ["a"] * len(COLUMN)})
    check_column(rows["response"])
    check_column(list(rows["response"]))
    check_column(rows[1:3]["response"], COLUMN[1:3])
    check_column(rows.select([3, 0])["response"], [COLUMN[3], COLUMN[0]])
    check_column(rows.data["response"])
    mapped = rows.map(lambda row: {"short": compress_trace(row["response"])})
    assert list(mapped["short"]) == compress_trace(COLUMN)
    batched = rows.map(lambda batch: {"short": compress_trace(batch["response"])}, batched=True, batch_size=2)
    assert list(batched["short"]) == compress_trace(COLUMN)


def test_pandas_columns():
    pd = pytest.importorskip("pandas")
    check_column(pd.Series(COLUMN))
    check_column(pd.Series(COLUMN, dtype=object, index=range(10, 10 + len(COLUMN))))
    check_column(pd.DataFrame({"response": COLUMN}).iloc[::-1]["response"], COLUMN[::-1])


@pytest.mark.parametrize("bad", [None, 3, 2.5, b"x", ["x"], {"response": "x"}, object()], ids=lambda x: type(x).__name__)
def test_items_that_are_no_text(bad):
    for run in (compress_trace, compress_report):
        with pytest.raises(TypeError, match=r"item 3\b"):
            run([m(ONE), "x", parse("y"), bad])
        with pytest.raises(TypeError, match=r"item 0\b"):
            run((bad, "x"))
    if not isinstance(bad, list):
        for run in (compress_trace, compress_report):
            with pytest.raises(TypeError):
                run(bad)


def test_missing_values_in_columns():
    for column in (pa.array(["x", None]), pa.chunked_array([["x"], [None]])):
        with pytest.raises(TypeError, match=r"item 1\b"):
            compress_trace(column)


def test_keep_last_k_and_policy_are_two_words_for_one_thing():
    for run in (compress_trace, compress_report):
        for k in (-1, 0, 1):
            for text in (m(ONE), [m(ONE)], [], parse(m(ONE))):
                with pytest.raises(ValueError):
                    run(text, k, QWEN3)
                with pytest.raises(ValueError):
                    run(text, keep_last_k=k, policy=ContextPolicy(k))
        for k in (1.0, "1", True):
            with pytest.raises(TypeError):
                run(m(ONE), keep_last_k=k)


@check
@given(text=texts, k=keeps)
def test_keep_last_k_is_short_for_a_policy(text, k):
    assert compress_trace(text, k) == compress_trace(text, keep_last_k=k) == keep(text, k)
    assert compress_report(text, k).policy == ContextPolicy(k, mask_delimiters=True)


@check
@given(pairs=st.lists(st.tuples(plain_texts, plain_texts), max_size=5), gap=plain_texts, answer=plain_texts, k=st.integers(0, 5))
def test_what_was_written_is_written_shorter(pairs, gap, answer, k):
    "A text from its parts, against the text from the parts that stay."
    old = max(len(pairs) - k, 0)
    parts = [("" if i < old else f"{B}{x}{b}") + f"{S}{y}{s}" + gap for i, (x, y) in enumerate(pairs)]
    assert keep(build_memento(pairs, answer, gap=gap), k) == T + gap + "".join(parts) + E + answer
    emptied = [("" if i < old else x, y) for i, (x, y) in enumerate(pairs)]
    assert keep(build_memento(pairs, answer, gap=gap), k, False) == build_memento(emptied, answer, gap=gap)
