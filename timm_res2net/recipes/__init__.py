"""Configurations for timm's train script, what writes their data, and two small programs: a study and a table."""
