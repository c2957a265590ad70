"""Taxonomies, alignment, readers of annotated traces, and `row_steps`, against `oracle_steps.py` and their promises."""

import json
import pickle
import random
import time

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from oracle_steps import best_total, places, plain_segments, read_inline, squeeze, squeezed_offsets
from tracebook.steps import (
    DEFAULT_TAXONOMY, FORMS, STEP_KEYS, TAXONOMIES, Match, StepTrace, Taxonomy, align_steps, check_steps,
    normalise_label, parse_inline, parse_steps, plot_steps, read_steps, row_steps, segments, split_sentences,
    steps_features, unmark,
)  # fmt: skip
from tracebook.trace import CODES, Trace

check = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
hard_check = settings(check, max_examples=250)

RESPONSE = """<think>
Is 91 prime? Wait, 91 = 7 * 13. So it is not. Let me check: 7 * 13 = 70 + 21 = 91. Wait, is 13 prime? Yes.
So the answer is no.
</think>
No: 91 = 7 * 13."""


def codes(t):
    return [i.code for i in t.issues]


def is_sound(t, response=None):
    "What holds of every StepTrace."
    assert isinstance(t, StepTrace) and isinstance(t.trace, Trace)
    if response is not None: assert t.text == response
    assert "".join(t.trace.text_of(s) for s in t.trace.spans) == t.text
    assert [s.span for s in t.steps] == [s for s in t.trace.spans if s.kind == "step"]
    at = 0
    for s in t.steps:
        assert at <= s.span.start < s.span.end <= len(t.text)
        assert s.segment in ("thought", "solution") and isinstance(s.category, str) and isinstance(s.macro, str)
        at = s.span.end
    assert {i.code for i in t.issues} <= {c for c, x in CODES.items() if x.group == "steps"}
    assert all(0 <= i.start <= i.end <= len(t.text) for i in t.issues)
    assert list(t.issues) == sorted(t.issues, key=lambda i: (i.start, i.end))
    assert all(u.reason in CODES for u in t.unaligned)
    for v in t.coverage.values(): assert v is None or 0 <= v <= 1
    shown = t._repr_html_() + repr(t) + t.to_rich().plain
    assert not any(c in shown for c in "\x1b\x07\x00\u202e") and "<script" not in t._repr_html_()
    assert pickle.loads(pickle.dumps(t)) == t
    return t


def is_monotone(text, matches):
    at = 0
    for i, m in enumerate(matches):
        assert isinstance(m, Match) and m.index == i and (m.start is None) == (m.end is None)
        if m.start is None:
            assert m.how in ("empty", "order", "low_score", "missing")
            continue
        assert m.how in ("exact", "space", "fuzzy") and 0 < m.score <= 1
        assert at <= m.start < m.end <= len(text)
        at = m.end


# ---------------------------------------------------------------------------------------------------- taxonomies


def test_shipped_taxonomies():
    sizes = {"thinkarm": 8, "venhoff": 6, "thought-anchors": 9, "reasoningflow": 9, "cognitive-behaviors": 4, "memento": 2, "sentences": 1}
    assert {n: len(t.labels) for n, t in TAXONOMIES.items()} == sizes
    eight = set(TAXONOMIES[DEFAULT_TAXONOMY].labels)
    assert eight == {"Read", "Analyze", "Plan", "Implement", "Explore", "Verify", "Monitor", "Answer"}
    for n in ("thinkarm", "venhoff", "thought-anchors", "reasoningflow", "cognitive-behaviors"):
        assert set(TAXONOMIES[n].macro_of.values()) <= eight | {"other"}
    assert TAXONOMIES["memento"].macro_of == dict(block="block", memento="memento")
    assert len({t.fingerprint for t in TAXONOMIES.values()}) == len(TAXONOMIES)


@pytest.mark.parametrize("printed", ["adding-knowledge", "Adding Knowledge", "ADDING_KNOWLEDGE", "1. adding-knowledge",
    "12) adding_knowledge", "(3) adding knowledge", " 2: adding--knowledge ", "4 adding-knowledge", "adding\tknowledge"])  # fmt: skip
def test_labels_are_normalised(printed):
    assert TAXONOMIES["venhoff"].lookup(printed) == ("adding-knowledge", "Analyze", True)


@given(st.text(max_size=30))
@check
def test_any_label_has_an_answer(label):
    category, macro, known = TAXONOMIES["venhoff"].lookup(label)
    assert known or (category, macro) == (label, "other")
    key = normalise_label(label)
    assert known == (key in TAXONOMIES["venhoff"].labels)


