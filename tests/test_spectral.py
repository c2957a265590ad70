"""Spectra, presets, moments, sampling and intervals, against closed forms, numpy and brute force."""

import copy
import itertools
import json
import math
import os
import pickle
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tracebook import spectral
from tracebook.spectral import *

check = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
few = settings(check, max_examples=25)
pytestmark = pytest.mark.filterwarnings("error")  # nothing is undefined, or warned of, unless a test says so

ROUTES = ("svd", "gram", "qr")
CLOSED = {  # of l_i = i^-a, d = 4096: effective_rank, rankme, participation ratio, stable rank (reference, section 12)
    0.5: (3138.5443, 3919.6209, 1800.3454, 126.5475),
    1: (431.1169, 3138.5443, 48.1081, 8.8951),
    2: (5.1288, 431.1169, 2.4993, 1.6447),
}


# ---------------------------------------------------------------------------------------------------- helpers


def rows_with(eigenvalues, n, mean=0.0, seed=0):
    "n rows whose covariance has these eigenvalues: left vectors orthogonal to the ones, any rotation, any mean."
    rng, d = np.random.default_rng(seed), len(eigenvalues)
    left = np.linalg.qr(np.concatenate([np.ones((n, 1)), rng.normal(size=(n, d))], axis=1))[0][:, 1:]
    right = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (left * np.sqrt(np.asarray(eigenvalues) * (n - 1))) @ right.T + mean * rng.normal(size=d)


def of_eigenvalues(values, n=10**6, **about):
    return Spectrum(np.sqrt(values), n=n, d=len(values), **about)


def entropy_rank(p):
    "exp of the entropy, term by term in exact order: the oracle of every rank metric."
    return math.exp(-math.fsum(x * math.log(x) for x in p if x > 0))


def oracle(Z):
    "The metrics of rows by numpy and the formulas, each written out."
    C = np.asarray(Z, np.float64) - np.asarray(Z, np.float64).mean(0)
    s = np.linalg.svd(C, compute_uv=False)
    s = s[s > s[0] * max(C.shape) * 2.2e-16]
    l = s**2
    return {
        "rankme": entropy_rank(s / s.sum()),
        "effective_rank": entropy_rank(l / l.sum()),
        "participation_ratio": l.sum() ** 2 / (l**2).sum(),
        "stable_rank": l.sum() / l[0],
        "top1_share": l[0] / l.sum(),
    }


def reasons(f, *args, **kwargs):
    "What a call returns, and the reasons that it warned of."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = f(*args, **kwargs)
    assert all(w.category is UndefinedMetric for w in caught)
    return value, [w.message.reason for w in caught]


def close(a, b, rel):
    assert a == pytest.approx(b, rel=rel, abs=0), (a, b)


def clouds(max_rows=40, max_width=12):
    "Random rows of any shape: some of low rank, some with duplicates, some with a large mean."

    def make(seed, n, d, rank, mean, power):
        rng = np.random.default_rng(seed)
        Z = rng.normal(size=(n, min(rank, d))) @ rng.normal(size=(min(rank, d), d)) * np.arange(1, d + 1) ** -power
        return Z + mean * rng.normal(size=d)

    return st.builds(make, st.integers(0, 10**6), st.integers(2, max_rows), st.integers(1, max_width), st.integers(1, 12), st.sampled_from([0.0, 1.0, 300.0]), st.sampled_from([0.0, 0.5, 1.5]))


def has_a_spectrum(Z):
    "Whether the rows differ by more than rounding, so that metrics are defined and no direction is dust."
    s = np.linalg.svd(Z - Z.mean(0), compute_uv=False)
    return s[0] > 1e-6 * np.abs(Z).max() and len(s)


# ---------------------------------------------------------------------------------------------------- the table of section 12


@pytest.mark.parametrize("a", [0.5, 1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_power_law(a, dtype, tolerance):
    i = np.arange(1.0, 201)
    Z = torch.from_numpy(rows_with(i**-a, 1000, mean=0.1)).to(dtype)
    p, q = i**-a / (i**-a).sum(), i ** (-a / 2) / (i ** (-a / 2)).sum()
    wanted = {"effective_rank": entropy_rank(p), "rankme": entropy_rank(q), "participation_ratio": 1 / (p**2).sum(), "stable_rank": 1 / p[0], "top1_share": p[0]}
    for source in (Z, spectrum(Z, method="qr"), Moments().update(Z)):
        row = metrics_row(source)
        close(row["alpha"], a, tolerance)
        for name, value in wanted.items(): close(row[name], value, tolerance)
        assert row["alpha"].conventions.dtype == str(dtype).removeprefix("torch.")
        if dtype == torch.float64: assert row["alpha_r2"] > 1 - 1e-9 and row["alpha_stderr"] < 1e-9


@pytest.mark.parametrize("a", CLOSED)
def test_closed_forms(a):
    s = of_eigenvalues(np.arange(1.0, 4097) ** -a)
    for f, wanted in zip((effective_rank, rankme, participation_ratio, stable_rank), CLOSED[a]): assert abs(f(s) - wanted) < 1e-4


@pytest.mark.parametrize("a", [0.1, 0.5, 1, 1.7, 2, 4])
def test_duality(a):
    i = np.arange(1.0, 4097)
    close(rankme(of_eigenvalues(i**-a)), effective_rank(of_eigenvalues(i ** (-a / 2))), 1e-12)


@pytest.mark.parametrize("r", [1, 2, 7, 30])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_equal_directions(r, mean):
    Z = rows_with([3.0] * r + [0.0] * (30 - r), 200, mean=mean)
    for source in (*(spectrum(Z, method=m) for m in ROUTES), Moments().update(Z), TriangularMoments().update(Z)):
        for f in (stable_rank, participation_ratio, effective_rank, rankme): assert abs(f(source) - r) < 1e-9
        assert metrics_row(source)["rank"] == r


@pytest.mark.parametrize("r, printed", [(1, 1.006622), (1000, 1005.596535), (4096, 4108.295248)])
def test_eps(r, printed):
    p, K = 1 / r + 1e-7, 4096
    wanted = math.exp(-(r * p * math.log(p) + (K - r) * 1e-7 * math.log(1e-7)))
    got = rankme(Spectrum(np.ones(r), n=9000, d=K, centered=False), "garrido")
    close(got, wanted, 1e-12)
    assert abs(got - printed) < 1e-6
    p = 1 / r + 1e-5
    close(rankme(Spectrum(np.ones(r), n=9000, d=K, centered=False), "stable_pretraining"), math.exp(-(r * p * math.log(p) + (K - r) * 1e-5 * math.log(1e-5))), 1e-12)


def test_isotropic():
    s = Moments().update(np.random.default_rng(0).normal(size=(4000, 500))).spectrum()
    close(effective_rank(s), 469.70, 3e-3)
    close(isotropic_null(4000, 500), 469.70, 1e-4)
    close(participation_ratio(s), 500 * 4000 / 4500, 3e-3)


@pytest.mark.parametrize("g, f", [(0.1, 0.987121), (0.125, 0.983776), (0.25, 0.966222), (0.5, 0.926053), (1, 0.805041)])
def test_marchenko_pastur(g, f):
    d = 400
    s = Moments().update(np.random.default_rng(1).normal(size=(int(d / g) + 1, d))).spectrum()
    close(rankme(s), d * f, 3e-3)
    close(isotropic_null(int(d / g) + 1, d, "sigma"), d * f, 2e-6)


CURVED = np.arange(1.0, 4097) ** -0.8 * np.exp(-np.arange(1.0, 4097) / 800) * np.concatenate([[500, 20, 5], np.ones(4093)])


@pytest.mark.parametrize("preset, alpha", [("fastssl", 0.8309), ("reptrix", 0.8461), ("li2025", 0.8477), ("canonical", 0.8477), ("stringer", 0.9293)])
def test_curved(preset, alpha):
    s = of_eigenvalues(CURVED)
    for _ in range(5): assert abs(alpha_req(s, preset).alpha - alpha) < 1e-4


@pytest.mark.parametrize("power", [2.0, 4.0])
def test_routes_agree(power):
    "Condition up to 1e5: singular values 1e-6, metrics 1e-9."
    Z = rows_with(np.geomspace(1, 10.0 ** (-2.5 * power), 120), 900, mean=3.0)
    truth = spectrum(Z)
    assert truth.sigma[0] / truth.sigma[-1] == pytest.approx(10 ** (1.25 * power), rel=1e-6)
    for other in (spectrum(Z, method="gram"), spectrum(Z, method="qr"), Moments().update(Z).spectrum(), TriangularMoments().update(Z).spectrum()):
        np.testing.assert_allclose(other.sigma, truth.sigma, rtol=1e-6)
        for f in (rankme, effective_rank, participation_ratio, stable_rank, lambda s: alpha_req(s).alpha): close(f(other), f(truth), 1e-9)


def test_uncentred_from_moments():
    for mean in (0.0, 5.0, 300.0):
        Z = rows_with(np.arange(1.0, 65) ** -1, 500, mean=mean)
        for state in (Moments().update(Z[:200]).update(Z[200:]), TriangularMoments().update(Z[:200]).update(Z[200:])):
            s, truth = state.spectrum(center=False), np.linalg.svd(Z, compute_uv=False)
            if mean < 300 or state.method == "qr": np.testing.assert_allclose(s.sigma, truth, rtol=1e-10)
            else: assert (np.abs(s.sigma - truth) <= s.error_bound).all()  # the mean takes 1e8 of the squares
            wanted = len(Z) * (Z.mean(0) ** 2).sum() / (Z**2).sum()
            for found in (mean_norm2_share(state), mean_norm2_share(state.spectrum(center=False)), mean_norm2_share(Z)): assert abs(found - wanted) < 1e-10


# ---------------------------------------------------------------------------------------------------- properties


@check
@given(clouds())
def test_chain(Z):
    if not has_a_spectrum(Z): return
    s = spectrum(Z)
    chain = [1.0, stable_rank(s), participation_ratio(s), effective_rank(s), rankme(s), float(s.rank), min(len(Z) - 1, Z.shape[1])]
    assert all(a <= b * (1 + 1e-9) for a, b in zip(chain, chain[1:])), chain
    for name, value in oracle(Z).items(): close(metrics_row(s)[name], value, 1e-6)


@check
@given(clouds(), st.floats(1e-200, 1e200), st.integers(0, 10**6))
def test_rotation_and_scale(Z, c, seed):
    if not has_a_spectrum(Z): return
    Z = Z - Z.mean(0) + 0.1  # the mean moves rounding only; a large one moves 1e-10
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(Z.shape[1],) * 2))[0]
    for other in (Z @ turn, Z * c, Z[::-1]):
        for f in (stable_rank, participation_ratio, effective_rank, rankme, top1_share): close(f(other), f(Z), 1e-10)


