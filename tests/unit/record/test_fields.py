"""Type checks of JSON fields name the first field that is wrong."""

from typing import Any

import pytest

from unitransformer.record.fields import check_fields


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"outer": {"count": 1}}, None),
        ({"outer": {"count": True}}, "record: outer.count is True; it must be int"),
        ({"outer": {"count": 10**400}}, "record: outer.count is 1000"),
        ({"outer": {}}, "record: outer.count is missing"),
        ({"outer": [1]}, "record: outer.count is missing"),
        ([1], "record: outer.count is missing"),
        (None, "record: outer.count is missing"),
    ],
)
def test_the_first_wrong_field_is_named(values: Any, message: str | None) -> None:
    if message is None:
        check_fields(values, {"outer.count": int}, "record")
        return
    with pytest.raises(ValueError, match=message):
        check_fields(values, {"outer.count": int}, "record")


@pytest.mark.parametrize("values", [None, [], 3])
def test_what_is_not_an_object_lacks_every_field(values: Any) -> None:
    with pytest.raises(ValueError, match="record: count is missing"):
        check_fields(values, {"count": int}, "record")
