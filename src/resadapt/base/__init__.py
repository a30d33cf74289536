"""Words and tools for all rooms.

Errors, descriptions as data, digests, running a model without a trace.
"""
