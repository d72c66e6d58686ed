"""Anchored memories of any depth: reference, chunk and decode forms."""
