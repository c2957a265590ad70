"Thought trees against split and expressions, and against themselves at other sizes: python -m pytest tests/benchmarks/test_tree_speed.py --slow -q."
import gc
import re
import time
from collections import Counter

import pytest

from tracebook.heads import path_strings
from tracebook.sources import make_trees
from tracebook.stats import tree_table
from tracebook.thoughts import parse_thoughts

pytestmark = pytest.mark.slow
N_TREES = 1000
HEAD = re.compile(r"(-?\d+)<end_of_father_id><start_of_local_id>(-?\d+)<end_of_local_id><start_of_thought>(?:<(problem|expansion|critic|refine|conclusion)>)?(.*?)<end_of_thought>\s*(?:<start_of_rating><(\w+)_rating><end_of_rating>)?", re.DOTALL)


def usual_parse(text):
    "Split at the headers, an expression for each piece, a dict for each node; knows of no damage."
    out = []
    for piece in text.split("<start_of_father_id>")[1:]:
        father, local, kind, said, rating = HEAD.match(piece).groups()
        out.append(dict(father=int(father), local=int(local), type=kind or "expansion", text=said, rating=rating))
    return out


def usual_numbers(text):
    "Shape, ratings and transitions of a tree by the reader above."
    depth, kinds, children, widths, ratings, pairs = {}, {}, Counter(), Counter(), Counter(), Counter()
    for n in usual_parse(text):
        kinds[n["local"]], up = n["type"], n["father"]
        depth[n["local"]] = depth.get(up, -1) + 1
        widths[depth[n["local"]]] += 1
        ratings[n["type"], n["rating"] or "none"] += 1
        if up in kinds:
            children[up] += 1
            pairs[kinds[up], n["type"]] += 1
    return len(kinds), max(depth.values()), len(kinds) - len(children), max(widths.values()), +ratings, +pairs


def numbers(tree):
    "The same by a loop over the nodes of a tree that was read."
    depths, inner = [n.depth for n in tree], [n for n in tree if n.children]
    return (len(tree), max(depths), len(tree) - len(inner), max(Counter(depths).values()), Counter((n.type, n.rating or "none") for n in tree),
        Counter((n.parent.type, n.type) for n in tree if n.parent))


def counted(table):
    "The same out of a table."
    grid = lambda struct: Counter({(a, b): n for a, inner in struct.items() for b, n in inner.items() if n})
    return [(r["nodes"], r["depth"], r["leaves"], r["max_width"], grid(r["type_ratings"]), grid(r["transitions"])) for r in table.to_pylist()]


@pytest.fixture(autouse=True)
def no_collections():
    "Collections of garbage come at certain numbers of objects: of two runs, one may have one more, and that is no question of length."
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def in_turn(ways, rounds):
    "Least seconds of each way; one after the other, so that a slow minute is slow for all."
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
        gc.collect()
    return {name: min(t) for name, t in times.items()}


def read(texts):
    for t in texts: (tree := parse_thoughts(t)).nodes, tree.issues


@pytest.mark.parametrize("name, n, nodes", [("small trees", N_TREES, None), ("one large tree", 1, 50_000)])
def test_parse(benchmark, row, name, n, nodes):
    texts = [*make_trees(n, nodes=nodes, shape="bushy" if nodes else None)["text"]]
    size = sum(map(len, texts)) / 1e6
    assert [len(parse_thoughts(t)) for t in texts] == [len(usual_parse(t)) for t in texts]
    benchmark.pedantic(lambda: read(texts), rounds=2, warmup_rounds=1)
    s = in_turn(dict(ours=lambda: read(texts), usual=lambda: [usual_parse(t) for t in texts]), 6)
    speed, faster = size / s["ours"], s["usual"] / s["ours"]
    row(f"`parse_thoughts`, nodes and issues, {name}", f"{speed:.0f} MB/s", f"split and an expression a node: {size / s['usual']:.0f} MB/s", faster, "at least 1.5, and 120 MB/s")
    assert faster >= 1.5


DAMAGE = dict(
    hints=lambda t: t.replace("<end_of_rating>", "<end_of_rating><hint> Point out what is wrong. </hint>"),
    words=lambda t: t.replace("<positive_rating>", "True").replace("<negative_rating>", "False").replace("<unknown_rating>", "None"),
    unclosed=lambda t: t.replace("<end_of_thought>", ""),
    doubled=lambda t: t[:(at := t.index("<problem>"))] + t[:(end := t.index("<start_of_father_id>", at))].rstrip() + "<end_of_thought> " + t[end:])


