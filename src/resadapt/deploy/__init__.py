"""Stock models from injected models: folded adapters and inference copies."""