@few
@given(clouds(), st.lists(st.integers(0, 40), max_size=6), st.randoms(use_true_random=False))
def test_any_blocks_any_order(Z, cuts, random):
    "Blocks, order and grouping of merges do not matter, to 1e-12."
    if not has_a_spectrum(Z): return
    for kind in (Moments, TriangularMoments):
        whole = kind().update(Z)
        parts = [kind().update(b) for b in np.split(Z, sorted(min(c, len(Z)) for c in cuts))]
        random.shuffle(parts)
        while len(parts) > 1: parts.append(parts.pop(random.randrange(len(parts))).merge(parts.pop(random.randrange(len(parts)))))
        assert parts[0].n == len(Z)
        top = whole.trace + len(Z) * float(whole.mean.square().sum())
        np.testing.assert_allclose(parts[0].mean, whole.mean, rtol=1e-12, atol=1e-13 * np.abs(Z).max())
        a, b = ((s.M2 if kind is Moments else s.to_moments().M2).numpy() for s in (parts[0], whole))
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13 * top)


def test_merges_keep_metrics_to_1e_12(tmp_path):
    Z = rows_with(np.arange(1.0, 101) ** -1, 3000, mean=1.0)
    for kind in (Moments, TriangularMoments):
        wanted = metrics_row(kind().update(Z))
        shards = [kind().update(b) for b in np.array_split(Z, 8)]
        save_moments(tmp_path / "half", {str(i): s for i, s in enumerate(shards[:4])})  # killed here, and resumed
        back = [*load_moments(tmp_path / "half")[0].values(), *shards[4:]]
        for states in (shards, shards[::-1], back, [union(shards[i::3]) for i in range(3)]):
            row = metrics_row(union(states))
            for name in ("rankme", "effective_rank", "participation_ratio", "stable_rank", "alpha", "trace", "mean_norm2_share", "top1_share"): close(row[name], wanted[name], 1e-12)


@few
@given(st.integers(0, 2**63), st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 200)), max_size=300), st.integers(1, 40), st.randoms(use_true_random=False))
def test_bottom_k(seed, offered, k, random):
    "Order, duplicates, shards and a restart do not matter; samples are nested; the oracle sorts all keys."
    everything = sorted({(int(row_keys(seed, name, i)[0]), name, i) for name, i in offered})
    one = BottomK(k, seed)
    for name, i in offered: one.update(name, i)
    random.shuffle(offered)
    shards = [BottomK(k, seed) for _ in range(3)]
    for j, (name, i) in enumerate(offered):
        shards[j % 3].update(name, np.array([i, i]))
        if j == len(offered) // 2: shards[0] = BottomK.from_dict(json.loads(json.dumps(shards[0].to_dict())))
    assert one.rows == everything[:k] == shards[2].merge(shards[0]).merge(shards[1]).rows
    for smaller in range(1, k): assert one.rows[:smaller] == everything[:smaller]
    where = {row[1:]: n for n, row in enumerate(everything[:k])}
    for name in "abcde": assert one.places(name, np.arange(201)).tolist() == [where.get((name, i), -1) for i in range(201)]


def test_bottom_k_of_many():
    sample, rng = BottomK(500, 1), np.random.default_rng(0)
    lengths = rng.integers(1, 3000, 200)
    for i, n in enumerate(lengths): sample.update(f"t{i}", np.arange(n))
    keys = sorted((int(key), f"t{i}", place) for i, n in enumerate(lengths) for place, key in enumerate(row_keys(1, f"t{i}", np.arange(n))))
    assert sample.rows == keys[:500] and len(sample) == 500
    assert sum(int((sample.places(f"t{i}", np.arange(n)) >= 0).sum()) for i, n in enumerate(lengths)) == 500
    share = np.mean([np.flatnonzero(sample.places(f"t{i}", np.arange(n)) >= 0).mean() / n for i, n in enumerate(lengths) if n > 2000 and (sample.places(f"t{i}", np.arange(n)) >= 0).any()])
    assert abs(share - 0.5) < 0.06  # no part of a trace is preferred


def test_ties_by_name_and_place(monkeypatch):
    monkeypatch.setattr(spectral, "row_keys", lambda seed, name, index=0: np.zeros(np.atleast_1d(index).shape, np.uint64))
    sample = BottomK(3)
    for name, i in (("b", 0), ("a", 5), ("a", 2), ("c", 0)): sample.update(name, i)
    assert [row[1:] for row in sample.rows] == [("a", 2), ("a", 5), ("b", 0)]
    assert sample.places("b", [0, 1]).tolist() == [2, -1]


