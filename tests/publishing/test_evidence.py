"""What was measured of a model: whether it is about that model, and how the card shows it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.hub_upload_server import USER, UploadHub

from mlx_fusekit import publish, samples
from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.publishing.card import CardFacts, write_card
from mlx_fusekit.publishing.evidence import Evidence, read_evidence
from mlx_fusekit.publishing.files import GgufFile, PublishedModel

REPO = f"{USER}/sql-model"


def read(folder: Path, **reports: Path) -> Evidence:
    return read_evidence(PublishedModel.open(folder), REPO, **reports)


def refused(message: str, folder: Path, **reports: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(folder, **reports)


class TestReports:
    def test_a_verified_model(
        self, hub: UploadHub, fused: Path, verify_report: Path, bench_report: Path
    ) -> None:
        report = publish(fused, REPO, verify_report=verify_report, bench_report=bench_report)
        assert report.verified
        assert not any("verif" in line for line in report.warnings)
        assert "The fine-tune was kept: mean KL " in report.card
        assert "(95 % interval " in report.card
        assert "passed" not in report.card
        assert "3 generated; medians of 2 trials" in report.card
        assert str(samples.model_path().parent) not in report.card

    def test_without_a_report_it_is_said(self, fused: Path) -> None:
        evidence = read(fused)
        assert not evidence.verified
        assert any("was not verified" in line for line in evidence.warnings)

    @pytest.mark.parametrize(
        ("verdict", "passed", "told", "shown"),
        [
            ("lost", False, "lost its fine-tune", "**The fine-tune was lost**: mean KL 2."),
            ("not judged", None, "does not judge", "kept was not judged: mean KL 2."),
        ],
    )
    def test_one_that_was_not_kept_is_said(
        self,
        facts: CardFacts,
        fused: Path,
        verify_report: Path,
        verdict: str,
        passed: bool | None,
        told: str,
        shown: str,
    ) -> None:
        value = json.loads(verify_report.read_text())
        value |= {"verdict": verdict, "passed": passed, "verdict_reason": "mean KL 2"}
        verify_report.write_text(json.dumps(value))
        evidence = read(fused, verify_report=verify_report)
        assert not evidence.verified
        assert any(told in line for line in evidence.warnings)
        assert shown in write_card(replace(facts, evidence=evidence))

    @pytest.mark.parametrize("passed", [True, False])
    def test_a_report_from_before_verdicts_judges_nothing(
        self, facts: CardFacts, fused: Path, verify_report: Path, passed: bool
    ) -> None:
        """They said passed where no bound was asked for."""
        value = json.loads(verify_report.read_text()) | {"passed": passed}
        del value["verdict"], value["verdict_reason"], value["kl_mean_ci95"]
        verify_report.write_text(json.dumps(value))
        evidence = read(fused, verify_report=verify_report)
        assert not evidence.verified
        card = write_card(replace(facts, evidence=evidence))
        assert "not judged: the report is of a version of mlx-fusekit that gave no verdict." in card

    def test_reports_of_other_models(
        self, fused: Path, verify_report: Path, bench_report: Path
    ) -> None:
        value = json.loads(verify_report.read_text())
        for change, message in (
            ({"fused": "other-model"}, "is about other-model, and not about sql-model"),
            ({"reference": "llama"}, "compares with llama, but this model was made of mlx-comm"),
            ({"weights": [0.5]}, r"adapters of the weights \[0.5\], but .* made with \[1.0\]"),
            ({"kl_mean": "low"}, "kl_mean is 'low', which is no number"),
            ({"recovered": 10**400}, "recovered is 1000.*, which is no number"),
            ({"passed": "yes"}, "has no passed"),
            ({"passed": None}, "verdict is 'kept', but passed is None"),
            ({"verdict": "fine"}, "verdict is 'fine', which `verify` never says"),
            ({"verdict": []}, "which `verify` never says"),
            ({"verdict_reason": 5}, "which `verify` never says"),
        ):
            verify_report.write_text(json.dumps(value | change))
            refused(message, fused, verify_report=verify_report)
        timed = json.loads(bench_report.read_text())
        timed["arms"]["fused"]["model"] = "/somewhere/other"
        bench_report.write_text(json.dumps(timed))
        refused("is about other, and", fused, bench_report=bench_report)
        refused("not a report", fused, bench_report=verify_report)
        refused("not a report", fused, verify_report=bench_report)

    def test_one_from_before_the_model(self, fused: Path, verify_report: Path) -> None:
        os.utime(verify_report, (1, 1))
        evidence = read(fused, verify_report=verify_report)
        assert any("is older than the model" in line for line in evidence.warnings)


class TestTables:
    def test_parity(self, facts: CardFacts, verify_report: Path, parity: dict[str, Any]) -> None:
        evidence = read_evidence(facts.model, REPO, verify_report)
        card = write_card(replace(facts, evidence=evidence))
        row = next(line for line in card.splitlines() if line.startswith("| this model |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:6] == [
            f"{parity['kl_mean']:.3g}",
            f"{parity['kl_median']:.3g}",
            f"{parity['kl_p99']:.3g}",
            f"{parity['top1_agreement']:.1%}",
            f"{parity['perplexity_fused']:.4g}",
        ]
        assert "| base without the adapter |" in card
        assert f"on {parity['tokens']:,} tokens (generated by base+adapter (seed 0))." in card

    def test_the_data_file_is_named_without_its_folder(
        self, facts: CardFacts, parity: dict[str, Any], tmp_path: Path
    ) -> None:
        report = tmp_path / "v.json"
        report.write_text(json.dumps(parity | {"data": "/home/me/data/test.jsonl"}))
        card = write_card(replace(facts, evidence=read_evidence(facts.model, REPO, report)))
        assert "(`test.jsonl`)" in card
        assert "/home" not in card

    def test_a_model_that_gives_nan(
        self, facts: CardFacts, parity: dict[str, Any], tmp_path: Path
    ) -> None:
        report = tmp_path / "v.json"
        nan = dict.fromkeys(["kl_mean", "kl_median", "kl_p99", "perplexity_fused", "recovered"])
        lost = {"passed": False, "verdict": "lost", "verdict_reason": "not in order: finite"}
        report.write_text(json.dumps(parity | nan | lost))
        card = write_card(replace(facts, evidence=read_evidence(facts.model, REPO, report)))
        assert "**The fine-tune was lost**: not in order: finite." in card

    def test_a_report_of_the_gguf_file(
        self, facts: CardFacts, parity: dict[str, Any], tmp_path: Path
    ) -> None:
        model = replace(facts.model, ggufs=(GgufFile("model.gguf", 10, "Q4_1"),))
        report = tmp_path / "v.json"
        report.write_text(json.dumps(parity | {"fused": "/home/me/sql-model/model.gguf"}))
        evidence = read_evidence(model, REPO, report)
        card = write_card(replace(facts, model=model, evidence=evidence))
        assert "| `model.gguf` in llama.cpp |" in card
        assert "/home" not in card

    def test_latency(self, facts: CardFacts, bench_report: Path, timed: dict[str, Any]) -> None:
        evidence = read_evidence(facts.model, REPO, None, bench_report)
        card = write_card(replace(facts, evidence=evidence))
        rows = [line for line in card.splitlines() if " ms | " in line]
        assert [row.split("|")[1].strip() for row in rows] == [
            "base",
            "base+adapter",
            "this model",
        ]
        ratio = timed["speedup"]["ratio"]
        assert f"Too few trials to be sure ({ratio:.3f} times as fast a token as base+ad" in card
        assert timed["environment"]["chip"].partition("(")[0] in card
