"""Numbers as people read them."""

from collections.abc import Callable

import pytest

from mlx_fusekit import figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.012345, "0.0123"),
        (9.999, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (12345.6, "12,346"),
        (-1.5, "-1.50"),
    ],
)
def test_three_figures(value: float, text: str) -> None:
    assert figures.number(value) == text


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (figures.count(1234567), "1,234,567"),
        (figures.about(1234567), "1,230,000"),
        (figures.about(12), "12"),
        (figures.setting(20.0), "20"),
        (figures.setting(1e-9), "1e-09"),
        (figures.milliseconds(0.02404), "24.0 ms"),
        (figures.in_seconds(0.442), "0.442 s"),
        (figures.in_seconds(3600.2), "3,600 s"),
        (figures.bits(4.5078), "4.51"),
        (figures.share(0.9749), "97.5%"),
        (figures.share(0.9943, 2), "99.43%"),
        (figures.share(0.5, 0), "50%"),
        (figures.growth(0.05), "+5.0%"),
        (figures.growth(-0.05), "-5.0%"),
        (figures.ratio(1.0561), "1.056"),
        (figures.ratio(1.0561, 2), "1.06"),
        (figures.nats(0.000123456), "0.000123"),
        (figures.perplexity(3.71834), "3.718"),
        (figures.error(0.0123), "0.012"),
        (figures.rms(0.0206), "2.06e-02"),
    ],
)
def test_each_quantity(shown: str, text: str) -> None:
    assert shown == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (75_790_402, "75.8 MB"),
        (4_500_000_000, "4.50 GB"),
        (2_000_000_000_000, "2000.00 GB"),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert figures.size(nbytes) == text


@pytest.mark.parametrize(
    "figure",
    [
        figures.number,
        figures.setting,
        figures.milliseconds,
        figures.in_seconds,
        figures.size,
        figures.share,
        figures.ratio,
        figures.nats,
        figures.perplexity,
        figures.error,
        figures.rms,
    ],
)
def test_what_is_not_known_is_a_dash(figure: Callable[[None], str]) -> None:
    assert figure(None) == "-"
