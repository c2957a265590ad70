"""The reader and writer of thought trees against an independent reading of the format, and against what they promise.

The tests know the format (`oracle_thoughts.py`, where it is also written down what is left open) and not the module.
"""

import itertools
import gzip
import json
import math
import re
import sys
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from oracle_thoughts import (
    F, F_END, FATHER_CODES, FILE_CODES, HINT, HINT_END, L, L_END, MISSPELLED, NODE_CODES, PUBLISHED, R, R_END, RATINGS,
    T, T_END, TOKENS, TREE_CODES, TYPES, follows_grammar, near_tag, pieces_of, reference_read, resolve,
)  # fmt: skip
from tracebook import thoughts
from tracebook.thoughts import (
    THOUGHT_TOKENS, ThoughtNode, ThoughtStream, ThoughtTree, parse_thought_ids, parse_thoughts, rating_to_value,
    read_trees, value_to_rating_token,
)  # fmt: skip
from tracebook.trace import CODES, Trace

TABLE = NODE_CODES | TREE_CODES
KINDS = {"prefix", "marker", "gap", "id", "thought", "rating", "hint"}
POSITIVE, NEGATIVE, UNKNOWN = RATINGS
PROBLEM, CRITIC, REFINE, CONCLUSION, EXPANSION = TYPES

check = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
hard_check = settings(check, max_examples=400)


# ---------------------------------------------------------------------------------------------------- a writer


def header(father, local):
    return f"{F}{father}{F_END}{L}{local}{L_END}"


def thought(text, tag=""):
    return T + tag + text + T_END


def rated(value=POSITIVE):
    return R + value + R_END


def node(father, local, text="x", tag="", rating=POSITIVE):
    "One well-formed node; rating None: not rated."
    return header(father, local) + thought(text, tag) + ("" if rating is None else rated(rating))


ROOT = node(-1, 0, "q", PROBLEM, None)
EXAMPLE = (  # the example of the format
    "<start_of_father_id>-1<end_of_father_id><start_of_local_id>0<end_of_local_id><start_of_thought><problem>"
    "Ann fills 3 bags with 4 pears each. How many pears? <end_of_thought>"
    " <start_of_father_id>0<end_of_father_id><start_of_local_id>1<end_of_local_id><start_of_thought>"
    " That is 3*4=<<3*4=12>>12 pears. <end_of_thought><start_of_rating><positive_rating><end_of_rating>"
    " <start_of_father_id>1<end_of_father_id><start_of_local_id>2<end_of_local_id><start_of_thought><critic>"
    " The product is right.<end_of_thought><start_of_rating><unknown_rating><end_of_rating>"
)


# ---------------------------------------------------------------------------------------------------- strategies

PLAIN = (
    "x", " ", "\n", "\r\n", "\n\n", "<", ">", "<<2*66=132>>132", "<<3*4=12>>", "a < b", "1 > 0", "<b>", "</b>", "<start_of_",
    "<start_of_thought", "end_of_thought>", "<problem", "critic>", "<Critic>", "<hint", "</hin", "<|>", "True", "None",
    "-1", "0", "\u00e9", "\u2028", "\x85", "\U0001f600", "\x00", "\x1b[31m", "\ufeff", "\\", "'", '"', "don't", "', 'gold')",
    "('", "{", "\u3000", "\xa0", "<script>", "&lt;", "$\\box{3}$",
)  # fmt: skip


def token_free(text):
    return not any(token in text for token in (*TOKENS, MISSPELLED))


plain_texts = st.one_of(
    st.lists(st.sampled_from(PLAIN), max_size=5).map("".join), st.text(st.characters(codec="utf-8"), max_size=12)
).filter(token_free)
full_texts = plain_texts.filter(lambda text: text.strip() and not near_tag(text))
seps = st.sampled_from((" ", "\n"))


@st.composite
def parent_lists(draw, max_size=12):
    "Parents by position (the first node has none), in random shapes: bushes, chains, stars and what lies between."
    n, reach = draw(st.integers(1, max_size)), draw(st.sampled_from((1, 2, 100)))
    return [None] + [draw(st.integers(max(0, k - reach), k - 1)) for k in range(1, n)]


type_names = st.sampled_from((None, "problem", "critic", "refine", "conclusion"))
rating_names = st.sampled_from(("positive", "negative", "unknown"))


@st.composite
def built_trees(draw, max_size=12):
    "A well-formed tree, made with the package, and what went into it: a list of (parent, type, text, rating)."
    parents = draw(parent_lists(max_size))
    rows = [(None, "problem", draw(full_texts), None)]
    rows += [(p, draw(type_names), draw(full_texts), draw(rating_names)) for p in parents[1:]]
    tree = ThoughtTree.build(rows[0][2])
    nodes = [tree.nodes[0]]
    for parent, kind, text, rating in rows[1:]:
        nodes.append(tree.add(nodes[parent], text, type=kind, rating=rating))
    return tree, rows


@st.composite
def well_formed(draw, max_size=8):
    "The pieces of a well-formed text, written here, with local ids in any order."
    parents = draw(parent_lists(max_size))
    ids = [0] + draw(st.permutations(range(1, len(parents))))
    pieces, sep = [], draw(seps)
    for k, parent in enumerate(parents):
        father = -1 if parent is None else ids[parent]
        pieces += ["" if k == 0 else sep, F, str(father), F_END, L, str(ids[k]), L_END, T]
        pieces += [PROBLEM if k == 0 else draw(st.sampled_from(("", "", *TYPES))), draw(full_texts), T_END]
        if k:
            pieces += [draw(st.sampled_from(("", "", " ", "\n"))), R, draw(st.sampled_from(RATINGS)), R_END]
    return [piece for piece in pieces if piece]


SMALL_IDS = ("-1", "0", "1", "2", "3", "0", "1", "2", "x", "", "1.5", "+1", "1_0", "--1", "007", "9")
RATED = (*RATINGS, *RATINGS, MISSPELLED, "True", "False", "None", "", "true", "good", "<positive_rating><positive_rating>", "0.5")


FLAWS = (
    "father", "father", "local", "local", "both ids", "doubled", "doubled twice closed", "two tags", "tag in text", "empty", "unclosed",
    "odd rating", "odd rating", "no rating", "hint", "late hint", "loose text", "near tag",
)  # fmt: skip


@st.composite
def flawed_texts(draw):
    "Nodes with the defects of the table, seldom several in one node: the reference can read most of these texts."
    start = draw(st.sampled_from(("", "", "", "tuple", "4" + L_END + thought("y"), "0" + F_END + L + "4" + L_END + T, "p < q ")))
    parts = ["('" if start == "tuple" else start]
    for k in range(draw(st.integers(0, 6))):
        flaws = draw(st.sets(st.sampled_from(FLAWS), max_size=2)) if draw(st.booleans()) else set()
        father, local = str(draw(st.integers(0, k - 1)) if k else -1), str(k)
        if flaws & {"father", "both ids"}:
            father = draw(st.sampled_from(SMALL_IDS))
        if flaws & {"local", "both ids"}:
            local = draw(st.sampled_from(SMALL_IDS[1:]))
        parts.append(header(father, local))
        if k == 0 and flaws & {"doubled", "doubled twice closed"}:
            parts.append(T + header(father, local))
        tags = draw(st.sampled_from((CRITIC * 2, REFINE * 3, CRITIC + REFINE) if "two tags" in flaws else (PROBLEM, "", "", "", CRITIC)))
        text = draw(st.one_of(plain_texts, st.just(""))) if "empty" in flaws else draw(full_texts)
        if "near tag" in flaws:
            text = draw(st.sampled_from(("<ritic>", "<Critic>", "<critics>", "<reine>", "<refi\u00f1e>", "<conclsion>", "<b>", "<cri-tic>"))) + text
        if "tag in text" in flaws:
            text += draw(st.sampled_from(TYPES)) + draw(plain_texts)
        end = "" if "unclosed" in flaws else T_END * 2 if k == 0 and "doubled twice closed" in flaws else T_END
        parts.append(T + tags + text + end)
        if k == 0 and start == "tuple":
            parts.append(draw(st.sampled_from(("', 'gold')", "', None)"))))
        elif ("no rating" in flaws) == (k == 0):
            rating = draw(st.sampled_from(RATED if "odd rating" in flaws else RATINGS))
            parts.append(draw(st.sampled_from(("", "", " ", "\n"))) + rated(rating))
        if flaws & {"hint", "late hint"}:
            parts.append(" " * ("late hint" in flaws) + HINT + draw(plain_texts) + HINT_END)
        if "loose text" in flaws and draw(st.booleans()):
            parts.append(draw(plain_texts))
        parts.append(draw(st.sampled_from(("", " ", "\n", "\n\n", " \n", "\r\n"))))
    return "".join(parts)


