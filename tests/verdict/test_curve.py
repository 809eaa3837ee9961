"""Laws fitted to figures over amounts: simulated ones are held by their intervals, and what is no law does no harm."""

import numpy as np
import pytest

from ftjax.errors import FtjaxError
from ftjax.verdict import curve

AMOUNTS = (32, 64, 128, 256, 512, 1024)
LAWS = {  # a, b, c, n0: bent, hardly bent, nearly at its end, with a plateau
    "bent": (0.08, 0.9, 0.5, 0),
    "slow": (0.0, 0.5, 0.12, 0),
    "ended": (0.1, 3.0, 1.0, 0),
    "plateau": (0.1, 8.0, 0.6, 100),
}


def error(law, n):
    a, b, c, n0 = LAWS[law]
    return a + b * (n + n0) ** -c


def spread(n):
    """Few rows part the runs more than many do."""
    return 0.006 * np.sqrt(1 + 200 / n)


def simulated(law, rng, amounts=AMOUNTS, runs=3, noise=0.0):
    """Accuracies of a law, shifted by the rows that all are measured on; and the shift."""
    shift = noise * rng.standard_normal()
    return {n: 1 - (error(law, n) + shift + spread(n) * rng.standard_normal(runs)) for n in amounts}, shift


@pytest.mark.parametrize("times", (4, 8))
def test_the_interval_beyond_the_points_holds_the_truth(times):
    rng, held, draws = np.random.default_rng(times), [], 200
    for i in range(draws):
        law = list(LAWS)[i % len(LAWS)]
        points, shift = simulated(law, rng, noise=0.01)
        found, n = curve.fit(points, noise=0.01, seed=i), times * AMOUNTS[-1]
        far, here = found.predict(n), found.predict(n, same_rows=True)
        runs = spread(n) * rng.standard_normal(3).mean()
        other = 1 - error(law, n) - 0.01 * rng.standard_normal() - runs
        same = 1 - error(law, n) - shift - runs
        held.append(
            (far.low <= 1 - error(law, n) <= far.high, far.low <= other <= far.high, here.low <= same <= here.high)
        )
        assert here.high - here.low < far.high - far.low < 0.25
    truth, other, same = np.mean(held, axis=0)
    assert truth >= 0.93 and other >= 0.9 and same >= 0.9


def test_a_law_without_noise_is_found_and_says_what_more_brings():
    found = curve.fit({n: [1 - error("bent", n)] * 2 for n in AMOUNTS})
    for n in (16, 300, 8192):
        value, low, high = found.predict(n)
        assert value == pytest.approx(1 - error("bent", n), abs=0.003) and low <= value <= high
    gain = error("bent", 1024) - error("bent", 2048)
    assert found.gain().value == pytest.approx(gain, abs=1e-3)
    text = found.sentence()
    assert text.startswith(f"twice the data would bring about +{found.gain().value:.2g} (")
    loss = curve.fit({n: [1.5 + 4 * n**-0.3] for n in AMOUNTS}, higher=False)
    assert loss.predict(4096).value == pytest.approx(1.5 + 4 * 4096**-0.3, abs=0.03) and loss.gain().value < 0
    assert curve.fit({n: [1.0, 1.0] for n in AMOUNTS}).predict(10_000).value == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ("flat", "rising", "noise"))
def test_what_is_no_law_gets_a_wide_interval(kind):
    rng = np.random.default_rng(3)
    means = {
        "flat": np.full(6, 0.3),
        "rising": np.linspace(0.2, 0.35, 6),  # the error rises with more data
        "noise": rng.uniform(0.2, 0.5, 6),
    }[kind]
    points = {n: 1 - (m + 0.01 * rng.standard_normal(3)) for n, m in zip(AMOUNTS, means)}
    found = curve.fit(points, noise=0.01)
    far, gain = found.predict(8 * AMOUNTS[-1]), found.gain()
    spread = np.ptp([p.mean() for p in points.values()])
    assert far.high - far.low > max(spread, 0.04) and 0 < far.low < far.high <= 1.1
    assert gain.low < 0 < gain.high


def test_wider_beyond_than_among_the_points_and_with_fewer_of_them():
    points, _ = simulated("slow", np.random.default_rng(0))
    whole, few = curve.fit(points), curve.fit({n: points[n] for n in AMOUNTS[:4]})

    def width(found, n):
        return np.subtract(found.predict(n).high, found.predict(n).low)

    assert width(whole, 1024) < width(whole, 8192) < width(few, 8192)
    assert whole.predict(2048) == curve.fit(dict(reversed(points.items()))).predict(2048)


def test_too_few_amounts_and_what_is_no_number_are_refused():
    with pytest.raises(FtjaxError, match="at least 4 different amounts; found 3"):
        curve.fit({1: [0.1], 2: [0.2], 4: [0.3]})
    with pytest.raises(FtjaxError, match="amounts above 0"):
        curve.fit({0: [0.1], 2: [0.2], 4: [0.3], 8: [0.4]})
    with pytest.raises(FtjaxError, match="the finite score of at least one run"):
        curve.fit({1: [0.1], 2: [0.2], 4: [float("nan")], 8: [0.4]})


def test_a_report_is_checked_on_an_amount_that_the_law_was_not_fitted_to():
    points, _ = simulated("bent", np.random.default_rng(1))
    whole = (8192, [1 - error("bent", 8192)] * 3)
    said = curve.report(points, whole=whole, at=(100_000,), noise=0.01)
    check = said["check"]
    assert check["inside"] and check["amount"] == 8192 and check["low"] < check["measured"] < check["high"]
    assert not curve.report(points, whole=(8192, [0.5]), noise=0.01)["check"]["inside"]
    assert said["says"].startswith("twice the data") and len(said["points"]) == 7
    assert said["law"][-1]["amount"] == pytest.approx(100_000) and said["predicted"][0]["amount"] == 100_000
    few = curve.report({8: [0.5], 16: [0.6]}, whole=whole)
    assert few["check"] is None and few["law"] == [] and "found 3" in few["says"]
