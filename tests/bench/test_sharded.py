"""``mlx-fusekit bench`` under a real ``mlx.launch``: ranks that share a model."""

import json
import re
import time
from pathlib import Path

import mlx.core as mx
import pytest
from support.launching import launch
from support.tiny import LLAMA, make_adapter, make_model

from mlx_fusekit import Workload, benchmark, fuse
from mlx_fusekit.bench import sharding
from mlx_fusekit.bench.report import read_report
from mlx_fusekit.bench.sharding import run_shard
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.hub import LocalFolder

BENCH = ("-m", "mlx_fusekit", "bench", "--model", "base")
SMALL = ("-p", "4", "-g", "2", "-n", "2")
#: Ends the second rank at its third generation.
_KILLED = """
import os, signal, sys
from mlx_fusekit.bench import harness
from mlx_fusekit.cli import main
real, calls = harness.time_generation, []
def dying(*arguments, **options):
    calls.append(1)
    if os.environ["MLX_RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
harness.time_generation = dying
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make_adapter(folder / "adapter", make_model(folder / "base"), strength=4.0)
    fuse(folder / "base", folder / "adapter", folder / "fused", requantize="nearest")
    return folder


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if "error:" in line.lower()]


@pytest.mark.real
def test_two_ranks_share_what_one_has(folder: Path) -> None:
    files = ("--json", "run.json", "--load-trials", "1")
    done = launch(*BENCH, "--fused", "fused", *SMALL, *files, cwd=folder)
    assert errors(done.stderr) == []
    assert done.stdout.count("Against base") == 1, done.stderr
    assert "one of 2 ranks (ring)" in done.stdout
    found = read_report(json.loads((folder / "run.json").read_text()), "run.json")
    assert (found.environment.ranks, found.environment.backend) == (2, "ring")
    assert found.complete
    work = Workload((4,), (2,), trials=2, load_trials=0)
    alone = benchmark(folder / "base", fused=folder / "fused", workload=work)
    assert (alone.environment.ranks, alone.environment.backend) == (1, None)
    for name, arm in found.arms.items():
        whole = alone.arms[name]
        assert whole.weight_bytes / 2 < arm.weight_bytes < whole.weight_bytes
        assert len(arm.load_seconds) == 1
        assert arm.peak_memory_bytes is not None
        assert len(found.runs[0].of(name)) == 2
        shared, own = found.runs[0].equivalence[name], alone.runs[0].equivalence[name]
        assert shared.kl_mean == pytest.approx(own.kl_mean, rel=0.05, abs=1e-6)


@pytest.mark.real
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--adapter-path", "adapter"), "cannot shard a model that has adapter layers"),
        (("--fused", "nowhere"), "--fused nowhere: neither a folder"),
        (("--fused", "fused", "--json", "base/config.json"), "base/config.json: exists already"),
        (("--bogus",), "No such option"),
    ],
)
def test_a_mistake_gets_one_line_of_all_ranks(
    folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = launch(*BENCH, *arguments, *SMALL, cwd=folder)
    # The launcher may end a rank that is only starting, which says so.
    [line] = [line for line in errors(done.stderr) if "terminated" not in line]
    assert words in line
    exits = re.findall(r"Node with rank (\d) exited with code (-?\d+)", done.stderr)
    assert {rank for rank, _ in exits} == {"0", "1"}
    if arguments == ("--bogus",):
        # That is found before the ranks meet: the launcher may end the other one on its way.
        assert "2" in {code for _, code in exits} <= {"2", "143", "-15"}
    else:
        assert {code for _, code in exits} == {"1"}
    assert done.stdout.strip() == ""


@pytest.mark.real
def test_what_only_one_rank_finds_ends_all(folder: Path) -> None:
    """As where a model lies on one machine only."""
    (folder / "one.py").write_text(
        "import os, sys\nfrom mlx_fusekit.cli import main\n"
        "if os.environ['MLX_RANK'] == '1':\n    sys.argv[sys.argv.index('fused')] = 'nowhere'\n"
        "main()\n"
    )
    done = launch("one.py", *BENCH[2:], "--fused", "fused", *SMALL, cwd=folder)
    [line] = errors(done.stderr)
    assert "--fused nowhere: neither a folder" in line
    for rank in range(2):
        assert f"Node with rank {rank} exited with code 1" in done.stderr


@pytest.mark.real
def test_a_rank_that_is_killed_ends_the_other(folder: Path) -> None:
    (folder / "killed.py").write_text(_KILLED)
    started = time.monotonic()
    files = ("--json", "killed.json", "--load-trials", "0")
    done = launch("killed.py", *BENCH[2:], "--fused", "fused", *SMALL, *files, cwd=folder)
    assert time.monotonic() - started < 90
    assert "Node with rank 1 exited with code -9" in done.stderr
    assert "Node with rank 0 " in done.stderr
    [line] = errors(done.stderr)
    # The launcher's signal, or the broken connection: what comes first.
    assert "lost another rank" in line or "terminated" in line or "asked to end" in line
    assert not (folder / "killed.json").exists()


def test_a_class_that_cannot_be_sharded_is_named(tmp_path: Path) -> None:
    config = {"model_type": "phi3", **{k: v for k, v in LLAMA.items() if k != "model_type"}}
    model = make_model(tmp_path / "model", config)
    with pytest.raises(CheckpointError, match=r"m: mlx-lm's class for phi3 has no shard\(\)"):
        run_shard(LocalFolder(model), "m", mx.distributed.init())


def test_heads_are_shared_evenly_or_not_at_all() -> None:
    place = ("layers.0.self_attn", "n_kv_heads")
    for before, after in ((8, 2), (1, 1), (2, 1), (8, 8)):
        sharding._check_heads({place: before}, {place: after}, 4, "m")
    for before, after in ((6, 1), (2, 0), (5, 1)):
        with pytest.raises(CheckpointError, match=f"self_attn.n_kv_heads is {before}"):
            sharding._check_heads({place: before}, {place: after}, 4, "m")
