"""The arithmetic of a result, its JSON and its tables, from times that the test makes up."""

import json

import pytest
from threadpoolctl import threadpool_info

from llama_layers.bench import cpu
from llama_layers.bench.cost import Cost
from llama_layers.bench.result import Case, Limit, Result
from llama_layers.bench.table import markdown, milliseconds
from llama_layers.bench.threads import BlasThreads


def result(**seconds):
    """Reading 2 MB takes 1 ms at the best, 3 Mflop 1 ms."""
    case = Case("S = 1", Cost(2_000_000, 1_500_000), None, seconds)
    return Result(
        "Something",
        2,
        {"processor": "one"},
        Limit("reading", [1e9, 2e9, 1.5e9]),
        Limit("multiplying", [3e9, 1e9]),
        dict.fromkeys(seconds, "float32"),
        [case],
    )


def test_ratios_of_best_and_median():
    case = result(llama_layers=[4.0, 2.0, 10.0], other=[3.0, 6.0, 5.0]).cases[0]
    assert (case.best("other"), case.median("other")) == (3.0, 5.0)
    assert case.ratios("other") == (3.0 / 2.0, 5.0 / 4.0)
    assert case.ratios("llama_layers") == (1.0, 1.0)


@pytest.mark.parametrize(
    ("nbytes", "flops", "limit"),
    [
        (2_000_000, 1_500_000, (1e-3, "reading")),
        (2_000_000, 6_000_000, (2e-3, "multiplying")),
    ],
)
def test_the_longer_limit_counts_at_its_best_rate(nbytes, flops, limit):
    made = result(llama_layers=[4e-3, 3e-3])
    case = Case("", Cost(nbytes, flops), None, {"llama_layers": [5e-3, 4e-3]})
    assert made.limit(case) == pytest.approx(limit)
    assert made.share(case, "llama_layers") == pytest.approx(limit[0] / 4e-3)


def test_json_comes_back():
    made = result(llama_layers=[4e-3, 2e-3], other=[3e-3, 6e-3])
    content = json.loads(json.dumps(made.to_json()))
    assert Result.from_json(content) == made
    assert content["cases"][0]["limit"] == {"seconds": 1e-3, "by": "reading"}
    assert content["cases"][0]["summary"]["other"] == pytest.approx(
        {
            "best": 3e-3,
            "median": 4.5e-3,
            "share_of_limit": 1 / 3,
            "best_over_ours": 1.5,
            "median_over_ours": 1.5,
        }
    )


def test_json_of_another_format():
    with pytest.raises(ValueError, match="expected a benchmark of format 1, got 2"):
        Result.from_json({"format": 2})


def test_markdown():
    made = result(llama_layers=[4e-3, 2e-3, 3e-3], other=[3e-3, 6e-3, 6e-3])
    lines = markdown(made).splitlines()
    assert lines[2:7] == [
        "|  |  | best, ms | median, ms | of the limit | time / ours |",
        "|---|---|---|---|---|---|",
        "| S = 1 | limit: reading | 1.00 |  |  |  |",
        "|  | llama_layers | 2.00 | 3.00 | 50 % |  |",
        "|  | other | 3.00 | 6.00 | 33 % | 1.50 / 2.00 |",
    ]
    assert "- reading: 2 (the worst of 3 tries 1) GB/s: reading" in lines


def test_markdown_of_tokens_and_nobody_else():
    made = result(llama_layers=[4e-3, 2e-3])
    made.cases[0] = Case("512 tokens", Cost(2_000_000, 0), 512, {"llama_layers": [4e-3, 2e-3]})
    assert markdown(made).splitlines()[2:6] == [
        "|  |  | best, ms | median, ms | of the limit | tokens/s |",
        "|---|---|---|---|---|---|",
        "| 512 tokens | limit: reading | 1.00 |  |  | 512000.0 |",
        "|  | llama_layers | 2.00 | 3.00 | 50 % | 256000.0 |",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.2345, "1234"), (0.012345, "12.3"), (0.0012345, "1.23"), (12e-6, "0.012")],
)
def test_milliseconds(seconds, text):
    assert milliseconds(seconds) == text


def blas_threads():
    return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cpu, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(cpu, "SQUARE", 8)


def test_rates_are_work_over_time(small, monkeypatch):
    # Reading takes 2, 4 and 8 seconds, the products of 2 * 8^3 operations 1, 2 and 5.
    times = iter([0.0, 2.0, 3.0, 7.0, 8.0, 16.0, 20.0, 21.0, 22.0, 24.0, 25.0, 30.0])
    monkeypatch.setattr(cpu.time, "perf_counter", times.__next__)
    probed = cpu.Cpu(1)
    probed.probe()
    reading, multiplying = probed.reading, probed.multiplying
    assert reading.rates == [2048, 1024, 512]
    assert multiplying.rates == [1024, 512, 1024 / 5]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_thread_reads_its_part_with_one_blas_thread(count, small, monkeypatch):
    read, seen = [], []

    def dot(halves):
        read.append(sum(half.size for half in halves))
        seen.append(blas_threads())

    monkeypatch.setattr("llama_layers.bench.cpu._dot", dot)
    probed = cpu.Cpu(count)
    with BlasThreads().limited_to(2):
        probed.probe()
    assert len(read) == count * cpu.TRIES
    assert sum(read) == cpu.TRIES * (1 << 12) // 4
    assert seen == [{1}] * len(read)


def test_threads_are_set_and_put_back():
    before, threads = blas_threads(), BlasThreads()
    with threads.limited_to(2):
        assert blas_threads() == {2}
        with threads.limited_to(1):
            assert blas_threads() == {1}
        assert blas_threads() == {2}
    assert blas_threads() == before
