"""Tests for plugins: the conformance kit and pytest fixtures."""

from __future__ import annotations

from recsys.testing.kit import Check, Contract, ContractError, contract

__all__ = ["Check", "Contract", "ContractError", "contract"]
