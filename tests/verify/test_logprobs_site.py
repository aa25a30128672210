"""The site of log-probabilities: shapes, bounds, summaries, comparisons."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers import forward, logprobs
from llama_layers.errors import TraceError
from llama_layers.verify import Rounding, Trace, check, compare, judge, record
from llama_layers.verify.operations import Logprobs
from tests.support.random_models import GQA, model_of, random_weights

IDS = np.random.default_rng(2).integers(0, 13, (2, 8))


@pytest.fixture(scope="module")
def model():
    return model_of(GQA, random_weights(GQA, dtype=np.float32))


@pytest.fixture(scope="module")
def oracle():
    """Log-probabilities [B, S, V] of a float64 pass, in naive loops."""
    weights = random_weights(GQA, dtype=np.float32)
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    logits = forward(model_of(GQA, wide), IDS).logits
    found = np.empty(logits.shape)
    for place in np.ndindex(logits.shape[:2]):
        found[place] = logits[place] - math.log(math.fsum(map(math.exp, logits[place])))
    return found


def next_ones(numbers, ids=IDS):
    return np.array(
        [[row[s][ids[b, s + 1]] for s in range(ids.shape[1] - 1)] for b, row in enumerate(numbers)]
    )


def result_of(report):
    return next(r for r in report.results if r.site.name == "logprobs")


class TestShapes:
    def test_is_recorded_only_by_name(self, model):
        assert "logprobs" not in record(model, IDS).arrays
        assert "logprobs" not in record(model, IDS, sites=["*"]).arrays
        trace = record(model, IDS, sites=["logprobs"])
        np.testing.assert_array_equal(trace.arrays["logprobs"], logprobs(model, IDS))

    def test_is_not_missing(self, model):
        assert check(record(model, IDS), model).missing == ()

    @pytest.mark.parametrize("name", ["logprob", "log_probs", "token_logprobs", "per_token_logps"])
    def test_other_names(self, name, model, oracle):
        trace = Trace({name: next_ones(oracle).astype(np.float32)}, IDS)
        assert list(trace.arrays) == ["logprobs"]
        assert check(trace, model).agrees

    def test_a_name_that_is_shifted_is_explained(self, model):
        with pytest.raises(TraceError, match=r"prompt_logprobs.*leave out the first"):
            check(Trace({"prompt_logprobs": np.zeros((2, 8), np.float32)}, IDS), model)

    @pytest.mark.parametrize("count", [1, 3, 7])
    def test_of_the_last_tokens(self, count, model, oracle):
        last = next_ones(oracle)[:, -count:].astype(np.float32)
        report = check(Trace({"logprobs": last}, IDS), model)
        assert report.verdict == "SEEN"
        assert report.logprobs.count == 2 * count
        assert report.logprobs.tokens[0].token >= 8 - count
        assert not check(Trace({"logprobs": last + np.float32(0.1)}, IDS), model).agrees

    def test_next_ids(self, model, oracle):
        last = np.array([5, 11])
        numbers = np.concatenate([next_ones(oracle), oracle[[0, 1], -1, last][:, None]], axis=1)
        numbers = numbers.astype(np.float32)
        every = np.concatenate([IDS[:, 1:], last[:, None]], axis=1)
        for ids in (last, last[:, None], every):
            report = check(Trace({"logprobs": numbers}, IDS, next_ids=ids), model)
            assert report.verdict == "SEEN"
            assert report.logprobs.count == 16
        wrong = numbers + np.float32([[0.0] * 7 + [0.3]])
        assert check(Trace({"logprobs": wrong}, IDS), model).agrees  # of which token is not known
        assert not check(Trace({"logprobs": wrong}, IDS, next_ids=last), model).agrees

    def test_one_sequence_without_an_axis(self, model, oracle):
        trace = Trace({"logprobs": next_ones(oracle)[0].astype(np.float32)}, IDS[0])
        assert check(trace, model).agrees

    def test_a_list_of_floats(self, model, oracle):
        """numpy.array makes float64 of what was float32."""
        numbers = np.array(next_ones(oracle).astype(np.float32).tolist())
        assert numbers.dtype == np.float64
        assert result_of(check(Trace({"logprobs": numbers}, IDS), model)).dtype == "float32"

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_may_have_anything(self, side, model):
        columns, lengths = np.arange(8), np.array([[8], [5]])
        keep = columns < lengths if side == "right" else columns >= 8 - lengths
        numbers = logprobs(model, IDS, attention_mask=keep)
        both = keep[:, 1:] & keep[:, :-1]
        numbers = np.where(both, numbers, np.float32(np.nan))
        trace = Trace({"logprobs": numbers}, IDS, attention_mask=keep)
        report = check(trace, model)
        assert report.verdict == "SEEN"
        assert report.logprobs.count == both.sum()

    def test_round_trip_through_a_file(self, model, oracle, tmp_path):
        trace = Trace({"logprobs": next_ones(oracle).astype(np.float32)}, IDS, next_ids=IDS[:, 0])
        trace.save(tmp_path / "port.safetensors")
        read = Trace.load(tmp_path / "port.safetensors")
        np.testing.assert_array_equal(read.next_ids, IDS[:, 0])
        assert check(read, model).agrees

    @pytest.mark.parametrize(
        ("arrays", "fields", "message"),
        [
            ({"logprobs": np.zeros((2, 9), np.float32)}, {}, r"expected shape \[2, 7\] .*\[2, 9\]"),
            ({"logprobs": np.zeros((2, 7), np.int64)}, {}, "logprobs: expected one of the dtypes"),
            (
                {"logprobs": np.zeros((2, 8), np.float32)},
                {"next_ids": np.array([13, 0])},
                "next_ids: expected ids from 0 to 12, got 0 to 13",
            ),
            (
                {"logprobs": np.zeros((2, 8), np.float32)},
                {"next_ids": np.array([1, 2, 3])},
                r"next_ids: expected shape \[2, 8\], or \[2\] of the last, got \[3\]",
            ),
            (
                {"logprobs": np.zeros((2, 8), np.float32)},
                {"metadata": {"temperature": "0"}},
                "metadata temperature: expected a positive number, got '0'",
            ),
            (
                {"logprobs": np.zeros((2, 7), np.float32), "lm_head": np.zeros((2, 13), "f4")},
                {},
                r"lm_head: expected shape",
            ),
            (
                {"logprobs": np.zeros((2, 7), np.float32), "lm_head": np.zeros((2, 1, 13), "f4")},
                {},
                "lm_head: expected the logits of all 8 tokens",
            ),
        ],
    )
    def test_refused(self, arrays, fields, message, model):
        with pytest.raises(TraceError, match=message):
            check(Trace(arrays, IDS, **fields), model)

    def test_without_ids(self, model):
        arrays = {"logprobs": np.zeros((2, 7), np.float32), "lm_head": np.zeros((2, 8, 13), "f4")}
        with pytest.raises(TraceError, match="logprobs: expected input_ids or next_ids"):
            check(Trace(arrays), model)


def in_any_way(a):
    """Ways to compute a log-softmax in the format of the logits."""
    m = a.max(axis=-1, keepdims=True)
    e = np.exp(a - m)
    one_by_one = np.zeros_like(m)
    for i in range(a.shape[-1]):
        one_by_one[..., 0] += e[..., i]
    largest, online = np.full_like(m, -np.inf), np.zeros_like(m)
    for i in range(a.shape[-1]):
        above = np.maximum(largest, a[..., i, None])
        online = online * np.exp(largest - above) + np.exp(a[..., i, None] - above)
        largest = above
    yield (a - m) - np.log(e.sum(axis=-1, keepdims=True))
    yield a - (m + np.log(e.sum(axis=-1, keepdims=True)))
    yield (a - m) - np.log(one_by_one)
    yield a - (largest + np.log(online))
    if (e > 1e-30).all():
        yield np.log(e / e.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("size", [2, 97, 5000])
@pytest.mark.parametrize("scale", [0.1, 5.0, 18.0])
def test_bound_holds_what_is_right(size, scale, rng):
    a = (scale * rng.standard_normal((3, size)) + scale).astype(np.float32)
    bound = Logprobs(a, None).bound(Rounding("float32", "float32"))
    for found in in_any_way(a):
        assert judge(found, bound).verdict == "PASS"
        ratio = judge(found + bound.limit.astype(np.float32) * np.float32(2.1), bound).ratio
        assert ratio > 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_bound_of_narrow_results(dtype, rng):
    a = (4 * rng.standard_normal((3, 200))).astype(dtype)
    name = np.dtype(dtype).name
    bound = Logprobs(a, None).bound(Rounding(name, "float32"))
    for found in in_any_way(a.astype(np.float32)):
        assert judge(found.astype(dtype), bound).verdict == "PASS"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_logits_that_were_rounded_where_they_were_written_out(dtype):
    """Then a log-probability is off by what its own logit lost."""
    wide = np.float32([[0.0, -8.03, -20.01]])
    narrow, name = wide.astype(dtype), np.dtype(dtype).name
    found = next(in_any_way(wide))
    assert judge(found, Logprobs(narrow, None).bound(Rounding("float32", "float32"))).ratio > 10
    how = Rounding.of("a", wide, inputs=name)
    assert judge(found, Logprobs(narrow, None).bound(how)).verdict != "FAIL"


def test_bound_is_exact_in_float64(rng):
    a = 5 * rng.standard_normal((2, 50))
    bound = Logprobs(a, None).bound(Rounding("float64", "float64"))
    assert judge(next(in_any_way(a)), bound).verdict == "PASS"
    assert bound.limit.max() < 1e-12


def test_a_token_that_cannot_come():
    a = np.float32([[0.0, -np.inf, 1.0]])
    bound = Logprobs(a, None).bound(Rounding("float32", "float32"))
    with np.errstate(all="ignore"):
        assert judge(next(in_any_way(a)), bound).verdict == "PASS"
        assert judge(np.float32([[-1.3132616, -90.0, -0.3132617]]), bound).verdict == "FAIL"


class TestSummary:
    def test_of_a_known_difference(self, model, oracle):
        d = np.linspace(-0.2, 0.3, 14).reshape(2, 7)
        trace = Trace({"logprobs": (next_ones(oracle) + d).astype(np.float32)}, IDS)
        found = check(trace, model).logprobs
        assert found.count == 14
        np.testing.assert_allclose(found.k1, d.mean(), rtol=1e-4)
        np.testing.assert_allclose(found.k3, np.mean(np.exp(-d) - 1 + d), rtol=1e-4)
        np.testing.assert_allclose(found.rms, np.sqrt(np.mean(d**2)), rtol=1e-4)
        np.testing.assert_allclose(found.largest, 0.3, rtol=1e-4)
        first = found.tokens[0]
        assert (first.sequence, first.token, first.id) == (1, 7, IDS[1, 7])
        assert found.kl is None
        assert found.normal[0].dtype == "float32"
        assert found.normal[0].largest < 1e-5

    def test_a_stated_temperature(self, model, oracle):
        cooled = 2 * oracle - np.log(np.exp(2 * oracle).sum(axis=-1, keepdims=True))
        arrays = {"logprobs": next_ones(cooled).astype(np.float32)}
        report = check(Trace(arrays, IDS, metadata={"temperature": "0.5"}), model)
        assert report.agrees
        assert report.logprobs.largest < 1e-5
        assert report.logprobs.normal[0].largest < 1e-5

    def test_divergence(self, model, oracle, rng):
        noisy = oracle + 0.1 * rng.standard_normal(oracle.shape)
        noisy -= np.log(np.exp(noisy).sum(axis=-1, keepdims=True))
        report = check(Trace({"logprobs": noisy.astype(np.float32)}, IDS), model)
        kl = np.sum(np.exp(noisy) * (noisy - oracle), axis=-1)
        np.testing.assert_allclose(report.logprobs.kl, kl.mean(), rtol=1e-3)
        np.testing.assert_allclose(report.logprobs.largest_kl, kl.max(), rtol=1e-3)
        assert "KL(the port || float64): " in str(report)

    def test_what_each_site_injects(self, model):
        """A port whose second layer is off: that is where the difference comes in."""
        names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
        trace = record(model, IDS, sites=[*names, "logprobs"])
        found = check(trace, model).logprobs.contributions
        assert [c.site for c in found] == [*names, "logprobs"]
        assert max(c.injected for c in found) < 1e-5
        noise = np.float32(0.05) * np.random.default_rng(0).standard_normal((2, 8, 10))

        def tap(name, array):
            return (array + noise).astype(np.float32) if name == "model.layers.1" else array

        arrays = {}

        def keep(name, array):
            arrays[name] = tap(name, array)
            return arrays[name]

        logits = forward(model, IDS, tap=keep).logits
        wide = logits.astype(float)
        wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
        kept = {name: arrays[name] for name in names} | {"logprobs": next_ones(wide).astype("f4")}
        summary = check(Trace(kept, IDS), model).logprobs
        by_site = {c.site: c for c in summary.contributions}
        assert by_site["model.layers.1"].injected > 0.9 * summary.rms > 1e-3
        assert by_site["model.layers.1"].inherited < 1e-5
        assert by_site["model.norm"].injected < 1e-5
        np.testing.assert_allclose(by_site["model.norm"].inherited, summary.rms, rtol=1e-3)

    def test_a_narrower_dtype_is_tried(self, model):
        """An engine that computes in bfloat16, whose log-probabilities are float32."""
        weights = random_weights(GQA, dtype=np.dtype(ml_dtypes.bfloat16))
        narrow = model_of(GQA, weights)
        logits = record(narrow, IDS, sites=["lm_head"]).arrays["lm_head"]
        found = {}

        def tap(name, array):
            found[name] = array.astype(ml_dtypes.bfloat16).astype(np.float32)
            return found[name]

        logits = forward(narrow, IDS, tap=tap).logits.astype(float)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        trace = Trace({"logprobs": next_ones(logits).astype(np.float32)}, IDS)
        report = check(trace, narrow)
        assert not report.agrees
        assert "--dtype bfloat16 would say so" in str(report).replace("\n  ", " ")
        assert check(trace, narrow, dtype="bfloat16").agrees

    def test_as_json(self, model, oracle):
        trace = Trace({"logprobs": next_ones(oracle).astype(np.float32)}, IDS)
        content = check(trace, model).to_json()
        assert content["logprobs"]["count"] == 14
        assert content["logprobs"]["normal"][0]["dtype"] == "float32"


class TestComparison:
    def test_of_two_engines(self, oracle):
        """Without a config, and in two shapes."""
        first = next_ones(oracle).astype(np.float32)
        second = np.concatenate([first + np.float32(0.01), np.ones((2, 1), "f4")], axis=1)
        for other in (first + np.float32(0.01), second, second[:, 2:-1]):
            found = compare(Trace({"logprobs": first}, IDS), Trace({"logprobs": other}, IDS))
            np.testing.assert_allclose(found.logprobs.k1, -0.01, rtol=1e-4)
            assert found.logprobs.names == ("the first", "the second")
            assert found.logprobs.normal == ()
            assert "KL(the first || the second)" in str(found)
        np.testing.assert_allclose(found.results[0].difference, 0.01 / 2.8, rtol=0.5)

    def test_of_one_token_and_of_all(self, model, oracle):
        every = record(model, IDS, sites=["logprobs"])
        whole = Trace({"logprobs": oracle.astype(np.float32)}, IDS, metadata=every.metadata)
        assert compare(every, whole).agrees
        assert compare(whole, whole).results[0].identical
        assert compare(whole, whole).logprobs.kl == 0

    def test_padding(self, oracle):
        keep = np.ones((2, 8), bool)
        keep[1, :3] = False
        first = next_ones(oracle).astype(np.float32)
        second = np.where(keep[:, 1:] & keep[:, :-1], first, np.float32(9))
        pair = [Trace({"logprobs": y}, IDS, attention_mask=keep) for y in (first, second)]
        assert compare(*pair).logprobs.rms == 0

    def test_without_ids(self, oracle):
        first = next_ones(oracle).astype(np.float32)
        found = compare(Trace({"logprobs": first}), Trace({"logprobs": first}))
        assert found.agrees
        assert found.logprobs is None


def test_with_an_executor(model, oracle):
    from concurrent.futures import ThreadPoolExecutor

    trace = Trace({"logprobs": next_ones(oracle).astype(np.float32)}, IDS)
    with ThreadPoolExecutor(1) as executor:
        report = check(trace, model, executor=executor)
    assert replace(report, seconds=0) == replace(check(trace, model), seconds=0)