def test_a_number_alone_is_a_label():
    t = Taxonomy("n", ("1", "2 3"), {"1": "Read", "2 3": "Plan"})
    assert t.lookup("1")[0] == "1"


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from("XYZ"), min_size=1))
@check
def test_the_fingerprint_is_that_of_the_map(macro_of):
    one = Taxonomy("one", tuple(macro_of), macro_of, "here")
    two = Taxonomy("two", tuple(reversed(macro_of)), dict(reversed(macro_of.items())))
    assert one.fingerprint == two.fingerprint and len(one.fingerprint) == 64
    changed = macro_of | {next(iter(macro_of)): "W"}
    assert Taxonomy("one", tuple(changed), changed).fingerprint != one.fingerprint
    assert hash(one) == hash(Taxonomy("one", tuple(macro_of), macro_of, "here")) and pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize("labels, macro_of, why", [
    ((), {}, "no labels"), (("a",), {}, "'a' is not both"), (("a",), {"a": "x", "b": "y"}, "'b' is not both"),
    (("a", "A"), {"a": "x", "A": "y"}, "there twice"), (("--",), {"--": "x"}, "empty"), (("a",), {"a": 3}, "are texts"),
])  # fmt: skip
def test_wrong_taxonomies_are_refused(labels, macro_of, why):
    with pytest.raises(ValueError, match=why): Taxonomy("mine", labels, macro_of)


def test_a_map_given_to_a_taxonomy_is_copied():
    given = dict(a="Read")
    t = Taxonomy("t", ("a",), given)
    given["a"] = "Plan"
    assert t.lookup("a")[1] == "Read"


# ---------------------------------------------------------------------------------------------------- alignment

LETTERS = st.text("ab .", max_size=24)


@given(LETTERS, st.lists(st.text("ab .", max_size=5), max_size=7))
@hard_check
def test_the_total_is_the_best_one(text, pieces):
    found = align_steps(text, pieces, threshold=1)
    is_monotone(text, found)
    for m, p in zip(found, pieces):
        if m.start is not None: assert squeeze(text[m.start:m.end]) == squeeze(p)
    assert sum(len(squeeze(p)) for m, p in zip(found, pieces) if m.start is not None) == best_total(text, pieces)


WORDS = st.lists(st.sampled_from(["Wait,", "so", "the", "sum", "is", "7.", "Hmm,", "check", "again", "x", "=", "12"]), min_size=1, max_size=16)


@given(WORDS, st.data())
@hard_check
def test_the_total_is_the_best_one_for_words(words, data):
    text = " ".join(words)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(words)), max_size=6)))
    pieces = [" ".join(words[a:b]) for a, b in zip([0, *cuts], [*cuts, len(words)])]
    pieces = data.draw(st.permutations(pieces)) if data.draw(st.booleans()) else [p for p in pieces if data.draw(st.booleans())]
    found = align_steps(text, pieces, threshold=1)
    is_monotone(text, found)
    assert sum(len(squeeze(p)) for m, p in zip(found, pieces) if m.start is not None) == best_total(text, pieces)


@given(st.text("abW, .\n\t\r\u3000\u00e9\u4e2d\U0001f600\ud83d", max_size=60), st.lists(st.integers(0, 60), max_size=10))
@hard_check
def test_pieces_that_are_the_text_are_found_at_their_own_places(text, cuts):
    cuts = sorted(min(c, len(text)) for c in cuts)
    bounds = list(zip([0, *cuts], [*cuts, len(text)]))
    found = align_steps(text, [text[a:b] for a, b in bounds])
    is_monotone(text, found)
    for m, (a, b) in zip(found, bounds):
        if text[a:b].strip():
            assert m.how == "exact" and a <= m.start and m.end <= b and text[m.start:m.end].strip() == text[a:b].strip()
        else: assert m.how == "empty"
    whole = [m for m, (a, b) in zip(found, bounds) if text[a:b].strip()]
    if len(whole) == len(bounds): assert [(m.start, m.end) for m in found] == bounds  # nobody else has the white space


SENTENCES = ("Wait,", "Wait, no.", "So x = 3.", "Hmm.", "Let me check this again.", "Then 3 + 4 = 7.", "Is that right?", "Yes.", "The sum of both is 7, as before.")


def changed_space(rng, text):
    return "".join(rng.choice((" ", "\n", "  ", "\n\n", " \t")) if c == " " else c for c in text)


@given(st.integers(0, 10**6))
@hard_check
def test_space_may_change_anywhere(seed):
    rng = random.Random(seed)
    pieces = rng.choices(SENTENCES, k=rng.randint(1, 30))
    text, bounds = "", []
    for p in pieces:
        text += rng.choice(("", " ", "\n"))
        q = changed_space(rng, p)
        bounds.append((len(text), len(text) + len(q)))
        text += q
    found = align_steps(text, [changed_space(rng, p) for p in pieces])
    assert [(m.start, m.end) for m in found] == bounds
    assert {m.how for m in found} <= {"exact", "space"}


@given(st.integers(0, 10**6))
@hard_check
def test_steps_that_are_left_out_do_not_harm_the_others(seed):
    "Distinct sentences, some kept: each is found at its own place, whatever repeats between them."
    rng = random.Random(seed)
    pieces = [f"Step {i}: {rng.choice(SENTENCES)}" if rng.random() < .5 else rng.choice(SENTENCES) for i in range(rng.randint(1, 40))]
    text = " ".join(pieces)
    starts = [sum(len(p) + 1 for p in pieces[:i]) for i in range(len(pieces))]
    kept = [i for i in range(len(pieces)) if rng.random() < .7]
    found = align_steps(text, [pieces[i] for i in kept])
    is_monotone(text, found)
    assert all(m.how == "exact" for m in found)
    for m, i in zip(found, kept):
        if pieces[i].startswith("Step"): assert m.start == starts[i]


