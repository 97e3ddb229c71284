"""Checks the verdicts of `compare` on real steps, beside two busy processes."""

import pytest

from scaling.__main__ import main


@pytest.mark.alone
@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_every_promise_of_a_comparison_holds(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["compare", "--self-test"])
    assert code == 0, capsys.readouterr().out
