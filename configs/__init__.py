"""Presets and built-in models: values only."""
