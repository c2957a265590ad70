"""Block attention as one vector, and KV accounting, against an engine that is played token by token."""

import dataclasses
import itertools
import random
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracle_attention import play
from tracebook.attention import kv_occupancy, visible_until
from tracebook.memento import TokenBlock, parse_memento_ids
from tracebook.trace import PHI4, POLICIES, QWEN3, VANILLA, ContextPolicy

IDS = {"block_start": ord("("), "block_end": ord(")"), "summary_start": ord("["), "summary_end": ord("]")}

KEEP_LAST = (0, 1, 2, 3, 7, -1)  # in the order in which more and more stays visible
FOR_ANSWER = {"keep_last_block_for_answer": True}
SETTINGS = [
    ({**policy, "mask_delimiters": masked}, sees)
    for policy in (*({"keep_last_n_blocks": n} for n in (-1, 0, 1, 2, 3)), FOR_ANSWER, {"restart": True})
    for masked in (False, True)
    for sees in (True, False)
]
N_RANDOM = 10_000

check = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


# ---------------------------------------------------------------------------------------------------- helpers


def name(setting):
    policy, sees = setting
    return "-".join(f"{key}={value}" for key, value in policy.items()) + ("-sees" if sees else "-blind")


each_setting = pytest.mark.parametrize("index", range(len(SETTINGS)), ids=[name(setting) for setting in SETTINGS])


def blocks_of(text, prompt_length=0):
    return parse_memento_ids([ord(c) for c in text], IDS, prompt_length)


def vector(text, policy, sees=True, prompt_length=0):
    return visible_until(blocks_of(text, prompt_length), len(text), ContextPolicy(**policy), summary_end_sees_block=sees)


def dense(vu):
    "allowed(q, k) = k <= q and q < visible_until[k]"
    at = torch.arange(len(vu))
    return (at[None, :] <= at[:, None]) & (at[:, None] < vu[None, :])


def until(n, gone):
    "The vector of length n in which the keys of `gone` ({first query that misses them: keys}) are gone."
    answer = [n] * n
    for query, keys in gone.items():
        for key in keys:
            answer[key] = query
    return answer


def check_curve(curve, replay):
    assert curve.occupancy.tolist() == replay.occupancy
    assert curve.occupancy.dtype == curve.evictions.dtype == torch.long
    assert (curve.peak, curve.auc) == (replay.peak, replay.auc)
    assert curve.mean is None if replay.mean is None else curve.mean == pytest.approx(replay.mean)
    assert curve.evictions.shape == (len(replay.evictions), 2)
    assert [tuple(row) for row in curve.evictions.tolist()] == replay.evictions


def check_text(text, policy, sees, prompt_length=0):
    "Vector, policy and dense matrix agree with the engine."
    blocks = blocks_of(text, prompt_length)
    replay = play(text, summary_end_sees_block=sees, prompt_length=prompt_length, **policy)
    context = f"{text!r} {policy} sees={sees} prompt_length={prompt_length}"
    assert [tuple(block) for block in blocks] == replay.spans, context
    rules = ContextPolicy(**policy)
    vu = visible_until(blocks, len(text), rules, summary_end_sees_block=sees)
    assert vu.tolist() == replay.visible_until, context
    fates = rules.evictions(blocks)
    if policy.get("restart"):
        assert [at is None for at in fates] == [at is None for at in replay.triggers], context
    else:
        assert list(fates) == replay.triggers, context
    return vu, replay


# ---------------------------------------------------------------------------------------------------- random texts


def soup(rng, longest):
    return "".join(rng.choice("()[]()[]a") for _ in range(rng.randint(0, longest)))


def shaped(rng, depth=2):
    "Blocks with their summaries, some of them nested, late or missing."
    text = ""
    for _ in range(rng.randint(1, 3)):
        inside = shaped(rng, depth - 1) if depth and rng.random() < 0.25 else ""
        text += "(" + "a" * rng.randint(0, 2) + inside + "b" * rng.randint(0, 1) + ")"
        if rng.random() < 0.75:
            inside = shaped(rng, depth - 1) if depth and rng.random() < 0.08 else ""
            text += "[" + "s" * rng.randint(0, 2) + inside + "]"
        text += "x" * rng.randint(0, 1)
    return text + "[t]" * rng.choice((0, 0, 0, 1, 2))