@st.composite
def damaged_texts(draw):
    "A well-formed text with some tokens or texts lost, doubled, swapped, put in or cut."
    pieces = list(draw(well_formed()))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        if not pieces:
            break
        i, j = (draw(st.integers(0, len(pieces) - 1)) for _ in range(2))
        damage = draw(st.sampled_from(("lose", "lose a run", "double", "swap", "token", "text", "change", "change", "cut", "head", "tail")))
        if damage == "lose":
            del pieces[i]
        elif damage == "lose a run":
            del pieces[i : i + draw(st.integers(2, 9))]
        elif damage == "double":
            pieces[i:i] = pieces[i : i + draw(st.integers(1, 7))]
        elif damage == "swap":
            pieces[i], pieces[j] = pieces[j], pieces[i]
        elif damage == "token":
            pieces.insert(i, draw(st.sampled_from(TOKENS)))
        elif damage == "text":
            pieces.insert(i, draw(st.one_of(plain_texts, st.sampled_from(RATED))))
        elif damage == "change":
            pieces[i] = draw(st.sampled_from((*SMALL_IDS, *RATED, *TYPES)))
        elif damage == "cut":
            pieces[i] = pieces[i][: draw(st.integers(0, len(pieces[i])))]
        elif damage == "head":
            pieces[: i + 1] = [pieces[i][draw(st.integers(0, len(pieces[i]))) :]]
        else:
            pieces[i:] = [pieces[i][: draw(st.integers(0, len(pieces[i])))]]
    return "".join(pieces)


soups = st.lists(
    st.one_of(st.sampled_from(TOKENS), st.sampled_from((ROOT, node(0, 1), header(0, 1), T, T_END, rated())), st.sampled_from(PLAIN)),
    max_size=12,
).map("".join)
surrogates = st.sampled_from(("\ud800", "\udfff"))
texts = st.one_of(flawed_texts(), damaged_texts(), well_formed().map("".join), soups)
any_texts = st.one_of(
    texts, st.text(st.characters(codec=None), max_size=30), st.tuples(texts, surrogates, texts).map("".join)
)


# ---------------------------------------------------------------------------------------------------- helpers


def codes(tree):
    return sorted(issue.code for issue in tree.issues)


def plain(node):
    "A node without its links."
    return (
        node.index, node.local_id, node.parent_id, node.type, node.text, node.rating, node.hint, node.complete,
        (node.span.start, node.span.end), None if node.parent is None else node.parent.index,
        [child.index for child in node.children],
    )  # fmt: skip


def content(tree):
    "What a tree says, apart from where it stands in a text."
    return [
        (n.local_id, n.parent_id, n.type, n.text, n.rating, None if n.parent is None else n.parent.index) for n in tree.nodes
    ]


def same(one, other):
    return list(map(plain, one)) == list(map(plain, other)) and one.trace == other.trace and list(one.issues) == list(other.issues)


def indexes(nodes):
    return [node.index for node in nodes]


def check_partition(trace, text):
    assert isinstance(trace, Trace) and trace.text == text
    assert "".join(text[span.start : span.end] for span in trace.spans) == text
    at = 0
    for span in trace.spans:
        assert span.start == at and span.end >= at and span.kind in KINDS, span
        at = span.end
    assert at == len(text)


def check_tree(tree, text):
    "What holds for every text."
    check_partition(tree.trace, text)
    assert isinstance(tree, ThoughtTree) and len(tree) == len(tree.nodes) and indexes(tree) == list(range(len(tree)))
    for issue in tree.issues:
        assert 0 <= issue.start <= issue.end <= len(text), issue
        assert issue.code in CODES and issue.severity == CODES[issue.code].severity and issue.message
    at = 0
    for n in tree.nodes:
        assert isinstance(n, ThoughtNode)
        assert n.type in ("problem", "expansion", "critic", "refine", "conclusion")
        assert n.rating in ("positive", "negative", "unknown", None)
        assert n.local_id is None or type(n.local_id) is int
        assert n.parent_id is None or type(n.parent_id) is int
        assert n.state == n.text and n.complete in (True, False)
        assert at <= n.span.start <= n.span.end <= len(text) and n.text in text[n.span.start : n.span.end]
        at = n.span.end
        assert n.hint is None or HINT + n.hint + HINT_END in text
    check_links(tree)


def check_links(tree):
    "Fathers, children and roots agree, there is no ring, and the fathers are the right ones for the ids that were read."
    parents = [None if n.parent is None else n.parent.index for n in tree.nodes]
    for n, p in zip(tree.nodes, parents):
        assert p is None or tree.nodes[p] is n.parent
    for n in tree.nodes:
        assert indexes(n.children) == [k for k, p in enumerate(parents) if p == n.index]
    assert indexes(tree.roots) == [k for k, p in enumerate(parents) if p is None]
    top = [depth_of(parents, k) for k in range(len(parents))]  # raises for a ring
    assert len(top) == len(tree)
    if -1 not in [n.local_id for n in tree.nodes]:
        right, _, _ = resolve([(n.local_id, n.parent_id) for n in tree.nodes])
        assert all(p in options for p, options in zip(parents, right)), (parents, right)


def depth_of(parents, k):
    depth = 0
    while parents[k] is not None:
        k, depth = parents[k], depth + 1
        assert depth <= len(parents), "a ring of fathers"
    return depth


def check_against_reference(tree, text):
    read = reference_read(text)
    got = [(n.local_id, n.parent_id, n.type, n.rating) for n in tree.nodes]
    assert got[: None if read.definite else len(read.nodes)] == [(n.local_id, n.parent_id, n.type, n.rating) for n in read.nodes]
    for n, expected in zip(tree.nodes, read.nodes):
        assert n.text in expected.texts
        assert n.hint in expected.hints
        assert expected.complete in (None, n.complete)
        assert expected.start <= n.span.start and n.span.end <= expected.end
    for need in read.needs:
        low, high = (0, len(text)) if need.index is None else read.nodes[need.index][:2]
        assert any(
            i.code in need.codes and low <= i.start and i.end <= high and i.start <= need.end and i.end >= need.start
            for i in tree.issues
        ), (need, tree.issues)
    if not read.definite:
        return read

    assert all((None if n.parent is None else n.parent.index) in parents for n, parents in zip(tree.nodes, read.parents))
    ringed = [k for k, parents in enumerate(read.parents) if len(parents) > 1 and None in parents]
    if read.nodes and sum(n.parent_id == -1 for n in read.nodes) == 1 and all(p != (None,) for p in read.parents[1:]) and not ringed:
        assert len(tree.roots) == 1 and tree.root is tree.roots[0]
    if sum(n.parent_id == -1 for n in read.nodes) > 1 or not read.nodes:
        assert tree.root is None
    may = read.allowed | {(code, need.index) for need in read.needs for code in need.codes}
    if is_cut(text):  # a code of the reader of mementos, kept for trees: it says where, beside the codes of the table
        may |= {("partial_marker", k) for k in (None, *range(len(read.nodes)))}
    if text.startswith(TAILS):  # cut on the left in the middle of a marker
        may.add(("left_truncated", None))
    for issue in tree.issues:
        places = [None] + [k for k, n in enumerate(read.nodes) if n.start <= issue.start and issue.end <= n.end]
        assert any((issue.code, k) in may for k in places), (issue, may)
    return read


TAILS = tuple(token[k:] for token in TOKENS for k in range(1, len(token) - 1))


def is_cut(text):
    "Does the text end in the middle of a marker?"
    return any(text.endswith(token[:k]) for token in (*TOKENS, MISSPELLED) for k in range(2, len(token)))


def check_all(text):
    tree = parse_thoughts(text)
    check_tree(tree, text)
    check_against_reference(tree, text)
    return tree


def expect(text, *wanted):
    "Read a text and compare the codes, each named once."
    tree = check_all(text)
    assert set(codes(tree)) == set(wanted), codes(tree)
    return tree


# ---------------------------------------------------------------------------------------------------- (a) by hand


def test_the_example():
    tree = expect(EXAMPLE)
    assert tree.issues == () or tree.issues == []
    assert [n.local_id for n in tree] == [0, 1, 2] and [n.parent_id for n in tree] == [-1, 0, 1]
    assert [n.type for n in tree] == ["problem", "expansion", "critic"]
    assert [n.rating for n in tree] == [None, "positive", "unknown"]
    assert [n.text for n in tree] == [
        "Ann fills 3 bags with 4 pears each. How many pears? ", " That is 3*4=<<3*4=12>>12 pears. ", " The product is right.",
    ]  # fmt: skip
    assert [n.hint for n in tree] == [None] * 3 and all(n.complete for n in tree)
    assert tree.root is tree.nodes[0] and tree.roots[0] is tree.root and tree.root.parent is None
    assert tree.nodes[1].parent is tree.root and tree.nodes[2].parent is tree.nodes[1]
    assert indexes(tree.root.children) == [1] and indexes(tree.leaves) == [2] and indexes(tree.path(tree.nodes[2])) == [0, 1, 2]
    assert tree.nodes[1].state == tree.nodes[1].text