def test_sampler_refuses():
    for k in (0, -1):
        with pytest.raises(ValueError, match="at least 1"): BottomK(k)
    with pytest.raises(ValueError, match="size and seed"): BottomK(3, 0).merge(BottomK(3, 1))
    with pytest.raises(ValueError, match="whole numbers"): BottomK(3).update("a", [0.5])
    for bad in (1.5, "3", True, None, np.float64(3), [3], math.nan):
        for make in (lambda: BottomK(bad), lambda: BottomK(3, bad), lambda: row_keys(bad, "a"), lambda: group_of("a", seed=bad), lambda: group_of("a", bad)):
            with pytest.raises(ValueError, match="no whole number"): make()
    with pytest.raises(ValueError, match="at least 1"): group_of("a", 0)
    assert BottomK(np.int64(3), np.uint8(7)).update("a", range(9)).rows == BottomK(3, 7).update("a", range(9)).rows and type(BottomK(np.int64(3)).k) is int
    assert json.dumps(BottomK(np.int64(3), np.int64(2)).update("a", np.arange(9)).to_dict()) == json.dumps(BottomK(3, 2).update("a", np.arange(9)).to_dict())
    assert np.array_equal(row_keys(-1, "a", [3]), row_keys(2**64 - 1, "a", [3])) and np.array_equal(row_keys(np.int64(-1), "a", [3]), row_keys(-1, "a", [3]))
    for bad, why in (([-1], "count from 0"), ([3, -2], "count from 0"), ([True], "whole numbers"), ([[1, 2]], "whole numbers"), (["1"], "whole numbers"), ([2**64], "whole numbers"), ([None], "whole numbers")):
        for call in (lambda: row_keys(0, "a", bad), lambda: BottomK(3).update("a", bad), lambda: BottomK(3).places("a", bad)):
            with pytest.raises(ValueError, match=why): call()
    places = np.array([0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert len(set(row_keys(0, "a", places).tolist())) == 6 and BottomK(6).update("a", places).places("a", places).min() == 0
    assert len(BottomK(3)) == 0 and BottomK(3).places("a", [1]).tolist() == [-1] and BottomK(3).update("a", np.array([], int)).rows == []
    assert BottomK(3).update(7, 1).rows == BottomK(3).update("7", 1).rows
    assert BottomK(3).update("\ud800\x1b[31m", 1).rows[0][1] == "\ud800\x1b[31m"


def test_splitmix64_is_the_published_one():
    "The first five numbers of the generator for the seed 1234567; its state moves by the golden gamma."
    gamma, seen = 0x9E3779B97F4A7C15, (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    assert splitmix64(np.array([(1234567 + j * gamma) % 2**64 for j in range(5)], dtype=np.uint64)).tolist() == list(seen)
    for x in (0, 1, -1, -(2**63), 2**63 - 1): assert int(splitmix64(x)) == int(splitmix64(np.uint64(x % 2**64)))  # two's complement
    for bad in (0.5, True, "1", 2**64, [-1, 2**63], None, 1j):
        with pytest.raises(ValueError, match="integers up to 64 bits"): splitmix64(bad)
    bits = np.array([bin(int(x)).count("1") for x in row_keys(0, "a", np.arange(4000)) ^ row_keys(1, "a", np.arange(4000))])
    assert abs(bits.mean() - 32) < 0.3


# ---------------------------------------------------------------------------------------------------- presets by hand


def test_small_spectrum_by_hand():
    s = Spectrum([2.0, 1.0, 1.0], n=11, d=3)  # σ shares 1/2 1/4 1/4; λ shares 2/3 1/6 1/6
    close(rankme(s), 2**1.5, 1e-14)
    close(effective_rank(s), 1.5 ** (2 / 3) * 6 ** (1 / 3), 1e-14)
    assert (float(stable_rank(s)), float(participation_ratio(s)), float(top1_share(s))) == pytest.approx((1.5, 2, 2 / 3))
    assert (n90(s), n99(s)) == (3, 3) and s.eigenvalues.tolist() == pytest.approx([0.4, 0.1, 0.1])
    with_eps = [p + 1e-7 for p in (2 / 3, 1 / 6, 1 / 6)]
    for name in ("li2025", "reptrix", "fastssl"): close(rankme(s, name), entropy_rank(with_eps), 1e-14)
    u = Spectrum([2.0, 1.0, 1.0], n=11, d=3, centered=False)
    close(rankme(u, "garrido"), entropy_rank([0.5 + 1e-7, 0.25 + 1e-7, 0.25 + 1e-7]), 1e-14)
    close(rankme(u, "stable_pretraining"), entropy_rank([0.5 + 1e-5, 0.25 + 1e-5, 0.25 + 1e-5]), 1e-14)
    for given_as in (s, u): close(rankme(given_as, "roy_vetterli"), 2**1.5, 1e-14)
    assert u.eigenvalues[0] == pytest.approx(4 / 11)


def test_truncation_to_2048():
    s, p = Spectrum(np.ones(3000), n=5000, d=3000), 1 / 2048 + 1e-7
    for name in ("li2025", "reptrix", "fastssl"):
        close(rankme(s, name), math.exp(-2048 * p * math.log(p)), 1e-12)
        assert rankme(s, name).conventions.k == 2048
    assert abs(rankme(s) - 3000) < 1e-8
    zeros = Spectrum(np.ones(2), n=5000, d=3000)  # the zeros up to 2,048 count with ε
    close(rankme(zeros, "reptrix"), entropy_rank([0.5 + 1e-7] * 2 + [1e-7] * 2046), 1e-12)
    close(rankme(Spectrum(np.ones(2), n=5, d=3000), "reptrix"), entropy_rank([0.5 + 1e-7] * 2 + [1e-7] * 3), 1e-12)


@pytest.mark.parametrize("preset, lo, hi", [("canonical", 12, 100), ("li2025", 12, 100), ("reptrix", 11, 100), ("fastssl", 4, 100), ("stringer", 11, 500)])
def test_ranks_from_to(preset, lo, hi):
    "A spectrum that is i^-1.5 inside the range only: one rank more or less on either side would show."
    i = np.arange(1.0, 601)
    l = i**-1.5
    l[: lo - 1] *= 1e3
    l[hi:] *= 1e-3
    fit = alpha_req(of_eigenvalues(l), preset)
    assert abs(fit.alpha - 1.5) < 1e-10 and (fit.fit_lo, fit.fit_hi, fit.n_fit, fit.fit_truncated) == (lo, hi, hi - lo + 1, False)
    for at in (lo - 1, hi - 1):
        inside = l.copy()
        inside[at] *= 1.001
        assert abs(alpha_req(of_eigenvalues(inside), preset).alpha - 1.5) > 1e-8
    assert fit.conventions.fit == (lo, hi) and fit.conventions.weights == "lambda" and fit.conventions.preset == preset


def test_zero_based_code_means_one_rank_more():
    "`arange(11, 100)` on an array that counts from 0 takes the ranks 12..100."
    assert [r + 1 for r in range(11, 100)] == list(range(PRESETS["li2025"].fit[0], PRESETS["li2025"].fit[1] + 1))
    assert [r + 1 for r in range(10, 100)] == list(range(PRESETS["reptrix"].fit[0], PRESETS["reptrix"].fit[1] + 1))
    assert [r + 1 for r in range(3, 100)] == list(range(PRESETS["fastssl"].fit[0], PRESETS["fastssl"].fit[1] + 1))


def test_weights_are_one_over_rank():
    "Against numpy's weighted fit (which squares its weights), and the errors written out."
    rng = np.random.default_rng(0)
    l = np.sort(np.arange(1.0, 301) ** -1.2 * np.exp(rng.normal(size=300) * 0.1))[::-1]
    r = np.arange(5, 201)
    w, x, y = 1 / r, np.log(r), np.log(l[4:200])
    slope, level = np.polyfit(x, y, 1, w=np.sqrt(w))
    left, total, spread = (w * (y - level - slope * x) ** 2).sum(), (w * (y - np.average(y, weights=w)) ** 2).sum(), (w * (x - np.average(x, weights=w)) ** 2).sum()
    fit = alpha_req(of_eigenvalues(l), fit=(5, 200))
    close(fit.alpha, -slope, 1e-10)
    close(fit.r2, 1 - left / total, 1e-10)
    close(fit.stderr, math.sqrt(left / 194 / spread), 1e-10)
    close(fit.level, level - math.log(l[0]), 1e-9)
    assert float(fit) == float(fit.alpha)


def test_fit_of_few_ranks():
    l = np.arange(1.0, 31) ** -1
    assert (fit := alpha_req(of_eigenvalues(l))).fit_hi == 30 and fit.fit_truncated and fit.n_fit == 19
    assert alpha_req(of_eigenvalues(l[:21])).n_fit == 10
    assert reasons(alpha_req, of_eigenvalues(l[:20])) == (None, ["9 points in ranks 12..100 of a spectrum of rank 20: a fit needs 10"])
    assert reasons(alpha_req, of_eigenvalues(l[:5]))[0] is None
    assert reasons(alpha_req, of_eigenvalues(l), fit=(1, 5))[0] is None
    assert alpha_req(of_eigenvalues(np.ones(50))).r2 is None and alpha_req(of_eigenvalues(np.ones(50))).alpha == 0
    for bad in ((0, 5), (5, 4), (1.5, 20), (-3, 20), (1, math.inf), (-math.inf, 5), 5, (12, math.nan), "ab", "12", (), (1,), (1, 2, 3), (None, 20), (1, None), (1, "20"), (1j, 3), ([1], [20]), object(), (np.ones(2), 9)):
        with pytest.raises(ValueError, match="counted from 1"): alpha_req(of_eigenvalues(l), fit=bad)
        with pytest.raises(ValueError, match="counted from 1"): plot_spectrum(of_eigenvalues(l), fit=bad)
        with pytest.raises(ValueError, match="counted from 1"): Preset("mine", True, "sigma", fit=bad)
    for good in ([2, 20], (2.0, np.int32(20)), np.array([2, 20])): assert alpha_req(of_eigenvalues(l), fit=good).conventions.fit == (2, 20)
    assert alpha_req(of_eigenvalues(np.arange(1.0, 3001) ** -1), "reptrix", fit=(5, 2900)).fit_hi == 2048


def test_presets_refuse():
    Z = rows_with(np.arange(1.0, 21) ** -1, 60, mean=1.0)
    for name in ("garrido", "stable_pretraining"):
        with pytest.raises(ValueError, match="not centred"): rankme(spectrum(Z), name)
        assert rankme(spectrum(Z, center=False), name) == rankme(Z, name)
        with pytest.raises(ValueError, match="has no α"): alpha_req(Z, name)
    for name in ("li2025", "reptrix", "fastssl"):
        with pytest.raises(ValueError, match="are centred"): rankme(spectrum(Z, center=False), name)
    for f in (rankme, alpha_req):
        with pytest.raises(ValueError, match="unknown; choose canonical"): f(Z, "rankme")
    with pytest.raises(ValueError, match="choose sigma, lambda"): Preset("x", True, "eigen")
    assert rankme(spectrum(Z, center=False)).conventions.centered is False  # canonical takes what it is given, and says so
    own = Preset("own", True, "lambda", 1e-3)
    l = spectrum(Z).sigma ** 2
    close(rankme(Z, own), entropy_rank(l / l.sum() + 1e-3), 1e-10)
    close(rankme(Z, "roy_vetterli"), rankme(spectrum(Z, center=False)), 1e-12)


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_changed(dtype):
    "No metric writes to its caller's rows, in any dtype, contiguous or not."
    base = torch.from_numpy(rows_with(np.arange(1.0, 25) ** -0.5, 80, mean=2.0) * 10).to(dtype)
    for Z in (base, base.T.contiguous().T, base[::2, ::2]):
        before = Z.clone()
        for center, method in itertools.product((True, False), ROUTES): spectrum(Z, center, method)
        for p in PRESETS:
            if PRESETS[p].weights: rankme(Z, p)
            if PRESETS[p].fit: reasons(alpha_req, Z, p)
        metrics_row(Z, both=True), anisotropy(Z), prompt_entropy(Z), lidar(Z, np.arange(len(Z)) // 4), explain_conventions(Z)
        Moments().update(Z), TriangularMoments().update(Z), Moments().update(Z.float(), fast=True)
        assert torch.equal(Z, before)
    s = spectrum(base)
    with pytest.raises(ValueError): s.sigma[0] = 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_and_torch_agree(dtype):
    Z = torch.from_numpy(rows_with(np.arange(1.0, 25) ** -0.5, 80, mean=2.0) * 10).to(dtype)
    if dtype != torch.bfloat16:
        for other in (Z.numpy(), Z.numpy().astype(Z.numpy().dtype.newbyteorder(">")), Z.numpy()[:, ::-1][:, ::-1], Z.tolist(), np.broadcast_to(Z.numpy(), Z.shape)):
            np.testing.assert_array_equal(spectrum(other).sigma, spectrum(Z).sigma)
    np.testing.assert_array_equal(spectrum(Z.requires_grad_() if dtype.is_floating_point else Z).sigma, spectrum(Z.detach().double()).sigma)
    assert spectrum(Z).dtype == str(dtype).removeprefix("torch.")


def test_numpy_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    Z = torch.from_numpy(rows_with(np.arange(1.0, 25) ** -0.5, 80)).bfloat16()
    there = Z.float().numpy().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(spectrum(there).sigma, spectrum(Z).sigma)
    assert spectrum(there).dtype == "bfloat16"


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_float8(name):
    "As the same numbers in float64, whose bits numpy reads from a table; the name is kept."
    dtype, mantissa = getattr(torch, name), 3 if "e4m3" in name else 2
    Z = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 8))).to(dtype)
    bits = Z.view(torch.uint8).numpy().astype(int)
    exponent, fraction = (bits & 127) >> mantissa, (bits & ((1 << mantissa) - 1)) / (1 << mantissa)
    bias = (7 if mantissa == 3 else 15) + ("uz" in name)
    full = np.where(bits & 128, -1.0, 1.0) * np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))
    for f in (rankme, effective_rank, anisotropy, prompt_entropy, lambda X: lidar(X, np.arange(40) // 4), lambda X: lidar(X.reshape(10, 4, 8)), lambda X: rankme(Moments().update(X)), lambda X: rankme(TriangularMoments().update(X))):
        close(f(Z), f(full), 1e-12)
        assert f(Z).conventions.dtype == name
    close(rankme(Moments().update(Z, fast=True)), rankme(full), 1e-5)
    assert torch.equal(Z.view(torch.uint8), torch.from_numpy(bits.astype(np.uint8)))
    Z.view(torch.uint8)[3, 3] = 128 if "uz" in name else 127  # NaN
    assert spectrum(Z).reason == "1 of 40 rows hold numbers that are not finite" and reasons(anisotropy, Z)[0] is None and reasons(lidar, Z, np.arange(40) // 4)[0] is None
    with pytest.raises(ValueError, match="1 of 40 rows"): Moments().update(Z)


def test_numpy_float8():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    Z = np.random.default_rng(0).normal(size=(40, 8)).astype(ml_dtypes.float8_e4m3fn)
    assert spectrum(Z).dtype == "float8_e4m3fn" and np.array_equal(spectrum(Z).sigma, spectrum(Z.astype(np.float64)).sigma)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sparse(layout, dtype):
    full = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 8)) * (np.random.default_rng(1).random((40, 8)) < 0.3)).to(dtype)
    with warnings.catch_warnings(action="ignore"): Z = getattr(full, layout)()  # torch calls its own layouts a prototype
    for f in (rankme, anisotropy, prompt_entropy, explain_conventions, lambda X: lidar(X, np.arange(40) // 4), lambda X: rankme(Moments().update(X)), lambda X: rankme(TriangularMoments().update(X))): assert f(Z) == f(full)
    assert spectrum(Z).dtype == str(dtype).removeprefix("torch.") and Z.layout == getattr(full, layout)().layout
    if layout == "to_sparse": assert lidar(full.reshape(10, 4, 8).to_sparse()) == lidar(full.reshape(10, 4, 8))
    bad = full.clone()
    bad[2, 1] = math.inf
    assert spectrum(getattr(bad, layout)()).reason == "1 of 40 rows hold numbers that are not finite"
    with pytest.raises(ValueError, match="complex64"): spectrum(torch.ones(2, 2, dtype=torch.complex64).to_sparse())


def test_rows_that_are_none():
    for bad in (np.ones(3), np.ones((2, 2, 2)), np.ones((2, 2)) * 1j, np.array([["a", "b"]]), torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 2, device="meta"), 5, np.ma.masked_array(np.ones((2, 2)), np.eye(2)), torch.zeros(3, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)):
        with pytest.raises(ValueError, match="rows must be"): spectrum(bad)


    with warnings.catch_warnings(action="ignore"): ragged = [torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=x) for x in (torch.strided, torch.jagged)]
    for bad in ragged:
        with pytest.raises(ValueError, match="nested"): spectrum(bad)
    assert spectrum(np.ma.masked_array(np.eye(3), np.zeros((3, 3), bool))).rank == 2  # nothing is masked


# ---------------------------------------------------------------------------------------------------- the edges


