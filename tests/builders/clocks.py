"""Clocks that tests move by hand."""


class FakeTime:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self._processor_s = self._waited_s = 0.0

    def work(self, seconds: float) -> None:
        """Spends time on the processor."""
        self._processor_s += seconds

    def sleep(self, seconds: float) -> None:
        self._waited_s += seconds

    def process_time(self) -> float:
        return self._processor_s

    def perf_counter(self) -> float:
        return self._processor_s + self._waited_s