def test_the_example_is_written_in_both_styles():
    tree = parse_thoughts(EXAMPLE)
    code_style = EXAMPLE.replace("> <start_of_father_id>", ">\n<start_of_father_id>")
    assert tree.to_text(sep=" ") == EXAMPLE and tree.to_text(sep="\n") == code_style
    again = expect(code_style)
    assert content(again) == content(tree) and again.to_text(sep=" ") == EXAMPLE


def test_the_example_is_built():
    tree = ThoughtTree.build("Ann fills 3 bags with 4 pears each. How many pears? ")
    one = tree.add(tree.root, " That is 3*4=<<3*4=12>>12 pears. ", rating="positive")
    two = tree.add(one, " The product is right.", type="critic", rating="unknown")
    assert tree.to_text(sep=" ") == EXAMPLE
    assert (one.index, one.local_id, one.parent_id, one.type, one.parent) == (1, 1, 0, "expansion", tree.root)
    assert (two.index, two.local_id, two.parent_id, two.type) == (2, 2, 1, "critic") and one.children[0] is two


def test_spans_of_the_example():
    trace = parse_thoughts(EXAMPLE).trace
    kinds = Counter(span.kind for span in trace.spans)
    assert kinds["id"] == 6 and kinds["thought"] == 3 and kinds["rating"] == 2 and not kinds["hint"] and not kinds["prefix"]
    assert all(span.complete for span in trace.spans)
    for n, span in zip(parse_thoughts(EXAMPLE), (s for s in trace.spans if s.kind == "thought")):
        assert n.text in EXAMPLE[span.start : span.end]


def test_the_tokens():
    assert len(PUBLISHED) == 15 and set(PUBLISHED) <= set(THOUGHT_TOKENS) <= {*TOKENS, MISSPELLED}


def test_every_code_of_the_table_is_registered():
    assert TABLE | FILE_CODES <= set(CODES)


def test_severities():
    "Codes of trees are warnings but for three, which are usual in what the code writes; those of files are errors."
    info = {"root_rated", "empty_thought", "hint_between_nodes"}
    ours = {code for code, known in CODES.items() if known.group == "thoughts"}
    assert TABLE <= ours
    for code in ours: assert CODES[code].severity == ("info" if code in info else "warn"), code
    for code in FILE_CODES: assert CODES[code].severity == "error", code


@pytest.mark.parametrize("text", ["", " ", "\n", "\x00"])
def test_nothing(text):
    tree = check_all(text)
    assert len(tree) == 0 and list(tree) == [] and tree.root is None and list(tree.roots) == list(tree.leaves) == []
    assert set(codes(tree)) <= {"missing_root"}
    for order in ("pre", "post", "level", "text"):
        assert list(tree.walk(order)) == []
    assert tree.to_text(sep=" ").strip() == "" and tree.depth in (-1, 0, None)


@pytest.mark.parametrize("value", [None, 3, b"x", ["x"]])
def test_only_texts_are_read(value):
    with pytest.raises(TypeError):
        parse_thoughts(value)


def test_calculator_marks_and_angle_brackets():
    marks = "2 < 3 > 1, <<2*66=132>>132, <b>bold</b>, a<<b>>c, <start_of_thought, <end_of_thoughts>, <Critic>, </critic>"
    for text in (marks, "<<2*66=132>>", "<", "<<", "<<" + "x" * 50, " <\n> ", "<thinking>"):
        tree = expect(ROOT + " " + node(0, 1, text))
        assert tree.nodes[1].text == text and tree.nodes[1].type == "expansion"
        tree = expect(ROOT + "\n" + node(0, 1, text, CRITIC))
        assert tree.nodes[1].text == text and tree.nodes[1].type == "critic"


@pytest.mark.parametrize("word", ["<ritic>", "<Critic>", "<critics>", "<kritik>", "<problm>", "<refined>", "<con_clusion>", "<expansio>", "<refi\u00f1e>"])
def test_a_tag_with_a_wrong_letter_is_reported_and_stays_text(word):
    text = ROOT + " " + node(0, 1, word + " x") + " " + node(0, 2, word + "y", CRITIC) + " " + node(0, 3, "y" + word)
    tree = check_all(text)
    assert codes(tree) == ["unknown_type_tag"]
    assert text[tree.issues[0].start : tree.issues[0].end] == word and tree.nodes[1].span.start < tree.issues[0].start < tree.nodes[1].span.end
    assert (tree.nodes[1].type, tree.nodes[1].text) == ("expansion", word + " x")


@pytest.mark.parametrize("word", ["<b>", "<think>", "<answer>", "<ritic", "<ri tic>", "<cic>", "<critic-x>", "<3ritic>", "< critic>", "<" + "critic" * 9 + ">"])
def test_words_that_are_far_from_types_are_text(word):
    assert codes(check_all(ROOT + " " + node(0, 1, word))) == []


def carefully(text, parts=False):
    "By the careful reader; parts: without the expression for stretches of usual forms."
    grammar = thoughts._Grammar()
    if parts:
        grammar.usual = re.compile("(?!)")
    reader = thoughts._Reader(grammar)
    reader.advance(text, 0, True)
    return reader.rows, [reader.place(i) for i in range(len(reader.rows))], reader.spans(), sorted(reader.found), reader.hints, reader.open


@hard_check
@given(text=any_texts)
@example(text=ROOT + header(0, 1) + T + "x" + R + R_END + " " + HINT + "\n" + HINT_END + "\t")
@example(text=ROOT + header(0, 1) + T + "x" + rated("<critic>") + HINT + T + HINT_END + T_END)
@example(text=ROOT + header(0, 1) + T + "x" + T_END + HINT + HINT_END + rated())
@example(text=ROOT + header(0, 1) + T + "<critic>" + T_END + "\n" + rated("None") + header(0, 1) + T + " ")
def test_usual_stretches_are_read_as_others(text):
    assert carefully(text) == carefully(text, parts=True)


def test_whitespace_belongs_to_the_thought():
    tree = expect(ROOT + " " + node(0, 1, "\n  a\r\n\tb  \n") + "\n")
    assert tree.nodes[1].text == "\n  a\r\n\tb  \n"


@pytest.mark.parametrize("tag", TYPES)
def test_types(tag):
    tree = expect(ROOT + " " + node(0, 1, "x", tag))
    assert tree.nodes[1].type == tag[1:-1] and tree.nodes[1].text == "x"


@pytest.mark.parametrize("sep", ["", " ", "\n", "\n\n", " \n ", "   "])
def test_separators(sep):
    text = ROOT + sep + header(0, 1) + thought("x") + sep + rated() + sep + node(1, 2) + sep
    tree = expect(text)
    assert [n.local_id for n in tree] == [0, 1, 2] and [n.rating for n in tree] == [None, "positive", "positive"]


def test_a_plain_prefix_is_no_defect():
    tree = expect("Problem: 3 < 4. " + ROOT)
    assert tree.trace.spans[0][:3] == ("prefix", 0, 16) and len(tree) == 1


# one test for each row of the table


def test_doubled_header():
    text = header(-1, 0) + T + header(-1, 0) + thought("q", PROBLEM) + T_END + rated() + "\n" + node(0, 1)
    tree = expect(text, "doubled_header", "root_rated")
    assert len(tree) == 2 and tree.root.text == "q" and tree.root.type == "problem" and tree.root.rating == "positive"
    assert tree.root.complete and tree.nodes[1].parent is tree.root and tree.nodes[1].text == "x"
    bare = check_all(header(-1, 0) + T + header(-1, 0) + thought("q", PROBLEM) + " " + node(0, 1))
    assert "doubled_header" in codes(bare) and bare.root.text == "q" and len(bare) == 2


def test_a_header_in_the_root_with_other_ids_is_the_next_node():
    tree = check_all(header(-1, 0) + T + node(0, 1))
    assert [n.local_id for n in tree] == [0, 1] and "doubled_header" not in codes(tree)
    assert "missing_thought_end" in codes(tree) and not tree.root.complete and tree.root.text == ""


