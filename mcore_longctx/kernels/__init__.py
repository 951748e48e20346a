"""Computation on one device: attention with its log-sum-exp and direct backward."""