EDGES = {
    "no rows": np.zeros((0, 5)),
    "a single row": np.ones((1, 5)),
    "all rows are equal": np.full((40, 5), 0.1),
    "rows without a width": np.zeros((4, 0)),
    "1 of 3 rows hold numbers that are not finite": np.array([[1.0, 2], [np.inf, 1], [3, 4]]),
}


@pytest.mark.parametrize("reason", EDGES)
def test_undefined_is_none_with_a_reason(reason):
    Z = EDGES[reason]
    for f in (rankme, alpha_req, effective_rank, participation_ratio, stable_rank, top1_share, mean_norm2_share, n90, n99): assert reasons(f, Z) == (None, [reason])
    row = metrics_row(Z)
    assert row["rankme"] is row["alpha"] is row["trace"] is row["rankme_norm"] is None and set(row["reason"].values()) == {reason}
    assert json.loads(json.dumps(row, allow_nan=False))["n_rows"] == len(Z)
    assert explain_conventions(Z).rows[0]["rankme"] is None and explain_conventions(Z).rows[0]["why"] == reason
    plot_spectrum({"$\\frac": Z, "x": np.eye(20)}).canvas.draw()
    if "finite" not in reason and Z.shape[1]:
        for kind in (Moments, TriangularMoments): assert kind().update(Z).spectrum().reason == reason and kind().update(Z[:1]).update(Z[1:]).spectrum().reason == reason


def test_constant_rows_in_many_blocks():
    for value in (0.1, 1e30, 1 / 3):
        state = Moments()
        for size in (1, 7, 30, 8200): state.update(np.full((size, 3), value))
        assert state.spectrum().reason == "all rows are equal" and state.trace == 0
    assert spectrum(np.zeros((5, 3)), center=False).reason == "all rows are zero"


def test_fewer_rows_than_columns():
    for n, d in ((2, 1), (2, 50), (5, 50), (50, 50), (51, 50)):
        Z = np.random.default_rng(n).normal(size=(n, d)) + 100
        for source in (*(spectrum(Z, method=m) for m in ROUTES), Moments().update(Z), TriangularMoments().update(Z)):
            row = metrics_row(source)
            assert row["rank"] == min(n - 1, d) and row["rankme"] <= row["rank"] * (1 + 1e-12)
            for name, value in oracle(Z).items(): close(row[name], value, 1e-6)


def test_duplicates():
    Z = np.random.default_rng(0).normal(size=(6, 30))
    for method in ROUTES: assert metrics_row(spectrum(np.repeat(Z, 50, axis=0), method=method))["rank"] == 5
    close(effective_rank(np.repeat(Z, 50, axis=0)), effective_rank(Z), 1e-10)


@pytest.mark.parametrize("c", [1e-300, 1e-160, 1e160, 1e300])
def test_far_from_one(c):
    Z = rows_with(np.arange(1.0, 21) ** -1, 60, mean=1.0)
    for center, method in itertools.product((True, False), ROUTES): np.testing.assert_allclose(spectrum(Z * c, center, method).sigma / c, spectrum(Z, center, method).sigma, rtol=1e-9)
    close(mean_norm2_share(Z * c), mean_norm2_share(Z), 1e-10)
    close(anisotropy(Z * c), anisotropy(Z), 1e-10)
    row = metrics_row(Z * c)
    assert row["trace"] is None or math.isfinite(row["trace"])


def test_outlier_row():
    "A row a billion times as long as the others, wherever it stands."
    Z = np.random.default_rng(0).normal(size=(50, 8))
    for at in (0, 25, 49):
        W = Z.copy()
        W[at] *= 1e9
        for name, value in oracle(W).items(): close(metrics_row(W)[name], value, 1e-9)