@pytest.mark.parametrize("opening, closing", [("('", "', 'gold')"), ("('", "', \"it's\")"), ("('", "', None)"), ('("', "\", 'gold')")])
def test_tuple_root(opening, closing):
    tree = expect(opening + ROOT + closing + "\n" + node(0, 1), "tuple_root")
    assert len(tree) == 2 and tree.root.text == "q" and tree.nodes[1].parent is tree.root
    text = tree.trace.text
    wrapper = [text[s.start : s.end] for s in tree.trace.spans if s.kind == "gap"]
    assert opening in wrapper and any(closing in gap for gap in wrapper)


def test_a_tuple_inside_the_root():
    "What the code upstream prints where a root given as a tuple gets its header once more."
    text = header(-1, 0) + T + "('" + ROOT + "', 'gold')" + T_END + rated() + "\n" + node(0, 1)
    tree = parse_thoughts(text)
    check_tree(tree, text)
    assert set(codes(tree)) & {"tuple_root", "doubled_header", "missing_thought_end"}
    assert "q" in [n.text for n in tree] and tree.nodes[-1].text == "x"


def test_duplicate_id():
    tree = expect(" ".join([ROOT, node(0, 1, "a"), node(1, 2, "b"), node(0, 1, "c"), node(1, 3, "d"), node(2, 4, "e")]), "duplicate_id")
    assert [n.text for n in tree] == ["q", "a", "b", "c", "d", "e"]
    assert [n.parent and n.parent.index for n in tree] == [None, 0, 1, 0, 3, 2]
    assert [n.local_id for n in tree] == [0, 1, 2, 1, 3, 4] and tree.to_text(sep=" ") == tree.trace.text


def test_forward_father():
    tree = expect(" ".join([ROOT, node(2, 1, "a"), node(0, 2, "b")]), "forward_father")
    assert tree.nodes[1].parent is tree.nodes[2] and indexes(tree.nodes[2].children) == [1] and tree.root is tree.nodes[0]
    assert indexes(tree.path(tree.nodes[1])) == [0, 2, 1]


def test_a_root_that_comes_last():
    tree = expect(node(0, 1, "a") + " " + ROOT, "forward_father")
    assert tree.root is tree.nodes[1] and tree.nodes[0].parent is tree.root


def test_orphan_father():
    tree = check_all(ROOT + " " + node(7, 1))
    assert set(codes(tree)) - {"multiple_roots"} == {"orphan_father"}
    assert tree.nodes[1].parent is None and tree.nodes[1].parent_id == 7 and indexes(tree.roots) == [0, 1]


def test_self_father():
    tree = check_all(ROOT + " " + node(1, 1))
    assert set(codes(tree)) - {"multiple_roots"} == {"self_father"}
    assert tree.nodes[1].parent is None and tree.nodes[1].parent_id == 1


def test_fathers_in_a_ring():
    tree = check_all(" ".join([ROOT, node(2, 1), node(3, 2), node(1, 3)]))
    assert set(codes(tree)) & FATHER_CODES
    tree = check_all(" ".join([node(1, 0), node(0, 1), node(1, 2)]))
    assert set(codes(tree)) & FATHER_CODES and "missing_root" in codes(tree)


def test_missing_root():
    tree = check_all(node(5, 1) + " " + node(1, 2))
    assert set(codes(tree)) == {"orphan_father", "missing_root"} and tree.nodes[1].parent is tree.nodes[0]
    assert expect("no tree at all", "missing_root").root is None


def test_multiple_roots():
    tree = expect(" ".join([ROOT, node(-1, 5, "r", PROBLEM, None), node(5, 6)]), "multiple_roots")
    assert tree.root is None and indexes(tree.roots) == [0, 1] and tree.nodes[2].parent is tree.nodes[1]


@pytest.mark.parametrize("bad", ["x", "", "1.5", "1e3", "+1", "1_0", "--1", "-", "0x1", "None", "<1>"])
def test_bad_id(bad):
    tree = check_all(ROOT + " " + node(0, bad))
    assert set(codes(tree)) == {"bad_id"} and tree.nodes[1].local_id is None and tree.nodes[1].parent is tree.root
    tree = check_all(ROOT + " " + node(bad, 1))
    assert "bad_id" in codes(tree) and tree.nodes[1].parent_id is None and tree.nodes[1].parent is None
    assert tree.nodes[1].local_id == 1
    tree = check_all(" ".join([ROOT, node(0, bad), node(0, bad)]))
    assert "duplicate_id" not in codes(tree), "None is no id"


@pytest.mark.parametrize("printed, value", [("007", 7), ("-0", 0), ("12345678901234567890", 12345678901234567890), ("9" * 64, 10**64 - 1)])
def test_integers_of_all_kinds(printed, value):
    tree = check_all(node(-1, printed, "q", PROBLEM, None))
    assert tree.root.local_id == value and codes(tree) == []


@pytest.mark.parametrize("printed", ["9" * 5000, "-" + "9" * 5000, "\u0663", "\u00b2", " 1 ", "1\n", "\ud800", "1" + "0" * 400])
def test_hostile_ids(printed):
    text = ROOT + " " + node(0, printed) + " " + node(printed, 2)
    check_tree(parse_thoughts(text), text)
    parse_thoughts(text).to_text(sep=" ")


def test_rating_misspelled():
    tree = expect(ROOT + " " + node(0, 1, rating=MISSPELLED), "rating_misspelled")
    assert tree.nodes[1].rating == "unknown"


@pytest.mark.parametrize("word, rating", [("True", "positive"), ("False", "negative"), ("None", "unknown")])
def test_rating_word(word, rating):
    tree = expect(ROOT + " " + node(0, 1, f"It is {word}.", rating=word), "rating_word")
    assert tree.nodes[1].rating == rating and tree.nodes[1].text == f"It is {word}."


@pytest.mark.parametrize("bad", ["", "true", "good", "0.5", "positive", POSITIVE + NEGATIVE, "<positive_rating", "x" + POSITIVE])
def test_bad_rating(bad):
    tree = expect(ROOT + " " + node(0, 1, rating=bad) + " " + node(1, 2), "bad_rating")
    assert tree.nodes[1].rating is None and tree.nodes[1].text == "x" and len(tree) == 3
    assert any(s.kind == "rating" and bad in tree.trace.text[s.start : s.end] for s in tree.trace.spans)


def test_an_open_hint_swallows_no_rating():
    tree = check_all(ROOT + " " + header(0, 1) + T + "x" + T_END + HINT + " Try" + rated(NEGATIVE) + " " + node(0, 2))
    assert (tree.nodes[1].rating, tree.nodes[1].hint, len(tree)) == ("negative", None, 3) and "hint_between_nodes" in codes(tree)


def test_missing_rating():
    tree = expect(ROOT + " " + node(0, 1, rating=None) + " " + node(0, 2), "missing_rating")
    assert [n.rating for n in tree] == [None, None, "positive"] and tree.nodes[1].complete


def test_root_rated():
    tree = expect(node(-1, 0, "q", PROBLEM, NEGATIVE) + "\n" + node(0, 1), "root_rated")
    (issue,) = tree.issues
    assert issue.severity == "info" and tree.root.rating == "negative"
    assert tree.to_text(sep="\n") == tree.trace.text


def test_missing_thought_end_before_a_header():
    text = " ".join([ROOT, header(0, 1) + T + "a < b", node(0, 2)])
    tree = expect(text, "missing_thought_end", "missing_rating")
    assert tree.nodes[1].text == "a < b " and not tree.nodes[1].complete and tree.nodes[2].complete and len(tree) == 3


def test_missing_thought_end_before_a_rating():
    tree = expect(ROOT + " " + header(0, 1) + T + CRITIC + "a" + rated(NEGATIVE) + " " + node(0, 2), "missing_thought_end")
    assert (tree.nodes[1].text, tree.nodes[1].type, tree.nodes[1].rating, tree.nodes[1].complete) == ("a", "critic", "negative", False)


@pytest.mark.parametrize("tail", ["", "a", "a\n", "a <end_of_though", "<"])
def test_missing_thought_end_at_the_end(tail):
    tree = check_all(ROOT + " " + header(0, 1) + T + tail)
    cut = {"partial_marker"} if tail.endswith("<end_of_though") else set()
    assert set(codes(tree)) - {"empty_thought"} == {"missing_thought_end", "missing_rating"} | cut
    assert tree.nodes[1].text == tail and not tree.nodes[1].complete


@pytest.mark.parametrize("tag", ["", CRITIC])
def test_empty_thought(tag):
    tree = expect(ROOT + " " + node(0, 1, "", tag), "empty_thought")
    assert tree.nodes[1].text == "" and tree.nodes[1].complete and tree.nodes[1].type == (tag[1:-1] or "expansion")


def test_type_repeated():
    tree = expect(ROOT + " " + node(0, 1, " x", CRITIC + CRITIC), "type_repeated")
    assert tree.nodes[1].type == "critic" and tree.nodes[1].text in (" x", CRITIC + " x")
    tree = check_all(ROOT + " " + node(0, 1, " x", REFINE + CRITIC))
    assert tree.nodes[1].type == "refine" and set(codes(tree)) & {"type_repeated", "type_in_text"}


