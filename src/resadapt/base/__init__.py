"""What everything stands on: errors, descriptions as data, digests, running a model without a trace."""
