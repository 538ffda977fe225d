"""Plugins: hooks, registry, option schemas, built-ins, scaffold."""