@pytest.mark.parametrize("text", [f"a {CRITIC} b", f" {CRITIC}b", f"a{REFINE}"])
def test_type_in_text(text):
    tree = expect(ROOT + " " + node(0, 1, text), "type_in_text")
    assert tree.nodes[1].type == "expansion" and tree.nodes[1].text == text
    assert check_all(ROOT + " " + node(0, 1, text, CONCLUSION)).nodes[1].text == text


@pytest.mark.parametrize(
    "prefix", [
        "ther_id>0" + F_END + L + "4" + L_END + thought("y") + rated() + " ", F_END + L + "4" + L_END + T + "y ",
        "4" + L_END + thought("<<1+1=2>>") + "\n", L_END, "0" + F_END + L + "4",
    ]
)  # fmt: skip
def test_left_truncated(prefix):
    text = prefix + node(4, 5, "a") + " " + node(5, 6, "b")
    tree = check_all(text)
    assert set(codes(tree)) == {"left_truncated", "orphan_father", "missing_root"}
    assert [n.text for n in tree] == ["a", "b"] and tree.nodes[1].parent is tree.nodes[0]
    assert tree.trace.spans[0].kind == "prefix" and tree.trace.spans[0][1:3] == (0, len(prefix))
    assert set(codes(check_all(prefix + ROOT))) == {"left_truncated"}


def test_hint_between_nodes():
    hint = " Point out the potential flaws in the current solution. "
    text = ROOT + "\n" + node(0, 1) + HINT + hint + HINT_END + "\n" + node(1, 2)
    tree = expect(text, "hint_between_nodes")
    assert [n.hint for n in tree] == [None, hint, None] and tree.nodes[1].text == "x" and len(tree) == 3
    (span,) = [s for s in tree.trace.spans if s.kind == "hint"]
    assert hint in text[span.start : span.end]
    assert HINT not in tree.to_text(sep=" ") and content(parse_thoughts(tree.to_text(sep="\n"))) == content(tree)


def test_a_policy_prompt():
    "Path, hint, header and the opening of a thought: what the policy head reads."
    text = ROOT + "\n" + node(0, 1) + HINT + " h " + HINT_END + "\n" + header(1, 2) + T + CRITIC
    tree = check_all(text)
    assert {"hint_between_nodes", "missing_thought_end"} <= set(codes(tree))
    assert tree.nodes[2].type == "critic" and not tree.nodes[2].complete and tree.nodes[1].hint == " h "


@pytest.mark.parametrize("sep", ["\n\n", "\n\n\n", " \n \n"])
def test_blank_lines_are_no_defect(sep):
    assert len(expect(ROOT + sep + node(0, 1) + sep + node(0, 2) + sep)) == 3


# ---------------------------------------------------------------------------------------------------- (b) the reference


@hard_check
@given(text=flawed_texts())
def test_flawed_texts_are_read_as_the_reference_does(text):
    check_all(text)


@hard_check
@given(text=damaged_texts())
def test_damaged_texts_are_read_as_the_reference_does(text):
    check_all(text)


@check
@given(text=st.one_of(soups, well_formed().map("".join)))
def test_other_texts_are_read_as_the_reference_does(text):
    check_all(text)


@hard_check
@given(text=any_texts)
def test_any_text_is_read(text):
    check_tree(parse_thoughts(text), text)


@hard_check
@given(text=texts)
@example(text=ROOT + " and " + node(0, 1))
@example(text=ROOT + T_END)
@example(text=ROOT + node(0, 1) + " " + header(1, 2))
@example(text=ROOT + node(0, 1)[:-3])
@example(text=ROOT + " " + node(0, 1, f"a {T} b"))
@example(text=ROOT + " " + node(0, 1) + rated())
@example(text=ROOT + " " + F + "0")
@example(text=T_END + ROOT)
def test_what_is_not_in_the_grammar_is_reported(text):
    read = reference_read(text)
    if read.broken:
        assert parse_thoughts(text).issues, "damage without an issue"


@check
@given(pieces=well_formed())
def test_well_formed_texts_have_no_issue(pieces):
    text = "".join(pieces)
    tree = check_all(text)
    assert follows_grammar(text) and len(tree) == text.count(F)
    assert {i.code for i in tree.issues} <= {"forward_father"}  # ids come in any order, fathers do not
    assert all(n.complete for n in tree) and len(tree.roots) == 1


def exhaustive(alphabet, longest, before=""):
    for length in range(longest + 1):
        for word in itertools.product(alphabet, repeat=length):
            text = before + "".join(word)
            try:
                check_all(text)
                assert parse_thoughts(text).issues or not reference_read(text).broken
            except Exception as error:
                raise AssertionError(text) from error


@pytest.mark.parametrize("before", ["", ROOT])
def test_every_short_text_of_tokens(before):
    "Every sequence of up to four of the structural tokens and a digit."
    exhaustive((F, F_END, L, L_END, T, T_END, R, R_END, "1") if not before else (F, T, T_END, R, R_END, POSITIVE, "1"), 4, before)


def test_every_short_text_of_nodes():
    "Every sequence of up to five headers, openings, ends, ratings and texts."
    exhaustive((header(-1, 0), header(0, 1) + T, T, T_END, rated(), "x"), 5)


@pytest.mark.parametrize("tag", [CRITIC, " "])
def test_every_short_thought(tag):
    exhaustive((tag, T_END, rated(), HINT + "h" + HINT_END, "x", node(0, 2)), 5, ROOT + header(0, 1) + T)


def test_every_short_list_of_ids():
    "Every sequence of up to four nodes with the ids -1 to 2: duplicates, orphans, rings, forests."
    exhaustive([node(f, k, rating=None if f < 0 else POSITIVE) for f in (-1, 0, 1, 2) for k in (0, 1, 2)], 3)
    exhaustive([node(f, k, rating=None if f < 0 else POSITIVE) for f, k in ((-1, 0), (0, 1), (1, 2), (2, 1), (3, 2), (1, 3), (0, 2))], 4)


def test_each_cut_of_the_example():
    text = EXAMPLE + HINT + " h " + HINT_END
    for at in range(len(text) + 1):
        for part in (text[:at], text[at:]):
            check_all(part)
            assert parse_thoughts(part).issues or not reference_read(part).broken, part


def test_each_piece_of_the_example_lost_doubled_or_moved():
    pieces = [EXAMPLE[start:end] for _, start, end in pieces_of(EXAMPLE)]
    for i in range(len(pieces)):
        for k in range(len(pieces)):
            rest = pieces[:i] + pieces[i + 1 :]
            for text in ("".join(rest), "".join([*rest[:k], pieces[i], *rest[k:]]), "".join([*pieces[:k], pieces[i], *pieces[k:]])):
                tree = check_all(text)
                assert tree.issues or not reference_read(text).broken, text


# ---------------------------------------------------------------------------------------------------- (c) writing


@hard_check
@given(made=built_trees(), sep=seps)
def test_what_is_built_is_read_back(made, sep):
    tree, rows = made
    expected = [
        (k, -1 if p is None else p, kind or "expansion", text, rating, p) for k, (p, kind, text, rating) in enumerate(rows)
    ]
    assert content(tree) == expected
    text = tree.to_text(sep=sep)
    again = check_all(text)
    assert list(again.issues) == [] and content(again) == expected and again.to_text(sep=sep) == text
    other = "\n" if sep == " " else " "
    assert content(parse_thoughts(again.to_text(sep=other))) == expected


@check
@given(made=built_trees(max_size=6), sep=seps)
def test_the_layout(made, sep):
    "The training layout, written out here once more."
    tree, rows = made
    parts = [node(-1, 0, rows[0][2], PROBLEM, None)]
    for k, (parent, kind, text, rating) in enumerate(rows[1:], 1):
        parts.append(node(parent, k, text, f"<{kind}>" if kind else "", f"<{rating}_rating>"))
    assert tree.to_text(sep=sep) == sep.join(parts)


@check
@given(pieces=well_formed(), sep=seps)
def test_what_is_read_is_written_back(pieces, sep):
    tree = parse_thoughts("".join(pieces))
    text = tree.to_text(sep=sep)
    assert content(parse_thoughts(text)) == content(tree) and parse_thoughts(text).to_text(sep=sep) == text


@check
@given(
    ids=st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 5), st.sampled_from((None, *RATINGS)), full_texts), max_size=8), sep=seps
)
def test_odd_ids_are_written_back(ids, sep):
    "Duplicates, orphans and forests keep their numbers; positions address the nodes."
    tree = check_all(sep.join(node(f, k, text, rating=rating) for f, k, rating, text in ids))
    assert [n.text for n in tree] == [text for *_, text in ids]
    again = parse_thoughts(tree.to_text(sep=sep))
    assert content(again) == content(tree) and codes(again) == codes(tree)


