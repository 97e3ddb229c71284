"""Tests shares of hand-made traces. Steps take 100 microseconds, so shares are percentages."""

from typing import Any

import pytest

from unitransformer.profiling.trace_breakdown import (
    BACKWARD,
    HEAD,
    NETWORK,
    NODE,
    WINDOW,
    WORK_KINDS,
    time_shares,
    window_seconds,
)

MAIN, BACK, GLOO = 1, 2, 3
Event = dict[str, Any]


def event(name: str, start: float, end: float, *, cat: str = "cpu_op", **args: Any) -> Event:
    thread = args.pop("tid", MAIN)
    place = {"ph": "X", "cat": cat, "pid": 0, "tid": thread, "ts": start, "dur": end - start}
    return {**place, "name": name, "args": args}


def mark(name: str, start: float, end: float) -> Event:
    return event(name, start, end, cat="user_annotation")


def arrow(number: int, source: float, target: float, *, thread: int = MAIN) -> list[Event]:
    ends = [("s", source, MAIN), ("f", target, thread)]
    return [
        {"ph": ph, "cat": "fwdbwd", "id": number, "pid": 0, "tid": tid, "ts": ts}
        for ph, ts, tid in ends
    ]


def node(name: str, start: float, end: float, number: int, **args: Any) -> list[Event]:
    of = {"Sequence number": number, "Fwd thread id": 1, **args}
    return [event(NODE + name, start, end, **of), event(name, start + 1, end - 1, **of)]


def percent(*events: Event, **options: Any) -> dict[str, float]:
    trace = {"traceEvents": [mark(WINDOW, 0, 100), *events]}
    shares = time_shares(trace, **options)
    assert tuple(shares) == WORK_KINDS
    assert sum(shares.values()) == pytest.approx(1)
    return {part: round(100 * share, 6) for part, share in shares.items() if share}


def test_an_empty_step_is_idle() -> None:
    assert percent() == {"idle": 100}


def test_an_operator_counts_without_the_operators_that_it_calls() -> None:
    shares = percent(event("aten::linear", 0, 50), event("aten::addmm", 10, 40))
    assert shares == {"matrix multiply": 30, "other": 20, "idle": 50}


def test_operators_called_by_a_matmul_or_attention_count_for_it() -> None:
    shares = percent(
        event("aten::addmm", 0, 20),
        event("aten::copy_", 5, 10),
        event("aten::scaled_dot_product_attention", 20, 60),
        event("aten::bmm", 30, 50),
    )
    assert shares == {"matrix multiply": 20, "attention": 40, "idle": 40}


def test_a_matmul_in_the_head_counts_for_the_head() -> None:
    shares = percent(
        mark(NETWORK, 0, 60),
        event("aten::mm", 0, 20),
        mark(HEAD, 25, 60),
        event("aten::mm", 30, 50),
    )
    assert shares == {"matrix multiply": 20, "head and loss": 20, "idle": 60}


def test_the_backward_of_each_part_counts_to_that_part() -> None:
    shares = percent(
        mark(NETWORK, 0, 30),
        event("aten::mm", 0, 10),
        mark(HEAD, 10, 30),
        event("aten::linear", 12, 22),
        mark(BACKWARD, 40, 100),
        *arrow(7, 12, 41),
        *node("HeadBackward", 40, 60, number=5),
        event("aten::mm", 45, 55),
        *arrow(8, 0, 61),
        *node("MmBackward", 60, 80, number=4),
        event("aten::mm", 65, 75),
    )
    # 10 forward and 20 backward for the head; 10 and 10 for the multiply, whose node is 10 more.
    assert shares == {"head and loss": 30, "matrix multiply": 20, "other": 10, "idle": 40}


def test_the_optimizer_ends_where_the_network_begins_again() -> None:
    shares = percent(
        mark("Optimizer.step#AdamW.step", 0, 100),
        mark(NETWORK, 10, 60),
        event("aten::mm", 20, 50),
        event("aten::_fused_adamw_", 70, 90),
    )
    # Lightning's closure runs inside of the optimizer step.
    assert shares == {"matrix multiply": 30, "optimizer": 50, "idle": 20}


def test_python_time_in_the_data_loader_counts_as_data() -> None:
    shares = percent(mark("enumerate(DataLoader)#_Single.__next__", 0, 30))
    assert shares == {"data": 30, "idle": 70}


def test_only_events_in_the_window_count() -> None:
    assert percent(event("aten::mm", -50, 0), event("aten::mm", 0, 25)) == {
        "matrix multiply": 25,
        "idle": 75,
    }