def test_n90_counts():
    for r in (1, 2, 9, 10, 11, 99, 100, 1000):
        flat = Spectrum(np.ones(r), n=10**5, d=2000)
        assert (n90(flat), n99(flat)) == (-(-r * 90 // 100), -(-r * 99 // 100))


@pytest.mark.parametrize("several", [dict(a=np.ones((3, 2))), dict(a=np.zeros((0, 2)), b=np.ones((1, 4)), c=np.zeros((3, 0))), np.full((3, 2), math.nan), Moments()], ids=["one", "three", "nan", "moments"])
def test_a_picture_without_a_spectrum(several):
    fig = plot_spectrum(several)
    fig.canvas.draw()
    told = [t.get_text() for t in fig.legends[0].get_texts()]
    assert len(told) == (len(several) if isinstance(several, dict) else 1)
    plt.close(fig)
    for text, Z in zip(told, several.values() if isinstance(several, dict) else [several]): assert text.endswith(Z.spectrum().reason if isinstance(Z, Moments) else spectrum(Z).reason)


def test_a_picture_of_nothing():
    before = plt.get_fignums()
    with pytest.raises(ValueError, match="no spectra to draw"): plot_spectrum({})
    for bad in (dict(fit=(5, 2)), dict(preset="garrido"), dict(spectra=np.ones(3))):
        with pytest.raises(ValueError): plot_spectrum(**dict(spectra=np.eye(3)) | bad)
    assert plt.get_fignums() == before  # no figure is left open behind an error
    fig = plot_spectrum(dict(a=np.ones((3, 2)), b=np.eye(3)))
    fig.canvas.draw()
    assert fig.axes[0].get_xscale() == fig.axes[0].get_yscale() == "log"
    plt.close(fig)


def test_a_small_difference_in_large_rows():
    "One column that never moves, and one that moves far below its size: its squares are 0, and its differences are not."
    for small in (1e-150, 1e-160, 1e-200, 1e-300):
        Z = np.stack([np.ones(6), small * np.arange(6.0)], axis=1)
        for method in ROUTES:
            s = spectrum(Z, method=method)
            assert s.reason is None and s.rank == 1
            close(s.sigma[0] / small, math.sqrt(17.5), 1e-12)  # Σ (i - 2.5)² over 0..5
        close(s.mean_norm, 1.0, 1e-12)


# ---------------------------------------------------------------------------------------------------- numbers with conventions


def test_metric_is_a_float():
    Z = rows_with(np.arange(1.0, 21) ** -1, 60)
    m = rankme(Z, "reptrix")
    assert isinstance(m, float) and type(m * 2) is float and json.dumps([m]) == f"[{float(m)!r}]" and f"{m:.3f}" == f"{float(m):.3f}"
    c = m.conventions
    assert (c.preset, c.weights, c.centered, c.eps, c.n, c.d, c.dtype, c.method) == ("reptrix", "lambda", True, 1e-7, 60, 20, "float64", "svd")
    for again in (pickle.loads(pickle.dumps(m)), copy.copy(m), copy.deepcopy(m)): assert again == m and again.conventions == c and again.name == "rankme"
    json.dumps(c._asdict(), allow_nan=False)
    assert Moments().update(torch.from_numpy(Z).bfloat16()).update(Z).dtype == "bfloat16+float64"
    assert rankme(Moments().update(Z)).conventions.method == "gram" and rankme(TriangularMoments().update(Z)).conventions.method == "qr"
    for f in (effective_rank, participation_ratio, stable_rank, top1_share, mean_norm2_share, n90, n99, anisotropy, prompt_entropy): assert isinstance(f(Z).conventions, Conventions)


def test_errors_of_a_fit_and_nulls_are_metrics():
    "Floats to everybody who wants a float, with conventions for those who ask."
    Z = rows_with(np.arange(1.0, 121) ** -1.1, 300) + 0.01 * np.random.default_rng(0).normal(size=(300, 120))
    fit = alpha_req(Z, "reptrix")
    for m, name in ((fit.alpha, "alpha"), (fit.r2, "alpha_r2"), (fit.stderr, "alpha_stderr")):
        assert m.name == name and m.conventions == fit.conventions and m.conventions.fit == (11, 100) and m.conventions.preset == "reptrix"
    assert pickle.loads(pickle.dumps(fit)) == fit and copy.deepcopy(fit).stderr.conventions == fit.conventions
    assert metrics_row(Z, preset="reptrix")["alpha_r2"].name == "alpha_r2"
    for weights, method in (("lambda", "closed form"), ("sigma", "Marchenko-Pastur")):
        for centered in (True, False):
            null = isotropic_null(np.int64(300), 120, weights, centered)
            assert null.name == "isotropic_null" and null.conventions == Conventions("isotropic Gaussian rows", weights, centered, n=300, d=120, method=method)
            again = pickle.loads(pickle.dumps(null))
            assert again == null and again.conventions == null.conventions and json.dumps([null, null.conventions._asdict()]).startswith(f"[{float(null)!r}, ")
    assert type(isotropic_null(9, 4) + 1) is float and sorted([isotropic_null(9, 4), 1.0])[0] == 1.0
    close(isotropic_null(9, 4, centered=False), 4 * math.exp(-4 / 18), 1e-15)


MISSING = {
    "no rows": np.zeros((0, 5)),
    "one row": np.ones((1, 5)),
    "equal": np.ones((9, 5)),
    "no width": np.zeros((9, 0)),
    "short": np.random.default_rng(0).normal(size=(8, 5)),
    "flat": Spectrum(np.ones(40), n=99, d=40),
    "uncentred": Spectrum([2.0], n=1, d=2, centered=False),
    "no mean": Spectrum([2.0, 1.0], n=9, d=2),
    "a reason from outside": Spectrum([], n=9, d=2, reason="the solver gave up"),
    "not finite": np.array([[1.0, math.nan]] * 3),
    "far too large": Spectrum([1e200, 1e199], n=9, d=2),
    "far too small": Spectrum([1e-200, 1e-201], n=9, d=2),
    "all there": rows_with(np.arange(1.0, 121) ** -1, 300),
}


@pytest.mark.parametrize("name", MISSING)
def test_every_missing_number_has_a_reason(name):
    for both in (False, True):
        row = metrics_row(MISSING[name], both=both)
        assert set(row["reason"]) == {k for k, v in row.items() if v is None}
        assert all(isinstance(x, str) and x not in ("", "undefined") for x in row["reason"].values())
        assert list(row)[-3:] == ["isotropic_null", "isotropic_null_rankme", "reason"]
        for weights, key in (("lambda", "isotropic_null"), ("sigma", "isotropic_null_rankme")): assert row[key] == isotropic_null(row["n_rows"], {"no width": 0}.get(name, {"flat": 40, "all there": 120}.get(name, 5 if isinstance(MISSING[name], np.ndarray) and name != "not finite" else 2)), weights, name != "uncentred")
        json.dumps(row, allow_nan=False)
    assert (name == "all there") == (not row["reason"])


def test_reasons_say_what_is_the_matter():
    why = {k: metrics_row(v)["reason"] for k, v in MISSING.items()}
    assert why["flat"]["alpha_r2"] == "a flat spectrum has nothing to explain" and "alpha" not in why["flat"] and "alpha_stderr" not in why["flat"]
    for key in ("alpha", "alpha_r2", "alpha_stderr", "fit_lo", "fit_hi", "n_fit", "fit_truncated"): assert "a fit needs 10" in why["short"][key]
    for key in ("isotropic_null", "isotropic_null_rankme", "trace", "rankme_norm", "effective_rank_norm"): assert why["one row"][key] == "a single row"
    assert why["no mean"]["mean_norm2_share"] == "the mean row is not known" and set(why["a reason from outside"].values()) == {"the solver gave up"}
    assert why["far too large"]["trace"] == "trace lies beyond the range of float64" and why["far too small"]["trace"] == "trace lies below the range of float64"


def test_saved_spectrum_says_the_same():
    Z = rows_with(np.arange(1.0, 121) ** -1, 160, mean=1.0)
    s = spectrum(Z)
    again = Spectrum(s.sigma[: s.rank].tolist(), s.n, s.d, mean_norm=s.mean_norm)
    for name, value in metrics_row(s).items():
        if name not in ("reason",): assert metrics_row(again)[name] == value
    assert pickle.loads(pickle.dumps(s)).sigma.tolist() == s.sigma.tolist()


@pytest.mark.parametrize("bad", [dict(sigma=[1, np.nan], n=5, d=5), dict(sigma=[1, -1], n=5, d=5), dict(sigma=[1, 1, 1], n=2, d=5), dict(sigma=[1], n=-1, d=5), dict(sigma=[1], n=5, d=5, method="magic")])
def test_foreign_spectrum_is_checked(bad):
    with pytest.raises(ValueError): Spectrum(**bad)


def test_explanation():
    Z = rows_with(np.arange(1.0, 121) ** -1, 300, mean=10.0)
    table = explain_conventions(Z)
    assert [r["preset"] for r in table.rows] == list(PRESETS)
    for r in table.rows:
        p = PRESETS[r["preset"]]
        assert r["rankme"] == (None if p.weights is None else pytest.approx(float(rankme(Z, p.name)), rel=1e-12))
        assert r["alpha"] == (None if p.fit is None else pytest.approx(float(alpha_req(Z, p.name)), rel=1e-12))
        walk, _, ranks = (r["why"] or "").partition("ranks ")
        if walk: assert walk.rstrip("; ").endswith(f"{r['rankme']:.5g}")  # the walk ends at the value
        assert ranks == "" if p.fit in (None, (12, 100)) else ranks.endswith(f"{r['alpha']:.5g}")
    evil = explain_conventions(Z, [Preset("<script>\x1b[31m", True, "sigma")])
    assert "<script>" not in evil._repr_html_() and "\x1b" not in repr(evil) and "\x1b" not in evil._repr_html_()
    with pytest.raises(ValueError, match="unknown"): explain_conventions(Z, ["nobody"])
    assert [r["preset"] for r in explain_conventions(Z, "garrido").rows] == ["garrido"] and explain_conventions(Z, "garrido").rows == explain_conventions(Z, PRESETS["garrido"]).rows
    assert [r["preset"] for r in explain_conventions(Z, (p for p in ("stringer", Preset("mine", True, None, fit=(1, 50))))).rows] == ["stringer", "mine"]
    for none in ([], (), "", {}):
        with pytest.raises(ValueError, match="unknown" if none == "" else "no preset to explain"): explain_conventions(Z, none)
    for odd in ([5], [["garrido"]], [None]):
        with pytest.raises(ValueError, match="unknown"): explain_conventions(Z, odd)
    with pytest.raises(ValueError, match="unknown"): rankme(Z, ["garrido"])
    made = explain_conventions(Moments().update(Z))
    for a, b in zip(made.rows, table.rows): assert a["rankme"] is None or a["rankme"] == pytest.approx(b["rankme"], rel=1e-9)
    only = explain_conventions(spectrum(Z, center=False))
    assert {r["preset"]: r["rankme"] is None for r in only.rows} == {n: p.weights is None or p.centered is True for n, p in PRESETS.items()}


# ---------------------------------------------------------------------------------------------------- the solver


@pytest.mark.parametrize("solver, method", [("svdvals", "svd"), ("svdvals", "qr"), ("eigvalsh", "gram")])
@pytest.mark.parametrize("how", ["raises", "nan", "wrong"])
def test_second_attempt(monkeypatch, solver, method, how):
    "A solver that fails, or answers nonsense, is asked again elsewhere; the numbers are the same and the spectrum says so."
    Z = rows_with(np.arange(1.0, 21) ** -1, 60, mean=1.0)
    truth, state = spectrum(Z, method=method), Moments().update(Z)

    def broken(A):
        if how == "raises": raise RuntimeError("cusolver error")
        return torch.full((20,), math.nan if how == "nan" else 1.0, dtype=torch.float64)

    monkeypatch.setattr(torch.linalg, solver, broken)
    s = spectrum(Z, method=method)
    np.testing.assert_allclose(s.sigma, truth.sigma, rtol=1e-9)
    assert "numpy" in s.note and "numpy" in rankme(s).conventions.method
    if method == "gram": assert "numpy" in state.spectrum().note
    monkeypatch.setattr(np.linalg, solver, broken)
    assert "failed in torch and in numpy" in spectrum(Z, method=method).reason
    assert reasons(rankme, spectrum(Z, method=method))[0] is None


# ---------------------------------------------------------------------------------------------------- precision


def steep(power, n=4000, d=128, seed=0): return rows_with(np.arange(1.0, d + 1) ** -power, n, seed=seed)


@pytest.mark.parametrize("power", [1, 3, 6, 9])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_streaming_qr_is_exact(power, mean):
    "Within 1e-12 of the full decomposition in every singular value that stands above the rounding of the rows themselves."
    Z = steep(power)
    Z = Z + mean * (np.arange(128) < 3)
    truth, state = spectrum(Z), TriangularMoments()
    for block in np.array_split(Z, 7): state.update(block)
    halves = TriangularMoments().update(Z[2000:]).merge(TriangularMoments().update(Z[:2000]))
    for s in (state.spectrum(), halves.spectrum(), spectrum(Z, method="qr")):
        error = np.abs(s.sigma - truth.sigma)
        sure = truth.sigma > 1e-4 * truth.sigma[0]
        assert (error <= s.sigma[0] * 1e-13).all() and s.rank == truth.rank
        assert (error[sure] <= 1e-12 * truth.sigma[sure]).all()
        assert (error[: s.rank] <= 2 * s.error_bound).all()  # both have rounded


@pytest.mark.parametrize("power", [0, 1, 3, 6])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_gram_stays_within_its_bound(power, mean):
    Z = steep(power) + mean * (np.arange(128) < 3)
    truth = spectrum(Z)
    for s in (spectrum(Z, method="gram"), Moments().update(Z).spectrum(), union(Moments().update(b) for b in np.array_split(Z, 13)).spectrum()):
        assert (np.abs(s.sigma - truth.sigma)[: s.rank] <= s.error_bound).all()
        assert s.max_rel_error == pytest.approx((s.error_bound / s.sigma[: s.rank]).max())
        assert s.sigma[s.rank - 1] > s.sigma[0] * math.sqrt(10 * 128 * 2.2e-16)


def test_rounding_of_rows_that_gram_cannot_see():
    "What the squares cannot hold is dropped, not reported as noise."
    Z = rows_with(np.concatenate([np.ones(7), np.full(57, 1e-18)]), 1000)
    assert spectrum(Z, method="gram").rank == 7 and abs(rankme(spectrum(Z, method="gram")) - 7) < 1e-9
    assert spectrum(Z).rank == spectrum(Z, method="qr").rank == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_fast_path(dtype, mean):
    Z = torch.from_numpy(steep(1) + mean * (np.arange(128) < 3)).to(dtype)
    state, parts = Moments(), [Moments().update(b, fast=True) for b in Z.split(1111)]
    for block in Z.split(700): state.update(block, fast=True)
    truth = spectrum(Z)
    for s in (state.spectrum(), union(parts).spectrum()):
        assert s.method == "gram-fp32" and rankme(s).conventions.method == "gram-fp32"
        np.testing.assert_allclose(s.sigma, truth.sigma, rtol=1e-5)
        assert (np.abs(s.sigma - truth.sigma)[: s.rank] <= s.error_bound).all()
        close(rankme(s), rankme(truth), 1e-6)
    assert state.merge(Moments().update(Z)).method == "gram-fp32"  # once in, it stays named


def test_fast_path_refuses():
    for Z in (steep(3), steep(0)[:100], rows_with([1.0] * 7 + [0.0] * 20, 300)):
        state = Moments().update(torch.from_numpy(Z).float(), fast=True)
        if len(Z) == 100: assert state.spectrum().rank == 99  # fewer rows than columns, but nothing below
        else:
            with pytest.raises(FastPathRefused, match="fast=False"): state.spectrum()
            with pytest.raises(FastPathRefused): rankme(state)
    for Z in (np.ones((3, 2)), torch.ones(3, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="multiplies in float32"): Moments().update(Z, fast=True)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_no_reduced_precision(setting):
    "Whatever the program has set, products are in float32, and the setting is as it was afterwards."
    Z = torch.from_numpy(steep(1)).float()
    wanted, before = Moments().update(Z, fast=True).M2, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert torch.equal(Moments().update(Z, fast=True).M2, wanted)
        assert torch.get_float32_matmul_precision() == setting
        with pytest.raises(ZeroDivisionError):
            with spectral._true_float32():
                assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
                1 / 0
        assert torch.get_float32_matmul_precision() == setting
    finally: torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------------------------------------------- states


def test_bad_rows_leave_the_state_alone():
    for kind in (Moments, TriangularMoments):
        new = kind()
        with pytest.raises(ValueError, match="1 of 2 rows"): new.update([[1.0, 2], [np.nan, 1]])
        assert new.n == 0 and new.mean is None
        state = kind().update(np.eye(3))
        before = state.copy()
        for bad in (np.ones((2, 4)), [[np.inf, 0, 0]], np.ones(3)):
            with pytest.raises(ValueError): state.update(bad)
        assert state.n == 3 and torch.equal(state.mean, before.mean) and state.dtype == before.dtype
        with pytest.raises(ValueError, match="kind and width"): state.merge(kind().update(np.eye(4)))
    with pytest.raises(ValueError, match="kind and width"): Moments().update(np.eye(3)).merge(TriangularMoments().update(np.eye(3)))
    with pytest.raises(ValueError, match="no states"): union([])


def same(a, b):
    "Whether two states agree in every field, to the bit."
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x is None and y is None or not isinstance(x, torch.Tensor) and x == y for x, y in ((getattr(a, k), getattr(b, k)) for k in a.__dataclass_fields__))


@pytest.mark.parametrize("begun", [False, True, "empty", "fast"])
def test_refusals_leave_no_trace(begun):
    for kind in (Moments, TriangularMoments):
        if begun == "fast" and kind is TriangularMoments: continue

        def made():
            state = kind()
            if begun == "fast": return state.update(torch.eye(3), fast=True)
            return state.update(np.eye(3)[: 0 if begun == "empty" else 3]) if begun else state

        state = made()
        bad = [([[1.0, np.inf, 0]], False), (np.ones(3), False), ([["a", "b", "c"]], False), (np.ones((2, 3)) * 1j, False)] + ([(np.ones((2, 4)), False)] if begun else [])
        if kind is Moments: bad += [(np.ones((2, 3)), True), (torch.ones(2, 3, dtype=torch.int64), True), (torch.full((2, 3), math.nan), True), (np.zeros((0, 3)), True)] + ([(torch.ones(2, 4), True)] if begun else [])
        for rows, fast in bad:
            with pytest.raises(ValueError): state.update(rows, fast) if fast else state.update(rows)
            assert same(state, made())
        assert state.update(np.ones((2, 3))).n == 2 + 3 * (begun in (True, "fast"))


SMALL = "second moments below the range of float64: scale the rows up"


@pytest.mark.parametrize("c", [10.0**-k for k in (100, 130, 140, 144, 148, 152, 155, 158, 160, 162, 165, 170, 200, 300)])
def test_rows_too_small_to_be_squared(c):
    "A spectrum that is right, or a reason that is; never rows that pass for equal, or numbers made of what was left."
    Z = rows_with(np.arange(1.0, 13) ** -1, 60, mean=1.0)
    truth = metrics_row(Z)
    parts = [Moments().update(b * c) for b in np.array_split(Z, 4)]
    states = {"once": Moments().update(Z * c), "blocks": union(parts), "rows": union(Moments().update(Z[i : i + 1] * c) for i in range(60)), "back": union(parts[::-1])}
    for s in (x.spectrum(center) for x in states.values() for center in (True, False)):
        assert s.reason in (None, SMALL) and (c > 1e-147 or s.reason) and (c < 1e-145 or not s.reason)
        if s.reason is None: np.testing.assert_allclose(s.sigma / c, spectrum(Z, s.centered).sigma, rtol=1e-9)
        row = metrics_row(s)
        for name in ("rankme", "effective_rank", "mean_norm2_share"): assert (row[name] is None and row["reason"][name] == SMALL) if s.reason else not s.centered or row[name] == pytest.approx(float(truth[name]), rel=1e-9)
    exact = [TriangularMoments().update(Z * c), union(TriangularMoments().update(b * c) for b in np.array_split(Z, 4))]
    for s in (x.spectrum(center) for x in exact for center in (True, False)):
        np.testing.assert_allclose(s.sigma / c, spectrum(Z, s.centered).sigma, rtol=1e-9)
        close(s.mean_norm / c, np.linalg.norm(Z.mean(0)), 1e-12)
    assert exact[0].to_moments().spectrum().reason in (None, SMALL) and (c > 1e-147 or exact[0].to_moments().spectrum().reason)
    for some in (parts, [TriangularMoments().update(b * c) for b in np.array_split(Z, 4)]):
        share, why = reasons(between_share, some)
        assert why == [SMALL] if share is None else abs(share - between_share([Moments().update(b) for b in np.array_split(Z, 4)])) < 1e-9


@pytest.mark.parametrize("c", [1e160, 1e200, 1e300])
def test_rows_too_large_to_be_squared(c):
    Z, large = rows_with([3.0, 2, 1], 20, mean=1.0), "second moments are not finite: the rows are too large"
    for center in (True, False):
        assert Moments().update(Z * c).spectrum(center).reason == large
        np.testing.assert_allclose(TriangularMoments().update(Z * c).spectrum(center).sigma / c, spectrum(Z, center).sigma, rtol=1e-9)
    for kind in (Moments, TriangularMoments): assert reasons(between_share, [kind().update(Z[:9] * c), kind().update(Z[9:] * c)]) == (None, [large])


def test_small_beside_large():
    "What is too small to be squared does not count beside what is not; and equal rows stay equal."
    big, small = rows_with([3.0, 2, 1], 50), 1e-170 * rows_with([1.0, 2, 3], 50, seed=1)
    for states in ([Moments().update(big), Moments().update(small)], [Moments().update(small), Moments().update(big)]):
        for state in (union(states), states[0].copy().update(small)):
            if state.n == 100 and state.spectrum().reason is None: np.testing.assert_allclose(union(states).spectrum().sigma, spectrum(np.concatenate([big, small])).sigma, rtol=1e-9)
    assert Moments().update(big).update(small).spectrum().reason is None and Moments().update(small).update(big).spectrum().reason is None
    apart = [Moments().update(np.full((4, 3), x)) for x in (1e-170, 3e-170)]  # each of equal rows; they differ from each other
    assert [s.spectrum().reason for s in apart] == ["all rows are equal"] * 2
    assert union(apart).spectrum().reason == apart[0].copy().update(np.full((2, 3), 5e-170)).spectrum().reason == SMALL
    assert apart[0].merge(Moments().update(np.full((9, 3), 1e-170))).spectrum().reason == "all rows are equal"
    column = np.stack([np.ones(9), 1e-170 * np.arange(9)], axis=1)  # large rows, of which only something tiny moves
    assert Moments().update(column).spectrum().reason == SMALL and Moments().update(column).spectrum(center=False).rank == 1
    assert Moments().update(np.zeros((4, 3))).spectrum(center=False).reason == "all rows are zero"
    assert Moments().update(np.full((4, 3), 1e-170)).spectrum(center=False).reason == SMALL
    assert reasons(between_share, apart) == (None, [SMALL]) and reasons(between_share, apart[:1]) == (None, ["all rows are equal"])
    for dtype in (torch.float32, torch.bfloat16):  # the smallest numbers of these still have squares
        s = Moments().update((torch.from_numpy(big) * 1e-37).to(dtype)).spectrum()
        assert s.reason is None and s.rank == 3


def test_marks_survive_the_disk(tmp_path):
    save_moments(tmp_path / "m", {"tiny": Moments().update([[0.0], [1e-170]]), "equal": Moments().update([[1.0], [1.0]])})
    back, _ = load_moments(tmp_path / "m")
    assert (back["tiny"].spectrum().reason, back["equal"].spectrum().reason) == (SMALL, "all rows are equal")


def test_no_second_look_at_short_dtypes(monkeypatch):
    "Equal rows of float32 and bfloat16 cost nothing more; those of float64 are looked at once more, and only while nothing differs."
    seen = []
    monkeypatch.setattr(Moments, "_mark", lambda self, rest: seen.append(len(rest)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16): Moments().update(torch.ones(9, 2, dtype=dtype)).absorb(Moments().update(torch.zeros(3, 2, dtype=dtype)))
    assert not seen
    Moments().update(np.ones((9, 2)))
    assert seen == [10]


@pytest.mark.parametrize("c", [1e-37, 1e-30, 1e-20, 1e-15, 1e15, 1e20, 1e30])
def test_fast_path_far_from_one(c):
    "Products that leave the range of float32 are made in float64."
    Z = torch.from_numpy(rows_with(np.arange(1.0, 13) ** -1, 60, mean=1.0)).float()
    s = Moments().update(Z * c, fast=True).spectrum()
    np.testing.assert_allclose(s.sigma, spectrum(Z * c).sigma, rtol=1e-4)
    assert s.method == "gram-fp32" and Moments().update(torch.full((9, 3), c), fast=True).spectrum().reason == "all rows are equal"


def test_no_matrix_before_the_first_rows():
    for center in (True, False):
        with pytest.raises(ValueError, match="no rows"): Moments().gram(center)
        assert Moments().update(np.zeros((0, 2))).gram(center).tolist() == [[0, 0], [0, 0]]


def test_states_do_not_share_memory():
    for kind in (Moments, TriangularMoments):
        a, b = kind().update(np.eye(3)), kind().update(2 * np.eye(3))
        kept = a.copy()
        joined = a.merge(b)
        kind().absorb(a).update(np.ones((5, 3)))
        union([a]).update(np.ones((5, 3)))
        joined.update(np.ones((5, 3)))
        a.copy().absorb(b)
        for name in ("mean", "M2" if kind is Moments else "R"): assert torch.equal(getattr(a, name), getattr(kept, name))
        assert a.n == 3
        empty = kind().merge(kind())
        assert empty.n == 0 and empty.spectrum().reason == "rows without a width"
        assert kind().update(np.zeros((0, 3))).merge(a).n == 3 and a.merge(kind().update(np.zeros((0, 3)))).n == 3


def test_union_is_no_sum():
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=(n, 5)) + shift for n, shift in ((50, 0), (80, 10), (3, -40))]
    states, Z = [Moments().update(g) for g in groups], np.concatenate(groups)
    total = ((Z - Z.mean(0)) ** 2).sum()
    within = sum(((g - g.mean(0)) ** 2).sum() for g in groups)
    close(union(states).trace, total, 1e-12)
    close(between_share(states), 1 - within / total, 1e-12)
    close(between_share([TriangularMoments().update(g) for g in groups] + [TriangularMoments()]), 1 - within / total, 1e-10)
    assert between_share([states[0]]) == 0
    assert reasons(between_share, []) == (None, ["no rows"]) and reasons(between_share, [Moments().update(np.ones((4, 2)))]) == (None, ["all rows are equal"])


@pytest.fixture
def saved(tmp_path):
    Z = np.random.default_rng(0).normal(size=(50, 4))
    states = {"a/b": Moments().update(Z), "r": TriangularMoments().update(Z[:3]), "quick": Moments().update(torch.from_numpy(Z).float(), fast=True), "new": Moments(), "thin": TriangularMoments().update(Z[:0])}
    save_moments(path := tmp_path / "m.safetensors", states, {"rows": 50})
    return path, states


def test_saved_to_the_bit(saved):
    path, states = saved
    back, extra = load_moments(path)
    assert extra == {"rows": 50} and list(back) == sorted(states)
    for name, s in states.items():
        t = back[name]
        assert type(t) is type(s) and (t.n, t.dtype, t.method, t.d) == (s.n, s.dtype, s.method, s.d)
        for part in ("mean", "M2", "R", "shift"): assert (x := getattr(s, part, None)) is None and getattr(t, part, None) is None or torch.equal(x, getattr(t, part))
        assert s.d == 0 or torch.equal(t.update(np.ones((9, 4), np.float32)).mean, s.update(np.ones((9, 4), np.float32)).mean)
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def test_a_failed_save_leaves_the_old_file(saved):
    path, states = saved
    before = path.read_bytes()
    for bad in (object(), math.nan):
        with pytest.raises((TypeError, ValueError)): save_moments(path, states, {"x": bad})
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def test_on_the_disk_before_it_takes_the_name(saved, monkeypatch):
    path, states = saved
    order, sync, move, before = [], os.fsync, os.replace, path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.fstat(fd).st_ino), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("replace", os.stat(a).st_ino)), move(a, b))[1])
    save_moments(path, states, {"rows": 50})
    assert order == [path.stat().st_ino, ("replace", path.stat().st_ino)] and path.read_bytes() == before  # this very file, in this order

    def full(fd): raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"): save_moments(path, {}, {})
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def rewrite(path, change):
    "The file with something changed in its tensors or its header."
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as f: head = json.loads(f.metadata()["tracebook"])
    meta = change(tensors, head)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"tracebook": json.dumps(head)} if meta is None else meta)