@check
@given(text=any_texts, sep=seps)
def test_anything_read_can_be_written(text, sep):
    tree = parse_thoughts(text)
    assert isinstance(tree.to_text(sep=sep), str)


@pytest.mark.parametrize("token", [T_END, T, F, L_END, R, R_END, HINT, *RATINGS])
@pytest.mark.parametrize("text", ["{}", "a {} b", "{}b"])
def test_tokens_in_a_text_are_refused_or_read_back(token, text):
    tree = ThoughtTree.build("q")
    try:
        tree.add(tree.root, text.format(token), rating="positive")
        again = parse_thoughts(tree.to_text(sep=" "))
    except ValueError:
        return
    assert content(again) == content(tree)


@pytest.mark.parametrize("tag", TYPES)
def test_a_text_that_begins_with_a_type_is_refused_or_read_back(tag):
    tree = ThoughtTree.build("q")
    try:
        tree.add(tree.root, tag + " x", rating="positive")
        again = parse_thoughts(tree.to_text(sep=" "))
    except ValueError:
        return
    assert content(again) == content(tree)


@pytest.mark.parametrize("bad", [dict(type="wrong"), dict(rating="good")])
def test_unknown_types_and_ratings_are_refused(bad):
    tree = ThoughtTree.build("q")
    with pytest.raises(ValueError):
        tree.add(tree.root, "x", **bad)
    assert len(tree) == 1


@pytest.mark.parametrize("value, token", [(0.0, POSITIVE), (-0.1, POSITIVE), (-5.0, NEGATIVE), (-math.inf, NEGATIVE), (math.nan, UNKNOWN)])
def test_a_value_is_written_as_a_rating(value, token):
    tree = ThoughtTree.build("q")
    made = tree.add(tree.root, "x", value=value)
    assert made.value == value or math.isnan(value) and math.isnan(made.value)
    assert tree.to_text(sep=" ") == ROOT + " " + node(0, 1, rating=token)


def test_a_rating_that_was_read_has_no_value():
    tree = parse_thoughts(EXAMPLE)
    assert [n.value for n in tree.nodes[1:]] == [None, None] and tree.root.value in (None, 0)


def test_ids_of_added_nodes_do_not_repeat():
    "A tree that was read goes on with numbers that it does not use yet."
    tree = parse_thoughts(" ".join([ROOT, node(0, 7, "a"), node(0, 4, "b"), node(7, 4, "c")]))
    used = {n.local_id for n in tree}
    one = tree.add(tree.nodes[1], "d", rating="positive")
    two = tree.add(one, "e", rating="positive")
    assert one.local_id not in used and two.local_id not in used | {one.local_id}
    assert (one.parent_id, two.parent_id) == (7, one.local_id) and (one.index, two.index) == (4, 5)
    assert one.parent is tree.nodes[1] and two.parent is one and len(tree) == 6
    again = parse_thoughts(tree.to_text(sep=" "))
    assert [n.text for n in again] == ["q", "a", "b", "c", "d", "e"]


@check
@given(made=built_trees())
def test_dict_of_a_built_tree(made):
    tree, _ = made
    again = ThoughtTree.from_dict(json.loads(json.dumps(tree.to_dict())))
    assert content(again) == content(tree) and again.to_text(sep=" ") == tree.to_text(sep=" ")
    assert indexes(again.walk("pre")) == indexes(tree.walk("pre"))


@check
@given(text=texts)
def test_dict_of_a_tree_that_was_read(text):
    tree = parse_thoughts(text)
    again = ThoughtTree.from_dict(json.loads(json.dumps(tree.to_dict())))
    assert content(again) == content(tree) and [n.hint for n in again] == [n.hint for n in tree]


def test_dict_keeps_values():
    tree = ThoughtTree.build("q")
    tree.add(tree.root, "x", value=-0.25)
    again = ThoughtTree.from_dict(json.loads(json.dumps(tree.to_dict())))
    assert again.nodes[1].value == -0.25 and again.to_text(sep=" ") == tree.to_text(sep=" ")


# ---------------------------------------------------------------------------------------------------- (d) shapes


def children_of(parents, k):
    return [j for j, p in enumerate(parents) if p == k]


def pre(parents, k):
    return [k, *itertools.chain.from_iterable(pre(parents, j) for j in children_of(parents, k))]


def post(parents, k):
    return [*itertools.chain.from_iterable(post(parents, j) for j in children_of(parents, k)), k]


def level(parents):
    out, row = [], children_of(parents, None)
    while row:
        out += row
        row = [j for k in row for j in children_of(parents, k)]
    return out


def check_shape(tree):
    "Paths, walks, leaves, subtrees and depth against what recursion and brute force give."
    parents = [None if n.parent is None else n.parent.index for n in tree.nodes]
    roots = children_of(parents, None)
    everything = list(range(len(parents)))
    walks = {
        "text": everything,
        "pre": [j for k in roots for j in pre(parents, k)],
        "post": [j for k in roots for j in post(parents, k)],
        "level": level(parents),
    }
    for order, expected in walks.items():
        assert indexes(tree.walk(order)) == expected and sorted(expected) == everything, order
    assert sorted(indexes(tree.leaves)) == [k for k in everything if k not in parents]
    for n in tree.nodes:
        path = list(tree.path(n))
        assert path[-1] is n and path[0].parent is None and len(path) == depth_of(parents, n.index) + 1
        assert all(below.parent is above for above, below in itertools.pairwise(path))
        assert [m.text for m in tree.subtree(n)] == [tree.nodes[k].text for k in pre(parents, n.index)]
    if roots:
        assert tree.depth - ThoughtTree.build("q").depth == max(depth_of(parents, k) for k in everything)


@check
@given(made=built_trees(max_size=16))
def test_shapes_of_built_trees(made):
    check_shape(made[0])


@check
@given(ids=st.lists(st.tuples(st.integers(-1, 8), st.integers(0, 8)), max_size=12))
@example(ids=[(-1, 0), (2, 1), (1, 2)])
@example(ids=[(1, 0), (0, 1)])
@example(ids=[(3, 1), (1, 2), (2, 3), (3, 1), (1, 1), (1, 2)])
def test_shapes_of_odd_trees(ids):
    "Forward fathers, rings, orphans and forests; no fathers in a ring, every node reached once."
    check_shape(check_all(" ".join(node(f, k, f"node {j}") for j, (f, k) in enumerate(ids))))


@hard_check
@given(text=texts)
def test_shapes_of_any_tree(text):
    tree = parse_thoughts(text)
    check_links(tree)
    assert all(sorted(indexes(tree.walk(order))) == list(range(len(tree))) for order in ("pre", "post", "level", "text"))
    for n in tree:
        path = list(tree.path(n))
        assert path[-1] is n and path[0].parent is None


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError):
        list(parse_thoughts(EXAMPLE).walk("sideways"))


# ---------------------------------------------------------------------------------------------------- (e) streams


def stream(text, cuts):
    "Feed `text` cut at the offsets `cuts`; returns (tree, what was given out on the way)."
    reader, given_out = ThoughtStream(), []
    for start, end in itertools.pairwise([0, *sorted(cuts), len(text)]):
        given_out += reader.feed(text[start:end]) or []
    return reader.close(), given_out


def is_start(given_out, tree):
    "Are these the first spans (or the first nodes) of the tree?"
    if any(isinstance(x, ThoughtNode) for x in given_out):
        return [(n.index, n.text) for n in given_out] == [(n.index, n.text) for n in tree.nodes[: len(given_out)]]
    return list(given_out) == list(tree.trace.spans)[: len(given_out)]


def check_stream(text, cuts):
    whole = parse_thoughts(text)
    tree, given_out = stream(text, cuts)
    assert isinstance(tree, ThoughtTree) and same(tree, whole) and is_start(given_out, whole)


@hard_check
@given(text=any_texts, data=st.data())
def test_stream_equals_whole(text, data):
    check_stream(text, data.draw(st.lists(st.integers(0, len(text)), max_size=12)))


@check
@given(text=any_texts)
def test_stream_by_single_characters_equals_whole(text):
    check_stream(text, range(1, len(text)))


@check
@given(text=texts, rest=texts)
def test_what_was_given_out_does_not_depend_on_what_follows(text, rest):
    reader = ThoughtStream()
    given_out = list(reader.feed(text) or [])
    assert is_start(given_out, parse_thoughts(text + rest))
    assert is_start(given_out, reader.close())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 64])
