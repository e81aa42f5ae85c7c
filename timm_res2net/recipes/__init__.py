"""Configurations for timm's train script, and what writes their data."""
