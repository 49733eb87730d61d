"""Erasures in plain diffusers pipelines, and files that other programs read and write."""