def test_the_example_in_chunks(size):
    for text in (EXAMPLE, "('" + ROOT + "', 'gold')\n" + node(0, 1) + HINT + "h" + HINT_END, EXAMPLE[20:], EXAMPLE[:-30]):
        check_stream(text, range(size, len(text), size))


def test_a_stream_is_closed_once():
    reader = ThoughtStream()
    reader.feed(ROOT)
    assert len(reader.close()) == 1
    with pytest.raises(ValueError):
        reader.feed("x")
    with pytest.raises(ValueError):
        reader.close()


def test_streams_do_not_share_state():
    one, other = ThoughtStream(), ThoughtStream()
    one.feed(ROOT + header(0, 1) + T)
    other.feed("x")
    one.feed("y" + T_END)
    assert same(other.close(), parse_thoughts("x"))
    assert same(one.close(), parse_thoughts(ROOT + header(0, 1) + T + "y" + T_END))


# ---------------------------------------------------------------------------------------------------- (f) token ids

IDS = {token.strip("<>"): 1000 + 7 * k for k, token in enumerate(PUBLISHED)}  # names of roles as in `parse_memento_ids`
VOCABULARY = {token: IDS[token.strip("<>")] for token in PUBLISHED} | {str(n): n for n in range(10)} | {"-1": 11, "x": 12, " ": 13}


def read_ids(symbols):
    "The one place that knows how ids are read: for each node (type, rating, positions of its tokens or None)."
    found = parse_thought_ids([VOCABULARY[s] for s in symbols], IDS)
    spans = [(t.place.node, t.place.father, t.place.local, t.place.thought, t.place.rating) for t in found]
    return [(t.type, t.rating, [p for s in five for p in ((s.start, s.end) if s else (None,))]) for t, five in zip(found, spans)]


def node_symbols(k, father, tag, rating, sep):
    head = [F, father, F_END, L, str(k % 10), L_END, T, *([tag] if tag else []), "x", "x", T_END]
    return head + ([R, rating, R_END] if rating else []) + ([" "] if sep else [])


id_nodes = st.lists(
    st.tuples(st.sampled_from(("-1", "0", "1", "2")), st.sampled_from((None, *PUBLISHED[11:])), st.sampled_from((None, *RATINGS)), st.booleans()),
    max_size=6,
)


@check
@given(rows=id_nodes, data=st.data())
def test_ids_agree_with_text(rows, data):
    "A node for a node, in order; every position is one of a token inside that node. Also where the ids break off."
    symbols = [s for k, row in enumerate(rows) for s in node_symbols(k, *row)]
    starts = [k for k, s in enumerate(symbols) if s == F]
    if symbols and data.draw(st.booleans()):
        symbols = symbols[: data.draw(st.integers(0, len(symbols)))]
        starts = [k for k in starts if k + 6 < len(symbols)]  # up to the opening of the thought
        assume(not starts or F not in symbols[starts[-1] + 1 :])
        assume(starts or F not in symbols)
    tree, entries = parse_thoughts("".join(symbols)), read_ids(symbols)
    assert len(entries) == len(tree) == len(starts)
    for n, (kind, rating, entry), start, end in zip(tree, entries, starts, [*starts[1:], len(symbols)]):
        assert (kind, rating) == (n.type, n.rating)
        positions = [p for p in entry if p is not None]
        assert positions and all(start <= p <= end for p in positions)
        assert start in positions or start + 6 in positions  # the header or the opening of the thought
        if n.complete and n.rating is not None:
            assert None not in entry
        if not n.complete:
            assert None in entry or end in positions


def test_ids_take_what_the_reader_of_mementos_takes():
    symbols = node_symbols(0, "-1", PROBLEM, None, True) + node_symbols(1, "0", CRITIC, UNKNOWN, False)
    ids = [VOCABULARY[s] for s in symbols]
    plain_list = parse_thought_ids(ids, IDS)
    assert [tuple(e) for e in parse_thought_ids(np.array(ids), IDS)] == [tuple(e) for e in plain_list] and len(plain_list) == 2
    assert list(parse_thought_ids([], IDS)) == list(parse_thought_ids([1, 2, 3], IDS)) == []


@pytest.mark.parametrize("missing", ["start_of_father_id", "start_of_thought", "end_of_thought"])
def test_ids_need_their_markers(missing):
    with pytest.raises(ValueError, match=missing):
        parse_thought_ids([1, 2], {name: i for name, i in IDS.items() if name != missing})


# ---------------------------------------------------------------------------------------------------- (g) ratings

LN_HALF = math.log(0.5)


@pytest.mark.parametrize(
    "value, token",
    [
        (0, POSITIVE), (0.0, POSITIVE), (-0.0, POSITIVE), (-0.1, POSITIVE), (LN_HALF, POSITIVE), (LN_HALF - 1e-9, NEGATIVE),
        (-5, NEGATIVE), (-math.inf, NEGATIVE), (-1e308, NEGATIVE), (0.001, UNKNOWN), (math.nan, UNKNOWN), (1000, UNKNOWN),
        (1e308, UNKNOWN), (math.inf, UNKNOWN),
    ],
)  # fmt: skip
def test_ratings_of_values(value, token):
    assert value_to_rating_token(value) == value_to_rating_token(value, rule="probability") == token


@pytest.mark.parametrize(
    "value, token",
    [
        (-0.1, NEGATIVE), (LN_HALF, NEGATIVE), (-5, NEGATIVE), (-math.inf, NEGATIVE), (0.001, POSITIVE), (1000, POSITIVE),
        (math.inf, POSITIVE), (math.nan, UNKNOWN),
    ],
)  # fmt: skip
def test_ratings_of_values_by_sign(value, token):
    assert value_to_rating_token(value, rule="sign") == token
    assert value_to_rating_token(0, rule="sign") in (UNKNOWN, POSITIVE)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError):
        value_to_rating_token(-1.0, rule="other")


@pytest.mark.parametrize("rating", ["positive", "negative", "unknown"])
def test_values_of_ratings(rating):
    assert value_to_rating_token(rating_to_value(rating)) == f"<{rating}_rating>"


# ---------------------------------------------------------------------------------------------------- (h) files


def rows_of(*texts):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_read_lines(tmp_path):
    odd = ROOT + " " + node(0, 1, "a\u2028b\x85c\r\nd")
    trees, issues = read_trees(write(tmp_path / "rows.jsonl", rows_of(EXAMPLE, odd)))
    assert [tree.trace.text for tree in trees] == [EXAMPLE, odd] and len(issues) == 0
    assert same(trees[0], parse_thoughts(EXAMPLE))
    trees, issues = read_trees(str(tmp_path / "rows.jsonl"))
    assert len(trees) == 2 and len(issues) == 0


def test_read_text_untouched(tmp_path):
    text = EXAMPLE.replace(" <start_of_father", "\r\n<start_of_father")
    trees, issues = read_trees(write(tmp_path / "tree.txt", text))
    assert [tree.trace.text for tree in trees] == [text] and len(issues) == 0


def test_read_broken_lines(tmp_path):
    line = rows_of(EXAMPLE)
    data = line + "{broken\n" + line + '{"text": 3}\n{"other": "x"}\n[1]\nnull\n' + line + line[:60]
    trees, issues = read_trees(write(tmp_path / "rows.jsonl", data))
    assert [tree.trace.text for tree in trees] == [EXAMPLE] * 3
    assert len(issues) >= 6 and all(issue.code in CODES for issue in issues)


