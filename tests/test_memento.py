"""The Memento parser against an independent reading of the format, and against the properties it promises."""

import itertools
import json
import pickle
import re
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from oracle_memento import reference_parse, reference_serving
from tracebook.memento import MEMENTO_TOKENS, MementoStream, build_memento, parse, parse_memento, parse_memento_ids
from tracebook.trace import Trace, traces_from_arrow, traces_to_arrow

T, E = "<think>", "</think>"
B, b = "<|block_start|>", "<|block_end|>"
S, s = "<|summary_start|>", "<|summary_end|>"
LETTERS = {"T": T, "E": E, "B": B, "b": b, "S": S, "s": s}
MARKERS = tuple(LETTERS.values())
MARKER = re.compile(r"</?think>|<\|(?:block|summary)_(?:start|end)\|>")

OPTIONS = {
    "pairing": ("adjacent", "vllm"),
    "nesting": ("flat", "stack"),
    "fences": ("marker", "literal"),
    "relaxed": (False, True),
    "assume_thinking": (False, True),
    "expect_memento": (False, True),
}
ALL_OPTIONS = [dict(zip(OPTIONS, values)) for values in itertools.product(*OPTIONS.values())]

SEVERITY = {
    "truncated_block": "error", "truncated_summary": "error", "unclosed_think": "error",
    "empty_block": "info", "empty_summary": "info", "marker_in_fence": "info",
} | dict.fromkeys(
    "block_reopened summary_reopened unclosed_block unclosed_summary missing_summary orphan_summary stray_block_end "
    "stray_summary_end stray_think_close stray_think_open think_reopened think_close_in_block think_close_in_summary "
    "implicit_think_open marker_in_answer markers_stripped relaxed_tag nested_block partial_marker".split(),
    "warn",
)

check = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
hard_check = settings(check, max_examples=250)


# ---------------------------------------------------------------------------------------------------- strategies

PLAIN = (
    "x", " ", "\n", "\r\n", "```", "``", "`", "```py\nz=1\n```", "<", ">", "|", "<|", "</", "<t", "<think", "</thin",
    "<|block_", "<|block_start", "<|summary_end|", "|>", "think>", "<|>", "\u00e9", "\u2028", "\U0001f600", "\x00",
    "\ufeff", "don't", "<b>", "a < b", "\u3000", "\xa0",
)  # fmt: skip
QUOTES = (f"`{E}`", f'"{T}"', f"```\n{b}\n```", f"```{b}", f"the tag {E} ")
RELAXED = ("<THINK>", "</THINK>", "<think >", "</think >", '<think signature="q">', "< think>", "<Think\n>")

plain_pieces = st.sampled_from(PLAIN)
markers = st.sampled_from(MARKERS)
plain_texts = st.lists(plain_pieces, max_size=4).map("".join).filter(lambda text: not MARKER.search(text))
pairs_of_text = st.tuples(plain_texts, plain_texts)


def wrap(block, gap, memento):
    "The pieces of one block with its memento."
    return [B, block, b, gap, S, memento, s]


@st.composite
def strict_pieces(draw):
    "The pieces of a text that follows the strict grammar."
    pieces = [draw(plain_texts)]
    for _ in range(draw(st.integers(1, 2))):
        pieces += [T, draw(plain_texts)]
        for block, memento in draw(st.lists(pairs_of_text, max_size=3)):
            pieces += [*wrap(block, draw(plain_texts), memento), draw(plain_texts)]
        pieces += [E, draw(plain_texts)]
    return pieces


