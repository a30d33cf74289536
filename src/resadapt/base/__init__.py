"""Words and tools for all rooms: errors, descriptions as data, digests, running a model without a trace."""
