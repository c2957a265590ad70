"The bundled thought trees and the made ones: each rating is worked out again, from the text and from outside it."
import ast
import hashlib
import re
import sys
import time
from collections import Counter
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import golden_trees  # noqa: E402
from tracebook import sources  # noqa: E402
from tracebook.sources import load_report, load_traces, make_trees, sample_traces  # noqa: E402

NODE = re.compile(r"<start_of_father_id>(-?\d+)<end_of_father_id><start_of_local_id>(\d+)<end_of_local_id><start_of_thought>(<problem>|<critic>|<refine>|<conclusion>)?"
    r"((?:(?!<(?:start|end)_of_).)*)<end_of_thought>(?:<start_of_rating><(positive|negative|unknown)_rating><end_of_rating>)?", re.S)
TREES = list(sample_traces("thoughts"))
MARK = re.compile(r"<<([\d+*/.()-]+)=([\d.]+)>>")
SIDE = r"[(\d][\d\s+\-*/^().]*"
CHAIN = re.compile(rf"(?<![\w.\])]){SIDE}(?:\s*=\s*[\d\s+\-*/^().]*\d\)?)+")
MADE_STEP = re.compile(r"(?i)(?:step|pass|interval) (\d+)")


def read(text, sep=" "):
    "(father, type, text, rating) of each node; AssertionError if the layout is another."
    found = list(NODE.finditer(text))
    assert sep.join(m[0] for m in found) == text and [int(m[2]) for m in found] == list(range(len(found)))
    nodes = [(int(m[1]), m[3] or "", m[4], m[5]) for m in found]
    assert nodes[0][0] == -1 and nodes[0][1] == "<problem>" and nodes[0][3] is None
    assert all(0 <= father < i for i, (father, *_) in enumerate(nodes) if i) and all(r for *_, r in nodes[1:])
    assert all((r == "unknown") == (kind == "<critic>") for _, kind, _, r in nodes)
    return nodes


def number(expression):
    "The exact value of an expression of numbers and + - * / ^."
    def go(n):
        if isinstance(n, ast.Constant): return Fraction(str(n.value))
        if isinstance(n, ast.UnaryOp): return -go(n.operand)
        a, b = go(n.left), go(n.right)
        return {ast.Add: lambda: a + b, ast.Sub: lambda: a - b, ast.Mult: lambda: a * b, ast.Div: lambda: a / b, ast.Pow: lambda: a ** int(b)}[type(n.op)]()
    return go(ast.parse(expression.strip().replace("^", "**"), mode="eval").body)


def equations(text):
    "(statement, whether it holds) of all marks and of all chains of equations."
    out = [(m[0], number(m[1]) == number(m[2])) for m in MARK.finditer(text)]
    return out + [(m[0], len({number(side) for side in m[0].split("=")}) == 1) for m in CHAIN.finditer(MARK.sub("", text))]


# ---- the checker itself
@pytest.mark.parametrize("text, want", [("so 3*4=<<3*4=12>>12 pears", [True, True]), ("3*4=<<3*4=11>>11", [False, False]), ("20/56 + 6/56 = 26/56 = 13/28.", [True]),
    ("7^2 = 49 = 3 * 13 + 10, so", [True]), ("(20 + 30) / 2 = 25 m/s", [True]), ("1 + 2 = 4.", [False]), ("x = 3 and f(4) is 3", []), ("120 / 2.5 = 48 km/h", [True])])
def test_equations(text, want): assert [ok for _, ok in equations(text)] == want


# ---- the bundled trees
def test_columns_and_sizes():
    assert len(TREES) == 16 and list(TREES[0]) == ["text", "problem", "domain", "source", "difficulty", "answer"]
    sizes = [len(read(r["text"])) for r in TREES]
    assert min(sizes) == 8 and max(sizes) == 30 and sum(sizes) == 285
    assert len({r["problem"] for r in TREES}) == 16 and {r["domain"] for r in TREES} == {"math", "code", "science", "logic"}