def damaged(seed):
    "(text, pieces, truth): words dropped, words put in, sentences invented or taken out."
    rng = random.Random(seed)
    vocabulary = [f"{a}{b}" for a in "bdfglmnprst" for b in ("ana", "elo", "iru", "ote", "usa")]
    sentences = [" ".join(rng.choices(vocabulary, k=rng.randint(6, 14))) + "." for _ in range(rng.randint(2, 20))]
    pieces, truth, at, text = [], [], 0, ""
    for i, s in enumerate(sentences):
        kind, words = rng.choice("kkkkdwwio"), s.split()
        own = (len(text), len(text) + len(s))
        if kind == "d": words.pop(rng.randrange(1, len(words) - 1))
        if kind == "w": words.insert(rng.randrange(1, len(words)), "moreover")
        if kind != "i": text += s + " "  # invented: not in the text
        if kind != "o": pieces.append(" ".join(words)), truth.append((kind, own))  # left out by the annotator
    return text, pieces, truth


@given(st.integers(0, 10**6))
@hard_check
def test_damaged_pieces(seed):
    "What is found is found in its own sentence."
    text, pieces, truth = damaged(seed)
    found = align_steps(text, pieces)
    is_monotone(text, found)
    for m, (kind, (a, b)) in zip(found, truth):
        if kind == "k": assert (m.how, m.start, m.end) == ("exact", a, b)
        elif kind in "dw" and m.start is not None: assert m.how == "fuzzy" and a <= m.start < m.end <= b and m.score >= .75
        else: assert m.how in ("missing", "low_score")


def test_hardly_any_damaged_piece_is_missed():
    "An invented piece may take words from its neighbour; that is rare."
    missed = total = 0
    for seed in range(300):
        text, pieces, truth = damaged(seed)
        for m, (kind, _) in zip(align_steps(text, pieces), truth):
            total, missed = total + (kind in "dw"), missed + (kind in "dw" and m.start is None)
    assert total > 500 and missed <= total / 500


def test_a_far_match_does_not_swallow_later_steps():
    text = "One is odd. Two is even. Three is odd. Four is even. One more time."
    pieces = ["Two is even.", "One more time.", "Three is odd.", "Four is even."]
    assert [m.how for m in align_steps(text, pieces)] == ["exact", "order", "exact", "exact"]


def test_a_miss_does_not_move_the_cursor():
    found = align_steps("alpha beta gamma delta", ["zeta eta theta", "alpha", "iota kappa", "gamma delta"])
    assert [(m.start, m.how) for m in found] == [(None, "missing"), (0, "exact"), (None, "missing"), (11, "exact")]


def test_repeated_openers_stay_with_their_sentences():
    text = "Wait, A is 1. Wait, B is 2. Wait, C is 3."
    found = align_steps(text, ["Wait,", "B is 2.", "Wait,", "C is 3."])
    assert [m.start for m in found] == [14, 20, 28, 34]


def test_short_pieces_are_whole_words():
    assert [m.how for m in align_steps("this thing is on", ["is"])] == ["exact"]
    assert align_steps("this thing is on", ["is"])[0].start == 11
    assert align_steps("this thing", ["is"])[0].start is None
    assert align_steps("x=14.", ["4."])[0].start is None
    assert align_steps("它是这样的", ["是"])[0].start == 1


@pytest.mark.parametrize("text, piece, how", [
    ("他说今天下雨了,所以我们不去。", "他说今天下雨,所以我们不去。", "fuzzy"), ("AB", "ab", "fuzzy"), ("x", "x", "exact"), ("", "x", "missing"),
    ("...", "...", "exact"), ("a b c", "!!!", "missing"), ("caf\u00e9 au lait today", "cafe au lait today", "fuzzy"), ("\ud83d lone", "\ud83d  lone", "space"),
])  # fmt: skip
def test_odd_texts(text, piece, how):
    assert align_steps(text, [piece])[0].how == how


def test_a_region():
    text = "So it is. So it is. So it is."
    found = align_steps(text, ["So it is."], start=5, end=25)
    assert (found[0].start, found[0].end) == (10, 19)
    assert align_steps(text, ["So it is."], start=21, threshold=1)[0].start is None
    assert [m.start for m in align_steps(text, ["So it is."] * 4)] == [0, 10, 20, None]


@pytest.mark.parametrize("args, error, why", [
    ((None, []), TypeError, "must be a str"), (("a", "a"), TypeError, "not one text"), (("a", ["a", 3]), TypeError, "piece 1"),
    (("abc", [], dict(start=-1)), ValueError, "start=-1"), (("abc", [], dict(end=4)), ValueError, "end=4"),
    (("abc", [], dict(threshold=0)), ValueError, "threshold"), (("abc", [], dict(threshold=2)), ValueError, "threshold"),
])  # fmt: skip
def test_wrong_arguments(args, error, why):
    options = args[2] if len(args) > 2 else {}
    with pytest.raises(error, match=why): align_steps(*args[:2], **options)


