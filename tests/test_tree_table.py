"The table of thought trees against a walk over nodes: whole trees, damaged ones, and anything else in any company."
import io
import math
import warnings
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tracebook.sources import UnreadableRows, make_trees, sample_traces
from tracebook.stats import TREE_COLUMNS, TREE_MEANINGS, _regular_forest, plot_all_trees, summarize_trees, tree_table
from tracebook.thoughts import THOUGHT_TOKENS, THOUGHT_TYPES, ThoughtTree, parse_thoughts

check = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
RATINGS = ("positive", "negative", "unknown", "none")
PIECES = [*THOUGHT_TOKENS, "<expansion>", "<hint>", "</hint>", "<unknow_rating>", "True", " ", "\n", "\t", "\u2028", "<", "</", "<p", "<s", "é", "x", "-", "0", "1", "2", "7", "\x00", "٣", "<ritic>", "<xproblem>"]
MADE = [*make_trees(12, seed=5)["text"], *make_trees(6, seed=6, nodes=3, sep="\n")["text"], *make_trees(3, seed=7, nodes=1)["text"], *sample_traces("thoughts")["text"][:3]]


def header(father, local): return f"<start_of_father_id>{father}<end_of_father_id><start_of_local_id>{local}<end_of_local_id>"


def node(father, local, text="x", rating="positive"):
    "One node as it is printed."
    rated = f"<start_of_rating><{rating}_rating><end_of_rating>" if rating else ""
    return f"{header(father, local)}<start_of_thought>{text}<end_of_thought>{rated}"


ROOT = node(-1, 0, "<problem>q", None)


def oracle(text):
    "Every column but the names, by walking over nodes."
    tree = parse_thoughts(text) if isinstance(text, str) else text
    nodes, depth = list(tree.nodes), {}
    for top in nodes:
        path = []
        while top is not None and top.index not in depth:
            path.append(top)
            top = top.parent
        above = -1 if top is None else depth[top.index]
        for k, n in enumerate(reversed(path)): depth[n.index] = above + 1 + k
    widths, children = Counter(depth.values()), Counter(n.parent.index for n in nodes if n.parent is not None)
    ratings, pairs = Counter((n.type, n.rating or "none") for n in nodes), Counter((n.parent.type, n.type) for n in nodes if n.parent is not None)
    codes = [i.code for i in tree.issues]
    per = lambda a, b: a / b if b else None
    roots = sum(n.parent_id == -1 for n in nodes)
    orphans = sum(n.parent is None and n.parent_id != -1 for n in nodes)
    return dict(nodes=len(nodes), roots=roots, depth=max(depth.values(), default=None), leaves=sum(n.index not in children for n in nodes),
        branching=per(sum(children.values()), len(children)), max_width=max(widths.values(), default=None), chars=None if tree.text is None else len(tree.text),
        thought_chars=sum(len(n.text) for n in nodes), type_ratings={t: {r: ratings[t, r] for r in RATINGS} for t in THOUGHT_TYPES},
        transitions={t: {c: pairs[t, c] for c in THOUGHT_TYPES} for t in THOUGHT_TYPES}, duplicate_ids=codes.count("duplicate_id"), orphans=orphans,
        missing_ratings=codes.count("missing_rating"), duplicate_rate=per(codes.count("duplicate_id"), len(nodes)), orphan_rate=per(orphans, len(nodes)),
        missing_rate=per(codes.count("missing_rating"), len(nodes) - roots), issues=codes)


def measured(rows): return [{k: v for k, v in r.items() if k not in ("row", "domain", "source")} for r in tree_table(rows).to_pylist()]


@st.composite
def damaged(draw):
    "A tree with up to three defects."
    text = draw(st.sampled_from(MADE))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        how = draw(st.sampled_from(["insert", "cut", "head", "tail", "token", "number"]))
        if how == "insert": text = text[:at] + draw(st.sampled_from(PIECES)) + text[at:]
        elif how == "cut": text = text[:at] + text[at + draw(st.integers(1, 30)):]
        elif how == "head": text = text[at:]
        elif how == "tail": text = text[:at]
        else:
            begin = text.find("_id>" if how == "number" else "<", at) + (4 if how == "number" else 0)
            end = text.find("<" if how == "number" else ">", begin) + (how == "token")
            if 4 <= begin <= end: text = text[:begin] + draw(st.sampled_from([text[begin:end] * 2, "", *PIECES])) + text[end:]
    return text