@st.composite
def damaged_pieces(draw):
    "A strict text with a few pieces lost, doubled, swapped or put in."
    pieces = list(draw(strict_pieces()))
    for _ in range(draw(st.integers(1, 3))):
        if not pieces:
            break
        i = draw(st.integers(0, len(pieces) - 1))
        damage = draw(st.sampled_from(("lose", "lose a run", "double", "swap", "insert", "quote", "cut")))
        if damage == "lose":
            del pieces[i]
        elif damage == "lose a run":
            del pieces[i : i + draw(st.integers(2, 4))]
        elif damage == "double":
            pieces.insert(i, pieces[i])
        elif damage == "swap":
            j = draw(st.integers(0, len(pieces) - 1))
            pieces[i], pieces[j] = pieces[j], pieces[i]
        elif damage == "insert":
            pieces.insert(i, draw(markers))
        elif damage == "quote":
            pieces.insert(i, draw(st.sampled_from(QUOTES)))
        else:
            pieces[i] = pieces[i][: len(pieces[i]) // 2]
    return pieces


strict_texts = strict_pieces().map("".join)
damaged_texts = damaged_pieces().map("".join)
marker_soup = st.lists(st.one_of(markers, markers, plain_pieces, st.sampled_from(QUOTES)), max_size=14).map("".join)
dense_soup = st.lists(markers, max_size=12).map("".join)
texts = st.one_of(marker_soup, damaged_texts, dense_soup, strict_texts)

surrogates = st.sampled_from(("\ud800", "\udfff", "\ud83d\ude00"))
any_texts = st.one_of(
    texts,
    st.lists(st.one_of(markers, plain_pieces, surrogates, st.sampled_from(RELAXED)), max_size=12).map("".join),
    st.text(st.characters(codec=None), max_size=30),
)
encodable_texts = any_texts.filter(lambda text: not re.search("[\ud800-\udfff]", text))
options = st.sampled_from(ALL_OPTIONS)
symbols = st.lists(st.sampled_from("BbSsBbSsx"), max_size=24).map("".join)


# ---------------------------------------------------------------------------------------------------- helpers


def letters(text):
    "Marker letters to markers; every other character stands for itself."
    return "".join(LETTERS.get(c, c) for c in text)


def plain(span):
    "A span as (start, end, complete), or None."
    return None if span is None else (span.start, span.end, span.complete)


def codes(trace):
    return sorted(issue.code for issue in trace.issues)


def as_reference(trace):
    "A trace in the form in which the reference gives it."
    spans = [(span.kind, span.start, span.end, span.complete) for span in trace.spans]
    return spans, codes(trace), [(plain(pair.block), plain(pair.memento)) for pair in trace.pairs], trace.answer


def pair_texts(trace):
    "(block text, memento text or None) for each block."
    cut = lambda span: None if span is None else trace.text[span.start : span.end]
    return [(cut(pair.block), cut(pair.memento)) for pair in trace.pairs]


def span_texts(trace, kind):
    return [trace.text[span.start : span.end] for span in trace.spans if span.kind == kind]


def same(one, other):
    "Equal, and equal in every part (so that a careless `==` cannot hide a difference)."
    parts = lambda trace: (trace.text, tuple(trace.spans), tuple(trace.issues), trace.dialect, tuple(trace.pairs))
    return parts(one) == parts(other) and one.answer == other.answer and one == other


def check_partition(trace, text):
    assert trace.text == text
    assert "".join(text[span.start : span.end] for span in trace.spans) == text
    at = 0
    for span in trace.spans:
        assert span.start == at and span.end >= at
        assert span.kind in {"prefix", "marker", "gap", "block", "memento", "answer"}
        if span.start == span.end:
            assert span.kind in {"block", "memento", "answer"}
        at = span.end
    assert at == len(text)
    for issue in trace.issues:
        assert 0 <= issue.start <= issue.end <= len(text)
        assert issue.severity == SEVERITY[issue.code]
        assert issue.message
    assert [pair.index for pair in trace.pairs] == list(range(len(trace.pairs)))


def stream(text, cuts, **opts):
    "Feed `text` cut at the offsets `cuts`; returns (trace, the spans given out on the way)."
    reader, given_out = MementoStream(**opts), []
    edges = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        given_out += reader.feed(text[start:end])
    return reader.close(), given_out


def check_stream(text, cuts, **opts):
    batch = parse_memento(text, **opts)
    trace, given_out = stream(text, cuts, **opts)
    assert same(trace, batch)
    assert given_out == list(batch.spans)[: len(given_out)]


# ---------------------------------------------------------------------------------------------------- (a) the reference


@pytest.mark.parametrize("pairing", ["adjacent", "vllm"])
@hard_check
@given(text=texts)
def test_parse_equals_reference(pairing, text):
    assert as_reference(parse_memento(text, pairing=pairing)) == reference_parse(text, pairing)


@pytest.mark.parametrize("pairing", ["adjacent", "vllm"])
def test_parse_equals_reference_on_every_short_text(pairing):
    "Every sequence of up to four markers, with and without text between them."
    for length in range(5):
        for word in itertools.product(MARKERS, repeat=length):
            for text in ("".join(word), "x" + "x".join(word) + "x"):
                got, expected = as_reference(parse_memento(text, pairing=pairing)), reference_parse(text, pairing)
                assert got == expected, text


@check
@given(text=st.one_of(texts, plain_texts, plain_texts), pairing=st.sampled_from(OPTIONS["pairing"]))
def test_assume_thinking_equals_reference(text, pairing):
    got = parse_memento(text, pairing=pairing, assume_thinking=True)
    assert as_reference(got) == reference_parse(text, pairing, assume_thinking=True)


@pytest.mark.parametrize("text", [b, "x" + s, f"x{b}y{s}z"])
def test_assume_thinking_is_for_marker_free_text(text):
    assert as_reference(parse_memento(text, assume_thinking=True)) == reference_parse(text, assume_thinking=True)


# ---------------------------------------------------------------------------------------------------- (b) partition


@hard_check
@given(text=any_texts, opts=options)
def test_spans_tile_any_text(text, opts):
    check_partition(parse_memento(text, **opts), text)


@check
@given(text=any_texts)
def test_spans_tile_under_all_options(text):
    for opts in ALL_OPTIONS:
        check_partition(parse_memento(text, **opts), text)


@check
@given(text=texts)
def test_flat_blocks_and_mementos_are_the_spans(text):
    "With flat nesting pairs point into the partition, and every block is in exactly one pair."
    trace = parse_memento(text)
    assert [pair.block for pair in trace.pairs] == [span for span in trace.spans if span.kind == "block"]
    assert list(trace.blocks) == [pair.block for pair in trace.pairs]
    assert list(trace.mementos) == [span for span in trace.spans if span.kind == "memento"]
    paired = [pair.memento for pair in trace.pairs if pair.memento is not None]
    assert len(paired) == len(set(paired)) and set(paired) <= set(trace.mementos)
    assert len(trace.mementos) - len(paired) == codes(trace).count("orphan_summary")


# ---------------------------------------------------------------------------------------------------- (c) streaming


@hard_check
@given(text=any_texts, opts=options, data=st.data())
def test_stream_equals_batch(text, opts, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    check_stream(text, cuts, **opts)


@check
@given(text=any_texts, opts=options)
def test_stream_by_single_characters_equals_batch(text, opts):
    check_stream(text, range(1, len(text)), **opts)


@settings(check, max_examples=60)
@given(text=any_texts, data=st.data())
def test_stream_equals_batch_under_all_options(text, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    for opts in ALL_OPTIONS:
        check_stream(text, cuts, **opts)


@check
@given(text=any_texts, opts=options, data=st.data())
def test_committed_spans_do_not_depend_on_what_follows(text, opts, data):
    "What was given out for the first part of a text starts the result of every continuation of it."
    rest = data.draw(any_texts)
    reader = MementoStream(**opts)
    given_out = list(reader.feed(text))
    assert given_out == list(parse_memento(text + rest, **opts).spans)[: len(given_out)]
    assert given_out == list(reader.close().spans)[: len(given_out)]


@pytest.mark.parametrize(
    "opening, kind, closing",
    [
        (T + B, "block", b), (T + B, "block", B), (T + B, "block", S), (B, "block", b),
        (T + S, "memento", s), (T + S, "memento", B), (T + S, "memento", S), (T + B + b + S, "memento", s),
        (T, "gap", B), (T, "gap", S), (T, "gap", E), ("", "prefix", T), ("", "gap", B),
        (T + B + "x" + b, "gap", S), (T + B + "x" + E, "block", b), (T + S + "x" + E, "memento", s),
    ],
)  # fmt: skip
@settings(check, max_examples=40)
@given(content=plain_texts.filter(bool))
def test_a_span_comes_with_the_character_that_decides_it(opening, kind, closing, content):
    "Nothing is held back beyond the marker: with its last character the span before it is out, and so is the marker."
    text = opening + content + closing
    reader, given_out = MementoStream(), []
    given_out += reader.feed(opening)
    for character in content + closing[:-1]:
        assert reader.feed(character) == []
    given_out += reader.feed(closing[-1])
    assert given_out, "the marker is complete and nothing came"
    *_, span, marker = given_out
    assert (span.kind, span.end) == (kind, len(opening + content))
    assert (marker.kind, marker.start, marker.end) == ("marker", len(opening + content), len(text))


@pytest.mark.parametrize("opening, kind, next_markers", [(B, "block", (T, B, S, s)), (S, "memento", (T, B, S, b))])
def test_a_closing_tag_is_decided_by_the_next_other_marker(opening, kind, next_markers):
    for marker in next_markers:
        reader = MementoStream()
        given_out = list(reader.feed(T + opening))
        for character in "x" + E + "y" + E + marker[:-1]:
            assert reader.feed(character) == []
        given_out += reader.feed(marker[-1])
        at = len(T + opening) + 1
        assert [tuple(span) for span in given_out[2:4]] == [(kind, at - 1, at, False), ("marker", at, at + len(E), True)]


def test_a_stream_is_closed_once():
    reader = MementoStream()
    reader.feed(T)
    reader.close()
    with pytest.raises(ValueError):
        reader.feed("x")


def test_streams_do_not_share_state():
    one, other = MementoStream(), MementoStream()
    one.feed(T + B)
    other.feed("x")
    one.feed("y" + b)
    assert same(other.close(), parse_memento("x"))
    assert same(one.close(), parse_memento(T + B + "y" + b))


# ---------------------------------------------------------------------------------------------------- (d) writing

content = st.one_of(plain_texts, plain_texts, marker_soup)
mementos = st.one_of(st.none(), content)


@hard_check
@given(
    pairs=st.lists(st.tuples(content, mementos), max_size=4),
    answer=st.one_of(st.none(), content),
    gap=st.one_of(st.just("\n"), st.just(""), content),
)
def test_what_is_written_is_read_back(pairs, answer, gap):
    try:
        text = build_memento(pairs, answer, gap=gap)
    except ValueError:
        parts = [gap, answer or "", *(part or "" for pair in pairs for part in pair)]
        assert any(MARKER.search(part) for part in parts), "a text without markers can always be written"
        return
    trace = parse_memento(text)
    assert pair_texts(trace) == pairs
    assert all(pair.block.complete and (pair.memento is None or pair.memento.complete) for pair in trace.pairs)
    assert trace.answer == answer


@check
@given(pairs=st.lists(pairs_of_text, max_size=4), answer=plain_texts, gap=plain_texts)
def test_plain_parts_make_a_strict_text(pairs, answer, gap):
    text = build_memento(pairs, answer, gap=gap)
    trace = parse_memento(text)
    assert STRICT.fullmatch(text)
    assert pair_texts(trace) == pairs and trace.answer == answer
    assert [i.code for i in trace.issues if i.severity != "info" and i.code != "partial_marker"] == []


@pytest.mark.parametrize(
    "pairs, answer",
    [([("x" + b, "y")], ""), ([("x", "y" + s)], ""), ([(B, "y")], ""), ([("x", "y")], T + E), ([("x" + E, None)], "a")],
)
def test_what_cannot_be_read_back_is_not_written(pairs, answer):
    try:
        trace = parse_memento(build_memento(pairs, answer))
    except ValueError:
        return
    assert (pair_texts(trace), trace.answer) == (pairs, answer)


def test_markers_that_would_be_read_as_structure_are_refused():
    with pytest.raises(ValueError):
        build_memento([("x" + b, "y")], "a")
    with pytest.raises(ValueError):
        build_memento([("x", "y")], f"a{T}c{E}d")


# ---------------------------------------------------------------------------------------------------- (e) strictness

_TEXT = r"(?:[^<]|<(?!/?think>|\|(?:block|summary)_(?:start|end)\|>))*+"
_PAIR = rf"<\|block_start\|>{_TEXT}<\|block_end\|>{_TEXT}<\|summary_start\|>{_TEXT}<\|summary_end\|>"
_SECTION = rf"<think>{_TEXT}(?:{_PAIR}{_TEXT})*</think>"
STRICT = re.compile(rf"{_TEXT}{_SECTION}(?:{_TEXT}{_SECTION})*{_TEXT}")


def complaints(trace):
    return [i.code for i in trace.issues if i.severity in ("warn", "error") and i.code != "partial_marker"]


def is_strict(text):
    return not MARKER.search(text) or STRICT.fullmatch(text) is not None


def crosses_sections(trace):
    "Does a block have its memento in a later section?"
    return any(
        pair.memento is not None and pair.block.end <= section.end < pair.memento.start
        for pair in trace.pairs
        for section in trace.sections
    )


@hard_check
@given(text=st.one_of(damaged_texts, texts, strict_texts, any_texts))
@example(text=f"{T}{B}x{b}{S}y{s}{E}a {E}")
@example(text=f"{T}{B}x{b}{S}y{s}{E}a {T}")
@example(text=f"{T}{B}x{b}{S}y{s}{E}a {b}")
@example(text=f"{T}{B}x{b}{S}y{s}{E}a {b} {T}{E}")
@example(text=f"{T}{B}x {E} {b}{S}y{s}{E}")
@example(text=f"{T}{B}x{b}{S}y {E} {s}{E}")
@example(text=f"{T}{B}x{b}{T}{S}y{s}{E}")
@example(text=f"{T}{B}x{b}{b}{S}y{s}{E}")
@example(text=f"{T}{B}x{b}{s}{S}y{s}{E}")
@example(text=f"{T}{B}x{S}y{s}{E}")
@example(text=f"{T}{B}x{b}{S}y{E}")
@example(text=f"{T}{B}x{b}{E}a")
@example(text=f"{T}{S}y{s}{E}a")
@example(text=f"{T}{B}x{E}a")
@example(text=f"{T}{B}x{B}z{b}{S}y{s}{E}a")
@example(text=f"{T}{B}x{b}{S}y{B}z{b}{S}y{s}{E}a")
@example(text=f"{b}{T}{E}")
@example(text=f"a{b}")
@example(text=f"{E}a")
@example(text=f"p{T}{E}m{T}{E}")
@example(text=f"{T}{E}<thi")
def test_no_complaint_means_strict(text):
    trace = parse_memento(text)
    assert (complaints(trace) == []) == is_strict(text)
    if complaints(trace) == []:
        assert all(pair.block.complete and pair.memento and pair.memento.complete for pair in trace.pairs)


@pytest.mark.parametrize("between", ["", "m"])
def test_a_pair_over_two_sections_is_not_strict(between):
    text = f"{T}{B}x{b}{E}{between}{T}{S}y{s}{E}END"
    assert not is_strict(text)
    assert complaints(parse_memento(text)) != []


@check
@given(text=st.one_of(damaged_texts, texts, strict_texts))
@example(text=f"{T}{B}1{b}{B}2{b}{S}3{s}{S}4{s}{E}")
def test_no_complaint_in_serving_means_all_paired(text):
    "Serving also accepts mementos in another order than the grammar, so only one direction names the grammar."
    trace = parse_memento(text, pairing="vllm")
    if is_strict(text):
        assert complaints(trace) == [] and trace.pairs == parse_memento(text).pairs
    if complaints(trace) == []:
        assert all(pair.block.complete and pair.memento and pair.memento.complete for pair in trace.pairs)
        assert len(trace.mementos) == len(trace.pairs)


@check
@given(text=strict_texts)
def test_strict_texts_are_accepted(text):
    "The generator of strict texts, the grammar and the parser agree; so the property above has both sides."
    assert STRICT.fullmatch(text)
    trace = parse_memento(text)
    assert {i.code for i in trace.issues} <= {"empty_block", "empty_summary", "marker_in_fence", "partial_marker"}
    assert len(trace.pairs) == text.count(B) and len(trace.sections) == text.count(T)
    assert trace.is_complete


# ---------------------------------------------------------------------------------------------------- (f) token ids

IDS = {"block_start": 101, "block_end": 7, "summary_start": 55, "summary_end": 0}
SYMBOL_IDS = dict(zip("BbSs", IDS.values())) | {"x": 9}


def serve(word, prompt_length=0):
    return [tuple(block) for block in parse_memento_ids([SYMBOL_IDS[c] for c in word], IDS, prompt_length)]


@hard_check
@given(word=symbols, data=st.data())
def test_ids_equal_reference(word, data):
    prompt_length = data.draw(st.integers(0, len(word)))
    assert serve(word) == reference_serving(word)
    assert serve(word, prompt_length) == reference_serving(word, prompt_length)


def test_ids_equal_reference_on_every_short_word():
    for length in range(7):
        for word in itertools.product("BbSs", repeat=length):
            assert serve(word) == reference_serving(word), word
            assert serve(word, length // 2) == reference_serving(word, length // 2), word


@pytest.mark.parametrize(
    "word, expected",
    [
        ("BxxbSxsBxxbSxs", [(0, 3, 4, 6), (7, 10, 11, 13)]),
        ("BxBxxbxbSxsSxs", [(0, 7, 11, 13), (2, 5, 8, 10)]),
        ("BxBxxbSxsxbSxs", [(0, 10, 11, 13), (2, 5, 6, 8)]),
        ("BxxBxxbSxs", [(0, None, None, None), (3, 6, 7, 9)]),
        ("BxxbBxxbSxsSxs", [(0, 3, 11, 13), (4, 7, 8, 10)]),
        ("BxxbxbSxs", [(0, 3, 6, 8)]),
        ("BxxbSxsxSxs", [(0, 3, 4, 6)]),
        ("BxxSxsbSxs", [(0, 6, 7, 9)]),
        ("SxsBxxb", [(3, 6, None, None)]),
        ("BxxbSxsBxxb", [(0, 3, 4, 6), (7, 10, None, None)]),
        ("BxxbSxBxxbSxsxs", [(0, 3, 4, None), (6, 9, 10, 12)]),
        ("BbSxs", [(0, 1, 2, 4)]),
    ],
)
def test_serving_table(word, expected):
    "The table of traces of the serving engine; the reference must agree with it as well."
    assert reference_serving(word) == expected
    assert serve(word) == expected


@hard_check
@given(word=symbols)
def test_ids_agree_with_text(word):
    """Stacked blocks paired as in serving, in a closed section: text and ids tell the same story.

    Every block starts and is complete (or not) alike and has the same memento; ends agree wherever there is one
    (an incomplete block or memento has an end in text, where it is cut off, and none in ids).
    """
    text, offset = T, []
    for symbol in word:
        offset.append(len(text))
        text += LETTERS.get(symbol, symbol)
    trace = parse_memento(text + E + "end", nesting="stack", pairing="vllm")
    assert trace.answer == "end"
    blocks = serve(word)
    assert len(trace.pairs) == len(blocks)
    for pair, (block_start, block_end, summary_start, summary_end) in zip(trace.pairs, blocks):
        assert pair.block.start == offset[block_start] + len(B)
        assert pair.block.complete == (block_end is not None)
        if block_end is not None:
            assert pair.block.end == offset[block_end]
        assert (pair.memento is None) == (summary_start is None)
        if summary_start is not None:
            assert pair.memento.start == offset[summary_start] + len(S)
            assert pair.memento.complete == (summary_end is not None)
            if summary_end is not None:
                assert pair.memento.end == offset[summary_end]


@pytest.mark.parametrize("missing", list(IDS))
def test_ids_need_all_four_markers(missing):
    with pytest.raises(ValueError, match=missing):
        parse_memento_ids([1, 2], {name: i for name, i in IDS.items() if name != missing})


# ---------------------------------------------------------------------------------------------------- (g) round trips


@hard_check
@given(text=any_texts, opts=options)
def test_pickle(text, opts):
    trace = parse_memento(text, **opts)
    assert same(pickle.loads(pickle.dumps(trace)), trace)


@hard_check
@given(text=encodable_texts, opts=options)
def test_json(text, opts):
    trace = parse_memento(text, **opts)
    written = trace.to_json()
    assert json.loads(written)["text"] == text
    written.encode("utf-8")
    assert same(Trace.from_json(written), trace)


@check
@given(rows=st.lists(st.tuples(encodable_texts, options), max_size=4))
def test_arrow(rows):
    traces = [parse_memento(text, **opts) for text, opts in rows]
    table = traces_to_arrow(traces)
    assert table.num_rows == len(rows) and table.column("text").to_pylist() == [text for text, _ in rows]
    back = traces_from_arrow(table)
    assert len(back) == len(traces) and all(map(same, back, traces))


@check
@given(before=encodable_texts, bad=surrogates, after=any_texts, rows=st.integers(0, 3))
def test_lone_surrogates_are_refused_by_name(before, bad, after, rows):
    trace = parse_memento(before + bad + after)
    with pytest.raises(ValueError) as caught:
        trace.to_json()
    assert re.findall(r"(?<![\w-])\d+", str(caught.value))[0] == str(len(before))
    with pytest.raises(ValueError) as caught:
        traces_to_arrow([*[parse_memento("x")] * rows, trace])
    assert re.findall(r"(?<![\w-])\d+", str(caught.value))[:2] == [str(rows), str(len(before))]


# ---------------------------------------------------------------------------------------------------- (h) edge cases

ONE = letters("T\nB x1 b\nS y1 s\n\nB x2 b\nS y2 s\nE\n") + "END"  # case 1: two pairs in the usual layout


def case(text, answer="END"):
    "Letters to markers; the answer is written as it stands, since its capitals are no markers."
    return letters(text) + answer


def test_case_01_two_pairs():
    trace = parse_memento(ONE)
    assert pair_texts(trace) == [(" x1 ", " y1 "), (" x2 ", " y2 ")]
    assert trace.answer == "\nEND" and trace.issues == () and trace.is_complete
    assert "".join(ONE[span.start : span.end] for span in trace.spans) == ONE
    assert span_texts(trace, "gap") == ["\n", "\n", "\n\n", "\n", "\n"]


def test_case_04_gaps():
    trace = parse_memento(case("Tpre Bx1b mid Sy1s gap Bx2bSy2s tailE"))
    assert span_texts(trace, "gap") == ["pre ", " mid ", " gap ", " tail"]
    assert pair_texts(trace) == [("x1", "y1"), ("x2", "y2")] and trace.issues == ()


def test_case_05_truncated():
    trace = parse_memento(letters("TBx1bSy1sBx2 not done"))
    assert pair_texts(trace) == [("x1", "y1"), ("x2 not done", None)]
    assert [pair.block.complete for pair in trace.pairs] == [True, False]
    assert trace.answer is None and not trace.is_complete
    assert codes(trace) == ["truncated_block", "unclosed_think"]


def test_case_06_block_reopened():
    text = case("TBx1 Bx2bSy2sE")
    trace = parse_memento(text)
    assert pair_texts(trace) == [("x1 ", None), ("x2", "y2")]
    assert [pair.block.complete for pair in trace.pairs] == [False, True]
    assert codes(trace) == ["block_reopened"] and trace.answer == "END"
    stacked = parse_memento(text, nesting="stack")
    assert "nested_block" in codes(stacked) and "block_reopened" not in codes(stacked)
    assert ("x2", "y2") in pair_texts(stacked)
    assert [pair.block.complete for pair in stacked.pairs] == [False, True]


def test_case_07_missing_summary():
    trace = parse_memento(case("TBx1bBx2bSy2sBx3bSy3sE"))
    assert pair_texts(trace) == [("x1", None), ("x2", "y2"), ("x3", "y3")]
    assert codes(trace) == ["missing_summary"]
    (issue,) = trace.issues
    block = trace.pairs[0].block
    assert issue.start <= block.end and issue.end >= block.start


def test_case_08_pairing_policies():
    text = case("TBx1bBx2bSy2sSy3sE")
    trace = parse_memento(text)
    assert pair_texts(trace) == [("x1", None), ("x2", "y2")]
    assert codes(trace) == ["missing_summary", "orphan_summary"]
    trace = parse_memento(text, pairing="vllm")
    assert pair_texts(trace) == [("x1", "y3"), ("x2", "y2")]
    assert codes(trace) == []


def test_case_09_tag_quoted_in_answer():
    trace = parse_memento(letters("TBx1bSy1sE") + f"write {E} to end. END")
    assert trace.answer == f"write {E} to end. END"
    assert codes(trace) == ["stray_think_close"]


def test_case_10_two_sections():
    text = case("TBx1bSy1sEmidTBx2bSy2sE")
    trace = parse_memento(text)
    edges = [0]
    for section in trace.sections:
        edges += [section.start - len(T), section.end + len(E)]
    edges.append(len(text))
    assert [text[start:end] for start, end in zip(edges[::2], edges[1::2])] == ["", "mid", "END"]
    assert len(trace.sections) == 2 and trace.answer == "END" and trace.issues == ()
    assert [pair.index for pair in trace.pairs] == [0, 1]


def test_case_11_implicit_open():
    trace = parse_memento(case("Bx1bSy1sE"))
    assert pair_texts(trace) == [("x1", "y1")] and trace.answer == "END"
    assert codes(trace) == ["implicit_think_open"]


def test_case_12_only_text():
    trace = parse_memento("only text")
    assert (trace.answer, len(trace.sections), trace.issues, trace.is_complete) == ("only text", 0, (), True)
    trace = parse_memento("only text", assume_thinking=True)
    assert trace.answer is None and not trace.is_complete
    (section,) = trace.sections
    assert (section.start, section.end, section.complete) == (0, 9, False)
    assert codes(trace) == ["unclosed_think"]


def test_case_13_markers_in_answer():
    tail = f"you write {B}x{b}{S}y{s}."
    trace = parse_memento(letters("TBx1bSy1sE") + tail)
    assert pair_texts(trace) == [("x1", "y1")] and trace.answer == tail
    assert codes(trace) == ["marker_in_answer"] * 4


def test_case_14_tag_quoted_in_block():
    trace = parse_memento(case("TB quote E here bSy1sE"))
    assert pair_texts(trace) == [(f" quote {E} here ", "y1")] and trace.answer == "END"
    assert codes(trace) == ["think_close_in_block"]
    twin = parse_memento(case("TB never E"))
    assert pair_texts(twin) == [(" never ", None)] and twin.answer == "END"
    assert not twin.pairs[0].block.complete and codes(twin) == ["truncated_block"]


def test_case_14_tag_quoted_in_memento():
    trace = parse_memento(case("TBxbS quote E here sE"))
    assert pair_texts(trace) == [("x", f" quote {E} here ")] and trace.answer == "END"
    assert codes(trace) == ["think_close_in_summary"]
    twin = parse_memento(case("TBxbS never E"))
    assert pair_texts(twin) == [("x", " never ")] and not twin.pairs[0].memento.complete
    assert twin.answer == "END" and codes(twin) == ["truncated_summary"]


def test_case_15_crlf():
    text = ONE.replace("\n", "\r\n")
    trace = parse_memento(text)
    assert "".join(text[span.start : span.end] for span in trace.spans) == text
    assert trace.answer == "\r\nEND" and trace.issues == ()
    assert span_texts(trace, "gap")[2] == "\r\n\r\n"


@pytest.mark.parametrize("opts", ALL_OPTIONS)
def test_case_16_empty(opts):
    trace = parse_memento("", **opts)
    assert (trace.spans, trace.issues, trace.answer, tuple(trace.pairs)) == ((), (), "", ())


def test_case_17_empty_block():
    trace = parse_memento(case("TBbSysE"))
    assert pair_texts(trace) == [("", "y")] and trace.pairs[0].block.complete
    assert codes(trace) == ["empty_block"] and trace.issues[0].severity == "info"
    assert codes(parse_memento(case("TB \nbS\tsE"))) == ["empty_block", "empty_summary"]


def test_case_18_indentation():
    answer = "\n```py\ndef f():\n    return 1\n```\n"
    trace = parse_memento(T + B + "\n    x=1\n    y=2\n" + b + S + "y" + s + E + answer)
    assert pair_texts(trace) == [("\n    x=1\n    y=2\n", "y")]
    assert trace.answer == answer and trace.issues == ()


def test_case_19_marker_in_fence():
    text = case("TBa\n```\nb\n```\nzbSysE")
    trace = parse_memento(text)
    assert pair_texts(trace) == [("a\n```\n", "y")]
    assert codes(trace) == ["marker_in_fence", "stray_block_end"] and trace.issues[0].severity == "info"
    literal = parse_memento(text, fences="literal")
    assert pair_texts(literal) == [(f"a\n```\n{b}\n```\nz", "y")] and literal.answer == "END"
    assert codes(literal) == []


@pytest.mark.parametrize("tag", ["<THINK>", "<think >", '<think signature="q">'])
def test_case_20_other_spellings(tag):
    text = f"{tag}x{E}END"
    trace = parse_memento(text)
    assert codes(trace) == ["implicit_think_open"] and span_texts(trace, "gap") == [tag + "x"]
    assert parse_memento(tag + "x").answer == tag + "x"
    relaxed = parse_memento(text, relaxed=True)
    assert codes(relaxed) == ["relaxed_tag"] and span_texts(relaxed, "gap") == ["x"] and relaxed.answer == "END"


def test_case_21_thinking_off():
    trace = parse_memento(T + E + "END")
    assert trace.thinking_off is True and trace.answer == "END" and trace.issues == ()
    (section,) = trace.sections
    assert (section.start, section.end) == (7, 7)
    assert parse_memento(T + "x" + E).thinking_off is False
    assert parse_memento("END").thinking_off is False


CASES = {
    1: ONE,
    4: case("Tpre Bx1b mid Sy1s gap Bx2bSy2s tailE"),
    5: letters("TBx1bSy1sBx2 not done"),
    6: case("TBx1 Bx2bSy2sE"),
    7: case("TBx1bBx2bSy2sBx3bSy3sE"),
    8: case("TBx1bBx2bSy2sSy3sE"),
    9: letters("TBx1bSy1sE") + f"write {E} to end. END",
    10: case("TBx1bSy1sEmidTBx2bSy2sE"),
    11: case("Bx1bSy1sE"),
    12: "only text",
    13: letters("TBx1bSy1sE") + f"you write {B}x{b}{S}y{s}.",
    14: case("TB quote E here bSy1sE"),
    15: ONE.replace("\n", "\r\n"),
    16: "",
    17: case("TBbSysE"),
    18: T + B + "\n    x=1\n    y=2\n" + b + S + "y" + s + E + "```\n    z\n```",
    19: case("TBa\n```\nb\n```\nzbSysE"),
    20: f'<think signature="q">x{E}<THINK>END',
    21: T + E + "END",
    23: T + B[:11],
    26: f"\ufeffx\x00{T}{B}\ud800\U0001f600{b}{S}\U0001f600{s}{E}END",
    27: case("TBx1Sy1sE"),
    -14: case("TB never E"),
}


@pytest.mark.parametrize("number", list(CASES))
def test_case_22_in_chunks(number):
    text = CASES[number]
    for opts in ALL_OPTIONS:
        for size in (1, 2, 5, 16, 17):
            check_stream(text, range(size, len(text), size), **opts)


@pytest.mark.parametrize("number", list(CASES))
@pytest.mark.parametrize("pairing", ["adjacent", "vllm"])
def test_cases_equal_reference(number, pairing):
    assert as_reference(parse_memento(CASES[number], pairing=pairing)) == reference_parse(CASES[number], pairing)


def test_case_23_partial_marker():
    text = letters("TBxbSys") + B[:11]
    trace, given_out = stream(text, range(1, len(text)))
    assert codes(trace) == ["partial_marker", "unclosed_think"]
    assert span_texts(trace, "gap") == [B[:11]] and trace.text == text


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("before", ["", "x", T, T + B, T + S, T + E, T + E + "x"])
def test_case_23_every_length(marker, before):
    for n in range(1, len(marker) + 1):
        trace = parse_memento(before + marker[:n])
        assert codes(trace).count("partial_marker") == (1 if 2 <= n < len(marker) else 0), n


def test_case_24_markers_stripped():
    text = f"{T}x1 y1 {E}END"
    assert "markers_stripped" in codes(parse_memento(text, expect_memento=True))
    assert parse_memento(text, expect_memento=True).pairs == parse_memento(text).pairs == ()
    assert parse_memento(text).issues == ()
    assert codes(parse_memento(ONE, expect_memento=True)) == []
    assert codes(parse_memento("only text", expect_memento=True)) == []


def test_case_25_nothing_closed():
    trace = parse_memento((B + "x" * 200) * 8000)
    assert len(trace.pairs) == 8000 and trace.answer is None
    assert {code: codes(trace).count(code) for code in set(codes(trace))} == {
        "implicit_think_open": 1, "block_reopened": 7999, "truncated_block": 1, "unclosed_think": 1,
    }  # fmt: skip


def test_case_26_offsets_are_code_points():
    text = CASES[26]
    trace = parse_memento(text)
    assert span_texts(trace, "prefix") == ["\ufeffx\x00"]
    assert pair_texts(trace) == [("\ud800\U0001f600", "\U0001f600")] and trace.issues == ()
    assert plain(trace.pairs[0].block) == (3 + len(T + B), 3 + len(T + B) + 2, True)
    assert trace.answer == "END"


def test_case_27_unclosed_block_is_paired():
    trace = parse_memento(case("TBx1Sy1sE"))
    assert pair_texts(trace) == [("x1", "y1")] and codes(trace) == ["unclosed_block"]
    assert [pair.block.complete for pair in trace.pairs] == [False] and trace.pairs[0].memento.complete


def test_case_28_closing_tag_after_every_block():
    trace = parse_memento((B + "x" * 100 + E) * 8000)
    assert pair_texts(trace) == [("x" * 100, None)] and not trace.pairs[0].block.complete
    assert {code: codes(trace).count(code) for code in set(codes(trace))} == {
        "implicit_think_open": 1, "truncated_block": 1, "marker_in_answer": 7999, "stray_think_close": 7999,
    }  # fmt: skip


@check
@given(text=st.one_of(damaged_texts, strict_texts), opts=options)
def test_parse_finds_the_dialect(text, opts):
    trace = parse(text, "memento", **opts)
    assert same(trace, parse_memento(text, **opts)) and trace.dialect == "memento"
    if B in text:
        assert same(parse(text, **opts), trace)


def test_messages():
    trace = parse_memento(case("TBxbSysE"))
    user, assistant = trace.to_messages("How?")
    assert user == {"role": "user", "content": "How?"}
    assert (assistant["role"], assistant["content"]) == ("assistant", "END")
    assert assistant["reasoning_content"] == trace.reasoning == letters("BxbSys")
    assert trace.to_dict() == {
        "blocks": ["x"], "summaries": ["y"], "reasoning": letters("BxbSys"), "final_answer": "END",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- (i) work done

REPEATED = {
    "blocks": B + "x" * 20,
    "closing tags": B + "x" * 20 + E,
    "sections": T + "x" + E,
    "opening tags": T + E + T + "x",
    "quoted tags": T + B + E + E + "x" + b + E,
    "many tags, one end": E,
    "mementos": B + b + S + "y",
    "blocks, then mementos": B + b,
    "ends": T + B + b + s + b,
}


def lines_run(call):
    "How many lines of Python a call runs: a measure of work that does not depend on the clock."
    count = 0

    def tracer(frame, event, argument):
        nonlocal count
        count += event == "line"
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", list(REPEATED))
@pytest.mark.parametrize("opts", [{}, {"pairing": "vllm"}, {"nesting": "stack", "pairing": "vllm"}])
def test_work_grows_linearly(name, opts):
    "Twice the text, at most 2.5 times the lines run; a look-ahead that starts over for each marker would give 4."
    opening, ending = (T + B, b + S + "y" + s + E) if name == "many tags, one end" else ("", "")
    if name == "blocks, then mementos":
        text = lambda n: T + REPEATED[name] * n + (S + s) * n + E
    else:
        text = lambda n: opening + REPEATED[name] * n + ending
    batch = [lines_run(lambda: parse_memento(text(n), **opts)) for n in (300, 600)]
    assert 0 < batch[1] <= 2.5 * batch[0]

    def feed(whole):
        reader = MementoStream(**opts)
        for at in range(0, len(whole), 7):
            reader.feed(whole[at : at + 7])
        reader.close()

    fed = [lines_run(lambda: feed(text(n))) for n in (150, 300)]
    assert 0 < fed[1] <= 2.5 * fed[0]


def test_a_text_too_long_to_be_copied():
    "Beyond some megabytes markers are found in another way, with the same result."
    for text in ("<think>Bx1bSy1s\nBx2bSy2s</think>", "<think>Bx1bSy1sBx2 ", "Bx1bSs</think>END<think>", "</think>B b", ""):
        for letter, marker in zip("BbSs", MEMENTO_TOKENS[2:]): text = text.replace(letter, marker)
        pad = "." * (1 << 22)
        short, long = parse_memento(text + "."), parse_memento(text + pad)
        assert [s[:2] for s in long.spans] == [s[:2] for s in short.spans] and long.spans[-1].end == len(text + pad)
        assert [i[:2] for i in long.issues] == [i[:2] for i in short.issues]