@given(LETTERS, st.lists(st.text("ab .", max_size=5), max_size=7), st.integers(0, 30))
@check
def test_a_small_budget_is_sound(text, pieces, budget):
    found = align_steps(text, pieces, budget=budget)
    is_monotone(text, found)


def test_beyond_the_budget_a_whole_trace_is_still_found():
    rng = random.Random(3)
    pieces = rng.choices(["Wait,", "Hmm.", "So it is 7."], k=300) + ["Last."]
    pieces = [p if rng.random() < .9 else f"Number {i}." for i, p in enumerate(pieces)]
    text = "Start. " + " ".join(pieces) + " End."
    assert {m.how for m in align_steps(text, pieces, budget=500)} == {"exact"}


@given(st.text(max_size=80), st.lists(st.text(max_size=12), max_size=6))
@check
def test_any_text_and_any_pieces(text, pieces):
    found = align_steps(text, pieces)
    is_monotone(text, found)
    for m, p in zip(found, pieces):
        if m.how in ("exact", "space"): assert squeeze(text[m.start:m.end]) == squeeze(p)


def test_hostile_sizes_stay_fast():
    start = time.perf_counter()
    is_monotone("Wait, " * 3000, found := align_steps("Wait, " * 3000, ["Wait,"] * 2500))
    assert {m.how for m in found} == {"exact"}
    align_steps("a" * 200_000, ["a" * k for k in range(1, 400)])
    align_steps("the " * 50_000, ["a the " * 100] * 300)
    align_steps('["' * 100_000, ['["'] * 1000)
    assert time.perf_counter() - start < 20


def test_ten_thousand_sentences():
    rng = random.Random(0)
    words = "wait so the sum of two terms is then less than what we need here let me check each case again".split()
    sentences = [" ".join(rng.choices(words, k=rng.randint(3, 70))) + "." for _ in range(10_000)]
    gone = " ".join(s for i, s in enumerate(sentences) if i % 20)
    start = time.perf_counter()
    found = align_steps(gone, sentences)
    assert time.perf_counter() - start < 20  # about one second alone
    is_monotone(gone, found)
    assert sum(m.how == "exact" for m in found) >= 9_450


# ---------------------------------------------------------------------------------------------------- segments, sentences


@given(st.text("ab \n", max_size=10), st.text("ab \n", max_size=10), st.text("ab \n", max_size=10), st.booleans(), st.booleans())
@check
def test_segments(a, b, c, opened, closed):
    text = (a + "<think>" if opened else "") + b + ("</think>" + c if closed else "")
    assert segments(text) == plain_segments(text)


