"""Tests which errors mean that memory ran out, in every form that torch and others give them."""

import errno

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

from unitransformer.launch.failures import describe_failure, failure_of, is_out_of_memory
from unitransformer.launch.signals import Stopped

NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error (run "
    "with NCCL_DEBUG=INFO for details), NCCL version 2.28.3\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
LOST = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, remote process exited or "
    "there was a network error, NCCL version 2.28.3\nncclRemoteError: A call failed possibly "
    "due to a network error or a remote process exiting prematurely.\nLast error:\n"
)


def host_allocation() -> RuntimeError:
    with pytest.raises(RuntimeError) as actual:
        torch.empty(1 << 62, dtype=torch.uint8)
    return actual.value


def following(error: BaseException, cause: BaseException) -> BaseException:
    """Returns `error` as raised from `cause`."""
    try:
        raise error from cause
    except type(error) as raised:
        return raised


def while_handling(error: BaseException, cause: BaseException) -> BaseException:
    """Returns `error` as raised while `cause` was handled, which `from None` hides."""
    try:
        try:
            raise cause
        except type(cause):
            raise error from None
    except type(error) as raised:
        return raised


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")
FORMS = {
    "torch's allocator": CUDA,
    "CUDA": torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be async"),
    "CUDA, older": RuntimeError("CUDA error: out of memory"),
    "CUDA driver": RuntimeError("CUDA driver error: out of memory"),
    "HIP": torch.AcceleratorError("HIP error: out of memory"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "hipBLAS": RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling hipblasCreate"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "NCCL": torch.distributed.DistBackendError(NCCL + "Cuda failure 2 'out of memory'"),
    "NCCL, older": torch.distributed.DistBackendError(NCCL + "Cuda failure 'out of memory'"),
    "NCCL, last message": torch.distributed.DistBackendError(
        NCCL + "Failed to CUDA calloc async 608 bytes"
    ),
    "host": host_allocation(),
    "host, Python": MemoryError(),
    "host, C++": RuntimeError("std::bad_alloc"),
    "host, mapped file": RuntimeError("unable to mmap 8 bytes from file: Cannot allocate memory"),
    "host, fork": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "compiler": BackendCompilerFailed(lambda: None, CUDA, None),
    "inductor": InductorError(torch.AcceleratorError("CUDA error: out of memory"), None),
    "inductor, raised": while_handling(InductorError(MemoryError(), None), MemoryError()),
    "cause": following(RuntimeError("the step failed"), CUDA),
    "cause of a cause": following(ValueError("no"), following(KeyError("x"), CUDA)),
    "context": while_handling(RuntimeError("clean-up failed"), CUDA),
}
OTHERS = {
    "illegal address": torch.AcceleratorError("CUDA error: an illegal memory access was found"),
    "shared memory of a kernel": RuntimeError(
        "out of resource: shared memory, Required: 147456, Hardware limit: 101376"
    ),
    "no kernels": torch.AcceleratorError("CUDA error: no kernel image is available for execution"),
    "NCCL, another rank": torch.distributed.DistBackendError(LOST + "NET/Socket: recv failed"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    "cuBLAS, of several causes": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "compiler": InductorError(RuntimeError("out of resource: shared memory"), None),
    "not an error of torch": ValueError("out of memory"),
    "another file error": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("error", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_out_of_memory_gives_the_status_oom(error: BaseException) -> None:
    assert is_out_of_memory(error)
    record = describe_failure(failure_of(error))
    assert record["status"] == "oom"
    assert record["error"]["type"] in ("OutOfMemoryError", "MemoryError")


@pytest.mark.parametrize("error", OTHERS.values(), ids=OTHERS.keys())
def test_other_errors_are_not_taken_for_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    assert describe_failure(failure_of(error))["status"] == "crashed"


def test_a_signal_while_memory_ran_out_is_still_a_stop() -> None:
    stopped = while_handling(Stopped(15, step=3), CUDA)
    assert describe_failure(failure_of(stopped))["status"] == "preempted"


def test_an_error_that_is_its_own_cause_is_described() -> None:
    error = KeyError("x")
    error.__cause__ = error
    assert failure_of(error).type == "KeyError"