@st.composite
def numbered(draw):
    "A tree in the ordinary layout with any numbers, which may stand twice, lead nowhere or go round in a ring."
    ids = draw(st.lists(st.one_of(st.integers(0, 6), st.integers(0, 10**19)), min_size=1, max_size=9))
    fathers = [-1, *(draw(st.one_of(st.sampled_from(ids), st.integers(-1, 7))) for _ in ids[1:])]
    kinds = [draw(st.sampled_from(["", *(f"<{t}>" for t in THOUGHT_TYPES)])) for _ in ids]
    texts = [draw(st.sampled_from(["x", "é", "3 < 4", "<<2*3=6>>6", "a <b>", "", " ", "<kritic>", "<b>a", "<école>"])) for _ in ids]
    return draw(st.sampled_from([" ", "\n", "", " \n"])).join(node(f, i, k + t, None if n == 0 else draw(st.sampled_from(RATINGS[:3]))) for n, (f, i, k, t) in enumerate(zip(fathers, ids, kinds, texts)))


anything = st.one_of(damaged(), numbered(), st.lists(st.sampled_from(PIECES), max_size=20).map("".join), st.text(max_size=20).filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t)))


@check
@given(st.lists(anything, max_size=6))
@example([ROOT + " " + node(0, 1), "", ROOT, "<start_of_fa", "ther_id>" + ROOT, ROOT[:-3]])
@example([node(-1, 1, "a") + node(2, 2) + node(4, 3) + node(3, 4)])
@example(["", ""])
def test_every_column_against_a_walk(texts):
    assert measured(texts) == [oracle(t) for t in texts]


@check
@given(st.lists(numbered(), min_size=1, max_size=5))
def test_numbers_of_any_kind(texts):
    assert measured(texts) == [oracle(t) for t in texts]


@check
@given(st.lists(anything, max_size=6))
def test_batches_do_not_matter(texts):
    together = tree_table(texts)
    alone = pa.concat_tables([TREE_COLUMNS.empty_table(), *(tree_table([t]) for t in texts)])
    assert together.drop(["row"]) == alone.drop(["row"])
    assert together["row"].to_pylist() == list(range(len(texts)))


def test_ordinary_trees_are_measured_by_their_bytes():
    texts = [*MADE, node(-1, 7, "<problem>é") [:-len("<start_of_rating><positive_rating><end_of_rating>")] + "\n" + node(7, 3) + " \n" + node(3, 900) + "  "]
    assert len(_regular_forest(pa.array(texts)).rows) == len(texts)
    assert measured(texts) == [oracle(t) for t in texts]


@pytest.mark.parametrize("text", ["3 < 4", "<<66/2=33>>33", "<3", "<", "< b", "a<", "<=>"])
def test_angles_in_thoughts_stay_with_the_bytes(text):
    tree = ROOT + node(0, 1, text) + node(1, 2, "<critic>" + text, "unknown")
    assert len(_regular_forest(pa.array([tree])).rows) == 1
    assert measured([tree]) == [oracle(tree)]


@pytest.mark.parametrize("text", ["<critic> <refine>", "a <critic>", "<hint>a</hint>", "<unknow_rating>", "<start_of_thought>", "<p>", "<kritic>", "<b>a", "<École>"])
def test_what_is_out_of_the_ordinary_goes_to_the_reader(text):
    tree = ROOT + node(0, 1, text)
    assert len(_regular_forest(pa.array([tree])).rows) == 0
    assert measured([tree]) == [oracle(tree)]


@pytest.mark.parametrize("more", [node(0, 1, rating=None), node(0, 0), node(0, 1) + node(0, 1) + node(1, 2), node(9, 1) + node(1, 2), node(0, 1, "<critic>"), node(8, 0, "", None)])
@pytest.mark.parametrize("root", [ROOT, node(-1, 0, "<problem>q"), node(-1, 0, "", "unknown")])
def test_common_defects_are_named_from_the_bytes(root, more):
    assert len(_regular_forest(pa.array([root + more])).rows) == 1
    assert measured([root + more]) == [oracle(root + more)]


def test_a_chain_and_a_star_of_a_hundred_thousand_nodes():
    deep = ROOT + "".join(node(i, i + 1) for i in range(50_000))
    wide = ROOT + "".join(node(0, i + 1) for i in range(100_000))
    rows = tree_table([deep, wide, deep + node(0, 0)]).to_pylist()
    assert [(r["nodes"], r["depth"], r["leaves"], r["max_width"], r["branching"]) for r in rows] == [(50_001, 50_000, 1, 1, 1), (100_001, 1, 100_000, 100_000, 100_000), (50_002, 50_000, 2, 2, 50_001 / 50_000)]
    assert rows[2]["issues"] == ["duplicate_id"]


