"""The tables of a benchmark, from chosen figures."""

from dataclasses import replace

from support.exercise_reports import make_bench

from mlx_fusekit.bench.environment import Environment
from mlx_fusekit.bench.report import BenchReport
from mlx_fusekit.bench.tables import PAIRED, all_tables, comparison, machine, medians, what_is_timed
from mlx_fusekit.tables import Table

FIRST, GAP = "ttft_seconds", "tpot_seconds"


def tables(report: BenchReport) -> dict[str, Table]:
    return {block.title: block for block in all_tables(report) if isinstance(block, Table)}


def decision(report: BenchReport) -> dict[str, str]:
    found = tables(report)["Is fusing worth it? (fused for base+adapter)"]
    return {name: value for name, value in found.rows if name}


def test_what_is_timed_and_how_long_it_took() -> None:
    report = make_bench(adapted=0.012, fused=0.01, noise=0)
    run = report.runs[0]
    assert what_is_timed(run) == "32 prompt tokens, 4 generated; medians of 10 trials"
    assert medians(run, "base+adapter", (FIRST,)) == ("48.0 ms",)
    assert medians(run, "fused") == ("40.0 ms", "10.1 ms", "99.3")
    times = tables(report)[what_is_timed(run)]
    assert [row[0] for row in times.rows] == ["base", "base+adapter", "fused"]
    assert times.rows[2] == ("fused", "40.0 ms", "10.1 ms", "10.2 ms", "800", "99.3", "0.0702 s")


def test_a_ratio_is_not_mistaken_for_that_of_the_medians() -> None:
    """Beside 146 and 154 ms may stand 0.952."""
    blocks = list(all_tables(make_bench()))
    titles = [block.title if isinstance(block, Table) else block for block in blocks]
    assert titles[titles.index("Against base+adapter") + 1] == PAIRED


def test_an_interrupted_run_says_so() -> None:
    report = replace(make_bench(), complete=False)
    assert any(title.endswith("(INCOMPLETE)") for title in tables(report))


def test_the_decision() -> None:
    faster = decision(make_bench(adapted=0.012, fused=0.01, noise=0))
    assert faster["speed"] == "fused is faster: 1.200 [1.200, 1.200] times as fast a token"
    assert faster["time"] == "each 1,000 tokens it saves 2.01 s"
    assert faster["break-even"] == "fusing took 20.0 s: 9,934 tokens"
    assert faster["disk"] == "1 adapter: 2.3 MB swappable, 1.7 MB fused"
    slower = decision(make_bench(fused=0.014))
    assert slower["time"].startswith("each 1,000 tokens it loses")
    assert slower["break-even"] == "never: it is slower"
    few = decision(make_bench(trials=3))
    assert few["speed"].endswith("too few trials to be sure (-n)")
    assert few["break-even"] == "cannot be told, as the speed cannot"
    unknown = decision(replace(make_bench(), fuse_seconds=None))
    assert unknown["break-even"] == "give --fuse-seconds to see when fusing has paid"


def test_what_was_not_measured_is_a_dash() -> None:
    costs = tables(make_bench())["What they cost"]
    assert [row[-1] for row in costs.rows] == ["-", "-", "3.0 MB"]


def test_several_runs_and_their_machines() -> None:
    here = replace(
        Environment.read(), chip="M9", cores=8, memory_bytes=16_000_000_000, os="macOS 99"
    )
    report = make_bench(environment=here, noise=0)
    assert machine(here) == "M9, 8 cores, 16.00 GB, macOS 99"
    found = comparison({"a.json": report, "b.json": make_bench()})
    assert found.rows[0] == ("a.json (M9)", "p32 g4", "12.1 ms", "10.1 ms", found.rows[0][-1])
    assert found.rows[0][-1] == "1.200 [1.200, 1.200]"