def damaged(rng, text):
    "The text with a token lost, doubled, swapped or put in."
    tokens = list(text)
    i, j = rng.randrange(len(tokens)), rng.randrange(len(tokens))
    damage = rng.randrange(4)
    if damage == 0:
        del tokens[i]
    elif damage == 1:
        tokens.insert(i, tokens[i])
    elif damage == 2:
        tokens[i], tokens[j] = tokens[j], tokens[i]
    else:
        tokens.insert(i, rng.choice("()[]"))
    return "".join(tokens)


def conversation(rng):
    "(text, prompt_length): what the model wrote, in some cases after turns that quote markers."
    text = soup(rng, 22) if rng.random() < 0.3 else shaped(rng)
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        text = damaged(rng, text) if text else text
    prompt = "".join(soup(rng, 6) + "q" for _ in range(rng.choice((0, 0, 0, 1, 2))))
    text = (prompt + text + "A" * rng.randint(0, 2))[:40]
    return text, min(len(prompt), len(text))


@cache
def conversations():
    rng = random.Random(20250730)
    return [conversation(rng) for _ in range(N_RANDOM)]


texts = st.one_of(st.lists(st.sampled_from("()[]()[]aaA"), max_size=30).map("".join), st.randoms(use_true_random=False).map(lambda rng: conversation(rng)[0]))
any_setting = st.sampled_from(SETTINGS)


@st.composite
def prompted(draw):
    text = draw(texts)
    return text, draw(st.one_of(st.just(0), st.integers(0, len(text))))


@st.composite
def vectors(draw):
    "Any vector with j < visible_until[j] <= n, blocks or not, and a prompt_length."
    n = draw(st.integers(0, 24))
    vu = [draw(st.integers(j + 1, n)) for j in range(n)]
    return torch.tensor(vu, dtype=torch.long), draw(st.integers(0, n))


# ---------------------------------------------------------------------------------------------------- (a) the table of traces

# trace, {position of the marker that evicts: key positions that go}: with the delimiters kept, with the delimiters masked
TABLE = [
    ("(aa)[s](bb)[s]", {6: [1, 2], 13: [8, 9]}, {6: [0, 1, 2, 3], 13: [7, 8, 9, 10]}),
    ("(a(bb)c)[s][t]", {10: [3, 4], 13: [1, 2, 5, 6]}, {10: [2, 3, 4, 5], 13: [0, 1, 6, 7]}),
    ("(a(bb)[s]c)[t]", {8: [3, 4], 13: [1, 2, 5, 6, 7, 8, 9]}, {8: [2, 3, 4, 5], 13: [0, 1, 6, 7, 8, 9, 10]}),
    ("(aa(bb)[s]", {9: [4, 5]}, {9: [3, 4, 5, 6]}),
    ("(aa)(bb)[s][t]", {10: [5, 6], 13: [1, 2]}, {10: [4, 5, 6, 7], 13: [0, 1, 2, 3]}),
    ("(aa)b)[s]", {8: [1, 2]}, {8: [0, 1, 2, 3]}),
    ("(aa)[s]x[t]", {6: [1, 2]}, {6: [0, 1, 2, 3]}),
    ("(aa[s])[t]", {9: [1, 2, 3, 4, 5]}, {9: [0, 1, 2, 3, 4, 5, 6]}),
    ("[s](aa)", {}, {}),
    ("(aa)[s](bb)", {6: [1, 2]}, {6: [0, 1, 2, 3]}),
    ("(aa)[s(bb)[t]u]", {12: [7, 8]}, {12: [6, 7, 8, 9]}),
    ("()[s]", {}, {4: [0, 1]}),
]


@pytest.mark.parametrize("tail", ["", "A", "AAA"])
@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("text, kept, masked", TABLE)
def test_table(text, kept, masked, sees, tail):
    "Every line of the table of the reference, by hand: the key goes after the marker that evicts it, or with it."
    n = len(text + tail)
    for mask_delimiters, expected in ((False, kept), (True, masked)):
        expected = until(n, {at + sees: keys for at, keys in expected.items()})
        policy = {"mask_delimiters": mask_delimiters}
        assert vector(text + tail, policy, sees).tolist() == expected
        assert play(text + tail, summary_end_sees_block=sees, **policy).visible_until == expected