@pytest.mark.parametrize("i", range(16))
def test_layout_and_shape_of_a_bundled_tree(i):
    nodes = read(TREES[i]["text"])
    assert nodes[0][2] == TREES[i]["problem"] + " "
    for father, kind, text, rating in nodes[1:]:
        assert text.startswith(" ") and text.strip() and text.isprintable()
        if kind == "<refine>": assert nodes[father][3] == "negative" or nodes[father][1] == "<critic>"
        assert kind == "<critic>" or nodes[father][1] != "<conclusion>"
    kinds = Counter((kind, rating) for _, kind, _, rating in nodes)
    assert kinds["", "positive"] >= 2 and kinds["", "negative"] >= 2 and kinds["<critic>", "unknown"] and kinds["<refine>", "positive"] and kinds["<conclusion>", "positive"]
    assert max(Counter(father for father, *_ in nodes).values()) >= 2

@pytest.mark.parametrize("i", range(16))
def test_equations_of_nodes_that_are_not_negative_hold(i):
    for _, _, text, rating in read(TREES[i]["text"])[1:]:
        if rating != "negative": assert not [s for s, ok in equations(text) if not ok], text

def test_there_is_something_to_compute():
    assert sum(len(equations(text)) for r in TREES for _, _, text, _ in read(r["text"])) >= 200
    assert sum("<<" in r["text"] for r in TREES) >= 3

@pytest.mark.parametrize("i", range(16))
def test_claims_are_as_they_are_rated(i):
    nodes, (true, false) = read(TREES[i]["text"]), golden_trees.CLAIMS[i]
    assert set(false) == {j for j, n in enumerate(nodes) if n[3] == "negative"} and not set(true) & set(false)
    for j, claim in (true | false).items(): assert eval(claim, vars(golden_trees)) is (j in true), (nodes[j], claim)

@pytest.mark.parametrize("i", range(16))
def test_a_conclusion_is_positive_if_it_has_the_answer(i):
    ends = [(text, rating) for _, kind, text, rating in read(TREES[i]["text"]) if kind == "<conclusion>"]
    assert all((re.search(r"\\box\{(.+)\}", text)[1] == TREES[i]["answer"]) == (rating == "positive") for text, rating in ends)

def test_a_critic_may_judge_a_child_of_its_father():
    nodes = read(TREES[0]["text"])
    assert nodes[13][:2] == (5, "<critic>") and nodes[8][0] == 5 and "96-75" in nodes[8][2] and "96-75" in nodes[13][2]

def test_the_file_ships():
    assert files("tracebook").joinpath("data", "thoughts.jsonl").is_file()
    root = Path(__file__).parent.parent
    assert "recursive-include tracebook/data *" in (root/"MANIFEST.in").read_text() and '"data/*"' in (root/"setup.py").read_text()

def test_the_other_configs_are_what_they_were():
    assert sample_traces().column_names == ["problem", "response", "domain", "source", "difficulty"] and len(sample_traces("full")) == 24
    with pytest.raises(ValueError, match="choose default or full or thoughts"): sample_traces("x")
    with pytest.raises(ValueError, match="choose default or full$"): load_traces([dict(response="x")], config="thoughts")

def test_a_later_room_is_not_needed(): assert "tracebook.thoughts" not in Path(sources.__file__).read_text(encoding="utf-8")


# ---- made trees
PROBLEMS = [r"Start with x = (?P<x>\d+)\. In each step multiply x by (?P<a>\d+), add (?P<b>\d+), and keep the remainder on division by (?P<m>\d+)\. What is x after (?P<n>\d+) steps?\? ",
    r"What does this program print\?\nx = (?P<x>\d+)\nfor i in range\((?P<n>\d+)\):\n    x = \(x \* (?P<a>\d+) \+ (?P<b>\d+)\) % (?P<m>\d+)\nprint\(x\) ",
    r"A dial has (?P<m>\d+) marks, numbered from 0, and its hand stands at x = (?P<x>\d+)\. In each interval the reading is multiplied by (?P<a>\d+), then (?P<b>\d+) is added, "
    r"going round\. Where does the hand stand after (?P<n>\d+) intervals?\? "]
TURN = re.compile(r"(\d+) ([*+]|mod) (\d+) = (\d+)")

def rule_of(problem):
    "x, a, b, m, n of the problem of a made tree."
    found = next(m for m in (re.fullmatch(p, problem) for p in PROBLEMS) if m)
    return [int(found[k]) for k in "xabmn"]

def values_of(problem):
    x, a, b, m, n = rule_of(problem)
    out = [x]
    for _ in range(n): out.append((out[-1] * a + b) % m)
    return out

