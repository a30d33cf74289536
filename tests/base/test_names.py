"""Names in messages."""

from __future__ import annotations

from resadapt.base.errors import quote_names, quote_reasons


def test_a_message_lists_eight_names_and_counts_the_rest() -> None:
    names = [f"n{number}" for number in range(11)]
    eight = "'n0', 'n1', 'n2', 'n3', 'n4', 'n5', 'n6', 'n7'"
    assert quote_names(names[:1]) == "'n0'"
    assert quote_names(names[:8]) == eight
    assert quote_names(names) == f"{eight} and 3 more"
    assert quote_reasons(dict.fromkeys(names[:2], "is gone")) == "'n0' is gone; 'n1' is gone"
    assert quote_reasons(dict.fromkeys(names, "")).endswith("'n7'  and 3 more")