LATER = [  # trace, policy, {position of the marker that evicts: key positions}
    ("(aa)[s](bb)[s]", {"keep_last_n_blocks": 1}, {13: [1, 2]}),
    ("(aa)[s](bb)[s]", {"keep_last_n_blocks": 1, "mask_delimiters": True}, {13: [0, 1, 2, 3]}),
    ("(aa)[s](bb)[s]", {"keep_last_n_blocks": 2}, {}),
    ("(aa)[s](bb)[s]", {"keep_last_n_blocks": -1}, {}),
    ("(aa)[s](bb)[s]", {"keep_last_n_blocks": -1, "mask_delimiters": True}, {}),
    ("(a)[s](b)[s](c)[s]", {"keep_last_n_blocks": 1}, {11: [1], 17: [7]}),
    ("(a)[s](b)[s](c)[s]", {"keep_last_n_blocks": 2}, {17: [1]}),
    ("(a(bb)c)[s][t]", {"keep_last_n_blocks": 1}, {13: [3, 4]}),  # the inner block is older: it was completed first
    ("(a(bb)[s]c)[t]", {"keep_last_n_blocks": 1}, {13: [3, 4]}),
    ("(aa)(bb)[s][t]", {"keep_last_n_blocks": 1}, {13: [5, 6]}),  # so is the second block here
    ("(a(bb)[s]c)[t](d)[u]", {"keep_last_n_blocks": 1}, {13: [3, 4], 19: [1, 2, 5, 6, 7, 8, 9]}),
    ("(aa)[s(bb)[t]u]", {"keep_last_n_blocks": 1}, {}),  # block 0 is never completed and does not count
    ("(aa)[s](bb)[s]", FOR_ANSWER, {7: [1, 2]}),
    ("(aa)[s](bb)[s]", {**FOR_ANSWER, "mask_delimiters": True}, {7: [0, 1, 2, 3]}),
    ("(aa)[s]xx(bb", FOR_ANSWER, {9: [1, 2]}),  # what lies between the summary and the next block still sees the last one
    ("(aa)[s]xx", FOR_ANSWER, {}),
    ("(aa)(bb)[s][t]", FOR_ANSWER, {}),  # unlike N = 1: no block was opened later
    ("(aa)(bb)[s][t]x(", FOR_ANSWER, {15: [1, 2, 5, 6]}),
    ("(a(bb)[s]c(dd)e)[t]", FOR_ANSWER, {10: [3, 4]}),  # `t` belongs to d, which stays; the outer block has no summary
    ("(aa)[s(bb)[t]u]", FOR_ANSWER, {}),
    ("(aa)[s](bb(cc)[s]", FOR_ANSWER, {7: [1, 2]}),
]


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("text, policy, evicted", LATER)
def test_later_evictions(text, policy, evicted, sees):
    for tail in ("", "AA"):
        expected = until(len(text + tail), {at + sees: keys for at, keys in evicted.items()})
        assert vector(text + tail, policy, sees).tolist() == expected
        assert play(text + tail, summary_end_sees_block=sees, **policy).visible_until == expected


RESTART = [  # trace, {summary_start: the block with its delimiters}
    ("(aa)[s](bb)[s]", {4: [0, 1, 2, 3], 11: [7, 8, 9, 10]}),
    ("(a(bb)c)[s][t]", {8: [2, 3, 4, 5], 11: [0, 1, 6, 7]}),
    ("(a(bb)[s]c)[t]", {6: [2, 3, 4, 5], 11: [0, 1, 6, 7, 8, 9, 10]}),
    ("(aa(bb)[s]", {7: [3, 4, 5, 6]}),
    ("(aa)(bb)[s][t]", {8: [4, 5, 6, 7], 11: [0, 1, 2, 3]}),
    ("(aa)[s(bb)[t]u]", {10: [6, 7, 8, 9]}),
    ("(aa)x[s]", {5: [0, 1, 2, 3]}),
    ("(aa)[s", {}),
    ("()[s]", {2: [0, 1]}),
]


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("mask_delimiters", [True, False])
@pytest.mark.parametrize("text, gone", RESTART)
def test_restart(text, gone, mask_delimiters, sees):
    "The summary is read as if it had been written without its block; the delimiters always go."
    policy = {"restart": True, "mask_delimiters": mask_delimiters}
    expected = until(len(text + "A"), gone)
    assert vector(text + "A", policy, sees).tolist() == expected
    assert play(text + "A", summary_end_sees_block=sees, **policy).visible_until == expected