def test_read_a_last_line_cut_off(tmp_path):
    trees, issues = read_trees(write(tmp_path / "rows.jsonl", rows_of(EXAMPLE) + rows_of(EXAMPLE)[:100]))
    assert len(trees) == 1 and [issue.code for issue in issues] == ["json_truncated"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_read_an_empty_file(tmp_path, name):
    trees, issues = read_trees(write(tmp_path / name, b""))
    assert list(trees) == [] and [issue.code for issue in issues] == ["empty_file"]


SAVED = {"index": 0, "state": "q", "parent": None, "visits": 2, "value": 0.0, "leaf_type": "", "children": []}
SAVED["children"] = [SAVED | {"index": 1, "state": "x", "parent": 0, "value": -0.1, "leaf_type": "successful"}]


@pytest.mark.parametrize("cut", [1, 10, 60, 150])
def test_read_a_saved_tree_cut_off(tmp_path, cut):
    trees, issues = read_trees(write(tmp_path / "buffer.json", json.dumps([SAVED])[:cut]))
    assert [issue.code for issue in issues] == ["json_truncated"] and list(trees) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_read_what_is_not_utf8(tmp_path, name):
    good = rows_of(EXAMPLE).encode()
    data = good + b'{"text": "\xff\xfe"}\n' + good if name == "a.jsonl" else b"\xff\xfe\x80" + EXAMPLE.encode()
    trees, issues = read_trees(write(tmp_path / name, data))
    assert len(issues) >= 1 and all(issue.code in CODES for issue in issues)
    if name == "a.jsonl":
        assert [tree.trace.text for tree in trees].count(EXAMPLE) == 2


def packed(path, *rows):
    "Rows in a file of the kind that its name says."
    if path.suffix == ".gz":
        document = json.dumps([{"text": r} for r in rows]) if ".json." in path.name else rows_of(*rows)
        return write(path, gzip.compress(document.encode()))
    table = pa.table({"n": range(len(rows)), "text": pa.array(rows, pa.string())})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    return path


PACKED = ("a.jsonl.gz", "a.ndjson.gz", "a.json.gz", "a.parquet", "a.arrow")


@pytest.mark.parametrize("name", PACKED)
def test_read_what_is_packed(tmp_path, name):
    path = packed(tmp_path / name, EXAMPLE, None, ROOT)
    for where in (path, tmp_path):
        trees, issues = read_trees(where)
        assert [t.text for t in trees] == [EXAMPLE, ROOT]
        assert [i.code for i in issues] == ["no_response"] and "empty (null)" in issues[0].reason and issues[0].where.startswith(name)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("cut", [3, 0.5, -3])
def test_read_what_is_packed_and_broken(tmp_path, name, cut):
    data = packed(tmp_path / name, EXAMPLE, ROOT).read_bytes()
    trees, issues = read_trees(write(tmp_path / name, data[: int(cut * len(data)) if cut == 0.5 else cut]))
    assert [t.text for t in trees] == [EXAMPLE, ROOT][: len(trees)]
    assert issues and {i.code for i in issues} <= {"damaged_file", "json_truncated"}
    trees, issues = read_trees(write(tmp_path / name, b"nothing of the kind"))
    assert list(trees) == [] and [i.code for i in issues] == ["damaged_file"]


def test_read_a_folder(tmp_path):
    write(tmp_path / "a.jsonl", rows_of(EXAMPLE, ROOT))
    write(tmp_path / "b.txt", EXAMPLE + "\n")
    write(tmp_path / "c.jsonl", b"")
    write(tmp_path / "d.json", json.dumps([SAVED])[:80])
    write(tmp_path / "e.txt", b"\xff\xff")
    write(tmp_path / "z.jsonl", rows_of(node(-1, 0, "last", PROBLEM, None)))
    (tmp_path / "none").mkdir()
    trees, issues = read_trees(tmp_path)
    texts = [tree.trace.text for tree in trees]
    assert texts[:3] == [EXAMPLE, ROOT, EXAMPLE + "\n"] and trees[-1].root.text == "last" and len(texts) in (4, 5)
    assert {"empty_file", "json_truncated"} <= {issue.code for issue in issues} and len(issues) >= 3
    trees, issues = read_trees(tmp_path / "none")
    assert trees == [] and [issue.code for issue in issues] == ["empty_folder"]
    with pytest.raises(FileNotFoundError):
        read_trees(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------- (i) size


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


def chain(n):
    return " ".join([ROOT] + [node(k - 1, k) for k in range(1, n)])


REPEATED = {
    "a chain": chain,
    "a star": lambda n: " ".join([ROOT] + [node(0, k) for k in range(1, n)]),
    "forward fathers": lambda n: " ".join([node(k + 1, k) for k in range(1, n)] + [node(0, n), ROOT]),
    "a ring": lambda n: " ".join([ROOT] + [node(k % n + 1, k) for k in range(1, n + 1)]),
    "rings of two": lambda n: " ".join(node(k ^ 1, k) for k in range(n)),
    "one id": lambda n: ROOT + (" " + node(0, 1)) * n,
    "orphans": lambda n: " ".join(node(n + k, k) for k in range(n)),
    "unclosed": lambda n: (header(0, 1) + T + "x") * n,
    "openings": lambda n: ROOT + T * n,
    "ends": lambda n: ROOT + T_END * n,
    "half headers": lambda n: F * n,
    "open ratings": lambda n: ROOT + header(0, 1) + T + (R + "x") * n,
    "open hints": lambda n: ROOT + HINT * n,
    "types": lambda n: ROOT + header(0, 1) + T + CRITIC * n,
    "brackets": lambda n: ROOT + header(0, 1) + T + "<" * (20 * n) + T_END,
    "half tokens": lambda n: ROOT + header(0, 1) + T + "<start_of_" * n + T_END,
    "tuples": lambda n: "('" * n + ROOT + "', 'gold')" * n,
}


@pytest.mark.parametrize("name", list(REPEATED))
def test_work_grows_linearly(name):
    "Twice the text, at most 2.6 times the lines run; starting over for each token would give 4."
    batch = [lines_run(lambda: parse_thoughts(REPEATED[name](n)).nodes) for n in (300, 600)]
    made = [lines_run(lambda: REPEATED[name](n)) for n in (300, 600)]
    assert 0 <= batch[1] - made[1] <= 2.6 * (batch[0] - made[0]) + 100

    def feed(whole):
        reader = ThoughtStream()
        for at in range(0, len(whole), 13):
            reader.feed(whole[at : at + 13])
        reader.close()

    texts = [REPEATED[name](n) for n in (100, 200)]
    fed = [lines_run(lambda: feed(text)) for text in texts]
    assert 0 < fed[1] <= 2.6 * fed[0]


@pytest.mark.parametrize("name", list(REPEATED))
def test_repeated_texts_are_read(name):
    text = REPEATED[name](4)
    check_all(text)
    check_stream(text, range(3, len(text), 3))


def use_everything(tree):
    deepest = tree.nodes[-1]
    path = list(tree.path(deepest))
    assert path[-1] is deepest and path[0].parent is None
    for order in ("pre", "post", "level", "text"):
        assert len(list(tree.walk(order))) == len(tree)
    assert len(list(tree.subtree(tree.roots[0]))) >= 1 and len(list(tree.leaves)) >= 1 and tree.depth >= 1
    text = tree.to_text(sep=" ")
    again = ThoughtTree.from_dict(json.loads(json.dumps(tree.to_dict())))
    assert len(again) == len(tree) and again.to_text(sep=" ") == text
    repr(tree), repr(deepest)
    return text


def test_deep_trees_need_no_recursion():
    n = 3 * sys.getrecursionlimit()
    text = chain(n)
    tree = parse_thoughts(text)
    assert len(tree) == n and list(tree.issues) == [] and len(list(tree.path(tree.nodes[-1]))) == n
    assert use_everything(tree) == text
    assert indexes(tree.walk("post")) == list(range(n))[::-1] and indexes(tree.walk("pre")) == list(range(n))
    built = ThoughtTree.build("q")
    last = built.root
    for _ in range(n - 1):
        last = built.add(last, "x", rating="positive")
    assert built.to_text(sep=" ") == text
    forward = parse_thoughts(REPEATED["forward fathers"](n))
    assert forward.root.local_id == 0 and set(codes(forward)) == {"forward_father"}
    assert len(list(forward.path(forward.nodes[0]))) == n + 1
    ring = parse_thoughts(REPEATED["a ring"](n))
    assert all(len(list(ring.path(n))) <= len(ring) for n in ring.nodes[:3]) and sorted(indexes(ring.walk("post"))) == list(range(n + 1))


@pytest.mark.slow
def test_a_chain_of_fifty_thousand():
    text = chain(50_000)
    tree = parse_thoughts(text)
    assert len(tree) == 50_000 and list(tree.issues) == [] and use_everything(tree) == text
    assert len(list(tree.path(tree.nodes[-1]))) == 50_000


def best_time(call, rounds=3):
    "The shortest of some runs, in seconds."
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(REPEATED))
def test_time_grows_linearly(name):
    "Twice the text takes at most about three times as long; short times are not compared."
    small, large = (REPEATED[name](n) for n in (20_000, 40_000))
    first = best_time(lambda: parse_thoughts(small).nodes)
    assert best_time(lambda: parse_thoughts(large).nodes) <= 3.2 * first + 0.05


@pytest.mark.slow
def test_a_hundred_thousand_nodes():
    def bush(n):
        return " ".join([ROOT] + [node((k - 1) // 3, k, "<<1+1=2>>2") for k in range(1, n)])

    times = []
    for n in (50_000, 100_000):
        text = bush(n)
        tree = parse_thoughts(text)
        assert len(tree) == n and list(tree.issues) == []
        times.append((best_time(lambda: parse_thoughts(text).nodes, 2), best_time(lambda: use_everything(tree), 1)))
    assert times[1][0] <= 3.2 * times[0][0] + 0.1 and times[1][1] <= 3.2 * times[0][1] + 0.5
