"""From a user's YAML to one validated value: compose (parents, overrides, interpolation), then the typed schema."""