def check_made(row, sep=" "):
    "Hold each rating of a made tree against the rule of its problem; returns the nodes."
    nodes = read(row["text"], sep)
    x, a, b, m, n = rule_of(nodes[0][2])
    values, claim = values_of(nodes[0][2]), {0: (0, x)} # node -> (turns done, value)
    assert nodes[0][2] == row["problem"] + " " and row["answer"] == str(values[-1])
    for i, (father, kind, text, rating) in enumerate(nodes[1:], 1):
        assert father in claim # a conclusion has no children
        k, y = claim[father]
        marks, plain = MARK.findall(text), MARK.sub("", text)
        told = [(int(l), op, int(r), int(out)) for l, op, r, out in TURN.findall(plain)]
        holds = all({"*": l * r, "+": l + r, "mod": l % r}[op] == out for l, op, r, out in told)
        assert {(l, out) for l, out in marks} <= {(f"{l}{op}{r}", str(out)) for l, op, r, out in told}
        if kind == "<critic>":
            assert nodes[father][1] != "<critic>" and father and holds and told or "starts from a wrong value" in text
            assert ("is right" in text, "is wrong" in text) == (nodes[father][3] == "positive", nodes[father][3] == "negative")
            assert int(MADE_STEP.search(text)[1]) == k
            if found := re.search(r"after \w+ (\d+) x is (\d+), not (\d+)", text): assert values[int(found[1])] == int(found[2]) != int(found[3])
            for l, op, r, out, wrong in re.findall(r"(\d+) ([*+]|mod) (\d+) = (\d+), not (\d+)", text): assert wrong != out
            claim[i] = claim[father]
        elif kind == "<conclusion>":
            assert k == n and f"x is {y}." in text and f"\\box{{{y}}}" in text and f"After {n} " in text
            assert (y == values[-1]) == (rating == "positive")
        else:
            turn, value = int(MADE_STEP.search(text)[1]), int(re.search(r"x is (\d+)\.", text)[1])
            source = values[k - 1] if kind == "<refine>" else y
            right = [(source, "*", a, source * a), (source * a, "+", b, source * a + b), (source * a + b, "mod", m, (source * a + b) % m)]
            assert turn == (k if kind == "<refine>" else k + 1) and told[-1][3] == value and told[0][0] == source
            assert ((value == values[turn]) and holds and told == right) == (rating == "positive") == (value == values[turn])
            if kind == "<refine>": assert rating == "positive" and claim[father][1] != values[k]
            claim[i] = turn, value
    return nodes

@given(st.integers(0, 10**6), st.one_of(st.none(), st.integers(1, 120)), st.sampled_from([None, "wide", "deep", "bushy"]), st.sampled_from([" ", "\n"]))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_every_rating_of_a_made_tree(seed, n, shape, sep):
    for row in make_trees(2, seed=seed, nodes=n, shape=shape, sep=sep):
        nodes = check_made(row, sep)
        assert len(nodes) == n if n else 8 <= len(nodes) <= 30
        if len(nodes) > 2: assert any(kind == "<conclusion>" and rating == "positive" for _, kind, _, rating in nodes)

@pytest.mark.parametrize("shape", ["wide", "deep", "bushy"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 20_000])
def test_sizes_at_the_ends(n, shape): assert len(check_made(make_trees(1, seed=n, nodes=n, shape=shape)[0])) == n

def test_everything_that_can_happen_does():
    nodes = [n for row in make_trees(300, seed=5) for n in read(row["text"])]
    texts = "\n".join(t for _, _, t, _ in nodes)
    for flaw in ("is not added", "comes before", "starts from a wrong value", ", not "): assert flaw in texts
    assert {(k, r) for _, k, _, r in nodes} == {("<problem>", None), ("", "positive"), ("", "negative"), ("<critic>", "unknown"), ("<refine>", "positive"), ("<conclusion>", "positive"), ("<conclusion>", "negative")}
    rows = make_trees(300, seed=5)
    assert set(rows["domain"]) == {"math", "code", "science"} and 100 < sum("<<" in t for t in rows["text"]) < 200
    assert len(set(rows["problem"])) == 300 and set(rows["difficulty"]) == {None}