@pytest.mark.parametrize(
    "text, prompt_length, evicted",
    [
        ("(q)[q](aa)[s]A", 6, {12: [7, 8]}),  # quoted markers are no blocks
        ("(q(aa)[s]A", 2, {8: [3, 4]}),
        ("(qaa)[s]A", 2, {}),  # the block was opened by the prompt, so it is not open
        ("(q)(aa)[s][t]A", 3, {9: [4, 5]}),  # and `t` finds no block
        ("[q(aa)]x[s]A", 2, {10: [3, 4]}),
        ("(aa)[s]A", 8, {}),
    ],
)
def test_quoted_markers(text, prompt_length, evicted):
    "Markers of the prompt are text; what the model wrote is played from a clean state."
    expected = until(len(text), {at + 1: keys for at, keys in evicted.items()})
    assert vector(text, {}, prompt_length=prompt_length).tolist() == expected
    assert play(text, prompt_length=prompt_length).visible_until == expected


# ---------------------------------------------------------------------------------------------------- (b) the fixture

FIXTURE = "p" * 6 + ("(" + "a" * 9 + ")[" + "s" * 4 + "]") * 3 + "A" * 5
FIGURES = [  # policy, (peak, AUC) where the trigger sees the block, (peak, AUC) where it does not
    ({"keep_last_n_blocks": -1}, (62, 1953), (62, 1953)),
    ({"keep_last_n_blocks": 0}, (39, 1359), (38, 1332)),
    ({"keep_last_n_blocks": 0, "mask_delimiters": True}, (35, 1227), (34, 1194)),
    ({"keep_last_n_blocks": 1}, (48, 1710), (47, 1692)),
    ({"keep_last_n_blocks": 1, "mask_delimiters": True}, (46, 1656), (45, 1634)),
    ({"keep_last_n_blocks": 2}, (57, 1908), (56, 1899)),
    (FOR_ANSWER, (44, 1422), (44, 1404)),
]


@pytest.mark.parametrize("policy, seeing, blind", FIGURES)
def test_fixture(policy, seeing, blind):
    "The measured figures of the reference, of the engine as of the code."
    assert len(FIXTURE) == 62
    for sees, expected in ((True, seeing), (False, blind)):
        curve = kv_occupancy(vector(FIXTURE, policy, sees))
        replay = play(FIXTURE, summary_end_sees_block=sees, **policy)
        assert (curve.peak, curve.auc) == (replay.peak, replay.auc) == expected
        assert curve.mean == pytest.approx(expected[1] / 62)
        assert int(dense(vector(FIXTURE, policy, sees)).sum()) == expected[1]


def test_fixture_after_a_prompt():
    "The prompt is in the occupancy, but its own tokens are not in the AUC; by hand."
    prefill = 1 + 2 + 3 + 4 + 5 + 6
    for policy, auc in (({"keep_last_n_blocks": -1}, 1953), ({}, 1359), ({"mask_delimiters": True}, 1227)):
        curve = kv_occupancy(vector(FIXTURE, policy, prompt_length=6), 6)
        assert curve.auc == auc - prefill
        assert curve.mean == pytest.approx((auc - prefill) / 56)
    assert kv_occupancy(vector(FIXTURE, {}), 6).evictions.tolist() == [[23, 9], [40, 9], [57, 9]]
    assert kv_occupancy(vector(FIXTURE, {}, sees=False), 6).evictions.tolist() == [[22, 9], [39, 9], [56, 9]]
    assert kv_occupancy(vector(FIXTURE, {"mask_delimiters": True}), 6).evictions.tolist() == [[23, 11], [40, 11], [57, 11]]


def test_curve_by_hand():
    "Peak counts from the end of the prefill on, AUC from the first generated token on."
    vu = torch.tensor([4, 4, 4, 4, 6, 6])
    assert kv_occupancy(vu).occupancy.tolist() == [1, 2, 3, 4, 1, 2]
    for prompt_length, peak, auc, mean in ((0, 4, 13, 13 / 6), (1, 4, 12, 12 / 5), (4, 4, 3, 1.5), (5, 2, 2, 2.0), (6, 2, 0, None)):
        curve = kv_occupancy(vu, prompt_length)
        assert (curve.peak, curve.auc) == (peak, auc)
        assert curve.mean == (mean if mean is None else pytest.approx(mean))
        assert curve.evictions.tolist() == [[4, 4]]
    assert kv_occupancy(torch.tensor([3, 3, 3])).evictions.tolist() == []  # gone only after the end