def test_parse_damaged(benchmark, row):
    "Every node damaged, or the root; the usual reader reads none of these right."
    texts = [*make_trees(N_TREES // 5)["text"]]
    bad = {name: [damage(t) for t in texts] for name, damage in DAMAGE.items()}
    codes = dict(hints="hint_between_nodes", words="rating_word", unclosed="missing_thought_end", doubled="doubled_header")
    for name, some in bad.items(): assert all(codes[name] in {i.code for i in parse_thoughts(t).issues} for t in some)
    benchmark.pedantic(lambda: read(bad["hints"]), rounds=2, warmup_rounds=1)
    s = in_turn({name: lambda some=some: read(some) for name, some in bad.items()} | dict(regular=lambda: read(texts)), 5)
    slow = {name: sum(map(len, texts)) * s[name] / s["regular"] / sum(map(len, some)) for name, some in bad.items()}
    worst = max(slow, key=slow.get)
    speed = lambda name, some: sum(map(len, some)) / s[name] / 1e6
    row(f"`parse_thoughts`, damaged trees, the slowest of {', '.join(bad)}: {worst}", f"{speed(worst, bad[worst]):.0f} MB/s", f"regular trees: {speed('regular', texts):.0f} MB/s", slow[worst], "at most 15")
    assert slow[worst] <= 15


def test_tree_table(benchmark, row):
    made = make_trees(N_TREES)
    texts = [*made["text"]]
    loop, usual = lambda: [numbers(parse_thoughts(t)) for t in made["text"]], lambda: [usual_numbers(t) for t in made["text"]]
    table = lambda: tree_table(made, progress=False)
    assert counted(table()) == loop() == usual()
    benchmark.pedantic(table, rounds=2, warmup_rounds=1)
    s, what = in_turn(dict(ours=table, loop=loop, usual=usual), 4), f"`tree_table`, {N_TREES:,} trees, {sum(map(len, texts)) / 1e6:.0f} MB"
    for name, beside in (("loop", "a loop over the nodes of parsed trees"), ("usual", "the loop over split texts")):
        row(what, f"{s['ours'] * 1000:.0f} ms", f"{beside}: {s[name] * 1000:.0f} ms", s[name] / s["ours"], "at least 3")
    assert s["loop"] >= 3 * s["ours"]
    assert s["usual"] >= 3 * s["ours"]


def fresh(tree):
    "The tree without what it has kept from earlier questions."
    tree._cache.clear()
    tree._made.clear()
    return tree


STEPS = dict(to_text=lambda t: t.to_text(), best_path=lambda t: t.best_path(), subtree=lambda t: t.subtree(t.nodes[0]), depth=lambda t: t.depth)


@pytest.mark.parametrize("shape, n", [("bushy", 100_000), ("deep", 50_001)])
def test_linear(benchmark, row, shape, n):
    "Time per node, beside a tree of 10,000 nodes of the same shape; the deep one is a chain. The limit is half of what a square would be: memory has its part too."
    texts = dict(large=tree_text(shape, n), small=tree_text(shape, 10_000))
    trees = {name: parse_thoughts(t) for name, t in texts.items()}
    assert {name: len(t) for name, t in trees.items()} == dict(large=n, small=10_000) and all(not t.issues for t in trees.values())
    if shape == "deep": assert trees["large"].depth == n - 1 and len(trees["large"].best_path()) == n
    benchmark.pedantic(lambda: parse_thoughts(texts["large"]), rounds=1)
    times = {"parse_thoughts": in_turn({k: lambda t=t: parse_thoughts(t) for k, t in texts.items()}, 3)}
    times |= {step: in_turn({k: lambda t=t: do(fresh(t)) for k, t in trees.items()}, 3) for step, do in STEPS.items()}
    times["tree_table"] = in_turn({k: lambda t=t: tree_table([t], progress=False) for k, t in texts.items()}, 3)
    limit, each = n // 10_000 / 2, {step: (s["large"] / n * 1e6, s["small"] / 10_000 * 1e6) for step, s in times.items()}
    worst = max(each, key=lambda k: each[k][0] / each[k][1])
    what = f"{'a chain' if shape == 'deep' else 'a tree'} of {n:,} nodes, the worst of {', '.join(each)}: `{worst}`"
    row(what, f"{each[worst][0]:.2f} µs a node", f"10,000 nodes: {each[worst][1]:.2f} µs a node", each[worst][0] / each[worst][1], f"at most {limit:g}")
    for step, (large, small) in each.items(): assert large <= limit * small, step


def tree_text(shape, n):
    "A chain, or a generated tree."
    if shape == "bushy": return make_trees(1, nodes=n, shape="bushy")["text"][0]
    header = "<start_of_father_id>{}<end_of_father_id><start_of_local_id>{}<end_of_local_id><start_of_thought>"
    steps = (header.format(i, i + 1) + f" {i}+1={i + 1} <end_of_thought><start_of_rating><positive_rating><end_of_rating>" for i in range(n - 1))
    return " ".join([header.format(-1, 0) + "<problem>Count up from 0.<end_of_thought>", *steps])


@pytest.mark.parametrize("shape, n", [("bushy", 10_000), ("deep", 500)])
def test_path_strings(benchmark, row, shape, n):
    "Time per character of the paths of all nodes, of n and 4n nodes; on a chain the output grows with the square."
    trees = dict(large=parse_thoughts(tree_text(shape, 4 * n)), small=parse_thoughts(tree_text(shape, n)))
    write = lambda tree: sum(map(len, path_strings(fresh(tree))))
    sizes = {name: write(t) for name, t in trees.items()}
    benchmark.pedantic(lambda: write(trees["large"]), rounds=1)
    s = in_turn({name: lambda t=t: write(t) for name, t in trees.items()}, 3)
    large, small = (s[name] / sizes[name] * 1e9 for name in ("large", "small"))
    what = f"`path_strings` of {'a chain' if shape == 'deep' else 'a tree'} of {4 * n:,} nodes, {sizes['large'] / 1e6:.0f} MB"
    row(what, f"{large:.2f} ns a character", f"{n:,} nodes, {sizes['small'] / 1e6:.0f} MB: {small:.2f} ns a character", large / small, "at most 1.5")
    assert large <= 1.5 * small