def test_shapes():
    def extent(text):
        depth, children = [0], Counter()
        for father, *_ in read(text)[1:]: depth.append(depth[father] + 1); children[father] += 1
        return max(depth), max(children.values())
    (wide, w), (deep, d), (bushy, b) = (extent(make_trees(1, nodes=4000, shape=s)["text"][0]) for s in ("wide", "deep", "bushy"))
    assert wide < bushy < deep and d < b < w and deep > 3200 and w > 1800 and 8 < bushy < 60

def test_a_chain_of_50_000():
    text = make_trees(1, nodes=60_000, shape="deep")["text"][0]
    depth = [0]
    for m in NODE.finditer(text): depth.append(depth[int(m[1])+1] + 1)
    assert max(depth) > 50_000

def test_a_long_corpus_begins_as_a_short_one():
    for kw in (dict(), dict(nodes=9), dict(shape="wide"), dict(sep="\n")): assert make_trees(40, seed=3, **kw)[:7] == make_trees(7, seed=3, **kw)[:]
    assert make_trees(3, seed=3)[:] != make_trees(3, seed=4)[:]
    assert make_trees(30, nodes=2000)["text"][26] == make_trees(27, nodes=2000)["text"][26] # over the edge of a batch

def test_the_separator_changes_nothing_else():
    for a, b in zip(make_trees(20, seed=8)["text"], make_trees(20, seed=8, sep="\n")["text"]): assert read(a) == read(b, "\n")

def test_the_same_bytes_everywhere():
    text = "".join(make_trees(50, seed=7)["text"])
    assert hashlib.sha256(text.encode()).hexdigest() == FROZEN

FROZEN = "27861f95231adc100d9ba97020445f9001c54065d8e47db75d1f010234c20f73"

@pytest.mark.parametrize("bad", [dict(n=-1), dict(n=1, nodes=0), dict(n=1, nodes=-5), dict(n=1, shape="tall"), dict(n=1, sep=""), dict(n=1, sep="\r\n")])
def test_wrong_arguments(bad):
    with pytest.raises(ValueError): make_trees(**bad)

def test_no_trees(): assert len(make_trees(0)) == 0 and make_trees(0).column_names == sample_traces("thoughts").column_names

def test_a_row_of_100_000_nodes_takes_time_in_proportion():
    def took(n):
        start = time.process_time()
        make_trees(1, nodes=n, shape="bushy")
        return time.process_time() - start
    took(1000)
    assert took(100_000) < 25 * min(took(10_000) for _ in range(3)) + .2


# ---- read like any other source
MAP = {"response": "text"}

def test_trees_through_load_traces(tmp_path):
    only = Dataset.from_dict(dict(text=[r["text"] for r in TREES]))
    path = tmp_path / "trees.jsonl"
    only.to_json(path)
    only.to_parquet(tmp_path / "trees.parquet")
    for source in (str(path), str(tmp_path / "trees.parquet"), only, list(only), only.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(list(only)))):
        rows = load_traces(source, column_map=MAP)
        assert [r["response"] for r in rows] == only["text"][:] and {r["problem"] for r in rows} == {None}
        assert load_report(rows).rows == 16 and not load_report(rows).unreadable
    with pytest.raises(ValueError, match="column_map={'response': 'text'}"): load_traces(str(path))

def test_the_name_on_the_hub_is_opened_as_a_stream(monkeypatch):
    opened = []
    def load(name, config, **kw):
        opened.append((name, config, kw))
        return IterableDataset.from_generator(lambda: iter([dict(text=r["text"]) for r in TREES] + [dict(text=None)]))
    monkeypatch.setattr(sources, "load_dataset", load)
    rows = load_traces("qq8933/OpenLongCoT-Pretrain", column_map=MAP)
    assert isinstance(rows, IterableDataset) and [r["response"] for r in rows] == [r["text"] for r in TREES]
    assert opened == [("qq8933/OpenLongCoT-Pretrain", None, dict(split="train", streaming=True))]
    assert [(u.where, u.code) for u in load_report(rows).unreadable] == [("qq8933/OpenLongCoT-Pretrain[16]", "no_response")]
    assert len(list(load_traces("qq8933/OpenLongCoT-Pretrain", column_map=MAP, limit=3))) == 3

def test_problem_and_domain_come_along():
    rows = load_traces(sample_traces("thoughts"), column_map=MAP)
    assert rows["problem"][:] == [r["problem"] for r in TREES] and set(rows["domain"]) == {"math", "code", "science", "logic"} and rows["source"][0] == "tracebook"
