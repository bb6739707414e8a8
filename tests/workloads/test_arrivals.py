import math
import statistics

import pytest

from engine.errors import ConfigError
from workloads.arrivals import ArrivalConfig, arrival_times


def gaps(config: ArrivalConfig, count: int = 4000) -> list[float]:
    times = arrival_times(config, count)
    return [b - a for a, b in zip([0.0, *times], times, strict=False)]


def test_all_at_once_by_default() -> None:
    assert arrival_times(ArrivalConfig(), 3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, math.inf])
def test_gaps_have_the_asked_mean_and_spread(burstiness: float) -> None:
    """A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k)."""
    found = gaps(ArrivalConfig(request_rate=5.0, burstiness=burstiness))
    assert statistics.mean(found) == pytest.approx(0.2)
    variation = statistics.pstdev(found) / 0.2
    assert variation == pytest.approx(1 / math.sqrt(burstiness), abs=0.1)
    assert min(found) >= 0


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first = arrival_times(ArrivalConfig(request_rate=2.0, seed=1), 50)
    assert first == arrival_times(ArrivalConfig(request_rate=2.0, seed=1), 50)
    assert first != arrival_times(ArrivalConfig(request_rate=2.0, seed=2), 50)


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 5.5), ("exponential", math.sqrt(10))])
def test_ramps_change_the_rate(strategy: str, middle: float) -> None:
    found = gaps(
        ArrivalConfig(
            ramp_up_strategy=strategy,
            ramp_up_start_rps=1,
            ramp_up_end_rps=10,
            burstiness=math.inf,
        ),
        101,
    )
    assert [1 / found[0], 1 / found[50], 1 / found[100]] == pytest.approx([1, middle, 10])


def test_a_ramp_from_nothing_gets_going() -> None:
    config = ArrivalConfig(
        ramp_up_strategy="linear", ramp_up_start_rps=0, ramp_up_end_rps=2, burstiness=math.inf
    )
    assert arrival_times(config, 1) == [10.0]


@pytest.mark.parametrize(
    "options",
    [
        {"request_rate": 0.0},
        {"request_rate": math.nan},
        {"burstiness": -1.0},
        {"ramp_up_strategy": "steep", "ramp_up_start_rps": 1, "ramp_up_end_rps": 2},
        {"ramp_up_strategy": "linear", "ramp_up_start_rps": 1},
        {"ramp_up_strategy": "exponential", "ramp_up_start_rps": 0, "ramp_up_end_rps": 2},
        {
            "ramp_up_strategy": "linear",
            "ramp_up_start_rps": 1,
            "ramp_up_end_rps": 2,
            "request_rate": 3.0,
        },
    ],
)
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(ConfigError):
        ArrivalConfig(**options)