@pytest.mark.parametrize("marks", [("<think>", "</think>", "", ""), ("[THINK]", "[/THINK]", "", ""), ("<thinking>", "</thinking>", "", ""),
    ("<reasoning>", "</reasoning>", "", ""), ("<seed:think>", "</seed:think>", "", ""), ("◁think▷", "◁/think▷", "", ""),
    ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>")])  # fmt: skip
def test_segments_of_dialects(marks):
    T, t, S, s = marks
    text = f"{T}\n\nHm. So?{t}\n{S}Yes.{s}"
    found = segments(text)
    assert text[slice(*found["thought"])] == "\n\nHm. So?"
    assert text[slice(*found["solution"])].strip() == "Yes."
    steps = row_steps(dict(response=text))
    assert [(text[s["start"]:s["end"]], s["segment"]) for s in steps] == [("Hm.", "thought"), ("So?", "thought"), ("Yes.", "solution")]


@given(st.text("aB .!?\n\"1)-e.g。", max_size=60))
@hard_check
def test_sentences_lose_nothing(text):
    found = split_sentences(text)
    at = 0
    for a, b in found:
        assert at <= a < b <= len(text) and not text[at:a].strip()
        assert not text[a].isspace() and not text[b - 1].isspace()
        at = b
    assert not text[at:].strip()


@pytest.mark.parametrize("text, parts", [
    ("It is 3.5, i.e. more. Yes!", ["It is 3.5, i.e. more.", "Yes!"]), ("By Eq. 3 it is 7. So", ["By Eq. 3 it is 7.", "So"]),
    ("1. One\n2. Two", ["1. One", "2. Two"]), ("a\n\n\nb", ["a", "b"]), ('He said "No." Then', ['He said "No."', "Then"]),
    ("Wait... what?! Ok", ["Wait...", "what?!", "Ok"]), ("x\ny", ["x\ny"]), ("- a\n- b", ["- a", "- b"]),
])  # fmt: skip
def test_sentences(text, parts):
    assert [text[a:b] for a, b in split_sentences(text)] == parts


def test_sentences_are_linear():
    for text in ("e.g. " * 40_000, "a. " * 70_000, "\n" * 200_000, "1.\n" * 60_000, " " * 200_000 + "x", "\n \n " * 50_000):
        start = time.perf_counter()
        split_sentences(text)
        assert time.perf_counter() - start < 5


# ---------------------------------------------------------------------------------------------------- inline

LABELS = ["deduction", "1. deduction", "Backtracking", "checking", "<|im_end|>", "end section"]
INLINE = st.lists(st.sampled_from([*(f'["{x}"]' for x in LABELS), '["end-section"]', '["end-section"]', '["end-section"]', " Hm. ", "So 7.", '["', '"]', "\n", '[""]']), max_size=14).map("".join)


@given(INLINE)
@hard_check
def test_inline(marked):
    t = is_sound(parse_inline(marked), marked)
    sections, odd = read_inline(marked.replace("end section", "end-section"))
    assert [(s.label, t.text_of(s), s.span.complete) for s in t.steps] == [(a, b.replace("end-section", "end section") if "end section" in marked and "end-section" not in marked else b, c) for a, b, c in sections if b.strip()]
    assert codes(t).count("section_unbalanced") == odd
    assert len(t.steps) + len(t.unaligned) == len(sections)


@given(INLINE, st.sampled_from([RESPONSE, "", "Hm. So 7. Hm."]))
@check
def test_inline_against_a_response(marked, response):
    is_sound(parse_steps(marked, response, form="inline"), response)


def test_inline_row():
    marked = '["initializing"] Is 91 prime? ["end-section"] ["2. deduction"] Wait, 91 = 7*13.\nSo it is not. ["example_testing"] Let me check: 7 * 13 = 91. ["end-section"]["backtracking"] Wait, ["end-section"] ["deduction"] is 13 prime? ["end-section"]'
    t = is_sound(parse_steps(dict(original_message="?", full_response=RESPONSE, thinking_process="…", annotated_response=marked)), RESPONSE)
    assert [(s.category, s.macro, s.how) for s in t.steps] == [("initializing", "Read", "exact"), ("deduction", "Implement", "space"),
        ("example-testing", "Verify", "fuzzy"), ("backtracking", "Explore", "exact"), ("deduction", "Implement", "exact")]  # fmt: skip
    assert RESPONSE[:t.steps[3].span.start].count("Wait,") == 1  # the second one
    assert codes(t).count("section_unbalanced") == 1 and all(s.segment == "thought" for s in t.steps)


def test_only_known_labels():
    marked = '["deduction"] x = ["foo"] is a list. ["end-section"]'
    assert [t.category for t in parse_inline(marked).steps] == ["deduction", "foo"]
    assert [t.category for t in parse_inline(marked, only_known=True).steps] == ["deduction"]


@given(st.integers(0, 10**6))
@check
def test_inline_round_trip(seed):
    rng = random.Random(seed)
    n, at, steps = len(RESPONSE), 0, []
    while at < n - 1:
        a = rng.randint(at, n - 1)
        b = rng.randint(a + 1, min(n, a + 40))
        if RESPONSE[a:b].strip(): steps.append(dict(start=a, end=b, category=rng.choice(["Plan", "my own", "Verify"]), macro="Plan"))
        at = b
    t = parse_steps(dict(response=RESPONSE, steps=steps))
    back = unmark(parse_inline(t.to_inline(), t.taxonomy))
    assert back.text == RESPONSE
    assert [(s.span.start, s.span.end, s.category) for s in back.steps] == [(s["start"], s["end"], s["category"]) for s in steps]
    assert unmark(parse_inline(back.to_inline())).text == RESPONSE


@pytest.mark.parametrize("response, category", [('say ["Plan"] here', "Plan"), ("say it here", 'a"]b'), ("say it here", "end-section"), ("say it here", "")])
def test_what_cannot_be_written_inline_is_refused(response, category):
    t = parse_steps(dict(response=response, steps=[dict(start=0, end=3, category=category, macro="x")]))
    with pytest.raises(ValueError, match="would not be read back"): t.to_inline()


# ---------------------------------------------------------------------------------------------------- lists


def chunk(text, *tags, **more):
    return dict(chunk=text, chunk_idx=0, function_tags=list(tags), depends_on=[], accuracy=.5, **more)


def test_chunks():
    t = is_sound(parse_steps([chunk("Is 91 prime?", "problem_setup"), chunk("Wait, 91 = 7 * 13.", "active_computation", "fact_retrieval"),
        chunk("Wait, is 13 prime?", "uncertainty_management"), chunk("So the answer is no.", "final_answer_emission")], RESPONSE), RESPONSE)  # fmt: skip
    assert [s.macro for s in t.steps] == ["Read", "Implement", "Monitor", "Answer"]
    assert t.steps[1].tags == ("active_computation", "fact_retrieval") and t.form == "chunks"


BAD = [None, 3, "text", [], {}, {"chunk": None}, {"chunk": 7}, {"chunk": "Is 91 prime?"}, {"chunk": "Is 91 prime?", "function_tags": "problem_setup"},
    {"chunk": "Yes.", "function_tags": [None]}, {"chunk": "Yes.", "function_tags": {"a": 1}}, {"chunk": "Yes.", "function_tags": [3, ["x"]]},
    {"chunk": "\x1b[31m<script>", "function_tags": ["<script>\x1b\u202e"]}, {"chunk": " "}, {"chunk": "\ud83d"}]  # fmt: skip


@given(st.lists(st.sampled_from(BAD), max_size=6), st.sampled_from(["chunks", "sentences"]))
@check
def test_faults_in_lists_are_issues(rows, form):
    rows = [{k.replace("chunk", "sentence").replace("function_tags", "human_label"): v for k, v in r.items()} if isinstance(r, dict) and form == "sentences" else r for r in rows]
    t = is_sound(parse_steps(rows, RESPONSE, form=form), RESPONSE)
    assert len(t.steps) + len(t.unaligned) == len(rows)
    assert sorted([s.index for s in t.steps] + [u.index for u in t.unaligned]) == list(range(len(rows)))


def test_sentences_of_both_kinds():
    gold = [{"index": i, "sentence": s, "sentence-type": k, "human_label": c} for i, (s, k, c) in enumerate([
        ("Is 91 prime?", "think", "Read"), ("Wait, 91 = 7 * 13.", "think", "Implement"), ("No: 91 = 7 * 13.", "answer", "Answer")])]  # fmt: skip
    auto = [{"index": 0, "sentence": "Wait, is 13 prime?", "sentence-category": "monitor", "sentence-category-reason": "It doubts."}]
    assert [(s.category, s.segment) for s in is_sound(parse_steps(gold, RESPONSE)).steps] == [("Read", "thought"), ("Implement", "thought"), ("Answer", "solution")]
    assert [s.category for s in is_sound(parse_steps(auto, RESPONSE)).steps] == ["Monitor"]
    assert parse_steps(gold, RESPONSE).taxonomy.fingerprint == TAXONOMIES["thinkarm"].fingerprint


def test_unknown_labels_are_kept_verbatim():
    t = is_sound(parse_steps([chunk("Is 91 prime?", "Very_Odd <|im_start|>", "self_checking")], RESPONSE))
    assert (t.steps[0].category, t.steps[0].macro) == ("Very_Odd <|im_start|>", "other")
    assert codes(t).count("unknown_label") == 1


def test_own_taxonomy():
    mine = Taxonomy("mine", ("Question", "Rest"), dict(Question="ask", Rest="say"))
    t = parse_steps([chunk("Is 91 prime?", "question"), chunk("Wait,", "deduction")], RESPONSE, taxonomy=mine)
    assert [(s.category, s.macro) for s in t.steps] == [("Question", "ask"), ("deduction", "other")] and t.taxonomy == mine


def test_low_coverage():
    few = [chunk("Is 91 prime?", "problem_setup")]
    assert "low_coverage" in codes(parse_steps(few, RESPONSE)) and "low_coverage" not in codes(parse_steps(few, RESPONSE, least=0))
    t = parse_steps([chunk(RESPONSE[a:b], "fact_retrieval") for a, b in split_sentences(RESPONSE)], RESPONSE)
    assert "low_coverage" not in codes(t) and t.coverage["steps"] == 1
    assert parse_steps([], RESPONSE, form="chunks").coverage["steps"] is None
    assert codes(parse_steps([], RESPONSE, form="chunks")) == ["no_steps"]


# ---------------------------------------------------------------------------------------------------- nodes


def node(start, end, text=..., label="reasoning", source="response", **more):
    return dict(id="n", start=start, end=end, label=label, text=RESPONSE[start:end] if text is ... else text, source=source, annotation=None, **more)


def flow(*nodes, response=RESPONSE):
    return dict(doc_id="d", raw_text=dict(question="Is 91 prime?", response=response), metadata={}, nodes=list(nodes), edges=[])


def test_nodes():
    t = is_sound(parse_steps(flow(node(8, 20, label="context"), node(21, 40), node(41, 54, label="conclusion"))), RESPONSE)
    assert [(s.span.start, s.span.end, s.macro, s.how) for s in t.steps] == [(8, 20, "Read", "given"), (21, 40, "Implement", "given"), (41, 54, "Answer", "given")]


def test_a_node_elsewhere_is_found_between_its_neighbours():
    a = RESPONSE.index("7 * 13", 40)
    wrong = node(0, 6, "7 * 13")
    t = is_sound(parse_steps(flow(node(41, 54), wrong, node(a + 10, a + 17))), RESPONSE)
    assert [(s.span.start, s.how) for s in t.steps] == [(41, "given"), (a, "exact"), (a + 10, "given")]
    assert "offset_mismatch" in codes(t)


@pytest.mark.parametrize("a, b", [(-3, 5), (5, 3), (0, 10**9), ("0", 5), (None, None), (1.0, 5), (True, 5), (10**30, 10**31)])
def test_offsets_out_of_range(a, b):
    t = is_sound(parse_steps(flow(node(8, 20), dict(start=a, end=b, label="fact", text="So the answer is no.", source="response"))))
    assert "offset_range" in codes(t) and t.text_of(t.steps[1]) == "So the answer is no."


def test_nested_nodes():
    t = is_sound(parse_steps(flow(node(0, len(RESPONSE)), node(8, 20), node(8, 40), node(21, 40), node(30, 45))))
    assert [(s.span.start, s.span.end) for s in t.steps] == [(8, 20), (21, 40)]
    assert [u.reason for u in t.unaligned] == ["overlapping_step"] * 3


def test_nodes_of_the_question():
    t = is_sound(parse_steps(flow(node(0, 12, "Is 91 prime?", source="question"), node(8, 20))))
    assert [u.reason for u in t.unaligned] == ["other_source"] and len(t.steps) == 1


NODE = st.fixed_dictionaries({}, optional=dict(start=st.one_of(st.integers(-5, 180), st.sampled_from([None, "3", 2.5])), end=st.one_of(st.integers(-5, 180), st.sampled_from([None, True])),
    label=st.sampled_from(["fact", "", None, 3, ["a"], "1. planning"]), text=st.sampled_from([None, 3, "", " ", "Wait,", "7 * 13", "nowhere at all", RESPONSE]), source=st.sampled_from(["response", "question", None, 4])))  # fmt: skip


@given(st.lists(st.one_of(NODE, st.integers(0, 160).flatmap(lambda a: st.integers(a, 170).map(lambda b: node(a, min(b, len(RESPONSE))))), st.sampled_from([None, 3, "x", []])), max_size=9))
@hard_check
def test_any_nodes(nodes):
    t = is_sound(parse_steps(flow(*nodes)), RESPONSE)
    assert sorted([s.index for s in t.steps] + [u.index for u in t.unaligned]) == list(range(len(nodes)))


# ---------------------------------------------------------------------------------------------------- any source


def test_forms_are_recognised():
    assert [parse_steps(x, *y).form for x, y in [
        ('["deduction"]x["end-section"]', ()), ([chunk("Wait,")], (RESPONSE,)), ([dict(sentence="Wait,")], (RESPONSE,)), ([node(8, 20)], (RESPONSE,)),
        (flow(node(8, 20)), ()), (RESPONSE, ()), (dict(response=RESPONSE), ()), (dict(response=RESPONSE, steps=[]), ()),
        (dict(response=RESPONSE, sentences=["a", "b"]), ()), (dict(full_cot=RESPONSE, chunks_labeled=[chunk("Wait,")]), ()),
        ("<think><|block_start|>a<|block_end|></think>", ()),
    ]] == ["inline", "chunks", "sentences", "nodes", "nodes", "text", "text", "steps", "text", "chunks", "memento"]  # fmt: skip
    assert set(FORMS) == {"inline", "chunks", "sentences", "nodes", "memento", "text", "steps"}


@pytest.mark.parametrize("args, options, error", [
    ((5,), {}, TypeError), ((None,), {}, TypeError), (([1],), {}, ValueError), (([chunk("a")],), {}, ValueError), (([chunk("a")], 5), {}, TypeError),
    (("x", "y"), dict(form="xml"), ValueError), (({},), {}, ValueError), (("x",), dict(taxonomy="odd"), ValueError), (("x",), dict(form="chunks"), ValueError),
    (("x",), dict(threshold=.5), ValueError), ((flow() | dict(nodes="x"), ), dict(form="nodes"), ValueError), ((flow(response=3),), {}, TypeError),
])  # fmt: skip
def test_wrong_sources(args, options, error):
    with pytest.raises(error): parse_steps(*args, **options)


def test_read_steps_names_the_rows():
    traces, unread = read_steps([flow(node(8, 20)), 3, (["x"], RESPONSE), dict(response=RESPONSE, steps=[dict(start=5, end=2, category="a", macro="b")])])
    assert len(traces) == 1 and [u.where for u in unread] == ["row 1", "row 2", "row 3"]
    assert "step 0: offsets 5 to 2" in unread[2].reason


@pytest.mark.parametrize("wrong, says", [(dict(form="xml"), "form 'xml' is unknown"), (dict(taxonomy="odd"), "taxonomy 'odd' is unknown"), (dict(threshold=0), "threshold must be above 0"), (dict(treshold=.5), "treshold is no setting")])
def test_a_setting_that_is_wrong_for_every_row_is_no_fault_of_the_rows(wrong, says):
    with pytest.raises(ValueError, match=says): read_steps([flow(node(8, 20))], **wrong)


def test_options_of_another_form_are_refused():
    for options in (dict(only_known=True), dict(treshold=.5)):
        with pytest.raises(ValueError, match="means nothing for the form 'chunks'"): parse_steps([chunk("Wait,")], RESPONSE, **options)
    assert [t.form for t in read_steps([([chunk("Wait,")], RESPONSE)], threshold=.9, budget=100, least=.1)[0]] == ["chunks"]


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)), lambda x: st.one_of(st.lists(x, max_size=4), st.dictionaries(st.sampled_from(
    ["chunk", "function_tags", "sentence", "human_label", "nodes", "raw_text", "response", "steps", "start", "end", "label", "text", "category", "macro", "annotated_response"]), x, max_size=5)), max_leaves=12)  # fmt: skip