LIES = {
    "belong to no state": lambda t, h: t.update(stray=torch.ones(2)),
    "mean is missing": lambda t, h: (t.pop("a/b/mean"), None)[1],
    "R is missing": lambda t, h: (t.pop("r/R"), None)[1],
    "not finite": lambda t, h: (t["a/b/mean"].fill_(math.inf), None)[1],
    "not upper triangular": lambda t, h: (t["r/R"].fill_(1.0), None)[1],
    "no matrix of second moments: not symmetric": lambda t, h: (t["a/b/M2"][0].fill_(9.0), None)[1],
    "negative on its diagonal": lambda t, h: (t["a/b/M2"].neg_(), None)[1],
    "and not float64": lambda t, h: t.update({"a/b/mean": t["a/b/mean"].float()}),
    r"shape \(3,\)": lambda t, h: t.update({"a/b/mean": t["a/b/mean"][:3]}),
    "wrong type": lambda t, h: h["cells"]["a/b"].update(n=-1),
    "are of the wrong type": lambda t, h: h["cells"]["a/b"].update(n=True),
    "counts and names": lambda t, h: h["cells"]["a/b"].update(n=2.5),
    "do not go with": lambda t, h: h["cells"]["r"].update(rows=5),
    "do not go with a matrix": lambda t, h: h["cells"]["a/b"].update(rows=9),
    "entry in the header": lambda t, h: (h["cells"]["a/b"].pop("dtype"), None)[1],
    "its entry in the header": lambda t, h: h["cells"].update({"a/b": 7}),
    "is not as it should be": lambda t, h: h["cells"]["a/b"].update(kind="pickle"),
    "no fast path": lambda t, h: h["cells"]["r"].update(fast=True),
    "shift is missing": lambda t, h: h["cells"]["a/b"].update(shift=True),
    "no moments in the format": lambda t, h: h.update(format="tracebook moments 2"),
    "holds no moments": lambda t, h: {"other": "x"},
    "holds no moments in": lambda t, h: {"tracebook": "[" * 100_000},
    "no moments in the format 'tracebook": lambda t, h: {"tracebook": "[1]"},
}


