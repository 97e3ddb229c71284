"""Fits latency and bandwidth of collectives to seconds by message size."""

import pytest

from unitransformer.machine.alpha_beta import Collective, CollectiveTiming, fit, ring

SIZES = [1000 * 4**power for power in range(7)]  # 1 kB to 4 MB


def points(
    collective: Collective, num_ranks: int, *, alpha_s: float, bytes_per_s: float
) -> list[CollectiveTiming]:
    steps, sent = ring(collective, num_ranks)
    return [
        CollectiveTiming(
            size_bytes=size,
            calls=2,
            seconds=(2 * (steps * alpha_s + sent * size / bytes_per_s),) * 3,
        )
        for size in SIZES
    ]


def test_a_ring_all_reduce_of_four_ranks_sends_three_quarters_twice() -> None:
    assert ring("all_reduce", 4) == (6, 1.5)
    assert ring("all_gather", 4) == ring("reduce_scatter", 4) == (3, 0.75)
    assert ring("broadcast", 4) == (3, 1.0)


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter", "broadcast"])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_the_fit_recovers_the_latency_and_bandwidth_of_exact_points(
    collective: Collective, num_ranks: int
) -> None:
    fitted = fit(
        collective, num_ranks, points(collective, num_ranks, alpha_s=1e-5, bytes_per_s=4e9)
    )
    assert fitted.alpha_s == pytest.approx(1e-5)
    assert fitted.bytes_per_s == pytest.approx(4e9)
    assert fitted.largest_error < 1e-9


def test_a_predicted_call_takes_alpha_plus_size_over_bandwidth() -> None:
    # Two ranks: one step, half of 100 MB at 100 MB/s, plus half a second of latency.
    line = fit("all_gather", 2, points("all_gather", 2, alpha_s=0.5, bytes_per_s=1e8))
    assert line.predict_s(1e8) == pytest.approx(1.0)


def test_every_second_size_is_held_out_except_both_ends() -> None:
    fitted = fit("all_reduce", 2, points("all_reduce", 2, alpha_s=1e-5, bytes_per_s=4e9))
    assert list(fitted.held_out_error) == SIZES[1:-1:2]
    even = fit("all_reduce", 2, points("all_reduce", 2, alpha_s=1e-5, bytes_per_s=4e9)[:-1])
    assert list(even.held_out_error) == SIZES[1:-2:2]


@pytest.mark.parametrize("index", [1, 3, 5])
def test_a_held_out_size_that_takes_twice_as_long_has_an_error_of_a_half(index: int) -> None:
    injected = points("all_reduce", 2, alpha_s=1e-5, bytes_per_s=4e9)
    injected[index] = CollectiveTiming(
        size_bytes=SIZES[index], calls=1, seconds=(injected[index].call_s * 2,) * 3
    )
    fitted = fit("all_reduce", 2, injected)
    assert fitted.held_out_error[SIZES[index]] == pytest.approx(-0.5)
    assert fitted.largest_error == pytest.approx(0.5)


@pytest.mark.parametrize("index", [0, 2, 4, 6])
def test_a_fitted_size_that_takes_four_times_as_long_raises_the_error(index: int) -> None:
    injected = points("all_reduce", 2, alpha_s=1e-5, bytes_per_s=4e9)
    injected[index] = CollectiveTiming(
        size_bytes=SIZES[index], calls=1, seconds=(injected[index].call_s * 4,) * 3
    )
    assert fit("all_reduce", 2, injected).largest_error > 0.1


def test_one_stall_does_not_change_the_fit_to_medians() -> None:
    assert CollectiveTiming(size_bytes=8, calls=2, seconds=(4.0, 4.0, 90.0)).call_s == 2.0


def test_fitted_latency_is_never_negative() -> None:
    quick_first = [
        CollectiveTiming(size_bytes=size, calls=1, seconds=(size**1.2 / 1e9,)) for size in SIZES
    ]
    fitted = fit("broadcast", 2, quick_first)
    assert fitted.alpha_s == 0.0
    assert fitted.bytes_per_s > 0


def test_points_that_cannot_be_fitted_are_refused() -> None:
    good = points("all_reduce", 2, alpha_s=1e-5, bytes_per_s=4e9)
    with pytest.raises(ValueError, match="4 sizes; at least 5 different ones needed"):
        fit("all_reduce", 2, good[:4])
    with pytest.raises(ValueError, match="different"):
        fit("all_reduce", 2, [*good[:4], good[0]])
    with pytest.raises(ValueError, match="1 rank sends nothing"):
        fit("all_reduce", 1, good)
    shrinking = [
        CollectiveTiming(size_bytes=size, calls=1, seconds=(1.0 / size,)) for size in SIZES
    ]
    with pytest.raises(ValueError, match="does not grow with the size"):
        fit("all_reduce", 2, shrinking)
    with pytest.raises(ValueError, match="not above 0"):
        CollectiveTiming(size_bytes=8, calls=1, seconds=(1.0, 0.0))
