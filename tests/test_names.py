"""Names in messages."""

from __future__ import annotations

from resadapt.base.names import listing, reasons_listing


def test_a_message_lists_eight_names_and_counts_the_rest() -> None:
    names = [f"n{number}" for number in range(11)]
    eight = "'n0', 'n1', 'n2', 'n3', 'n4', 'n5', 'n6', 'n7'"
    assert listing(names[:1]) == "'n0'"
    assert listing(names[:8]) == eight
    assert listing(names) == f"{eight} and 3 more"
    assert reasons_listing(dict.fromkeys(names[:2], "is gone")) == "'n0' is gone; 'n1' is gone"
    assert reasons_listing(dict.fromkeys(names, "")).endswith("'n7'  and 3 more")