@pytest.mark.parametrize("message", LIES)
def test_a_file_that_lies_is_refused(saved, message):
    path, _ = saved
    rewrite(path, LIES[message])
    with pytest.raises(ValueError, match=message): load_moments(path)


def test_a_file_that_is_none(tmp_path, saved):
    for data in (b"", b"x" * 100, saved[0].read_bytes()[:-8], pickle.dumps({})):
        (tmp_path / "f").write_bytes(data)
        with pytest.raises(ValueError, match="no safetensors file"): load_moments(tmp_path / "f")
    with pytest.raises(FileNotFoundError): load_moments(tmp_path / "nothing")


# ---------------------------------------------------------------------------------------------------- intervals


def test_jackknife_of_a_mean():
    "With width 1 and uncentred rows, σ²/n is a mean of squares: its standard error has a closed form."
    groups = np.random.default_rng(0).normal(size=(12, 30)) ** 2
    x = jackknife([Moments().update(np.sqrt(g)[:, None]) for g in groups], lambda s: s.sigma[0] ** 2 / s.n, center=False)
    close(x.value, groups.mean(), 1e-12)
    close(x.se, groups.mean(1).std(ddof=1) / math.sqrt(12), 1e-9)
    close(x.hi - x.value, 2.200985 * x.se, 1e-6)
    assert x.groups == 12 and x.reason is None


@pytest.mark.parametrize("kind", [Moments, TriangularMoments])
@pytest.mark.parametrize("G", [2, 3, 8])
def test_jackknife_against_brute_force(kind, G):
    rng = np.random.default_rng(G)
    groups = [rng.normal(size=(rng.integers(5, 60), 6)) + rng.normal(size=6) for _ in range(G)]
    got = jackknife([kind(), *(kind().update(g) for g in groups)], {"rankme": rankme, "top": top1_share})  # a group without rows does not count
    for name, f in (("rankme", rankme), ("top", top1_share)):
        rest = [float(f(np.concatenate(groups[:g] + groups[g + 1 :]))) for g in range(G)]
        close(got[name].value, float(f(np.concatenate(groups))), 1e-9)
        close(got[name].se, math.sqrt((G - 1) / G * sum((x - np.mean(rest)) ** 2 for x in rest)), 1e-6)
        assert got[name].groups == G and got[name].lo < got[name].value < got[name].hi


def test_jackknife_undefined():
    one = Moments().update(np.eye(4))
    assert jackknife([one], rankme)[1:4] == (None, None, None) and jackknife([one], rankme).value is not None
    assert jackknife([], rankme) == (None, None, None, None, 0, "no rows")
    got = jackknife([one, Moments().update(np.eye(4))], {"alpha": alpha_req, "rankme": rankme})
    assert got["alpha"].value is None and "needs 10" in got["alpha"].reason and got["rankme"].se is not None
    flat = jackknife([one, Moments().update(np.ones((1, 4)))], rankme)
    assert flat.value is not None and flat.se is None and flat.reason == "undefined where one of the 2 groups is left out: a single row"


@pytest.mark.parametrize("level", [0, 1, 1.5, -0.1, math.nan, math.inf])
def test_jackknife_level(level):
    for parts in ([], [Moments().update(np.eye(4))], [Moments().update(np.eye(4))] * 3):
        with pytest.raises(ValueError, match="between 0 and 1"): jackknife(parts, rankme, level=level)


def test_jackknife_says_which_part_is_undefined():
    rng = np.random.default_rng(0)
    parts = [Moments().update(rng.normal(size=(n, 14))) for n in (12, 2, 2)]  # without the first, three directions are left
    got = jackknife(parts, {"alpha": lambda s: alpha_req.__wrapped__(s, fit=(1, 12)), "rankme": rankme})
    assert got["alpha"].value is not None and got["alpha"][1:4] == (None, None, None) and got["alpha"].groups == 3
    assert got["alpha"].reason == "undefined where one of the 3 groups is left out: 3 points in ranks 1..12 of a spectrum of rank 3: a fit needs 10" and got["rankme"].reason is None
    low = jackknife(parts, {"alpha": alpha_req})["alpha"]
    assert low.value is None and low.reason == "3 points in ranks 12..100 of a spectrum of rank 14: a fit needs 10"  # of all rows, not of a part
    for nothing in (None, math.nan, math.inf):
        mine = jackknife(parts, lambda s: 1.0 if s.n == 16 else nothing)
        assert mine == (1.0, None, None, None, 3, "undefined where one of the 3 groups is left out")
        assert jackknife(parts, lambda s: nothing) == (None, None, None, None, 3, "the metric is undefined")


def test_t_quantiles():
    "Printed tables, two-sided."
    for dof, level, t in ((1, 0.95, 12.7062), (2, 0.95, 4.30265), (3, 0.99, 5.84091), (4, 0.9, 2.13185), (5, 0.95, 2.57058), (19, 0.95, 2.09302), (20, 0.99, 2.84534), (99, 0.95, 1.98422)):
        close(spectral._t_quantile(dof, level), t, 1e-5)


def test_groups_of_traces():
    seen = np.bincount([group_of(f"trace {i}") for i in range(4000)], minlength=20)
    assert len(seen) == 20 and seen.min() > 140 and seen.max() < 270
    assert group_of("x", 20, 1) == group_of("x", 20, 1) and {group_of("x", 20, s) for s in range(99)} == set(range(20))


# ---------------------------------------------------------------------------------------------------- the others


def test_lidar_against_the_definition():
    "Roots of matrices by eigenvectors, as the paper writes it."
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(9, 5, 12)) * np.arange(1, 13) ** -0.5 + 2 * rng.normal(size=(9, 1, 12))
    for delta in (1e-4, 1e-6, 1e-8, 1.0):
        means = Z.mean(1)
        between = np.cov(means.T, ddof=0)
        within = np.mean([np.cov(z.T, ddof=0) for z in Z], axis=0) + delta * np.eye(12)
        values, vectors = np.linalg.eigh(within)
        root = vectors @ np.diag(values**-0.5) @ vectors.T
        l = np.maximum(np.linalg.eigvalsh(root @ between @ root), 0)
        close(lidar(Z, delta=delta), entropy_rank(l / l.sum()), 1e-8)
        close(lidar(Z.reshape(45, 12), [f"o{i // 5}" for i in range(45)], delta), entropy_rank(l / l.sum()), 1e-8)
    with pytest.raises(ValueError, match="above 0"): lidar(Z, delta=0)
    with pytest.raises(ValueError, match="3 objects for 45 rows"): lidar(Z.reshape(45, 12), [1, 2, 3])
    assert reasons(lidar, np.ones((4, 3, 2)))[0] is None and reasons(lidar, Z[:1])[0] is None and reasons(lidar, Z[:0])[0] is None
    assert reasons(lidar, np.full((4, 3, 2), np.nan))[0] is None


def lidar_by_hand(Z, delta):
    "The definition with eighty digits: no rounding to speak of, whatever delta is beside the rows."
    mp = pytest.importorskip("mpmath").mp.clone()
    mp.dps = 80
    k, v, d = Z.shape
    X = [[[mp.mpf(float(x)) for x in row] for row in of] for of in Z]
    means = [[sum(of[i][j] for i in range(v)) / v for j in range(d)] for of in X]
    middle = [sum(m[j] for m in means) / k for j in range(d)]
    between = mp.matrix(d, d)
    within = mp.matrix(d, d)
    for a, b in itertools.product(range(d), repeat=2):
        between[a, b] = sum((m[a] - middle[a]) * (m[b] - middle[b]) for m in means) / k
        within[a, b] = sum((row[a] - m[a]) * (row[b] - m[b]) for of, m in zip(X, means) for row in of) / (k * v) + (mp.mpf(delta) if a == b else 0)
    inverse = mp.inverse(mp.cholesky(within))
    l = [x for x in mp.eigsy(inverse * between * inverse.T, eigvals_only=True) if x > 0]
    return float(mp.exp(-sum(x / sum(l) * mp.log(x / sum(l)) for x in l if x / sum(l) > mp.mpf(10) ** -40)))


