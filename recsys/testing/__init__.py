"""Tests for plugins: the conformance kit and pytest fixtures."""
