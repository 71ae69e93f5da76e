"""Tests of the backfill: its sources, ids, plan, parts and totals."""