def test_communication_in_another_thread_counts_while_the_main_thread_waits() -> None:
    shares = percent(
        event("aten::mm", 0, 40),
        event("gloo:all_reduce", 20, 60, tid=GLOO),
        event("aten::add", 0, 100, tid=GLOO),
    )
    assert shares == {"matrix multiply": 40, "communication": 20, "idle": 40}


def test_waiting_for_gathered_weights_is_communication() -> None:
    gathering = mark("FSDP::all_gather (network.transformer_layers.1)", 10, 50)
    shares = percent(mark(HEAD, 0, 90), gathering, event("fsdp::all_gather_copy_in", 20, 30))
    assert shares == {"communication": 40, "idle": 60}


def test_a_separate_backward_thread_counts_while_the_main_thread_waits() -> None:
    shares = percent(
        event("aten::mm", 0, 40),
        *node("MulBackward", 30, 80, number=1, tid=BACK),
    )
    assert shares == {"matrix multiply": 40, "other": 40, "idle": 20}


def test_a_head_inside_a_compiled_graph_is_recognized_by_its_shape() -> None:
    multiplies = [
        event("aten::mm", 0, 40, **{"Input Dims": [[8, 16], [16, 999]]}),
        event("aten::mm", 40, 60, **{"Input Dims": [[8, 16], [16, 16], []]}),
    ]
    shares = percent(*multiplies, num_classes=999)
    assert shares == {"head and loss": 40, "matrix multiply": 20, "idle": 40}


def test_kernels_count_under_the_operator_that_launched_them() -> None:
    def kernel(name: str, start: float, end: float, launched_by: int) -> Event:
        return event(name, start, end, cat="kernel", tid=7, **{"External id": launched_by})

    shares = percent(
        event("aten::mm", 0, 1, **{"External id": 1}),
        mark(HEAD, 2, 9),
        event("aten::mm", 3, 4, **{"External id": 2}),
        kernel("sm90_xmma_gemm", 10, 40, 1),
        kernel("sm90_xmma_gemm", 40, 60, 2),
        kernel("flash_fwd_kernel", 60, 70, 99),
        kernel("triton_red_fused__log_softmax_nll_loss_forward_3", 70, 75, 99),
        kernel("triton_poi_fused_add_0", 75, 80, 99),
        on_gpu=True,
    )
    assert shares == {
        "matrix multiply": 30,
        "attention": 10,
        "head and loss": 25,
        "other": 5,
        "idle": 30,
    }


def test_a_range_that_is_repeated_for_each_stream_of_a_gpu_counts_once() -> None:
    events = [
        event("ampere_sgemm", 0, 25, cat="kernel", tid=7),
        *(event(WINDOW, 5, 95, cat="gpu_user_annotation", tid=stream) for stream in (7, 20, 24)),
    ]
    assert percent(*events, on_gpu=True) == {"matrix multiply": 25, "idle": 75}
    trace = {"traceEvents": [mark(WINDOW, 0, 100), *events, *arrow(1, 0, 1)]}
    assert window_seconds(trace) == pytest.approx(100e-6)


def test_a_trace_of_a_gpu_without_kernels_has_a_reason_instead_of_shares() -> None:
    operators = [event("aten::mm", 0, 50), event("gemm", 100, 150, cat="kernel", tid=7)]
    with pytest.raises(ValueError, match=r"no GPU kernel in the traced steps: CUPTI.*stop that"):
        percent(*operators, on_gpu=True)
    assert percent(*operators) == {"matrix multiply": 50, "idle": 50}


def test_only_exposed_communication_counts_on_a_gpu() -> None:
    shares = percent(
        event("sm90_xmma_gemm", 0, 50, cat="kernel", tid=7),
        event("ncclDevKernel_AllReduce", 20, 80, cat="kernel", tid=8),
        on_gpu=True,
    )
    assert shares == {"matrix multiply": 50, "communication": 30, "idle": 20}


def test_a_step_cut_by_validation_has_two_windows() -> None:
    pieces = [mark(WINDOW, 0, 40), mark(WINDOW, 60, 100)]
    pieces += [event("aten::mm", *span) for span in ((0, 40), (40, 60), (60, 100))]
    assert time_shares({"traceEvents": pieces})["matrix multiply"] == 1


def test_a_trace_without_training_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="not made by --trace"):
        time_shares({"traceEvents": [event("aten::mm", 0, 1)]})