@pytest.mark.parametrize("scale", [1e-60, 1e-8, 1.0, 1e4, 1e8, 1e11, 1e16])
@pytest.mark.parametrize("delta", [1e-4, 1e-8])
def test_lidar_of_rows_of_any_size(scale, delta):
    "A number that is right, or a reason; the squares of these rows swallow delta long before rounding does."
    rng = np.random.default_rng(0)
    few_views, many = rng.normal(size=(3, 2, 5)) * scale, (rng.normal(size=(3, 20, 3)) + rng.normal(size=(3, 1, 3))) * scale
    for Z in (few_views, many, many * [1, 1, 0] + few_views[0, 0, 0]):
        found, why = reasons(lidar, Z, delta=delta)
        if found is None: assert why == ["rounding of rows this long swamps delta: take a larger delta, or scale the rows down"] and scale * 1e-16 > 1e-6 * math.sqrt(delta)
        else: close(found, lidar_by_hand(Z, delta), 1e-8)
    assert lidar(many, delta=delta) is not None  # the views fill all directions, so delta does not matter
    if (scale, delta) == (1e8, 1e-4): assert lidar(few_views, delta=delta) is not None


@pytest.mark.parametrize("k", [-450, -400, -340, -300, -100, -1, 1, 100, 300, 340, 400, 450])
def test_lidar_scales_with_delta(k):
    "Rows by a power of two, δ by its square: the same number, where rows are rescaled inside (beyond 1e±100) as well."
    rng, c = np.random.default_rng(1), 2.0**k
    for Z in (rng.normal(size=(4, 3, 9)), rng.normal(size=(3, 40, 4)) + rng.normal(size=(3, 1, 4))):
        for delta in (1e-4, 1e-8, 3.0): close(lidar(Z * c, delta=delta * c * c), lidar(Z, delta=delta), 1e-12)


def test_lidar_at_the_ends():
    Z = np.random.default_rng(2).normal(size=(4, 3, 9))
    only_delta = metrics_row(spectrum(Z.mean(1)))["effective_rank"]  # S_w = δI: the entropy of the means' own scatter
    for c, delta in ((1e-300, 1e-4), (1e-300, 1e300), (1e-200, 1.0), (1e-90, 1e300), (1.0, 1e30)): close(lidar(Z * c, delta=delta), only_delta, 1e-12)
    for c in (1e150, 1e200, 1e300): assert reasons(lidar, Z * c)[1] == ["rounding of rows this long swamps delta: take a larger delta, or scale the rows down"]
    for delta in (0, -1, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="above 0, and finite"): lidar(Z, delta=delta)
    assert reasons(lidar, Z[:1]) == (None, ["a single object"]) and reasons(lidar, Z[:, :, :0]) == (None, ["rows without a width"])
    for same_means in (np.ones((4, 3, 2)), Z - Z.mean(1, keepdims=True), 1e8 + np.zeros((4, 3, 2))): assert reasons(lidar, same_means) == (None, ["all objects have the same mean, up to rounding"])
    close(lidar(np.eye(4)[:, None, :]), 3.0, 1e-12)  # one view of each: nothing but delta


def test_lidar_when_a_solver_fails(monkeypatch):
    def broken(solver, A): raise np.linalg.LinAlgError("svdvals failed in torch and in numpy")

    monkeypatch.setattr(spectral, "_solve", broken)
    assert reasons(lidar, np.random.default_rng(0).normal(size=(4, 3, 9))) == (None, ["svdvals failed in torch and in numpy"])


@pytest.mark.parametrize("order", [1e-3, 0.5, 0.89, 0.91, 1 - 1e-9, 1 + 1e-15, 1 + 1e-9, 1.09, 1.11, 2, 50, 2000, 1e6, 1e300])
def test_renyi_of_any_order(order):
    "With two hundred digits; at large orders it comes down to -ln of the largest share."
    mp = pytest.importorskip("mpmath").mp.clone()
    mp.dps = 200
    for p in (np.ones(10) / 10, np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.5 - 2.0**-40, 2.0**-40]), np.array([1.0, 0.0])):
        x = [mp.mpf(float(v)) for v in p if v]
        x = [v / sum(x) for v in x]
        a = mp.mpf(order)
        close(spectral._renyi(p, order), wanted := float(mp.log(sum(v**a for v in x)) / (1 - a)), 1e-9) if len(x) > 1 else None
        if order >= 1e6: assert abs(spectral._renyi(p, order) + math.log(p[0])) < 2e-6
    assert spectral._renyi(np.array([1.0, 0.0]), order) == 0


def test_prompt_entropy_of_extreme_orders():
    Z = np.random.default_rng(0).normal(size=(9, 30))
    at = [float(prompt_entropy(Z, order)) for order in (0.1, 0.5, 0.9, 0.999999, 1, 1.000001, 1.1, 2, 10, 100, 2000, 1e9, math.inf)]
    assert at == sorted(at, reverse=True)  # Rényi's entropies fall with the order
    close(at[-2], at[-1], 1e-6)
    for bad in (math.nan, -1, 0, -math.inf):
        with pytest.raises(ValueError, match="order above 0"): prompt_entropy(Z, order=bad)


def test_prompt_entropy_against_the_definition():
    Z = np.random.default_rng(0).normal(size=(9, 30))
    U = Z / np.linalg.norm(Z, axis=1, keepdims=True)
    p = np.maximum(np.linalg.eigvalsh(U @ U.T / 9), 0)
    close(prompt_entropy(Z, normalize=None), math.log(entropy_rank(p)), 1e-10)
    close(prompt_entropy(Z), math.log(entropy_rank(p)) / math.log(9), 1e-10)
    close(prompt_entropy(Z, normalize="d"), math.log(entropy_rank(p)) / math.log(30), 1e-10)
    close(prompt_entropy(Z, order=2, normalize=None), -math.log((p**2).sum()), 1e-10)
    close(prompt_entropy(Z, order=math.inf, normalize=None), -math.log(p.max()), 1e-10)
    close(prompt_entropy(Z, order=1 + 1e-7), prompt_entropy(Z), 1e-6)
    close(prompt_entropy(Z * np.arange(1, 10)[:, None]), prompt_entropy(Z), 1e-10)
    assert reasons(prompt_entropy, Z[:1])[0] is None and reasons(prompt_entropy, Z[:, :1])[0] is None and reasons(prompt_entropy, Z * np.nan)[0] is None
    assert prompt_entropy(torch.from_numpy(Z).bfloat16()).conventions.dtype == "bfloat16"
    for bad in (dict(order=0), dict(normalize="log")):
        with pytest.raises(ValueError): prompt_entropy(Z, **bad)


@few
@given(clouds(max_rows=12))
def test_anisotropy_against_all_pairs(Z):
    U = Z / np.maximum(np.linalg.norm(Z, axis=1, keepdims=True), 1e-300)
    pairs = [U[i] @ U[j] for i, j in itertools.combinations(range(len(U)), 2)]
    assert abs(anisotropy(Z) - np.mean(pairs)) < 1e-10


def test_anisotropy_edges():
    assert reasons(anisotropy, np.zeros((5, 3))) == (None, ["0 rows with a direction: a pair needs 2"])
    assert anisotropy(np.array([[0, 0], [1.0, 0], [1.0, 0]])).conventions.n == 2
    assert reasons(anisotropy, [[1.0, np.nan]] * 3)[0] is None
    Z = rows_with([3.0, 1.0], 20)
    close(anisotropy(Z, "variance"), 0.75, 1e-12)
    with pytest.raises(ValueError, match="cosine or variance"): anisotropy(Z, "angle")


def test_isotropic_null_edges():
    assert isotropic_null(0, 5) is isotropic_null(1, 5) is isotropic_null(5, 0) is None
    close(isotropic_null(2, 1), math.exp(-0.5), 1e-12)
    close(isotropic_null(501, 4000), isotropic_null(4001, 500), 1e-12)
    for n, d in ((5, 5), (1, 3), (0, 0), (5, 0)):
        with pytest.raises(ValueError, match="sigma or lambda"): isotropic_null(n, d, "tau")


# ---------------------------------------------------------------------------------------------------- large, and on a GPU


@pytest.mark.slow
@pytest.mark.parametrize("kind, worst", [("power", 1e-12), ("massive", 1e-10), ("steep", 1e-6)])
def test_precision_table_of_the_reference(kind, worst):
    "Width 1,024 and 16,384 rows, as in section 7: the Gram route by kind of spectrum, the triangle always."
    Z = rows_with(np.arange(1.0, 1025) ** (-3 if kind == "steep" else -1), 16384)
    if kind == "massive": Z[:, [3, 77, 500]] += 300
    truth, gram, exact = spectrum(Z), Moments(), TriangularMoments()
    for block in np.array_split(Z, 5): gram.update(block), exact.update(block)
    for s, bound in ((gram.spectrum(), worst), (exact.spectrum(), 1e-12)): assert np.abs(s.sigma / truth.sigma - 1)[: s.rank].max() < bound


@pytest.mark.slow
def test_sample_size_table_of_the_reference():
    rng, cloud = np.random.default_rng(0), np.arange(1.0, 1025) ** -0.5
    for n, effective, rank, alpha in ((128, 63, 111, 0.867), (512, 126, 389, 0.906), (1024, 146, 642, 0.938), (4096, 173, 775, 0.983)):
        s = spectrum(rng.normal(size=(n, 1024)) * cloud, method="gram")
        assert abs(effective_rank(s) - effective) < 0.03 * effective and abs(rankme(s) - rank) < 0.02 * rank and abs(alpha_req(s).alpha - alpha) < 0.06


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gpu_agrees_with_cpu(dtype):
    Z = torch.from_numpy(rows_with(np.arange(1.0, 257) ** -1, 3000, mean=5.0)).to(dtype)
    G = Z.cuda()
    for method in ROUTES: np.testing.assert_allclose(spectrum(G, method=method).sigma, spectrum(Z, method=method).sigma, rtol=1e-9)
    for kind in (Moments, TriangularMoments):
        there = kind().update(G[:1000]).update(G[1000:])
        np.testing.assert_allclose(there.spectrum().sigma, kind().update(Z).spectrum().sigma, rtol=1e-9)
        assert there.mean.device.type == "cuda" and kind().update(Z).merge(there).mean.device.type == "cpu"
    for name in PRESETS:
        if PRESETS[name].weights: close(rankme(G, name), rankme(Z, name), 1e-9)
    close(lidar(G, np.arange(3000) // 10), lidar(Z, np.arange(3000) // 10), 1e-8)
    close(anisotropy(G), anisotropy(Z), 1e-9)
    if dtype != torch.float64:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try: close(rankme(Moments().update(G, fast=True)), rankme(Z), 1e-5)
        finally: torch.backends.cuda.matmul.fp32_precision = "none"
    low = torch.zeros(400, 64, device="cuda", dtype=dtype)
    low[:, :3] = torch.randn(400, 3, device="cuda").to(dtype)
    assert Moments().update(low).spectrum().rank == 3 and spectrum(low).rank == 3