def test_empty_sequence():
    vu = visible_until([], 0, ContextPolicy())
    assert vu.tolist() == [] and vu.dtype == torch.long
    curve = kv_occupancy(vu)
    assert (curve.occupancy.tolist(), curve.peak, curve.auc, curve.mean) == ([], 0, 0, None)
    assert curve.evictions.shape == (0, 2)
    assert curve.windowed(4).peak == 0


# ---------------------------------------------------------------------------------------------------- (c) the engine


def test_every_short_sequence():
    "Every sequence of up to five markers, with a token after each of them, under every setting."
    for length in range(6):
        for word in itertools.product("()[]", repeat=length):
            text = "".join(marker + "a" for marker in word)
            blocks = blocks_of(text)
            for policy, sees in SETTINGS:
                vu = visible_until(blocks, len(text), ContextPolicy(**policy), summary_end_sees_block=sees)
                assert vu.tolist() == play(text, summary_end_sees_block=sees, **policy).visible_until, (text, policy, sees)


def test_every_sequence_of_six_markers():
    "Bare markers, so that empty blocks and summaries are among them; each sequence under one setting."
    for i, word in enumerate(itertools.product("()[]", repeat=6)):
        check_text("".join(word), *SETTINGS[(i + i // 28) % len(SETTINGS)])


def check_random(index, per_text):
    "The random texts under one setting; `per_text`: so many of the settings meet each text."
    policy, sees = SETTINGS[index]
    for number, (text, prompt_length) in enumerate(conversations()):
        if (index - number) % len(SETTINGS) < per_text:
            vu, replay = check_text(text, policy, sees, prompt_length)
            if number % 5 == 0:
                check_curve(kv_occupancy(vu, prompt_length), replay)


@each_setting
def test_random_sequences(index):
    "Random sequences under each setting: nested, unclosed, stray, after turns that quote markers."
    check_random(index, 4)


@pytest.mark.slow
@each_setting
def test_random_sequences_in_full(index):
    "The same with all 10,000 sequences under each setting."
    check_random(index, len(SETTINGS))


def test_random_sequences_are_worth_it():
    "What the random sequences have in them, so that a change of the generator cannot empty the test."
    evicting = nested = unclosed = abandoned = prompts = late = 0
    for text, prompt_length in conversations():
        replay = play(text, prompt_length=prompt_length)
        done = [block for block in replay.blocks if block["]"] is not None]
        evicting += len(done) > 0
        nested += any(one["("] < other["("] and other[")"] < one[")"] for one in done for other in done)
        unclosed += any(block[")"] is None for block in replay.blocks)
        abandoned += any(block["["] is not None and block["]"] is None for block in replay.blocks)
        late += len(done) > 3
        prompts += any(c in text[:prompt_length] for c in "()[]")
    assert len(conversations()) == N_RANDOM
    assert evicting > 6_000 and min(nested, unclosed, abandoned, prompts, late) > 500


@check
@given(case=prompted(), setting=any_setting)
def test_dense_matrix_and_curve(case, setting):
    "Dense matrix, its row sums, the curve and the replay are one story."
    text, prompt_length = case
    vu, replay = check_text(text, *setting, prompt_length)
    mask = dense(vu)
    assert mask.tolist() == replay.matrix
    curve = kv_occupancy(vu, prompt_length)
    assert curve.occupancy.tolist() == mask.sum(1).tolist()
    check_curve(curve, replay)


# ---------------------------------------------------------------------------------------------------- (d) properties


@check
@given(case=prompted(), setting=any_setting)
def test_every_query_sees_itself(case, setting):
    text, prompt_length = case
    policy, sees = setting
    vu = vector(text, policy, sees, prompt_length)
    assert vu.dtype == torch.long and vu.shape == (len(text),)
    assert bool((vu > torch.arange(len(text))).all()) and bool((vu <= len(text)).all())
    assert bool((vu[:prompt_length] == len(text)).all())  # no token of the prompt lies in a block of the model


@check
@given(case=prompted(), masked=st.booleans(), sees=st.booleans())
def test_more_blocks_cost_more(case, masked, sees):
    "Peak and AUC never fall as more blocks stay."
    text, prompt_length = case
    vus = [vector(text, {"keep_last_n_blocks": n, "mask_delimiters": masked}, sees, prompt_length) for n in KEEP_LAST]
    curves = [kv_occupancy(vu, prompt_length) for vu in vus]
    for (fewer, few), (more, many) in itertools.pairwise(zip(vus, curves)):
        assert bool((fewer <= more).all())
        assert few.peak <= many.peak and few.auc <= many.auc
    for_answer = vector(text, {**FOR_ANSWER, "mask_delimiters": masked}, sees, prompt_length)
    assert bool((vus[0] <= for_answer).all())


@check
@given(case=prompted(), policy=st.sampled_from([policy for policy, _ in SETTINGS]), sees=st.booleans())
def test_masked_delimiters_cost_less(case, policy, sees):
    text, prompt_length = case
    masked, kept = (vector(text, {**policy, "mask_delimiters": value}, sees, prompt_length) for value in (True, False))
    assert bool((masked <= kept).all())
    if policy.get("restart"):
        assert torch.equal(masked, kept)
    is_delimiter = torch.tensor([c in "()" for c in text], dtype=torch.bool)
    assert torch.equal(masked[~is_delimiter], kept[~is_delimiter])


@check
@given(case=prompted(), policy=st.sampled_from([policy for policy, _ in SETTINGS]))
def test_trigger_sees_one_query_more(case, policy):
    "`summary_end_sees_block` moves every eviction by one query and nothing else; restart does not depend on it."
    text, prompt_length = case
    seeing, blind = (vector(text, policy, sees, prompt_length) for sees in (True, False))
    moved = 0 if policy.get("restart") else (blind < len(text)).long()
    assert torch.equal(seeing, blind + moved)


@check
@given(case=prompted(), masked=st.booleans(), sees=st.booleans())
def test_vanilla_is_causal(case, masked, sees):
    text, prompt_length = case
    vu = vector(text, {"keep_last_n_blocks": -1, "mask_delimiters": masked}, sees, prompt_length)
    assert vu.tolist() == [len(text)] * len(text)
    assert torch.equal(dense(vu), torch.ones(len(text), len(text), dtype=torch.bool).tril())
    assert kv_occupancy(vu).occupancy.tolist() == list(range(1, len(text) + 1))


@check
@given(case=prompted(), sees=st.booleans())
def test_restart_sees_least(case, sees):
    text, prompt_length = case
    again = vector(text, {"restart": True}, sees, prompt_length)
    assert bool((again <= vector(text, {"mask_delimiters": True}, sees, prompt_length)).all())


@check
@given(case=prompted(), setting=any_setting, rng=st.randoms(use_true_random=False))
def test_order_of_the_spans_does_not_matter(case, setting, rng):
    text, prompt_length = case
    policy, sees = setting
    blocks = blocks_of(text, prompt_length)
    mixed = rng.sample(blocks, len(blocks))
    rules = ContextPolicy(**policy)
    one, other = (visible_until(spans, len(text), rules, summary_end_sees_block=sees) for spans in (blocks, mixed))
    assert torch.equal(one, other)
    fates = dict(zip(blocks, rules.evictions(blocks)))
    assert list(rules.evictions([tuple(block) for block in mixed])) == [fates[block] for block in mixed]


@check
@given(case=prompted(), policy=st.sampled_from([policy for policy, _ in SETTINGS]), cap=st.integers(1, 5))
def test_a_cap_of_generation_does_not_change_attention(case, policy, cap):
    text, prompt_length = case
    assert torch.equal(vector(text, policy, True, prompt_length), vector(text, {**policy, "max_block_tokens": cap}, True, prompt_length))


@check
@given(text=texts, setting=any_setting, data=st.data())
def test_cuts_are_slices(text, setting, data):
    "A vector cut on the left or right after it was computed is the slice of the dense matrix."
    n = len(text)
    left = data.draw(st.integers(0, n))
    right = data.draw(st.integers(left, n))
    vu = vector(text, *setting)
    matrix = torch.tensor(play(text, summary_end_sees_block=setting[1], **setting[0]).matrix, dtype=torch.bool).reshape(n, n)
    assert torch.equal(dense(vu[left:] - left), matrix[left:, left:])
    assert torch.equal(dense(vu[:right].clamp(max=right)), matrix[:right, :right])
    both = vu[left:right].clamp(max=right) - left
    assert torch.equal(dense(both), matrix[left:right, left:right])
    assert kv_occupancy(both).occupancy.tolist() == matrix[left:right, left:right].sum(1).tolist()


@check
@given(text=texts, setting=any_setting, cut=st.integers(0, 30))
def test_a_right_cut_may_come_first(text, setting, cut):
    "The engine cannot look ahead, so a text that stops early sees the same; restart can, it writes a summary over."
    policy, sees = setting
    if not policy.get("restart"):
        cut = min(cut, len(text))
        assert torch.equal(vector(text[:cut], policy, sees), vector(text, policy, sees)[:cut].clamp(max=cut))


@check
@given(text=texts, setting=any_setting)
def test_adjacent_pairs_never_fail(text, setting):
    "The other way of pairing gives spans of the same kind."
    policy, sees = setting
    blocks = parse_memento_ids([ord(c) for c in text], IDS, pairing="adjacent")
    vu = visible_until(blocks, len(text), ContextPolicy(**policy), summary_end_sees_block=sees)
    assert bool((vu > torch.arange(len(text))).all()) and bool((vu <= len(text)).all())


# ---------------------------------------------------------------------------------------------------- (e) curves of any vector


@check
@given(case=vectors())
def test_curve_of_any_vector(case):
    vu, prompt_length = case
    n, curve = len(vu), kv_occupancy(*case)
    occupancy = [sum(vu[j] > t for j in range(t + 1)) for t in range(n)]
    assert curve.occupancy.tolist() == occupancy == dense(vu).sum(1).tolist()
    assert curve.peak == max(occupancy[max(prompt_length - 1, 0) :], default=0)
    assert curve.auc == sum(occupancy[prompt_length:])
    assert curve.mean == (pytest.approx(sum(occupancy[prompt_length:]) / (n - prompt_length)) if n > prompt_length else None)
    steps = sorted({t for t in vu.tolist() if t < n})
    assert curve.evictions.tolist() == [[t, vu.tolist().count(t)] for t in steps]
    assert isinstance(curve.peak, int) and isinstance(curve.auc, int)


@check
@given(case=vectors())
def test_evictions_explain_the_occupancy(case):
    "One token comes in at every step; what is missing has been evicted."
    curve = kv_occupancy(*case)
    gone = dict(curve.evictions.tolist())
    occupied = 0
    for t, now in enumerate(curve.occupancy.tolist()):
        occupied += 1 - gone.get(t, 0)
        assert now == occupied


@check
@given(case=vectors(), window=st.integers(1, 30))
def test_windowed_curve_of_any_vector(case, window):
    vu, prompt_length = case
    n, full = len(vu), kv_occupancy(*case)
    curve = full.windowed(window)
    occupancy = [sum(t - window < j <= t and int(vu[j]) > t for j in range(n)) for t in range(n)]
    assert curve.occupancy.tolist() == occupancy
    assert curve.peak == max(occupancy[max(prompt_length - 1, 0) :], default=0)
    assert curve.auc == sum(occupancy[prompt_length:])
    assert all(0 < now <= min(t + 1, window) for t, now in enumerate(occupancy))
    if window >= n:
        assert torch.equal(curve.occupancy, full.occupancy)
    assert torch.equal(full.occupancy, kv_occupancy(*case).occupancy)  # the full curve is as it was


@check
@given(case=prompted(), setting=any_setting)
def test_windowed_engine(case, setting):
    text, prompt_length = case
    vu, replay = check_text(text, *setting, prompt_length)
    for window in (1, 2, 3, 5, 8, 40):
        assert kv_occupancy(vu, prompt_length).windowed(window).occupancy.tolist() == replay.windowed(window)


# ---------------------------------------------------------------------------------------------------- (f) policies and errors


def test_presets():
    assert VANILLA == ContextPolicy(-1)
    assert QWEN3 == ContextPolicy(0, mask_delimiters=False) == ContextPolicy()
    assert PHI4 == ContextPolicy(0, mask_delimiters=True)
    assert POLICIES == {"vanilla": VANILLA, "qwen3": QWEN3, "phi4": PHI4}
    assert len(set(POLICIES.values())) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        VANILLA.keep_last_n_blocks = 0


def test_policies_describe_themselves():
    lines = [ContextPolicy(**policy).describe() for policy, _ in SETTINGS]
    for line in (*lines, ContextPolicy(max_block_tokens=7000).describe()):
        assert line.strip() and "\n" not in line


def test_policy_evictions_by_hand():
    "One answer a block, in the order in which the blocks were given; plain tuples do."
    blocks = [(0, 3, 11, 13), (4, 7, 8, 10), (14, 16, None, None), (17, None, None, None), (18, 20, 21, None)]
    assert ContextPolicy(0).evictions(blocks) == [13, 10, None, None, None]
    assert ContextPolicy(1).evictions(blocks) == [None, 13, None, None, None]
    assert ContextPolicy(2).evictions(blocks) == ContextPolicy(-1).evictions(blocks) == [None] * 5
    assert ContextPolicy(**FOR_ANSWER).evictions(blocks) == [14, 14, None, None, None]
    assert ContextPolicy(0).evictions([]) == []


@pytest.mark.parametrize(
    "policy, match",
    [
        ({"keep_last_n_blocks": -2}, "keep_last_n_blocks"),
        ({"keep_last_n_blocks": 1, **FOR_ANSWER}, "keep_last_block_for_answer"),
        ({"keep_last_n_blocks": -1, **FOR_ANSWER}, "keep_last_block_for_answer"),
        ({"keep_last_n_blocks": 1, "restart": True}, "restart"),
        ({"keep_last_n_blocks": -1, "restart": True}, "restart"),
        ({"restart": True, **FOR_ANSWER}, "restart"),
        ({"max_block_tokens": 0}, "max_block_tokens"),
        ({"max_block_tokens": -5}, "max_block_tokens"),
    ],
)
def test_policies_that_make_no_sense(policy, match):
    with pytest.raises(ValueError, match=match):
        ContextPolicy(**policy)


@pytest.mark.parametrize("field", ["keep_last_n_blocks", "max_block_tokens"])
@pytest.mark.parametrize("value", [True, False, 1.0, 0.5, "1"])
def test_policies_take_whole_numbers(field, value):
    with pytest.raises(TypeError, match=field):
        ContextPolicy(**{field: value})


@pytest.mark.parametrize("block", [(-1, None, None, None), (4, None, None, None), (-4, 1, 2, 3), (0, 4, None, None), (0, 1, 9, None), (0, 2, 3, 4)])
@pytest.mark.parametrize("policy", [{}, {"keep_last_n_blocks": -1}, {"restart": True}])
def test_positions_outside_the_sequence(block, policy):
    with pytest.raises(ValueError, match=r"(?i)position|outside|token"):
        visible_until([TokenBlock(*block)], 4, ContextPolicy(**policy))


@pytest.mark.parametrize(
    "block",
    [(2, 1, None, None), (1, 1, None, None), (0, 2, 1, None), (0, 2, 2, None), (3, 4, 1, None), (0, 1, 3, 2), (0, 1, 3, 3), (5, 6, 7, 1), (0, 3, 2, 4)],
)
@pytest.mark.parametrize("policy", [{}, {"keep_last_n_blocks": -1}, {"restart": True}])
def test_markers_out_of_order(block, policy):
    with pytest.raises(ValueError, match=r"(?i)order|before|after|ascend|increas"):
        visible_until([TokenBlock(*block)], 8, ContextPolicy(**policy))


@pytest.mark.parametrize("vu", [[0], [1, 1], [3, 3, 2], [2, 2, -1], [5, 5, 5], [1, 3]])
def test_vectors_that_cannot_be(vu):
    "A key sees itself, and nothing lasts longer than the sequence."
    with pytest.raises(ValueError, match=r"(?i)visible_until"):
        kv_occupancy(torch.tensor(vu))


@pytest.mark.parametrize("prompt_length", [-1, 4, 100])
def test_prompts_that_cannot_be(prompt_length):
    with pytest.raises(ValueError, match=r"(?i)prompt_length"):
        kv_occupancy(torch.tensor([3, 3, 3]), prompt_length)


@pytest.mark.parametrize("shape", [(), (1, 3), (3, 1)])
def test_vectors_of_other_shapes(shape):
    with pytest.raises(ValueError, match=r"(?i)dimension|shape|1-?d|vector|one"):
        kv_occupancy(torch.ones(shape, dtype=torch.long))
