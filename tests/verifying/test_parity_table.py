"""The table of a verification, which the terminal and the model card share."""

from typing import Any

from mlx_fusekit.verifying.parity_table import parity_table

REPORT: dict[str, Any] = {
    "adapters": ["adapter"],
    "kl_mean": 0.0084123,
    "kl_median": 0.00064612,
    "kl_p99": 0.0977,
    "top1_agreement": 0.975,
    "kl_base_mean": 1.4912,
    "kl_base_median": 0.256,
    "kl_base_p99": 11.7,
    "top1_agreement_base": 0.597,
    "perplexity_reference": 2.3681,
    "perplexity_fused": 2.3894,
    "perplexity_base": 9.2622,
    "exact_match_reference": 1.0,
    "exact_match_fused": 0.5,
    "exact_match_base": None,
}


def test_base_fused_and_reference() -> None:
    table = parity_table(REPORT, "Title", fused="this model")
    assert (table.title, len(table.header), table.text_columns) == ("Title", 7, 1)
    assert table.rows == [
        ("base", "1.49", "0.256", "11.7", "59.7%", "9.262", "-"),
        ("this model", "0.00841", "0.000646", "0.0977", "97.5%", "2.389", "50.0%"),
        ("base+adapter", "-", "-", "-", "-", "2.368", "100.0%"),
    ]


def test_against_another_model_there_is_no_base() -> None:
    names = [row[0] for row in parity_table(REPORT | {"adapters": []}).rows]
    assert names == ["fused", "reference"]


def test_numbers_that_are_not_finite_are_none_in_a_report() -> None:
    nan = dict.fromkeys(["kl_mean", "kl_median", "kl_p99", "perplexity_fused"])
    assert parity_table(REPORT | nan).rows[1] == ("fused", "-", "-", "-", "97.5%", "-", "50.0%")
