"""Training: configurations for timm's script, detectors and segmenters, their data, a study, and what 8 bits cost."""