def test_more_rows_than_a_batch_holds():
    made = make_trees(1300, seed=8, nodes=4)
    table = tree_table(made, progress=False)
    assert table["row"].to_pylist() == list(range(1300))
    assert table == tree_table(list(made), progress=False) == tree_table(made.data.table, progress=False) == tree_table(made.to_iterable_dataset(), progress=False)


def test_unreadable_rows_are_named_and_leave_their_number():
    rows = [ROOT, None, dict(text=ROOT, domain="d"), dict(text=3), dict(nodes=[3]), parse_thoughts(ROOT), b"x"]
    with pytest.warns(UnreadableRows, match="row 1: .*row 3: .*row 4: .*row 6: "): table = tree_table(rows)
    assert table["row"].to_pylist() == [0, 2, 5] and table["domain"].to_pylist() == [None, "d", None]
    assert [u.code for u in summarize_trees(table).unreadable] == ["not_a_row", "not_text", "bad_column", "not_a_row"]
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    assert summarize_trees(pq.read_table(buffer)).unreadable == summarize_trees(table).unreadable


def test_a_column_of_nulls_and_one_that_is_no_text():
    with pytest.warns(UnreadableRows, match="3 unreadable"): assert len(tree_table(Dataset.from_dict(dict(text=[None] * 3)))) == 0
    with pytest.raises(ValueError, match="no column 'text'; they have: a"): tree_table(Dataset.from_dict(dict(a=["x"])))
    with pytest.raises(ValueError, match="no column 'b'"): tree_table(Dataset.from_dict(dict(text=["x"])), "b")
    for rows in (ROOT, dict(text=ROOT)):
        with pytest.raises(ValueError, match="put a text into a list"): tree_table(rows)


def test_saved_and_made_trees():
    tree = ThoughtTree.build("1 + 1")
    child = tree.add(0, "2", value=0.0)
    tree.add(child, "It holds.", type="critic", rating="unknown")
    assert measured([tree, tree.to_dict()]) == [oracle(tree)] * 2
    grown = parse_thoughts(ROOT)
    grown.add(0, "<b>")
    assert measured([grown.to_dict()])[0]["nodes"] == 2


def test_half_a_surrogate_pair_is_measured_too():
    texts = [ROOT + node(0, 1, "\udc00"), ROOT, "\ud800"]
    assert measured(texts) == [oracle(t) for t in texts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tree_table([dict(text=ROOT, domain="\ud800")])["domain"].to_pylist() == ["?"]


@check
@given(st.lists(anything, max_size=6))
def test_the_summary_is_made_of_the_table(texts):
    table = tree_table([dict(text=t, domain="ab"[i % 2]) for i, t in enumerate(texts)])
    summary, known = summarize_trees(table), [oracle(t) for t in texts]
    depths = [k["depth"] for k in known if k["depth"] is not None]
    found = summary.get("all", "depth")
    assert found["n"] == len(depths) and found["median"] == (np.median(depths) if depths else None)
    total = sum(k["nodes"] for k in known)
    rate = summary.get("all", "corpus_orphan_rate", "corpus")["median"] if texts else None
    assert rate == (sum(k["orphans"] for k in known) / total if total else None)
    pairs = {(r["parent"], r["child"]): r for r in summary.transitions.to_pylist() if r["group"] == "all"}
    for t in THOUGHT_TYPES:
        line = [sum(k["transitions"][t][c] for k in known) for c in THOUGHT_TYPES]
        assert [pairs[t, c]["n"] for c in THOUGHT_TYPES] == line
        assert [pairs[t, c]["share"] for c in THOUGHT_TYPES] == [n / sum(line) if sum(line) else None for n in line]
    assert {r["code"]: r["rows"] for r in summary.issues.to_pylist() if r["group"] == "all"} == Counter(c for k in known for c in set(k["issues"]))
    for value in (v for t in summary[:4] for r in t.to_pylist() for v in r.values()): assert not isinstance(value, float) or math.isfinite(value)
    assert "nan" not in repr(summary).lower() and "NaN" not in summary._repr_html_()


def test_every_column_has_a_meaning(): assert list(TREE_MEANINGS) == TREE_COLUMNS.names


def test_plots_of_anything():
    plt = pytest.importorskip("matplotlib.pyplot")
    for rows, names in (([], 1), ([""], 1), ([ROOT], 2), (MADE, 3), ([ROOT + node(5, 1)], 2)):
        drawn = [(name, fig) for name, title, caption, fig in plot_all_trees(tree_table([dict(text=t, domain="$x_") for t in rows]))]
        assert len(drawn) == names
        for _, fig in drawn:
            fig.canvas.draw()
            plt.close(fig)