@given(st.lists(JSON, max_size=3))
@hard_check
def test_a_corpus_never_raises(rows):
    traces, unread = read_steps(rows)
    assert len(traces) + len(unread) == len(rows)
    for t in traces: is_sound(t)


@pytest.mark.parametrize("text", [RESPONSE, "", "<think>", "</think>", "<think><|block_start|>a<|block_end|><|summary_start|> <|summary_end|></think>x", "\ud83d. \x1b[31m<script>x</script>. \u202e"])
def test_the_text_itself(text):
    t = is_sound(parse_steps(text), text)
    assert [(s["start"], s["end"], s["segment"]) for s in row_steps(dict(response=text))] == [(s.span.start, s.span.end, s.segment) for s in t.steps]


# ---------------------------------------------------------------------------------------------------- rows


def test_row_steps_of_memento():
    text = "<think>\n<|block_start|> 7*13 = 91. So. <|block_end|><|summary_start|> 91 <|summary_end|>\n</think>\nDone. Really."
    assert [(text[s["start"]:s["end"]], s["category"], s["macro"], s["segment"]) for s in row_steps(dict(response=text))] == [
        (" 7*13 = 91. So. ", "block", "block", "thought"), (" 91 ", "memento", "memento", "thought")]  # fmt: skip


def test_row_steps_keeps_the_column():
    steps = [dict(start=8, end=20, category="odd one", macro="m1"), dict(start=20, end=30, category="Odd One", macro="m2")]
    found = row_steps(dict(answer=RESPONSE, steps=steps), text="answer")
    assert [{k: s[k] for k in STEP_KEYS} for s in found] == steps and all(s["segment"] == "thought" for s in found)
    assert parse_steps(dict(response=RESPONSE, steps=steps)).to_dicts() == found
    assert row_steps(dict(response=RESPONSE, steps={k: [s[k] for s in steps] for k in STEP_KEYS})) == found
    assert row_steps(dict(response=RESPONSE, steps=[])) == []
    assert row_steps(dict(response=RESPONSE, steps=None))[0]["category"] == "sentence"


