"""Allocators and search back ends: how many units does each group keep."""