STEP = dict(start=0, end=5, category="a", macro="b")


@pytest.mark.parametrize("steps, why", [
    ("x", "list of objects"), ([3], "step 0 must be an object"), ([STEP, STEP | dict(start=4, end=9)], "step 1 starts at 4, before the step before it ends at 5"),
    ([STEP | dict(end=99)], "offsets 0 to 99"), ([STEP | dict(start=-1)], "offsets -1 to 5"), ([STEP | dict(end=0)], "offsets 0 to 0"),
    ([STEP | dict(start="0")], "step 0: start must be a whole number, got '0'"), ([STEP | dict(macro=None)], "macro must be a text"), ([dict(start=0, end=1)], "no 'category'"),
    (dict(start=[0], end=[]), "same length"),
])  # fmt: skip
def test_wrong_columns_are_refused(steps, why):
    with pytest.raises(ValueError, match=why): row_steps(dict(response="0123456789", steps=steps))
    with pytest.raises(ValueError, match="row 7"): check_steps(steps, 10, "row 7")


def test_datasets_and_json(tmp_path):
    from datasets import Dataset, Features, Value, load_from_disk
    t = parse_steps(flow(node(8, 20, label="context"), node(21, 40)))
    rows = [t.to_row(problem="?"), parse_steps(RESPONSE).to_row(problem="!")]
    data = Dataset.from_list(rows, features=Features(problem=Value("string"), response=Value("string"), steps=steps_features()))
    data.save_to_disk(tmp_path/"d")
    back = load_from_disk(str(tmp_path/"d"))
    assert row_steps(back[0]) == t.to_dicts() and row_steps(json.loads(json.dumps(rows[0]))) == t.to_dicts()
    assert str(back.data.schema.field("steps").type) == "list<element: struct<start: int64, end: int64, category: string, macro: string>>".replace("element", back.data.schema.field("steps").type.value_field.name)


def test_plot():
    fig = plot_steps([parse_steps(RESPONSE), parse_steps(flow(node(8, 20), node(21, 40, label="$x_"), node(41, 54, label="\x1b")))])
    assert fig.axes[0].get_legend() is not None
    fig.canvas.draw()
    with pytest.raises(ValueError, match="no steps"): plot_steps([])


@pytest.mark.parametrize("bins", [0, -3])
def test_a_plot_has_bins(bins):
    with pytest.raises(ValueError, match="at least one"): plot_steps([parse_steps("One. Two.")], bins=bins)


def test_offsets_are_of_the_untouched_text():
    for response in (RESPONSE, RESPONSE.replace(" ", "\u00a0"), RESPONSE.replace("\n", "\r\n"), "\U0001f600 " + RESPONSE):
        pieces = [RESPONSE[a:b] for a, b in split_sentences(RESPONSE)]
        t = is_sound(parse_steps([chunk(p, "fact_retrieval") for p in pieces], response), response)
        assert not t.unaligned
        assert t.text_sha256 != parse_steps(response + " ").text_sha256
